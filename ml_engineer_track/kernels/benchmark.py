"""Are our kernels right, and are they worth having? Correctness on this device first; speed and memory where there is a GPU.

    make kernels
    python -m ml_engineer_track kernels

- matrix-vector: the linear shapes of three models, one request and eight, beside bitsandbytes' NF4 and a bf16 product. The figure
  is bandwidth: bytes that must move (packed weights, scales, inputs, outputs) / time, as a share of what copying reaches here.
- cross-entropy: tokens/s of forward and backward, and memory beyond the logits themselves, beside PyTorch's.

Without a GPU the kernels run in Triton's interpreter on small shapes, in a process of its own, and no speed is told.

How time is taken: a matrix of 7 B fits the last-level cache of a large GPU, and a decoding step finds none of its weights there.
So as many copies of the weight as fill the cache four times over take turns, recorded in one CUDA graph: what it costs Python to
launch a kernel (`eager`, told beside it) would hide what the kernel costs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from ml_engineer_track.kernels.correctness import Case, check_all
from ml_engineer_track.kernels.cross_entropy import cross_entropy
from ml_engineer_track.kernels.dequant_matvec import dequant_matvec, quantize
from ml_engineer_track.kernels.device import INTERPRETED, need_triton, triton_gpu
from shared.errors import UserError
from shared.hardware import fingerprint
from shared.settings import ROOT

#: (model, outputs, inputs): the square, the widening and the narrowing layer of each
SHAPES = (
    ("135 M", 576, 576), ("135 M", 1536, 576), ("135 M", 576, 1536),
    ("0.6 B", 1024, 1024), ("0.6 B", 3072, 1024), ("0.6 B", 1024, 3072),
    ("7 B", 4096, 4096), ("7 B", 11008, 4096), ("7 B", 4096, 11008), ("7 B", 14336, 4096), ("7 B", 4096, 14336),
)  # fmt: skip
BATCHES = (1, 8)
#: (model, tokens, vocabulary)
VOCABULARIES = (("135 M", 8192, 49152), ("7 B", 8192, 32000), ("0.6 B", 8192, 151936))
COPY_BYTES = 2**31
REPEATS = 20
SIDES = ("ours, 4 bits", "ours, 2 bits", "bitsandbytes nf4", "bf16")


@dataclass(frozen=True)
class Product:
    """One side at one shape. `bandwidth` in bytes/s, `share` of the copy's, times in seconds."""

    model: str
    rows: int
    columns: int
    batch: int
    side: str
    seconds: float
    eager_seconds: float
    bytes_moved: int
    bandwidth: float
    share: float


@dataclass(frozen=True)
class Loss:
    """Forward and backward of one side; `peak_bytes` beyond the logits, the gradient included."""

    model: str
    tokens: int
    vocabulary: int
    side: str
    tokens_per_second: float
    peak_bytes: int


@dataclass(frozen=True)
class Results:
    """Everything a run knows; without a GPU `copy_bandwidth` is None and the two last are empty."""

    hardware: dict[str, Any]
    interpreted: bool
    cases: list[Case]
    copy_bandwidth: float | None = None
    products: list[Product] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)


def benchmark() -> Results:
    """Check, then measure where there is a GPU and every case is right. UserError when Triton is missing."""
    need_triton("this command", gpu=False)
    import triton

    hardware = fingerprint() | {"triton": triton.__version__}
    if INTERPRETED or not triton_gpu():
        return Results(hardware, True, interpreted_cases())
    cases = check_all(torch.device("cuda"))
    speeds = measure() if all(case.right for case in cases) else {}
    return Results(hardware, False, cases, **speeds)


def interpreted_cases() -> list[Case]:
    """The checks in a process that runs Triton's interpreter."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "ml_engineer_track.kernels.correctness"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(
            f"the kernels do not run in Triton's interpreter: {last}", "this environment", "Is it the pinned version?"
        )
    return [Case(**{**row, "shape": tuple(row["shape"])}) for row in json.loads(done.stdout.strip().splitlines()[-1])]


# --- on a GPU -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure() -> dict[str, Any]:
    """Copy bandwidth, products and losses, as `Results` takes them."""
    copied = copy_bandwidth()
    products = []
    work = [(shape, batch, side) for shape in SHAPES for batch in BATCHES for side in SIDES]
    for (model, rows, columns), batch, side in tqdm(work, desc="products", unit="case", leave=False):
        calls, moved = product(side, rows, columns, batch)
        seconds = graph_seconds(calls)
        rate = moved / seconds
        products.append(Product(model, rows, columns, batch, side, seconds, eager_seconds(calls), moved, rate, rate / copied))
    losses = [
        loss(model, tokens, vocabulary, side)
        for model, tokens, vocabulary in tqdm(VOCABULARIES, desc="losses", unit="vocabulary", leave=False)
        for side in LOSSES
    ]
    return {"copy_bandwidth": copied, "products": products, "losses": losses}


def copy_bandwidth() -> float:
    """Bytes/s of copying a buffer far larger than any cache, read and written bytes counted; the best of several."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / min(timed(lambda: target.copy_(source)) for _ in range(REPEATS))


def product(side: str, rows: int, columns: int, batch: int) -> tuple[list[Callable[[], object]], int]:
    """Calls that multiply the same inputs with one copy of the weight each, and the bytes that one of them must move."""
    weight = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(batch, columns, device="cuda", dtype=torch.bfloat16)
    operands: tuple[torch.Tensor, ...]
    if side.startswith("ours"):
        bits = int(side.split()[1])
        operands = quantize(weight, bits)[:3]

        def bind(words: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> Callable[[], object]:
            return lambda: dequant_matvec(x, words, scales, zeros, bits)
    elif side.startswith("bitsandbytes"):
        import bitsandbytes as bnb

        packed, first = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        operands = (packed, first.absmax)

        def bind(packed: torch.Tensor, absmax: torch.Tensor) -> Callable[[], object]:
            state = bnb.functional.QuantState(absmax, first.shape, first.code, first.blocksize, first.quant_type, first.dtype)
            return lambda: bnb.matmul_4bit(x, packed, state)
    else:
        operands = (weight,)

        def bind(weight: torch.Tensor) -> Callable[[], object]:
            return lambda: F.linear(x, weight)

    size = sum(t.nbytes for t in operands)
    copies = max(2, -(-4 * torch.cuda.get_device_properties(0).L2_cache_size // size))
    calls = [bind(*(t.clone() for t in operands)) for _ in range(copies)]
    return calls, size + x.nbytes + batch * rows * x.element_size()


def graph_seconds(calls: Sequence[Callable[[], object]]) -> float:
    """Seconds of one call when all of them, one after the other, are one CUDA graph; the best of several replays."""
    for call in calls[:3]:  # compiles and tunes, which a graph must not contain
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return min(timed(graph.replay) for _ in range(REPEATS)) / len(calls)


def eager_seconds(calls: Sequence[Callable[[], object]]) -> float:
    """Seconds of one call as the server makes it, from Python, in a row of hundreds."""
    many = [calls[n % len(calls)] for n in range(300)]
    torch.cuda.synchronize()
    start = time.perf_counter()
    for call in many:
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / len(many)


def timed(run: Callable[[], object]) -> float:
    """Seconds on the GPU's own clock."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


#: PyTorch's own as transformers calls it, on float32 copies; PyTorch's on bf16 as it is; ours.
LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "ours": cross_entropy,
    "PyTorch on float32": lambda logits, targets: F.cross_entropy(logits.float(), targets),
    "PyTorch on bf16": F.cross_entropy,
}


@torch.enable_grad()
def loss(model: str, tokens: int, vocabulary: int, side: str) -> Loss:
    """Forward and backward; the logits' gradient is made anew each time, as in training."""
    logits = torch.randn(tokens, vocabulary, device="cuda", dtype=torch.bfloat16).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), device="cuda")

    def step() -> None:
        logits.grad = None
        LOSSES[side](logits, targets).backward()

    step()
    logits.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    peak = torch.cuda.max_memory_allocated() - before
    return Loss(model, tokens, vocabulary, side, tokens / min(timed(step) for _ in range(REPEATS)), peak)
