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


def test_missing_packages_are_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_installed", lambda name: "" if name in ("torch", "peft") else "1.0")
    found = doctor.packages()
    assert (found.state, found.essential) == ("missing", True)
    assert found.said.startswith("torch, peft: run `make setup`")


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


def test_it_needs_nothing_but_python() -> None:
    """`-S -I` leaves out every installed package: what a fresh clone has."""
    code = f"import sys; sys.path.insert(0, {str(doctor.ROOT)!r}); from shared import doctor; sys.exit(doctor.main())"
    done = subprocess.run([sys.executable, "-S", "-I", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "run `make setup`" in done.stdout
    assert done.stdout.splitlines()[-1] == "not ready: packages"
