"""Batched replies are those a model gives one by one, and under a grammar no other reply is possible."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ml_engineer_track.generate import GrammarMask, generate, json_grammar, lark_grammar
from ml_engineer_track.models import load_model, prompt_text, stop_token_ids
from shared import chat
from shared.chat import NOT_ANSWERED, Decision, Message, Source, Verdict
from shared.settings import BASE_MODEL

SOURCES = [
    Source(id="", heading="Cold: Self-care", text="Rest and drink plenty of water."),
    Source(id="", heading="Cold: Self-care", text='Take "paracetamol" for pain; 500 mg is enough.'),
    Source(id="", heading="Cold: Self-care", text="Honey eases a cough – in adults."),
]


def user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


PROMPTS = [user(text) for text in ("Rest?", "What helps with a cold and a cough at night?", "Hi", "Copy: a b c d e f g h i j")]


def one_by_one(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, conversations: list[list[Message]], tokens: int
) -> list[str]:
    replies = []
    for conversation in conversations:
        batch = tokenizer(prompt_text(tokenizer, conversation), add_special_tokens=False, return_tensors="pt").to(model.device)
        ids = model.generate(**batch, max_new_tokens=tokens, do_sample=False, eos_token_id=stop_token_ids(model, tokenizer))
        replies.append(tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return replies


# --- free ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_free_replies_are_those_of_the_model_asked_one_by_one(
    micro: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> None:
    expected = one_by_one(micro, tokenizer, PROMPTS, 12)
    assert len(set(expected)) == len(PROMPTS)
    assert generate(micro, tokenizer, PROMPTS, 12, batch_size) == expected


def test_replies_of_the_bundled_model_do_not_depend_on_the_batch(tokenizer: PreTrainedTokenizerBase) -> None:
    model = load_model(str(BASE_MODEL), torch.float32)
    asked = [chat.answer_messages("What helps with a cough?", SOURCES), *PROMPTS]
    assert generate(model, tokenizer, asked, 16, 5) == one_by_one(model, tokenizer, asked, 16)


def test_no_conversations_give_no_replies(micro: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    assert generate(micro, tokenizer, [], 8, 4) == []


# --- under a grammar -------------------------------------------------------------------------------------------------


def test_json_replies_parse_into_their_schema(micro: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    for schema in (Decision, Verdict):
        for reply in generate(micro, tokenizer, PROMPTS, 40, 4, [json_grammar(schema)] * 4):
            assert reply == chat.to_json(schema.model_validate_json(reply))


def test_free_replies_of_the_same_model_do_not_parse(micro: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Otherwise the test above would say nothing about the grammar."""
    assert not any(reply.startswith("{") for reply in generate(micro, tokenizer, PROMPTS, 40, 4))


def test_grounded_replies_quote_the_given_sentences_and_nothing_else(
    micro: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    given = [SOURCES, SOURCES[:1], SOURCES[1:], []]
    asked = [chat.answer_messages(c[0]["content"], s) for c, s in zip(PROMPTS, given, strict=True)]
    replies = generate(micro, tokenizer, asked, 200, 4, [lark_grammar(chat.grounded_grammar(s)) for s in given])
    for reply, sources in zip(replies, given, strict=True):
        sentence = "|".join(re.escape(chat.quote(n, s.text)) for n, s in enumerate(sources, start=1)) or "(?!)"
        assert re.fullmatch(f"{re.escape(NOT_ANSWERED)}|({sentence})( ({sentence})){{0,3}}", reply)
    assert replies[3] == NOT_ANSWERED


def test_each_row_of_a_batch_has_its_own_grammar(micro: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    texts = ["yes", "no, not at all, never", "perhaps", "ok"]
    grammars = [lark_grammar(f'start: "{text}"') for text in texts]
    assert generate(micro, tokenizer, PROMPTS, 30, 4, grammars) == texts


def test_constrained_replies_do_not_depend_on_the_batch(micro: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """The prompts differ in length and the replies end at different steps."""
    grammars = [lark_grammar(chat.grounded_grammar(SOURCES)), json_grammar(Decision), json_grammar(Verdict)]
    grammars.append(lark_grammar(chat.grounded_grammar(SOURCES[:2], max_sentences=2)))
    together = generate(micro, tokenizer, PROMPTS, 60, 4, grammars)
    alone = [generate(micro, tokenizer, [p], 60, 1, [g])[0] for p, g in zip(PROMPTS, grammars, strict=True)]
    assert together == alone


def test_a_reply_that_is_cut_short_is_still_the_beginning_of_an_allowed_one(
    micro: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    (reply,) = generate(micro, tokenizer, PROMPTS[:1], 3, 1, [lark_grammar('start: "Rest and drink plenty of water."')])
    assert reply
    assert "Rest and drink plenty of water.".startswith(reply)


def test_only_stop_tokens_are_allowed_once_a_reply_is_complete(tokenizer: PreTrainedTokenizerBase) -> None:
    stops = [tokenizer.eos_token_id]
    rules = GrammarMask(tokenizer, [lark_grammar('start: "[7]" | "[8]"')], stops, len(tokenizer))
    seven, eight = tokenizer.convert_tokens_to_ids(["[7]", "[8]"])
    first = rules.allowed(torch.device("cpu"))[0]
    assert first[[seven, eight]].all()
    assert not first[stops].any()
    assert rules.step([seven]) == [[seven]]
    assert rules.stopped() == [True]
    assert rules.allowed(torch.device("cpu"))[0].nonzero().flatten().tolist() == stops
    assert rules.step(stops) == [[]]


def test_words_that_are_forced_are_taken_in_one_step(tokenizer: PreTrainedTokenizerBase) -> None:
    text = " Rest and drink plenty of water."
    rules = GrammarMask(tokenizer, [lark_grammar(f'start: "[1]{text}" | "[2] No."')], [tokenizer.eos_token_id], len(tokenizer))
    (taken,) = rules.step([tokenizer.convert_tokens_to_ids("[1]")])
    assert len(taken) > 4
    assert f"[1]{text}".startswith(tokenizer.decode(taken))


def test_jumping_over_what_is_forced_gives_the_reply_of_stepping(tokenizer: PreTrainedTokenizerBase) -> None:
    """The same choices as a loop that reads the whole text anew, without padding or cache, before every choice."""
    model = load_model(str(BASE_MODEL), torch.float32)
    asked = [
        chat.answer_messages(q, SOURCES) for q in ("What helps with a cough?", "pain", "Is honey good for a child at night?")
    ]
    grammars = [lark_grammar(chat.grounded_grammar(SOURCES))] * 3
    stops = stop_token_ids(model, tokenizer)
    expected = []
    for messages, grammar in zip(asked, grammars, strict=True):
        rules = GrammarMask(tokenizer, [grammar], stops, len(tokenizer))
        prompt = tokenizer(prompt_text(tokenizer, messages), add_special_tokens=False)["input_ids"]
        said = rules.forced()[0]
        while not rules.stopped()[0]:
            logits = model(input_ids=torch.tensor([prompt + said])).logits[:, -1]
            best = logits.masked_fill(~rules.allowed(logits.device), float("-inf")).argmax(-1).tolist()
            said += rules.step(best)[0]
        expected.append(tokenizer.decode(said, skip_special_tokens=True).strip())
    assert generate(model, tokenizer, asked, 200, 3, grammars) == expected


@pytest.mark.parametrize("bad", ["start: unknown_rule", "start: (", ""])
def test_a_grammar_that_cannot_be_compiled_is_refused(
    micro: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, bad: str
) -> None:
    with pytest.raises(ValueError, match="grammar"):
        generate(micro, tokenizer, PROMPTS[:1], 4, 1, [lark_grammar(bad)])
