"""Commands of the AI track: `python -m ai_engineer_track <command>`. Without settings of yours they use the preset `tiny`."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from ai_engineer_track.settings import AiSettings, load_ai_settings
from shared.commandline import run_app
from shared.errors import UserError
from shared.logs import setup_logs

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)
Preset = Annotated[str | None, typer.Option(help="tiny or smoke (default: PRESET, else tiny)")]


@app.command()
def run(preset: Preset = None) -> None:
    """The whole track: verify and serve the model, index, talk, measure, report (make ai)."""
    from ai_engineer_track.pipeline import run as run_all

    run_all(_settings(preset))


@app.command()
def serve(
    preset: Preset = None,
    unsupervised: Annotated[bool, typer.Option("--unsupervised", help="for systemd and the like: not started again")] = False,
) -> None:
    """The service with its web page, until Ctrl-C (make serve). It is started again when it dies."""
    import uvicorn

    from ai_engineer_track.api.main import create_app
    from ai_engineer_track.inference import Servers, need_port
    from ai_engineer_track.ingest import ingest as bring_up_to_date
    from ai_engineer_track.supervise import supervise
    from shared.level_memory import keep_memory_level

    settings = _settings(preset)
    need_port(settings.api.host, settings.api.port)
    if not unsupervised:
        chosen = ["--preset", preset] if preset else []
        raise typer.Exit(supervise([sys.executable, "-m", "ai_engineer_track", "serve", "--unsupervised", *chosen]))
    keep_memory_level()
    setup_logs(settings.artifacts / "logs" / "service.jsonl")
    with Servers(settings) as servers:
        bundled = None if settings.llm.base_url else servers  # somebody else's server is not ours to follow
        if bundled:
            bundled.current()
        bring_up_to_date(settings)
        print(f"open http://{settings.api.host}:{settings.api.port}  (Ctrl-C ends it)", flush=True)
        app = create_app(settings, servers=bundled)
        uvicorn.run(app, host=settings.api.host, port=settings.api.port, log_level="warning", server_header=False)


@app.command(name="serve-ray")
def serve_ray(
    preset: Preset = None,
    replicas: Annotated[int, typer.Option(min=1, help="how many services; with --max-replicas, how many at least")] = 2,
    max_replicas: Annotated[int | None, typer.Option(min=1, help="as many when the load asks for it")] = None,
) -> None:
    """The service in several replicas, replaced one by one when the index has changed. Needs the extra [ray]."""
    from ai_engineer_track.api.ray_serve import serve_ray as run_replicas

    run_replicas(_settings(preset), replicas, max_replicas)


@app.command()
def ingest(preset: Preset = None) -> None:
    """Bring the index up to date with the corpus (CORPUS=folder for another one)."""
    from ai_engineer_track.ingest import ingest as bring_up_to_date

    report = bring_up_to_date(_settings(preset))
    print(
        f"{report.passages} passages as {report.version}: {report.added} new, {report.removed} gone, "
        f"{report.unchanged} unchanged ({report.seconds:.1f} s)"
    )
    for path, reason in report.skipped:
        print(f"  skipped {path}: {reason}")


@app.command()
def search(message: str, preset: Preset = None, k: int = 5) -> None:
    """The passages that are found for a message."""
    from ai_engineer_track.ingest import open_index
    from ai_engineer_track.retrieve import Retriever

    settings = _settings(preset)
    index = open_index(settings)
    for hit in Retriever(index, settings).search(message, k):
        print(f"{hit.score:8.3f}  {hit.passage.heading}\n          {hit.passage.sentences[0].text}")
    index.close()


@app.command()
def measure(preset: Preset = None) -> None:
    """Figures of every part alone, on the test split."""
    from rich.console import Console
    from rich.table import Table

    from ai_engineer_track.inference import inference_server
    from ai_engineer_track.measure import measure_parts
    from ai_engineer_track.report import leaves

    with inference_server(_settings(preset)) as served:
        figures = asyncio.run(measure_parts(served))
    shown = Table("figure", "value [95 % interval]", "rows")
    for path, cells in leaves(figures):
        shown.add_row(" / ".join(path), *cells)
    Console(width=130).print(shown)


@app.command()
def people(
    url: Annotated[str, typer.Option(help="address of the running service")],
    questions: Annotated[Path, typer.Option(help="rows of questions.jsonl to be asked")],
    out: Annotated[Path, typer.Option(help="where to write what came of each")],
) -> None:
    """Simulated people ask a running service these questions, and give a thumb for every answer."""
    from ai_engineer_track.people import ask_all
    from shared import library as lib

    rows, bad = lib.read_rows(questions.parent, questions.name, lib.Question)
    if bad:
        raise UserError(f"line {bad[0].line} is no question ({bad[0].reason})", str(questions), "Correct the file")
    asked = ask_all(url, rows, out)
    print(f"{len(asked)} questions, {sum(one.right for one in asked)} answered with a sentence that answers them")


@app.command()
def calibrate(preset: Preset = None) -> None:
    """Compare the judge with labels; only then does its verdict count while people are answered."""
    from ai_engineer_track import judge
    from ai_engineer_track.inference import inference_server
    from ai_engineer_track.llm import Llm
    from shared import library as lib

    with inference_server(_settings(preset)) as served:
        labels = lib.read_rows(served.datasets, "judge_labels.jsonl", lib.JudgeLabel)[0]
        chosen = [label for label in labels if label.split == "validation"]  # the test labels are for the report
        library = lib.load_library(served.datasets)
        found = asyncio.run(judge.calibrate(Llm(served.judge_llm), chosen, library, served.evaluate.bootstrap, served.seed))
    print("\n".join(found.lines()))
    print(f"saved as {judge.save_calibration(found, served.artifacts)}")


@app.command()
def attack(preset: Preset = None) -> None:
    """Injections and jailbreaks against the running service: what got through (SECURITY.md says what is promised)."""
    from ai_engineer_track import attack as suite
    from ai_engineer_track.inference import inference_server

    with inference_server(_settings(preset)) as served:
        found = suite.attack(served, suite.read_attacks())
    page = suite.write(found, served.artifacts / "reports")
    for name, row in found["by_category"].items():
        print(f"{row['hits']:4d} of {row['n']}  {name}")
    print(f"report: {page}")


def _settings(preset: str | None) -> AiSettings:
    return load_ai_settings(preset).with_its_data()


def main() -> int:
    """Run a command; see `run_app` for how it ends."""
    signal.signal(signal.SIGTERM, _ended)
    return run_app(app)


def _ended(number: int, _: object) -> None:
    """Leaves through every `finally`, so that `kill` leaves no inference server behind."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
