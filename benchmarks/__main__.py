"""Measure your own hardware: `python -m benchmarks COMMAND`. What each figure means stands in benchmarks/README.md.

The last line a measuring command prints is one JSON document.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from shared.commandline import STOPPED, run_app
from shared.errors import UserError

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)
Model = Annotated[str, typer.Option(help="model folder or hub id (default: every published variant, else the bundled model)")]


@app.command()
def run(
    suite: Annotated[str, typer.Option(help="comma-separated; default: all that fit the budget")] = "",
    budget: Annotated[str, typer.Option(help="wall-clock time, such as 90s, 5m, 1h30m; default: no limit")] = "",
    model: Model = "",
    url: Annotated[str, typer.Option(help="serving: measure this OpenAI-compatible server, http://host:port/v1")] = "",
    served_model: Annotated[str, typer.Option(help="serving: model name to ask for (default: the first listed)")] = "",
    goodput: Annotated[str, typer.Option(help="serving: the SLO in ms, vLLM's syntax")] = "ttft:1000,tpot:100",
    device: Annotated[str, typer.Option(help="cpu or cuda (default: the GPU when there is one)")] = "",
    out: Annotated[Path | None, typer.Option(help="result file (default: artifacts/benchmarks/<time>.json)")] = None,
) -> None:
    """Measure this machine."""
    use_device(device)
    from benchmarks import runner
    from benchmarks.budget import parse_duration
    from benchmarks.serving import parse_slo

    runner.need_device(device)
    request = runner.Request(
        suites=_words(suite), budget=parse_duration(budget) if budget else None, model=model or None, url=url or None,
        served_model=served_model or None, slo=parse_slo(_words(goodput)), out=out,
    )  # fmt: skip
    result, path = runner.run(request)
    print(f"results: {path}")
    print(json.dumps(runner.summary(result, path)))
    if result.status == "interrupted":
        raise typer.Exit(STOPPED)


@app.command()
def report(
    result: Annotated[Path | None, typer.Argument(help="result file (default: the latest run)")] = None,
    into: Annotated[Path | None, typer.Option(help="folder (default: artifacts/reports)")] = None,
) -> None:
    """Write one HTML page and one Markdown table of a run."""
    from benchmarks import report as r

    page, table = r.write(result, into)
    print(f"report: {page}\ntable:  {table}")


@app.command()
def compare(
    a: Annotated[str, typer.Argument(help="result file or commit")],
    b: Annotated[str, typer.Argument(help="result file or commit")],
    threshold: Annotated[float, typer.Option(help="changes smaller than this never count")] = 0.05,
) -> None:
    """Is B better or worse than A? Exit status 1 when a figure got worse, 2 when the runs are not comparable."""
    from benchmarks import compare as c

    found = c.compare(c.find(a), c.find(b), threshold)
    c.print_comparison(found)
    print(json.dumps([x.model_dump() for x in found]))
    if any(x.verdict == "worse" for x in found):
        raise typer.Exit(1)


@app.command()
def fit(
    model: Annotated[str, typer.Option(help="model folder, config.json or hub id")],
    method: Annotated[str, typer.Option(help="lora, qlora or full")] = "lora",
    context: Annotated[int, typer.Option(help="tokens a row")] = 2048,
    batch: Annotated[int, typer.Option(help="rows in training, sequences in serving")] = 1,
    reply_tokens: Annotated[int, typer.Option(help="tokens of a row that get logits in training (0: all)")] = 0,
    rank: Annotated[int, typer.Option(help="LoRA rank")] = 16,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32")] = "bfloat16",
    check: Annotated[bool, typer.Option(help="also measure the peak of a real step on this machine")] = False,
) -> None:
    """Will it fit? Predicted memory of training and serving, by component, for a list of GPUs."""
    from benchmarks import fit as f
    from ml_engineer_track.accounting import Plan

    for name, value, known in (("--method", method, f.METHODS), ("--dtype", dtype, ("bfloat16", "float16", "float32"))):
        if value not in known:
            raise UserError(f"unknown value {value!r}", name, f"Use one of: {', '.join(known)}")
    chosen = next(m for m in f.METHODS if m == method)
    found = f.fit(Plan(f.local_config(model), chosen, context, batch, reply_tokens, rank, dtype), check)
    f.print_fit(found)
    print(json.dumps(found))


@app.command()
def limits(device: Annotated[str, typer.Option(help="cpu or cuda (default: the GPU when there is one)")] = "") -> None:
    """Memory bandwidth and matrix-product peak of this device."""
    use_device(device)
    from benchmarks import limits as li
    from benchmarks import results, runner
    from benchmarks.budget import Task

    runner.need_device(device)
    environment = results.environment()
    runner.warn_if_busy(environment)
    for record in li.measure(Task("limits", {}, 60)):
        print(f"memory bandwidth: {(record.metrics['memory_bandwidth'] or 0) / 1e9:.1f} GB/s")
        print(f"matmul peak:      {(record.metrics['matmul_peak'] or 0) / 1e9:.1f} GFLOP/s in {record.case['dtype']}")
        print(json.dumps({"environment": environment, **record.model_dump(include={"case", "metrics", "samples"})}))


@app.command()
def peers(
    only: Annotated[str, typer.Option(help="comma-separated names (default: all)")] = "",
    install: Annotated[bool, typer.Option(help="make the environments that are missing")] = False,
    model: Model = "",
    out: Annotated[Path | None, typer.Option(help="result file (default: artifacts/benchmarks/<time>.json)")] = None,
) -> None:
    """Measure other projects' engines and trainers on the same model, each in an environment of its own."""
    from benchmarks import peers as p
    from benchmarks import runner

    result, path = p.run(_words(only), install, model or None, out)
    print(f"results: {path}")
    print(json.dumps(runner.summary(result, path)))


@app.command()
def steady(seconds: Annotated[float, typer.Option(min=1, help="each rate is held for as long")] = 45.0) -> None:
    """How many people a second the service can take, and what it does beyond that. Needs `make ml` and `make ai`."""
    from benchmarks import steady as s
    from shared.settings import load_settings

    settings = load_settings("tiny")
    s.show(s.steady(settings, seconds), settings.artifacts / "reports")


@app.command()
def soak(
    minutes: Annotated[float, typer.Option(min=0.1)] = 60.0,
    rate: Annotated[float, typer.Option(min=0.01, help="messages a second")] = 0.5,
) -> None:
    """People arrive for an hour: do memory and open files stay flat? Needs `make ml` and `make ai`."""
    from benchmarks import soak as s
    from shared.settings import load_settings

    settings = load_settings("tiny")
    s.show(s.soak(settings, minutes, rate), settings.artifacts / "reports")


@app.command()
def faults(only: Annotated[str, typer.Option(help="comma-separated faults (default: all)")] = "") -> None:
    """Break one thing after another while twenty people talk to the service. Needs `make ml` and `make ai`."""
    from benchmarks import faults as f
    from shared.settings import load_settings

    settings = load_settings("tiny")
    f.show(f.faults(settings, _words(only)), settings.artifacts / "reports")


@app.command()
def scaling(
    workers: Annotated[int, typer.Option(help="processes that share a step's rows")] = 2,
    steps: Annotated[int, typer.Option(min=5, help="measured steps of each group")] = 40,
    out: Annotated[Path | None, typer.Option(help="result file (default: artifacts/benchmarks/<time>-scaling.json)")] = None,
) -> None:
    """Fine-tuning by one worker and by several on this machine, and what the interconnect model makes of it."""
    from benchmarks import runner
    from benchmarks import scaling as s

    result, path = s.run(workers, steps, out)
    print(s.measured_table(result))
    print(f"results: {path}")
    print(json.dumps(runner.summary(result, path)))


@app.command()
def replicas(
    side: Annotated[str, typer.Option(help="inference, service or both, comma-separated (default: both)")] = "",
    replicas: Annotated[int, typer.Option(min=1, help="how many of each")] = 2,
    out: Annotated[Path | None, typer.Option(help="result file (default: artifacts/benchmarks/<time>-replicas.json)")] = None,
) -> None:
    """Kill one of several replicas under load, then replace them all by a new version: what do people notice?"""
    from benchmarks import replicas as r
    from benchmarks import runner

    result, path = r.run(_words(side), replicas, out)
    print(f"results: {path}")
    print(json.dumps(runner.summary(result, path)))


def use_device(device: str) -> None:
    """Must happen before torch is imported: hides the GPUs when the CPU is asked for."""
    if device not in ("", "cpu", "cuda"):
        raise UserError(f"unknown device {device!r}", "--device", "Use cpu or cuda")
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@app.command()
def readme(
    log: Annotated[Path | None, typer.Option(help="what `make demo` printed: take this run over first")] = None,
    take: Annotated[str, typer.Option(help="reports of studies to take over first, such as low_bits.json")] = "",
    reports: Annotated[Path, typer.Option(help="folder of its reports")] = Path("artifacts/reports"),
) -> None:
    """Fill the figures of the pages from the committed results."""
    from benchmarks import readme as r

    if log:
        r.take_over(reports, log)
    r.take_study(reports, _words(take))
    r.write()
    print(f"filled: {', '.join(r.PAGES)}")


def _words(text: str) -> list[str]:
    return [word for word in text.replace(",", " ").split() if word]


def stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Run a command; see `run_app` for how it ends."""
    # A run that is ended (by a CI's time limit, say) keeps its records and stops its servers, as with Ctrl-C.
    signal.signal(signal.SIGTERM, stop)
    return run_app(app)


if __name__ == "__main__":
    sys.exit(main())
