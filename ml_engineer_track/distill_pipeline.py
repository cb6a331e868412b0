"""Distillation, whole: from the published model to a published student. The table of contents of `make distill`.

    make distill        (python -m ml_engineer_track distill [--preset tiny] [--teacher FOLDER] [--student FOLDER] [--no-teacher])

The teacher is the bf16 variant of the current version, which `make ml` publishes. The student becomes a variant of its own beside
it: `student` for transformers, `student-q8_0` for the server, where it can also be the teacher's draft (`serve --draft`).
Stages run again only when something they depend on changed, as in pipeline.py.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ml_engineer_track import distill_report
from ml_engineer_track.benchmark import benchmark
from ml_engineer_track.curate import CuratedData, curate
from ml_engineer_track.distill import NO_TEACHER, SERVED_STUDENT, SLICED, STUDENT, Trained, distill
from ml_engineer_track.evaluate import Scores, evaluate, evaluate_served
from ml_engineer_track.gguf_export import FILE_NAME
from ml_engineer_track.models import check_model_path, load_model, load_tokenizer, prompt_text, weight_bytes
from ml_engineer_track.pipeline import ENGINE, Stages, curate_stage, locked_stages, train_ranker_stage
from ml_engineer_track.publish import Published, add_variants, golden, golden_rows, golden_served
from ml_engineer_track.serving import speculative
from ml_engineer_track.serving.catalog import entries, has_openvino
from shared import handoff
from shared.errors import UserError
from shared.ranking import read_ranker
from shared.settings import Settings

CODE = ("distill.py", "student.py", "teacher_cache.py", "finetune.py", "checkpoint.py", "models.py")
#: Validation prompts that are timed in the server's engine.
TIMED_PROMPTS = 16


def run(settings: Settings, teacher: str | None = None, student: str = SLICED, taught: bool = True) -> None:
    """Distil, measure, publish, report. Without `taught` only the student without a teacher is trained and measured."""
    folder = Path(teacher) if teacher else handoff.current(settings.artifacts / "models")
    if student != SLICED:
        check_model_path(student)
    with locked_stages(settings) as stages:
        ranker = train_ranker_stage(stages)
        data = curate_stage(stages, ranker)
        version, model = find_teacher(folder, data)
        check_model_path(str(model))
        rows = more_rows(settings, data, Path(ranker.path))
        trained = {name: distill_stage(stages, rows, model, name, student) for name in sides(taught)}
        scores = evaluate_stage(stages, data, model, trained)
        if not taught:
            print(distill_report.text(scores))
            return
        figures = benchmark_stage(stages, data, model, trained)
        published = publish(settings, data, version, trained[STUDENT], scores, figures) if version else None
        distill_report.write(distill_report.Distillation(settings, data, trained, scores, figures, published, stages.seconds))


def sides(taught: bool) -> tuple[str, ...]:
    return (STUDENT, NO_TEACHER) if taught else (NO_TEACHER,)


def find_teacher(folder: Path, data: CuratedData) -> tuple[Path | None, Path]:
    """The version in `folder` (None when it is a bare model, to which nothing can be added) and its bf16 model.

    UserError for a version that was trained on other data: its student would be measured on rows the teacher never saw.
    """
    if not (folder / "manifest.json").exists():
        return None, folder
    manifest = handoff.verify(folder)
    if manifest.data.version != data.version:
        raise UserError(
            f"version {manifest.version} was trained on data {manifest.data.version}, these settings give {data.version}",
            str(folder), "Run `make ml` first, with the same PRESET and MODEL",
        )  # fmt: skip
    return folder, folder / "bf16"


def more_rows(settings: Settings, data: CuratedData, ranker: Path) -> CuratedData:
    """The data again with `distill.copies` of every training question; validation and test rows are the same."""
    if settings.distill.copies <= settings.curate.copies:
        return data
    wanted = settings.curate.model_copy(update={"copies": settings.distill.copies})
    return curate(settings.model_copy(update={"curate": wanted}), read_ranker(ranker))


def distill_stage(stages: Stages, rows: CuratedData, teacher: Path, name: str, student: str) -> Trained:
    s, before = stages.settings, stages.key
    inputs = [*sorted(teacher.glob("*.safetensors")), *([Path(student)] if Path(student).is_dir() else [])]
    options = [s.distill.model_dump(), s.finetune.choice_weight, s.seed, rows.version, student]

    def says(t: Trained) -> str:
        return (
            f"{t.parameters / 1e6:.2f} M parameters, {t.share_of_teacher:.1%} of the teacher's, {t.steps} steps "
            f"({t.on_policy_steps} on its own words), validation loss {t.best_validation_loss:.3f}. "
            "Why: a teacher says more about a row than its label"
        )

    done = stages.run(
        f"distill-{name}", Trained, lambda: distill(s, rows, str(teacher), name, student), inputs, CODE, options, says
    )
    if name == STUDENT:
        stages.key = before  # the sides do not depend on each other
    return done


def evaluate_stage(stages: Stages, data: CuratedData, teacher: Path, trained: dict[str, Trained]) -> dict[str, Scores]:
    s = stages.settings
    served = _served(trained) if has_openvino() else None

    def ask_all() -> dict[str, Scores]:
        paths = {"teacher": str(teacher), **{name: side.folder for name, side in trained.items()}}
        tokenizer = load_tokenizer(str(teacher))
        scores = {name: evaluate(s, data, load_model(path), tokenizer, name) for name, path in paths.items()}
        return scores | ({SERVED_STUDENT: evaluate_served(s, data, served, SERVED_STUDENT)} if served else {})

    def says(scores: dict[str, Scores]) -> str:
        return "evidence F1 " + ", ".join(f"{n} {x.figures['grounded/evidence_f1'].value:.2f}" for n, x in scores.items())

    code = ("evaluate.py", "generate.py", "models.py", *ENGINE)
    options = [s.evaluate.model_dump(), data.version, list(trained), bool(served)]
    return stages.run("distill-evaluate", dict[str, Scores], ask_all, _weights(trained), code, options, says)


def benchmark_stage(stages: Stages, data: CuratedData, teacher: Path, trained: dict[str, Trained]) -> dict[str, Any]:
    """Latency in transformers; where the server's engine can be had, throughput there and what the student does as a draft."""
    s, served = stages.settings, _served(trained)

    def measure_all() -> dict[str, Any]:
        figures = benchmark(s, {"teacher": str(teacher), STUDENT: trained[STUDENT].folder})
        figures |= {"served": None, "speculative": None}
        if served and has_openvino():
            (large,) = entries(teacher, ["q8_0"], "openvino", s.artifacts)
            draft, prompts = speculative.draft_folder(served, s.artifacts), timed_prompts(data, str(teacher))
            new, repeats = s.benchmark.new_tokens, s.benchmark.repeats
            figures["served"] = {
                name: speculative.throughput(folder, prompts, new, repeats)
                for name, folder in (("teacher", large.folder), (STUDENT, served))
            }
            tokens = s.evaluate.max_new_tokens
            figures["speculative"] = asdict(speculative.measure(large.folder, draft, prompts, tokens, repeats))
        return figures

    def says(f: dict[str, Any]) -> str:
        tpot = [next(iter(f["models"][name]["batch"].values()))["tpot"]["p50"] for name in ("teacher", STUDENT)]
        draft = f["speculative"]
        as_draft = f", as a draft {draft['speed_up']:.2f} times ({draft['acceptance_rate']:.0%} accepted)" if draft else ""
        return f"student {tpot[0] / tpot[1]:.2f} times as fast as its teacher{as_draft}"

    code = ("benchmark.py", "serving/speculative.py", *ENGINE)
    options = [s.benchmark.model_dump()]
    return stages.run("distill-benchmark", dict[str, Any], measure_all, _weights(trained), code, options, says)


def publish(
    settings: Settings, data: CuratedData, version: Path, trained: Trained, scores: dict[str, Scores], figures: dict[str, Any]
) -> Published:
    """The student as variants of a new version, beside those of its teacher's."""
    tokenizer, rows = load_tokenizer(trained.folder), golden_rows(data)
    model, served = load_model(trained.folder), _served({STUDENT: trained})
    hardware = {"hardware": figures["hardware"]}
    folders = {STUDENT: Path(trained.folder)}
    described = {
        STUDENT: handoff.Variant(
            name=STUDENT, weight_bytes=weight_bytes(load_model(trained.folder, torch.bfloat16)), quality=scores[STUDENT].figures,
            performance={**figures["models"][STUDENT], **hardware}, files={}, golden=golden(model, tokenizer, rows),
        )
    }  # fmt: skip
    if served:
        folders[SERVED_STUDENT] = served
        speed = {"speculative": figures["speculative"], **hardware}
        if figures["served"]:
            speed["decode_throughput"] = figures["served"][STUDENT]
        described[SERVED_STUDENT] = handoff.Variant(
            name=SERVED_STUDENT, weight_bytes=(served / FILE_NAME).stat().st_size,
            quality=scores[SERVED_STUDENT].figures if SERVED_STUDENT in scores else {}, performance=speed, files={},
            golden=golden_served(served, tokenizer, rows),
        )  # fmt: skip
    story = {
        "parameters": trained.parameters, "share_of_teacher": trained.share_of_teacher, "steps": trained.steps,
        "validation_loss": trained.best_validation_loss, **settings.distill.model_dump(),
    }  # fmt: skip
    return add_variants(version, folders, described, {STUDENT: story})


def timed_prompts(data: CuratedData, teacher: str) -> list[list[int]]:
    """Validation prompts spread over the skills, as token ids."""
    tokenizer, rows = load_tokenizer(teacher), data.rows("validation")
    chosen = rows[:: max(1, len(rows) // TIMED_PROMPTS)][:TIMED_PROMPTS]
    return [tokenizer(prompt_text(tokenizer, row.messages), add_special_tokens=False)["input_ids"] for row in chosen]


def _served(trained: dict[str, Trained]) -> Path | None:
    """The student's GGUF folder, where there is one."""
    folder = Path(trained[STUDENT].folder).parent / SERVED_STUDENT if STUDENT in trained else None
    return folder if folder and (folder / FILE_NAME).exists() else None


def _weights(trained: dict[str, Trained]) -> list[Path]:
    return [path for side in trained.values() for path in sorted(Path(side.folder).glob("*.safetensors"))]
