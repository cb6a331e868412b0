"""The layout, the rounding and the operator on a CPU without Triton, where the reference does the work."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ml_engineer_track.kernels.correctness import BOUND, matvec_error
from ml_engineer_track.kernels.dequant_matvec import dequant_matvec, dequantize, pack, quantize, unpack


@given(
    rows=st.integers(1, 4), groups=st.integers(1, 3), bits=st.sampled_from((4, 2)), group=st.sampled_from((16, 64)),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_codes_come_back_from_their_words(rows: int, groups: int, bits: int, group: int, seed: int) -> None:
    torch.manual_seed(seed)
    codes = torch.randint(2**bits, (rows, groups, group), dtype=torch.int32)
    words = pack(codes, bits)
    assert (words.shape, words.dtype) == ((rows, groups, group * bits // 32), torch.int32)
    assert torch.equal(unpack(words, bits), codes)


def test_the_layout_is_the_one_of_the_docstring() -> None:
    """Word j of a group holds the columns j, j + W, j + 2 W, ..., the first in its lowest bits."""
    codes = torch.zeros(1, 1, 64, dtype=torch.int32)
    codes[0, 0, 8 + 3] = 9  # W = 8 words: column 11 is word 3, second place
    assert pack(codes, 4).flatten().tolist() == [0, 0, 0, 9 << 4, 0, 0, 0, 0]
    codes = torch.zeros(1, 1, 64, dtype=torch.int32)
    codes[0, 0, 63] = 2  # W = 4 words: the last word's last place, the sign bit
    assert pack(codes, 2).flatten().tolist() == [0, 0, 0, -(2**31)]


@given(columns=st.integers(1, 130), bits=st.sampled_from((4, 2)), seed=st.integers(0, 99))
def test_no_weight_moves_by_more_than_half_a_step(columns: int, bits: int, seed: int) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(3, columns) * torch.tensor([[1.0], [1e-3], [0.0]])
    packed = quantize(weight, bits)
    got = dequantize(packed.words, packed.scales.double(), packed.zeros.double(), bits, columns)
    # a scale and a zero rounded to bf16 move the ends of the range by a little more
    step = packed.scales.double().repeat_interleave(64, 1)[:, :columns]
    assert ((got - weight).abs() <= step * (0.5 + 2**bits * 2**-7)).all()
    assert not got[2].any()


def test_the_operator_is_right_on_a_cpu_and_registered_as_pytorch_wants_it() -> None:
    for dtype, bound in BOUND.items():
        packed = quantize(torch.randn(5, 70), 4)
        x = torch.randn(3, 70).to(dtype)
        assert matvec_error(x, packed, dequant_matvec(x, *packed)) <= bound
    torch.library.opcheck(dequant_matvec, (x, *packed))


def test_what_does_not_belong_together_is_refused() -> None:
    packed = quantize(torch.randn(5, 70), 4)
    for x in (torch.randn(3, 129), torch.randn(9, 70), torch.randn(0, 70)):
        with pytest.raises(ValueError, match=r"in the layout of dequant_matvec\.py"):
            dequant_matvec(x, *packed)
    with pytest.raises(ValueError, match=r"in the layout of dequant_matvec\.py"):
        dequant_matvec(torch.randn(3, 70), packed.words, packed.scales[:4], packed.zeros, 4)
    for bits, group in ((3, 64), (4, 4), (4, 48)):
        with pytest.raises(ValueError, match="bits must be 4 or 2"):
            quantize(torch.randn(5, 70), bits, group)
