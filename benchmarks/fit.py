"""Will it fit? Predicts the memory of training and of serving a model, component by component, from its config alone.

Why: renting a GPU to find out that it is too small is the dear way of finding out.

    python -m benchmarks fit --model ml_engineer_track/base_model --method lora --context 512 --batch 4
    python -m benchmarks fit --model folder/config.json --method qlora --context 4096 --batch 4
    ... --check      also runs one step in a fresh process and prints the measured peak beside the prediction

Nothing is estimated from parameter counts: one training step of the very model class runs on tensors that have a shape and
no memory (PyTorch's FakeTensorMode), and every storage that would be alive is counted; activations, logits and temporaries
follow from the code. Batches are taken as padded (attention mask included), as fine-tuning makes them.
What is added by formula: NF4 weights (Dettmers et al. 2023, section 3: 4 bits + 8/64 + 32/(64·256) bits a weight), AdamW's
two float32 moments, and the KV cache (2 · layers · kv heads · head dim · bytes, for each token).
"""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ml_engineer_track.finetune import Batch, add_adapter, backward
from ml_engineer_track.models import load_model, weight_bytes, without_cpu_fast_path
from shared.errors import UserError
from shared.hardware import compute_dtype, device
from shared.settings import ROOT, Finetune, load_settings

Method = Literal["lora", "qlora", "full"]
METHODS: tuple[Method, ...] = ("lora", "qlora", "full")
GIB = 2**30
#: Memory of common GPUs, GiB.
GPUS = {
    "RTX 4060 (8)": 8, "RTX 3060 (12)": 12, "T4 (16)": 15, "RTX 4090 / L4 / A10 (24)": 24, "RTX 5090 (32)": 32,
    "A100 (40)": 40, "L40S (48)": 48, "A100 / H100 (80)": 80, "H200 (141)": 140,
}  # fmt: skip
#: Left free on a GPU for the CUDA context, library workspaces and fragmentation: an allowance, not a measurement.
ALLOWANCE = 0.08
#: bits of one NF4 weight with double quantisation
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)


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
    # Full fine-tuning keeps float32 weights and computes under autocast, as mixed precision is usually done.
    model: torch.nn.Module = skeleton(config, torch.float32 if plan.method == "full" else dtype)
    if plan.method != "full":
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        settings = LoraConfig(r=plan.rank, lora_alpha=2 * plan.rank, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, settings)
    model.train()
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


def predict_serving(plan: Plan) -> Prediction:
    """`batch` sequences of `context` tokens in the cache, prompts prefilled one at a time; NF4 weights for `qlora`."""
    config, dtype = read_config(plan.model), getattr(torch, plan.dtype)
    check_context(config, plan)
    model = skeleton(config, dtype).eval()
    with FakeTensorMode(allow_non_fake_inputs=True), LiveMemory() as live, torch.no_grad():
        materialise(model)
        weights = live.now
        ids = torch.zeros((1, plan.context), dtype=torch.long)
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, logits_to_keep=1)
    cache = plan.batch * plan.context * kv_bytes_per_token(config, dtype)
    components = {"weights": weights, "KV cache": cache, "prefill (temporary)": live.peak - weights}
    if plan.method == "qlora":
        linear = quantised_parameters(model)
        components["weights"] += sum(int(n * NF4_BITS / 8) for n in linear) - sum(n * dtype.itemsize for n in linear)
    return Prediction(components, cache // plan.batch)


def kv_bytes_per_token(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Keys and values of one token in all layers, in bytes."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * dtype.itemsize)


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


def check(plan: Plan) -> int:
    """The measured peak of two training steps in a fresh process, in bytes of tensors (as the prediction counts)."""
    command = [sys.executable, "-m", "benchmarks.fit", json.dumps(asdict(plan))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"the measured step failed: {last}", plan.model, "Is there enough free memory?")
    return int(done.stdout.strip().splitlines()[-1])


def measured_peak(plan: Plan) -> int:
    """Peak tensor bytes of real training: weights of the real model, real backward, real fused AdamW, second step."""
    options = load_settings("tiny", method="lora").finetune.model_copy(update={"rank": plan.rank})
    model = real_model(plan, options)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    batch = padded_batch(plan, model.config.vocab_size)

    def step() -> None:
        backward(model, batch, 1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    states = sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values() if t.dim())
    return weight_bytes(model) + states + peak_of(step)


def peak_of(work: Callable[[], Any]) -> int:
    """Bytes of tensors `work` had alive at most, beyond those that were there before: the allocator's own count."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return int(torch.cuda.max_memory_allocated()) - before
    from torch._C._profiler import _EventType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events, totals = list(profiler.profiler.kineto_results.experimental_event_tree()), [0]
    while events:
        event = events.pop()
        events += event.children
        if event.tag == _EventType.Allocation:
            totals.append(event.extra_fields.total_allocated)
    return max(totals)


def real_model(plan: Plan, options: Finetune) -> Any:
    """The model as training holds it: adapter on a frozen base, or everything in float32 for full fine-tuning."""
    torch.manual_seed(0)
    if plan.method == "full":
        return load_model(plan.model, torch.float32).train()
    dtype = getattr(torch, plan.dtype)
    base = load_model(plan.model, dtype, "nf4" if plan.method == "qlora" else "")
    return add_adapter(without_cpu_fast_path(base), options).train()


def padded_batch(plan: Plan, vocabulary: int) -> Batch:
    """Random tokens; the first row is one token longer than the others, so the mask cannot be left out."""
    shape, target = (plan.batch, plan.context), device()
    ids = torch.randint(3, vocabulary, shape, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(shape, dtype=torch.long)
    mask[-1, 0] = 0
    return Batch(ids.to(target), mask.to(target), ids.to(target), torch.ones(shape).to(target), plan.kept)


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


def skeleton(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model's modules with parameters on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


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
    """A forward and a backward pass, as `ml_engineer_track.finetune.backward` makes them, on fake tensors."""
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


# --- what people read ------------------------------------------------------------------------------------------------


def fit(plan: Plan, checked: bool = False) -> dict[str, Any]:
    """Predictions for training and serving, what fits where, and the measured peak when asked."""
    training, serving = predict_training(plan), predict_serving(plan)
    found: dict[str, Any] = {
        "model": plan.model, "method": plan.method, "context": plan.context, "batch": plan.batch,
        "training": {**training.components, "total": training.total},
        "serving": {**serving.components, "total": serving.total},
        "gpus": [row(name, size, training, serving, plan) for name, size in GPUS.items()],
        "measured": None,
    }  # fmt: skip
    if checked:
        found["measured"] = check(plan)
        found["predicted_to_measured"] = training.total / found["measured"]
    return found


def row(name: str, gib: float, training: Prediction, serving: Prediction, plan: Plan) -> dict[str, Any]:
    capacity = gib * GIB * (1 - ALLOWANCE)
    return {
        "gpu": name,
        "training_fits": training.total <= capacity,
        "training_largest_batch": training.largest_batch(capacity, plan.batch),
        "serving_fits": serving.total <= capacity,
        "serving_largest_batch": serving.largest_batch(capacity, plan.batch),
    }


def print_fit(found: dict[str, Any]) -> None:
    """Components in GiB, then the list of GPUs."""
    for what in ("training", "serving"):
        print(f"{what}, {found['method']}, context {found['context']}, batch {found['batch']}")
        for name, size in found[what].items():
            print(f"  {name:32s} {size / GIB:10.3f} GiB")
    if found["measured"]:
        print(f"  {'measured training peak':32s} {found['measured'] / GIB:10.3f} GiB")
    print(f"{'GPU (GiB)':28s} {'training':>9s} {'largest batch':>14s} {'serving':>9s} {'most chats':>11s}")
    for gpu in found["gpus"]:
        fits = ["fits" if gpu[f"{what}_fits"] else "no" for what in ("training", "serving")]
        most = (gpu["training_largest_batch"], gpu["serving_largest_batch"])
        print(f"{gpu['gpu']:28s} {fits[0]:>9s} {most[0]:>14,d} {fits[1]:>9s} {most[1]:>11,d}")
    print(f"{ALLOWANCE:.0%} of each GPU is left for the CUDA context, workspaces and fragmentation.")


def default_dtype() -> str:
    """The dtype this machine computes in."""
    return str(compute_dtype(device())).removeprefix("torch.")


def local_config(path: str) -> str:
    """A folder's or file's path made absolute; a hub id as it is."""
    return str(Path(path).resolve()) if Path(path).exists() else path


if __name__ == "__main__":
    print(measured_peak(Plan(**json.loads(sys.argv[1]))))
