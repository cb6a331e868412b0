"""What the base model is shown: a tokenizer that loses nothing, batches fixed by the seed, weight on what is a choice."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ml_engineer_track import pretrain as pt
from ml_engineer_track import pretrain_data as pd
from ml_engineer_track.corpus import Corpus, load_corpus
from ml_engineer_track.pretrain_data import ASSISTANT, END, PAD, USER, Batches, encode
from ml_engineer_track.reading import Exercise, Exercises
from shared.chat import MAX_SOURCES, NOT_ANSWERED, answer_messages, choices
from shared.settings import BASE_MODEL

TEST = pt.EDITIONS["test"]
#: ids, reply weight and language mask of one row, without its padding
Shown = tuple[list[int], list[float], list[bool]]


@pytest.fixture(scope="module")
def tokens(corpus: Corpus, own: PreTrainedTokenizerBase, pretrained: Path) -> dict[str, np.ndarray]:
    return pd.write_token_files(corpus, own, pretrained / "tokens")


def shown(exercises: Exercises, own: PreTrainedTokenizerBase, kind: str, length: int = 256, rows: int = 8) -> list[Shown]:
    """Rows of exercises of one kind."""
    only = replace(TEST, stages=(pt.Stage("only", 1, length, rows, {kind: 1.0}, 0.1),))
    ids, replies, language = Batches(exercises, {}, own, only)[0]
    ends = (ids != own.pad_token_id).sum(1).tolist()
    return [(i[:n].tolist(), w[:n].tolist(), t[:n].tolist()) for i, w, t, n in zip(ids, replies, language, ends, strict=True)]


def marks(own: PreTrainedTokenizerBase) -> set[int]:
    return {own.convert_tokens_to_ids(f"[{n}]") for n in range(1, MAX_SOURCES + 1)}


# --- the tokenizer ---------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(st.text(alphabet=st.characters(codec="utf-8")))
@example("👩‍🔬 is 38.5 °C\u2028 \x00\x07\x1b[0m\r\n\t  \u200d e\u0301 \ud7ff\U0010ffff")
@example("  two  spaces\n\n\nand lines \u00a0 ")
@example("[1][60] [61] [0] [ 1 ]")
def test_the_tokenizer_gives_back_any_text(own: PreTrainedTokenizerBase, text: str) -> None:
    assert own.decode(own(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize("text", ["é", "😀", "\x00", "日本", "٣", "\u2028"])
def test_text_the_tokenizer_has_never_seen_is_bytes_and_not_lost(own: PreTrainedTokenizerBase, text: str) -> None:
    ids = own(text, add_special_tokens=False)["input_ids"]
    assert 1 <= len(ids) <= len(text.encode())
    assert own.decode(ids) == text


@pytest.mark.parametrize("which", ["test", "bundled"])
def test_every_citation_mark_is_one_token(own: PreTrainedTokenizerBase, which: str) -> None:
    tokenizer = own if which == "test" else AutoTokenizer.from_pretrained(BASE_MODEL)
    marks = [tokenizer(f"[{n}]", add_special_tokens=False)["input_ids"] for n in range(1, MAX_SOURCES + 1)]
    assert {len(ids) for ids in marks} == {1}
    assert len({ids[0] for ids in marks}) == MAX_SOURCES
    assert len(tokenizer(f"[{MAX_SOURCES + 1}]", add_special_tokens=False)["input_ids"]) > 1


def test_a_number_is_read_digit_by_digit(own: PreTrainedTokenizerBase) -> None:
    assert len(own("38512", add_special_tokens=False)["input_ids"]) == 5


def test_the_vocabulary_has_the_size_asked_for(own: PreTrainedTokenizerBase) -> None:
    assert len(own) <= TEST.vocab
    assert own.pad_token == PAD
    assert own.eos_token == END


def test_an_encoded_exercise_is_what_the_chat_template_makes_of_it(own: PreTrainedTokenizerBase, exercises: Exercises) -> None:
    """Training writes the template out by hand; serving uses the template. They must never differ by a token."""
    made = [exercises.make(kind, random.Random(n), 200) for kind in exercises.kinds for n in range(3)]
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    made += [Exercise("find", answer_messages("Why?", []), "None."), Exercise("chat", system, "Hello\n you")]
    for given_exercise in made:
        prompt, reply = encode(given_exercise, own)
        messages = given_exercise.messages
        text = own.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert prompt == own(text, add_special_tokens=False)["input_ids"]
        whole = own.apply_chat_template([*messages, {"role": "assistant", "content": given_exercise.reply}], tokenize=False)
        assert prompt + reply == own(whole, add_special_tokens=False)["input_ids"]


# --- token files and language ----------------------------------------------------------------------------------------


def test_token_files_hold_the_documents_each_ended(own: PreTrainedTokenizerBase, corpus_folder: Path, pretrained: Path) -> None:
    documents = load_corpus(corpus_folder, TEST.chars_per_source).documents
    for name, texts in documents.items():
        stream = np.fromfile(pretrained / "tokens" / f"{name}.bin", dtype=np.uint16)
        assert own.decode(stream) == "".join(text + END for text in texts)


def test_the_shares_of_the_language_rows_name_every_source_and_sum_to_one(corpus: Corpus) -> None:
    assert set(pd.LANGUAGE_MIX) == set(corpus.documents)
    assert sum(pd.LANGUAGE_MIX.values()) == pytest.approx(1.0)


def test_a_language_row_is_a_run_of_one_source_and_all_of_it_counts(
    exercises: Exercises, own: PreTrainedTokenizerBase, tokens: dict[str, np.ndarray]
) -> None:
    only = replace(TEST, stages=(pt.Stage("only", 1, 32, 12, {"language": 1.0}, 0.1),))
    ids, replies, language = Batches(exercises, tokens, own, only)[0]
    streams = [stream.tobytes() for stream in tokens.values()]
    assert all(any(row.numpy().astype(np.uint16).tobytes() in stream for stream in streams) for row in ids)
    assert language.all()
    assert not replies.any()


# --- batches ---------------------------------------------------------------------------------------------------------


def test_a_batch_is_the_same_every_time_and_weighs_no_padding(
    own: PreTrainedTokenizerBase, exercises: Exercises, tokens: dict[str, np.ndarray]
) -> None:
    batches = Batches(exercises, tokens, own, TEST)
    assert len(batches) == 8
    for step in (0, 5):
        stage = TEST.stage_at(step)
        ids, replies, language = batches[step]
        assert ids.shape == replies.shape == language.shape == (stage.batch, stage.length)
        assert (ids.dtype, replies.dtype, language.dtype) == (torch.int64, torch.float32, torch.bool)
        assert all(torch.equal(a, b) for a, b in zip(batches[step], Batches(exercises, tokens, own, TEST)[step], strict=True))
        assert not torch.equal(ids, batches[step + 1][0])
        padding = ids == own.pad_token_id
        assert not replies[padding].any()
        assert not language[padding].any()
        assert set(replies.unique().tolist()) <= {0.0, 1.0, TEST.mark_weight}


@pytest.mark.parametrize("kind", ["copy", "find", "quiz", "consult", "index", "claim"])
def test_the_prompt_is_given_text_and_the_rest_is_reply(exercises: Exercises, own: PreTrainedTokenizerBase, kind: str) -> None:
    for ids, replies, language in shown(exercises, own, kind, length=512):
        prompt = ids.index(own.convert_tokens_to_ids(ASSISTANT)) + 1
        assert language == [True] * prompt + [False] * (len(ids) - prompt)
        assert not any(replies[:prompt])
        assert any(replies[prompt:])
        assert ids[-1] == own.eos_token_id


@pytest.mark.parametrize("kind", ["lookup", "find", "consult", "medquad_reading"])
def test_a_citation_mark_weighs_more_than_the_words_it_chooses(
    own: PreTrainedTokenizerBase, exercises: Exercises, kind: str
) -> None:
    quotes = 0
    for ids, replies, _ in shown(exercises, own, kind, length=512):
        first = ids.index(own.convert_tokens_to_ids(ASSISTANT)) + 1
        if ids[first] in marks(own):
            quotes += 1
            assert replies[first:] == [TEST.mark_weight if i in marks(own) else 1.0 for i in ids[first:]]
    assert quotes


@pytest.mark.parametrize("kind", ["find", "consult", "squad_reading"])
def test_a_refusal_is_a_choice_at_its_first_token(own: PreTrainedTokenizerBase, exercises: Exercises, kind: str) -> None:
    refusals = 0
    for ids, replies, _ in shown(exercises, own, kind, length=512, rows=24):
        first = ids.index(own.convert_tokens_to_ids(ASSISTANT)) + 1
        if own.decode(ids[first:]) == NOT_ANSWERED + END:
            refusals += 1
            assert replies[first:] == [TEST.mark_weight] + [1.0] * (len(ids) - first - 1)
    assert refusals


def test_the_words_of_an_index_are_given_and_only_its_marks_are_learnt(
    own: PreTrainedTokenizerBase, exercises: Exercises
) -> None:
    for ids, replies, _ in shown(exercises, own, "index"):
        first = ids.index(own.convert_tokens_to_ids(ASSISTANT)) + 1
        wanted = [TEST.mark_weight if i in marks(own) else 0.0 for i in ids[first:]]
        assert replies[first:] == wanted
        assert sum(w > 0 for w in wanted) >= 3


def test_of_a_quiz_only_the_numbers_and_how_a_refusal_begins_are_learnt(
    own: PreTrainedTokenizerBase, exercises: Exercises
) -> None:
    assistant, user = own.convert_tokens_to_ids(ASSISTANT), own.convert_tokens_to_ids(USER)
    for ids, replies, _ in shown(exercises, own, "quiz"):
        assert ids.count(assistant) == ids.count(user) >= 2
        assert replies == [0.0] + [TEST.mark_weight if before == assistant else 0.0 for before in ids[:-1]]


@pytest.mark.parametrize("kind", ["claim", "same_question", "vague", "harmful"])
def test_a_value_in_json_weighs_more_than_its_key(own: PreTrainedTokenizerBase, exercises: Exercises, kind: str) -> None:
    for ids, replies, _ in shown(exercises, own, kind, length=512):
        first = ids.index(own.convert_tokens_to_ids(ASSISTANT)) + 1
        text = own.decode(ids[first:-1])
        heavy = own.decode([i for i, w in zip(ids[first:], replies[first:], strict=True) if w == TEST.mark_weight])
        [(start, end)] = choices(text)
        assert text[start:end] in heavy
        assert len(heavy) <= end - start + 3  # a token may reach over the quote before or the bracket after
        assert set(replies[first:]) == {1.0, TEST.mark_weight}


def test_values_that_are_only_copied_into_json_weigh_as_other_copies(own: PreTrainedTokenizerBase, exercises: Exercises) -> None:
    for ids, replies, _ in shown(exercises, own, "fields"):
        first = ids.index(own.convert_tokens_to_ids(ASSISTANT)) + 1
        assert set(replies[first:]) == {1.0}
