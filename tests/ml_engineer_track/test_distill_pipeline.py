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
from ml_engineer_track.distill import FROM_SCRATCH, NO_TEACHER, SERVED_STUDENT, SLICED, STUDENT, Trained
from ml_engineer_track.evaluate import Scores
from ml_engineer_track.models import load_model, load_tokenizer
from ml_engineer_track.publish import add_variants
from ml_engineer_track.quantize import save_gguf
from ml_engineer_track.serving.catalog import entries
from shared import handoff
from shared.chat import PROMPT_VERSION
from shared.errors import UserError
from shared.metrics import Estimate, estimate_mean
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


def ask(monkeypatch: pytest.MonkeyPatch, settings: Settings, *words: str) -> int:
    """`distill` on the command line, as a person types it."""
    for name in ("model", "artifacts", "datasets"):
        monkeypatch.setenv(name.upper(), str(getattr(settings, name)))
    monkeypatch.setattr(sys, "argv", ["ml_engineer_track", "distill", "--preset", "smoke", *words])
    return cli.main()


@pytest.mark.parametrize("option", ["--student", "--teacher"])
@pytest.mark.parametrize("given", ["./nothing", "nothing/at/all", "here/nothing"])
def test_a_model_that_is_not_there_is_one_line(
    settings: Settings, data: CuratedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    option: str, given: str,
) -> None:  # fmt: skip
    publish_teacher(settings, data, Path(settings.model), tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert ask(monkeypatch, settings, option, given) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"error: no model here (config.json is missing) in {option} {given}")
    assert said.err.count("\n") == 1
    assert "curate" not in said.out  # before any work


def test_a_version_and_a_model_folder_can_be_teachers(
    settings: Settings, data: CuratedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = publish_teacher(settings, data, Path(settings.model), tmp_path)
    assert dp.teacher_folder(settings, None) == version
    assert dp.teacher_folder(settings, str(version)) == version
    monkeypatch.chdir(tmp_path)
    assert dp.teacher_folder(settings, "./bf16").resolve() == tmp_path / "bf16"


# --- what a side depends on ------------------------------------------------------------------------------------------


def a_side(name: str, folder: str = "") -> Trained:
    return Trained(name, folder, 30, 0.3, 10, 2, False, 0, 1.0, [{"step": 10, "loss": 1.0}], [1.0], 2.0, 100.0)


def test_another_teacher_is_taught_from_anew_and_the_same_one_elsewhere_is_not(
    settings: Settings, data: CuratedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, config and tokenizer count; the folder's place and its card do not. A hub id is a folder by then."""
    learnt: list[str] = []

    def distill(s: Settings, rows: CuratedData, teacher: str, name: str, student: str) -> Trained:
        folder = Path(shutil.copytree(settings.model, s.work / f"distill-{name}" / "model", dirs_exist_ok=True))
        learnt.append(name)
        return a_side(name, str(folder))

    monkeypatch.setattr(dp, "distill", distill)
    names = dp.sides(taught=True)
    assert names == (STUDENT, NO_TEACHER, FROM_SCRATCH)

    def learn(teacher: Path, student: str = SLICED) -> tuple[list[str], str]:
        learnt.clear()
        stages = p.Stages(settings)
        dp.distill_stages(stages, data, teacher, names, student)
        return list(learnt), stages.key

    here = Path(shutil.copytree(settings.model, tmp_path / "here"))
    first, key = learn(here)
    assert first == list(names)
    assert learn(here) == ([], key)
    there = Path(shutil.copytree(here, tmp_path / "there"))
    (there / "README.md").write_text("a card", encoding="utf-8")
    assert learn(there) == ([], key)
    for change in ("config.json", "tokenizer.json", "model.safetensors"):
        path = there / change
        path.write_bytes(path.read_bytes() + b" ")
        again, other = learn(there)
        assert again == list(names)
        assert other != key
        key = other
    again, other = learn(there, str(here))  # a student to start from
    assert again == list(names)
    assert other != key
    settings.work.joinpath(f"distill-{FROM_SCRATCH}", "model", "config.json").unlink()
    assert learn(there, str(here)) == ([FROM_SCRATCH], other)


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


def a_run(
    settings: Settings, data: CuratedData, student: float = 0.78, alone: float = 0.5, speed: float = 2.5, served: float = 0.78
) -> dr.Distillation:
    """Scores that are 0 or 1 a row, the better model right wherever the worse one is. The teacher is right in 80 %."""

    def scores(name: str, share: float) -> Scores:
        rows = [float(n < round(1000 * share)) for n in range(1000)]
        figure = estimate_mean(rows, 200, 7)
        keys = [key for _, key in dr.GOALS]
        return Scores(name, dict.fromkeys(keys, figure), [], dict.fromkeys(keys, rows))

    one = {"ttft": {"p50": 0.1}, "tpot": {"p50": 0.01}, "decode_throughput": 100.0}

    def turns(fast: str) -> dict[str, object]:
        ratio = {"n": 80, "value": speed, "low": speed - 0.1, "high": speed + 0.1}
        throughput = {"teacher": 100.0, fast: 100 * speed}
        return {"new_tokens": 32, "turns": 80, "throughput": throughput, "ratio": ratio, "seconds": {}}

    draft = {
        "prompts": 4, "tokens": 90, "same_replies": True, "draft_tokens": 80, "accepted_tokens": 60, "acceptance_rate": 0.75,
        "plain_throughput": 100.0, "draft_throughput": 150.0, "speed_up": {"n": 20, "value": 1.5, "low": 1.4, "high": 1.6},
    }  # fmt: skip
    figures = {
        "hardware": {"cpu_info": "x", "n_threads": 2, "memory_gib": 4, "gpu_info": None},
        "models": {"teacher": {"batch": {"1": one}}, STUDENT: {"batch": {"1": one}}},
        "decoding": turns(STUDENT), "served": turns(SERVED_STUDENT), "speculative": draft,
    }  # fmt: skip
    shares = {"teacher": 0.8, STUDENT: student, NO_TEACHER: alone, FROM_SCRATCH: 0.3, SERVED_STUDENT: served}
    found = {name: scores(name, share) for name, share in shares.items()}
    return dr.Distillation(settings, data, {n: a_side(n) for n in dp.sides(True)}, found, figures, None, {})


def verdicts(run: dr.Distillation) -> dict[str, str]:
    found = dr.findings(run)
    assert all(f["reached"] == (f["verdict"] == "yes") for f in found)
    assert len({f["claim"] for f in found}) == len(found)
    return {f["claim"]: f["verdict"] for f in found}


def test_with_everything_reached_every_goal_says_so(settings: Settings, data: CuratedData) -> None:
    found = verdicts(a_run(settings, data))
    assert set(found.values()) == {"yes"}
    assert len(found) == 1 + 2 * 2 + 2 * 2 * 2 + 2 + 2
    for name in (STUDENT, SERVED_STUDENT):  # what the server has is held to all of them, too
        for goal in ("keeps at least 92%", "beats the same student without a teacher", "decodes at least 2 times as fast"):
            assert any(claim.startswith(f"{name} {goal}") for claim in found)


@pytest.mark.parametrize(
    ("changed", "claims", "verdict"),
    [
        ({"student": 0.7}, f"{STUDENT} keeps at least 92%", "no"),  # 0.875 of the teacher's
        ({"student": 0.745}, f"{STUDENT} keeps at least 92%", "on average"),  # 0.931, and the interval reaches below 0.92
        ({"served": 0.7}, f"{SERVED_STUDENT} keeps at least 92%", "no"),
        ({"alone": 0.78}, f"{STUDENT} beats the same student", "no"),  # the very same replies
        ({"alone": 0.779}, f"{STUDENT} beats the same student", "on average"),  # one row of a thousand
        ({"alone": 0.75}, f"{STUDENT} beats the same student", "yes"),  # certain when paired …
        ({"alone": 0.75}, f"{STUDENT} and {NO_TEACHER}: intervals", "no"),  # … although the two intervals overlap
        ({"speed": 2.05}, f"{STUDENT} decodes at least 2 times", "on average"),
        ({"speed": 2.05}, f"{SERVED_STUDENT} decodes at least 2 times", "on average"),
        ({"speed": 1.9}, f"{STUDENT} decodes at least 2 times", "no"),
    ],
)
def test_a_goal_is_judged_by_pairs_and_by_the_whole_interval(
    settings: Settings, data: CuratedData, changed: dict[str, float], claims: str, verdict: str
) -> None:
    found = verdicts(a_run(settings, data, **changed))
    assert {said for claim, said in found.items() if claim.startswith(claims)} == {verdict}


def test_a_goal_that_was_not_measured_is_not_claimed(settings: Settings, data: CuratedData) -> None:
    run = a_run(settings, data)
    run.scores.pop(SERVED_STUDENT)
    run.figures.update(served=None, speculative=None)
    assert not any(SERVED_STUDENT in claim or "draft" in claim for claim in verdicts(run))
    assert "is not measured" in dr.page(run)


def test_a_draft_that_changes_a_reply_or_saves_nothing_is_not_a_success(settings: Settings, data: CuratedData) -> None:
    run = a_run(settings, data)
    run.figures["speculative"] |= {"same_replies": False, "speed_up": {"n": 20, "value": 1.0, "low": 0.9, "high": 1.1}}
    found = verdicts(run)
    assert found["and changes no reply"] == "no"
    assert found["as a draft it speeds its teacher up"] == "no"


def test_what_the_start_and_the_teacher_were_worth_are_told_apart(settings: Settings, data: CuratedData) -> None:
    parts = {(part, label): e.value for part, label, e in dr.worth(a_run(settings, data))}
    found = [parts[part, "evidence F1"] for part in dict.fromkeys(part for part, _ in parts)]
    assert found == pytest.approx([0.5 - 0.3, 0.78 - 0.5, 0.78 - 0.8, 0.0])


def test_the_report_is_written_for_programs_and_people(settings: Settings, data: CuratedData) -> None:
    page = dr.write(a_run(settings, data, 0.75))
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
    assert set(facts["quality"]) == {"teacher", STUDENT, NO_TEACHER, FROM_SCRATCH, SERVED_STUDENT}
    assert set(facts["training"]) == {STUDENT, NO_TEACHER, FROM_SCRATCH}
    assert facts["training"][NO_TEACHER]["on_policy_steps"] == facts["training"][FROM_SCRATCH]["on_policy_steps"] == 0
    assert facts["benchmark"]["served"]["ratio"]["low"] > 0
    assert facts["benchmark"]["decoding"]["turns"] == facts["benchmark"]["served"]["turns"] > 0
    assert facts["benchmark"]["speculative"]["same_replies"]
    assert facts["training"][STUDENT]["share_of_teacher"] <= 1 / 3
    capsys.readouterr()
    dp.run(settings)
    said = capsys.readouterr().out
    assert said.count("unchanged, skipped") == 7
    assert handoff.current(settings.artifacts / "models") == version
    assert entries(version, [SERVED_STUDENT], "auto", settings.artifacts)[0].golden
    handoff.verify(teacher)
