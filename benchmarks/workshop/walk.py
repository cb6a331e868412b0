"""Follows WORKSHOP.md from the top as a participant would, and measures how long the machine takes for every exercise.

Why: a page that nobody followed is wrong somewhere. The page is the only source: in every exercise the commands outside its
solution are run first, then `make check` must say "not yet", then the solution's commands, and then it must pass.

    python -m benchmarks.workshop walk --out benchmarks/results/demo/workshop.json      (on a machine that does nothing else)

All of it happens in a copy of this tree, so nothing of yours is touched and everything starts from nothing.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ai_engineer_track.inference import free_port
from benchmarks.workshop.place import artifacts
from shared.errors import UserError
from shared.files import write_json
from shared.hardware import busy, fingerprint
from shared.settings import OVERRIDES, ROOT

PAGE = ROOT / "WORKSHOP.md"
#: what a shell must do before a block of the page: `make` without setup, and nothing left running behind it
PRELUDE = (
    "set -eo pipefail\n"
    'make() { command make -o setup -o .venv/installed "$@"; }\n'
    "trap 'jobs -p | xargs -r kill 2>/dev/null; wait' EXIT\n"
)
BASH = re.compile(r"```bash\n(.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Part:
    """An exercise, or (number 0) what stands before the first: its title, its commands, those of its solution."""

    number: int
    title: str
    commands: str
    solution: str


def parts(page: str) -> list[Part]:
    """What the page has a shell do, in order."""
    found = []
    before, *exercises = re.split(r"^### Exercise (\d+)[:.] ", page, flags=re.MULTILINE)
    found.append(Part(0, "before you start", "\n".join(BASH.findall(before)), ""))
    for number, text in zip(exercises[::2], exercises[1::2], strict=True):
        title, text = text.split("\n", 1)
        outside, _, rest = text.partition("<details>")
        inside = rest.partition("</details>")[0]
        found.append(Part(int(number), title.strip(), "\n".join(BASH.findall(outside)), "\n".join(BASH.findall(inside))))
    return found


def walk(only: Sequence[int], out: Path | None) -> dict[str, Any]:
    """Every exercise (or `only` these, after what stands before them); seconds of commands and of solutions, kept in `out`.

    UserError at the first command that fails, or check that says the wrong thing.
    """
    load = busy()
    told: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="workshop-") as folder:
        tree = copy_of_tree(Path(folder) / "tree")
        environment = own_environment(tree)
        for part in parts(PAGE.read_text(encoding="utf-8")):
            if part.number and only and part.number not in only:
                continue
            name = f"exercise {part.number}" if part.number else part.title
            commands = run(part.commands, tree, environment, name)
            solution = 0.0
            if part.number:
                expect(part.number, 1, tree, environment)
                solution = run(part.solution, tree, environment, f"{name}, solution")
                expect(part.number, 0, tree, environment)
            told.append({"exercise": part.number, "title": part.title, "commands_s": commands, "solution_s": solution})
            print(f"{name}: {part.title} ({commands:.0f} s, solution {solution:.0f} s)", flush=True)
    times = {"hardware": fingerprint(), "busy_share": load, "exercises": told}
    write_json(out or artifacts() / "workshop-times.json", times)
    return times


def run(script: str, tree: Path, environment: dict[str, str], name: str) -> float:
    """Seconds that a block took. UserError with its last lines when a command fails."""
    began = time.perf_counter()
    with tempfile.TemporaryFile(
        "w+", encoding="utf-8", errors="replace"
    ) as output:  # a pipe would wait for whoever keeps it open
        shell = subprocess.Popen(
            ["bash", "-c", PRELUDE + script],
            cwd=tree, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            status = shell.wait()
        finally:  # also after Ctrl-C: nothing that the page started outlives its block
            with suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGTERM)
        output.seek(0)
        said = output.read().strip().splitlines()
    if status:
        raise UserError(f"{name} failed with status {status}", "WORKSHOP.md", " | ".join(said[-12:]))
    return time.perf_counter() - began


def expect(exercise: int, status: int, tree: Path, environment: dict[str, str]) -> None:
    """UserError unless the exercise's check ends with this status."""
    command = [sys.executable, "-m", "benchmarks.workshop", "check", str(exercise)]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != status:
        said = (done.stdout + done.stderr).strip()[-1500:]
        raise UserError(f"the check of exercise {exercise} ended with {done.returncode}, not {status}", "WORKSHOP.md", said)


def copy_of_tree(target: Path) -> Path:
    """What a clone would have, with this environment as its `.venv`. Times of files stay, so that nothing is installed anew."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in listed:
        if (ROOT / name).is_file() and not (ROOT / name).is_symlink():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    (target / ".venv").symlink_to(Path(sys.prefix))
    return target


def own_environment(tree: Path) -> dict[str, str]:
    """A shell without settings of ours, without the hub, and with a port of its own for the service."""
    ours = {*OVERRIDES, "PRESET", "CORPUS", "LLM_BASE_URL", "LLM_MODEL", "MAKEFLAGS", "MFLAGS", "MAKELEVEL"}
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    port = str(free_port())
    path = f"{tree / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    more = {"PATH": path, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1", "PORT": port, "SERVICE": f"http://127.0.0.1:{port}"}
    return {**kept, **more}
