"""`make distill` from a published model to a published student, and the mistakes that stop it before any work."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ml_engineer_track import __main__ as cli
from ml_engineer_track import distill_pipeline as dp
from ml_engineer_track import distill_report as dr
from ml_engineer_track import pipeline as p
from ml_engineer_track.curate import CuratedData, curate
from ml_engineer_track.distill import NO_TEACHER, SERVED_STUDENT, STUDENT, Trained
from ml_engineer_track.evaluate import Scores
from ml_engineer_track.models import load_model, load_tokenizer
from ml_engineer_track.publish import add_variants
from ml_engineer_track.quantize import save_gguf
from ml_engineer_track.serving.catalog import entries
from shared import handoff
from shared.chat import PROMPT_VERSION
from shared.errors import UserError
from shared.metrics import Estimate
from shared.settings import BASE_MODEL, Settings
from tests.ml_engineer_track.conftest import RANKER

MakeSettings = Callable[..., Settings]


def publish_teacher(settings: Settings, data: CuratedData, source: Path, work: Path) -> Path:
    """A version with the model in `source` as bf16 and, made of it, q8_0."""
    folders = {"bf16": Path(shutil.copytree(source, work / "bf16")), "q8_0": work / "q8_0"}
    size = save_gguf(load_model(str(source), torch.float32), load_tokenizer(str(source)), folders["q8_0"], "q8_0")
    manifest = handoff.Manifest(
        model_id="teacher", version="m-teacher", created="2026-11-23T00:00:00+00:00", commit=None,
        base_model=handoff.BaseModelInfo(id="bundled", licence="Apache-2.0"),
        data=handoff.DataInfo(version=data.version, counts=data.counts), training={"rank": 4}, seed=7,
        prompt_version=PROMPT_VERSION, chat_template_sha256="", tokenizer_sha256="", context_window=2048,
        stop_tokens=["<|end|>"], stop_token_ids=[1], use={"cpu": "q8_0", "cuda": "bf16"},
        hardware={"cpu_info": "x", "n_threads": 1, "gpu_info": None},
        variants={
            n: handoff.Variant(name=n, weight_bytes=size, quality={}, performance={}, files={}, golden=[]) for n in folders
        },
    )  # fmt: skip
    (work / "ranker.json").write_text("{}", encoding="utf-8")
    return handoff.publish(manifest, folders, settings.artifacts / "models", lambda aside: None, [work / "ranker.json"])


@pytest.fixture
def settings(make_settings: MakeSettings) -> Settings:
    return make_settings()


@pytest.fixture
def data(settings: Settings) -> CuratedData:
    return curate(settings, RANKER)


# --- before any work -------------------------------------------------------------------------------------------------


def test_without_a_published_model_there_is_no_teacher(settings: Settings) -> None:
    with pytest.raises(UserError, match=r"no model has been published .* Run `make ml`"):
        dp.run(settings)


def test_a_teacher_of_other_data_is_refused(settings: Settings, data: CuratedData, tmp_path: Path) -> None:
    version = publish_teacher(settings, data, Path(settings.model), tmp_path)
    assert dp.find_teacher(version, data) == (version, version / "bf16")
    other = CuratedData("d-other", data.folder, data.counts, data.dropped)
    with pytest.raises(UserError, match=rf"m-teacher was trained on data {data.version}, these settings give d-other"):
        dp.find_teacher(version, other)


def test_a_bare_model_is_a_teacher_that_nothing_is_added_to(data: CuratedData, settings: Settings) -> None:
    assert dp.find_teacher(Path(settings.model), data) == (None, Path(settings.model))


def test_a_student_that_is_no_model_is_one_line(
    settings: Settings, data: CuratedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    publish_teacher(settings, data, Path(settings.model), tmp_path)
    for name in ("model", "artifacts", "datasets"):
        monkeypatch.setenv(name.upper(), str(getattr(settings, name)))
    words = ["ml_engineer_track", "distill", "--preset", "smoke", "--student", str(tmp_path / "nothing")]
    monkeypatch.setattr(sys, "argv", [*words[:-1], "./nothing"])
    assert cli.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no model here (config.json is missing) in ./nothing")
    assert error.count("\n") == 1


# --- adding to a version ---------------------------------------------------------------------------------------------


def test_a_student_stands_beside_what_was_published(settings: Settings, data: CuratedData, tmp_path: Path) -> None:
    version = publish_teacher(settings, data, Path(settings.model), tmp_path)
    student = handoff.Variant(
        name=STUDENT, weight_bytes=5, quality={"perplexity": Estimate(value=2.0, low=None, high=None, n=3)}, performance={},
        files={}, golden=[],
    )  # fmt: skip
    done = add_variants(version, {STUDENT: Path(settings.model)}, {STUDENT: student}, {STUDENT: {"steps": 3}})
    made = handoff.verify(Path(done.folder))
    assert handoff.current(settings.artifacts / "models") == Path(done.folder) != version
    assert set(made.variants) == {"bf16", "q8_0", STUDENT}
    assert made.training == {"rank": 4, STUDENT: {"steps": 3}}
    assert made.use == {"cpu": "q8_0", "cuda": "bf16"}
    assert handoff.asset(Path(done.folder), "ranker.json") is not None
    assert (Path(done.folder) / "MODEL_CARD.md").exists()
    handoff.verify(version)  # the old one stays as it was
    again = add_variants(Path(done.folder), {STUDENT: Path(settings.model)}, {STUDENT: student}, {STUDENT: {"steps": 3}})
    assert again == done


# --- the report ------------------------------------------------------------------------------------------------------


def a_run(settings: Settings, data: CuratedData, student: float, alone: float, tpot: float) -> dr.Distillation:
    def scores(name: str, value: float) -> Scores:
        figure = Estimate(value=value, low=value - 0.05, high=value + 0.05, n=100)
        return Scores(name, {key: figure for _, key in dr.GOALS}, [])

    def side(name: str) -> Trained:
        return Trained(name, "", 30, 0.3, 10, 2, False, 0, 1.0, [{"step": 10, "loss": 1.0}], [1.0], 2.0, 100.0)

    def timed(seconds: float) -> dict[str, object]:
        one = {"ttft": {"p50": 0.1}, "tpot": {"p50": seconds}, "decode_throughput": 1 / seconds}
        return {"batch": {"1": one}}

    draft = {
        "prompts": 4, "tokens": 90, "same_replies": True, "draft_tokens": 80, "accepted_tokens": 60, "acceptance_rate": 0.75,
        "plain_throughput": 100.0, "draft_throughput": 150.0, "speed_up": 1.5,
    }  # fmt: skip
    figures = {
        "hardware": {"cpu_info": "x", "n_threads": 2, "memory_gib": 4, "gpu_info": None},
        "models": {"teacher": timed(0.01), STUDENT: timed(tpot)}, "served": {"teacher": 100.0, STUDENT: 250.0},
        "speculative": draft,
    }  # fmt: skip
    found = {"teacher": scores("teacher", 0.8), STUDENT: scores(STUDENT, student), NO_TEACHER: scores(NO_TEACHER, alone)}
    return dr.Distillation(settings, data, {n: side(n) for n in (STUDENT, NO_TEACHER)}, found, figures, None, {})


@pytest.mark.parametrize(
    ("student", "alone", "tpot", "missed"),
    [
        (0.75, 0.5, 0.004, []),
        (0.7, 0.5, 0.004, ["keeps at least 92%"]),
        (0.75, 0.66, 0.004, ["beats the same model"]),
        (0.75, 0.5, 0.006, ["in transformers"]),
    ],
)
def test_whether_a_goal_was_reached_is_computed(
    settings: Settings, data: CuratedData, student: float, alone: float, tpot: float, missed: list[str]
) -> None:
    found = dr.findings(a_run(settings, data, student, alone, tpot))
    unreached = [f["claim"] for f in found if not f["reached"]]
    assert all(any(words in claim for words in missed) for claim in unreached)
    assert bool(unreached) == bool(missed)
    assert found[-2]["value"] == "1.50 times, 75% of 80 proposals accepted"


def test_the_report_is_written_for_programs_and_people(settings: Settings, data: CuratedData) -> None:
    page = dr.write(a_run(settings, data, 0.75, 0.5, 0.004))
    facts = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    assert facts["quality"][STUDENT]["grounded/evidence_f1"]["value"] == 0.75
    assert facts["benchmark"]["speculative"]["acceptance_rate"] == 0.75
    assert page.read_text(encoding="utf-8").rstrip().endswith("</html>")


# --- the whole path --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_student_goes_from_its_teacher_into_the_server(
    make_settings: MakeSettings, tmp_path: Path, small_datasets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = make_settings(model="bundled", datasets=small_datasets)
    settings = settings.model_copy(update={"curate": settings.curate.model_copy(update={"max_rows": 40})})
    with p.locked_stages(settings) as stages:
        data = p.curate_stage(stages, p.train_ranker_stage(stages))
    teacher = publish_teacher(settings, data, BASE_MODEL, tmp_path)
    dp.run(settings)
    version = handoff.current(settings.artifacts / "models")
    manifest = handoff.verify(version)
    assert set(manifest.variants) == {"bf16", "q8_0", STUDENT, SERVED_STUDENT}
    student = manifest.variants[STUDENT]
    assert student.weight_bytes < (version / "bf16" / "model-00001-of-00002.safetensors").stat().st_size
    assert student.quality["grounded/evidence_f1"].n > 0
    assert student.performance["batch"]["1"]["tpot"]["p50"] > 0
    assert manifest.variants[SERVED_STUDENT].quality["grounded/decision_accuracy"].n > 0
    assert manifest.variants[SERVED_STUDENT].golden
    facts = json.loads((settings.artifacts / "reports" / "distill.json").read_text(encoding="utf-8"))
    assert facts["version"] == manifest.version
    assert set(facts["quality"]) == {"teacher", STUDENT, NO_TEACHER, SERVED_STUDENT}
    assert facts["benchmark"]["speculative"]["same_replies"]
    assert facts["training"][STUDENT]["share_of_teacher"] <= 1 / 3
    capsys.readouterr()
    dp.run(settings)
    said = capsys.readouterr().out
    assert said.count("unchanged, skipped") == 6
    assert handoff.current(settings.artifacts / "models") == version
    assert entries(version, [SERVED_STUDENT], "auto", settings.artifacts)[0].golden
    handoff.verify(teacher)
