"""The doctor says one line a check, and only what nothing runs without makes it fail."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared import doctor
from shared.doctor import Finding


def told(capsys: pytest.CaptureFixture[str], findings: list[Finding]) -> tuple[int, list[str]]:
    status = doctor.main(lambda: iter(findings))
    return status, capsys.readouterr().out.splitlines()


def test_a_line_a_check_and_a_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = told(capsys, [Finding("memory", "ok", "16 GiB"), Finding("gpu", "slow", "none")])
    assert status == 0
    assert lines == ["ok       memory      16 GiB", "slow     gpu         none", "ready; slow here: gpu"]


@pytest.mark.parametrize(("essential", "expected"), [(True, 1), (False, 0)])
def test_only_what_is_essential_and_missing_fails(essential: bool, expected: int, capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = told(capsys, [Finding("disk", "missing", "1 GB free", essential)])
    assert status == expected
    assert lines[-1] == ("not ready: disk" if essential else "ready")


def test_this_machine_is_ready() -> None:
    """The tests run here, so nothing essential can be missing."""
    lacking = [f for f in doctor.examine() if f.essential and f.state == "missing"]
    assert not lacking


def test_every_dependency_is_looked_for() -> None:
    names = doctor._dependencies()
    assert {"torch", "transformers", "chromadb", "fastapi"} <= set(names)
    assert set(names) <= set(doctor._pinned()), "a dependency without a pin would never be checked"


def test_a_port_that_somebody_has_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        assert not doctor._free(number)
    assert doctor._free(number)


def test_missing_packages_are_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "_installed", lambda name: "" if name in ("torch", "peft") else "1.0")
    root_with(tmp_path, ".venv", monkeypatch)
    found = doctor.packages()
    assert (found.state, found.essential) == ("missing", True)
    assert found.said.startswith("torch, peft: run `make setup`")


def test_before_setup_nothing_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`make doctor` on a fresh clone must not end with an error: installing is the next step, not a repair."""
    monkeypatch.setattr(doctor, "_installed", lambda name: "")
    root_with(tmp_path, "", monkeypatch)
    found = doctor.packages()
    assert (found.state, found.essential) == ("slow", False)
    assert found.said.startswith("not installed yet: `make setup`")


def root_with(folder: Path, environment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clone that holds what `packages` reads and, where named, an environment."""
    for name in ("torch.txt", "constraints.txt", "pyproject.toml"):
        (folder / name).write_bytes((doctor.ROOT / name).read_bytes())
    if environment:
        (folder / environment).mkdir()
    monkeypatch.setattr(doctor, "ROOT", folder)


def test_windows_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.platform, "system", lambda: "Windows")
    found = doctor.system()
    assert (found.state, found.essential) == ("missing", True)
    assert "WSL 2" in found.said


def test_absent_tools_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None if name in ("make", "git") else f"/usr/bin/{name}")
    found = doctor.tools()
    assert (found.state, found.essential) == ("missing", True)
    assert found.said.startswith("make, git: ")


def test_a_python_without_venv_is_told_until_there_is_an_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    found = doctor.environment()
    assert (found.state, found.essential) == ("missing", True)
    assert "ensurepip" in found.said
    (tmp_path / ".venv").mkdir()
    assert doctor.environment().state == "ok"


def test_other_versions_than_pinned_are_named_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = doctor._pinned()
    monkeypatch.setattr(doctor, "_installed", lambda name: "0.0.1" if name == "peft" else f"{pinned[name]}+cpu")
    found = doctor.packages()
    assert found.state == "slow"
    assert f"peft 0.0.1 (pinned {pinned['peft']})" in found.said
    assert "torch" not in found.said


@pytest.mark.parametrize(("gib", "state", "essential"), [(2, "missing", True), (6, "slow", False), (16, "ok", False)])
def test_memory(gib: int, state: str, essential: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.os, "sysconf", lambda name: 4096 if "PAGE_SIZE" in str(name) else gib * 2**30 // 4096)
    found = doctor.memory()
    assert (found.state, found.essential) == (state, essential)


def test_a_full_disk_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ARTIFACTS", str(tmp_path / "not" / "yet"))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10**8})())
    found = doctor.disk()
    assert (found.state, found.essential) == ("missing", True)


def test_a_check_that_breaks_is_told_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Finding:
        raise OSError("no such thing here")

    monkeypatch.setattr(doctor, "memory", broken)
    findings: Iterator[Finding] = doctor.examine()
    by_name = {f.name: f for f in findings}
    assert "no such thing here" in by_name["broken"].said
    assert "python" in by_name


@pytest.mark.parametrize(("set_up", "expected"), [(False, "ready; slow here: "), (True, "not ready: packages")])
def test_it_needs_nothing_but_python(set_up: bool, expected: str, tmp_path: Path) -> None:
    """`-S -I` leaves out every installed package: what a fresh clone has, and what one has whose environment is broken."""
    (tmp_path / "ml_engineer_track").mkdir()
    (tmp_path / "ml_engineer_track" / "base_model").symlink_to(doctor.ROOT / "ml_engineer_track" / "base_model")
    for name in ("shared", "torch.txt", "constraints.txt", "pyproject.toml"):
        (tmp_path / name).symlink_to(doctor.ROOT / name)
    if set_up:
        (tmp_path / ".venv").mkdir()
    code = (
        f"import sys; sys.path.insert(0, {str(doctor.ROOT)!r}); from pathlib import Path; from shared import doctor; "
        f"doctor.ROOT = Path({str(tmp_path)!r}); sys.exit(doctor.main())"
    )
    done = subprocess.run([sys.executable, "-S", "-I", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == int(set_up), done.stdout + done.stderr
    assert "make setup" in done.stdout
    assert done.stdout.splitlines()[-1].startswith(expected)
