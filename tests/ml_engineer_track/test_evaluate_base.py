"""The base model's figures: fair questions, every token counted once, baselines that do what they are for, a whole card."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ml_engineer_track import evaluate_base as eb
from ml_engineer_track.corpus import Corpus, sentences
from ml_engineer_track.evaluate_base import Item
from ml_engineer_track.ship_base import ship

DATA = ("medquad", "squad")


# --- questions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("size", [4, 8])
def test_an_item_has_its_answer_among_as_many_different_candidates_as_asked_for(corpus: Corpus, name: str, size: int) -> None:
    items = eb.make_items(name, corpus, size, 30)
    assert len(items) >= 5
    for item in items:
        assert len(item.candidates) == len(set(item.candidates)) == size
        assert item.gold in range(size)
    assert len({item.question for item in items}) == len(items)
    assert len({item.gold for item in items}) > 1


def test_sentences_that_several_rows_share_are_no_candidate_twice(corpus: Corpus) -> None:
    """SQuAD asks several questions about one paragraph, so its sentences are among the strangers again and again."""
    rows = corpus.held_out_tasks["squad2_16_articles"]
    again = [row | {"question": f"{row['question']} {n}"} for row in rows[:4] for n in range(10)]
    items = eb.make_items("squad", Corpus({}, {}, {}, {"squad2_16_articles": again}), 8, 30)
    assert len(items) >= 10
    assert all(len(set(item.candidates)) == 8 for item in items)


def test_the_answer_to_a_squad_question_holds_its_answer_text_and_comes_from_held_out_articles(corpus: Corpus) -> None:
    rows = {row["question"]: row for row in corpus.held_out_tasks["squad2_16_articles"]}
    for item in eb.make_items("squad", corpus, 4, 30):
        assert item.gold is not None
        assert rows[item.question]["answers"][0] in item.candidates[item.gold]
        assert not rows[item.question]["is_impossible"]


def test_the_answer_to_a_medquad_question_opens_its_section_of_a_held_out_document(corpus: Corpus) -> None:
    sections = {p["question"]: p["answer"] for row in corpus.held_out_tasks["medquad_1_to_6"] for p in row["sections"]}
    for item in eb.make_items("medquad", corpus, 4, 30):
        assert item.gold is not None
        assert item.candidates[item.gold] == sentences(sections[item.question])[0]


@pytest.mark.parametrize("name", DATA)
def test_items_are_the_same_every_time_and_change_with_the_seed(
    corpus: Corpus, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = eb.make_items(name, corpus, 8, 8)
    assert eb.make_items(name, corpus, 8, 8) == first
    assert eb.make_items(name, corpus, 8, 3) == first[:3]
    monkeypatch.setattr(eb, "SEED", eb.SEED + 1)
    assert eb.make_items(name, corpus, 8, 8) != first


# --- baselines -------------------------------------------------------------------------------------------------------

FEVER = Item(
    "What lowers a high fever?",
    ["Bees live in hives.", "Old bridges are of stone.", "Paracetamol lowers a high fever.", "The river is wide."],
    2,
)
NAMES = Item("Where do honey bees live?", FEVER.candidates, 0)


def test_bm25_picks_the_sentence_that_shares_the_words() -> None:
    for item in (FEVER, NAMES):
        scores = eb.bm25(item)
        assert len(scores) == 4
        assert eb._argmax(scores) == item.gold
        assert scores[3] == 0.0


@pytest.mark.parametrize("question", ["Who?", "What is the?", "Xylophones, quickly!", ""])
def test_bm25_has_no_opinion_on_words_no_candidate_has(question: str) -> None:
    assert eb.bm25(Item(question, FEVER.candidates, 0)) == [0.0] * 4


def test_a_sentence_model_picks_by_meaning() -> None:
    reworded = Item("My temperature is 39, how do I get it down?", FEVER.candidates, 2)
    assert eb.minilm([FEVER, reworded, NAMES]) == [2, 2, 0]


# --- the model -------------------------------------------------------------------------------------------------------


class _Bigrams:
    """A model that looks at one token only: what it says does not depend on where a window begins."""

    device = torch.device("cpu")

    def __init__(self, vocab: int) -> None:
        self.config = SimpleNamespace(vocab_size=vocab)
        self.table = torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(0)) * 3

    def __call__(self, ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[ids])


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9, 12, 13, 16, 17, 100, 101])
@pytest.mark.parametrize("window", [4, 8, 256])
def test_every_token_counts_once_however_many_windows_there_are(length: int, window: int) -> None:
    model: Any = _Bigrams(11)
    ids = np.random.default_rng(length).integers(0, 11, length)
    once = F.cross_entropy(model.table[ids[:-1]], torch.from_numpy(ids[1:]), reduction="sum") if length > 1 else 0.0
    assert eb.nats(model, ids, window) == pytest.approx(float(once) + np.log(11), rel=1e-5)


def test_a_sequence_that_fits_a_window_is_read_as_one(micro: PreTrainedModel) -> None:
    ids = np.random.default_rng(0).integers(0, 8000, 48)
    with torch.no_grad():
        log_probabilities = micro(torch.from_numpy(ids)[None].to(micro.device)).logits[0].double().log_softmax(-1)
    by_hand = -sum(log_probabilities[at - 1, ids[at]].item() for at in range(1, 48)) + np.log(micro.config.vocab_size)
    assert eb.nats(micro, ids, 48) == eb.nats(micro, ids, 64) == pytest.approx(by_hand, rel=1e-5)
    assert eb.nats(micro, ids, 16) != pytest.approx(by_hand, rel=1e-5)  # here what stands before a window is forgotten


class _Letters:
    """A tokenizer of single characters, to which a citation mark is three tokens."""

    chat_template = "plain"

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return "".join(m["content"] for m in messages)

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [min(ord(c), 255) for c in text]}


class _Prefers:
    """A model that wants to say one token after whatever it reads, and notes what it read."""

    device = torch.device("cpu")

    def __init__(self, token: int, vocab: int) -> None:
        self.read: list[list[int]] = []
        self.scores = torch.full((1, 1, vocab), -1.0)
        self.scores[..., token] = 1.0

    def __call__(self, ids: torch.Tensor, logits_to_keep: int) -> SimpleNamespace:
        assert logits_to_keep == 1
        self.read.append(ids[0].tolist())
        return SimpleNamespace(logits=self.scores)


def test_the_model_chooses_by_the_mark_it_would_say_first(own: PreTrainedTokenizerBase) -> None:
    model: Any = _Prefers(own.convert_tokens_to_ids("[3]"), len(own))
    assert eb.choose(model, own, [FEVER, NAMES]) == [2, 2]
    assert own.decode(model.read[0]).endswith("Question: What lowers a high fever?<|end|><|assistant|>")


def test_where_a_mark_is_several_tokens_the_model_chooses_by_its_digit() -> None:
    model: Any = _Prefers(ord("2"), 256)
    assert eb.choose(model, _Letters(), [FEVER]) == [1]
    assert bytes(model.read[0]).decode().endswith("Question: What lowers a high fever?[")


# --- the card --------------------------------------------------------------------------------------------------------


def _estimate(value: float) -> dict[str, Any]:
    return {"value": value, "low": value - 0.001, "high": value + 0.002, "n": 7}


FIGURES: dict[str, Any] = {
    "seed": 7,
    "hardware": {},
    "language": {
        "health": {"bytes": 123_456, "model": 1.111, "5-gram": 2.222, "gzip": 3.333, "xz": 4.444},
        "fiction": {"bytes": 98_765, "model": 1.515, "5-gram": 2.525, "gzip": 3.535, "xz": 4.545},
    },
    "reading": {
        "medquad": {
            "right among 4": {"model": _estimate(0.611), "BM25": _estimate(0.522), "MiniLM": _estimate(0.733)},
            "sentence F1, free": _estimate(0.414),
        },
        "squad": {"exact copies, free": {"value": None, "low": None, "high": None, "n": 0}},
    },
    "samples": {
        "continuations": [{"source": "health", "start": "The kidney", "goes on": " filters\n\nblood."}],
        "readings": [{"question": "Why?", "reply": "[1] Because.", "right": "Because."}],
    },
}
FACTS = {"edition": "cpu", "shape": {"hidden": 32}, "tokens seen": 12_345, "seed": 7}


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    (tmp_path / "figures.json").write_text(json.dumps(FIGURES), encoding="utf-8")
    (tmp_path / "edition.json").write_text(json.dumps(FACTS), encoding="utf-8")
    return tmp_path


def card(folder: Path) -> str:
    eb.write_card(folder)
    return (folder / "MODEL_CARD.md").read_text(encoding="utf-8")


def test_the_card_shows_every_figure_in_its_row(measured: Path) -> None:
    lines = card(measured).splitlines()
    assert "| health | 123,456 | 1.111 | 2.222 | 3.333 | 4.444 |" in lines
    assert "| fiction | 98,765 | 1.515 | 2.525 | 3.535 | 4.545 |" in lines
    choosing = "0.611 [0.610, 0.613] | 0.522 [0.521, 0.524] | 0.733 [0.732, 0.735]"
    assert f"| medquad | right among 4 | {choosing} |" in lines
    assert "| medquad | sentence F1, free | 0.414 [0.413, 0.416] | - | - |" in lines
    assert "| squad | exact copies, free | - | - | - |" in lines


def test_the_card_shows_how_the_model_was_made_and_what_it_says(measured: Path) -> None:
    text = card(measured)
    assert text.startswith("# Model card: the bundled base model (cpu edition)\n")
    assert all(f"- {name}: {value}" in text.splitlines() for name, value in FACTS.items())
    assert "- *The kidney* **filters blood.**" in text.splitlines()
    assert "- Why?\n  - says: [1] Because.\n  - right: Because." in text
    assert "\n\n\n" not in text


def test_the_words_of_a_person_stand_in_the_card_where_there_are_any(measured: Path) -> None:
    without = card(measured)
    (measured / "card_notes.md").write_text("What it is not for: advice.\n", encoding="utf-8")
    text = card(measured)
    assert "What it is not for: advice." in text.splitlines()
    assert text.replace("What it is not for: advice.\n\n", "") == without


# --- all of it -------------------------------------------------------------------------------------------------------


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for part in value.values() for leaf in leaves(part)]
    return [leaf for part in value for leaf in leaves(part)] if isinstance(value, list) else [value]


def test_a_whole_evaluation_writes_its_figures_and_the_card(
    corpus_folder: Path, corpus: Corpus, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, few in {"ITEMS": 5, "FREE_ITEMS": 3, "BYTES_PER_SOURCE": 4_000, "NGRAM_TOKENS": 20_000}.items():
        monkeypatch.setattr(eb, name, few)
    folder = ship(pretrained, tmp_path / "base")
    figures = eb.evaluate_base(corpus_folder, folder)
    assert json.loads((folder / "figures.json").read_text(encoding="utf-8")) == json.loads(json.dumps(figures))
    assert set(figures["language"]) == {name for name, documents in corpus.held_out.items() if documents}
    assert len(figures["language"]) > 3
    for row in figures["language"].values():
        assert 0 < row["bytes"] <= 4_000
        assert all(0 < row[side] < 20 for side in ("model", "5-gram", "gzip", "xz"))
        assert row["5-gram"] < row["model"]  # eight steps of training are no training
    for result in figures["reading"].values():
        for metric, value in result.items():
            for who in [value] if "n" in value else value.values():
                assert who["value"] is None or 0 <= who["low"] <= who["value"] <= who["high"] <= 1
                assert who["n"] == (5 if metric.startswith("right") else who["n"] if metric.startswith("exact") else 3)
    assert {s["source"] for s in figures["samples"]["continuations"]} <= set(figures["language"])
    assert len(figures["samples"]["readings"]) == 5
    text = (folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    shown = [x for part in ("language", "reading") for x in leaves(figures[part]) if isinstance(x, float)]
    assert all(f"{x:.3f}" in text for x in shown)
