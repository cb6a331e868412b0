"""The walls: how fast this device can move memory and multiply matrices, and which share of that a figure reaches.

Why: "90 tokens/s" says nothing about whether there is anything left to gain. Decoding reads every weight once for each
step, so memory bandwidth limits it (MBU); prefill and training multiply large matrices, so arithmetic does (MFU). Both
limits are measured here, on the device and with the library the figures come from, not read from a datasheet.

    python -m benchmarks limits

- memory_bandwidth: best of three access patterns over a buffer far larger than any cache, bytes/s
- matmul_peak: best of five large matrix products, FLOP/s (`shared.hardware.matmul_peak`)
- MBU = (weight bytes read per step + KV cache read per step) / tpot / memory_bandwidth  (Databricks 2023)
- MFU = FLOPs the model needs / time / matmul_peak  (PaLM, Chowdhery et al. 2022, appendix B)
An MBU above 1 is no mistake where the weights fit in the last-level cache: they are then not read from memory at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import psutil
import torch
from transformers import PreTrainedModel

from benchmarks.budget import Task
from benchmarks.fit import kv_bytes_per_token
from benchmarks.results import Record
from ml_engineer_track.models import weight_bytes
from shared.hardware import compute_dtype, device, matmul_peak, synchronize

NAME = "limits"
READS = 7


@dataclass(frozen=True)
class Limits:
    """bytes/s and FLOP/s of this device in its compute dtype."""

    memory_bandwidth: float
    matmul_peak: float


def measure(task: Task) -> Iterator[Record]:
    """One record for the device: both limits, with the best rate of each access pattern."""
    target = device()
    dtype = compute_dtype(target)
    rates = bandwidths()
    metrics: dict[str, float | None] = {f"bandwidth_{name}": max(values) for name, values in rates.items()}
    metrics |= {"memory_bandwidth": max(max(v) for v in rates.values()), "matmul_peak": matmul_peak(target, dtype)}
    if dtype != torch.float32:
        metrics["matmul_peak_float32"] = matmul_peak(target, torch.float32)
    samples = {f"bandwidth_{name}": values for name, values in rates.items()}
    yield Record(suite=NAME, model="this device", case={"dtype": str(dtype)[6:]}, metrics=metrics, samples=samples)


def limits_of(record: Record) -> Limits:
    return Limits(float(record.metrics["memory_bandwidth"] or 0), float(record.metrics["matmul_peak"] or 0))


def bandwidths() -> dict[str, list[float]]:
    """bytes/s of reading (sum), of reading as decoding does (matrix times vector) and of copying (read and written)."""
    target = device()
    size = buffer_bytes(target)
    columns = 4096
    rows = size // 4 // columns
    matrix = torch.ones(rows, columns, device=target)
    vector, copy = torch.ones(columns, device=target), torch.empty_like(matrix)
    moved = matrix.numel() * 4
    work: dict[str, tuple[Callable[[], object], int]] = {
        "read": (lambda: matrix.sum(), moved),
        "matvec": (lambda: matrix @ vector, moved),
        "copy": (lambda: copy.copy_(matrix), 2 * moved),
    }
    rates: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(READS + 1):  # the first turn warms up
        for name, (run, size) in work.items():
            synchronize(target)
            start = time.perf_counter()
            run()
            synchronize(target)
            if turn:
                rates[name].append(size / (time.perf_counter() - start))
    return rates


def buffer_bytes(target: torch.device) -> int:
    """4 GiB on a GPU, 512 MiB on a CPU, less where less is free: far beyond any cache."""
    free = torch.cuda.mem_get_info()[0] if target.type == "cuda" else psutil.virtual_memory().available
    return int(min(2**32 if target.type == "cuda" else 2**29, free // 8))


def decode_bytes(model: PreTrainedModel, batch: int, context: int) -> int:
    """Bytes one decode step must read: all weights (of an untied input embedding only the rows used) and the KV cache."""
    return weight_bytes(model) - _unread_embedding(model) + batch * context * kv_bytes_per_token(model.config, model.dtype)


def prefill_flops(model: PreTrainedModel, batch: int, tokens: int) -> float:
    """2 FLOPs for each weight of the blocks and token, causal attention (half the square), the head for the last token."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * head_dim
    vocabulary = config.vocab_size * config.hidden_size
    body = unquantised_parameters(model) - vocabulary * (1 if config.tie_word_embeddings else 2)
    attention = 2 * config.num_hidden_layers * width * tokens**2
    return float(batch * (2 * body * tokens + attention + 2 * vocabulary))


def unquantised_parameters(model: torch.nn.Module) -> int:
    """Number of weights, a 4-bit one counted as one although two share a byte."""
    seen: dict[int, int] = {}
    for p in model.parameters():
        state = getattr(p, "quant_state", None)
        seen[id(p)] = int(torch.Size(state.shape).numel()) if state is not None else p.numel()
    return sum(seen.values())


def mbu(bytes_per_step: float, seconds: float, limits: Limits | None) -> float | None:
    return bytes_per_step / seconds / limits.memory_bandwidth if limits else None


def mfu(flops: float, seconds: float, limits: Limits | None) -> float | None:
    return flops / seconds / limits.matmul_peak if limits else None


def _unread_embedding(model: PreTrainedModel) -> int:
    if model.config.tie_word_embeddings:
        return 0
    weight = model.get_input_embeddings().get_parameter("weight")
    return int(weight.numel() * weight.element_size())
