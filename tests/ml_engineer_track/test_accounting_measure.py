"""The allocator's count against known sizes, a measured step against its prediction, and the report of both."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch

from ml_engineer_track import accounting_measure as m
from ml_engineer_track import accounting_report as r
from ml_engineer_track.accounting import Plan, predict_components, predict_training
from ml_engineer_track.curate import curate
from shared.errors import UserError
from shared.hardware import compute_dtype, device
from shared.settings import BASE_MODEL, Settings
from tests.ml_engineer_track.conftest import RANKER

DTYPE = str(compute_dtype(device())).removeprefix("torch.")


def test_the_allocators_count_sees_a_known_peak() -> None:
    def work() -> None:
        a = torch.zeros(1_000_000, device=device())
        b = a + 1
        del a
        b + 1

    assert m.peak_of(work) == pytest.approx(8_000_000, rel=0.01)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_component_is_measured_and_near_its_prediction(micro_path: str, checkpointing: bool) -> None:
    plan = Plan(micro_path, context=160, batch=4, reply_tokens=24, rank=4, dtype=DTYPE, checkpointing=checkpointing)
    predicted, measured = predict_components(plan), m.measure_here(plan)
    assert set(measured.components) == set(predicted)
    for name in ("adapter", "gradients", "optimizer"):
        assert measured.components[name] == predicted[name]
    assert measured.components["weights"] == pytest.approx(predicted["weights"], rel=0.01)
    assert measured.tensors == pytest.approx(sum(predicted.values()), rel=0.15)
    assert measured.components["logits"] == pytest.approx(predicted["logits"], rel=0.5)  # a difference of two larger figures
    assert len(measured.seconds) == m.TIMED
    assert min(measured.seconds) > 0


def test_the_report_holds_both_ways_to_do_the_step(
    micro_path: str, make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The report, with measurements made in this process, where they take no time."""
    monkeypatch.setattr(r, "measure", m.measure_here)
    settings = make_settings()
    page = r.account(settings, curate(settings, RANKER))
    facts = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    plain, again = facts["sides"]
    assert (plain["checkpointing"], again["checkpointing"]) == (False, True)
    assert plain["predicted"]["total"] == sum(v for k, v in plain["predicted"].items() if k != "total")
    assert plain["model_flops"] == plain["flops"] == again["model_flops"] < again["flops"]
    assert plain["tflops"] == pytest.approx(plain["flops"] / plain["seconds"] / 1e12)
    assert plain["predicted_to_measured"] == pytest.approx(1, rel=0.15)
    assert facts["choice"]["says"].startswith("whole steps, no gradient checkpointing")
    said = capsys.readouterr().out
    assert "VRAM_GB=8: whole steps" in said
    assert "TFLOPS used" in said
    assert page.read_text(encoding="utf-8").rstrip().endswith("</html>")


@pytest.mark.slow
def test_a_fresh_process_needs_at_least_what_its_tensors_take() -> None:
    plan = Plan(str(BASE_MODEL), context=512, batch=4, reply_tokens=64, rank=32, dtype=DTYPE)
    measured = m.measure(plan)
    assert measured.tensors == pytest.approx(predict_training(plan).total, rel=0.15)
    assert measured.process > 0.8 * measured.tensors


@pytest.mark.slow
def test_a_process_that_fails_is_one_line() -> None:
    with pytest.raises(UserError, match=r"the measured step failed: .* Is there enough free memory") as caught:
        m.measure(Plan("./nothing", context=32))
    assert "\n" not in str(caught.value)
