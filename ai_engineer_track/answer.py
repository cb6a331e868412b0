"""Writing the answer: quotations under a grammar, every sentence with a citation that resolves, or an honest "not answered".

Why an AI engineer binds the decoder instead of asking it nicely: a small model cannot be trusted with free prose about health.
In `grounded` mode the reply is decoded under a grammar whose only words are the retrieved sentences, so it chooses
evidence and cannot say what the sources do not say. In `free` mode, for models whose measured faithfulness earns it, statements
without a citation are dropped. What is cited is then compared with the library, character by character.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from ai_engineer_track.llm import LlmNonsense, Reply
from ai_engineer_track.router import Router
from ai_engineer_track.settings import Answer
from ai_engineer_track.turn import Citation
from shared import chat
from shared.passages import Passage

TOKENS_PER_SENTENCE = 90  # the longest sentence of the library with its mark, in tokens of a small vocabulary


class Written(BaseModel):
    """An answer, or `refused`. `text` keeps the marks (`[2] Rest.`) that `citations` resolve."""

    model_config = ConfigDict(frozen=True)
    text: str
    citations: list[Citation]
    refused: bool
    verified: bool | None
    replies: list[Reply]


async def write(
    question: str,
    sources: Sequence[chat.Source],
    passages: Mapping[str, Passage],
    router: Router,
    settings: Answer,
    *,
    may_refuse: bool,
    confidence: float = 1.0,
    on_text: Callable[[str], None] | None = None,
) -> Written:
    """The model's answer to `question` from `sources`.

    `may_refuse` False: the library surely answers (another head says so), and only quotations are allowed. LlmUnavailable as
    it comes; LlmNonsense when two replies in a row hold nothing that can be cited.
    """
    if not sources:
        return Written(text=chat.NOT_ANSWERED, citations=[], refused=True, verified=None, replies=[])
    replies: list[Reply] = []
    for mode in (settings.mode, "grounded"):
        structured = {"grammar": grammar(sources, settings.max_sentences, may_refuse)} if mode == "grounded" else None
        reply = await router.chat(
            "answer",
            chat.answer_messages(question, sources),
            max_tokens=TOKENS_PER_SENTENCE * settings.max_sentences,
            structured=structured,
            on_text=on_text if not replies else None,  # a second attempt replaces the first, and is shown when it stands
            confidence=confidence,
        )
        replies.append(reply)
        said = chat.parse_answer(reply.text)
        if not said and may_refuse and reply.text.strip():
            return Written(text=chat.NOT_ANSWERED, citations=[], refused=True, verified=None, replies=replies)
        kept = [s for s in said if s.number is not None and 1 <= s.number <= len(sources) and s.text]
        if mode == "grounded":
            kept = [s for s in kept if verbatim(s, sources)]
        kept = list({s.number: s for s in kept}.values())[: settings.max_sentences if mode == "grounded" else None]
        if kept:
            citations = [cite(s.number, sources[s.number - 1], passages) for s in kept if s.number]
            text = " ".join(chat.quote(s.number, s.text) for s in kept if s.number)
            exact = all(verbatim(s, sources) for s in kept) and all(in_library(c, passages) for c in citations)
            return Written(text=text, citations=citations, refused=False, verified=exact, replies=replies)
    raise LlmNonsense("no sentence of the reply stands in the sources")


def grammar(sources: Sequence[chat.Source], max_sentences: int, may_refuse: bool) -> str:
    """The contract's grammar; without `may_refuse` only quotations remain."""
    made = chat.grounded_grammar(sources, max_sentences)
    refusal = f"start: {json.dumps(chat.NOT_ANSWERED)} | "
    return made if may_refuse else made.replace(refusal, "start: ", 1)


def verbatim(statement: chat.Quoted, sources: Sequence[chat.Source]) -> bool:
    """Whether a statement is, character by character, the sentence it cites."""
    number = statement.number
    return (
        number is not None
        and 1 <= number <= len(sources)
        and chat.quote(number, sources[number - 1].text) == chat.quote(number, statement.text)
    )


def cite(number: int, source: chat.Source, passages: Mapping[str, Passage]) -> Citation:
    """The citation of a source: which leaflet, section and sentence it is."""
    passage_id = source.id.rsplit("/", 1)[0]
    passage = passages.get(passage_id)
    title, _, section = source.heading.partition(": ")
    return Citation(
        number=number,
        sentence_id=source.id,
        leaflet=passage.document if passage else passage_id.split("/")[0],
        title=passage.title if passage else title,
        section=passage.section if passage else section,
        text=source.text,
    )


def in_library(citation: Citation, passages: Mapping[str, Passage]) -> bool:
    """Whether the cited sentence stands so in the index."""
    passage = passages.get(citation.sentence_id.rsplit("/", 1)[0])
    return passage is not None and any(s.id == citation.sentence_id and s.text == citation.text for s in passage.sentences)
