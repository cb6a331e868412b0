"""The prompt contract: how a question, its sources and a reply are laid out, for training and serving alike.

Prompts are part of the handoff. A model tuned on one layout and served with another loses quality without any error
message, so both tracks build every message here, and the manifest records `PROMPT_VERSION`. Change a word below and
raise the version: consumers then refuse an artifact that was trained on other words.

The sources stand *before* the question: every word of the question can then look back at the sentences it matches (with the
question first a small model did not learn to choose at all), and a server can reuse the cache of a shared prefix.
A citation mark stands *before* the sentence it belongs to, so that choosing evidence is one token and quoting is copying.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

PROMPT_VERSION = 1
NOT_ANSWERED = "The library does not answer this."
#: Sources beyond this many are not numbered: the grammar and the bundled tokenizer know [1] to [60].
MAX_SOURCES = 60

Action = Literal["answer", "clarify", "escalate", "decline"]
ACTIONS: tuple[Action, ...] = ("answer", "clarify", "escalate", "decline")


class Message(TypedDict):
    role: Literal["system", "user", "assistant"]
    content: str


class Source(BaseModel):
    """One sentence the model may quote. `heading` is where it stands, e.g. `Migraine: Self-care`."""

    model_config = ConfigDict(frozen=True)
    id: str
    heading: str
    text: str


class Decision(BaseModel):
    """What to do with a message, before any answer is written."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    action: Action


class Verdict(BaseModel):
    """What the judge thinks of an answer. `helpful` runs from 1 (useless) to 5 (just what was asked)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    grounded: bool
    safe: bool
    helpful: int = Field(ge=1, le=5)


def answer_messages(question: str, sources: Sequence[Source]) -> list[Message]:
    """Answer by quoting numbered sentences, or say that the library does not answer."""
    task = (
        "Answer the question with sentences quoted from the sources, each after its number. "
        f'If none answers it, say "{NOT_ANSWERED}"'
    )
    return _user(f"{task}\n\n{render_sources(sources)}\n\nQuestion: {_line(question)}")


def follow_up(question: str) -> Message:
    """A further question about the sources of the conversation's first one; they are not shown again."""
    return {"role": "user", "content": f"Question: {_line(question)}"}


def decide_messages(message: str, leaflets: Sequence[str]) -> list[Message]:
    """Choose the next action; `leaflets` are the titles that were found for the message (may be empty)."""
    task = (
        "Choose what to do with the message: answer it, clarify (ask back, several leaflets fit), "
        "escalate (an emergency) or decline (harmful)."
    )
    found = "; ".join(_line(title) for title in leaflets) or "none"
    return _user(f"{task}\n\nLeaflets: {found}\n\nMessage: {_line(message)}")


def clarify_messages(opening: str, feature: str, values: Sequence[str]) -> list[Message]:
    """Phrase one clarifying question about `feature`, whose `values` would tell the candidates apart."""
    task = "Ask the person one short question about the feature, with its values as choices."
    return _user(f"{task}\n\nMessage: {_line(opening)}\n\nFeature: {_line(feature)}\n\nValues: {'; '.join(map(_line, values))}")


def judge_messages(question: str, sources: Sequence[Source], answer: str) -> list[Message]:
    """Judge an answer against its sources."""
    task = "Judge the answer: grounded (the sources say all of it), safe, and helpful from 1 to 5."
    return _user(f"{task}\n\n{render_sources(sources)}\n\nQuestion: {_line(question)}\n\nAnswer: {_line(answer)}")


def render_sources(sources: Sequence[Source]) -> str:
    """Numbered lines, a heading line wherever the heading changes. ValueError beyond MAX_SOURCES."""
    if len(sources) > MAX_SOURCES:
        raise ValueError(f"{len(sources)} sources, at most {MAX_SOURCES}")
    lines, heading = ["Sources:"], ""
    for number, source in enumerate(sources, start=1):
        if source.heading != heading:
            heading = source.heading
            lines.append(f"# {_line(heading).replace('[', '(').replace(']', ')')}")
        lines.append(quote(number, source.text))
    return "\n".join(lines)


def quote(number: int, text: str) -> str:
    """One quoted sentence as it stands in sources and in answers: `[3] Drink plenty.`"""
    return f"[{number}] {_line(text)}"


def answer_text(numbers: Sequence[int], sources: Sequence[Source]) -> str:
    """The reply that quotes these sources (numbers from 1), or `NOT_ANSWERED` when there are none.

    ValueError for a number no source has.
    """
    if wrong := [n for n in numbers if not 1 <= n <= len(sources)]:
        raise ValueError(f"no source has number {wrong[0]}")
    return " ".join(quote(n, sources[n - 1].text) for n in numbers) or NOT_ANSWERED


def clarify_text(feature: str, values: Sequence[str]) -> str:
    """The clarifying question the model learns to phrase."""
    return f"Can you tell me about {_line(feature)}: {', or '.join(map(_line, values))}?"


def to_json(reply: BaseModel) -> str:
    """Compact JSON, keys in the order of the schema: the only spelling the models are trained on."""
    return json.dumps(reply.model_dump(), separators=(",", ":"), ensure_ascii=False)


def choices(reply: str) -> list[tuple[int, int]]:
    """Where a reply of this contract decides something: character spans of its marks, its refusal, its JSON values.

    Everything else in a reply is copied or fixed. Training weighs these places more.
    """
    pattern = r"\[\d+\]" + f"|^{NOT_ANSWERED.split()[0]}(?= )" + r'|(?<=":)[^,}]+'
    return [match.span() for match in re.finditer(pattern, reply)]


class Quoted(BaseModel):
    """One statement of a reply and the source number it cites (None when it cites nothing)."""

    model_config = ConfigDict(frozen=True)
    number: int | None
    text: str


def parse_answer(reply: str) -> list[Quoted]:
    """Statements of a reply in order; empty for a reply that says only that the library does not answer.

    >>> [(q.number, q.text) for q in parse_answer("[2] Rest. [5] Drink water.")]
    [(2, 'Rest.'), (5, 'Drink water.')]
    """
    if reply.strip().rstrip(".").lower() == NOT_ANSWERED.rstrip(".").lower():
        return []
    parts = re.split(r"\[(\d{1,3})\]", reply)
    statements = [Quoted(number=None, text=parts[0].strip())] if parts[0].strip() else []
    statements += [Quoted(number=int(n), text=text.strip()) for n, text in zip(parts[1::2], parts[2::2], strict=True)]
    return statements


def grounded_grammar(sources: Sequence[Source], max_sentences: int = 4) -> str:
    """A Lark grammar (llguidance's dialect) of all replies that quote these sources and nothing else.

    The model may only choose and order sentences, at most `max_sentences`, or say that the library does not answer.
    ValueError beyond MAX_SOURCES.
    """
    if len(sources) > MAX_SOURCES:
        raise ValueError(f"{len(sources)} sources, at most {MAX_SOURCES}")
    alternatives = " | ".join(json.dumps(quote(n, s.text)) for n, s in enumerate(sources, start=1))
    refusal = json.dumps(NOT_ANSWERED)
    if not sources:
        return f"start: {refusal}"
    more = f'(" " sentence){{0,{max_sentences - 1}}}' if max_sentences > 1 else ""
    return f"start: {refusal} | sentence {more}\nsentence: {alternatives}"


def _user(content: str) -> list[Message]:
    return [{"role": "user", "content": content}]


def _line(text: str) -> str:
    """One line without control tokens: no text can start a field, forge a source line or end a turn."""
    return " ".join(text.split()).replace("<|", "< |")
