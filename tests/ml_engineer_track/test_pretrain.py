"""Making a base model: resumable to the last digit, a loss of two means, and a folder anybody can load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ml_engineer_track import pretrain as pt
from ml_engineer_track.corpus import Corpus
from ml_engineer_track.models import load_model
from ml_engineer_track.pretrain_data import USER, Batches, write_token_files
from ml_engineer_track.reading import Exercises
from ml_engineer_track.ship_base import ship
from shared.settings import BASE_MODEL

TEST = pt.EDITIONS["test"]
Run = Callable[..., Path]


def with_steps(edition: pt.Edition, steps: int) -> pt.Edition:
    """The same edition, every stage shortened or lengthened so that all have about `steps` in sum."""
    factor = steps / edition.steps
    return replace(edition, stages=tuple(replace(s, steps=max(1, round(s.steps * factor))) for s in edition.stages))


FIFTY = with_steps(TEST, 50)


@pytest.fixture(scope="module")
def run(corpus: Corpus, exercises: Exercises, own: PreTrainedTokenizerBase, pretrained: Path) -> Run:
    """Train fifty steps in a folder, with a checkpoint at 25."""
    tokens = write_token_files(corpus, own, pretrained / "tokens")
    held_out = Exercises(corpus, held_out=True)

    def train(work: Path, checkpoint_every: int = 25) -> Path:
        work.mkdir(parents=True, exist_ok=True)
        model = pt.new_model(FIFTY, own)
        return pt.train(model, own, exercises, held_out, tokens, FIFTY, work, checkpoint_every=checkpoint_every)

    return train


@pytest.fixture(scope="module")
def untroubled(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifty steps in one go."""
    return run(tmp_path_factory.mktemp("untroubled")).parent


def log_of(work: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (work / "log.jsonl").read_text(encoding="utf-8").splitlines()]


# --- the run ---------------------------------------------------------------------------------------------------------


def test_the_stages_follow_each_other() -> None:
    assert [TEST.stage_at(step).name for step in range(8)] == ["copy"] * 4 + ["anneal"] * 4
    assert TEST.stage_at(99).name == "anneal"
    for edition in pt.EDITIONS.values():
        assert edition.steps == sum(stage.steps for stage in edition.stages)
        assert all(sum(stage.mix.values()) == pytest.approx(1.0) for stage in edition.stages)


def test_the_learning_rate_warms_up_stays_and_decays() -> None:
    edition = replace(with_steps(TEST, 1000), warmup=100, decay_share=0.3)
    scale = [pt.learning_rate_scale(edition, step) for step in range(edition.steps)]
    assert scale[:3] == pytest.approx([0.01, 0.02, 0.03])
    assert scale[99:700] == pytest.approx([1.0] * 601)
    assert scale[850] == pytest.approx(1 - 0.95 / 2)
    assert scale[-1] == pytest.approx(0.05, abs=0.01)
    assert scale[700:] == sorted(scale[700:], reverse=True)


def test_a_teacher_is_asked_only_by_editions_that_have_one(
    corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path | None] = []
    monkeypatch.setattr(Corpus, "add_matches", lambda self, cache=None: asked.append(cache))
    monkeypatch.setattr(pt, "train", lambda *given: given[-1] / "model")
    for teacher in (False, True):
        pt.pretrain(corpus_folder, replace(TEST, teacher=teacher), tmp_path)
        assert asked == ([tmp_path / "matches.npz"] if teacher else [])


def test_the_loss_is_a_weighted_mean_over_replies_and_a_mean_over_given_text(
    exercises: Exercises, own: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pt, "compute_dtype", lambda target: torch.float32)
    one = replace(TEST, stages=(pt.Stage("only", 1, 256, 4, {"find": 0.5, "quiz": 0.5}, 0.1),))
    model = pt.new_model(one, own)
    ids, replies, language = Batches(exercises, {}, own, one)[0]
    with torch.no_grad():
        log_probabilities = model(ids, use_cache=False).logits.double().log_softmax(-1)
    losses = -log_probabilities[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    weights = replies[:, 1:].double()
    pt.train(pt.new_model(one, own), own, exercises, exercises, {}, one, tmp_path)
    (row,) = log_of(tmp_path)
    assert row["loss"] == pytest.approx(float((losses * weights).sum() / weights.sum()), abs=1e-3)
    assert row["language_loss"] == pytest.approx(float(losses[language[:, 1:]].mean()), abs=1e-3)


def test_given_text_counts_for_as_much_as_the_stage_says(
    exercises: Exercises, own: PreTrainedTokenizerBase, corpus: Corpus, pretrained: Path, tmp_path: Path
) -> None:
    """A step of text alone moves nothing when text has no weight, and its loss over no replies is 0 and no division by it."""
    tokens = write_token_files(corpus, own, pretrained / "tokens")
    moved = []
    for weight in (0.0, 0.5):
        text = replace(TEST, warmup=1, stages=(pt.Stage("only", 1, 64, 4, {"language": 1.0}, weight),))
        work = tmp_path / str(weight)
        work.mkdir()
        pt.train(pt.new_model(text, own), own, exercises, exercises, tokens, text, work)
        (row,) = log_of(work)
        assert row["loss"] == 0.0
        assert row["language_loss"] > 1.0
        before = pt.new_model(text, own).get_input_embeddings().weight
        moved.append(not torch.equal(weights(work)["model.embed_tokens.weight"], before))
    assert moved == [False, True]


def test_training_lowers_the_loss_and_reports_its_speed(untroubled: Path) -> None:
    rows = log_of(untroubled)
    assert [row["step"] for row in rows] == [25, 50]
    assert rows[0]["loss"] < np.log(TEST.vocab) + 0.5
    assert rows[1]["language_loss"] < rows[0]["language_loss"] < np.log(TEST.vocab) + 0.5
    for row in rows:
        assert row["tokens_per_second"] > 0
        assert 0 <= row["data_wait_share"] <= 1
    assert {"copy", "find", "squad_reading", "medquad_reading"} <= set(rows[-1])


@pytest.mark.parametrize("stop", [27, 49])
def test_an_interrupted_run_goes_on_and_gives_the_losses_and_weights_of_an_untroubled_one(
    run: Run, untroubled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stop: int
) -> None:
    real = pt.learning_rate_scale

    def interrupted(edition: pt.Edition, step: int) -> float:
        if step == stop:
            raise KeyboardInterrupt
        return real(edition, step)

    with monkeypatch.context() as patch:
        patch.setattr(pt, "learning_rate_scale", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    run(tmp_path)
    assert "resuming at step 25 of 50" in capsys.readouterr().out
    wanted, found = (
        [(row["step"], row["loss"], row["language_loss"]) for row in log_of(work)] for work in (untroubled, tmp_path)
    )
    assert found == wanted
    torch.testing.assert_close(weights(tmp_path), weights(untroubled), rtol=0, atol=0)


def weights(work: Path) -> dict[str, torch.Tensor]:
    return dict(pt.load_file(work / "checkpoint" / "model.safetensors"))


def test_a_kill_between_the_two_renames_of_a_checkpoint_costs_no_step(
    run: Run, untroubled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if self.name == "checkpoint.part" and (tmp_path / "checkpoint.old").exists():
            raise KeyboardInterrupt
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    run(tmp_path)
    assert "resuming at step 25 of 50" in capsys.readouterr().out
    torch.testing.assert_close(weights(tmp_path), weights(untroubled), rtol=0, atol=0)


def test_a_finished_run_is_not_trained_further(run: Run, untroubled: Path, tmp_path: Path) -> None:
    work = Path(shutil.copytree(untroubled, tmp_path / "work"))
    run(work)
    assert log_of(work) == log_of(untroubled)
    torch.testing.assert_close(weights(work), weights(untroubled), rtol=0, atol=0)


# --- what is shipped -------------------------------------------------------------------------------------------------


def test_a_shipped_folder_loads_with_plain_auto_classes(pretrained: Path, tmp_path: Path) -> None:
    folder = ship(pretrained, tmp_path / "base")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False).startswith(USER)
    saved = AutoModelForCausalLM.from_pretrained(pretrained / "model", dtype=torch.bfloat16)
    torch.testing.assert_close(dict(model.state_dict()), dict(saved.state_dict()), rtol=0, atol=0)


def test_shipping_again_replaces_what_is_there(pretrained: Path, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "stale.safetensors").write_bytes(b"x")
    folder = ship(pretrained, tmp_path / "base")
    assert not (folder / "stale.safetensors").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


# --- the bundled model -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundled() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(BASE_MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def bundled_tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)
    tokenizer.padding_side = "left"
    return tokenizer


def prompts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    asked = ["Copy: the old river moves", "What is a fever?", "Copy: one two three four five six seven eight nine ten"]
    return [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        for text in asked
    ]


def test_the_bundled_model_is_small_enough_for_a_repository() -> None:
    files = [p for p in BASE_MODEL.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 40_000_000
    assert max(p.stat().st_size for p in files) <= 15 * 2**20
    assert not [p for p in files if p.suffix in (".bin", ".pt", ".pkl", ".py")]


def test_the_bundled_model_is_a_llama_with_tied_embeddings(bundled: PreTrainedModel) -> None:
    assert type(bundled).__name__ == "LlamaForCausalLM"
    assert bundled.get_input_embeddings().weight.data_ptr() == bundled.get_output_embeddings().weight.data_ptr()
    assert all(p.isfinite().all() for p in bundled.parameters())


def test_padding_on_the_left_changes_no_reply(bundled: PreTrainedModel, bundled_tokenizer: PreTrainedTokenizerBase) -> None:
    texts = prompts(bundled_tokenizer)
    batch = bundled_tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
    together = bundled.generate(**batch, max_new_tokens=12, do_sample=False)[:, batch["input_ids"].shape[1] :]
    for row, text in zip(together, texts, strict=True):
        one = bundled_tokenizer(text, add_special_tokens=False, return_tensors="pt")
        alone = bundled.generate(**one, max_new_tokens=12, do_sample=False)[0, one["input_ids"].shape[1] :]
        assert bundled_tokenizer.decode(row, skip_special_tokens=True) == bundled_tokenizer.decode(
            alone, skip_special_tokens=True
        )


def test_replies_with_and_without_the_cache_agree(bundled: PreTrainedModel, bundled_tokenizer: PreTrainedTokenizerBase) -> None:
    for text in prompts(bundled_tokenizer):
        one = bundled_tokenizer(text, add_special_tokens=False, return_tensors="pt")
        with_cache, without = (
            bundled.generate(**one, max_new_tokens=12, do_sample=False, use_cache=cache).tolist() for cache in (True, False)
        )
        assert with_cache == without


def test_the_bundled_model_in_4_bits_is_saved_and_loaded_back(tmp_path: Path) -> None:
    model = load_model(str(BASE_MODEL), variant="nf4")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(100, 130)[None, :]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, loaded(ids).logits)
    assert sum(p.stat().st_size for p in tmp_path.glob("*.safetensors")) < 0.6 * sum(
        p.stat().st_size for p in BASE_MODEL.glob("*.safetensors")
    )
