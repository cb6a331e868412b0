"""Teaches a student of at most a third of the teacher's size what the tuned teacher says, and how sure it is of it.

Why an ML engineer does this: rows say which reply is right; a teacher also says how nearly right the others were, for every
token and for rows nobody has labelled. A student learns more from that than from the rows alone, and costs a third to serve.

    python -m ml_engineer_track distill [--preset tiny] [--no-teacher]

Three things make up the lesson:

* **Logits** (Hinton, Vinyals & Dean 2015): T² times the Kullback-Leibler divergence of the student from the teacher, both
  softened by the temperature T. The teacher's side is read from a cache of its likeliest tokens (teacher_cache.py).
* **The task**: cross-entropy of the curated replies, the same as in finetune.py, `task_share` of the loss.
* **On-policy samples** (generalised knowledge distillation, Agarwal et al. 2024): in a share of the steps the student answers by
  itself and the teacher says what it would have said at each place, so that the student also learns to go on from its own words.

The student starts as a cut of its teacher (student.py). Two more sides of the same architecture say what each part was worth,
both trained on the task alone: the same rows, in the same order, with the same weights, for at most as many steps, the best
weights chosen by the same look at validation. Where the student has a step on its own words, they have one on the rows.

    from-scratch   starts from random weights;        the step to the next is what the start is worth
    no-teacher     starts from the student's start;   the step to the next is what the teacher's view is worth
    student        learns from the teacher's view, too

Checkpoints and resuming are those of finetune.py.
"""

from __future__ import annotations

import copy
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from ml_engineer_track.checkpoint import Progress
from ml_engineer_track.curate import CuratedData
from ml_engineer_track.finetune import (
    Batch,
    Example,
    batches,
    collate,
    encode,
    out_of_memory,
    plan_batches,
    reply_logits,
    schedule,
    validation_loss,
)
from ml_engineer_track.gguf_export import ARCHITECTURES
from ml_engineer_track.models import check_same_tokenizer, load_model, load_tokenizer, stop_token_ids
from ml_engineer_track.progress import progress
from ml_engineer_track.quantize import save, save_gguf
from ml_engineer_track.student import blank_student, check_size, sliced_student, student_config
from ml_engineer_track.teacher_cache import TeacherCache, teacher_cache
from shared.errors import UserError
from shared.files import need_disk, sha256_tree
from shared.hardware import compute_dtype, device
from shared.settings import Distill, Settings

STUDENT, NO_TEACHER, FROM_SCRATCH = "student", "no-teacher", "from-scratch"
#: the student as a GGUF file for the server: a folder beside its model, and a variant of the version it is published in
SERVED_STUDENT = "student-q8_0"
#: `--student` of a student that is cut out of its teacher; anything else is a model to start from.
SLICED = "sliced"
#: Batches of training rows on which the teacher is watched before it is cut.
CALIBRATION_BATCHES = 12


@dataclass(frozen=True)
class Trained:
    """One trained side. `folder` is its bf16 model; losses are weighted means per token, validation's of the task alone."""

    name: str
    folder: str
    parameters: int
    share_of_teacher: float
    steps: int
    on_policy_steps: int
    stopped_early: bool
    resumed_at: int
    best_validation_loss: float
    validation: list[dict[str, float]]
    loss: list[float]
    seconds: float
    tokens_per_second: float


@dataclass(frozen=True)
class Lesson:
    """What every side gets: rows with weights (`wide` ones weigh their prompts, too), their order, and the stop tokens."""

    rows: list[Example]
    wide: list[Example]
    validation: list[Batch]
    plan: list[list[int]]
    stops: list[int]
    pad: int


@dataclass(frozen=True)
class Teacher:
    """The teacher itself, for what the student says, and what it said about the rows."""

    model: PreTrainedModel
    cache: TeacherCache


def distill(settings: Settings, data: CuratedData, teacher: str, name: str = STUDENT, student: str = SLICED) -> Trained:
    """Train one side of the model in the folder `teacher`, in `settings.work/distill-<name>`. Resumes what it finds there.

    `student` is SLICED or a folder. UserError for a student that is too large or has another tokenizer.
    """
    work, options = settings.work / f"distill-{name}", settings.distill
    need_disk(work, 200_000_000)
    tokenizer, model = load_tokenizer(teacher), load_model(teacher)
    if student != SLICED:
        check_same_tokenizer(teacher, student, f"--student {student}")
    lesson = make_lesson(settings, data, tokenizer, stop_token_ids(model, tokenizer))
    learner = beginner(name, model, student, lesson, settings)
    share = check_size(learner, model)
    guide = Teacher(model, _cache(options, lesson, model, teacher, work / "teacher")) if name == STUDENT else None
    trained = train(name, learner, lesson, guide, settings, work, share)
    if name == STUDENT and learner.config.model_type in ARCHITECTURES:
        save_gguf(learner, tokenizer, work / SERVED_STUDENT, "q8_0")
    save(learner.to(torch.bfloat16), tokenizer, work / "model")
    for left in ("checkpoint", "checkpoint.old", "best", "teacher"):
        shutil.rmtree(work / left, ignore_errors=True)
    return trained


def beginner(name: str, teacher: PreTrainedModel, student: str, lesson: Lesson, settings: Settings) -> PreTrainedModel:
    """A side before its first step, in float32: STUDENT and NO_TEACHER are the same, FROM_SCRATCH knows nothing."""
    options = settings.distill
    if name == FROM_SCRATCH:
        config = AutoConfig.from_pretrained(student) if student != SLICED else student_config(teacher.config, options)
        blank = blank_student(config, settings.seed)
        blank.generation_config = copy.deepcopy(teacher.generation_config)  # it must not miss a stop token that others have
        return blank
    if student != SLICED:
        return load_model(student, torch.float32)
    seen = [collate(_chosen(lesson.rows, group), lesson.pad) for group in lesson.plan[:CALIBRATION_BATCHES]]
    return sliced_student(teacher, options, seen)


def make_lesson(settings: Settings, data: CuratedData, tokenizer: PreTrainedTokenizerBase, stops: list[int]) -> Lesson:
    """Rows as finetune.py weighs them, and a plan of steps that every side follows."""
    options, heavy, pad = settings.distill, settings.finetune.choice_weight, tokenizer.pad_token_id
    rows = encode(data.rows("train"), tokenizer, heavy)
    validation = batches(encode(data.rows("validation"), tokenizer, heavy), options.batch_tokens, pad)
    like = settings.finetune.model_copy(update=options.model_dump(include={"epochs", "batch_tokens", "batch_rows"}))
    plan = plan_batches(rows, like, settings.seed)
    return Lesson(rows, [widen(row, options.prompt_weight) for row in rows], validation, plan, stops, pad)


def widen(example: Example, weight: float) -> Example:
    """The example with its prompt to be predicted, too, at `weight` a token; at weight 0 it stays as it is."""
    if weight == 0:
        return example
    given = len(example.ids) - example.reply
    return Example(example.ids, [weight] * max(0, given - 1) + [w or weight for w in example.weights])


# --- the loop --------------------------------------------------------------------------------------------------------


def train(
    name: str, student: PreTrainedModel, lesson: Lesson, teacher: Teacher | None, settings: Settings, work: Path, share: float
) -> Trained:
    """Train until the plan or the patience ends; the student then holds its best weights. UserError when it diverges."""
    options = settings.distill
    student.train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=options.learning_rate, fused=True)
    write = partial(_save, student)
    state = _Progress.resume(partial(_load, student), optimizer, work)
    first, started, seen, steps = state.step, time.perf_counter(), 0, len(lesson.plan)
    if first:
        print(f"  {name}: resuming at step {first} of {steps}, from {work / 'checkpoint'}")
    with progress(f"distill {name}", total=steps, start=first) as bar:
        for step in range(first, steps):
            if state.looks_without_gain >= options.patience:
                break
            own_words = teacher is not None and is_on_policy(step, steps, options.on_policy_share, settings.seed)
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * schedule(step, steps, options.warmup_share)
            try:
                batch, losses = (
                    on_policy_losses(student, teacher.model, lesson, lesson.plan[step], options, settings.seed + step)
                    if own_words and teacher is not None
                    else row_losses(student, lesson, lesson.plan[step], teacher, options)
                )
                loss = (losses * batch.weights[:, -batch.keep :].flatten()).sum() / batch.weights.sum()
                loss.backward()
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                raise UserError("not enough memory for one batch", f"{name}, step {step}", "Lower distill.batch_tokens") from None
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seen += int(batch.mask.sum())
            state.step, state.on_policy_steps = step + 1, state.on_policy_steps + own_words
            state.loss.append(float(loss.detach()))
            if state.step % options.evaluate_every == 0 or state.step == steps:
                state.look(validation_loss(student, lesson.validation), write, work, "distill.learning_rate")
            bar.update(1, loss=f"{state.loss[-1]:.2f}", best=f"{state.best:.3f}" if state.validation else "-")
            if state.step % options.checkpoint_every == 0:
                state.save(write, optimizer, work)
    seconds = max(time.perf_counter() - started, 1e-9)
    _load(student, work / "best")
    return Trained(
        name=name, folder=str(work / "model"), parameters=student.num_parameters(), share_of_teacher=share, steps=state.step,
        on_policy_steps=state.on_policy_steps, stopped_early=state.step < steps, resumed_at=first,
        best_validation_loss=state.best, validation=state.validation, loss=state.loss, seconds=seconds,
        tokens_per_second=seen / seconds,
    )  # fmt: skip


def is_on_policy(step: int, steps: int, share: float, seed: int) -> bool:
    """A share of all steps, growing from none to twice the share: there is little to learn from what a beginner says."""
    return random.Random(f"{seed}/on-policy/{step}").random() < 2 * share * step / steps


# --- what is lost ----------------------------------------------------------------------------------------------------


def row_losses(
    student: PreTrainedModel, lesson: Lesson, chosen: Sequence[int], teacher: Teacher | None, options: Distill
) -> tuple[Batch, torch.Tensor]:
    """Losses (rows x keep) of some rows: of the task alone without a teacher, else mixed with the divergence from its view."""
    batch = collate(_chosen(lesson.wide, chosen), lesson.pad)
    logits = reply_logits(student, batch)
    labels = batch.labels[:, -batch.keep :].flatten()
    task = F.cross_entropy(logits.flatten(0, 1).float(), labels, ignore_index=-100, reduction="none")
    if teacher is None:
        return batch, task
    ids, log_probs = teacher.cache.batch(chosen, batch.keep)
    apart = divergence(logits, ids, log_probs, options.temperature).flatten()
    return batch, options.task_share * task + (1 - options.task_share) * apart


def divergence(logits: torch.Tensor, ids: torch.Tensor, log_probs: torch.Tensor, temperature: float) -> torch.Tensor:
    """T² KL(teacher ‖ student) in nats, by position; everything outside the teacher's k likeliest tokens is one outcome.

    `logits` (..., vocab) are the student's, `ids` (..., k) and `log_probs` (..., k + 1) the teacher's at this temperature.
    T² keeps the gradient's size independent of the temperature (Hinton et al. 2015, section 2).
    """
    scaled = logits.float() / temperature
    rest = scaled.scatter(-1, ids, float("-inf")).logsumexp(-1, keepdim=True)
    student = torch.cat([scaled.gather(-1, ids), rest], dim=-1) - scaled.logsumexp(-1, keepdim=True)
    return temperature**2 * (log_probs.exp() * (log_probs - student)).sum(-1)


def on_policy_losses(
    student: PreTrainedModel, teacher: PreTrainedModel, lesson: Lesson, chosen: Sequence[int], options: Distill, seed: int
) -> tuple[Batch, torch.Tensor]:
    """T² KL(teacher ‖ student) at every token of what the student replies to the prompts of these rows; sampling is not
    differentiated through."""
    prompts = [prompt_of(row) for row in _chosen(lesson.rows, chosen)]
    replies = sample(student, prompts, options.sample_tokens, lesson.stops, lesson.pad, seed)
    batch = collate([Example(p + r, [1.0] * len(r)) for p, r in zip(prompts, replies, strict=True)], lesson.pad)
    with torch.no_grad():
        right = (reply_logits(teacher, batch).float() / options.temperature).log_softmax(-1)
    said = (reply_logits(student, batch).float() / options.temperature).log_softmax(-1)
    return batch, options.temperature**2 * (right.exp() * (right - said)).sum(-1).flatten()


def prompt_of(example: Example) -> list[int]:
    """Everything up to the last reply of the row."""
    last = 0
    while last < example.reply and example.weights[-1 - last]:
        last += 1
    return example.ids[: len(example.ids) - last]


@torch.no_grad()
def sample(
    student: PreTrainedModel, prompts: Sequence[list[int]], max_tokens: int, stops: Sequence[int], pad: int, seed: int
) -> list[list[int]]:
    """What the student says at temperature 1, up to and with a stop token; at least one token each. Drawn by `seed` alone."""
    target = device()
    dtype = compute_dtype(target)
    chance = torch.Generator(target).manual_seed(seed)
    batch = collate([Example(prompt, [1.0]) for prompt in prompts], pad)
    ids, mask, cache = batch.ids, batch.mask, None
    replies: list[list[int]] = [[] for _ in prompts]
    student.eval()
    for _ in range(max_tokens):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with torch.autocast(target.type, dtype, enabled=dtype != torch.float32):
            step = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "past_key_values": cache}
            out = student(**step, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        ids = torch.multinomial(out.logits[:, -1].float().softmax(-1), 1, generator=chance)
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        for reply, token in zip(replies, ids[:, 0].tolist(), strict=True):
            if not reply or reply[-1] not in stops:
                reply.append(token)
        if all(reply[-1] in stops for reply in replies):
            break
    student.train()
    return replies


# --- checkpoints -----------------------------------------------------------------------------------------------------


@dataclass
class _Progress(Progress):
    on_policy_steps: int = 0


def _save(student: PreTrainedModel, folder: Path) -> None:
    student.save_pretrained(folder, max_shard_size="1TB")


def _load(student: PreTrainedModel, folder: Path) -> None:
    """Weights from a checkpoint's folder; tied matrices are stored once."""
    student.load_state_dict(load_file(folder / "model.safetensors"), strict=False)


def _cache(options: Distill, lesson: Lesson, model: PreTrainedModel, teacher: str, folder: Path) -> TeacherCache:
    weights, kept = sha256_tree(sorted(Path(teacher).glob("*.safetensors"))), (options.top_k, options.temperature)
    return teacher_cache(folder, lesson.wide, model, weights, lesson.pad, *kept, options.batch_tokens)


def _chosen(examples: Sequence[Example], group: Sequence[int]) -> list[Example]:
    return [examples[i] for i in group]
