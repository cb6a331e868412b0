"""Fine-tuning: tokens a second, the share of the matrix-product peak, waiting for data, and memory, LoRA beside QLoRA.

Why: training time is what an experiment costs, and memory decides whether it runs at all. The steps are those of
`ml_engineer_track.finetune`, on rows of one fixed length, with the batch doubled until memory or the budget is full.

    python -m benchmarks run --suite training [--model FOLDER]

`tokens_per_second` counts all tokens of a step, `mfu` the FLOPs LoRA needs (4 for each frozen weight and token, 6 for each
trained one) against the measured peak, `data_wait_share` the time spent making batches. Memory in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from peft import PeftModel

from benchmarks.budget import REPEATS, Task
from benchmarks.limits import Limits, mfu, unquantised_parameters
from benchmarks.results import Record
from ml_engineer_track.benchmark import peak_rss
from ml_engineer_track.finetune import Example, add_adapter, backward, collate, load_base
from shared.errors import UserError
from shared.hardware import device, synchronize
from shared.settings import ROOT, load_settings

NAME = "training"
METHODS = ("lora", "qlora")
ROW_TOKENS, REPLY_TOKENS = 256, 64
FIRST_BATCH, LAST_BATCH = 2, 1024


@dataclass(frozen=True)
class Step:
    seconds: float
    waited: float


class Trainer:
    """One method on one model, ready to take steps of any batch size."""

    def __init__(self, path: str, method: str) -> None:
        settings = load_settings("tiny", model=path, method=method)
        torch.manual_seed(settings.seed)
        self.model: PeftModel = add_adapter(load_base(settings), settings.finetune).train()
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad], lr=settings.finetune.learning_rate, fused=True
        )
        self.vocabulary = int(self.model.config.vocab_size)
        self.parts = 1
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        self.flops_per_token = 4.0 * (unquantised_parameters(self.model) - trained) + 6.0 * trained

    def rows(self, batch: int) -> list[Example]:
        generator = torch.Generator().manual_seed(batch)
        ids = torch.randint(3, self.vocabulary, (batch, ROW_TOKENS), generator=generator).tolist()
        return [Example(row, [1.0] * REPLY_TOKENS) for row in ids]

    def step(self, batch: int) -> Step:
        """Make a batch, forward, backward, update. `parts` grows when the rows did not fit at once."""
        started = time.perf_counter()
        made = collate(self.rows(batch), 0)
        waited = time.perf_counter() - started
        _, self.parts = backward(self.model, made, 1)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        synchronize(device())
        return Step(time.perf_counter() - started, waited)


def measure(task: Task, limits: Limits | None = None) -> Iterator[Record]:
    """Batch sweep of every method in turn, on the first model; then memory at the first and the last batch that ran."""
    name, path = base_model(task.models)
    sides = {method: Trainer(path, method) for method in METHODS}
    ran: dict[str, list[int]] = {method: [] for method in METHODS}
    batch, open_sides = FIRST_BATCH, list(METHODS)
    while open_sides and batch <= LAST_BATCH:
        started = time.perf_counter()
        for method in list(open_sides):
            sides[method].step(batch)  # warms up, and tells whether the rows fit
            if sides[method].parts > 1:
                task.skip(f"{method}, batch {batch}: memory is full")
                open_sides.remove(method)
        # The memory passes at the end need their time too.
        if not open_sides or not task.fits(REPEATS * (time.perf_counter() - started) + 20, f"batch {batch}"):
            break
        steps: dict[str, list[Step]] = {method: [] for method in open_sides}
        for turn in range(REPEATS):
            for method in open_sides if turn % 2 == 0 else reversed(open_sides):
                steps[method].append(sides[method].step(batch))
        for method, taken in steps.items():
            ran[method].append(batch)
            yield describe(name, method, batch, taken, sides[method].flops_per_token, limits)
        batch *= 2
    del sides
    for method, batches in ran.items():
        for size in dict.fromkeys([*batches[:1], *batches[-1:]]):
            if task.fits(8, f"memory of {method}, batch {size}"):
                yield Record(suite=NAME, model=name, case=case_of(method, size, "memory"), metrics=memory(path, method, size))


def base_model(models: dict[str, str]) -> tuple[str, str]:
    """The model to fine-tune: full-precision weights, which every run has first."""
    return next(iter(models.items()))


def describe(name: str, method: str, batch: int, steps: list[Step], flops_per_token: float, limits: Limits | None) -> Record:
    """Totals over totals, and the rate of each step as a sample."""
    seconds, tokens = sum(s.seconds for s in steps), batch * ROW_TOKENS * len(steps)
    metrics: dict[str, float | None] = {
        "tokens_per_second": tokens / seconds,
        "mfu": mfu(flops_per_token * tokens, seconds, limits),
        "data_wait_share": sum(s.waited for s in steps) / seconds,
    }
    samples = {"tokens_per_second": [batch * ROW_TOKENS / s.seconds for s in steps]}
    return Record(suite=NAME, model=name, case=case_of(method, batch, "steps"), metrics=metrics, samples=samples)


def case_of(method: str, batch: int, what: str) -> dict[str, str | int | float]:
    return {"what": what, "method": method, "batch": batch, "row_tokens": ROW_TOKENS}


def memory(path: str, method: str, batch: int) -> dict[str, Any]:
    """Peak memory of a fresh process that takes two steps, in bytes. UserError when it fails."""
    command = [sys.executable, "-m", "benchmarks.training", path, method, str(batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"the memory pass failed: {last}", path, "Is there enough free memory?")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def _memory_pass(path: str, method: str, batch: int) -> dict[str, float | None]:
    process = psutil.Process()
    before = process.memory_info().rss
    trainer = Trainer(path, method)
    trainer.step(batch)
    trainer.step(batch)
    peak, cuda = peak_rss(process), device().type == "cuda"
    return {
        "max_ram": float(peak),
        "model_ram": float(peak - before),
        "max_process_vram": float(torch.cuda.max_memory_reserved()) if cuda else None,
        "max_allocated": float(torch.cuda.max_memory_allocated()) if cuda else None,
    }


if __name__ == "__main__":
    print(json.dumps(_memory_pass(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
