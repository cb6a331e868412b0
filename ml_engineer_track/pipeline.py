"""The inner loop, whole: from leaflets to a published 4-bit model. This file is the table of contents of the track.

    make ml            (python -m ml_engineer_track run [--preset tiny] [--model ...] [--method qlora])

Each stage is a file of its own with one public function. A stage runs again only when its inputs, its code or its settings
changed; otherwise its last result is used and the line says so.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from ml_engineer_track import report
from ml_engineer_track.accounting import fit_to_vram
from ml_engineer_track.benchmark import benchmark
from ml_engineer_track.benchmark_training import training_throughput
from ml_engineer_track.curate import CuratedData, curate
from ml_engineer_track.evaluate import Scores, evaluate, evaluate_served
from ml_engineer_track.finetune import Tuned
from ml_engineer_track.launch import check, train
from ml_engineer_track.low_bits import KNOWN_BITS, LAYOUT_FILE
from ml_engineer_track.models import check_model_path, load_model, load_tokenizer
from ml_engineer_track.publish import Published, publish
from ml_engineer_track.quantize import Variants, quantize
from ml_engineer_track.serving.catalog import has_openvino
from ml_engineer_track.train_ranker import TrainedRanker, train_ranker
from shared.files import locked, sha256_text, sha256_tree, write_text
from shared.handoff import set_current
from shared.ranking import read_ranker
from shared.settings import ROOT, Settings

T = TypeVar("T")
HERE = Path(__file__).resolve().parent
CONTRACT = (ROOT / "shared" / "chat.py", ROOT / "shared" / "library.py")
#: what a GGUF variant's replies depend on beside its weights
ENGINE = tuple(
    f"serving/{name}.py" for name in ("engine", "openvino_engine", "inprocess", "grammar", "grammar_json", "grammar_text")
)


def run(settings: Settings) -> Published:
    """All stages in order. Returns what was published; the report lies in `artifacts/reports/`."""
    with locked_stages(settings) as stages:
        ranker = train_ranker_stage(stages)
        data = curate_stage(stages, ranker)
        tuned = finetune_stage(stages, data)
        variants = quantize_stage(stages, tuned)
        scores = evaluate_stage(stages, data, variants)
        figures = benchmark_stage(stages, data, variants)
        published = publish_stage(stages, data, tuned, variants, scores, figures, ranker)
        set_current(settings.artifacts / "models", published.version)  # also after a skip: another preset may have moved it
        report.write(report.Run(stages.settings, data, tuned, variants, scores, figures, published, stages.seconds))
    return published


def train_ranker_stage(stages: Stages) -> TrainedRanker:
    """First, because it depends on the data alone and the order of the sources in every prompt depends on it."""
    s = stages.settings
    inputs = [s.datasets, ROOT / "shared" / "passages.py", ROOT / "shared" / "ranking.py"]
    options = [s.seed, s.evaluate.bootstrap]
    return stages.run("train-ranker", TrainedRanker, lambda: train_ranker(s), inputs, ("train_ranker.py",), options)


def curate_stage(stages: Stages, ranker: TrainedRanker) -> CuratedData:
    s = stages.settings
    inputs, code = [s.datasets, *_tokenizer_files(s)], ("curate.py", "ordering.py", "reading.py")
    options = [s.curate.model_dump(), s.seed]
    return stages.run("curate", CuratedData, lambda: curate(s, read_ranker(Path(ranker.path))), inputs, code, options)


def finetune_stage(stages: Stages, data: CuratedData) -> Tuned:
    s = stages.settings = fit_to_vram(stages.settings, data)
    options = [s.finetune.model_dump(), s.seed, s.model, s.engine, s.workers, s.strategy]
    code = ("finetune.py", "distributed.py", "launch.py", "checkpoint.py", "models.py")
    return stages.run("finetune", Tuned, lambda: train(s, data), _weights(s), code, options)


def quantize_stage(stages: Stages, tuned: Tuned) -> Variants:
    s = stages.settings
    return stages.run(
        "quantize", Variants, lambda: quantize(s, tuned), [], ("quantize.py", "gguf_export.py"), s.quantize.model_dump()
    )


def evaluate_stage(stages: Stages, data: CuratedData, variants: Variants) -> dict[str, Scores]:
    s = stages.settings

    def ask_all() -> dict[str, Scores]:
        paths = {"base": s.model_path, **variants.loadable}
        tokenizer = load_tokenizer(s.model_path)
        scores = {name: evaluate(s, data, load_model(path), tokenizer, name) for name, path in paths.items()}
        if variants.served and not has_openvino():
            names = ", ".join(variants.served)
            print(f"  evaluate: openvino-genai is not installed; {names} published without figures", flush=True)
            return scores
        return scores | {name: evaluate_served(s, data, Path(path), name) for name, path in variants.served.items()}

    options = [s.evaluate.model_dump(), bool(variants.served) and has_openvino()]
    return stages.run("evaluate", dict[str, Scores], ask_all, [], ("evaluate.py", "generate.py", "models.py", *ENGINE), options)


def benchmark_stage(stages: Stages, data: CuratedData, variants: Variants) -> dict[str, Any]:
    s = stages.settings

    def measure_all() -> dict[str, Any]:
        figures = benchmark(s, {"base": s.model_path, **variants.loadable})
        return {**figures, "training": training_throughput(s, data)}

    code = ("benchmark.py", "benchmark_training.py", "finetune.py")
    return stages.run("benchmark", dict[str, Any], measure_all, [], code, s.benchmark.model_dump())


def publish_stage(
    stages: Stages, data: CuratedData, tuned: Tuned, variants: Variants, scores: dict[str, Scores], figures: dict[str, Any],
    ranker: TrainedRanker,
) -> Published:  # fmt: skip
    s, assets = stages.settings, [Path(ranker.path)]
    inputs = [ROOT / "shared" / "handoff.py"]
    code = ("publish.py", "serving/parity.py", *ENGINE)
    return stages.run("publish", Published, lambda: publish(s, data, tuned, variants, scores, figures, assets), inputs, code, {})


#: what each stage says when it is done: what it did, and why an engineer does it
SAYS: dict[str, Callable[[Any], str]] = {
    "train-ranker": lambda r: (
        f"{r.questions:,} questions; validation leaflet recall@5 "
        + ", ".join(f"{name} {r.figures[f'{name}/leaflet_recall@5']}".split(" [")[0] for name in ("bm25", "dense", "ranker"))
        + ". Why: what is not found cannot be answered"
    ),
    "curate": lambda d: (
        f"{sum(sum(c.values()) for c in d.counts.values()):,} rows as {d.version}, {sum(d.dropped.values())} dropped. "
        "Why: a model learns what the rows show, mistakes included"
    ),
    "finetune": lambda t: (
        f"{t.method} on {t.trainable_share:.1%} of the weights, {t.steps} steps at {t.tokens_per_second:,.0f} tokens/s, "
        f"validation loss {t.best_validation_loss:.3f}. Why: the base model can read, but was never shown this task"
    ),
    "quantize": lambda v: (
        "merged the adapter; " + ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in v.weight_bytes.items()) + ". "
        "Why: every token moves every weight through memory"
    ),
    "evaluate": lambda scores: (
        "evidence F1 " + ", ".join(f"{name} {s.figures['grounded/evidence_f1'].value:.2f}" for name, s in scores.items()) + ". "
        "Why: better is a figure on rows never trained on"
    ),
    "benchmark": lambda f: (
        f"fine-tuning at {f['training']['ratio']:.2f} times transformers.Trainer; decode tokens/s at batch 1: "
        + ", ".join(f"{name} {next(iter(m['batch'].values()))['decode_throughput']:.0f}" for name, m in f["models"].items())
        + ". Why: quality without its cost is half a figure"
    ),
    "publish": lambda p: f"{p.version}, every file verified, now current. Why: the product must get exactly what was measured",
}


class Stages:
    """Runs stages, remembers their results, skips what has not changed, and says one line about each.

    The key of a stage is a hash over the key of the stage before it, its inputs' contents, its code and its settings.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.seconds: dict[str, float] = {}
        self.key = ""

    def run(
        self, name: str, kind: Any, work: Callable[[], T], inputs: Sequence[Path], code: Sequence[str], settings: Any,
        says: Callable[[Any], str] | None = None,
    ) -> T:  # fmt: skip
        """The stage's result, from this run or, when nothing it depends on changed, from the last one.

        `says` comes with the stages that `make ml` does not run.
        """
        sources = sha256_tree([*(HERE / file for file in code), *CONTRACT])
        self.key = sha256_text(json.dumps([self.key, name, sha256_tree(inputs), sources, settings], default=str))
        folder, adapter = self.settings.work / name, TypeAdapter(kind)
        place = name if says else f"[{list(SAYS).index(name) + 1}/{len(SAYS)}] {name}"
        says = says or SAYS[name]
        stamp = folder / "stamp.json"
        last = json.loads(stamp.read_text(encoding="utf-8")) if stamp.exists() else {}
        if last.get("key") == self.key and last.get("done"):
            result: T = adapter.validate_python(last["result"])
            if self.still_there(name, result):
                self.seconds[name] = last["seconds"]
                print(f"{place}: unchanged, skipped ({says(result).split('. Why')[0]})", flush=True)
                return result
        if last.get("key") != self.key:
            shutil.rmtree(folder, ignore_errors=True)  # what lies there belongs to other inputs
            write_text(stamp, json.dumps({"key": self.key, "done": False}))
        started = time.perf_counter()
        result = work()
        self.seconds[name] = time.perf_counter() - started
        done = {"key": self.key, "done": True, "seconds": self.seconds[name], "result": adapter.dump_python(result, mode="json")}
        write_text(stamp, json.dumps(done))
        print(f"{place}: {says(result)} ({self.seconds[name]:.0f} s)", flush=True)
        return result

    def still_there(self, name: str, result: Any) -> bool:
        """Are the files of a remembered result still on disk? Somebody may have cleaned up."""
        models = self.settings.artifacts / "models"
        expected = {
            "curate": lambda: [result.folder / "train.jsonl"],
            "finetune": lambda: [Path(result.adapter) / "adapter_model.safetensors"],
            "quantize": lambda: [
                next((p for kind in ("safetensors", "gguf") for p in Path(f).glob(f"*.{kind}")), Path(f) / "model.safetensors")
                for f in result.folders.values()
            ],
            "train-ranker": lambda: [Path(result.path)],
            "low-bits-pack": lambda: [Path(folder) / LAYOUT_FILE for folder in result.folders.values()],
            **{f"low-bits-repair-{bits}": lambda: [Path(result.folder) / LAYOUT_FILE] for bits in KNOWN_BITS},
            "distill-student": lambda: [Path(result.folder) / "config.json"],
            "distill-no-teacher": lambda: [Path(result.folder) / "config.json"],
            "distill-from-scratch": lambda: [Path(result.folder) / "config.json"],
            "publish": lambda: [Path(result.folder) / "manifest.json", models / "current"],
        }.get(name, list)
        return all(path.exists() for path in expected())


@contextmanager
def locked_stages(settings: Settings) -> Iterator[Stages]:
    """The stages of a run, locked: two runs in one working folder would overwrite each other, so the second is refused."""
    check_model_path(settings.model_path)
    check(settings)
    with locked(settings.work, "another run is using this working folder"):
        yield Stages(settings.with_its_data())


def _tokenizer_files(settings: Settings) -> list[Path]:
    folder = Path(settings.model_path)
    return sorted(folder.glob("tokenizer*")) if folder.is_dir() else []


def _weights(settings: Settings) -> list[Path]:
    folder = Path(settings.model_path)
    return [folder] if folder.is_dir() else []
