"""Codes pack and unpack whatever their number, rounding stays within its bounds, and packed layers compute what they hold."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ml_engineer_track import half_quadratic as hq
from ml_engineer_track.half_quadratic import LowBitEmbedding, LowBitLinear, LowBitMatrix
from shared.errors import UserError

BITS = st.sampled_from(sorted(hq.LAYOUT))
GROUPS = st.sampled_from([16, 32, 64])


def weights(rows: int, columns: int, seed: int, tails: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(rows, columns, generator=generator) * 0.05
    return drawn * (1 + 9 * (torch.rand(rows, columns, generator=generator) < 0.02)) if tails else drawn


def nearest(weight: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Round-to-nearest over each group's range, written for tests: its squared error and half a step, by group, in order."""
    errors, halves = [], []
    for row in weight.double():
        for part in row.split(group):
            step = float((part.max() - part.min()) / (2**bits - 1)) or 1.0
            found = part.min() + step * ((part - part.min()) / step).round()
            errors.append(((part - found) ** 2).sum())
            halves.append(step / 2)
    return torch.stack(errors), torch.tensor(halves)


def by_group(error: torch.Tensor, group: int) -> torch.Tensor:
    return torch.stack([(part**2).sum() for row in error.double() for part in row.split(group)])


# --- packing ---------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(bits=BITS, rows=st.integers(1, 5), eighths=st.integers(1, 20), seed=st.integers(0, 999))
def test_what_is_packed_is_unpacked_and_takes_no_bit_too_many(bits: int, rows: int, eighths: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (rows, 8 * eighths), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = hq.pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, bits * eighths)
    assert torch.equal(hq.unpack(packed, bits), codes.int())


def test_the_first_code_lies_in_the_lowest_bits() -> None:
    assert hq.pack(torch.tensor([[1, 2, 3, 0]], dtype=torch.uint8), 2).tolist() == [[0b00111001]]
    assert hq.pack(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]], dtype=torch.uint8), 3).tolist() == [
        [0b11010001, 0b01011000, 0b00011111]
    ]


# --- rounding --------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    bits=BITS, group=GROUPS, rows=st.integers(1, 4), columns=st.integers(1, 150), seed=st.integers(0, 999), tails=st.booleans()
)
def test_no_group_is_further_off_than_rounding_to_the_nearest(
    bits: int, group: int, rows: int, columns: int, seed: int, tails: bool
) -> None:
    """Any shape, groups that do not divide it included; the scale's own rounding to float16 is allowed for."""
    weight = weights(rows, columns, seed, tails)
    error = LowBitMatrix.of(weight, bits, group).dense(torch.float32) - weight
    plain, half_step = nearest(weight, bits, group)
    found = by_group(error, group)
    sizes = torch.tensor([len(part) for row in weight for part in row.split(group)])
    float16 = 2.0**-10 * weight.abs().max()
    assert (found <= sizes * (half_step + float16) ** 2).all()
    assert found.sum() <= plain.sum() * 1.02 + sizes.sum() * float16**2


@pytest.mark.parametrize("tails", [False, True])
@pytest.mark.parametrize(("bits", "at_most"), [(2, 0.65), (3, 0.85), (4, 0.95)])
def test_it_is_clearly_better_than_rounding_to_the_nearest_where_levels_are_few(bits: int, at_most: float, tails: bool) -> None:
    weight = weights(64, 256, 1, tails)
    error = LowBitMatrix.of(weight, bits, 64).dense(torch.float32) - weight
    assert by_group(error, 64).sum() < at_most * nearest(weight, bits, 64)[0].sum()


def test_the_half_quadratic_step_is_worth_something(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights(64, 256, 1)
    error = float(((LowBitMatrix.of(weight, 2, 64).dense(torch.float32) - weight) ** 2).mean())
    monkeypatch.setattr(hq, "ROUNDS", 0)
    assert error < 0.97 * float(((LowBitMatrix.of(weight, 2, 64).dense(torch.float32) - weight) ** 2).mean())


@pytest.mark.parametrize("group", [16, 32, 64])
def test_more_bits_and_smaller_groups_lose_less(group: int) -> None:
    weight = weights(32, 192, 3)

    def lost(bits: int, group: int) -> float:
        return float((LowBitMatrix.of(weight, bits, group).dense(torch.float32) - weight).norm() / weight.norm())

    errors = [lost(bits, group) for bits in (2, 3, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01
    assert lost(2, 16) < lost(2, 32) < lost(2, 64) < 0.4


@pytest.mark.parametrize("bits", sorted(hq.LAYOUT))
def test_a_group_of_one_value_keeps_it(bits: int) -> None:
    weight = torch.tensor([[0.0] * 16 + [0.25] * 16 + [-3.0] * 5, [1e-7] * 37])
    assert torch.allclose(LowBitMatrix.of(weight, bits, 16).dense(torch.float32), weight, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e5])
def test_a_weight_that_cannot_be_held_is_an_error_for_the_user(bad: float) -> None:
    weight = weights(4, 32, 0)
    weight[2, 5] = bad
    with pytest.raises(UserError, match="not a number or too large"):
        hq.quantize(weight, 2, 16)


def test_slabs_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights(20, 48, 5)
    whole = hq.quantize(weight, 3, 16)
    monkeypatch.setattr(hq, "SLAB", 100)
    for a, b in zip(hq.quantize(weight, 3, 16), whole, strict=True):
        assert torch.equal(a, b)


# --- size ------------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(bits=BITS, group=GROUPS, rows=st.integers(1, 9), columns=st.integers(1, 200))
def test_the_predicted_size_is_the_size(bits: int, group: int, rows: int, columns: int) -> None:
    matrix = LowBitMatrix(rows, columns, bits, group)
    assert hq.matrix_bytes(rows, columns, bits, group) == sum(b.numel() * b.element_size() for b in matrix.buffers())


def test_two_bits_in_groups_of_64_are_two_and_a_half() -> None:
    assert 8 * hq.matrix_bytes(256, 768, 2, 64) / (256 * 768) == 2.5
    assert 8 * hq.matrix_bytes(256, 768, 2, 16) / (256 * 768) == 4.0


# --- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [False, True])
def test_a_layer_multiplies_with_what_it_holds(kept: bool) -> None:
    plain = nn.Linear(70, 24)
    layer = LowBitLinear(LowBitMatrix.of(plain.weight, 3, 32), plain.bias)
    held = layer.matrix.dense(torch.float32)
    if kept:
        layer.matrix.keep_dense(torch.float32)
    x = torch.randn(3, 5, 70)
    torch.testing.assert_close(layer(x), F.linear(x, held, plain.bias))


def test_gradients_go_through_a_packed_layer_as_through_its_weights() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(70, 24, bias=False)
    layer = LowBitLinear(LowBitMatrix.of(plain.weight, 2, 16))
    layer.add_adapter(4)
    assert layer.up is not None
    nn.init.normal_(layer.up)
    x = torch.randn(6, 70, requires_grad=True)
    x2 = x.detach().clone().requires_grad_()
    layer(x).pow(2).sum().backward()
    down, up = layer.down.detach().clone().requires_grad_(), layer.up.detach().clone().requires_grad_()
    (x2 @ layer.matrix.dense(torch.float32).T + x2 @ down.T @ up.T).pow(2).sum().backward()
    torch.testing.assert_close(x.grad, x2.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.down.grad, down.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.up.grad, up.grad, rtol=1e-4, atol=1e-4)


def test_a_fresh_adapter_changes_nothing() -> None:
    layer = LowBitLinear(LowBitMatrix.of(weights(24, 64, 2), 2, 16))
    x = torch.randn(2, 64)
    before = layer(x)
    layer.add_adapter(3)
    assert torch.equal(layer(x), before)


def test_an_embedding_gives_rows_of_its_matrix() -> None:
    table = LowBitEmbedding(LowBitMatrix.of(weights(50, 48, 2), 4, 32), torch.float32)
    ids = torch.tensor([[3, 3, 49], [0, 7, 1]])
    assert torch.equal(table(ids), table.matrix.dense(torch.float32)[ids])


def test_a_cast_of_the_model_leaves_scales_as_they_are() -> None:
    layer = LowBitLinear(LowBitMatrix.of(weights(24, 64, 2), 8, 64))
    before = layer.matrix.dense(torch.float32)
    layer.to(torch.bfloat16).to(torch.float32)
    assert torch.equal(layer.matrix.dense(torch.float32), before)
