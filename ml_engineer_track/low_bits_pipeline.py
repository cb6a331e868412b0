"""Fewer than four bits, whole: from the tuned model to a chart of quality against size. The table of contents of
`make quantize BITS=2`.

    make quantize BITS=2        (python -m ml_engineer_track low-bits [--preset tiny] [--bits 2|3|4|mixed] [--path FOLDER])

The tuned model is the bf16 variant of the current version, which `make ml` publishes; what that run measured of nf4, int8, q8_0
and q4_0 stands beside what is measured here. `--bits` names the model that is repaired; the others are made and measured
whichever it is, and only once, for a stage runs again only when something it depends on changed. Nothing is published: these
layers are for studying quality and memory, and the server's engines are far faster with their own formats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ml_engineer_track import low_bits_report
from ml_engineer_track.benchmark import memory, one_run, summarise
from ml_engineer_track.curate import CuratedData
from ml_engineer_track.distill_pipeline import find_teacher
from ml_engineer_track.evaluate import Scores, evaluate, sampled_rows
from ml_engineer_track.low_bits import (
    Plan,
    bits_per_weight,
    check_bits,
    keep_dense,
    load_low_bits,
    pack_model,
    plan_bytes,
    save_low_bits,
    uniform,
)
from ml_engineer_track.models import check_model_path, load_model, load_tokenizer, weight_bytes
from ml_engineer_track.pipeline import Stages, curate_stage, locked_stages, train_ranker_stage
from ml_engineer_track.progress import watched
from ml_engineer_track.repair import Repaired, repair
from ml_engineer_track.sensitivity import (
    Sensitivity,
    choose_bits,
    measure_sensitivity,
    read_batches,
    row_divergences,
    sizes_of,
)
from shared import handoff
from shared.errors import UserError
from shared.hardware import busy, compute_dtype, device, fingerprint
from shared.metrics import estimate_mean
from shared.settings import Settings

CODE = ("half_quadratic.py", "low_bits.py", "models.py")
#: Variants of the published version that are shown beside what is made here.
REFERENCES = ("bf16", "nf4", "int8", "q8_0", "q4_0")
MIXED = "mixed"


@dataclass(frozen=True)
class Made:
    """Every packed model: its folder, its bytes in memory, the bits a packed weight takes with its share of scale and offset,
    and the bits of each matrix."""

    folders: dict[str, str]
    weight_bytes: dict[str, int]
    bits_per_weight: dict[str, float]
    bits: dict[str, dict[str, int]]


def run(settings: Settings, bits: str = "2", path: str | None = None) -> None:
    """Measure, choose, pack, evaluate, repair, report. UserError for unknown bits, or when there is no tuned model yet."""
    check_bits(bits)
    folder = Path(path) if path else handoff.current(settings.artifacts / "models")
    if not (folder / "manifest.json").exists():
        check_model_path(path or str(folder))
    with locked_stages(settings) as stages:
        data = curate_stage(stages, train_ranker_stage(stages))
        version, model = find_teacher(folder, data)
        published_scores(version)  # a version without figures is refused before any work
        sensitivity = sensitivity_stage(stages, data, model)
        made = pack_stage(stages, model, sensitivity, bits)
        scores = evaluate_stage(stages, data, version, model, made)
        speed = benchmark_stage(stages, model, made)
        repaired = repair_stage(stages, data, model, made, bits)
        scores |= evaluate_repaired_stage(stages, data, model, repaired, bits)
        sizes = reference_bytes(version, model) | made.weight_bytes
        sizes[repaired_name(bits)] = made.weight_bytes[made_name(bits)] + repaired.adapter_bytes
        low_bits_report.write(
            low_bits_report.Study(settings, data, made_name(bits), sensitivity, made.bits, made.bits_per_weight, sizes, scores,
                                  speed, repaired, stages.seconds)
        )  # fmt: skip


def made_name(bits: str) -> str:
    return MIXED if bits == MIXED else f"{bits}-bit"


def repaired_name(bits: str) -> str:
    return f"{made_name(bits)} repaired"


def everywhere_name(bits: int) -> str:
    return f"{bits}-bit everywhere"


# --- stages ----------------------------------------------------------------------------------------------------------


def sensitivity_stage(stages: Stages, data: CuratedData, original: Path) -> Sensitivity:
    s, options = stages.settings, stages.settings.low_bits

    def measure() -> Sensitivity:
        tokenizer = load_tokenizer(str(original))
        weights, tokens = s.finetune.choice_weight, s.finetune.batch_tokens
        rows = read_batches(data.rows("train"), options.calibration_rows, tokenizer, weights, tokens)
        return measure_sensitivity(load_model(str(original)), rows, options.mixed_choices, options.group)

    def says(found: Sensitivity) -> str:
        fewest = min(options.mixed_choices)
        order = sorted(found, key=lambda name: found[name][fewest])
        return (
            f"{len(found)} matrices alone at {fewest} bits: {order[0]} does least ({found[order[0]][fewest]:.1e} nats), "
            f"{order[-1]} most ({found[order[-1]][fewest]:.1e}). Why: bits belong where they are missed"
        )

    asked = [options.group, options.mixed_choices, options.calibration_rows, s.finetune.choice_weight, s.finetune.batch_tokens]
    return stages.run("low-bits-sensitivity", Sensitivity, measure, _weights(original), ("sensitivity.py", *CODE), asked, says)


def pack_stage(stages: Stages, original: Path, sensitivity: Sensitivity, bits: str) -> Made:
    """All models in few bits: uniform ones, one with as few bits in the embedding, and the mixed one of that one's size."""
    s, options = stages.settings, stages.settings.low_bits
    wanted = sorted({*options.uniform_bits, *([int(bits)] if bits != MIXED else [])}, reverse=True)
    work = s.work / "low-bits-pack"

    def plans(model: PreTrainedModel) -> dict[str, Plan]:
        everywhere = uniform(model, options.mixed_like, options.group, everywhere=True)
        sizes = sizes_of(model, options.mixed_choices, options.group)
        return {
            **{made_name(str(n)): uniform(model, n, options.group) for n in wanted},
            **{f"2-bit g{group}": uniform(model, 2, group) for group in options.other_groups},
            everywhere_name(options.mixed_like): everywhere,
            MIXED: Plan(choose_bits(sensitivity, sizes, plan_bytes(model, everywhere)), options.group),
        }

    def pack_all() -> Made:
        tokenizer = load_tokenizer(str(original))
        made = Made({}, {}, {}, {})
        chosen = plans(load_model(str(original), torch.bfloat16))
        for name, plan in watched(list(chosen.items()), "pack"):
            model = load_model(str(original), torch.bfloat16)
            made.bits_per_weight[name], made.bits[name] = bits_per_weight(model, plan), plan.bits
            made.folders[name] = str(work / name.replace(" ", "-"))
            save_low_bits(pack_model(model, plan), tokenizer, Path(made.folders[name]))
            made.weight_bytes[name] = weight_bytes(model)
        return made

    def says(made: Made) -> str:
        sizes = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in made.weight_bytes.items())
        return f"{sizes}. Why: an embedding in 16 bits counts, too"

    asked = [options.group, options.other_groups, options.mixed_like, wanted]
    return stages.run("low-bits-pack", Made, pack_all, [], CODE, asked, says)


def evaluate_stage(stages: Stages, data: CuratedData, version: Path | None, original: Path, made: Made) -> dict[str, Scores]:
    """Every packed model asked like every other variant, and the published ones' figures beside them."""
    s = stages.settings

    def ask_all() -> dict[str, Scores]:
        compare = divergence_from(s, data, original)
        scores = published_scores(version)
        if version is None:
            scores["bf16"] = evaluate(s, data, load_model(str(original)), load_tokenizer(str(original)), "bf16")
        for name in [name for name in ("nf4", "int8") if version and name in scores]:
            compare(scores[name], load_model(str(original.parent / name)))
        for name, folder in made.folders.items():
            model = keep_dense(load_model(folder))
            scores[name] = evaluate(s, data, model, load_tokenizer(folder), name)
            compare(scores[name], model)
        return scores

    inputs = [version / "manifest.json"] if version else []
    return stages.run("low-bits-evaluate", dict[str, Scores], ask_all, inputs, _EVALUATION, _asked(s, data), says_f1)


def benchmark_stage(stages: Stages, original: Path, made: Made) -> dict[str, Any]:
    """Decoding one request: the packed layers beside the same model unpacked, both in the dtype a plain user would take."""
    s = stages.settings
    dtype = compute_dtype(device()) if device().type == "cuda" else torch.float32
    plain = str(dtype).removeprefix("torch.")
    shown = [name for name in made.folders if name == MIXED or name.removesuffix("-bit").isdigit()]
    smallest = min(shown, key=lambda name: made.weight_bytes[name])

    def measure_all() -> dict[str, Any]:
        load = busy()
        figures = {plain: speed_of(load_model(str(original), dtype), s)}
        figures |= {name: speed_of(load_low_bits(made.folders[name], dtype), s) for name in watched(shown, "benchmark")}
        peaks = {"bf16": memory(str(original), s.benchmark), smallest: memory(made.folders[smallest], s.benchmark)}
        return {"hardware": fingerprint(), "busy_share": load, "plain": plain, "models": figures, "memory": peaks}

    def says(f: dict[str, Any]) -> str:
        rate = {name: m["decode_throughput"] for name, m in f["models"].items()}
        shares = ", ".join(f"{name} {rate[name] / rate[f['plain']]:.2f}" for name in shown)
        return f"decoding beside {f['plain']}: {shares} times as fast. Why: fewer bytes are only faster with a kernel for them"

    code = ("benchmark.py", *CODE)
    return stages.run("low-bits-benchmark", dict[str, Any], measure_all, [], code, [s.benchmark.model_dump(), plain], says)


def repair_stage(stages: Stages, data: CuratedData, original: Path, made: Made, bits: str) -> Repaired:
    s, options = stages.settings, stages.settings.low_bits
    name = f"low-bits-repair-{bits}"
    packed = made.folders[made_name(bits)]

    def says(r: Repaired) -> str:
        return (
            f"{r.steps} steps; divergence on validation rows {r.validation_before:.3f} → {r.validation_after:.3f} nats for "
            f"{r.adapter_bytes / 1e6:.1f} MB of LoRA. Why: some of what rounding took can be learnt again"
        )

    asked = [options.model_dump(include={"repair_rank", "repair_steps", "repair_learning_rate", "divergence_rows"})]
    asked += [s.finetune.model_dump(), s.seed, bits]
    code = ("repair.py", "sensitivity.py", "finetune.py", *CODE)
    work = s.work / name / "model"
    return stages.run(name, Repaired, lambda: repair(s, data, str(original), packed, work), [], code, asked, says)


def evaluate_repaired_stage(
    stages: Stages, data: CuratedData, original: Path, repaired: Repaired, bits: str
) -> dict[str, Scores]:
    s, name = stages.settings, repaired_name(bits)

    def ask() -> dict[str, Scores]:
        model = keep_dense(load_model(repaired.folder))
        scores = evaluate(s, data, model, load_tokenizer(repaired.folder), name)
        divergence_from(s, data, original)(scores, model)
        return {name: scores}

    return stages.run(f"low-bits-evaluate-repaired-{bits}", dict[str, Scores], ask, [], _EVALUATION, _asked(s, data), says_f1)


# --- helpers ---------------------------------------------------------------------------------------------------------

_EVALUATION = ("evaluate.py", "generate.py", "sensitivity.py", *CODE)


def says_f1(scores: dict[str, Scores]) -> str:
    f1 = ", ".join(f"{name} {x.figures['grounded/evidence_f1'].value:.2f}" for name, x in scores.items())
    return f"evidence F1 {f1}. Why: the loss of a layer is not the loss of the product"


def divergence_from(settings: Settings, data: CuratedData, original: Path) -> Callable[[Scores, PreTrainedModel], None]:
    """A function that adds `divergence`, in nats per reply token of test rows, to the scores of a model."""
    reference, tokenizer = load_model(str(original)), load_tokenizer(str(original))
    rows = [row for chosen in sampled_rows(settings, data).values() for row in chosen]
    options = settings.finetune
    read = read_batches(rows, settings.low_bits.divergence_rows, tokenizer, options.choice_weight, options.batch_tokens)

    def compare(scores: Scores, model: PreTrainedModel) -> None:
        found = row_divergences(model, reference, read)
        scores.figures["divergence"] = estimate_mean(found, settings.evaluate.bootstrap, settings.seed)

    return compare


def published_scores(version: Path | None) -> dict[str, Scores]:
    """What the run that published the version measured of it. UserError when that does not include bf16."""
    if version is None:
        return {}
    manifest = handoff.verify(version)
    known = {name: manifest.variants[name].quality for name in REFERENCES if name in manifest.variants}
    if not known.get("bf16"):
        raise UserError(f"version {manifest.version} has no figures of its bf16 variant", str(version), "Run `make ml` again")
    return {name: Scores(name, dict(quality), []) for name, quality in known.items() if quality}


def reference_bytes(version: Path | None, original: Path) -> dict[str, int]:
    if version is None:
        return {"bf16": weight_bytes(load_model(str(original), torch.bfloat16))}
    variants = handoff.verify(version).variants
    return {name: variants[name].weight_bytes for name in REFERENCES if name in variants}


def speed_of(model: PreTrainedModel, settings: Settings) -> dict[str, Any]:
    """Latency of one request at a time, in seconds; the first run warms up."""
    options = settings.benchmark
    runs = [one_run(model, 1, options.prompt_tokens, options.new_tokens) for _ in range(options.repeats + 1)]
    return summarise(runs[1:], 1, options)


def _asked(settings: Settings, data: CuratedData) -> list[Any]:
    return [settings.evaluate.model_dump(), settings.low_bits.divergence_rows, settings.finetune.choice_weight, data.version]


def _weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))
