"""Merges the adapter into the base and stores the result in fewer bits.

Why an ML engineer does this: decoding is limited by how many bytes of weights move per token, and memory decides what
fits on the device at all. NF4 (4-bit normal floats, double quantisation; Dettmers et al. 2023) needs about a quarter of
bf16's bytes in every projection; embeddings and norms stay as they are.

    python -m ml_engineer_track quantize [--preset tiny]

The adapter is merged into *full-precision* weights, also after QLoRA: merging into 4-bit weights rounds twice.
A quantised model is saved before its first forward pass, because bitsandbytes repacks weights for the CPU in place; then it
is loaded back, and both must give the same numbers.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ml_engineer_track.finetune import Tuned
from ml_engineer_track.models import load_model, load_tokenizer, weight_bytes
from shared.errors import UserError
from shared.files import need_disk
from shared.settings import Settings


@dataclass(frozen=True)
class Variants:
    """Model folders by variant name (`bf16` is the merged model), and their weights in memory, in bytes."""

    folders: dict[str, str]
    weight_bytes: dict[str, int]


def quantize(settings: Settings, tuned: Tuned) -> Variants:
    """Write `bf16` and every variant of the settings below `settings.work/quantize`, each a complete model folder."""
    work = settings.work / "quantize"
    tokenizer = load_tokenizer(settings.model_path)
    merged = merge(tuned)
    need_disk(work, 2 * weight_bytes(merged))
    folders, sizes = {"bf16": work / "bf16"}, {}
    save(merged.to(torch.bfloat16), tokenizer, folders["bf16"])
    del merged
    sizes["bf16"] = weight_bytes(load_model(str(folders["bf16"]), torch.bfloat16))
    for name in settings.quantize.variants:
        folders[name] = work / name
        model = load_model(str(folders["bf16"]), variant=name)
        save(model, tokenizer, folders[name])
        sizes[name] = weight_bytes(model)
        check_round_trip(model, load_model(str(folders[name])), name)
    return Variants({name: str(folder) for name, folder in folders.items()}, sizes)


def merge(tuned: Tuned) -> PreTrainedModel:
    """The tuned model as one set of float32 weights."""
    base = load_model(tuned.base, torch.float32)
    return PeftModel.from_pretrained(base, tuned.adapter).merge_and_unload()


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write model and tokenizer aside and swap the folder in."""
    aside = folder.with_name(folder.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


@torch.no_grad()
def check_round_trip(model: PreTrainedModel, loaded: PreTrainedModel, name: str) -> None:
    """Both must give identical logits, and tied embeddings must still be one matrix. UserError otherwise."""
    ids = torch.arange(3, 35, device=model.device)[None, :] % model.config.vocab_size
    if not torch.equal(model(ids).logits, loaded(ids).logits):
        raise UserError(f"variant {name} does not load back as it was saved", "quantize", "Check the bitsandbytes version")
    tied = model.config.tie_word_embeddings
    if tied and loaded.get_input_embeddings().weight.data_ptr() != loaded.get_output_embeddings().weight.data_ptr():
        raise UserError(f"variant {name} lost its tied embeddings", "quantize", "Check the transformers version")
