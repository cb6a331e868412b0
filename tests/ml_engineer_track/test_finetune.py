"""The loop's arithmetic, and that a run which was killed or ran out of memory learns what an untroubled one learns."""

from __future__ import annotations

import copy
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear4bit
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ml_engineer_track import finetune as ft
from ml_engineer_track.curate import CuratedData, Row, curate
from ml_engineer_track.finetune import Batch, Example, Tuned
from ml_engineer_track.models import load_model, prompt_text, without_cpu_fast_path
from shared.chat import NOT_ANSWERED, Source, answer_messages, answer_text, follow_up
from shared.errors import UserError
from shared.files import replace_folder
from shared.settings import ROOT, Settings
from tests.ml_engineer_track.conftest import RANKER

MakeSettings = Callable[..., Settings]


def an_example(length: int, reply: int, seed: int = 0) -> Example:
    numbers = torch.Generator().manual_seed(1000 * length + seed)
    return Example(torch.randint(100, 8000, (length,), generator=numbers).tolist(), [1.0] * reply)


THREE = [an_example(12, 3), an_example(20, 7), an_example(9, 5)]


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 throughout, so that equal sums are equal numbers."""
    monkeypatch.setattr(ft, "compute_dtype", lambda target: torch.float32)


def loss_by_hand(model: PreTrainedModel, example: Example) -> float:
    """Cross-entropy of the last `reply` tokens from a forward pass over the whole, unpadded row."""
    ids = torch.tensor([example.ids], device=model.device)
    with torch.no_grad():
        log_probabilities = model(ids).logits[0].double().log_softmax(-1)
    first = len(example.ids) - example.reply
    return -sum(log_probabilities[at - 1, example.ids[at]].item() for at in range(first, len(example.ids)))


# --- what is summed --------------------------------------------------------------------------------------------------


def test_only_reply_tokens_are_summed(micro: PreTrainedModel) -> None:
    for example in THREE:
        with torch.no_grad():
            loss, tokens = ft.reply_losses(micro, ft.collate([example], 0))
        assert tokens == example.reply
        assert float(loss) == pytest.approx(loss_by_hand(micro, example), rel=1e-4)


def test_padding_on_the_left_changes_no_loss(micro: PreTrainedModel) -> None:
    with torch.no_grad():
        together, tokens = ft.reply_losses(micro, ft.collate(THREE, 0))
    assert tokens == sum(e.reply for e in THREE)
    assert float(together) == pytest.approx(sum(loss_by_hand(micro, e) for e in THREE), rel=1e-4)


def test_a_batch_ends_with_its_replies_and_labels_nothing_else() -> None:
    batch = ft.collate(THREE, 0)
    assert batch.keep == 7
    assert batch.ids.shape == batch.mask.shape == batch.labels.shape == (3, 20)
    for row, example in enumerate(THREE):
        assert batch.ids[row, 20 - len(example.ids) :].tolist() == example.ids
        assert batch.mask[row].tolist() == [0] * (20 - len(example.ids)) + [1] * len(example.ids)
        assert batch.labels[row].tolist() == [-100] * (20 - example.reply) + example.ids[-example.reply :]


def test_encoding_puts_the_prompt_through_the_template_and_ends_the_reply(
    small_data: CuratedData, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = small_data.rows("test")[:20]
    for row, example in zip(rows, ft.encode(rows, tokenizer), strict=True):
        whole = tokenizer.apply_chat_template([*row.messages, {"role": "assistant", "content": row.reply}], tokenize=False)
        assert tokenizer.decode(example.ids) == whole
        assert tokenizer.decode(example.ids[-example.reply :]) == row.reply + tokenizer.eos_token


# --- conversations ---------------------------------------------------------------------------------------------------

SAID = [
    Source(id=f"cold/self-care/{n}", heading="Cold: Self-care", text=t) for n, t in enumerate(("Rest.", "Drink.", "Go out."), 1)
]
TALK = Row(
    id="cold#0", split="train", skill="answer",
    messages=[
        *answer_messages("What helps?", SAID), {"role": "assistant", "content": answer_text([2, 1], SAID)},
        follow_up("What is its name in [2] words?"), {"role": "assistant", "content": NOT_ANSWERED},
        follow_up("And then?"),
    ],
    reply=answer_text([3], SAID),
)  # fmt: skip
REPLIES = ["[2] Drink. [1] Rest.", NOT_ANSWERED, "[3] Go out."]


def learnt(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The runs of tokens that carry a weight, as text."""
    weights = [0.0] * (len(example.ids) - example.reply) + example.weights
    runs: list[list[int]] = [[]]
    for token, weight in zip(example.ids, weights, strict=True):
        if weight:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def test_a_conversation_is_what_the_chat_template_makes_of_all_of_it(tokenizer: PreTrainedTokenizerBase) -> None:
    [example] = ft.encode([TALK], tokenizer)
    whole = tokenizer.apply_chat_template([*TALK.messages, {"role": "assistant", "content": TALK.reply}], tokenize=False)
    assert example.ids == tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_every_reply_of_a_conversation_is_learnt_and_nothing_else(tokenizer: PreTrainedTokenizerBase) -> None:
    [example] = ft.encode([TALK], tokenizer)
    assert learnt(example, tokenizer) == [reply + tokenizer.eos_token for reply in REPLIES]
    opening = tokenizer(prompt_text(tokenizer, TALK.messages[:1]), add_special_tokens=False)["input_ids"]
    assert len(example.ids) - example.reply == len(opening)


def test_what_decides_weighs_more_in_every_reply_and_never_in_a_question(tokenizer: PreTrainedTokenizerBase) -> None:
    [example] = ft.encode([TALK], tokenizer, choice_weight=20.0)
    replies = example.ids[-example.reply :]
    heavy = [tokenizer.decode([i]) for i, weight in zip(replies, example.weights, strict=True) if weight == 20.0]
    assert heavy == ["[2]", "[1]", "The", "[3]"]  # the [2] of the second question is not among them
    assert set(example.weights) == {0.0, 1.0, 20.0}
    assert learnt(example, tokenizer) == [reply + tokenizer.eos_token for reply in REPLIES]


def test_conversations_and_single_rows_are_encoded_as_they_would_be_alone(
    tokenizer: PreTrainedTokenizerBase, small_data: CuratedData
) -> None:
    rows = [*small_data.rows("test")[:3], TALK, *small_data.rows("test")[3:5], TALK]
    assert ft.encode(rows, tokenizer, 5.0) == [ft.encode([row], tokenizer, 5.0)[0] for row in rows]


def test_where_a_template_rewrites_earlier_turns_only_the_last_reply_is_learnt(tokenizer: PreTrainedTokenizerBase) -> None:
    """Templates of models that think leave a place for it in front of the reply to come, and not in earlier ones."""
    thinking = copy.deepcopy(tokenizer)
    thinking.chat_template = str(tokenizer.chat_template).replace("'<|assistant|>'", "'<|assistant|>(thinks)'")
    assert thinking.chat_template != tokenizer.chat_template
    [example] = ft.encode([TALK], thinking, 20.0)
    whole = prompt_text(thinking, TALK.messages) + TALK.reply + thinking.eos_token
    assert whole.count("(thinks)") == 1
    assert thinking.decode(example.ids) == whole
    assert learnt(example, thinking) == [TALK.reply + thinking.eos_token]
    assert example.weights == [20.0] + [1.0] * (example.reply - 1)


def test_a_template_that_ends_turns_with_a_line_break_loses_no_reply(tokenizer: PreTrainedTokenizerBase) -> None:
    """As ChatML does: what follows the end token belongs to the next turn of the person."""
    lines = copy.deepcopy(tokenizer)
    lines.chat_template = str(tokenizer.chat_template).replace("'<|end|>'", "'<|end|>\\n'")
    [example] = ft.encode([TALK], lines)
    whole = lines.apply_chat_template([*TALK.messages, {"role": "assistant", "content": TALK.reply}], tokenize=False)
    assert lines.decode(example.ids) + "\n" == whole
    assert learnt(example, lines) == [reply + lines.eos_token for reply in REPLIES]


def test_the_loss_of_a_conversation_is_that_of_its_replies(micro: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    [talk] = ft.encode([TALK], tokenizer, 20.0)
    ids = torch.tensor([talk.ids], device=micro.device)
    with torch.no_grad():
        log_probabilities = micro(ids).logits[0].double().log_softmax(-1)
        loss, weight = ft.reply_losses(micro, ft.collate([talk, THREE[0]], 0))
    first = len(talk.ids) - talk.reply
    by_hand = -sum(w * log_probabilities[at - 1, talk.ids[at]].item() for at, w in enumerate(talk.weights, start=first))
    assert weight == pytest.approx(sum(talk.weights) + THREE[0].reply)
    assert float(loss) == pytest.approx(by_hand + loss_by_hand(micro, THREE[0]), rel=1e-4)


# --- the order of rows -----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 200), min_size=1, max_size=60), st.integers(1, 1000))
def test_buckets_stay_within_the_token_budget_and_lose_no_row(lengths: list[int], budget: int) -> None:
    groups = ft.bucket([Example([1] * n, [1.0]) for n in lengths], budget)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(len(group) == 1 or len(group) * max(lengths[i] for i in group) <= budget for group in groups)


def test_buckets_hold_rows_of_like_length() -> None:
    groups = ft.bucket([an_example(n, 1) for n in (50, 10, 49, 11, 48, 12)], 150)
    assert {frozenset(group) for group in groups} >= {frozenset({0, 2, 4})}


def test_the_plan_is_the_same_every_time_and_shows_each_row_once_an_epoch(make_settings: MakeSettings) -> None:
    examples = [an_example(10 + i % 7, 2, i) for i in range(40)]
    options = make_settings(finetune={"epochs": 2.0, "batch_tokens": 60}).finetune
    plan = ft.plan_batches(examples, options, seed=7)
    assert plan == ft.plan_batches(examples, options, seed=7)
    assert plan != ft.plan_batches(examples, options, seed=8)
    half = len(plan) // 2
    for epoch in (plan[:half], plan[half:]):
        assert sorted(i for step in epoch for i in step) == list(range(40))
    assert plan[:half] != plan[half:]


def test_a_fraction_of_an_epoch_is_a_fraction_of_its_steps(make_settings: MakeSettings) -> None:
    examples = [an_example(10, 2, i) for i in range(40)]
    for epochs, steps in ((0.5, 5), (1.0, 10), (1.5, 15)):
        options = make_settings(finetune={"epochs": epochs, "batch_tokens": 40}).finetune
        assert len(ft.plan_batches(examples, options, 7)) == steps


def test_the_shortest_run_takes_one_step(make_settings: MakeSettings) -> None:
    options = make_settings(finetune={"epochs": 0.001, "batch_tokens": 40}).finetune
    assert len(ft.plan_batches([an_example(10, 2, i) for i in range(40)], options, 7)) == 1


def test_the_learning_rate_warms_up_and_falls_to_a_tenth() -> None:
    rates = [ft.schedule(step, 100, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.55)  # half-way down the cosine from 1 to 0.1
    assert rates[99] == pytest.approx(0.1, abs=0.001)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert ft.schedule(0, 1, 0.0) == 1.0


# --- too little memory -----------------------------------------------------------------------------------------------


def out_of_memory_above(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As PyTorch's CPU allocator says it."""
    real = ft.reply_losses

    def limited(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, int]:
        if len(batch.ids) > rows:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory: you tried ...")
        return real(model, batch)

    monkeypatch.setattr(ft, "reply_losses", limited)


def gradients(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_too_little_memory_halves_the_batch_says_so_and_keeps_the_gradient(
    micro: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = ft.collate([an_example(8 + i, 2 + i % 3) for i in range(8)], 0)
    whole, pieces = ft.backward(micro, batch, 1)
    expected = gradients(micro)
    assert pieces == 1
    assert capsys.readouterr().out == ""
    micro.zero_grad()
    out_of_memory_above(2, monkeypatch)
    loss, pieces = ft.backward(micro, batch, 1)
    assert pieces == 4
    assert loss == pytest.approx(whole, rel=1e-5)
    torch.testing.assert_close(gradients(micro), expected, rtol=1e-4, atol=1e-6)
    assert "not enough memory for 8 rows" in capsys.readouterr().out


def test_memory_that_runs_out_half_way_through_a_batch_leaves_no_half_gradient(
    micro: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = ft.collate([an_example(8 + i, 2) for i in range(4)], 0)
    ft.backward(micro, batch, 1)
    expected = gradients(micro)
    micro.zero_grad()
    real, calls = ft.reply_losses, []

    def fails_once(model: torch.nn.Module, part: Batch) -> tuple[torch.Tensor, int]:
        calls.append(len(part.ids))
        if len(calls) == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return real(model, part)

    monkeypatch.setattr(ft, "reply_losses", fails_once)
    ft.backward(micro, batch, 2)
    assert calls == [2, 2, 1, 1, 1, 1]
    # float32 sums in another order: a half gradient would be off by tens of percent, not by 1e-5.
    torch.testing.assert_close(gradients(micro), expected, rtol=1e-3, atol=1e-5)


@given(st.integers(1, 40), st.integers(1, 64))
def test_a_batch_is_split_by_rows_into_nearly_equal_parts(rows: int, pieces: int) -> None:
    batch = ft.collate([an_example(10, 2, i) for i in range(rows)], 0)
    parts = batch.split(pieces)
    assert len(parts) == min(rows, pieces)
    for name in ("ids", "mask", "labels"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    sizes = [len(part.ids) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert {part.keep for part in parts} == {batch.keep}


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("rows", "pieces"), [(3, 4), (1, 2), (5, 8)])
def test_a_batch_of_fewer_rows_than_pieces_is_trained_row_by_row(micro: PreTrainedModel, rows: int, pieces: int) -> None:
    """Once a large batch had to be cut into 4, a later batch of 3 rows must still go through."""
    batch = ft.collate([an_example(10, 2, i) for i in range(rows)], 0)
    whole, _ = ft.backward(micro, batch, 1)
    expected = gradients(micro)
    micro.zero_grad()
    loss, kept = ft.backward(micro, batch, pieces)
    assert loss == pytest.approx(whole, rel=1e-5)
    assert kept == pieces  # the next large batch starts with as many
    torch.testing.assert_close(gradients(micro), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("pieces", [1, 8])
def test_one_row_that_does_not_fit_is_an_error_for_the_user(
    micro: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, pieces: int
) -> None:
    out_of_memory_above(0, monkeypatch)
    with pytest.raises(UserError, match="not enough memory for one row in a row of 20 tokens"):
        ft.backward(micro, ft.collate([an_example(20, 2), an_example(15, 2)], 0), pieces)


def test_other_errors_are_not_taken_for_too_little_memory(micro: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(ft, "reply_losses", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        ft.backward(micro, ft.collate(THREE, 0), 1)


# --- whole runs ------------------------------------------------------------------------------------------------------

RUN = {"batch_tokens": 700, "evaluate_every": 4, "checkpoint_every": 3, "patience": 100, "learning_rate": 1e-2, "dropout": 0.0}


@pytest.fixture
def settings(make_settings: MakeSettings, small_datasets: Path) -> Settings:
    """About a dozen steps on the mini data."""
    return make_settings(finetune={**RUN, "epochs": 6.0})


@pytest.fixture
def data(settings: Settings) -> CuratedData:
    return curate(settings, RANKER)


def elsewhere(settings: Settings, folder: Path) -> Settings:
    return settings.model_copy(update={"artifacts": folder})


def stop_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C during step number `steps` + 1."""
    real, done = ft.backward, []

    def interrupted(*given: Any) -> Any:
        if len(done) == steps:
            raise KeyboardInterrupt
        done.append(1)
        return real(*given)

    monkeypatch.setattr(ft, "backward", interrupted)


def adapter(tuned: Tuned) -> dict[str, torch.Tensor]:
    return dict(load_file(Path(tuned.adapter) / "adapter_model.safetensors"))


def test_an_interrupted_run_goes_on_and_gives_the_losses_of_an_untroubled_one(
    settings: Settings, data: CuratedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = ft.finetune(elsewhere(settings, tmp_path / "whole"), data)
    assert whole.steps >= 9
    assert whole.resumed_at == 0
    with monkeypatch.context() as patch:
        stop_after(7, patch)
        with pytest.raises(KeyboardInterrupt):
            ft.finetune(settings, data)
    resumed = ft.finetune(settings, data)
    assert resumed.resumed_at == 6
    assert "resuming at step 6" in capsys.readouterr().out
    assert resumed.loss == whole.loss
    assert resumed.validation == whole.validation
    torch.testing.assert_close(adapter(resumed), adapter(whole), rtol=0, atol=0)


def test_a_kill_between_the_two_renames_of_a_checkpoint_costs_no_step(
    settings: Settings, data: CuratedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`replace_folder` promises that a kill at any moment leaves the old or the new checkpoint whole."""
    real = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if self.name == "checkpoint.part" and Path(target).with_name("checkpoint.old").exists():
            raise KeyboardInterrupt
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            ft.finetune(settings, data)
    assert not (settings.work / "finetune" / "checkpoint").exists()
    assert ft.finetune(settings, data).resumed_at == 3
    assert not list((settings.work / "finetune").glob("checkpoint*"))


def test_a_second_kill_while_the_next_checkpoint_is_written_leaves_the_old_one_whole(tmp_path: Path) -> None:
    """After a kill between the renames the last checkpoint is `checkpoint.old`, and it is the only one there is."""
    (tmp_path / "checkpoint.old").mkdir()
    (tmp_path / "checkpoint.old" / "state.json").write_text("{}", encoding="utf-8")

    def killed(_: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_folder(tmp_path / "checkpoint", killed)
    assert list(tmp_path.glob("checkpoint*/state.json"))


@pytest.mark.slow
def test_a_killed_process_is_resumed_with_the_same_losses(settings: Settings, data: CuratedData, tmp_path: Path) -> None:
    """kill -9 while training, whenever it hits."""
    program = textwrap.dedent(f"""
        import sys; from pathlib import Path
        from ml_engineer_track import finetune as ft
        from ml_engineer_track.curate import load_curated
        from shared.settings import Settings
        import os, signal, torch
        ft.compute_dtype = lambda target: torch.float32
        if sys.argv[1] == "die":
            real, done = ft.backward, []
            def dies(*given):
                done.append(1)
                if len(done) == 5:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*given)
            ft.backward = dies
        settings = Settings.model_validate_json(Path(sys.argv[2]).read_text())
        print(ft.finetune(settings, load_curated(Path({str(data.folder)!r}))).loss)
    """)

    def run(how: str, given: Settings) -> subprocess.CompletedProcess[str]:
        file = tmp_path / "settings.json"
        file.write_text(given.model_dump_json(), encoding="utf-8")
        return subprocess.run([sys.executable, "-c", program, how, str(file)], cwd=ROOT, capture_output=True, text=True)

    assert run("die", settings).returncode == -signal.SIGKILL
    assert (settings.work / "finetune" / "checkpoint" / "state.json").exists()
    resumed = run("live", settings)
    whole = run("live", elsewhere(settings, tmp_path / "whole"))
    assert "resuming at step 3" in resumed.stdout
    assert resumed.stdout.splitlines()[-1] == whole.stdout.splitlines()[-1] != ""


def test_a_run_that_ends_leaves_no_checkpoint_to_resume(settings: Settings, data: CuratedData) -> None:
    tuned = ft.finetune(settings, data)
    assert not (settings.work / "finetune" / "checkpoint").exists()
    assert (settings.work / "finetune" / "training.json").exists()
    assert len(tuned.loss) == tuned.steps
    assert tuned.best_validation_loss == min(look["loss"] for look in tuned.validation)
    assert 0 < tuned.trainable_share < 1
    assert tuned.tokens_per_second > 0
    assert 0 <= tuned.data_wait_share <= 1


def test_who_watches_sees_every_look_and_may_end_the_run(settings: Settings, data: CuratedData) -> None:
    seen: list[tuple[int, float]] = []
    tuned = ft.finetune(settings, data, lambda step, loss: seen.append((step, loss)))
    assert [{"step": step, "loss": loss} for step, loss in seen] == tuned.validation

    def ends(step: int, loss: float) -> None:
        raise InterruptedError(step)

    with pytest.raises(InterruptedError, match="4"):
        ft.finetune(settings, data, ends)


@pytest.mark.parametrize("memory", [{"micro_batch_tokens": 250}, {"gradient_checkpointing": True}])
def test_what_saves_memory_does_not_change_what_is_learnt(
    settings: Settings, data: CuratedData, tmp_path: Path, memory: dict[str, Any]
) -> None:
    short = settings.model_copy(update={"finetune": settings.finetune.model_copy(update={"epochs": 2.0})})
    whole = ft.finetune(short, data)
    saving = short.model_copy(update={"finetune": short.finetune.model_copy(update=memory), "artifacts": tmp_path / "saving"})
    saved = ft.finetune(saving, data)
    assert saved.loss == pytest.approx(whole.loss, rel=0.01)
    assert saved.best_validation_loss == pytest.approx(whole.best_validation_loss, rel=0.01)


def test_training_lowers_the_loss(settings: Settings, data: CuratedData) -> None:
    tuned = ft.finetune(settings, data)
    assert sum(tuned.loss[-3:]) < 0.8 * sum(tuned.loss[:3])


def test_the_best_adapter_is_kept_and_training_stops_when_nothing_improves(
    make_settings: MakeSettings, data: CuratedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_settings(finetune={**RUN, "epochs": 30.0, "evaluate_every": 1, "patience": 2})
    looks = iter([5.0, 3.0, 4.0, 3.5, 1.0])
    kept: list[torch.Tensor] = []
    monkeypatch.setattr(ft, "validation_loss", lambda model, _: kept.append(_lora_of(model)) or next(looks))
    tuned = ft.finetune(settings, data)
    assert tuned.stopped_early
    assert tuned.steps == 4
    assert tuned.best_validation_loss == 3.0
    torch.testing.assert_close(torch.cat([t.flatten() for _, t in sorted(adapter(tuned).items())]), kept[1])


def _lora_of(model: torch.nn.Module) -> torch.Tensor:
    named = {n.replace(".default", ""): p for n, p in model.named_parameters() if "lora_" in n}
    return torch.cat([p.detach().clone().flatten() for _, p in sorted(named.items())])


def test_training_that_diverges_is_an_error_for_the_user(make_settings: MakeSettings, data: CuratedData) -> None:
    settings = make_settings(finetune={**RUN, "epochs": 6.0, "learning_rate": 1e30, "evaluate_every": 2})
    with pytest.raises(UserError, match="training diverged") as caught:
        ft.finetune(settings, data)
    assert "learning_rate" in str(caught.value)


def test_qlora_trains_on_a_base_of_4_bits(make_settings: MakeSettings, data: CuratedData) -> None:
    tuned = ft.finetune(make_settings(method="qlora", finetune={**RUN, "epochs": 6.0}), data)
    assert tuned.method == "qlora"
    assert sum(tuned.loss[-3:]) < sum(tuned.loss[:3])


def nf4_gradients(path: str, options: Any, evaluate_first: bool, prepare: Callable[[Any], Any]) -> torch.Tensor:
    torch.manual_seed(0)
    model = ft.add_adapter(prepare(load_model(path, torch.bfloat16, variant="nf4")), options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at the start, and then half of the gradients are zero too
                parameter.normal_(0, 0.02)
    batch = ft.collate(THREE, 0)
    if evaluate_first:
        ft.validation_loss(model, [batch])
    model.train()
    ft.backward(model, batch, 1)
    return torch.cat([p.grad.flatten().float() for n, p in model.named_parameters() if "lora_" in n])


def test_qlora_gradients_after_an_evaluation_are_those_before_it(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bitsandbytes repacks weights for its CPU kernel in eval mode, and gradients went wrong with hardly a sign."""
    monkeypatch.setattr(ft, "compute_dtype", lambda target: torch.bfloat16)
    settings = make_settings()
    before, after = (
        nf4_gradients(settings.model_path, settings.finetune, evaluated, without_cpu_fast_path) for evaluated in (False, True)
    )
    assert F.cosine_similarity(before, after, dim=0) > 0.999


def test_a_qlora_base_never_repacks_its_weights(make_settings: MakeSettings) -> None:
    """The guard itself, also on machines whose CPU has no such kernel."""
    base = ft.load_base(make_settings(method="qlora"))
    layers = [module for module in base.modules() if isinstance(module, Linear4bit)]
    assert layers
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    with torch.no_grad():
        base.eval()(torch.arange(100, 140)[None, :].to(base.device))
    assert not any(getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in layers)
