"""Weights in 2, 3, 4 or 8 bits, found without any data, and layers that hold them packed: half-quadratic quantisation (HQQ).

Why an ML engineer goes below 4 bits: where memory is what is short, half the bytes are twice the model. Rounding to the nearest
of four levels spread over a group's whole range loses too much; choosing the levels well loses half as much.

Neighbouring weights of a row share a group: a scale s and an offset o, both float16, so that w is stored as s q + o with a whole
number q of a few bits. Two steps find them:

* **the scale**: levels spread over the whole range of a group are spent on its outliers. Some narrower ranges are tried, and
  each group keeps the one with the least squared error.
* **the offset** (Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models"): minimise
  |w - s q - o|^p with p < 1, which forgives outliers. An extra variable e takes the outliers' part of the error, and then both
  halves of the problem have closed forms: e by the shrinkage of |.|^p, o as the mean of what is left. A few rounds of that; the
  best one counts.

The package `hqq` (0.2.8) is not used. It comes as source only and tries to build a CUDA extension whenever pip looks at it; it
takes no matrix that its groups do not divide, and no embedding; transformers refuses to map its layers to a CPU; and it keeps
the scale fixed, which at 2 bits costs nearly twice the squared error (normal weights in groups of 64: 0.19 of their variance,
here 0.10).

These layers unpack their whole matrix for every product. On a CPU that is far slower than not quantising at all: their place is
quality studies and memory, not speed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from shared.errors import UserError

#: How many codes fill how many bytes, by bits.
LAYOUT = {2: (4, 1), 3: (8, 3), 4: (2, 1), 8: (1, 1)}
#: Bytes of a group's scale and offset.
GROUP_BYTES = 4
#: Shares of a group's range that its levels may be spread over.
RANGES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
#: The norm, the weight of its splitting and that weight's growth, as published; errors are in units of the scale.
P, BETA, KAPPA = 0.7, 10.0, 1.01
ROUNDS = 8
#: The smallest scale that float16 can hold.
TINY = 2.0**-24
#: Weights that are worked on at once: what fits a core's cache.
SLAB = 2**18


def matrix_bytes(rows: int, columns: int, bits: int, group: int) -> int:
    """Bytes of a packed matrix, its scales and offsets and the padding of each row's last group included."""
    return int(rows * math.ceil(columns / group) * (group * bits // 8 + GROUP_BYTES))


def quantize(weight: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes (rows, groups * group) uint8, scales and offsets (rows, groups) float16 of a matrix (rows, columns).

    A row's last group is filled up with its last weight, which does not count. UserError for weights float16 cannot hold.
    """
    if not bool((weight.abs() < 65504).all()):
        raise UserError("a weight is not a number or too large for float16", "the model", "Fetch or publish it again")
    slabs = weight.float().split(max(1, SLAB // weight.shape[1]))
    codes, scales, offsets = zip(*(_quantize(slab, bits, group) for slab in slabs), strict=True)
    return torch.cat(codes), torch.cat(scales), torch.cat(offsets)


def _quantize(weight: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    top, (rows, columns) = 2**bits - 1, weight.shape
    short = -columns % group
    padded = torch.cat([weight, weight[:, -1:].expand(rows, short)], dim=1)
    w = padded.view(rows, -1, group)
    counts = (torch.arange(columns + short, device=weight.device) < columns).view(-1, group).float()
    lowest, highest = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)

    def codes_of(scale: torch.Tensor, offset: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        steps = (w - offset) / scale
        codes = steps.round().clamp_(0, top)
        left = (steps - codes).mul_(counts)
        return codes, left, (left * left).sum(-1, keepdim=True) * scale**2

    def keep(better: torch.Tensor, *pairs: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
        return [torch.where(better, new, old) for new, old in pairs]

    scale = offset = least = torch.full_like(lowest, math.inf)
    for share in RANGES:
        tried = _stored(((highest - lowest) * share / top).clamp(min=TINY))
        start = _stored((lowest + highest - tried * top) / 2)
        error = codes_of(tried, start)[2]
        scale, offset, least = keep(error < least, (tried, scale), (start, offset), (error, least))
    moved, beta = offset, BETA
    for _ in range(ROUNDS):
        _, left, _ = codes_of(scale, moved)
        outliers = left.sign() * (left.abs() - left.abs().clamp(min=1e-6) ** (P - 1) / beta).clamp_(min=0)
        moved = _stored(moved + scale * (left - outliers).sum(-1, keepdim=True) / counts.sum(-1, keepdim=True))
        error = codes_of(scale, moved)[2]
        offset, least = keep(error < least, (moved, offset), (error, least))
        beta *= KAPPA
    codes = codes_of(scale, offset)[0].to(torch.uint8).flatten(1)
    return codes, scale.squeeze(-1).half(), offset.squeeze(-1).half()


def _stored(values: torch.Tensor) -> torch.Tensor:
    """As they come back from float16: what is optimised is what will be stored."""
    return values.half().float()


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes (rows, n) as bytes (rows, n * bits / 8), the first code in the lowest bits; n fills whole bytes."""
    each, size = LAYOUT[bits]
    parts = codes.view(len(codes), -1, each).int()
    words = parts[..., :1]
    for place in range(1, each):
        words = words | parts[..., place : place + 1] << bits * place
    return (words >> 8 * torch.arange(size, device=codes.device, dtype=torch.int32) & 255).to(torch.uint8).flatten(1)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes (rows, n) of their bytes, int32."""
    each, size = LAYOUT[bits]
    parts = packed.view(len(packed), -1, size).int()
    words = parts[..., :1]
    for place in range(1, size):
        words = words | parts[..., place : place + 1] << 8 * place
    return (words >> bits * torch.arange(each, device=packed.device, dtype=torch.int32) & 2**bits - 1).flatten(1)


# --- layers ----------------------------------------------------------------------------------------------------------


class LowBitMatrix(nn.Module):
    """A packed matrix (rows, columns). Scales and offsets are the bits of their float16s, which `.to(dtype)` would else cast."""

    def __init__(self, rows: int, columns: int, bits: int, group: int) -> None:
        super().__init__()
        self.rows, self.columns, self.bits, self.group = rows, columns, bits, group
        groups = math.ceil(columns / group)
        self.codes = nn.Buffer(torch.zeros(rows, groups * group * bits // 8, dtype=torch.uint8))
        self.scale = nn.Buffer(torch.zeros(rows, groups, dtype=torch.int16))
        self.offset = nn.Buffer(torch.zeros(rows, groups, dtype=torch.int16))
        self.kept: torch.Tensor | None = None

    @classmethod
    def of(cls, weight: torch.Tensor, bits: int, group: int) -> LowBitMatrix:
        matrix = cls(*weight.shape, bits, group)
        codes, scale, offset = quantize(weight.detach(), bits, group)
        matrix.codes, matrix.scale, matrix.offset = pack(codes, bits), scale.view(torch.int16), offset.view(torch.int16)
        return matrix

    def dense(self, dtype: torch.dtype, chosen: torch.Tensor | None = None) -> torch.Tensor:
        """The weights (rows, columns), or some rows of them, as the layers multiply with them."""
        if self.kept is not None and self.kept.dtype == dtype:
            return self.kept if chosen is None else self.kept[chosen]
        parts = (self.codes, self.scale, self.offset)
        codes, scale, offset = parts if chosen is None else (part[chosen] for part in parts)
        numbers = unpack(codes, self.bits).view(len(codes), -1, self.group).float()
        spread = numbers.mul_(scale.view(torch.float16).float()[..., None])
        return spread.add_(offset.view(torch.float16).float()[..., None]).flatten(1)[:, : self.columns].to(dtype)

    def keep_dense(self, dtype: torch.dtype) -> None:
        """Keep the weights unpacked, too: the same numbers and many times as fast, but no memory saved."""
        self.kept = self.dense(dtype)


class LowBitLinear(nn.Module):
    """x W^T + b with a frozen packed W and, once it has an adapter, LoRA's (x down^T) up^T beside it."""

    def __init__(self, matrix: LowBitMatrix, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.matrix = matrix
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.down: nn.Parameter | None = None
        self.up: nn.Parameter | None = None

    def add_adapter(self, rank: int, dtype: torch.dtype = torch.float32) -> None:
        """Matrices that change nothing yet (Hu et al. 2021): `down` random, `up` zero."""
        place = self.matrix.codes.device
        self.down = nn.Parameter(torch.empty(rank, self.matrix.columns, device=place, dtype=dtype))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.up = nn.Parameter(torch.zeros(self.matrix.rows, rank, device=place, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = _FrozenProduct.apply(x, self.matrix)
        if self.bias is not None:
            product = product + self.bias
        if self.down is not None and self.up is not None:
            product = product + F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))
        return product


class LowBitEmbedding(nn.Module):
    """Rows of a packed matrix, which a tied output layer may share."""

    def __init__(self, matrix: LowBitMatrix, dtype: torch.dtype) -> None:
        super().__init__()
        self.matrix, self.dtype = matrix, dtype

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.matrix.dense(self.dtype, ids.flatten()).view(*ids.shape, -1)


class _FrozenProduct(torch.autograd.Function):
    """x W^T that unpacks W again for the backward pass: kept for it, all layers' weights would lie unpacked in memory at once."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, matrix: LowBitMatrix) -> torch.Tensor:
        ctx.matrix = matrix
        return x @ matrix.dense(x.dtype).T

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return grad @ ctx.matrix.dense(grad.dtype), None
