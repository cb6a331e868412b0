"""The lesson's arithmetic, its samples, and that a run which was killed learns what an untroubled one learns."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ml_engineer_track import distill as ds
from ml_engineer_track import finetune as ft
from ml_engineer_track.curate import CuratedData, curate
from ml_engineer_track.distill import Lesson, Teacher
from ml_engineer_track.finetune import Example
from ml_engineer_track.gguf_export import FILE_NAME
from ml_engineer_track.models import load_model
from ml_engineer_track.teacher_cache import teacher_cache
from shared.errors import UserError
from shared.settings import Settings
from tests.ml_engineer_track.conftest import RANKER

MakeSettings = Callable[..., Settings]
SMALL = {
    "hidden": 16, "layers": 1, "intermediate": 64, "evaluate_every": 4, "checkpoint_every": 2, "on_policy_share": 0.4,
    "batch_tokens": 1024, "batch_rows": 4, "sample_tokens": 4, "epochs": 6.0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ft, "compute_dtype", lambda target: torch.float32)
    monkeypatch.setattr(ds, "compute_dtype", lambda target: torch.float32)


def an_example(length: int, reply: int, seed: int = 0) -> Example:
    numbers = torch.Generator().manual_seed(1000 * length + seed)
    return Example(torch.randint(100, 8000, (length,), generator=numbers).tolist(), [1.0] * reply)


# --- the divergence --------------------------------------------------------------------------------------------------


def test_the_divergence_is_what_a_pencil_says() -> None:
    """Four tokens, T = 2, the teacher's two likeliest kept: 3 with 1/2, 0 with 1/4, the other two together 1/4."""
    logits = torch.tensor([[0.0, 2 * math.log(2), 0.0, 2 * math.log(4)]])  # softened: 1/8, 2/8, 1/8, 4/8
    ids = torch.tensor([[3, 0]])
    log_probs = torch.tensor([[0.5, 0.25, 0.25]]).log()
    by_hand = 4 * (0.5 * math.log(0.5 / 0.5) + 0.25 * math.log(0.25 / 0.125) + 0.25 * math.log(0.25 / 0.375))
    assert ds.divergence(logits, ids, log_probs, 2.0).item() == pytest.approx(by_hand, rel=1e-5)


def test_a_student_that_agrees_loses_nothing_and_any_other_something() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 50)
    scaled = (logits / 2).log_softmax(-1)
    best = scaled.topk(7)
    rest = torch.log1p(-best.values.exp().sum(-1, keepdim=True))
    log_probs = torch.cat([best.values, rest], -1)
    assert ds.divergence(logits, best.indices, log_probs, 2.0).abs().max() < 1e-4
    assert (ds.divergence(torch.randn(6, 50), best.indices, log_probs, 2.0) > 0.01).all()


def test_with_one_token_left_over_it_is_the_whole_divergence() -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(5, 9), torch.randn(5, 9)
    right, said = teacher.log_softmax(-1), student.log_softmax(-1)
    best = right.topk(9).indices
    whole = (right.exp() * (right - said)).sum(-1)
    torch.testing.assert_close(ds.divergence(student, best[:, :8], right.gather(-1, best), 1.0), whole)


# --- rows ------------------------------------------------------------------------------------------------------------


def test_a_wide_example_predicts_its_prompt_too_at_a_lower_weight() -> None:
    talk = Example([1, 2, 3, 4, 5, 6, 7], [20.0, 1.0, 0.0, 1.0])
    assert ds.widen(talk, 0.1) == Example(talk.ids, [0.1, 0.1, 20.0, 1.0, 0.1, 1.0])
    assert ds.widen(talk, 0.0) == talk


def test_a_prompt_ends_where_the_last_reply_begins() -> None:
    assert ds.prompt_of(Example([1, 2, 3, 4, 5, 6, 7], [20.0, 1.0, 0.0, 1.0, 1.0])) == [1, 2, 3, 4, 5]
    assert ds.prompt_of(Example([1, 2, 3], [1.0])) == [1, 2]


def lesson_of(rows: list[Example], weight: float = 0.1) -> Lesson:
    return Lesson(rows, [ds.widen(row, weight) for row in rows], [], [list(range(len(rows)))], [1], 0)


@torch.no_grad()
def test_rows_lose_together_what_they_lose_alone(micro: PreTrainedModel, make_settings: MakeSettings, tmp_path: Path) -> None:
    """Padding, prompts and the cache's alignment change nothing; no loss of a padded place is anything but finite."""
    options = make_settings(distill=SMALL).distill
    lesson = lesson_of([an_example(12, 3), an_example(20, 7), an_example(9, 5)])
    cache = teacher_cache(tmp_path, lesson.wide, load_model(micro.name_or_path, torch.float32), "w", 0, 8, 2.0, 512)
    torch.manual_seed(1)
    for parameter in micro.parameters():  # the student is not its teacher
        parameter.add_(torch.randn_like(parameter) * 0.02)

    def summed(chosen: list[int]) -> float:
        batch, losses = ds.row_losses(micro, lesson, chosen, Teacher(micro, cache), options)
        assert torch.isfinite(losses).all()
        return float((losses * batch.weights[:, -batch.keep :].flatten()).sum())

    assert summed([2, 0, 1]) == pytest.approx(sum(summed([i]) for i in range(3)), rel=1e-4)


# --- the student's own words -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_samples_are_what_generate_says(micro: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the likeliest token for every draw, rows of different lengths get what `generate` gives each alone."""
    monkeypatch.setattr(torch, "multinomial", lambda p, n, generator: p.argmax(-1, keepdim=True))
    prompts = [an_example(9, 1).ids, an_example(17, 1).ids]
    wanted = [
        micro.generate(torch.tensor([p]), max_new_tokens=6, do_sample=False, eos_token_id=1, pad_token_id=0)[0, len(p) :].tolist()
        for p in prompts
    ]
    assert ds.sample(micro, prompts, 6, [1], 0, seed=0) == wanted


def test_samples_are_drawn_by_their_seed_and_end_at_a_stop_token(micro: PreTrainedModel) -> None:
    prompts = [an_example(9, 1).ids, an_example(17, 1).ids]
    first = ds.sample(micro, prompts, 8, [1], 0, seed=3)
    assert first == ds.sample(micro, prompts, 8, [1], 0, seed=3)
    assert first != ds.sample(micro, prompts, 8, [1], 0, seed=4)
    ended = ds.sample(micro, prompts, 8, [first[0][2], first[1][4]], 0, seed=3)
    assert ended == [first[0][:3], first[1][:5]]
    assert micro.training


def test_own_words_become_more_frequent_and_reach_their_share() -> None:
    chosen = [ds.is_on_policy(step, 4000, 0.2, 7) for step in range(4000)]
    assert sum(chosen) / 4000 == pytest.approx(0.2, abs=0.02)
    assert sum(chosen[:1000]) < sum(chosen[-1000:]) / 3
    assert not any(ds.is_on_policy(step, 100, 0.0, 7) for step in range(100))


@torch.no_grad()
def test_own_words_lose_what_the_teacher_would_not_have_said(
    micro: PreTrainedModel, make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T² KL(teacher ‖ student) at each token of the student's replies, worked out one reply at a time and without padding."""
    options = make_settings(distill=SMALL).distill.model_copy(update={"temperature": 1.5})
    teacher = load_model(micro.name_or_path, torch.float32)
    torch.manual_seed(1)
    for parameter in micro.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    said = [[11, 12, 13], [14, 15, 16, 17, 18]]
    monkeypatch.setattr(ds, "sample", lambda student, *_: said if student is micro else None)
    lesson = lesson_of([an_example(12, 3), an_example(20, 7)])
    batch, losses = ds.on_policy_losses(micro, teacher, lesson, [0, 1], options, seed=5)
    found = losses.view(2, batch.keep)
    for row, reply in enumerate(said):
        ids = torch.tensor([[*ds.prompt_of(lesson.rows[row]), *reply]])
        right, ours = ((model(ids).logits[0, -len(reply) - 1 : -1].double() / 1.5).log_softmax(-1) for model in (teacher, micro))
        by_hand = 2.25 * (right.exp() * (right - ours)).sum(-1)
        assert (by_hand > 1e-3).all()
        torch.testing.assert_close(found[row, -len(reply) :].double(), by_hand, rtol=1e-3, atol=1e-4)
        assert batch.weights[row].sum() == len(reply)  # nothing before the reply counts
    assert ds.on_policy_losses(micro, micro, lesson, [0, 1], options, seed=5)[1].abs().max() < 1e-5


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture
def settings(make_settings: MakeSettings) -> Settings:
    return make_settings(distill=SMALL)


@pytest.fixture
def data(settings: Settings) -> CuratedData:
    return curate(settings, RANKER)


def killed_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ds.schedule

    def schedule(now: int, *rest: float) -> float:
        if now == step:
            raise KeyboardInterrupt
        return real(now, *rest)

    monkeypatch.setattr(ds, "schedule", schedule)


def test_sides_differ_in_one_thing_each(settings: Settings, data: CuratedData, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same architecture, same rows, same plan; no-teacher starts where the student starts, and only the student is taught."""
    started: dict[str, tuple[dict[str, torch.Tensor], Lesson, Teacher | None]] = {}

    class EnoughError(Exception):
        pass

    def train(name: str, learner: PreTrainedModel, lesson: Lesson, teacher: Teacher | None, *_: object) -> None:
        started[name] = ({key: value.clone() for key, value in learner.state_dict().items()}, lesson, teacher)
        assert learner.generation_config.eos_token_id == load_model(settings.model).generation_config.eos_token_id
        raise EnoughError

    monkeypatch.setattr(ds, "train", train)
    for name in (ds.STUDENT, ds.NO_TEACHER, ds.FROM_SCRATCH):
        with pytest.raises(EnoughError):
            ds.distill(settings, data, settings.model, name)
    student, alone, scratch = (started[name] for name in (ds.STUDENT, ds.NO_TEACHER, ds.FROM_SCRATCH))
    assert [side[2] is not None for side in (student, alone, scratch)] == [True, False, False]
    for side in (alone, scratch):
        assert all(getattr(side[1], part) == getattr(student[1], part) for part in ("rows", "wide", "plan", "stops"))
    assert len(student[1].plan) > 6
    torch.testing.assert_close(student[0], alone[0], rtol=0, atol=0)
    assert {key: value.shape for key, value in scratch[0].items()} == {key: value.shape for key, value in student[0].items()}
    embeddings = [side[0]["model.embed_tokens.weight"] for side in (student, scratch)]
    assert not torch.allclose(embeddings[0], embeddings[1], atol=1e-3)


@torch.no_grad()
def test_without_a_teacher_rows_lose_the_task_alone(micro: PreTrainedModel, make_settings: MakeSettings) -> None:
    lesson = lesson_of([an_example(12, 3), an_example(20, 7)], weight=0.0)
    options = make_settings(distill=SMALL).distill
    batch, losses = ds.row_losses(micro, lesson, [0, 1], None, options)
    for row, example in enumerate(lesson.rows):
        ids = torch.tensor(example.ids)
        right = micro(ids[None]).logits[0, -example.reply - 1 : -1].log_softmax(-1).gather(-1, ids[-example.reply :, None])
        torch.testing.assert_close(losses.view(2, batch.keep)[row, -example.reply :], -right[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [ds.STUDENT, ds.NO_TEACHER])
def test_a_resumed_run_has_the_same_losses(
    settings: Settings, data: CuratedData, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    name: str,
) -> None:  # fmt: skip
    teacher = settings.model
    whole = ds.distill(settings.model_copy(update={"artifacts": tmp_path / "other"}), data, teacher, name)
    assert whole.steps > 6
    assert (whole.on_policy_steps > 0) == (name == ds.STUDENT)
    with monkeypatch.context() as patch:
        killed_at(5, patch)
        with pytest.raises(KeyboardInterrupt):
            ds.distill(settings, data, teacher, name)
    again = ds.distill(settings, data, teacher, name)
    assert again.resumed_at == 4
    assert "resuming at step 4" in capsys.readouterr().out
    assert again.loss == whole.loss
    assert again.validation == whole.validation
    assert again.on_policy_steps == whole.on_policy_steps
    folder = settings.work / f"distill-{name}"
    left = {"model", ds.SERVED_STUDENT} if name == ds.STUDENT else {"model"}
    assert {path.name for path in folder.iterdir()} == left
    student = load_model(again.folder)
    assert student.num_parameters() == again.parameters
    assert again.parameters / load_model(teacher).num_parameters() == again.share_of_teacher
    if name == ds.STUDENT:
        assert (folder / ds.SERVED_STUDENT / FILE_NAME).exists()


def test_a_student_learns(settings: Settings, data: CuratedData) -> None:
    side = ds.distill(settings, data, settings.model)
    assert side.validation[-1]["loss"] < 0.95 * side.validation[0]["loss"]
    assert side.share_of_teacher <= 1 / 3


def test_a_student_with_another_tokenizer_is_refused_before_any_training(
    settings: Settings, data: CuratedData, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    other = AutoTokenizer.from_pretrained(settings.model)
    other.add_tokens(["<|new|>"])
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"the tokenizers differ \(8192 and 8193 tokens.* must share one tokenizer") as caught:
        ds.distill(settings, data, settings.model, student=str(tmp_path / "other"))
    assert "\n" not in str(caught.value)
    assert not list(settings.artifacts.rglob("distill-*"))


def test_a_student_of_more_than_a_third_is_refused(make_settings: MakeSettings, data: CuratedData) -> None:
    large = make_settings(distill={**SMALL, "hidden": 32})
    with pytest.raises(UserError, match="at most a third is allowed"):
        ds.distill(large, data, large.model)
    whole = make_settings(distill=SMALL)
    with pytest.raises(UserError, match="at most a third is allowed"):  # a model to start from is held to it, too
        ds.distill(whole, data, whole.model, student=whole.model)


def test_a_diverged_run_is_an_error_for_the_user(settings: Settings, data: CuratedData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ds, "validation_loss", lambda *_: math.nan)
    with pytest.raises(UserError, match=r"training diverged .* Lower distill.learning_rate"):
        ds.distill(settings, data, settings.model)


def test_too_little_memory_is_an_error_for_the_user(
    settings: Settings, data: CuratedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(ds, "row_losses", full)
    with pytest.raises(UserError, match=r"not enough memory for one batch .* Lower distill.batch_tokens"):
        ds.distill(settings, data, settings.model, ds.NO_TEACHER)


def test_patience_ends_a_run_with_its_best_weights(
    settings: Settings, data: CuratedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, seen = iter([2.0, 3.0, 4.0, 5.0, 6.0]), []

    def look(student: PreTrainedModel, _: object) -> float:
        seen.append(student.model.embed_tokens.weight.detach().to(torch.bfloat16).float())
        return next(losses)

    monkeypatch.setattr(ds, "validation_loss", look)
    impatient = settings.model_copy(update={"distill": settings.distill.model_copy(update={"patience": 1, "evaluate_every": 2})})
    side = ds.distill(impatient, data, settings.model, ds.NO_TEACHER)
    assert side.stopped_early
    assert side.steps == 4
    assert side.best_validation_loss == 2.0
    kept = load_model(side.folder, torch.float32).model.embed_tokens.weight
    assert torch.equal(kept, seen[0])
    assert not torch.equal(kept, seen[1])
