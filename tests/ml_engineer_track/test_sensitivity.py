"""The matrix that matters is found, and no other choice of bits within the budget does less harm."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ml_engineer_track import finetune as ft
from ml_engineer_track import low_bits as lb
from ml_engineer_track import sensitivity as sn
from ml_engineer_track.curate import Row
from ml_engineer_track.finetune import Batch, Example
from ml_engineer_track.models import load_model
from shared.errors import UserError


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ft, "compute_dtype", lambda target: torch.float32)


def some_rows() -> list[Batch]:
    numbers = torch.Generator().manual_seed(0)
    rows = [Example(torch.randint(100, 8000, (n,), generator=numbers).tolist(), [1.0, 20.0, 1.0]) for n in (12, 20, 17)]
    return [ft.collate(rows[:2], 0), ft.collate(rows[2:], 0)]


# --- what is measured ------------------------------------------------------------------------------------------------


def test_the_divergence_is_what_a_pencil_says() -> None:
    expected, said = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.25, 0.5]]).log()
    assert sn.divergences(expected, said).item() == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2))
    assert sn.divergences(expected, expected).abs().max() < 1e-7


def test_a_matrix_that_does_nothing_is_the_least_sensitive_and_the_model_ends_as_it_was(micro: PreTrainedModel) -> None:
    """Planted: one layer's output is silenced, so what its MLP does reaches nobody; another one's attention is made quiet."""
    with torch.no_grad():
        micro.model.layers[0].mlp.down_proj.weight.zero_()
        micro.model.layers[1].self_attn.o_proj.weight.mul_(0.01)
    before = {name: p.clone() for name, p in micro.named_parameters()}
    found = sn.measure_sensitivity(micro, some_rows(), [2, 4], 16)
    assert all(torch.equal(p, before[name]) for name, p in micro.named_parameters())
    assert set(found) == set(lb.matrices(micro, everywhere=True))
    order = sorted(found, key=lambda name: found[name][2])
    assert set(order[:3]) == {f"model.layers.0.mlp.{part}_proj" for part in ("up", "gate", "down")}
    assert max(found[name][2] for name in order[:3]) < 1e-6
    quiet, heard = ({n: by_bits for n, by_bits in found.items() if f"layers.1.{part}" in n} for part in ("self_attn", "mlp"))
    assert max(by_bits[2] for by_bits in quiet.values()) < min(by_bits[2] for by_bits in heard.values())
    assert all(by_bits[4] < by_bits[2] for by_bits in heard.values())


def test_a_model_does_not_diverge_from_itself_and_one_of_fewer_bits_further(micro: PreTrainedModel) -> None:
    rows = some_rows()
    expected = [lp.detach() for lp in sn.log_probabilities(micro, rows)]
    assert sn.weighted_divergence(micro, rows, expected) < 1e-6
    assert all(value < 1e-6 for value in sn.row_divergences(micro, micro, rows))
    found = sn.measure_sensitivity(micro, rows, [2, 3, 4, 8], 64)
    total = [sum(by_bits[bits] for by_bits in found.values()) for bits in (2, 3, 4, 8)]
    assert total == sorted(total, reverse=True)


def test_the_mean_over_batches_is_that_over_rows_of_like_weight(micro: PreTrainedModel, micro_path: str) -> None:
    rows, changed = some_rows(), lb.pack_model(load_model(micro_path, torch.float32), lb.uniform(micro, 2, 16))
    by_row = sn.row_divergences(changed, micro, rows)
    assert len(by_row) == 3
    expected = [lp.detach() for lp in sn.log_probabilities(micro, rows)]
    assert sn.weighted_divergence(changed, rows, expected) == pytest.approx(sum(by_row) / 3, rel=1e-4)
    assert min(by_row) > 1e-4


def test_calibration_rows_are_spread_over_all_rows(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [
        Row(id=str(i), split="train", skill="decide", messages=[{"role": "user", "content": f"number {i}"}], reply=f"reply {i}")
        for i in range(50)
    ]
    read = sn.read_batches(rows, 5, tokenizer, 20.0, 512)
    texts = [tokenizer.decode(row, skip_special_tokens=True) for batch in read for row in batch.ids.tolist()]
    assert len(texts) == 5
    assert sorted(int(text.rsplit(" ", 1)[-1]) for text in texts) == [5, 15, 25, 35, 45]
    assert len([row for batch in sn.read_batches(rows, 500, tokenizer, 20.0, 512) for row in batch.ids]) == 50


# --- what is chosen --------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(data=st.data(), matrices=st.integers(1, 5))
def test_no_other_choice_within_the_budget_is_better(data: st.DataObject, matrices: int) -> None:
    names = [f"m{i}" for i in range(matrices)]
    harm = {n: {b: data.draw(st.floats(0, 1)) / b for b in (2, 4, 8)} for n in names}
    units = {n: data.draw(st.integers(1, 9)) for n in names}
    sizes = {n: {b: 32 * b * units[n] for b in (2, 4, 8)} for n in names}
    least = sum(size[2] for size in sizes.values())
    budget = data.draw(st.integers(least, 4 * least))
    chosen = sn.choose_bits(harm, sizes, budget)
    assert set(chosen) == set(names)
    assert sum(sizes[n][b] for n, b in chosen.items()) <= budget
    every = [dict(zip(names, bits, strict=True)) for bits in itertools.product((2, 4, 8), repeat=matrices)]
    best = min(
        sum(harm[n][b] for n, b in option.items()) for option in every if sum(sizes[n][b] for n, b in option.items()) <= budget
    )
    assert sum(harm[n][b] for n, b in chosen.items()) == pytest.approx(best, abs=1e-5)


def test_the_sensitive_matrix_gets_the_bits() -> None:
    harm = {"loud": {2: 1.0, 4: 0.1, 8: 0.0}, "quiet": {2: 0.01, 4: 0.001, 8: 0.0}}
    sizes = {name: {2: 20, 4: 40, 8: 80} for name in harm}
    assert sn.choose_bits(harm, sizes, 100) == {"loud": 8, "quiet": 2}


def test_a_budget_below_the_fewest_bits_is_an_error_for_the_user() -> None:
    with pytest.raises(UserError, match="39 bytes are too few: the fewest bits need 40"):
        sn.choose_bits({"a": {2: 1.0}, "b": {2: 1.0}}, {"a": {2: 20}, "b": {2: 20}}, 39)


def test_sizes_are_those_of_the_packed_matrices(micro: PreTrainedModel) -> None:
    sizes = sn.sizes_of(micro, [2, 8], 32)
    plan = lb.uniform(micro, 8, 32, everywhere=True)
    assert sum(size[8] for size in sizes.values()) == lb.plan_bytes(micro, plan)
