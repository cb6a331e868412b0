"""Commands of the workshop: `python -m benchmarks.workshop COMMAND`. The exercises stand in WORKSHOP.md.

make workshop                       lay out the scratch files in artifacts/workshop/
make check EX=3                     is exercise 3 done? Exit status 0 or 1, with a hint
make check EX=3 ANSWER=0.42         the same, with the answer to its question
make answer EX=3                    the answer, computed from your own figures
python -m benchmarks.workshop walk  follow WORKSHOP.md in a copy of this tree, solutions included, and measure every exercise
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.workshop.place import Expected, NotYet, lay_out, place, read_json
from shared.commandline import run_app
from shared.errors import UserError
from shared.files import write_json

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)
Number = Annotated[int, typer.Argument(min=1, max=12, help="number of the exercise")]


@app.command()
def start() -> None:
    """Copy the scratch files; what is there already stays as it is."""
    made = lay_out()
    print(f"{place()}: {', '.join(made) if made else 'everything was there already'}")


@app.command()
def check(exercise: Number, answer: Annotated[str, typer.Option(help="your answer to the exercise's question")] = "") -> None:
    """Is the exercise done? Exit status 0 when it is, 1 when it is not yet."""
    if answer:
        keep_answer(exercise, answer)
    try:
        expected = expected_answer(exercise)
        given = answers().get(str(exercise))
        if given is None:
            raise NotYet(f"Your run is right. Now answer the question: `make check EX={exercise} ANSWER=...`")
        if not expected.fits(given):
            raise NotYet(f"The answer {given!r} does not follow from your figures. {expected.how}")
    except NotYet as hint:
        print(f"exercise {exercise}: not yet. {hint}")
        raise typer.Exit(1) from None
    print(f"exercise {exercise}: pass. {expected.how} Here that is {expected}.")


@app.command()
def answer(exercise: Number) -> None:
    """The answer to the exercise's question, from your own figures."""
    try:
        print(expected_answer(exercise))
    except NotYet as hint:
        raise UserError(f"exercise {exercise} has no figures yet", "", str(hint)) from None


@app.command()
def walk(
    only: Annotated[str, typer.Option(help="comma-separated numbers of exercises; default: all")] = "",
    out: Annotated[Path | None, typer.Option(help="where the times go (default: artifacts/workshop-times.json)")] = None,
) -> None:
    """Follow the page from the top as a participant would. The last line printed is one JSON document."""
    from benchmarks.workshop import walk as w

    times = w.walk([int(n) for n in only.replace(",", " ").split()], out)
    print(json.dumps(times))


def expected_answer(exercise: int) -> Expected:
    """NotYet when the exercise's work is not done."""
    from benchmarks.workshop.ai_checks import AI_CHECKS
    from benchmarks.workshop.ml_checks import ML_CHECKS

    return {**ML_CHECKS, **AI_CHECKS}[exercise]()


def answers() -> dict[str, str]:
    path = place() / "answers.json"
    return dict(read_json(path, "")) if path.exists() else {}


def keep_answer(exercise: int, text: str) -> None:
    write_json(place() / "answers.json", {**answers(), str(exercise): text})


def main() -> int:
    """Run a command; see `run_app` for how it ends. A walk that is ended stops what it started, as with Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return run_app(app)


if __name__ == "__main__":
    sys.exit(main())
