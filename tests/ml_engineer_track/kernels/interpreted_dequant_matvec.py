"""The matrix-vector kernel itself, run block by block by Triton's interpreter. Started by test_interpreter.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ml_engineer_track.kernels.correctness import BOUND, matvec_error
from ml_engineer_track.kernels.dequant_matvec import MAX_BATCH, by_triton, dequant_matvec, quantize, reference
from ml_engineer_track.kernels.device import INTERPRETED

assert INTERPRETED


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 150),
    batch=st.integers(1, MAX_BATCH),
    bits=st.sampled_from((4, 2)),
    group=st.sampled_from((16, 32, 64)),
    dtype=st.sampled_from(tuple(BOUND)),
    kept=st.sampled_from((torch.bfloat16, torch.float16)),
    seed=st.integers(0, 99),
)
def test_any_shape_is_right_to_rounding(
    rows: int, columns: int, batch: int, bits: int, group: int, dtype: torch.dtype, kept: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    packed = quantize(torch.randn(rows, columns), bits, group, kept)
    x = torch.randn(batch, columns).to(dtype)
    got = by_triton(x, *packed)
    assert (got.dtype, got.shape) == (dtype, (batch, rows))
    assert matvec_error(x, packed, got) <= BOUND[dtype]
    assert matvec_error(x, packed, reference(x, *packed)) <= BOUND[dtype]


@pytest.mark.parametrize("bits", [4, 2])
def test_every_code_at_every_place_meets_its_own_input(bits: int) -> None:
    """One row a column: a one at the input's column, and codes that differ from place to place."""
    weight = (torch.arange(64) % 2**bits).float().repeat(3, 1)
    packed = quantize(weight, bits)
    for start in range(0, 64, MAX_BATCH):
        got = by_triton(torch.eye(64)[start : start + MAX_BATCH], *packed)
        assert torch.equal(got, weight[:, start : start + MAX_BATCH].T)


def test_the_operator_runs_the_kernel_and_is_registered_as_pytorch_wants_it() -> None:
    for bits, batch in ((4, 1), (2, 3)):
        packed = quantize(torch.randn(5, 70), bits)
        x = torch.randn(batch, 70)
        torch.library.opcheck(dequant_matvec, (x, *packed))
        assert torch.equal(dequant_matvec(x, *packed), by_triton(x, *packed))


def test_inputs_that_are_not_contiguous_are_read_in_order() -> None:
    packed = quantize(torch.randn(6, 64), 4)
    x = torch.randn(64, 2).T
    torch.testing.assert_close(dequant_matvec(x, *packed), dequant_matvec(x.contiguous(), *packed), rtol=0, atol=0)


def test_what_is_outside_a_matrix_is_not_read() -> None:
    """Beside every operand lie nans, or words that would show."""
    packed = quantize(torch.randn(5, 70), 4)

    def framed(tensor: torch.Tensor, frame: float) -> torch.Tensor:
        wide = torch.full((tensor.numel() + 512,), frame, dtype=tensor.dtype)
        wide[256 : 256 + tensor.numel()] = tensor.flatten()
        return wide[256 : 256 + tensor.numel()].view(tensor.shape)

    x = torch.randn(3, 70)
    words, scales, zeros, bits = packed
    inside = by_triton(
        framed(x, float("nan")), framed(words, -1), framed(scales, float("nan")), framed(zeros, float("nan")), bits
    )
    assert torch.equal(inside, by_triton(x, *packed))
