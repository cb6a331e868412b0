"""The commands: what they are called, and that a mistake is one line and exit status 2."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ai_engineer_track.__main__ import main

COMMANDS = ("run", "serve", "ingest", "search", "measure", "calibrate")


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ai_engineer_track", *arguments], capture_output=True, text=True, check=False, timeout=120
    )


def test_help_lists_every_command_with_a_word_about_it() -> None:
    done = command("--help")
    assert done.returncode == 0
    for name in COMMANDS:
        line = next(line for line in done.stdout.splitlines() if f" {name} " in line)
        assert len(line.split()) > 4


@pytest.mark.parametrize("arguments", [["fly"], ["search"], ["run", "--wings", "2"], ["search", "x", "--k", "many"]])
def test_a_command_that_cannot_be_is_one_line(arguments: list[str]) -> None:
    done = command(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_a_users_mistake_is_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """No model, no index, and no data to make one of."""
    monkeypatch.setattr(sys, "argv", ["ai_engineer_track", name, *(["a message"] if name == "search" else [])])
    for variable in ("ARTIFACTS", "DATASETS"):
        monkeypatch.setenv(variable, str(tmp_path / variable.lower()))
    monkeypatch.delenv("LLM_BASE_URL", raising=False)
    monkeypatch.setenv("PORT", "0")
    assert main() == 2
    said = capfd.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert "Traceback" not in said


def test_a_setting_that_cannot_be_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["ai_engineer_track", "measure"])
    monkeypatch.setenv("LLM_BASE_URL", "ftp://models.example")
    assert main() == 2
    assert "http://" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_being_stopped_leaves_through_every_finally(sent: signal.Signals, status: int) -> None:
    """The inference server is stopped in a `finally`; `kill` and Ctrl-C must both come through it."""
    code = (
        "import sys, time\nfrom ai_engineer_track import __main__ as m\n"
        "@m.app.command()\ndef nap():\n    try:\n        print('begun', flush=True); time.sleep(60)\n"
        "    finally:\n        print('tidied', flush=True)\n"
        "sys.argv = ['ai_engineer_track', 'nap']\nsys.exit(m.main())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # What a shell starts in the background ignores SIGINT, and so would all it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout
    assert process.stdout.readline() == "begun\n"
    process.send_signal(sent)
    out, err = process.communicate(timeout=30)
    assert out == "tidied\n"
    assert process.returncode == status
    assert "Traceback" not in err
