"""Shares of a step's rows: none lost, none twice; and that what several workers learn is what one learns."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from ml_engineer_track import distributed as d
from ml_engineer_track import finetune as ft
from ml_engineer_track.finetune import SILENT, Example
from shared.settings import load_settings

WORKERS = st.integers(1, 9)


def an_example(length: int, weights: list[float], seed: int) -> Example:
    numbers = torch.Generator().manual_seed(1000 * length + seed)
    return Example(torch.randint(100, 8000, (length,), generator=numbers).tolist(), weights)


@given(st.lists(st.integers(), max_size=60), WORKERS)
def test_every_item_is_in_exactly_one_share_and_shares_are_equally_long(items: list[int], workers: int) -> None:
    shares = [d.shard(items, None, number, workers) for number in range(workers)]
    assert sorted(i for share in shares for i in share if i is not None) == sorted(items)
    assert len({len(share) for share in shares}) == 1
    assert sum(share.count(None) for share in shares) < workers  # no more filling than it takes


@given(
    lengths=st.lists(st.integers(2, 90), min_size=1, max_size=50), epochs=st.floats(0.2, 3), seed=st.integers(0, 99),
    groups=st.lists(st.tuples(WORKERS, st.integers(1, 12), st.integers(0, 5)), min_size=1, max_size=5),
)  # fmt: skip
def test_groups_of_any_size_that_die_and_go_on_see_each_row_as_often_as_one_worker_would(
    lengths: list[int], epochs: float, seed: int, groups: list[tuple[int, int, int]]
) -> None:
    """A group of so many workers lives for so many steps; the last ones, after its last checkpoint, are done again."""
    options = load_settings("smoke").finetune.model_copy(update={"epochs": epochs, "batch_tokens": 200, "checkpoint_every": 3})
    rows = [Example([1] * n, [1.0]) for n in lengths]
    plan = ft.plan_batches(rows, options, seed)
    counted: list[list[int]] = []  # what the weights of the last checkpoint have learnt from, by step
    for workers, lives, _ in [*groups, (1, len(plan), 0)]:
        seen = list(counted)
        for step in range(len(counted), min(len(plan), len(counted) + lives)):
            shares = [d.shard(ft.plan_batches(rows, options, seed)[step], -1, number, workers) for number in range(workers)]
            seen.append(sorted(i for share in shares for i in share if i >= 0))
            if (step + 1) % options.checkpoint_every == 0 or step + 1 == len(plan):
                counted = list(seen)
    assert counted == [sorted(step) for step in plan]


def test_alone_nothing_is_exchanged_and_this_worker_writes(micro: PreTrainedModel) -> None:
    assert (d.world_size(), d.rank(), d.is_first()) == (1, 0, True)
    assert d.total(0.1) == 0.1
    assert d.shard([3, 1, 2], 0) == [3, 1, 2]
    assert d.spread(micro, "ddp") is micro  # type: ignore[arg-type]
    assert d.spread(micro, "fsdp") is micro  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [2, 8])
def test_the_shares_gradients_add_up_to_that_of_the_whole_step(
    micro: PreTrainedModel, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of other lengths and weights, and at 8 workers more workers than rows: a mean of means would be another number."""
    monkeypatch.setattr(ft, "compute_dtype", lambda target: torch.float32)
    rows = [an_example(9 + 4 * i, [1.0, 20.0, 0.0, 1.0, 1.0][: 1 + i], i) for i in range(5)]
    weight = sum(sum(row.weights) for row in rows)
    whole, _ = ft.backward(micro, ft.collate(rows, 0), 1)
    expected = [p.grad.clone() for p in micro.parameters() if p.grad is not None]
    micro.zero_grad()
    shares = [ft.backward(micro, ft.collate(d.shard(rows, SILENT, n, workers), 0), 2, weight)[0] for n in range(workers)]
    assert sum(shares) == pytest.approx(whole, rel=1e-5)
    for ours, theirs in zip([p.grad for p in micro.parameters() if p.grad is not None], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_a_worker_without_rows_adds_nothing(micro: PreTrainedModel) -> None:
    loss, _ = ft.backward(micro, ft.collate([SILENT, SILENT], 0), 1, weight=3.0)
    assert loss == 0
    assert all(not p.grad.any() for p in micro.parameters() if p.grad is not None)


def test_an_optimisers_state_goes_through_a_checkpoint_unchanged() -> None:
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    for _ in range(3):
        layer(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    stored = copy.deepcopy(d.WholeOptimizer(optimizer).state_dict())
    other = torch.optim.AdamW(layer.parameters(), lr=0.1)
    d.WholeOptimizer(other).load_state_dict(stored)
    for key, value in optimizer.state_dict()["state"].items():
        for name, tensor in value.items():
            assert torch.equal(other.state_dict()["state"][key][name], tensor)
