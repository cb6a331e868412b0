"""Real groups of workers: they learn what one learns, and a group that loses one goes on as if nothing had happened."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from ml_engineer_track import launch as la
from ml_engineer_track.curate import CuratedData, curate
from ml_engineer_track.finetune import Tuned
from shared.errors import UserError
from shared.files import write_json
from shared.settings import ROOT, Settings
from tests.ml_engineer_track.conftest import RANKER

MakeSettings = Callable[..., Settings]
RUN = {"batch_tokens": 700, "evaluate_every": 4, "checkpoint_every": 2, "patience": 100, "learning_rate": 2e-3, "dropout": 0.0}
#: Workers add up the same numbers in another order, and where weights are bf16 that moves a loss by up to this share.
TOLERANCE = 0.01
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install -e '.[ray]'")


@pytest.fixture
def settings(make_settings: MakeSettings) -> Settings:
    """A dozen steps on the mini data."""
    return make_settings(finetune={**RUN, "epochs": 6.0})


@pytest.fixture
def data(settings: Settings) -> CuratedData:
    return curate(settings, RANKER)


def by(settings: Settings, folder: Path, engine: str, workers: int, strategy: str = "ddp", **training: Any) -> Settings:
    finetune = settings.finetune.model_copy(update=training)
    given = {"artifacts": folder, "engine": engine, "workers": workers, "strategy": strategy, "finetune": finetune}
    return settings.model_copy(update=given)


# --- what cannot be asked for ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "workers", "says"),
    [
        ("local", 2, "one process cannot be several workers in WORKERS=2. Set ENGINE=torchrun or ENGINE=ray"),
        ("torchrun", 3, "3 workers cannot share the 8 rows of a step evenly in WORKERS. Use one of: 1, 2, 4, 8"),
        ("torchrun", 16, "16 workers cannot share the 8 rows of a step evenly in WORKERS. Use one of: 1, 2, 4, 8"),
    ],
)
def test_workers_that_cannot_be_had_are_refused_before_any_work(
    settings: Settings, data: CuratedData, tmp_path: Path, engine: str, workers: int, says: str
) -> None:
    with pytest.raises(UserError) as caught:
        la.train(by(settings, tmp_path / "none", engine, workers), data)
    assert str(caught.value) == says
    assert not (tmp_path / "none").exists()


def test_without_ray_the_message_says_how_to_get_it(
    settings: Settings, data: CuratedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"Ray is not installed in ENGINE=ray. pip install .* -e '.\[ray\]'"):
        la.check(by(settings, settings.artifacts, "ray", 2))


def test_ray_without_its_part_for_training_is_told_before_any_work(
    settings: Settings, data: CuratedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "ray.train", None)
    with pytest.raises(UserError, match=r"what ray\.train needs"):
        la.check(by(settings, settings.artifacts, "ray", 2))


def test_workers_are_spread_over_machines_evenly(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PET_NNODES", "1:3")
    assert la.nodes() == 3
    with pytest.raises(UserError, match="8 workers cannot be spread over 3 machines evenly"):
        la.check(by(settings, settings.artifacts, "torchrun", 8))


def test_more_workers_than_gpus_are_refused(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(UserError, match="2 workers need as many GPUs, and here are 1"):
        la.check(by(settings, settings.artifacts, "torchrun", 2))


@pytest.mark.parametrize(
    "given", [{"ENGINE": "slurm"}, {"WORKERS": "none"}, {"WORKERS": "0"}, {"WORKERS": "3", "ENGINE": "torchrun"}]
)
def test_the_command_line_says_it_in_one_line(given: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ml_engineer_track", "finetune"]
    environment = os.environ | {"PRESET": "smoke", "ARTIFACTS": str(tmp_path), **given}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


# --- what one worker does --------------------------------------------------------------------------------------------


def test_a_mistake_is_written_down_and_the_next_group_leaves_at_once(
    settings: Settings, data: CuratedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def diverges(*_: Any) -> None:
        tried.append(1)
        raise UserError("training diverged", "step 3", "Lower it")

    monkeypatch.setattr(la, "finetune", diverges)
    job = tmp_path / "job.json"
    job.write_text(la.Job(settings=settings, data=data).model_dump_json(), encoding="utf-8")
    la.work(job)
    la.work(job)
    assert len(tried) == 1
    assert json.loads((tmp_path / "error.json").read_text(encoding="utf-8")) == {"what": "training diverged in step 3. Lower it"}


def test_what_workers_leave_becomes_a_result_or_one_line(
    settings: Settings, data: CuratedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = by(settings, tmp_path / "group", "torchrun", 2)
    monkeypatch.setattr(la, "run_torchrun", lambda settings, work: None)
    with pytest.raises(UserError, match=r"workers were given up: .* at most 3 times in .*workers\.log\. Its end says why"):
        la.train(asked, data)
    monkeypatch.setattr(la, "run_torchrun", lambda settings, work: write_json(work / "error.json", {"what": "too little memory"}))
    with pytest.raises(UserError, match="too little memory"):
        la.train(asked, data)


# --- whole groups ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_workers_learn_what_one_learns_with_either_strategy(settings: Settings, data: CuratedData, tmp_path: Path) -> None:
    one = la.train(by(settings, tmp_path / "one", "local", 1), data)
    for strategy in ("ddp", "fsdp"):
        two = la.train(by(settings, tmp_path / strategy, "torchrun", 2, strategy), data)
        assert two.steps == one.steps >= 9
        assert two.loss == pytest.approx(one.loss, rel=TOLERANCE)
        assert two.validation == [pytest.approx(look, rel=TOLERANCE) for look in one.validation]
        assert (Path(two.adapter) / "adapter_model.safetensors").exists()
        assert not (tmp_path / strategy / "checkpoint").exists()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_killed_worker_costs_no_step(settings: Settings, data: CuratedData, tmp_path: Path, strategy: str) -> None:
    lost = by(settings, tmp_path / "lost", "torchrun", 2, strategy, epochs=12.0)
    killed = kill_one(lost, data, tmp_path, lambda process: "ml_engineer_track.launch" in " ".join(process.cmdline()))
    assert_nothing_lost(killed, la.train(by(lost, tmp_path / "one", "local", 1), data))


@pytest.mark.slow
@needs_ray
@pytest.mark.timeout(1200)
def test_ray_train_starts_a_lost_group_again(settings: Settings, data: CuratedData, tmp_path: Path) -> None:
    lost = by(settings, tmp_path / "lost", "ray", 2, epochs=12.0)
    killed = kill_one(lost, data, tmp_path, lambda process: "RayTrainWorker" in " ".join(process.cmdline()))
    assert_nothing_lost(killed, la.train(by(lost, tmp_path / "one", "local", 1), data))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_worker_that_keeps_dying_is_given_up(settings: Settings, data: CuratedData, tmp_path: Path) -> None:
    """Its model is not there: an error that a new group does not mend, and that is nobody's UserError."""
    broken = data.__class__(data.version, tmp_path / "not-there", data.counts, data.dropped)
    with pytest.raises(UserError, match="workers were given up") as caught:
        la.train(by(settings, tmp_path / "group", "torchrun", 2), broken)
    assert len(str(caught.value).splitlines()) == 1
    assert "FileNotFoundError" in (by(settings, tmp_path / "group", "torchrun", 2).work / "finetune" / "workers.log").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_agents_as_on_two_machines_train_together(settings: Settings, data: CuratedData, tmp_path: Path) -> None:
    """As docs/cluster.md has it: one machine runs the pipeline, the other the agent alone, on the job that lies there."""
    group = by(settings, tmp_path / "two", "torchrun", 2)
    shared = {"PET_NNODES": "2", "PET_RDZV_ENDPOINT": "127.0.0.1:29431", "PET_RDZV_BACKEND": "c10d", "PET_RDZV_ID": "ml"}
    shared |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    first = start(group, data, tmp_path, shared)
    job = group.work / "finetune" / "job.json"
    wait_for(lambda: job.exists(), first)
    agent = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1", "-m", "ml_engineer_track.launch", str(job)]
    with subprocess.Popen(agent, cwd=ROOT, env=environment() | shared, stderr=subprocess.DEVNULL) as second:
        assert first.wait() == 0
        assert second.wait() == 0
    one = la.train(by(settings, tmp_path / "one", "local", 1), data)
    assert result(group).loss == pytest.approx(one.loss, rel=TOLERANCE)


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def start(settings: Settings, data: CuratedData, tmp_path: Path, more: dict[str, str]) -> subprocess.Popen[bytes]:
    """The launcher in a process of its own, so that a test can do something to its workers."""
    file = tmp_path / "asked.json"
    file.write_text(la.Job(settings=settings, data=data).model_dump_json(), encoding="utf-8")
    program = (
        "import sys; from pathlib import Path; from ml_engineer_track import launch as la\n"
        "job = la.Job.model_validate_json(Path(sys.argv[1]).read_text()); la.train(job.settings, job.data)\n"
    )
    return subprocess.Popen([sys.executable, "-c", program, str(file)], cwd=ROOT, env=environment() | more)


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    while not happened():
        assert process.poll() is None, "it ended before that"
        time.sleep(0.05)


def kill_one(settings: Settings, data: CuratedData, tmp_path: Path, is_worker: Callable[[psutil.Process], bool]) -> Tuned:
    """Train, and SIGKILL one worker as soon as there is a checkpoint."""
    launcher = start(settings, data, tmp_path, {})
    wait_for(lambda: (settings.work / "finetune" / "checkpoint" / "state.json").exists(), launcher)
    workers = [p for p in psutil.Process(launcher.pid).children(recursive=True) if _is(is_worker, p)]
    # The agent of torchrun has the workers' command in its own; it is their parent.
    workers = [p for p in workers if not any(child in workers for child in p.children())]
    assert len(workers) == 2
    os.kill(workers[-1].pid, signal.SIGKILL)
    assert launcher.wait() == 0
    return result(settings)


def _is(wanted: Callable[[psutil.Process], bool], process: psutil.Process) -> bool:
    try:
        return wanted(process)
    except psutil.Error:  # it has ended
        return False


def result(settings: Settings) -> Tuned:
    return Tuned(**json.loads((settings.work / "finetune" / "training.json").read_text(encoding="utf-8")))


def assert_nothing_lost(killed: Tuned, one: Tuned) -> None:
    """Every loss at its own step: a step done twice, or not at all, would move all that follow."""
    assert 0 < killed.resumed_at < killed.steps == one.steps
    assert killed.loss == pytest.approx(one.loss, rel=TOLERANCE)
    assert [look["step"] for look in killed.validation] == [look["step"] for look in one.validation]
    assert killed.best_validation_loss == pytest.approx(one.best_validation_loss, rel=TOLERANCE)
