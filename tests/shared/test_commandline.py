"""Every end a command can come to: its exit status, and one line for what a person can put right."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest
import typer

from shared.commandline import STOPPED, run_app
from shared.errors import UserError


def app_that(does: Callable[[], None], monkeypatch: pytest.MonkeyPatch, *words: str) -> typer.Typer:
    app = typer.Typer()
    app.command()(does)
    monkeypatch.setattr("sys.argv", ["program", *words])
    return app


def raising(error: BaseException) -> Callable[[], None]:
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("no such file", "here", "Make one"), 2, "error: no such file in here. Make one"),
        (OSError(errno.ENOSPC, "No space left", "model.bin"), 2, "error: the disk is full while writing model.bin"),
        (RuntimeError("CUDA error: device lost\nmore"), 2, "error: the GPU stopped answering (CUDA error: device lost)"),
        (KeyboardInterrupt(), STOPPED, "stopped"),
        (typer.Exit(STOPPED), STOPPED, "stopped"),
        (typer.Exit(1), 1, ""),
        (typer.Exit(0), 0, ""),
    ],
)
def test_a_command_ends_with_its_status_and_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, status: int, line: str
) -> None:
    assert run_app(app_that(raising(error), monkeypatch)) == status
    said = capsys.readouterr().err.strip()
    assert said.startswith(line)
    assert "\n" not in said
    assert "Traceback" not in said


def test_a_word_that_is_no_option_is_a_mistake_of_the_user(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_app(app_that(lambda: None, monkeypatch, "--nope")) == 2
    assert "--nope" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("ours"), OSError(errno.EACCES, "no"), RuntimeError("ours")])
def test_a_bug_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    with pytest.raises(type(error)):
        run_app(app_that(raising(error), monkeypatch))


def test_a_command_that_ends_well_gives_0(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_app(app_that(lambda: None, monkeypatch)) == 0
