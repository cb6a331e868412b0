"""All stages together: what changed is done again, what did not is skipped, and mistakes are one line."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ml_engineer_track import __main__ as cli
from ml_engineer_track import pipeline as p
from ml_engineer_track.curate import CuratedData
from ml_engineer_track.evaluate import Scores
from ml_engineer_track.finetune import Tuned
from ml_engineer_track.publish import Published
from ml_engineer_track.quantize import Variants
from ml_engineer_track.train_ranker import TrainedRanker
from shared import handoff
from shared.errors import UserError
from shared.metrics import Estimate
from shared.settings import OVERRIDES, ROOT, Settings, load_settings

MakeSettings = Callable[..., Settings]
STAGES = ["train-ranker", "curate", "finetune", "quantize", "evaluate", "benchmark", "publish"]


# --- one stage at a time ---------------------------------------------------------------------------------------------


@dataclass
class Counter:
    """Work that counts how often it is done and hands over a published folder."""

    folder: Path
    done: int = 0

    def __call__(self) -> Published:
        self.done += 1
        (self.folder / "m-1").mkdir(parents=True, exist_ok=True)
        (self.folder / "m-1" / "manifest.json").write_text("{}", encoding="utf-8")
        (self.folder / "current").write_text("m-1", encoding="utf-8")
        return Published("m-1", str(self.folder / "m-1"))


@pytest.fixture
def work(make_settings: MakeSettings) -> Counter:
    return Counter(make_settings().artifacts / "models")


@pytest.fixture
def stage(make_settings: MakeSettings, work: Counter, tmp_path: Path) -> Callable[..., Published]:
    """Run the stage `publish` on one input file, as a fresh program would."""
    (tmp_path / "input.txt").write_text("one", encoding="utf-8")

    def run(settings: object = None, before: str = "") -> Published:
        stages = p.Stages(make_settings())
        stages.key = before
        return stages.run("publish", Published, work, [tmp_path / "input.txt"], ("publish.py",), settings)

    return run


def test_a_stage_is_skipped_when_nothing_changed_and_says_so(
    stage: Callable[..., Published], work: Counter, capsys: pytest.CaptureFixture[str]
) -> None:
    first = stage()
    assert "unchanged" not in capsys.readouterr().out
    assert stage() == first
    assert work.done == 1
    assert capsys.readouterr().out.startswith("[7/7] publish: unchanged, skipped (m-1")


def test_a_stage_is_redone_for_another_input_setting_or_stage_before_it(
    stage: Callable[..., Published], work: Counter, tmp_path: Path
) -> None:
    stage()
    stage(settings={"rank": 8})
    assert work.done == 2
    stage(settings={"rank": 8}, before="another key")
    assert work.done == 3
    (tmp_path / "input.txt").write_text("two", encoding="utf-8")
    stage(settings={"rank": 8}, before="another key")
    assert work.done == 4
    stage(settings={"rank": 8}, before="another key")
    assert work.done == 4


@pytest.mark.parametrize("gone", ["current", "m-1/manifest.json", "m-1"])
def test_a_stage_is_redone_when_what_it_made_is_gone(stage: Callable[..., Published], work: Counter, gone: str) -> None:
    stage()
    path = work.folder / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    stage()
    assert work.done == 2
    assert path.exists()


def test_a_stage_that_failed_is_done_again(make_settings: MakeSettings, work: Counter) -> None:
    def fails() -> Published:
        raise UserError("no")

    settings = make_settings()
    with pytest.raises(UserError):
        p.Stages(settings).run("publish", Published, fails, [], ("publish.py",), {})
    p.Stages(settings).run("publish", Published, work, [], ("publish.py",), {})
    assert work.done == 1


def test_a_stage_that_failed_finds_what_it_left_only_while_its_inputs_are_the_same(make_settings: MakeSettings) -> None:
    """A checkpoint must survive a crash, but not be mixed with other data."""
    settings = make_settings()
    checkpoint = settings.work / "publish" / "checkpoint"

    def crashes() -> Published:
        checkpoint.mkdir(parents=True)
        raise KeyboardInterrupt

    def looks() -> Published:
        found.append(checkpoint.exists())
        raise KeyboardInterrupt

    found: list[bool] = []
    for work, options in ((crashes, {"a": 1}), (looks, {"a": 1}), (looks, {"a": 2})):
        with pytest.raises(KeyboardInterrupt):
            p.Stages(settings).run("publish", Published, work, [], ("publish.py",), options)
    assert found == [True, False]


@pytest.mark.parametrize(
    ("files", "there"),
    [
        (["config.json", "model.safetensors"], True),
        (["config.json", "model-00001-of-00002.safetensors"], True),
        (["config.json"], False),
        ([], False),
    ],
)
def test_a_variant_is_there_when_its_weights_are(
    make_settings: MakeSettings, tmp_path: Path, files: list[str], there: bool
) -> None:
    (tmp_path / "nf4").mkdir()
    for file in files:
        (tmp_path / "nf4" / file).write_text("{}", encoding="utf-8")
    variants = Variants({"nf4": str(tmp_path / "nf4")}, {"nf4": 1})
    assert p.Stages(make_settings()).still_there("quantize", variants) is there


# --- all stages, with work that takes no time ------------------------------------------------------------------------


@pytest.fixture
def quick(make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings for runs in which every stage leaves the files it should, and nothing is computed."""
    settings = make_settings()
    work, models = settings.work, settings.artifacts / "models"
    figure = Estimate(value=0.5, low=0.4, high=0.6, n=9)

    def leave(file: Path) -> Path:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x", encoding="utf-8")
        return file.parent

    def curated(*_: Any) -> CuratedData:
        return CuratedData("d-1", leave(settings.artifacts / "data" / "d-1" / "train.jsonl"), {"train": {"answer": 1}}, {})

    def tuned(*_: Any) -> Tuned:
        adapter = leave(work / "finetune" / "best" / "adapter_model.safetensors")
        return Tuned(
            adapter=str(adapter), base="", method="lora", steps=1, stopped_early=False, resumed_at=0, best_validation_loss=1.0,
            validation=[], loss=[1.0], seconds=1.0, tokens_per_second=1.0, data_wait_share=0.0, mfu=0.1, trainable_share=0.1,
        )  # fmt: skip

    def quantized(*_: Any) -> Variants:
        folders = {name: leave(work / "quantize" / name / "model.safetensors") for name in ("bf16", "nf4")}
        return Variants({name: str(folder) for name, folder in folders.items()}, {"bf16": 2, "nf4": 1})

    def ranked(*_: Any) -> TrainedRanker:
        folder = leave(work / "train-ranker" / "ranker.json")
        names = [f"{name}/leaflet_recall@5" for name in ("bm25", "dense", "ranker")]
        return TrainedRanker(str(folder / "ranker.json"), 9, dict.fromkeys(names, figure))

    def published(*_: Any) -> Published:
        folder = leave(models / "m-1" / "manifest.json")
        handoff.set_current(models, "m-1")
        return Published("m-1", str(folder))

    work_of = {
        "curate": curated,
        "train": tuned,
        "quantize": quantized,
        "load_tokenizer": lambda path: None,
        "load_model": lambda path: None,
        "evaluate": lambda *given: Scores(given[-1], {"grounded/evidence_f1": figure}, []),
        "benchmark": lambda _, folders: {"models": {name: {"batch": {"1": {"decode_throughput": 9}}} for name in folders}},
        "training_throughput": lambda *_: {"ratio": 1.5},
        "train_ranker": ranked,
        "read_ranker": lambda path: None,
        "publish": published,
    }
    for name, done in work_of.items():
        monkeypatch.setattr(p, name, done)
    monkeypatch.setattr(p.report, "write", lambda _: None)
    return settings


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[[Settings], dict[str, bool]]:
    """Run the pipeline and say which stages it skipped."""

    def once(settings: Settings) -> dict[str, bool]:
        capsys.readouterr()
        p.run(settings)
        return skipped(capsys.readouterr().out)

    return once


def skipped(output: str) -> dict[str, bool]:
    lines = [line for line in output.splitlines() if line.startswith("[")]
    return {line.split()[1].rstrip(":"): "unchanged, skipped" in line for line in lines}


def redone_from(first: str) -> dict[str, bool]:
    """Which stages are skipped: those before."""
    return {name: STAGES.index(name) < STAGES.index(first) for name in STAGES}


def test_a_first_run_does_every_stage_and_a_second_one_none(quick: Settings, run: Callable[[Settings], dict[str, bool]]) -> None:
    assert run(quick) == dict.fromkeys(STAGES, False)
    assert run(quick) == dict.fromkeys(STAGES, True)


@pytest.mark.parametrize(
    ("stage", "change"),
    [
        ("curate", {"copies": 2}),
        ("finetune", {"rank": 5}),
        ("quantize", {"variants": ["nf4", "int8"]}),
        ("evaluate", {"answer_rows": 9}),
        ("benchmark", {"repeats": 6}),
    ],
)
def test_a_changed_setting_redoes_its_stage_and_those_after_it(
    quick: Settings, run: Callable[[Settings], dict[str, bool]], stage: str, change: dict[str, Any]
) -> None:
    run(quick)
    changed = quick.model_copy(update={stage: getattr(quick, stage).model_copy(update=change)})
    assert run(changed) == redone_from(stage)


def test_served_variants_are_evaluated_where_their_engine_is_installed(
    quick: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = Estimate(value=0.25, low=0.2, high=0.3, n=9)
    loaded = p.quantize

    def quantized(*given: Any) -> Variants:
        variants = loaded(*given)
        return Variants({**variants.folders, "q8_0": variants.folders["nf4"]}, {**variants.weight_bytes, "q8_0": 1})

    monkeypatch.setattr(p, "quantize", quantized)
    monkeypatch.setattr(p, "evaluate_served", lambda s, d, folder, name: Scores(name, {"grounded/evidence_f1": figure}, []))
    monkeypatch.setattr(p, "has_openvino", lambda: False)
    p.run(quick)
    printed = capsys.readouterr().out
    assert "openvino-genai is not installed; q8_0 published without figures" in printed
    assert "evidence F1 base 0.50, bf16 0.50, nf4 0.50. Why" in printed
    monkeypatch.setattr(p, "has_openvino", lambda: True)  # installed since: what was left out is done
    p.run(quick)
    printed = capsys.readouterr().out
    assert skipped(printed) == redone_from("evaluate")
    assert "evidence F1 base 0.50, bf16 0.50, nf4 0.50, q8_0 0.25. Why" in printed


def test_a_changed_sentence_redoes_everything(quick: Settings, run: Callable[[Settings], dict[str, bool]]) -> None:
    run(quick)
    leaflet = quick.datasets / "health_library" / "common-cold.md"
    leaflet.write_text(leaflet.read_text(encoding="utf-8").replace("causes fact 1", "causes fact one"), encoding="utf-8")
    assert run(quick) == dict.fromkeys(STAGES, False)


@pytest.mark.parametrize(
    ("stage", "path"),
    [
        ("curate", "data"),
        ("finetune", "runs/*/finetune/best/adapter_model.safetensors"),
        ("quantize", "runs/*/quantize/nf4"),
        ("quantize", "runs/*/quantize/bf16/model.safetensors"),
        ("train-ranker", "runs/*/train-ranker/ranker.json"),
        ("publish", "models/current"),
        ("publish", "models/m-1"),
    ],
)
def test_a_removed_artifact_is_made_again_and_nothing_else(
    quick: Settings, run: Callable[[Settings], dict[str, bool]], stage: str, path: str
) -> None:
    run(quick)
    (found,) = quick.artifacts.glob(path)
    shutil.rmtree(found) if found.is_dir() else found.unlink()
    assert run(quick) == {name: name != stage for name in STAGES}
    assert found.exists()


def test_the_model_of_a_run_is_current_also_when_publishing_was_skipped(
    quick: Settings, run: Callable[[Settings], dict[str, bool]]
) -> None:
    """A run of another preset moved `current` in between."""
    run(quick)
    handoff.set_current(quick.artifacts / "models", "m-other")
    assert run(quick) == dict.fromkeys(STAGES, True)
    assert handoff.current(quick.artifacts / "models").name == "m-1"


def test_a_failing_last_stage_leaves_the_current_model_and_earlier_results(
    quick: Settings, run: Callable[[Settings], dict[str, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(quick)
    (quick.artifacts / "models" / "m-old").mkdir()
    handoff.set_current(quick.artifacts / "models", "m-old")
    changed = quick.model_copy(update={"benchmark": quick.benchmark.model_copy(update={"repeats": 6})})
    with monkeypatch.context() as patch:
        patch.setattr(p, "publish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(changed)
    assert handoff.current(quick.artifacts / "models").name == "m-old"
    assert run(changed) == redone_from("publish")
    assert handoff.current(quick.artifacts / "models").name == "m-1"
    assert handoff.earlier(quick.artifacts / "models") == ["m-old"]  # where `make rollback` goes to


# --- mistakes are one line -------------------------------------------------------------------------------------------


@pytest.fixture
def prepared(make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The environment of a run on the micro model, with an earlier model current."""
    settings = make_settings()
    for name, value in (("ARTIFACTS", settings.artifacts), ("DATASETS", settings.datasets), ("MODEL", settings.model)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("PRESET", "smoke")
    (settings.artifacts / "models" / "m-old").mkdir(parents=True)
    handoff.set_current(settings.artifacts / "models", "m-old")
    return settings


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line a failing command writes to stderr."""
    monkeypatch.setattr(sys, "argv", ["ml_engineer_track", *words])
    assert cli.main() == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    return line


def test_an_unknown_preset_is_refused(
    prepared: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "unknown preset 'huge'" in command(monkeypatch, capsys, "run", "--preset", "huge")


@pytest.mark.parametrize("words", [["dance"], ["run", "--dance"], ["run", "dance"], ["curate", "--preset"]])
def test_an_unknown_command_or_option_is_refused(
    prepared: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    command(monkeypatch, capsys, *words)


def test_an_unknown_method_is_refused(
    prepared: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "finetune.method" in command(monkeypatch, capsys, "run", "--method", "magic")


@pytest.mark.parametrize("word", [*STAGES, "run"])
def test_a_model_path_without_a_model_is_refused_before_any_work(
    prepared: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, word: str
) -> None:
    (tmp_path / "empty").mkdir()
    if word not in ("evaluate", "benchmark", "train-ranker"):  # the first two take any model as --path, the last one none
        assert f"config.json is missing) in {tmp_path / 'empty'}" in command(
            monkeypatch, capsys, word, "--model", str(tmp_path / "empty")
        )
    monkeypatch.setenv("MODEL", str(tmp_path / "empty"))
    assert f"config.json is missing) in {tmp_path / 'empty'}" in command(monkeypatch, capsys, word)
    assert {path.name for path in prepared.artifacts.iterdir()} == {"models"}


def test_a_model_path_without_weights_is_refused_before_any_work(
    prepared: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(prepared.model, tmp_path / "copy"))
    (folder / "model.safetensors").unlink()
    for words in (["run", "--model", str(folder)], ["evaluate", "--path", str(folder)], ["benchmark", "--path", str(folder)]):
        assert "no weights here" in command(monkeypatch, capsys, *words)
    assert not (prepared.artifacts / "runs").exists()


def test_a_broken_leaflet_is_refused_and_the_current_model_stays(
    prepared: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    leaflet = prepared.datasets / "health_library" / "sunburn.md"
    leaflet.write_text(leaflet.read_text(encoding="utf-8").replace("## Causes", "## Reasons"), encoding="utf-8")
    line = command(monkeypatch, capsys, "run")
    assert "sunburn.md" in line
    assert "Reasons" in line
    assert handoff.current(prepared.artifacts / "models").name == "m-old"


def test_a_second_run_at_the_same_time_is_refused(
    prepared: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with p.locked_stages(load_settings()):
        for word in ("run", "curate", "finetune", "quantize", "evaluate", "train-ranker", "publish"):
            assert "another run is using this working folder" in command(monkeypatch, capsys, word)
    with p.locked_stages(load_settings()) as stages:  # and once the first has ended, the next may begin
        assert isinstance(stages, p.Stages)
        assert stages.settings == load_settings().with_its_data()


def test_runs_on_different_models_do_not_lock_each_other_out(prepared: Settings, tmp_path: Path) -> None:
    other = load_settings(model=str(shutil.copytree(prepared.model, tmp_path / "other")))
    with p.locked_stages(load_settings()), p.locked_stages(other) as stages:
        assert stages.settings == other.with_its_data()


def test_a_run_that_failed_or_was_killed_does_not_lock_the_next_one_out(prepared: Settings) -> None:
    work = load_settings().work
    work.mkdir(parents=True)
    (work / "lock").write_text("", encoding="utf-8")  # what a killed run leaves behind
    with pytest.raises(UserError), p.locked_stages(load_settings()):
        raise UserError("no")
    with p.locked_stages(load_settings()), (work / "lock").open() as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_full_disk_is_one_line(prepared: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "/disk/file")

    monkeypatch.setattr(p, "curate", full)
    assert "the disk is full while writing /disk/file" in command(monkeypatch, capsys, "run")


def test_ctrl_c_says_how_to_go_on(
    prepared: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(p, "curate", interrupted)
    monkeypatch.setattr(sys, "argv", ["ml_engineer_track", "run"])
    assert cli.main() == 130
    assert "run the same command again" in capsys.readouterr().err


def test_results_before_any_run_are_refused(
    prepared: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"no report yet in {prepared.artifacts}" in command(monkeypatch, capsys, "results")


def test_a_bug_of_ours_keeps_its_traceback(prepared: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(p, "curate", lambda *_: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["ml_engineer_track", "run"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


# --- the whole path --------------------------------------------------------------------------------------------------


def program(artifacts: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    plain = {name: value for name, value in os.environ.items() if name not in (*OVERRIDES, "PRESET")}
    return subprocess.run(
        [sys.executable, "-m", "ml_engineer_track", *words],
        cwd=ROOT,
        env={**plain, "HF_HUB_OFFLINE": "1", "ARTIFACTS": str(artifacts), **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("mistake", ["preset", *(pytest.param(m, marks=pytest.mark.slow) for m in ("command", "model", "data"))])
def test_a_mistake_is_one_line_on_stderr_for_a_program_too(tmp_path: Path, mini_datasets: Path, mistake: str) -> None:
    """Every library has been imported by then, and none of them has said anything."""
    (tmp_path / "empty").mkdir()
    (mini_datasets / "health_library" / "sunburn.md").write_text("broken", encoding="utf-8")
    words = {"command": ["dance"], "preset": ["run", "--preset", "huge"]}.get(mistake, ["run", "--preset", "smoke"])
    environment = {"model": {"MODEL": str(tmp_path / "empty")}, "data": {"DATASETS": str(mini_datasets)}}.get(mistake, {})
    done = program(tmp_path / "artifacts", *words, **environment)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "artifacts" / "models").exists()


@pytest.fixture(scope="module")
def smoke(
    micro_path: str, small_datasets: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """One run of the program with the smoke preset, which the tests below share: its folder and how it ended.

    It runs on the micro model; tests/test_readme.py runs the preset as a user does, on the bundled one.
    """
    folder = tmp_path_factory.mktemp("smoke")
    shutil.copytree(small_datasets, folder / "datasets")
    done = program(folder / "artifacts", "run", "--preset", "smoke", MODEL=micro_path, DATASETS=str(folder / "datasets"))
    return folder, done


@pytest.fixture
def whole(smoke: tuple[Path, subprocess.CompletedProcess[str]], micro_path: str) -> Settings:
    """The settings of that run."""
    folder, _ = smoke
    return load_settings("smoke", model=micro_path, artifacts=folder / "artifacts", datasets=folder / "datasets")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_smoke_preset_runs_from_leaflets_to_a_published_model(
    smoke: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, done = smoke
    assert done.returncode == 0, done.stderr
    assert not [line for line in done.stderr.splitlines() if not line.startswith("  ")], done.stderr  # progress is indented
    assert skipped(done.stdout) == dict.fromkeys(STAGES, False)
    manifest = handoff.verify(handoff.current(folder / "artifacts" / "models"))
    assert set(manifest.variants) == {"bf16", "nf4", "q8_0"}
    assert manifest.variants["nf4"].weight_bytes < manifest.variants["bf16"].weight_bytes
    facts = json.loads((folder / "artifacts" / "reports" / "ml.json").read_text(encoding="utf-8"))
    assert facts["version"] == manifest.version
    assert set(facts["quality"]) == {"base", "bf16", "nf4", "q8_0"}
    assert manifest.variants["q8_0"].quality.keys() == manifest.variants["nf4"].quality.keys() - {"perplexity"}
    page = (folder / "artifacts" / "reports" / "ml.html").read_text(encoding="utf-8")
    assert manifest.version in page
    assert page.rstrip().endswith("</html>")


@pytest.mark.slow
def test_the_results_of_the_run_are_printed_for_the_readme(
    whole: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ARTIFACTS", str(whole.artifacts))
    monkeypatch.setattr(sys, "argv", ["ml_engineer_track", "results"])
    assert cli.main() == 0
    tables = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert tables[0] == "| | base | tuned (bf16) | nf4 | q8_0 |"
    assert "| goal | measured | reached |" in tables
    columns = [line.count("|") for line in tables]
    assert sorted(set(columns)) == [4, 6]


@pytest.mark.slow
def test_a_second_run_skips_every_stage(whole: Settings, run: Callable[[Settings], dict[str, bool]]) -> None:
    before = handoff.current(whole.artifacts / "models")
    assert run(whole) == dict.fromkeys(STAGES, True)
    assert handoff.current(whole.artifacts / "models") == before
    handoff.verify(before)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_author_edits_a_leaflet_and_another_version_stands_beside_the_first(
    whole: Settings, run: Callable[[Settings], dict[str, bool]]
) -> None:
    before = handoff.current(whole.artifacts / "models")
    leaflet = whole.datasets / "health_library" / "common-cold.md"
    text = leaflet.read_text(encoding="utf-8")
    leaflet.write_text(text.replace("## Symptoms\n", "## Symptoms\nA cold can begin on any day of the week.\n"), encoding="utf-8")
    # a sentence at the head of a section moves those behind it, as an author's edit would
    assert run(whole) == redone_from("curate")
    assert handoff.current(whole.artifacts / "models") != before
    handoff.verify(handoff.current(whole.artifacts / "models"))
    handoff.verify(before)  # what was published stays as it was
