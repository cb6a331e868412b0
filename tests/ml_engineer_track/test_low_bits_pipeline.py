"""`make quantize BITS=2` from a published model to its report, and the mistakes that stop it before any work."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ml_engineer_track import __main__ as cli
from ml_engineer_track import low_bits_pipeline as lp
from ml_engineer_track import low_bits_report as lr
from ml_engineer_track import pipeline as p
from ml_engineer_track.curate import CuratedData, curate
from ml_engineer_track.evaluate import Scores
from ml_engineer_track.repair import Repaired
from shared.errors import UserError
from shared.metrics import Estimate
from shared.settings import BASE_MODEL, ROOT, Settings
from tests.ml_engineer_track.conftest import RANKER
from tests.ml_engineer_track.test_distill_pipeline import publish_teacher

MakeSettings = Callable[..., Settings]


@pytest.fixture
def settings(make_settings: MakeSettings) -> Settings:
    return make_settings()


@pytest.fixture
def data(settings: Settings) -> CuratedData:
    return curate(settings, RANKER)


def command(words: list[str], settings: Settings, monkeypatch: pytest.MonkeyPatch) -> int:
    for name in ("model", "artifacts", "datasets"):
        monkeypatch.setenv(name.upper(), str(getattr(settings, name)))
    monkeypatch.setattr(sys, "argv", ["ml_engineer_track", "low-bits", "--preset", "smoke", *words])
    return cli.main()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--bits", "5"], "cannot quantise to '5' bits in BITS. Use one of: 2, 3, 4, mixed"),
        ([], "no model has been published"),
        (["--path", "./nothing"], "no model here (config.json is missing) in"),
    ],
)
def test_a_mistake_is_one_line_before_any_work(
    words: list[str], said: str, settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(words, settings, monkeypatch) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not settings.work.exists()


@pytest.mark.parametrize(
    ("given", "expected"), [([], "quantize"), (["BITS=2"], 'low-bits --bits "2"'), (["BITS=mixed"], 'low-bits --bits "mixed"')]
)
def test_make_quantize_goes_below_four_bits_where_bits_are_given(given: list[str], expected: str) -> None:
    # Without the names of folders, which make adds where it was started by another make.
    command = ["make", "--no-print-directory", "-n", "quantize", *given]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith(f"python -m ml_engineer_track {expected}")


def test_a_budget_no_choice_fits_is_one_line(settings: Settings) -> None:
    """Two bits everywhere are fewer than the fewest that may be chosen."""
    options = settings.low_bits.model_copy(update={"mixed_like": 2, "mixed_choices": [4, 8]})
    tight = settings.model_copy(update={"low_bits": options})
    with (
        p.locked_stages(tight) as stages,
        pytest.raises(UserError, match=r"bytes are too few.* in low_bits.mixed_like. Raise it"),
    ):
        lp.pack_stage(stages, Path(settings.model), {name: {4: 0.1, 8: 0.0} for name in names(settings)}, "2")


def names(settings: Settings) -> list[str]:
    from ml_engineer_track.low_bits import matrices
    from ml_engineer_track.models import load_model

    return list(matrices(load_model(settings.model), everywhere=True))


def test_all_models_are_packed_once_and_the_mixed_one_fits(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    harm = {name: {2: 1.0 + i, 4: 0.1} for i, name in enumerate(names(settings))}
    for _ in range(2):
        with p.locked_stages(settings) as stages:
            made = lp.pack_stage(stages, Path(settings.model), harm, "4")
    assert "unchanged, skipped" in capsys.readouterr().out
    assert set(made.folders) == {"4-bit", "2-bit", "3-bit everywhere", "mixed"}
    assert made.weight_bytes["2-bit"] < made.weight_bytes["4-bit"]
    assert made.weight_bytes["mixed"] <= made.weight_bytes["3-bit everywhere"] < made.weight_bytes["2-bit"]
    assert made.bits_per_weight["2-bit"] == 2.5
    assert set(made.bits["mixed"].values()) == {2, 4}
    assert "model.embed_tokens" not in made.bits["2-bit"]


# --- the report ------------------------------------------------------------------------------------------------------


def a_study(settings: Settings, data: CuratedData, gain: float) -> lr.Study:
    def scores(name: str, value: float) -> Scores:
        figure = Estimate(value=value, low=value - 0.05, high=value + 0.05, n=100)
        return Scores(name, {"divergence": figure.model_copy(update={"value": 1 - value}),
                             "grounded/evidence_f1": figure, "grounded/decision_accuracy": figure}, [])  # fmt: skip

    worth = {"bf16": 0.9, "nf4": 0.8, "2-bit": 0.4, "3-bit everywhere": 0.5, "mixed": 0.5 + gain, "2-bit repaired": 0.4 + gain}
    sizes = {"bf16": 100, "nf4": 40, "2-bit": 30, "3-bit everywhere": 20, "mixed": 19, "2-bit repaired": 33}
    rate = {"ttft": {"p50": 0.1}, "tpot": {"p50": 0.01}}
    speed = {
        "hardware": {"cpu_info": "x", "n_threads": 1, "memory_gib": 1, "gpu_info": None}, "busy_share": 0.0, "plain": "float32",
        "models": {"float32": {**rate, "decode_throughput": 100.0}, "2-bit": {**rate, "decode_throughput": 20.0}},
        "memory": {"bf16": {"max_ram": 1, "model_ram": 1, "max_allocated": None}},
    }  # fmt: skip
    harm = {"a": {2: 0.5, 4: 0.1}, "b": {2: 0.3, 4: 0.2}}
    done = Repaired("", 2, 3, 2, [1.0, 0.5], 1.0, 0.5, 1.0)
    bits = {"mixed": {"a": 4, "b": 2}}
    quality = {name: scores(name, value) for name, value in worth.items()}
    return lr.Study(settings, data, "2-bit", harm, bits, {"mixed": 3.2}, sizes, quality, speed, done, {"x": 1.0})


def test_the_front_holds_what_nothing_beats(settings: Settings, data: CuratedData) -> None:
    study = a_study(settings, data, 0.1)
    assert lr.pareto(study, "grounded/evidence_f1", True) == ["mixed", "nf4", "bf16"]
    assert lr.pareto(study, "divergence", False) == ["mixed", "nf4", "bf16"]


@pytest.mark.parametrize("gain", [0.49, -0.2])
def test_whether_a_claim_holds_is_computed(settings: Settings, data: CuratedData, gain: float) -> None:
    found = lr.findings(a_study(settings, data, gain))
    assert found[0]["reached"]
    assert all(f["reached"] == (gain > 0) for f in found[1:])


def test_the_report_is_written_for_programs_and_people(
    settings: Settings, data: CuratedData, capsys: pytest.CaptureFixture[str]
) -> None:
    page = lr.write(a_study(settings, data, 0.1))
    facts = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    assert facts["pareto"]["divergence"] == ["mixed", "nf4", "bf16"]
    assert facts["weight_bytes"]["2-bit repaired"] == 33
    text = page.read_text(encoding="utf-8")
    assert text.rstrip().endswith("</html>")
    assert "down to 0.20 times the speed of float32" in text
    assert "2-bit repaired" in capsys.readouterr().out


# --- the whole path --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_published_model_goes_below_four_bits(
    make_settings: MakeSettings, tmp_path: Path, small_datasets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = make_settings(model="bundled", datasets=small_datasets)
    settings = settings.model_copy(update={"curate": settings.curate.model_copy(update={"max_rows": 40})})
    with p.locked_stages(settings) as stages:
        data = p.curate_stage(stages, p.train_ranker_stage(stages))
    version = publish_teacher(settings, data, BASE_MODEL, tmp_path)
    with pytest.raises(UserError, match="has no figures"):  # that stand-in was never evaluated
        lp.run(settings)
    lp.run(settings, "2", str(version / "bf16"))
    facts = json.loads((settings.artifacts / "reports" / "low_bits.json").read_text(encoding="utf-8"))
    assert set(facts["quality"]) == {"bf16", "2-bit", "3-bit everywhere", "mixed", "2-bit repaired"}
    assert facts["weight_bytes"]["mixed"] <= facts["weight_bytes"]["3-bit everywhere"]
    assert facts["repair"]["validation_after"] < facts["repair"]["validation_before"]
    assert facts["quality"]["2-bit repaired"]["divergence"]["n"] > 0
    capsys.readouterr()
    lp.run(settings, "2", str(version / "bf16"))
    assert capsys.readouterr().out.count("unchanged, skipped") == 8
