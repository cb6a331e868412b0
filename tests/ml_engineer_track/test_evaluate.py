"""Scores, worked out by hand on a few replies, and the whole evaluation on a model that knows nothing."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ml_engineer_track import evaluate as ev
from ml_engineer_track.curate import CuratedData, Row
from ml_engineer_track.models import load_model, load_tokenizer, prompt_text
from ml_engineer_track.quantize import save_gguf
from shared.chat import ACTIONS, NOT_ANSWERED, Source
from shared.settings import BASE_MODEL, Settings

SOURCES = [
    Source(id="a", heading="", text="Rest in bed and drink plenty of water."),
    Source(id="b", heading="", text="Do not take aspirin for it."),
    Source(id="c", heading="", text="Most colds are gone after about a week."),
]
ONE, TWO, THREE = (f"[{n}] {s.text}" for n, s in enumerate(SOURCES, start=1))


def score(reply: str, gold: list[int]) -> dict[str, float]:
    """The scores of one reply; a metric that is not defined on the row is left out."""
    row = Row(id="r", split="test", skill="answer", messages=[], reply="", sources=["a", "b", "c"], gold=gold)
    return {name: values[0] for name, values in ev.answer_scores([row], [SOURCES], [reply]).items() if values}


RIGHT = {"evidence_f1": 1.0, "answer_rate": 1.0, "citation_precision": 1.0, "citation_recall": 1.0}


@pytest.mark.parametrize(
    ("case", "reply", "gold", "expected"),
    [
        ("all right", f"{ONE} {THREE}", [1, 3], RIGHT),
        ("the order does not matter", f"{THREE} {ONE}", [1, 3], RIGHT),
        # one of two found, nothing wrong: P 1, R 1/2, F1 2/3
        ("one of two", ONE, [1, 3], RIGHT | {"evidence_f1": 2 / 3}),
        # one right and one needless: P 1/2, R 1, F1 2/3; both quotes are true to their sentence
        ("one too many", f"{ONE} {TWO}", [1], RIGHT | {"evidence_f1": 2 / 3}),
        ("another sentence", TWO, [1], RIGHT | {"evidence_f1": 0.0}),
        ("a refusal where there is an answer", NOT_ANSWERED, [1], {"evidence_f1": 0.0, "answer_rate": 0.0}),
        ("a right refusal", NOT_ANSWERED, [], {"correct_refusal": 1.0}),
        (
            "an answer where there is none",
            ONE,
            [],
            {"correct_refusal": 0.0, "citation_precision": 1.0, "citation_recall": 1.0},
        ),
        # one statement of two carries a mark, and that mark is right
        (
            "text without a mark",
            f"Sleep helps. {ONE}",
            [1],
            {"evidence_f1": 1.0, "answer_rate": 1.0, "citation_precision": 1.0, "citation_recall": 0.5},
        ),
        (
            "only text without a mark",
            "Sleep helps.",
            [1],
            {"evidence_f1": 0.0, "answer_rate": 1.0, "citation_precision": 0.0, "citation_recall": 0.0},
        ),
        # [9] names no source: cited {1, 9} against {1} is F1 2/3, and one mark of two is supported
        (
            "a mark beyond the sources",
            f"{ONE} [9] Rest in bed.",
            [1],
            {"evidence_f1": 2 / 3, "answer_rate": 1.0, "citation_precision": 0.5, "citation_recall": 0.5},
        ),
        (
            "a misquoted sentence",
            "[1] Run around and drink plenty of wine.",
            [1],
            {"evidence_f1": 1.0, "answer_rate": 1.0, "citation_precision": 0.0, "citation_recall": 0.0},
        ),
        (
            "the sentence of another number",
            f"[1] {SOURCES[1].text}",
            [1],
            {"evidence_f1": 1.0, "answer_rate": 1.0, "citation_precision": 0.0, "citation_recall": 0.0},
        ),
        (
            "a mark with nothing behind it",
            "[1]",
            [1],
            {"evidence_f1": 1.0, "answer_rate": 1.0, "citation_precision": 0.0, "citation_recall": 0.0},
        ),
    ],
)
def test_answers_are_scored_as_by_hand(case: str, reply: str, gold: list[int], expected: dict[str, float]) -> None:
    assert score(reply, gold) == pytest.approx(expected), case


def test_saying_nothing_is_not_a_right_refusal() -> None:
    """The metric is how often a model *says* that the library does not answer. Replies come without white space around them."""
    assert score("", []) == {"correct_refusal": 0.0}


def test_a_quote_is_supported_by_nine_of_ten_words() -> None:
    ten = "one two three four five six seven eight nine ten"
    assert ev.supports(ten, ten)
    assert ev.supports(ten, ten.upper())
    assert ev.supports(ten, ten.replace("ten", "eleven"))
    assert not ev.supports(ten, ten.replace("nine ten", "ninety hundred"))
    assert not ev.supports(ten, "one one one")  # a word counts as often as the sentence has it
    assert not ev.supports(ten, "")


# --- the sample ------------------------------------------------------------------------------------------------------


def rows(n: int) -> list[Row]:
    return [Row(id=f"r{i}", split="test", skill="answer", messages=[], reply="") for i in range(n)]


def test_every_model_gets_the_same_sample_in_the_order_of_the_file() -> None:
    chosen = ev.sample(rows(50), 10, 7)
    assert chosen == ev.sample(rows(50), 10, 7)
    assert len({r.id for r in chosen}) == 10
    assert [r.id for r in chosen] == [r.id for r in rows(50) if r in chosen]
    assert chosen != ev.sample(rows(50), 10, 8)
    assert chosen != rows(10)


def test_a_sample_of_more_rows_than_there_are_is_all_of_them() -> None:
    assert ev.sample(rows(5), 10, 7) == rows(5)


# --- the whole -------------------------------------------------------------------------------------------------------

ANSWER = {"evidence_f1", "answer_rate", "correct_refusal", "citation_precision", "citation_recall"}
DECIDE = {"decision_accuracy", *(f"decision_accuracy_{action}" for action in ACTIONS)}
JUDGE = {f"judge/{rubric}_{kind}" for rubric in ("grounded", "safe", "helpful") for kind in ("kappa", "accuracy")}
KEYS = {f"{d}/{m}" for d in ("free", "grounded") for m in ANSWER | DECIDE} | JUDGE
KEYS |= {"first_source/evidence_f1", "free/json_validity", "perplexity"}


@pytest.fixture(scope="module")
def scores(small_settings: Settings, small_data: CuratedData, micro_path: str, tokenizer: PreTrainedTokenizerBase) -> ev.Scores:
    return ev.evaluate(small_settings, small_data, load_model(micro_path, torch.float32), tokenizer, "micro")


def test_an_evaluation_holds_every_figure(scores: ev.Scores) -> None:
    assert set(scores.figures) == KEYS
    assert scores.model == "micro"


def test_shares_lie_in_their_interval_and_between_0_and_1(scores: ev.Scores) -> None:
    for key, figure in scores.figures.items():
        if figure.n == 0:
            assert figure.value is figure.low is figure.high is None
        elif key == "perplexity":
            assert figure.value > 1
        else:
            lowest = -1.0 if key.endswith("kappa") else 0.0
            assert lowest <= figure.low <= figure.value <= figure.high <= 1.0, key


def test_what_models_are_compared_by_is_one_value_for_every_row_asked(
    scores: ev.Scores, small_settings: Settings, small_data: CuratedData
) -> None:
    """Which rows these are depends on the data alone, so that another model's values belong to the same rows."""
    asked = ev.sampled_rows(small_settings, small_data)
    counts = {
        "grounded/evidence_f1": sum(bool(row.gold) for row in asked["answer"]),
        "grounded/decision_accuracy": len(asked["decide"]),
    }
    assert {key: len(values) for key, values in scores.rows.items()} == counts
    for key, values in scores.rows.items():
        assert sum(values) / len(values) == pytest.approx(scores.figures[key].value)


def test_every_figure_can_be_printed(scores: ev.Scores) -> None:
    """Reports and model cards write figures as text, the perplexity, which has no interval, among them."""
    assert all(str(figure) for figure in scores.figures.values())


def test_the_grammar_makes_every_reply_valid_and_every_citation_true(scores: ev.Scores) -> None:
    assert scores.figures["grounded/citation_precision"].value in (None, 1.0)
    assert scores.figures["free/json_validity"].value == 0.0
    assert scores.figures["judge/safe_accuracy"].n == 8  # none was lost to malformed JSON


def test_samples_show_question_reply_and_what_was_right(scores: ev.Scores, small_data: CuratedData) -> None:
    by_id = {row.id: row for row in small_data.rows("test", "answer")}
    assert {s["decoding"] for s in scores.samples} == {"free", "grounded"}
    for shown in scores.samples:
        row = by_id[shown["id"]]
        assert f"Question: {shown['question']}" in row.messages[0]["content"].splitlines()
        assert shown["right"] == row.reply


def test_perplexity_is_that_of_the_right_replies(
    scores: ev.Scores, small_settings: Settings, small_data: CuratedData, micro: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> None:  # fmt: skip
    chosen = [
        row
        for skill, n in (("answer", 8), ("decide", 8), ("judge", 8))
        for row in ev.sample(small_data.rows("test", skill), n, small_settings.seed)
    ]
    total, tokens = 0.0, 0
    for row in chosen:
        prompt = tokenizer(prompt_text(tokenizer, row.messages))["input_ids"]
        reply = tokenizer(row.reply + tokenizer.eos_token)["input_ids"]
        ids = torch.tensor([prompt + reply], device=micro.device)
        with torch.no_grad():
            logits = micro(ids).logits[0, len(prompt) - 1 : -1]
        total += float(F.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum"))
        tokens += len(reply)
    assert scores.figures["perplexity"].value == pytest.approx(math.exp(total / tokens), rel=0.02)  # bf16 where it is fast


def test_a_gguf_variant_is_asked_the_same_through_the_engine_that_serves_it(
    small_settings: Settings, small_data: CuratedData, tmp_path: Path
) -> None:
    """F16 rounds as good as nothing, so the bundled model says what it says in transformers; near ties may fall otherwise."""
    pytest.importorskip("openvino_genai")
    few = small_settings.evaluate.model_copy(update={"answer_rows": 6, "other_rows": 4, "max_new_tokens": 40})
    settings = small_settings.model_copy(update={"evaluate": few})
    model, tokenizer = load_model(str(BASE_MODEL), torch.float32), load_tokenizer(str(BASE_MODEL))
    save_gguf(model, tokenizer, tmp_path / "f16", "f16")
    served = ev.evaluate_served(settings, small_data, tmp_path / "f16", "f16")
    loaded = ev.evaluate(settings, small_data, model, tokenizer, "base")
    assert set(served.figures) == KEYS - {"perplexity"}
    assert served.figures["grounded/citation_precision"].value in (None, 1.0)
    for decoding in ("free", "grounded"):
        pairs = [(a, b) for a, b in zip(served.samples, loaded.samples, strict=True) if a["decoding"] == decoding]
        assert all(a["id"] == b["id"] for a, b in pairs)
        assert sum(a["reply"] == b["reply"] for a, b in pairs) >= 0.75 * len(pairs)


def test_a_model_is_left_in_eval_mode(
    small_settings: Settings, small_data: CuratedData, micro: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    tiny = small_settings.evaluate.model_copy(update={"answer_rows": 2, "other_rows": 2, "max_new_tokens": 4})
    ev.evaluate(small_settings.model_copy(update={"evaluate": tiny}), small_data, micro, tokenizer, "micro")
    assert not micro.training
