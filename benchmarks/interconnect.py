"""What more workers would bring: time of an exchange from latency and bandwidth, and the share of a step that is left.

Why an engineer does the arithmetic before renting machines: an adapter's gradients are a hundred megabytes, a whole model's
tens of gigabytes, and which of the two travels decides whether a cheap network will do.

- all-reduce of B bytes among N workers in a ring: 2(N-1) messages of B/N bytes one after the other, so
  t = 2(N-1) · latency + 2(N-1)/N · B / bandwidth   (Patarasuk and Yuan 2009; the linear cost of a message is Hockney's, 1994)
- all-gather or reduce-scatter of B bytes: half of that, t = (N-1) · latency + (N-1)/N · B / bandwidth
- DDP exchanges the gradients once a step. FSDP gathers the weights for the forward and again for the backward pass and
  scatters the gradients (Zhao et al. 2023; with everything trained that is 1.5 times DDP's volume: Rajbhandari et al. 2020)
- efficiency = time to compute / (time to compute + time to exchange): nothing overlaps, which is the worst case

Hierarchies (NVLink within a machine, a network between) are not modelled: the slowest link of the ring sets its speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Link:
    """`bandwidth` in bytes/s in one direction, `latency` of one message in seconds."""

    name: str
    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Load:
    """One worker's step: FLOPs it computes; bytes of the gradients, and of the weights that FSDP gathers twice (0 under DDP)."""

    name: str
    flops: float
    gradients: float
    gathered: float = 0.0

    def seconds(self, workers: int, link: Link) -> float:
        """Of all exchanges of a step."""
        if not self.gathered:
            return all_reduce(workers, self.gradients, link)
        return 2 * half(workers, self.gathered, link) + half(workers, self.gradients, link)


def all_reduce(workers: int, size: float, link: Link) -> float:
    return 2 * half(workers, size, link)


def half(workers: int, size: float, link: Link) -> float:
    """Seconds of an all-gather or reduce-scatter of `size` bytes in a ring."""
    return (workers - 1) * link.latency + (workers - 1) / workers * size / link.bandwidth


def efficiency(compute: float, exchange: float) -> float:
    return compute / (compute + exchange)


def fitted(name: str, workers: int, seconds: dict[int, Sequence[float]]) -> Link:
    """The link whose all-reduce takes the measured times: medians by size in bytes, least squares in relative error."""
    sizes = np.array(list(seconds), dtype=float)
    medians = np.array([np.median(values) for values in seconds.values()])
    columns = np.stack([np.full_like(sizes, 2 * (workers - 1)), 2 * (workers - 1) / workers * sizes], axis=1)
    latency, inverse = np.linalg.lstsq(columns / medians[:, None], np.ones_like(medians), rcond=None)[0]
    return Link(name, bandwidth=float(1 / max(inverse, 1e-15)), latency=float(max(latency, 0.0)))


# --- assumptions -----------------------------------------------------------------------------------------------------

#: Nominal rates in one direction, as the standards and data sheets have them; latencies of a message are assumptions.
LINKS = (
    Link("10 Gb/s Ethernet", 1.25e9, 50e-6),
    Link("100 Gb/s RoCE", 12.5e9, 10e-6),
    Link("400 Gb/s InfiniBand", 50e9, 5e-6),
    Link("NVLink 4", 450e9, 3e-6),
)
#: An H100's dense bf16 rate in its data sheet, and the share of it that a step is assumed to reach.
GPU_FLOPS, ASSUMED_MFU = 989e12, 0.4
#: Tokens of a worker's step.
TOKENS = 4096
#: (name, weights, of these trained): Qwen3-0.6B and Llama-2-7B, LoRA of rank 16 on every projection.
QWEN, QWEN_ADAPTER = 596e6, 28 * 16 * ((1024 + 2048) * 2 + (1024 + 1024) * 2 + (1024 + 3072) * 3)
LLAMA, LLAMA_ADAPTER = 6.74e9, 32 * 16 * ((4096 + 4096) * 4 + (4096 + 11008) * 3)


def lora_flops(frozen: float, trained: float) -> float:
    """Of a step of TOKENS tokens: 4 FLOPs for each frozen weight and token, 6 for each trained one."""
    return TOKENS * (4 * frozen + 6 * trained)


#: Adapters and their gradients are float32, everything else bf16.
LOADS = (
    Load("0.6 B, LoRA, DDP", lora_flops(QWEN, QWEN_ADAPTER), 4 * QWEN_ADAPTER),
    Load("7 B, LoRA, DDP", lora_flops(LLAMA, LLAMA_ADAPTER), 4 * LLAMA_ADAPTER),
    Load("7 B, LoRA, FSDP", lora_flops(LLAMA, LLAMA_ADAPTER), 4 * LLAMA_ADAPTER, 2 * LLAMA + 4 * LLAMA_ADAPTER),
    Load("7 B, all weights, DDP", TOKENS * 6 * LLAMA, 2 * LLAMA),
)
WORKERS = (2, 8, 64)


def predicted_table() -> str:
    """Efficiency by model, link and number of workers, as Markdown."""
    head = ["one worker's step", "gradients", "compute", "link", *(f"{n} workers" for n in WORKERS)]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for load in LOADS:
        compute = load.flops / (GPU_FLOPS * ASSUMED_MFU)
        for link in LINKS:
            shares = [f"{efficiency(compute, load.seconds(n, link)):.0%}" for n in WORKERS]
            about = [load.name, f"{load.gradients / 1e6:,.0f} MB", f"{compute * 1e3:.0f} ms", link.name]
            lines.append(f"| {' | '.join([*about, *shares])} |")
    return "\n".join(lines)
