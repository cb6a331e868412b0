"""Commands of the ML track: `python -m ml_engineer_track STAGE`. Each is one function of one file.

A stage that needs an earlier one takes that one's last result and says so when there is none.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from shared.commandline import run_app
from shared.errors import UserError
from shared.settings import BASE_MODEL, load_settings

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)
Preset = Annotated[str | None, typer.Option(help="a file of ml_engineer_track/presets (default: PRESET, else tiny)")]
Model = Annotated[str | None, typer.Option(help="hub id or folder of a causal LM (default: MODEL, else the preset's)")]
Method = Annotated[str | None, typer.Option(help="lora or qlora (default: METHOD, else the preset's)")]


@app.command()
def run(preset: Preset = None, model: Model = None, method: Method = None) -> None:
    """All stages: train-ranker, curate, finetune, quantize, evaluate, benchmark, publish, report."""
    from ml_engineer_track import pipeline

    pipeline.run(load_settings(preset, model=model, method=method))


@app.command()
def curate(preset: Preset = None, model: Model = None) -> None:
    """Check and clean the data sets and lay out training rows."""
    from ml_engineer_track import pipeline as p

    with p.locked_stages(load_settings(preset, model=model)) as stages:
        print(json.dumps(asdict(p.curate_stage(stages, p.train_ranker_stage(stages))), indent=2, default=str))


@app.command(name="curate-corpus")
def curate_corpus(
    shards: Annotated[Path, typer.Argument(help="folder of *.jsonl files with rows as in datasets/questions.jsonl")],
    into: Annotated[Path, typer.Option(help="folder for the rows that stay and the quarantine")],
    preset: Preset = None,
) -> None:
    """Drop malformed and repeated questions from a corpus larger than memory, by Ray Data. Needs the extra [ray]."""
    from ml_engineer_track import curate_ray as c

    done = c.curate_corpus(shards, into, load_settings(preset).curate.near_duplicate)
    print(json.dumps(asdict(done), default=str))


@app.command()
def finetune(preset: Preset = None, model: Model = None, method: Method = None) -> None:
    """Train a LoRA adapter on the curated rows."""
    from ml_engineer_track import pipeline as p

    with p.locked_stages(load_settings(preset, model=model, method=method)) as stages:
        tuned = p.finetune_stage(stages, p.curate_stage(stages, p.train_ranker_stage(stages)))
    print(f"adapter: {tuned.adapter}")


@app.command()
def quantize(preset: Preset = None, model: Model = None, method: Method = None) -> None:
    """Merge the adapter and store the model in fewer bits."""
    from ml_engineer_track import pipeline as p

    with p.locked_stages(load_settings(preset, model=model, method=method)) as stages:
        variants = p.quantize_stage(stages, p.finetune_stage(stages, p.curate_stage(stages, p.train_ranker_stage(stages))))
    print(json.dumps(variants.folders, indent=2))


@app.command(name="low-bits")
def low_bits(
    preset: Preset = None,
    model: Model = None,
    bits: Annotated[str, typer.Option(help="2, 3, 4 or mixed: the model that is repaired, too")] = "2",
    path: Annotated[str | None, typer.Option(help="a version or model folder (default: the current version)")] = None,
) -> None:
    """Hold the tuned model in 4, 3, 2 and mixed bits, repair one of these, and show quality against size."""
    from ml_engineer_track import low_bits_pipeline as b

    b.run(load_settings(preset, model=model), bits, path)


@app.command()
def distill(
    preset: Preset = None,
    model: Model = None,
    teacher: Annotated[
        str | None, typer.Option(help="a version, a model folder or a hub id (default: the current version)")
    ] = None,
    student: Annotated[str, typer.Option(help="sliced (cut out of the teacher), or a folder or hub id to start from")] = "sliced",
    no_teacher: Annotated[
        bool, typer.Option("--no-teacher", help="only the same student on the task alone: measured, not published")
    ] = False,
) -> None:
    """Train a student of at most a third of the size, measure it beside its teacher, publish it as a variant."""
    from ml_engineer_track import distill_pipeline as d

    d.run(load_settings(preset, model=model), teacher, student, taught=not no_teacher)


@app.command()
def tune(
    preset: Preset = None,
    model: Model = None,
    method: Method = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="finished trials the study shall hold (default: the preset's)")
    ] = None,
    minutes: Annotated[float | None, typer.Option(min=0, help="begin no trial after as many minutes")] = None,
) -> None:
    """Search LoRA rank, alpha, target modules and learning rate by short fine-tunings. Needs the extra [tune]."""
    from ml_engineer_track import pipeline as p
    from ml_engineer_track import tune as t
    from ml_engineer_track import tune_report
    from ml_engineer_track.accounting import fit_to_vram

    t.need_optuna()
    with p.locked_stages(load_settings(preset, model=model, method=method)) as stages:
        data = p.curate_stage(stages, p.train_ranker_stage(stages))
        search = t.open_study(fit_to_vram(stages.settings, data), data)
        try:
            t.tune(search, trials, minutes)
        finally:  # what is finished counts, also after Ctrl-C
            tune_report.write(search)


@app.command()
def accounting(preset: Preset = None, model: Model = None, method: Method = None) -> None:
    """Memory and FLOPs of one training step, predicted and measured, and what fits VRAM_GB."""
    from ml_engineer_track import accounting_report
    from ml_engineer_track import pipeline as p

    with p.locked_stages(load_settings(preset, model=model, method=method)) as stages:
        accounting_report.account(stages.settings, p.curate_stage(stages, p.train_ranker_stage(stages)))


@app.command()
def evaluate(preset: Preset = None, path: Annotated[str, typer.Option(help="model folder or hub id")] = "") -> None:
    """Score any model on the test split (default: the preset's base model)."""
    from ml_engineer_track import evaluate as e
    from ml_engineer_track import pipeline as p
    from ml_engineer_track.gguf_export import FILE_NAME
    from ml_engineer_track.models import check_model_path, load_model, load_tokenizer
    from ml_engineer_track.serving.catalog import choose_engine

    settings = load_settings(preset)
    path = path or settings.model_path
    served = (Path(path) / FILE_NAME).exists()
    choose_engine(Path(path), "openvino") if served else check_model_path(path)
    with p.locked_stages(settings) as stages:
        data = p.curate_stage(stages, p.train_ranker_stage(stages))
    if served:
        scores = e.evaluate_served(settings, data, Path(path), path)
    else:
        scores = e.evaluate(settings, data, load_model(path), load_tokenizer(path), path)
    print(json.dumps({key: figure.model_dump() for key, figure in scores.figures.items()}, indent=2))


@app.command(name="evaluate-base")
def evaluate_base(
    corpus: Annotated[Path, typer.Option(help="folder with pretrain/ and tasks/")],
    path: Annotated[Path, typer.Option(help="model folder")] = BASE_MODEL,
) -> None:
    """Measure the base model's language and reading on held-out documents and write its card."""
    from ml_engineer_track import evaluate_base as e

    figures = e.evaluate_base(corpus, path)
    print(json.dumps({key: figures[key] for key in ("language", "reading")}, indent=2))


@app.command()
def benchmark(preset: Preset = None, path: Annotated[str, typer.Option(help="model folder or hub id")] = "") -> None:
    """Measure latency and memory of any model (default: the preset's base model)."""
    from ml_engineer_track import benchmark as b
    from ml_engineer_track.models import check_model_path

    settings = load_settings(preset)
    path = path or settings.model_path
    check_model_path(path)
    print(json.dumps(b.benchmark(settings, {path: path}), indent=2))


@app.command(name="train-ranker")
def train_ranker(preset: Preset = None) -> None:
    """Train the ranker that the product finds passages with."""
    from ml_engineer_track import pipeline as p

    with p.locked_stages(load_settings(preset)) as stages:
        ranker = p.train_ranker_stage(stages)
    print(json.dumps({"path": ranker.path, **{key: str(figure) for key, figure in ranker.figures.items()}}, indent=2))


@app.command()
def publish(preset: Preset = None, model: Model = None, method: Method = None) -> None:
    """Publish the model: the same as `run`, whose finished stages are skipped."""
    run(preset, model, method)


@app.command()
def results() -> None:
    """The results table of the last run as Markdown, as docs/results.md shows it."""
    from ml_engineer_track.report import markdown

    path = load_settings().artifacts / "reports" / "ml.json"
    if not path.exists():
        raise UserError("no report yet", str(path), "Run `make ml`")
    print(markdown(json.loads(path.read_text(encoding="utf-8"))))


@app.command()
def pretrain(
    corpus: Annotated[Path, typer.Option(help="folder with pretrain/ and tasks/")],
    edition: Annotated[str, typer.Option(help="cpu, gpu or test")] = "cpu",
    work: Annotated[Path | None, typer.Option(help="where checkpoints go (default: artifacts/pretrain/<edition>)")] = None,
    into: Annotated[Path, typer.Option(help="where the finished model goes")] = BASE_MODEL,
) -> None:
    """Make the base model from public text."""
    from ml_engineer_track import pretrain as p
    from ml_engineer_track.ship_base import ship

    if edition not in p.EDITIONS:
        raise UserError(f"unknown edition {edition!r}", "--edition", f"Use one of: {', '.join(p.EDITIONS)}")
    folder = work or load_settings("tiny").artifacts / "pretrain" / edition
    p.pretrain(corpus, p.EDITIONS[edition], folder)
    print(f"model: {ship(folder, into)}")


@app.command()
def drift(
    since: Annotated[str | None, typer.Option(help="date (and time, UTC) the current window begins (default: Monday)")] = None,
) -> None:
    """Is what people ask, and how well it is answered, still what it was in the four weeks before?"""
    import time
    from datetime import UTC, datetime

    from ml_engineer_track.lifecycle import drift as d

    try:
        begin = datetime.fromisoformat(since).replace(tzinfo=UTC).timestamp() if since else d.monday(time.time())
    except ValueError:
        raise UserError(f"{since!r} is no date", "--since", "Write it like 2026-11-23 or 2026-11-23T14:00") from None
    verdict = d.check(load_settings(), begin)
    print(verdict.sentence)
    for test in sorted(verdict.tests, key=lambda t: -t.evidence):
        print(f"  {test.evidence:12,.1f}  {test.says}")


@app.command(name="drift-study")
def drift_study() -> None:
    """How often the watch for drift cries wolf, and how soon it finds a change that was put there."""
    from ml_engineer_track.lifecycle import drift_study as s

    s.run(load_settings())


@app.command()
def kernels() -> None:
    """Our Triton kernels: right on this device? On a GPU also how fast, beside bitsandbytes and bf16."""
    from ml_engineer_track.kernels import benchmark as b
    from ml_engineer_track.kernels import report

    report.write(b.benchmark(), load_settings("tiny").artifacts / "reports")


@app.command()
def serve(
    model: Annotated[
        Path | None, typer.Option(help="a published version or a model folder (default: the current version)")
    ] = None,
    variant: Annotated[list[str] | None, typer.Option(help="again for several at once (default: the manifest's choice)")] = None,
    adapter: Annotated[list[str] | None, typer.Option(help="NAME=FOLDER: a LoRA adapter of the base model in --model")] = None,
    draft: Annotated[
        str | None, typer.Option(help="a variant or folder: a small model that proposes tokens (CPU engine)")
    ] = None,
    kernel: Annotated[
        str | None, typer.Option(help="triton: pack bf16 weights to 4 bits, multiply with our own kernel (GPU)")
    ] = None,
    engine: Annotated[str, typer.Option(help="auto, openvino, transformers or vllm")] = "auto",
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen on; 0 takes a free one")] = 8001,
    cache_mb: Annotated[int, typer.Option(min=1, help="key-value cache of each model, MiB")] = 512,
    max_running: Annotated[int, typer.Option(min=1, help="requests in a batch; the rest waits")] = 64,
    max_waiting: Annotated[int, typer.Option(min=0, help="requests in the queue; the rest gets 429")] = 512,
    with_parent: Annotated[bool, typer.Option("--with-parent", help="end when the standard input closes")] = False,
) -> None:
    """Serve a model over OpenAI's HTTP API."""
    from ml_engineer_track.serving import adapters
    from ml_engineer_track.serving.catalog import Limits
    from ml_engineer_track.serving.serve import end_with_parent
    from ml_engineer_track.serving.serve import serve as run_server
    from ml_engineer_track.serving.vllm import serve_with_vllm
    from shared.level_memory import keep_memory_level

    keep_memory_level()
    artifacts = load_settings("tiny").artifacts
    if with_parent:
        end_with_parent()
    loras = adapters.read(adapter or [])
    if draft and engine == "vllm":
        raise UserError("--draft works with the CPU engine, not with vllm", "--engine", "Leave one of them out")
    if kernel not in (None, "triton"):
        raise UserError(f"unknown kernel {kernel!r}", "--kernel", "There is: triton")
    if kernel and (loras or engine == "vllm"):
        other = "--adapter" if loras else "--engine vllm"
        raise UserError(f"--kernel does not work with {other}", "the command line", "Leave one of them out")
    if engine == "vllm":
        return serve_with_vllm(model, variant or [], loras, host, port, artifacts)
    if engine not in ("auto", "openvino", "transformers"):
        raise UserError(f"unknown engine {engine!r}", "--engine", "Use auto, openvino, transformers or vllm")
    limits = Limits(cache_mb, max_running, max_waiting)
    return run_server(model, variant or [], loras, engine, host, port, artifacts, limits, draft, kernel)  # type: ignore[arg-type]


@app.command()
def loop(
    preset: Annotated[str | None, typer.Option(help="a preset with a `loop:` group (default: PRESET, else loop)")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="look again and again, until it is stopped")] = False,
    demonstrate: Annotated[bool, typer.Option("--demonstrate", help="the two demonstrations, on data of their own")] = False,
) -> None:
    """From what the product got wrong to the next model, or a reason why not: one look, or what the options say."""
    from ml_engineer_track.lifecycle import loop as l
    from ml_engineer_track.lifecycle.demonstration import demonstrate as show

    settings = load_settings(preset or os.environ.get("PRESET") or "loop")
    l.loop_of(settings)
    if demonstrate:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves through every `finally`: the service ends, too
        show(settings)
    elif watch:
        l.watch(settings)
    else:
        with l.only_one(settings):
            l.look(settings)


@app.command()
def models(
    action: Annotated[str, typer.Argument(help="list, rollback, pin, unpin or gc")] = "list",
    version: Annotated[str | None, typer.Argument(help="for pin and unpin")] = None,
    keep: Annotated[int, typer.Option(min=0, help="for gc: versions nobody needs that are kept all the same")] = 2,
) -> None:
    """The versions that are there, their figures, who is current; back to the one before; what is kept."""
    from ml_engineer_track.lifecycle import registry as r
    from ml_engineer_track.lifecycle import tracking

    artifacts = load_settings("tiny").artifacts
    folder = artifacts / "models"
    if action == "list":
        r.show(r.versions(folder, artifacts / "feedback"))
    elif action == "rollback":
        restored = r.roll_back(folder)
        print(f"{restored} is current again", flush=True)
        tracking.went_back(artifacts, restored)
    elif action == "gc":
        removed = r.collect_garbage(folder, artifacts / "feedback", keep)
        print(f"removed: {', '.join(removed) or 'nothing'}")
    elif action in ("pin", "unpin"):
        if not version:
            raise UserError("which version?", f"models {action}", "Name one; `models` lists them")
        r.pin(folder, version, action == "pin")
        print(f"{version} is {'pinned' if action == 'pin' else 'no longer pinned'}")
    else:
        raise UserError(f"unknown action {action!r}", "models", "Use list, rollback, pin, unpin or gc")


@app.command(name="serve-ray")
def serve_ray(
    model: Annotated[
        Path | None, typer.Option(help="a published version or a model folder (default: the current version, followed)")
    ] = None,
    variant: Annotated[list[str] | None, typer.Option(help="again for several at once (default: the manifest's choice)")] = None,
    replicas: Annotated[int, typer.Option(min=1, help="how many servers; with --max-replicas, how many at least")] = 2,
    max_replicas: Annotated[int | None, typer.Option(min=1, help="as many when the load asks for it")] = None,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="port to listen on")] = 8001,
) -> None:
    """Serve a model in several replicas, and replace them one by one when a new version is published. Needs [ray]."""
    from ml_engineer_track.serving.catalog import Limits
    from ml_engineer_track.serving.ray_serve import serve_ray as run_replicas

    run_replicas(model, variant or [], "auto", host, port, replicas, max_replicas, load_settings("tiny").artifacts, Limits())


def main() -> int:
    """Run a command; see `run_app` for how it ends."""
    return run_app(app, "stopped; run the same command again to go on from the last checkpoint")


if __name__ == "__main__":
    sys.exit(main())
