"""Distillation, whole: from the published model to a published student. The table of contents of `make distill`.

    make distill        (python -m ml_engineer_track distill [--preset tiny] [--teacher ...] [--student ...] [--no-teacher])

The teacher is the bf16 variant of the current version, which `make ml` publishes. The student becomes a variant of its own beside
it: `student` for transformers, `student-q8_0` for the server, where it can also be the teacher's draft (`serve --draft`).
Stages run again only when something they depend on changed, as in pipeline.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from ml_engineer_track import distill_report
from ml_engineer_track.benchmark import benchmark
from ml_engineer_track.curate import CuratedData, curate
from ml_engineer_track.decode_speed import SpeedUp, in_transformers, take_turns
from ml_engineer_track.distill import FROM_SCRATCH, NO_TEACHER, SERVED_STUDENT, SLICED, STUDENT, Trained, distill
from ml_engineer_track.evaluate import Scores, evaluate, evaluate_served
from ml_engineer_track.gguf_export import FILE_NAME
from ml_engineer_track.models import check_model_path, load_model, load_tokenizer, local_model, prompt_text, weight_bytes
from ml_engineer_track.pipeline import ENGINE, Stages, curate_stage, locked_stages, train_ranker_stage
from ml_engineer_track.publish import Published, add_variants, golden, golden_rows, golden_served
from ml_engineer_track.serving import speculative
from ml_engineer_track.serving.catalog import entries, has_openvino
from shared import handoff
from shared.errors import UserError
from shared.files import sha256_text
from shared.ranking import read_ranker
from shared.settings import Settings

CODE = ("distill.py", "student.py", "teacher_cache.py", "finetune.py", "checkpoint.py", "models.py")
WHY = {
    STUDENT: "a teacher says more about a row than its label",
    NO_TEACHER: "what the same student learns from the labels alone is what the teacher must beat",
    FROM_SCRATCH: "what a start from noise reaches tells what the start was worth",
}
#: Validation prompts that are timed in the server's engine.
TIMED_PROMPTS = 16


def run(settings: Settings, teacher: str | None = None, student: str = SLICED, taught: bool = True) -> None:
    """Distil, measure, publish, report. Without `taught` only NO_TEACHER is trained and measured, and nothing is published.

    `teacher` (default: the current version) is a version, a model folder or a hub id; `student` SLICED, a folder or a hub id.
    """
    folder = teacher_folder(settings, teacher)
    start = SLICED if student == SLICED else str(local_model(student, "--student"))
    with locked_stages(settings) as stages:
        ranker = train_ranker_stage(stages)
        data = curate_stage(stages, ranker)
        version, model = find_teacher(folder, data)
        check_model_path(str(model))
        rows = more_rows(settings, data, Path(ranker.path))
        trained = distill_stages(stages, rows, model, sides(taught), start)
        scores = evaluate_stage(stages, data, model, trained)
        if not taught:
            print(distill_report.text(scores))
            return
        figures = benchmark_stage(stages, data, model, trained)
        published = publish(settings, data, version, trained[STUDENT], scores, figures) if version else None
        distill_report.write(distill_report.Distillation(settings, data, trained, scores, figures, published, stages.seconds))


def sides(taught: bool) -> tuple[str, ...]:
    return (STUDENT, NO_TEACHER, FROM_SCRATCH) if taught else (NO_TEACHER,)


def teacher_folder(settings: Settings, teacher: str | None) -> Path:
    """A version's folder or a model's, fetched from the hub where a hub id was given. UserError when there is neither."""
    if teacher is None:
        return handoff.current(settings.artifacts / "models")
    version = Path(teacher).expanduser()
    return version if (version / "manifest.json").exists() else local_model(teacher, "--teacher")


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


def distill_stages(stages: Stages, rows: CuratedData, teacher: Path, names: Sequence[str], student: str) -> dict[str, Trained]:
    """Every side. They do not depend on each other; what comes next depends on all of them."""
    before, keys, trained = stages.key, [], {}
    for name in names:
        stages.key = before
        trained[name] = distill_stage(stages, rows, teacher, name, student)
        keys.append(stages.key)
    stages.key = sha256_text("".join(keys))
    return trained


def distill_stage(stages: Stages, rows: CuratedData, teacher: Path, name: str, student: str) -> Trained:
    s = stages.settings
    inputs = [*model_files(teacher), *([] if student == SLICED else model_files(Path(student)))]
    options = [s.distill.model_dump(), s.finetune.choice_weight, s.seed, rows.version, student == SLICED]

    def says(t: Trained) -> str:
        return (
            f"{t.parameters / 1e6:.2f} M parameters, {t.share_of_teacher:.1%} of the teacher's, {t.steps} steps "
            f"({t.on_policy_steps} on its own words), validation loss {t.best_validation_loss:.3f}. "
            f"Why: {WHY[name]}"
        )

    return stages.run(
        f"distill-{name}", Trained, lambda: distill(s, rows, str(teacher), name, student), inputs, CODE, options, says
    )


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
    """Latency and speed-up in transformers; where the server's engine can be had, the speed-up there and what the student does as
    a draft."""
    s, served = stages.settings, _served(trained)
    new, repeats, chance = s.benchmark.new_tokens, s.benchmark.repeats, (s.evaluate.bootstrap, s.seed)

    def measure_all() -> dict[str, Any]:
        figures = benchmark(s, {"teacher": str(teacher), STUDENT: trained[STUDENT].folder})
        paths, prompts = {"teacher": str(teacher), STUDENT: trained[STUDENT].folder}, timed_prompts(data, str(teacher))
        turns = {name: in_transformers(load_model(path), s.benchmark.prompt_tokens, new) for name, path in paths.items()}
        figures["decoding"] = plain(take_turns(turns, len(prompts), new, repeats, *chance, "transformers"))
        figures |= {"served": None, "speculative": None}
        if served and has_openvino():
            (large,) = entries(teacher, ["q8_0"], "openvino", s.artifacts)
            folders = {"teacher": large.folder, SERVED_STUDENT: served}
            turns = {name: speculative.decoder(folder, prompts, new) for name, folder in folders.items()}
            figures["served"] = plain(take_turns(turns, len(prompts), new, repeats, *chance, "the server's engine"))
            draft, tokens = speculative.draft_folder(served, s.artifacts), s.evaluate.max_new_tokens
            figures["speculative"] = plain(speculative.measure(large.folder, draft, prompts, tokens, repeats, *chance))
        return figures

    def says(f: dict[str, Any]) -> str:
        draft, served = f["speculative"], f["served"]
        there = f", {served['ratio']['value']:.2f} in the server's engine" if served else ""
        as_draft = f", as a draft {draft['speed_up']['value']:.2f} ({draft['acceptance_rate']:.0%} accepted)" if draft else ""
        return f"student {f['decoding']['ratio']['value']:.2f} times as fast as its teacher{there}{as_draft}"

    code = ("benchmark.py", "decode_speed.py", "serving/speculative.py", *ENGINE)
    options = [s.benchmark.model_dump(), s.evaluate.max_new_tokens, s.evaluate.bootstrap]
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
            speed["decode_throughput"] = figures["served"]["throughput"][SERVED_STUDENT]
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


def model_files(folder: Path) -> list[Path]:
    """What a model in a folder is made of: weights, config, tokenizer and template; not its card."""
    return sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".json", ".jinja", ".model", ".txt"))


def plain(figures: SpeedUp | speculative.Speculation) -> dict[str, Any]:
    """As JSON has it, so that a remembered result is the same as a fresh one."""
    found: dict[str, Any] = TypeAdapter(type(figures)).dump_python(figures, mode="json")
    return found


def _weights(trained: dict[str, Trained]) -> list[Path]:
    return [path for side in trained.values() for path in sorted(Path(side.folder).glob("*.safetensors"))]
