"""What a training step takes: memory by component and FLOPs, from the model's config alone; and how to fit a memory limit.

Why an ML engineer does this before training: a run that stops for want of memory after an hour is an hour lost, and "it was slow"
means nothing without the arithmetic that was asked for.

    python -m ml_engineer_track accounting [--preset tiny]      predicted beside measured: accounting_report.py
    make ml VRAM_GB=8                                           `fit_to_vram`: before training, within a limit

Nothing is estimated from parameter counts: one training step of the very model class runs on tensors that have a shape and
no memory (PyTorch's FakeTensorMode), and every storage that would be alive is counted; activations, logits and temporaries
follow from the code. FLOPs are counted on the same step. Batches are taken as padded (attention mask included), as fine-tuning
makes them. What is added by formula: NF4 weights (Dettmers et al. 2023, section 3: 4 bits + 8/64 + 32/(64·256) bits a weight)
and AdamW's two float32 moments. `benchmarks fit` predicts with the same functions.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ml_engineer_track.curate import CuratedData
from ml_engineer_track.finetune import Example, bucket, encode
from ml_engineer_track.models import load_tokenizer
from ml_engineer_track.progress import progress
from shared.errors import UserError
from shared.hardware import compute_dtype, device
from shared.settings import Finetune, Settings

Method = Literal["lora", "qlora", "full"]
GIB = 2**30
#: Left free for the CUDA context, library workspaces and fragmentation: an allowance, not a measurement.
ALLOWANCE = 0.08
#: bits of one NF4 weight with double quantisation
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
#: Attention on the CPU is an operation of its own, which PyTorch's FLOP counter does not know; shapes as its CUDA twins'.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda gradient, q, k, v, *_, **__: (
        sdpa_backward_flop_count(gradient, q, k, v)
    ),
}


@dataclass(frozen=True)
class Plan:
    """What is asked about. `reply_tokens` of each row of `context` tokens get logits in training; 0 means all of them."""

    model: str
    method: Method = "lora"
    context: int = 2048
    batch: int = 1
    reply_tokens: int = 0
    rank: int = 16
    dtype: str = "bfloat16"
    targets: str | list[str] = "all-linear"
    checkpointing: bool = False

    @property
    def kept(self) -> int:
        return min(self.reply_tokens or self.context - 1, self.context - 1)


@dataclass(frozen=True)
class Prediction:
    """Bytes by component at the moment of the peak; `per_row` is what one more row of the batch would add."""

    components: dict[str, int]
    per_row: int

    @property
    def total(self) -> int:
        return sum(self.components.values())

    def largest_batch(self, capacity: float, batch: int) -> int:
        fixed = self.total - self.per_row * batch
        return max(0, int((capacity - fixed) // self.per_row))


def predict_training(plan: Plan) -> Prediction:
    """Peak of a training step after the first (optimiser states exist), gradients accumulated nowhere."""
    config, dtype = read_config(plan.model), getattr(torch, plan.dtype)
    check_context(config, plan)
    model = training_skeleton(config, plan)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    trained = [p for p in model.parameters() if p.requires_grad]
    with FakeTensorMode(allow_non_fake_inputs=True), LiveMemory() as live:
        materialise(model)
        weights = live.now
        fake_step(model, plan, dtype)
    gradients = sum(p.numel() * p.element_size() for p in trained)
    step = live.peak - weights
    # At the end of a step all gradients are there and no activation is; at its widest moment it is mostly the other way.
    extra = step if step > gradients else gradients
    components = {
        "weights": sum(p.numel() * p.element_size() for p in frozen) if plan.method != "full" else weights,
        "adapter": 0 if plan.method == "full" else gradients,
        "gradients": min(gradients, extra),
        "optimizer": sum(8 * p.numel() for p in trained),
        "activations": extra - min(gradients, extra),
    }
    if plan.method == "qlora":
        linear = quantised_parameters(model)
        width = dtype.itemsize
        components["weights"] += sum(int(n * NF4_BITS / 8) for n in linear) - sum(n * width for n in linear)
        components["dequantised weight (temporary)"] = max(linear) * width
    return Prediction(components, components["activations"] // plan.batch)


def predict_components(plan: Plan) -> dict[str, int]:
    """Bytes by component, logits apart: what the step takes beyond one in which a single token of each row gets logits."""
    whole, lone = predict_training(plan), predict_training(replace(plan, reply_tokens=1))
    found = dict(whole.components)
    found["activations"] += found.pop("dequantised weight (temporary)", 0)
    found["logits"] = min(max(0, whole.total - lone.total), found["activations"])
    found["activations"] -= found["logits"]
    return found


def step_flops(plan: Plan) -> int:
    """FLOPs of the matrix products and attention of one forward and backward pass; a multiply and an add are two.

    Counted, not estimated: with checkpointing the second forward pass is in it. Causal attention counts as if it were full,
    as PyTorch's counter has it.
    """
    config, dtype = read_config(plan.model), getattr(torch, plan.dtype)
    check_context(config, plan)
    model = training_skeleton(config, plan)
    with FakeTensorMode(allow_non_fake_inputs=True):
        materialise(model)
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            fake_step(model, plan, dtype)
    return int(counter.get_total_flops())


# --- fitting a memory limit ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """Rows that go through the model at once: `rows` of `length` tokens, `kept` of each with logits."""

    rows: int
    length: int
    kept: int


@dataclass(frozen=True)
class Choice:
    """How steps fit a limit: the tokens that go through at once, recomputing or not, and the peak predicted for that."""

    micro_batch_tokens: int
    checkpointing: bool
    bytes: int
    shape: Shape


def fit_to_vram(settings: Settings, data: CuratedData) -> Settings:
    """The settings, changed so that training on `data` fits `settings.vram_gb`; says what was chosen. As they are without it.

    UserError when nothing fits, with the least that would.
    """
    if settings.vram_gb is None:
        return settings
    options = settings.finetune
    examples = encode(data.rows("train"), load_tokenizer(settings.model_path))
    found = choose(settings, shapes(examples, options), settings.vram_gb)
    print(f"  VRAM_GB={settings.vram_gb:g}: {described(found, options)}", flush=True)
    # What is as it was stays unset: the finetune stage then finds its last result.
    micro = None if found.micro_batch_tokens == options.batch_tokens else found.micro_batch_tokens
    changed = options.model_copy(update={"micro_batch_tokens": micro, "gradient_checkpointing": found.checkpointing})
    return settings.model_copy(update={"finetune": changed})


def choose(settings: Settings, steps: Sequence[Shape], vram_gb: float) -> Choice:
    """The cheapest way through `steps` within the limit. The step itself, and so what is learnt, stays the same.

    Cutting a step into parts costs next to nothing, checkpointing a second forward pass (about a third more arithmetic):
    so first whole steps, then ever smaller parts, and only then the same again with checkpointing.
    """
    capacity = vram_gb * GIB * (1 - ALLOWANCE)
    least: Choice | None = None
    sizes = micro_sizes(steps, settings.finetune.batch_tokens)
    with progress("memory", total=2 * len(sizes)) as bar:
        for checkpointing in (False, True):
            for size in sizes:
                found = worst(settings, steps, size, checkpointing)
                bar.update(1)
                if found.bytes <= capacity:
                    return found
                least = found if least is None or found.bytes < least.bytes else least
    assert least is not None
    needed = math.ceil(100 * least.bytes / (1 - ALLOWANCE) / GIB) / 100
    other = "" if settings.finetune.method == "qlora" else ", METHOD=qlora"
    shape = least.shape
    raise UserError(
        f"too little for any training step ({shape.rows} x {shape.length} tokens take {gib(least.bytes)} even with gradient "
        "checkpointing)", f"VRAM_GB={vram_gb:g}", f"Use VRAM_GB={needed:g} or more{other}, or a smaller MODEL",
    )  # fmt: skip


def described(choice: Choice, options: Finetune) -> str:
    """One line about a choice."""
    parts = (
        "whole steps"
        if choice.micro_batch_tokens >= options.batch_tokens
        else f"steps of {options.batch_tokens:,} tokens in parts of at most {choice.micro_batch_tokens:,} (the same gradient)"
    )
    again = "with gradient checkpointing" if choice.checkpointing else "no gradient checkpointing"
    return f"{parts}, {again}; {gib(choice.bytes)} predicted at most, {ALLOWANCE:.0%} of the limit left free"


def shapes(examples: Sequence[Example], options: Finetune) -> list[Shape]:
    """The different steps of a run, as `finetune.plan_batches` cuts them."""
    groups = bucket(examples, options.batch_tokens, options.batch_rows)
    return list(dict.fromkeys(shape_of([examples[i] for i in group]) for group in groups))


def shape_of(rows: Sequence[Example]) -> Shape:
    return Shape(len(rows), max(len(e.ids) for e in rows), max(e.reply for e in rows))


def micro_sizes(steps: Sequence[Shape], batch_tokens: int) -> list[int]:
    """`batch_tokens` and its halves, down to where every part is one row."""
    longest, sizes = max(step.length for step in steps), [batch_tokens]
    while sizes[-1] > longest:
        sizes.append(max(longest, sizes[-1] // 2))
    return sizes


def worst(settings: Settings, steps: Sequence[Shape], micro_tokens: int, checkpointing: bool) -> Choice:
    """The largest predicted peak of all parts: that of the one with most tokens, or of the one with most logits."""
    parts = [part(step, micro_tokens) for step in steps]
    widest = {max(parts, key=lambda p: (p.rows * p.length, p.kept)), max(parts, key=lambda p: (p.rows * p.kept, p.length))}
    sized = [(predict_training(step_plan(settings, p, checkpointing)).total, p) for p in sorted(widest, key=str)]
    size, shape = max(sized, key=lambda pair: pair[0])
    return Choice(micro_tokens, checkpointing, size, shape)


def part(step: Shape, micro_tokens: int) -> Shape:
    """The largest part of a step that is cut as `finetune` cuts it."""
    pieces = math.ceil(step.rows / max(1, micro_tokens // step.length))
    return replace(step, rows=math.ceil(step.rows / pieces))


def step_plan(settings: Settings, shape: Shape, checkpointing: bool) -> Plan:
    """What fine-tuning with these settings asks of the device for rows of this shape."""
    f, dtype = settings.finetune, str(compute_dtype(device())).removeprefix("torch.")
    return Plan(
        settings.model_path, f.method, shape.length, shape.rows, shape.kept, f.rank, dtype, f.targets, checkpointing
    )  # fmt: skip


def gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


# --- a model without memory ------------------------------------------------------------------------------------------


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of every storage an operation returns for as long as it lives; `peak` is their largest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return made

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


def read_config(model: str) -> PreTrainedConfig:
    """The config of a folder, a config.json or a hub id. UserError when there is none."""
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        first = str(error).strip().split("\n")[0][:120]
        raise UserError(f"cannot read the config: {first}", model, "Give a model folder, a config.json or a hub id") from None
    return cast(PreTrainedConfig, config.get_text_config())


def check_context(config: PreTrainedConfig, plan: Plan) -> None:
    if plan.context < 2 or plan.batch < 1:
        raise UserError("context must be at least 2 and batch at least 1", "fit")
    longest = getattr(config, "max_position_embeddings", plan.context)
    if plan.context > longest:
        raise UserError(f"context {plan.context} is longer than the model's {longest}", plan.model, "Lower --context")


def skeleton(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model's modules with parameters on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def training_skeleton(config: PreTrainedConfig, plan: Plan) -> torch.nn.Module:
    """The skeleton as training holds it: an adapter on a frozen base, or everything trained."""
    # Full fine-tuning keeps float32 weights and computes under autocast, as mixed precision is usually done.
    model = skeleton(config, torch.float32 if plan.method == "full" else getattr(torch, plan.dtype))
    trained: torch.nn.Module = model
    if plan.method != "full":
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        settings = LoraConfig(r=plan.rank, lora_alpha=2 * plan.rank, target_modules=plan.targets, task_type="CAUSAL_LM")
        trained = get_peft_model(model, settings)
    if plan.checkpointing:
        # Nothing here draws random numbers, and their state could not be set on tensors without memory.
        model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    return trained.train()


def materialise(model: torch.nn.Module) -> None:
    """Give every parameter and buffer a (fake) storage on the CPU; tied parameters keep one."""
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in _present(module._parameters):
            if id(parameter) not in made:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                made[id(parameter)] = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]
        for name, buffer in _present(module._buffers):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def fake_step(model: torch.nn.Module, plan: Plan, dtype: torch.dtype) -> None:
    """A forward and a backward pass, as `finetune.backward` makes them, on fake tensors."""
    fake_loss(model, plan, dtype).backward()


def fake_loss(model: torch.nn.Module, plan: Plan, dtype: torch.dtype) -> torch.Tensor:
    """`finetune.reply_losses`. A function of its own, as there: what only it holds is gone before the backward pass."""
    ids = torch.zeros((plan.batch, plan.context), dtype=torch.long)
    mask = torch.ones_like(ids)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=plan.kept + 1
        ).logits
    labels = ids[:, -plan.kept :].flatten()
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels, reduction="none")
    return (losses * torch.ones_like(losses)).sum()


def quantised_parameters(model: torch.nn.Module) -> list[int]:
    """Weights of each projection that NF4 storage quantises: every Linear but the output head and the adapters."""
    return [
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name and "lora_" not in name
    ]


def _present(entries: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    return iter([(name, value) for name, value in entries.items() if value is not None])
