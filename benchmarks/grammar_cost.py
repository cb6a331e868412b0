"""What a grammar costs: time per token of 16 chats at once, held to a grammar and not, 200 tokens each.

Why: constrained decoding is what makes a small model usable, so it must not be paid for with the speed of everybody in the batch.

Both sides write the same number of tokens: every grammar below is one that cannot come to its end within a reply. No grammar
is used twice and every request brings its own where the product does (each answer quotes other sentences), so compiling them
is in the time. Two kinds of masks must be told apart:

* *masked* kinds (any text; verdicts with a reason in free words): every token is decoded under a mask;
* *jumping* kinds (decisions; quotations): where the grammar leaves one continuation the server writes it without asking the
  model. `forced_share` says how many tokens that are; their time per token says what a client waits, not what a mask costs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import httpx

from benchmarks.budget import interleaved
from benchmarks.load import TIMEOUT, Ask, Load, Target, figures, samples
from benchmarks.results import Record
from benchmarks.sides import Chats, over_http
from shared.chat import Decision, Source, Verdict, grounded_grammar
from shared.library import load_library
from shared.settings import ROOT

BATCH, NEW_TOKENS = 16, 200
SENTENCES = 40
#: objects a list must have: just more than a reply has room for, because a counted list is compiled place by place. An empty
#: verdict takes at least 20 tokens, a decision at least 7.
VERDICTS, DECISIONS = 10, 30
Structured = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """A kind of grammar: its `structured_outputs` field for request `row` of turn `turn`, other ones in every turn."""

    name: str
    structured: Callable[[int, int], Structured]
    jumps: bool


def any_text(turn: int, row: int) -> Structured:
    """Any text, until a character comes that the model does not write."""
    end = chr(0x4E00 + turn)
    return {"regex": f"[^{end}]*{end}"}


def verdicts(turn: int, row: int) -> Structured:
    """A list of verdicts, each with its reason first."""
    schema = Verdict.model_json_schema()
    schema["properties"] = {"reason": {"type": "string"}, **schema["properties"]}
    schema["required"] = ["reason", *schema["required"]]
    return {"json": list_of(schema, VERDICTS, turn)}


def decisions(turn: int, row: int) -> Structured:
    return {"json": list_of(Decision.model_json_schema(), DECISIONS, turn)}


def quotations(turn: int, row: int) -> Structured:
    """The grammar of a grounded answer, but of exactly so many sentences; other sentences for every request."""
    sentences = [(leaflet.title, s) for leaflet in load_library(ROOT / "datasets") for s in leaflet.sentences()]
    drawn = random.Random(f"{turn}/{row}").sample(sentences, SENTENCES)
    rule = grounded_grammar([Source(id=s.id, heading=title, text=s.text) for title, s in drawn]).splitlines()[1]
    return {"grammar": f'start: sentence (" " sentence){{{SENTENCES - 1},{SENTENCES - 1}}}\n{rule}'}


def list_of(schema: dict[str, Any], least: int, turn: int) -> dict[str, Any]:
    """At least so many objects; the upper bound, never reached, makes the grammar of every turn a new one."""
    bounds = {"minItems": least, "maxItems": least + 1 + turn}
    return {"type": "array", **bounds, "items": {"$ref": "#/$defs/Item"}, "$defs": {"Item": schema}}


KINDS = (
    Kind("regex, any text", any_text, jumps=False),
    Kind("JSON schema, verdicts with a reason", verdicts, jumps=False),
    Kind("JSON schema, decisions", decisions, jumps=True),
    Kind(f"quotations of {SENTENCES} sentences", quotations, jumps=True),
)
FREE = "no grammar"


def grammar_cost(target: Target, chats: Chats, rounds: Callable[[float], int], slo: dict[str, float]) -> Iterator[Record]:
    """A record without a grammar and one for each kind. `rounds` says how many rounds of so many seconds there is time for."""
    chats = replace(chats, new_tokens=NEW_TOKENS)
    send = over_http("", target, BATCH, BATCH).run
    turns = {kind.name: 0 for kind in KINDS}

    def free() -> Load:
        return send(chats.take(BATCH))

    def held(kind: Kind) -> Load:
        turns[kind.name] += 1
        structured = [kind.structured(turns[kind.name], row) for row in range(BATCH)]
        return send([replace(ask, extra={"structured_outputs": s}) for ask, s in zip(chats.take(BATCH), structured, strict=True)])

    sides: dict[str, Callable[[], Load]] = {FREE: free, **{kind.name: partial(held, kind) for kind in KINDS}}
    warm = [side() for side in sides.values()]
    loads = interleaved(sides, rounds(sum(load.duration for load in warm)))
    for name, of_side in loads.items():
        kind = next((kind for kind in KINDS if kind.name == name), None)
        found = figures(of_side, slo)
        if kind is not None:
            found["grammar_cost"] = cost(of_side, loads[FREE])
            found["forced_share"] = forced_share(target, chats.take(1)[0], kind.structured(turns[name] + 1, 0))
        case: dict[str, str | int | float] = {
            "what": "grammar", "grammar": name, "max_concurrency": BATCH,
            "prompt_tokens": chats.prompt_tokens, "new_tokens": NEW_TOKENS,
        }  # fmt: skip
        yield Record(suite="", model="", case=case, metrics=found, samples=samples(of_side), note=note_of(kind, of_side))


def cost(held: list[Load], free: list[Load]) -> float | None:
    """Time per token under the grammar / without one; a time per token is the batch's time / the tokens of whole replies."""
    sides = [(sum(a.output_tokens for load in loads for a in load.answers if a.ok), loads) for loads in (held, free)]
    if not all(tokens for tokens, _ in sides):
        return None
    mine, other = (sum(load.duration for load in loads) / tokens for tokens, loads in sides)
    return mine / other


def note_of(kind: Kind | None, loads: list[Load]) -> str:
    """What a reader must know before the ratio is read."""
    answers = [a for load in loads for a in load.answers]
    short = sum(a.ok and a.output_tokens != NEW_TOKENS for a in answers)
    told = ["the server writes forced tokens without asking the model"] if kind is not None and kind.jumps else []
    if short:
        told.append(f"{short} of {len(answers)} replies did not have {NEW_TOKENS} tokens")
    return "; ".join(told)


def forced_share(target: Target, ask: Ask, structured: Structured) -> float | None:
    """Share of a reply's tokens the grammar left no choice about: those the server gives no log probability (0.0) for."""
    body = {
        "model": target.model, "messages": [{"role": "user", "content": ask.prompt}], "max_tokens": ask.output_tokens,
        "temperature": 0.0, "logprobs": True, "structured_outputs": structured, **target.extra,
    }  # fmt: skip
    try:
        answer = httpx.post(f"{target.base_url}/chat/completions", json=body, headers=target.headers, timeout=TIMEOUT)
        answer.raise_for_status()
        tokens = answer.json()["choices"][0]["logprobs"]["content"]
        return float(sum(token["logprob"] == 0.0 for token in tokens) / len(tokens))
    except (httpx.HTTPError, KeyError, TypeError, ZeroDivisionError):
        return None
