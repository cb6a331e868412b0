"""A model whose matrices are held in few bits: which matrices, in how many bits each, how large that is, and its files.

    python -m ml_engineer_track low-bits [--bits 2]      (low_bits_pipeline.py is the story, half_quadratic.py the method)

Every projection can be quantised, and so can the embedding, which a tied output layer shares. Tools that quantise leave it in 16
bits, and in a large model that hardly counts; in a small one it is most of the bytes as soon as the projections have 2 bits. So
sizes here are those of whole models, and the embedding is one more matrix to decide about.

A folder holds `low_bits.safetensors` (codes, scales, offsets, what stayed in bf16, a repair's LoRA matrices), `low_bits.json`
(bits and group of every matrix) and the model's own config and tokenizer. `models.load_model` reads it like any other model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model as load_tensors
from safetensors.torch import save_model as save_tensors
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ml_engineer_track.half_quadratic import LowBitEmbedding, LowBitLinear, LowBitMatrix, matrix_bytes
from shared.errors import UserError
from shared.files import replace_folder, write_json
from shared.hardware import device

FILE, LAYOUT_FILE = "low_bits.safetensors", "low_bits.json"
#: What `--bits` takes.
KNOWN_BITS = ("2", "3", "4", "mixed")


@dataclass(frozen=True)
class Plan:
    """Bits of every matrix that is quantised, by module name; all others stay as they are."""

    bits: dict[str, int]
    group: int


def matrices(model: PreTrainedModel, everywhere: bool) -> dict[str, nn.Module]:
    """The linear layers but for the output layer; `everywhere`: that one and the embedding, too, tied ones as one matrix.

    UserError when there are none.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    inner = {name: m for name, m in model.named_modules() if type(m) is nn.Linear and m is not head}
    if not inner:
        raise UserError("no linear layer to quantise", type(model).__name__, "Use a model in full precision")
    outer = [embedding] if type(embedding) is nn.Embedding else []
    if isinstance(head, nn.Linear) and not _tied(model):
        outer.append(head)
    return {name: m for name, m in model.named_modules() if name in inner or (everywhere and any(m is o for o in outer))}


def uniform(model: PreTrainedModel, bits: int, group: int, everywhere: bool = False) -> Plan:
    """The same number of bits for all matrices."""
    return Plan(dict.fromkeys(matrices(model, everywhere), bits), group)


def plan_bytes(model: PreTrainedModel, plan: Plan) -> int:
    """Bytes of the plan's matrices when they are packed."""
    return sum(matrix_bytes(*model.get_submodule(name).weight.shape, bits, plan.group) for name, bits in plan.bits.items())


def bits_per_weight(model: PreTrainedModel, plan: Plan) -> float:
    """Bits a weight of the plan's matrices takes, its share of scale and offset included."""
    return 8 * plan_bytes(model, plan) / sum(model.get_submodule(name).weight.numel() for name in plan.bits)


def pack_model(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """Replace the plan's matrices by packed ones, in place."""
    packed = {name: LowBitMatrix.of(model.get_submodule(name).weight, bits, plan.group) for name, bits in plan.bits.items()}
    _replace(model, packed)
    return model.requires_grad_(False).eval()


def keep_dense(model: PreTrainedModel) -> PreTrainedModel:
    """Have every matrix keep its weights unpacked: the same replies, soon enough to evaluate them."""
    for layer in _layers(model).values():
        layer.matrix.keep_dense(model.dtype)
    return model


def linear_layers(model: PreTrainedModel) -> list[LowBitLinear]:
    """The packed layers that LoRA can stand beside; a tied output layer is none of them."""
    head = model.get_output_embeddings()
    return [layer for layer in _layers(model).values() if isinstance(layer, LowBitLinear) and layer is not head]


# --- files -----------------------------------------------------------------------------------------------------------


def save_low_bits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a packed model and all that `load_low_bits` needs, aside first."""
    layers = _layers(model)
    layout = {name: [layer.matrix.bits, layer.matrix.group] for name, layer in layers.items()}
    ranks = {layer.down.shape[0] for layer in layers.values() if isinstance(layer, LowBitLinear) and layer.down is not None}

    def write(aside: Path) -> None:
        model.config.save_pretrained(aside)
        model.generation_config.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        save_tensors(model, str(aside / FILE))
        write_json(aside / LAYOUT_FILE, {"rank": max(ranks, default=0), "matrices": layout})

    replace_folder(folder, write)


def is_low_bits(path: str) -> bool:
    return (Path(path) / LAYOUT_FILE).exists()


def load_low_bits(path: str, dtype: torch.dtype) -> PreTrainedModel:
    """The packed model of a folder, in eval mode on this machine's device; `dtype` is that of everything that is not packed.

    UserError when the files do not belong together.
    """
    folder = Path(path)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    model.generation_config = GenerationConfig.from_pretrained(folder)
    try:
        layout: dict[str, Any] = json.loads((folder / LAYOUT_FILE).read_text(encoding="utf-8"))
        shapes = {name: model.get_submodule(name).weight.shape for name in layout["matrices"]}
        _replace(model, {name: LowBitMatrix(*shapes[name], *layout["matrices"][name]) for name in shapes})
        if layout["rank"]:
            for layer in linear_layers(model):
                layer.add_adapter(layout["rank"], dtype)
        load_tensors(model, folder / FILE)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise UserError(f"{LAYOUT_FILE}, {FILE} and config.json do not fit: {first}", path, "Make it again") from None
    return model.to(device()).requires_grad_(False).eval()


def check_bits(bits: str) -> None:
    """UserError for a BITS nobody can quantise to."""
    if bits not in KNOWN_BITS:
        raise UserError(f"cannot quantise to {bits!r} bits", "BITS", f"Use one of: {', '.join(KNOWN_BITS)}")


# --- helpers ---------------------------------------------------------------------------------------------------------


def _layers(model: PreTrainedModel) -> dict[str, Any]:
    """Every packed layer by name; a tied output layer is left out, for its matrix is the embedding's."""
    shared = getattr(model.get_input_embeddings(), "matrix", None)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LowBitEmbedding) or (isinstance(module, LowBitLinear) and module.matrix is not shared)
    }


def _replace(model: PreTrainedModel, packed: dict[str, LowBitMatrix]) -> None:
    """Put packed layers in the places of those they were made of; where the embedding is tied, the output layer shares its."""
    embedding, head, tied = model.get_input_embeddings(), model.get_output_embeddings(), _tied(model)
    names = {id(module): name for name, module in model.named_modules()}
    for name, matrix in packed.items():
        old = model.get_submodule(name)
        if old is not embedding:
            model.set_submodule(name, LowBitLinear(matrix, old.bias))
            continue
        model.set_submodule(name, LowBitEmbedding(matrix, old.weight.dtype))
        if tied:
            model.set_submodule(names[id(head)], LowBitLinear(matrix, head.bias))


def _tied(model: PreTrainedModel) -> bool:
    """Do the embedding and the output layer share one matrix?"""
    own, out = (getattr(m, "weight", None) for m in (model.get_input_embeddings(), model.get_output_embeddings()))
    return own is not None and own is out
