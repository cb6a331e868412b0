"""Measures a training step on this device, by component, in a fresh process: what accounting.py predicts.

Why in a process of its own: a library's import and an earlier model would otherwise be counted.

    python -m ml_engineer_track.accounting_measure '{"model": ..., ...}'      (started by `measure`; the last line is JSON)

Two counts, because they answer different questions. `tensors` is PyTorch's own count of what was alive at once, which is what a
prediction can be held to. `process` is what the machine has to have: on a GPU the allocator's maximum, on a CPU how far the
process's resident memory rose above what it was before the model was loaded (with the allocator's slack and the
kernels' scratch space).
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import psutil
import torch

from ml_engineer_track.accounting import Plan
from ml_engineer_track.benchmark import peak_rss
from ml_engineer_track.finetune import Batch, add_adapter, backward
from ml_engineer_track.models import load_model, weight_bytes, without_cpu_fast_path
from shared.errors import UserError
from shared.hardware import device, matmul_peak, synchronize
from shared.settings import ROOT, load_settings

#: steps that are timed, after one that is not
TIMED = 5


@dataclass(frozen=True)
class Measured:
    """Bytes by component and in all, seconds of each timed step, and this device's matrix-product peak (FLOP/s)."""

    components: dict[str, int]
    tensors: int
    process: int
    process_what: str
    seconds: list[float]
    matmul_peak: float


def measure(plan: Plan) -> Measured:
    """A few real training steps in a fresh process. UserError when they fail there."""
    return Measured(**json.loads(in_fresh_process("ml_engineer_track.accounting_measure", plan)))


def in_fresh_process(module: str, plan: Any) -> str:
    """The last line that `module` prints when it is run with a plan as JSON. UserError when it fails there."""
    command = [sys.executable, "-m", module, json.dumps(asdict(plan))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"the measured step failed: {last}", plan.model, "Is there enough free memory?")
    return done.stdout.strip().splitlines()[-1]


def measure_here(plan: Plan) -> Measured:
    """The same in this process, which must not have done anything large before."""
    process, before = psutil.Process(), psutil.Process().memory_info().rss
    training = Training(plan)
    training.step()
    seconds = [timed(training.step) for _ in range(TIMED)]
    cuda = device().type == "cuda"
    used = int(torch.cuda.max_memory_allocated()) if cuda else peak_rss(process) - before
    what = "torch.cuda.max_memory_allocated" if cuda else "rise of the resident memory"

    parts = training.resident()
    gradients = training.gradient_bytes()
    whole = max(peak_of(training.step), gradients)
    training.batch = padded_batch(replace(plan, reply_tokens=1), training.vocabulary)
    lone = max(peak_of(training.step), gradients)
    logits = min(max(0, whole - lone), whole - gradients)
    parts |= {"gradients": gradients, "activations": whole - gradients - logits, "logits": logits}
    dtype = getattr(torch, plan.dtype)
    return Measured(parts, sum(parts.values()), used, what, seconds, matmul_peak(device(), dtype))


def measured_peak(plan: Plan) -> int:
    """Peak tensor bytes of real training: weights of the real model, real backward, real fused AdamW, second step."""
    training = Training(plan)
    training.step()
    return sum(training.resident().values()) + peak_of(training.step)


class Training:
    """A model as training holds it, its optimiser, and one batch of random tokens to take steps on."""

    def __init__(self, plan: Plan) -> None:
        self.model = real_model(plan)
        self.vocabulary = self.model.config.vocab_size
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, fused=True)
        self.batch = padded_batch(plan, self.vocabulary)
        self.adapter = 0 if plan.method == "full" else sum(p.numel() * p.element_size() for p in self.trained)

    def step(self) -> None:
        backward(self.model, self.batch, 1)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def resident(self) -> dict[str, int]:
        """Bytes that stay between steps."""
        states = sum(t.numel() * t.element_size() for s in self.optimizer.state.values() for t in s.values() if t.dim())
        return {"weights": weight_bytes(self.model) - self.adapter, "adapter": self.adapter, "optimizer": states}

    def gradient_bytes(self) -> int:
        """Bytes of all gradients after a backward pass; they are dropped again."""
        backward(self.model, self.batch, 1)
        size = sum(p.grad.numel() * p.grad.element_size() for p in self.trained if p.grad is not None)
        self.optimizer.zero_grad(set_to_none=True)
        return size


def timed(work: Callable[[], Any]) -> float:
    """Seconds, queued GPU work included."""
    synchronize(device())
    start = time.perf_counter()
    work()
    synchronize(device())
    return time.perf_counter() - start


def peak_of(work: Callable[[], Any]) -> int:
    """Bytes of tensors `work` had alive at most, beyond those that were there before: the allocator's own count."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return int(torch.cuda.max_memory_allocated()) - before
    from torch._C._profiler import _EventType
    from torch.profiler import ProfilerActivity, profile

    gc.collect()  # what a cycle keeps would be freed at some moment of the work
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events, counted = list(profiler.profiler.kineto_results.experimental_event_tree()), []
    while events:
        event = events.pop()
        events += event.children
        if event.tag == _EventType.Allocation:
            counted.append((event.start_time_ns, event.extra_fields.total_allocated, event.extra_fields.alloc_size))
    if not counted:
        return 0
    _, total, size = min(counted)
    # The count goes on from one profile to the next, with what the last one saw made and not freed.
    return max(total for _, total, _ in counted) - (total - size)


def real_model(plan: Plan) -> Any:
    """The model as training holds it: adapter on a frozen base, or everything in float32 for full fine-tuning."""
    torch.manual_seed(0)
    if plan.method == "full":
        model = load_model(plan.model, torch.float32)
        if plan.checkpointing:
            model.activation_checkpointing_enable()
        return model.train()
    asked = {"rank": plan.rank, "targets": plan.targets, "gradient_checkpointing": plan.checkpointing}
    options = load_settings("tiny", method="lora").finetune.model_copy(update=asked)
    base = load_model(plan.model, getattr(torch, plan.dtype), "nf4" if plan.method == "qlora" else "")
    return add_adapter(without_cpu_fast_path(base), options).train()


def padded_batch(plan: Plan, vocabulary: int) -> Batch:
    """Random tokens; the first row is one token longer than the others, so the mask cannot be left out."""
    shape, target = (plan.batch, plan.context), device()
    ids = torch.randint(3, vocabulary, shape, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(shape, dtype=torch.long)
    mask[-1, 0] = 0
    return Batch(ids.to(target), mask.to(target), ids.to(target), torch.ones(shape).to(target), plan.kept)


if __name__ == "__main__":
    print(json.dumps(asdict(measure_here(Plan(**json.loads(sys.argv[1]))))))
