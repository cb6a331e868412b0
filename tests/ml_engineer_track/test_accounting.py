"""FLOPs against numbers worked out by hand, checkpointing against measured peaks, and what a memory limit makes of a run."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ml_engineer_track import accounting as a
from ml_engineer_track.accounting_measure import measured_peak
from ml_engineer_track.curate import CuratedData, curate
from ml_engineer_track.finetune import Batch, Example
from shared.errors import UserError
from shared.hardware import compute_dtype, device
from shared.settings import Settings, load_settings
from tests.ml_engineer_track.conftest import RANKER

MakeSettings = Callable[..., Settings]
DTYPE = str(compute_dtype(device())).removeprefix("torch.")


def plan(model: str, **more: Any) -> a.Plan:
    return a.Plan(model, **{"context": 128, "batch": 2, "rank": 4, "dtype": DTYPE, **more})


# --- prediction ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [{"batch": 8, "context": 96}, {"batch": 2, "context": 300, "reply_tokens": 24}])
def test_with_checkpointing_too_a_prediction_is_within_15_percent_of_the_measured_peak(
    micro_path: str, shape: dict[str, int]
) -> None:
    asked = plan(micro_path, checkpointing=True, **shape)
    assert a.predict_training(asked).total == pytest.approx(measured_peak(asked), rel=0.15)


def test_components_add_up_to_the_peak_and_logits_grow_with_the_replies(micro_path: str) -> None:
    asked = plan(micro_path, reply_tokens=16)
    few, many = a.predict_components(asked), a.predict_components(replace(asked, reply_tokens=64))
    assert sum(few.values()) == a.predict_training(asked).total
    assert many["logits"] == pytest.approx(64 / 16 * few["logits"], rel=0.15)
    vocabulary = a.read_config(micro_path).vocab_size
    assert many["logits"] >= 2 * 64 * vocabulary * 4  # at the least the float32 copy that the loss is computed from
    assert many["weights"] == few["weights"]


def test_checkpointing_trades_activations_for_arithmetic(micro_path: str) -> None:
    asked = plan(micro_path, batch=4, context=256, reply_tokens=8)
    again = replace(asked, checkpointing=True)
    assert a.predict_components(again)["activations"] < 0.8 * a.predict_components(asked)["activations"]
    assert 1.2 * a.step_flops(asked) < a.step_flops(again) < 1.6 * a.step_flops(asked)


def test_only_the_adapter_of_the_targets_is_counted(micro_path: str) -> None:
    found = a.predict_components(plan(micro_path, targets=["q_proj", "v_proj"]))
    adapter = 2 * 4 * ((64 + 64) + (64 + 32))  # two layers, rank 4, q and v
    assert found["adapter"] == found["gradients"] == 4 * adapter
    assert found["optimizer"] == 8 * adapter


def test_flops_are_those_worked_out_by_hand(micro_path: str) -> None:
    """Frozen weights: forward and backward to the inputs, 4 a weight and token; trained ones 6. Attention: 4 s² d a head forward,
    and 2.5 times that backward, because the scores are computed again.
    """
    rows, length, kept, rank = 2, 128, 32, 4
    counted = a.step_flops(plan(micro_path, batch=rows, context=length, reply_tokens=kept, rank=rank))
    projections = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    adapter = 2 * rank * (2 * 128 + 2 * 96 + 3 * 192)
    head = 64 * a.read_config(micro_path).vocab_size
    attention = 2 * rows * 4 * (4 * length**2 * 16)
    by_hand = rows * length * (4 * projections + 6 * adapter) + rows * (kept + 1) * 4 * head + attention * (1 + 2.5)
    assert counted == pytest.approx(by_hand, rel=0.1)


# --- fitting a limit -------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 300), st.integers(1, 4000))
def test_no_part_is_larger_than_the_one_that_was_reckoned_with(rows: int, length: int, micro: int) -> None:
    ids = torch.zeros((rows, length), dtype=torch.long)
    parts = Batch(ids, ids, ids, ids, 1).split(math.ceil(rows / max(1, micro // length)))  # as finetune cuts a step
    reckoned = a.part(a.Shape(rows, length, 1), micro)
    assert max(len(p.ids) for p in parts) == reckoned.rows
    assert reckoned.rows * length <= max(micro, length)


def test_micro_sizes_are_halves_down_to_the_longest_row() -> None:
    assert a.micro_sizes([a.Shape(4, 300, 8), a.Shape(9, 100, 8)], 2048) == [2048, 1024, 512, 300]
    assert a.micro_sizes([a.Shape(1, 3000, 8)], 2048) == [2048]


STEPS = [a.Shape(8, 100, 20), a.Shape(3, 600, 40)]


def hungry(asked: a.Plan) -> a.Prediction:
    """1 MiB a token, a tenth of that with checkpointing, and 100 MiB that are always there."""
    per_row = int(asked.context * 2**20 * (0.1 if asked.checkpointing else 1))
    return a.Prediction({"weights": 100 * 2**20, "activations": per_row * asked.batch}, per_row)


@pytest.mark.parametrize(
    ("gib", "micro", "checkpointing"),
    [(8, 2048, False), (2, 1024, False), (0.8, 600, False), (0.5, 2048, True), (0.18, 600, True)],
)
def test_the_cheapest_way_that_fits_is_chosen(
    gib: float, micro: int, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(a, "predict_training", hungry)
    found = a.choose(load_settings("tiny"), STEPS, gib)
    assert (found.micro_batch_tokens, found.checkpointing) == (micro, checkpointing)
    assert found.bytes <= gib * a.GIB * (1 - a.ALLOWANCE)


def test_a_limit_that_nothing_fits_names_the_least_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(a, "predict_training", hungry)
    with pytest.raises(UserError, match=r"1 x 600 tokens take 0.16 GiB .* in VRAM_GB=0.1. Use VRAM_GB=0.\d+ or more") as caught:
        a.choose(load_settings("tiny"), STEPS, 0.1)
    assert "\n" not in str(caught.value)
    least = float(re.findall(r"Use VRAM_GB=([\d.]+)", str(caught.value))[0])
    assert a.choose(load_settings("tiny"), STEPS, least).checkpointing
    with pytest.raises(UserError):
        a.choose(load_settings("tiny"), STEPS, least - 0.02)


def test_the_steps_of_a_run_are_those_that_finetune_plans() -> None:
    rows = [Example([1] * n, [1.0] * 5) for n in (100, 100, 100, 600, 590)]
    options = load_settings("tiny").finetune.model_copy(update={"batch_tokens": 1200, "batch_rows": 2})
    assert a.shapes(rows, options) == [a.Shape(2, 100, 5), a.Shape(2, 590, 5), a.Shape(1, 600, 5)]


@pytest.fixture
def settings(make_settings: MakeSettings) -> Settings:
    return make_settings(finetune={"batch_tokens": 1500})


@pytest.fixture
def data(settings: Settings) -> CuratedData:
    return curate(settings, RANKER)


def with_limit(settings: Settings, gib: float) -> Settings:
    return settings.model_copy(update={"vram_gb": gib})


def test_without_a_limit_and_with_a_wide_one_nothing_changes(
    settings: Settings, data: CuratedData, capsys: pytest.CaptureFixture[str]
) -> None:
    assert a.fit_to_vram(settings, data) is settings
    assert capsys.readouterr().out == ""
    assert a.fit_to_vram(with_limit(settings, 64), data).finetune == settings.finetune
    assert "VRAM_GB=64: whole steps, no gradient checkpointing" in capsys.readouterr().out


def test_a_tight_limit_cuts_steps_into_parts_that_really_take_less(
    settings: Settings, data: CuratedData, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = a.shapes(a.encode(data.rows("train"), a.load_tokenizer(settings.model_path)), settings.finetune)
    whole, parts = (a.worst(settings, steps, size, False).bytes for size in (1500, a.micro_sizes(steps, 1500)[-1]))
    assert parts < whole
    limit = (whole + parts) / 2 / a.GIB / (1 - a.ALLOWANCE)
    fitted = a.fit_to_vram(with_limit(settings, limit), data).finetune
    assert fitted.micro_batch_tokens is not None
    assert not fitted.gradient_checkpointing
    assert fitted.model_copy(update={"micro_batch_tokens": None}) == settings.finetune
    assert "(the same gradient)" in capsys.readouterr().out
