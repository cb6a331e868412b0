"""Are the kernels right on this device? Every one beside float64, on odd sizes, batches and dtypes.

    python -m ml_engineer_track.kernels.correctness                        # on a GPU; the last line is JSON
    TRITON_INTERPRET=1 python -m ml_engineer_track.kernels.correctness     # anywhere, on small shapes

An error is given relative to what rounding can do at all: a sum of n products is as good as its largest terms allow, however
small the sum itself. So the matrix-vector error is divided by the sum of |x| times the span of each weight's group, and the loss
by the largest logit. `bound` is what one rounding to the result's dtype and float32 sums may cost.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

from ml_engineer_track.kernels.cross_entropy import IGNORE, cross_entropy
from ml_engineer_track.kernels.dequant_matvec import Packed, dequant_matvec, dequantize, quantize
from ml_engineer_track.kernels.device import INTERPRETED, need_triton

#: (rows, columns, batch): whole blocks, parts of blocks, one row, a column too many; then shapes of real models on a GPU
SMALL = ((16, 128, 1), (5, 70, 3), (1, 65, 1), (9, 192, 8))
LARGE = ((576, 576, 1), (1536, 576, 4), (1024, 3072, 1), (4096, 11008, 1), (11008, 4096, 8), (4099, 4100, 5))
#: (rows, vocabulary)
SMALL_VOCABULARIES = ((3, 7), (4, 50))
LARGE_VOCABULARIES = ((64, 49152), (33, 151936), (7, 4097))
#: What may be lost, by the result's dtype: half a unit in the last place, and for float32 the sums.
BOUND = {torch.float32: 1e-5, torch.float16: 2**-11 + 1e-5, torch.bfloat16: 2**-8}


@dataclass(frozen=True)
class Case:
    """One comparison; `error` and `bound` are relative as the module says."""

    kernel: str
    shape: tuple[int, ...]
    dtype: str
    error: float
    bound: float

    @property
    def right(self) -> bool:
        return self.error <= self.bound  # False for nan


def check_all(device: torch.device) -> list[Case]:
    """Every case that this device can run in a few seconds."""
    shapes, vocabularies = (
        (SMALL, SMALL_VOCABULARIES) if INTERPRETED else (SMALL + LARGE, SMALL_VOCABULARIES + LARGE_VOCABULARIES)
    )
    torch.manual_seed(0)
    return [
        *(check_matvec(*shape, bits, dtype, device) for shape in shapes for bits, dtype in kinds()),
        *(case for shape in vocabularies for dtype in BOUND for case in check_cross_entropy(*shape, dtype, device)),
    ]


def kinds() -> Iterator[tuple[int, torch.dtype]]:
    """Both widths in bf16 and float32, 4 bits in fp16 as well."""
    yield from ((4, torch.float32), (4, torch.bfloat16), (4, torch.float16), (2, torch.float32), (2, torch.bfloat16))


def check_matvec(rows: int, columns: int, batch: int, bits: int, dtype: torch.dtype, device: torch.device) -> Case:
    packed = quantize(torch.randn(rows, columns, device=device), bits)
    x = torch.randn(batch, columns, device=device).to(dtype)
    error = matvec_error(x, packed, dequant_matvec(x, *packed))
    return Case(f"dequant_matvec, {bits} bits", (rows, columns, batch), str(dtype)[6:], error, BOUND[dtype])


def matvec_error(x: torch.Tensor, packed: Packed, got: torch.Tensor) -> float:
    """The largest error of `got`, relative to what its sum is made of."""
    words, scales, zeros, bits = packed
    columns = x.shape[1]
    want = x.double() @ dequantize(words, scales.double(), zeros.double(), bits, columns).T
    span = (scales.double() * 2**bits).repeat_interleave(words.shape[2] * 32 // bits, 1)[:, :columns]
    return float(((got.double() - want).abs() / (x.double().abs() @ span.T).clamp(min=1e-300)).max())


def check_cross_entropy(rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """The loss, and the gradient, which is divided by its largest possible entry, one row's share of the mean."""
    logits = (4 * torch.randn(rows, vocabulary, device=device)).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (rows,), device=device)
    targets[0] = IGNORE
    loss = cross_entropy(logits, targets)
    loss.backward()
    exact = logits.detach().double().requires_grad_()
    want = torch.nn.functional.cross_entropy(exact, targets, ignore_index=IGNORE)
    want.backward()
    assert logits.grad is not None
    assert exact.grad is not None
    name = str(dtype)[6:]
    loss_error = float((loss.detach().double() - want.detach()).abs() / exact.detach().abs().max())
    yield Case("cross_entropy, loss", (rows, vocabulary), name, loss_error, BOUND[torch.float32])
    gradient_error = float((logits.grad.double() - exact.grad).abs().max()) * (rows - 1)
    yield Case("cross_entropy, gradient", (rows, vocabulary), name, gradient_error, BOUND[dtype])


if __name__ == "__main__":
    need_triton("this check")
    where = torch.device("cpu" if INTERPRETED else "cuda")
    print(json.dumps([asdict(case) for case in check_all(where)]))
