"""Cuts a student out of its teacher: fewer layers, a narrower residual stream, the same vocabulary.

Why an ML engineer does not start from random weights: a small model that has read nothing would have to learn language from a
few thousand rows. What the teacher knows sits in its matrices, and most of it survives a change of basis:

* **Width.** RMSNorm without its gain commutes with rotations, so the residual stream may be turned into any orthonormal basis
  when every matrix that reads from or writes to it is turned too (SliceGPT, Ashkboos et al. 2024). In the basis of its
  principal components the least of them are cut off. The embeddings, a quarter of the bundled model, shrink the same way.
* **Depth.** Layers at even distances are kept, the first and the last among them (DistilBERT, Sanh et al. 2019).
* **Feed-forward width.** The neurons that speak the loudest stay: mean activation times the length of what they write.

The result talks nonsense until it is trained; how much better a start it is than noise, `from-scratch` of distill.py says.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ml_engineer_track.finetune import Batch
from shared.errors import UserError
from shared.hardware import device
from shared.settings import Distill

#: Families whose layers are the ones below; the same that gguf_export.py writes.
FAMILIES = ("llama", "qwen2", "qwen3")
#: What a student may have of its teacher's parameters, embeddings included.
LARGEST = 1 / 3
#: which norm's gain a matrix reads through
READS = {
    "q_proj": "input_layernorm", "k_proj": "input_layernorm", "v_proj": "input_layernorm",
    "gate_proj": "post_attention_layernorm", "up_proj": "post_attention_layernorm",
}  # fmt: skip
WRITES = ("o_proj", "down_proj")


@dataclass(frozen=True)
class View:
    """What was seen of the teacher at work. `basis` (hidden, student hidden) has orthonormal columns and holds `kept` of the
    residual stream's energy; `loudness` has one figure per layer and feed-forward neuron."""

    basis: torch.Tensor
    kept: float
    loudness: torch.Tensor


def student_config(teacher: PreTrainedConfig, options: Distill) -> PreTrainedConfig:
    """The teacher's config with the student's sizes; heads keep their size. UserError for sizes it cannot have."""
    if teacher.model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UserError(f"no student can be cut out of a model of type {teacher.model_type!r}", "distill", f"Types: {known}")
    config = copy.deepcopy(teacher)
    config.head_dim = getattr(teacher, "head_dim", None) or teacher.hidden_size // teacher.num_attention_heads
    for name, wanted in (
        ("hidden_size", options.hidden), ("num_hidden_layers", options.layers), ("intermediate_size", options.intermediate),
    ):  # fmt: skip
        if wanted > getattr(teacher, name):
            setting = f"distill.{name.removesuffix('_size').removeprefix('num_hidden_')}"
            raise UserError(
                f"the student's {name} {wanted} is more than the teacher's {getattr(teacher, name)}", setting, "Lower it"
            )
        setattr(config, name, wanted)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept_layers(teacher.num_hidden_layers, options.layers)]
    return config


def blank_student(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """A student of random weights in float32."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device())


def sliced_student(teacher: PreTrainedModel, options: Distill, calibration: Sequence[Batch]) -> PreTrainedModel:
    """A student cut out of the teacher along what it was seen doing on the calibration batches, in float32."""
    student = AutoModelForCausalLM.from_config(student_config(teacher.config, options), dtype=torch.float32)
    view = look(teacher, calibration, options.hidden)
    given = {name: tensor.detach().to("cpu", torch.float32) for name, tensor in teacher.state_dict().items()}
    weights = {
        name: _cut(name, given, view, teacher.config, options)
        for name in student.state_dict()
        if not (name == "lm_head.weight" and student.config.tie_word_embeddings)
    }
    student.load_state_dict(weights, strict=False)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.to(device())


def check_size(student: PreTrainedModel, teacher: PreTrainedModel) -> float:
    """The student's share of the teacher's parameters. UserError above LARGEST."""
    share = float(student.num_parameters() / teacher.num_parameters())
    if share > LARGEST:
        raise UserError(
            f"a student of {student.num_parameters() / 1e6:.2f} M parameters is {share:.0%} of its teacher's "
            f"{teacher.num_parameters() / 1e6:.2f} M, at most a third is allowed",
            "distill.hidden, layers, intermediate", "Lower them",
        )  # fmt: skip
    return share


def kept_layers(layers: int, keep: int) -> list[int]:
    """Numbers of `keep` of `layers` layers at even distances, first and last included.

    >>> kept_layers(9, 5)
    [0, 2, 4, 6, 8]
    """
    return [0] if keep == 1 else [round(i * (layers - 1) / (keep - 1)) for i in range(keep)]


@torch.no_grad()
def look(teacher: PreTrainedModel, calibration: Sequence[Batch], hidden: int) -> View:
    """Watch the teacher read: the principal directions of its residual stream and the loudness of its neurons.

    Every position counts alike, whatever its length: the norms in front of all matrices divide by it.
    """
    width, layers = teacher.config.hidden_size, teacher.model.layers
    energy = torch.zeros(width, width, dtype=torch.float64)
    loudness = torch.zeros(len(layers), teacher.config.intermediate_size)
    shown = torch.zeros(0)

    def listen(number: int) -> Any:
        def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            loudness[number] += inputs[0][shown].float().abs().sum(0).cpu()

        return layers[number].mlp.down_proj.register_forward_pre_hook(hook)

    hooks = [listen(number) for number in range(len(layers))]
    try:
        for batch in calibration:
            shown = batch.mask.bool()
            positions = (batch.mask.cumsum(-1) - 1).clamp(min=0)
            out = teacher.model(
                input_ids=batch.ids, attention_mask=batch.mask, position_ids=positions, use_cache=False, output_hidden_states=True
            )
            for states in out.hidden_states[:-1]:  # the last one has been through the final norm
                unit = torch.nn.functional.normalize(states[shown].double(), dim=-1)
                energy += (unit.T @ unit).cpu()
    finally:
        for hook in hooks:
            hook.remove()
    values, vectors = torch.linalg.eigh(energy)  # ascending
    kept = float(values[-hidden:].sum() / values.sum())
    written = torch.stack([layer.mlp.down_proj.weight.detach().float().norm(dim=0).cpu() for layer in layers])
    return View(vectors[:, -hidden:].flip(1).float(), kept, loudness * written)


def _cut(name: str, given: dict[str, torch.Tensor], view: View, teacher: PreTrainedConfig, options: Distill) -> torch.Tensor:
    """One tensor of the student.

    The student's norms divide by the length of what is left of the stream over fewer dimensions, which makes their output larger
    or smaller than the teacher's by `scale`; the gains of the teacher's norms move into the matrices that read through them.
    """
    basis = view.basis
    scale = math.sqrt(basis.shape[0] / basis.shape[1] * view.kept)
    parts = name.split(".")
    part, kind, layer = parts[-2], parts[-1], None
    if "layers" in parts:
        at = parts.index("layers") + 1
        layer = kept_layers(teacher.num_hidden_layers, options.layers)[int(parts[at])]
        parts[at] = str(layer)
    value = given[".".join(parts)]
    if part == "embed_tokens":
        return value @ basis
    if part == "lm_head":
        return (value * given["model.norm.weight"]) @ basis * scale
    if part in ("input_layernorm", "post_attention_layernorm"):
        return torch.ones(basis.shape[1])
    if part == "norm":
        # With tied embeddings the gain has no matrix to move into: of the turned gain the diagonal is what a norm can hold.
        return (basis.square() * value[:, None]).sum(0) * scale if teacher.tie_word_embeddings else torch.ones(basis.shape[1])
    loud = view.loudness[layer].topk(options.intermediate).indices.sort().values if layer is not None else None
    if part in READS:
        if kind == "weight":
            gain = given[".".join([*parts[:-3], READS[part], "weight"])]
            value = (value * gain) @ basis * scale
        return value[loud] if part in ("gate_proj", "up_proj") else value
    if part in WRITES:
        if kind == "weight":
            return basis.T @ (value[:, loud] if part == "down_proj" else value)
        return basis.T @ value
    return value  # norms inside a head, whose size does not change
