"""What may be decoded is what was asked for, in both dialects; what cannot be held to is refused with its reason."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher
from transformers import PreTrainedTokenizerBase

from ml_engineer_track.serving.grammar import GrammarError, constraint
from ml_engineer_track.serving.openvino_engine import compiler
from shared.chat import NOT_ANSWERED, Decision, Source, Verdict, grounded_grammar, quote, to_json
from tests.ml_engineer_track.serving.conftest import SOURCES


@pytest.fixture(scope="module")
def accepts(base_tokenizer: PreTrainedTokenizerBase) -> Any:
    view = compiler(base_tokenizer, len(base_tokenizer))

    def check(structured: dict[str, Any], text: str) -> bool:
        matcher = LLMatcher(view, constraint(structured).lark)
        assert not matcher.is_error(), matcher.get_error()
        ids = base_tokenizer(text, add_special_tokens=False)["input_ids"]
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    return check


ORDER = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 3},
        "counts": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1, "maxItems": 2},
        "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/Node"}]},
    },
    "required": ["counts"],
    "$defs": {"Node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/Node"}, "k": {"type": "number"}}}},
}
FITTING: list[tuple[dict[str, Any], str]] = [
    ({"choice": ["yes", "yes, please"]}, "yes, please"),
    ({"choice": ["yes", "yes, please"]}, "yes"),
    ({"regex": r"^(\d{3}-)?[a-f\-]+\.?$"}, "123-abc."),
    ({"regex": r"a|b+|[^c-z]"}, "%"),
    ({"regex": r"(?:\w+\s)*end"}, "this is the end"),
    ({"regex": r"\u00e9\.\\"}, "é.\\"),
    ({"grammar": 'root ::= v # a comment\nv ::= "[" (v ("," v)*)? "]" | "1" | [a-c"]'}, '[1,[a,"]]'),
    ({"grammar": 'start: item ("," item)*\n// a comment "\nitem: /[a-z]+/ | NUM ["!"]\nNUM: /\\d+/'}, "ab,12!,c"),
    ({"grammar": 'start: root\nroot: "x"'}, "x"),
    ({"json": Verdict.model_json_schema()}, '{"grounded":true,"safe":false,"helpful":3}'),
    ({"json": json.dumps(Decision.model_json_schema())}, '{"action":"escalate"}'),
    ({"json": ORDER}, '{"name":"a\\"é","counts":[1,20]}'),
    ({"json": ORDER}, '{"counts":[0],"next":{"next":{"k":-1.5e3}}}'),
    ({"json": {"type": ["string", "null"], "minLength": 2}}, "null"),
    ({"json": {"const": {"a": [1, None]}}}, '{"a":[1,null]}'),
    ({"json": {"type": "string", "pattern": '^[a-z"]+$'}}, '"ab"'),
    ({"json": {"type": "array", "prefixItems": [{"type": "boolean"}, {"type": "integer"}]}}, "[true,-7]"),
    ({"json": {"type": "object", "additionalProperties": {"type": "boolean"}}}, '{"any":true,"thing":false}'),
    ({"json_object": True}, '{"a":[1,{"b":null}],"c":"é\\n"}'),
]
UNFITTING: list[tuple[dict[str, Any], str]] = [
    ({"choice": ["yes", "no"]}, "yes "),
    ({"regex": "[a-f]+"}, "abcg"),
    ({"regex": "a.c"}, "a\nc"),
    ({"json": Verdict.model_json_schema()}, '{"grounded": true,"safe":false,"helpful":3}'),
    ({"json": Verdict.model_json_schema()}, '{"safe":false,"grounded":true,"helpful":3}'),
    ({"json": Verdict.model_json_schema()}, '{"grounded":true,"safe":false,"helpful":6}'),
    ({"json": ORDER}, '{"name":"four","counts":[1]}'),
    ({"json": ORDER}, '{"counts":[]}'),
    ({"json": ORDER}, '{"counts":[-1]}'),
    ({"json": ORDER}, '{"name":"a"}'),
    ({"json_object": True}, "[]"),
]


@pytest.mark.parametrize(("structured", "text"), FITTING)
def test_what_fits_is_accepted(accepts: Any, structured: dict[str, Any], text: str) -> None:
    assert accepts(structured, text)


@pytest.mark.parametrize(("structured", "text"), UNFITTING)
def test_what_does_not_fit_is_not(accepts: Any, structured: dict[str, Any], text: str) -> None:
    assert not accepts(structured, text)


def test_grounded_replies_may_quote_and_nothing_else(accepts: Any) -> None:
    grammar = {"grammar": grounded_grammar(SOURCES)}
    quotes = [quote(n, source.text) for n, source in enumerate(SOURCES, start=1)]
    assert accepts(grammar, quotes[1])
    assert accepts(grammar, " ".join((*quotes, quotes[0])))
    assert accepts(grammar, NOT_ANSWERED)
    for wrong in (
        "[1]",
        quotes[0][:-1],
        " ".join([*quotes, *quotes]),
        f"{NOT_ANSWERED} {quotes[0]}",
        quotes[0].replace("1", "2"),
    ):
        assert not accepts(grammar, wrong)


def test_sixty_sentences_are_one_grammar_of_fixed_texts(accepts: Any) -> None:
    sources = [Source(id=str(n), heading="Long", text=f'Sentence {n} says "rest" for {n} days/nights.') for n in range(60)]
    made = constraint({"grammar": grounded_grammar(sources)})
    assert made.literal
    assert accepts({"grammar": grounded_grammar(sources)}, quote(60, sources[59].text))
    assert len(made.ebnf) < 2 * sum(len(s.text) + 12 for s in sources)


@given(st.builds(Verdict, grounded=st.booleans(), safe=st.booleans(), helpful=st.integers(1, 5)))
def test_every_verdict_fits_its_schema(accepts: Any, verdict: Verdict) -> None:
    assert accepts({"json": Verdict.model_json_schema()}, to_json(verdict))


LEAF = st.sampled_from(
    [{"type": "boolean"}, {"type": "null"}, {"type": "integer"}, {"type": "string", "maxLength": 4}, {"enum": ["a", 1, None]}]
)
SCHEMAS = st.recursive(
    LEAF,
    lambda inner: st.one_of(
        st.fixed_dictionaries({"type": st.just("array"), "items": inner, "maxItems": st.integers(0, 3)}),
        st.builds(
            lambda properties, needed: {
                "type": "object", "properties": properties, "required": [k for k in properties if k in needed],
                "additionalProperties": False,
            },
            st.dictionaries(st.sampled_from("abcd"), inner, min_size=1, max_size=3), st.sets(st.sampled_from("abcd")),
        ),
        st.fixed_dictionaries({"anyOf": st.lists(inner, min_size=1, max_size=2)}),
    ),
    max_leaves=6,
)  # fmt: skip


@given(schema=SCHEMAS, data=st.data())
def test_what_is_generated_under_a_schema_is_valid_under_it(
    base_tokenizer: PreTrainedTokenizerBase, schema: dict[str, Any], data: st.DataObject
) -> None:
    """Walks the grammar at random, as a model would; the reply must parse and validate."""
    matcher = LLMatcher(compiler(base_tokenizer, len(base_tokenizer)), constraint({"json": schema}).lark)
    words = np.zeros((len(base_tokenizer) + 31) // 32, dtype=np.int32)
    ids: list[int] = []
    while not matcher.is_stopped():
        words[:] = 0
        matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()
        ids.append(data.draw(st.sampled_from(allowed)))
        assert matcher.consume_token(ids[-1])
    text = base_tokenizer.decode(ids, skip_special_tokens=True)
    value = json.loads(text)
    jsonschema.validate(value, schema)
    assert "\\" in text or json.dumps(value, separators=(",", ":"), ensure_ascii=False) == text or "-0" in text


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "exactly one"),
    ({"json": {}, "regex": "a"}, "exactly one"),
    ({"choice": []}, "list of texts"),
    ({"choice": ["a", ""]}, "none of them empty"),
    ({"regex": "((("}, "missing )"),
    ({"regex": "a)"}, "unbalanced"),
    ({"regex": "(?=a)"}, "groups"),
    ({"regex": r"(a)\1"}, r"\1 is not supported"),
    ({"regex": "a**"}, "multiple repetition"),
    ({"regex": "[z-a]"}, "backwards"),
    ({"regex": "a{9999}"}, "repeats more"),
    ({"regex": "\\"}, "ends too early"),
    ({"regex": "(" * 5000}, "nested too deeply"),
    ({"grammar": "no rules"}, "does not begin with a rule"),
    ({"grammar": 'root ::= "a" | b'}, "'b' is used but not defined"),
    ({"grammar": 'other ::= "a"'}, "no rule 'root'"),
    ({"grammar": 'root ::= root "a" | "b"'}, "left-recursive"),
    ({"grammar": 'root ::= "a" root'}, "never comes to an end"),
    ({"grammar": 'start: ("a"?)*'}, "may be empty repeats"),
    ({"grammar": '%ignore " "\nstart: "a"'}, "%ignore"),
    ({"grammar": 'start: "a"\nstart: "b"'}, "defined twice"),
    ({"json": {"type": 3}}, "unknown type 3"),
    ({"json": {"type": "object", "propertees": {}}}, "'propertees'"),
    ({"json": {"type": "array", "uniqueItems": True}}, "'uniqueItems'"),
    ({"json": {"type": "integer", "minimum": 0, "maximum": 10**6}}, "at most 1000 values"),
    ({"json": {"$ref": "#"}}, "never comes to an end"),
    ({"json": {"$ref": "#/$defs/X"}}, "points to nothing"),
    ({"json": "{"}, "not valid JSON"),
    ({"json": [1]}, "must be an object"),
    ({"grammar": 'start: "' + "x" * 300_000 + '"'}, "at most 200,000"),
]


@pytest.mark.parametrize(("structured", "why"), REFUSED)
def test_what_cannot_be_held_to_is_refused_with_the_reason(structured: dict[str, Any], why: str) -> None:
    with pytest.raises(GrammarError) as refusal:
        constraint(structured)
    assert why in str(refusal.value)


@given(st.sampled_from(["regex", "grammar"]), st.text(st.characters(codec="ascii"), max_size=40))
def test_no_text_raises_anything_but_a_grammar_error(kind: str, text: str) -> None:
    with contextlib.suppress(GrammarError):
        constraint({kind: text})


@pytest.mark.parametrize(
    "asked",
    [
        {"regex": "((a{1000}){1000}){1000}"},
        {"regex": "((a{0,1000}b){0,1000}c){0,1000}"},
        {"grammar": 'root ::= ("x"{1000}){1000}'},
        {"json": {"type": "string", "pattern": "(a{1000}){1000}"}},
        {"json": {"type": "array", "items": {"type": "array", "items": {"type": "string", "maxLength": 1000}, "maxItems": 1000},
                  "maxItems": 1000}},
    ],
)  # fmt: skip
def test_repetitions_of_repetitions_are_refused_before_an_engine_writes_them_out(asked: dict[str, Any]) -> None:
    with pytest.raises(GrammarError, match="repetitions written out"):
        constraint(asked)


@pytest.mark.parametrize("asked", [{"choice": ["\ud800"]}, {"regex": "\udfff"}, {"json": {"enum": ["\ud83d"]}}])
def test_half_a_character_is_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(GrammarError, match="surrogate"):
        constraint(asked)


def test_left_recursion_is_found_through_a_thousand_rules() -> None:
    """Looking from every rule anew took time with the square of their number, while all other requests waited."""
    rules = "\n".join(f'r{i}: r{i + 1} "a" | r0 "b"' if i % 400 == 399 else f'r{i}: r{i + 1} "a"' for i in range(1000))
    began = time.perf_counter()
    with pytest.raises(GrammarError, match="left-recursive"):
        constraint({"grammar": f'start: r0\n{rules}\nr1000: "end"'})
    assert time.perf_counter() - began < 10
