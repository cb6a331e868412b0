"""Simulated people who ask a running service given questions, and say so when the answer was not what they asked for.

Why an AI engineer keeps them behind HTTP: whoever wants to know what the product makes of a question (the ML track's loop does)
then needs no part of the product, only its address. A person is content with an answer that quotes a sentence that answers.

    python -m ai_engineer_track people --url http://127.0.0.1:8000 --questions FILE --out FILE

Both files are JSON lines: rows of `questions.jsonl` in, `Asked` out. Each question is a conversation of its own; a question back
gets "I don't know", as in `evaluate.py`. A thumb goes up or down through `POST /feedback`, like any person's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from pydantic import BaseModel, ConfigDict
from tqdm import tqdm

from ai_engineer_track.evaluate import MAX_REPLIES, reply_of
from shared.errors import UserError
from shared.files import write_jsonl
from shared.library import Question

CONCURRENCY = 8
TIMEOUT_S = 120.0


class Asked(BaseModel):
    """What came of a question. `passages` are the ids of what was retrieved; `right` whether the person was content."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    question_id: str
    answer_id: str
    kind: str
    cited: list[str]
    passages: list[str]
    model_version: str
    right: bool


def ask_all(url: str, questions: Sequence[Question], out: Path) -> list[Asked]:
    """Have all conversations, some at a time, and write down what came of each. UserError when the service does not answer."""
    with tqdm(total=len(questions), desc="  people", leave=False) as bar:
        try:
            asked = asyncio.run(_everybody(url, questions, bar))
        except (httpx.HTTPError, KeyError, ValueError) as error:
            raise UserError(f"the service does not answer ({type(error).__name__}: {error})", url, "Is it running?") from None
    write_jsonl(out, [one.model_dump() for one in asked])
    return asked


def content(question: Question, kind: str, cited: Sequence[str]) -> bool:
    """Is this what the person wanted: a sentence that answers, or, where the library has none, to be told so?"""
    if not question.answerable:
        return kind in ("not_answered", "decline")
    return kind == "answer" and bool(set(cited) & set(question.answer_sentences))


async def _everybody(url: str, questions: Sequence[Question], bar: Any) -> list[Asked]:
    gate = asyncio.Semaphore(CONCURRENCY)

    async def one(question: Question) -> Asked:
        async with gate, httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S) as client:  # a client of its own: its own cookie
            asked = await _ask(client, question)
            bar.update(1)
            return asked

    return list(await asyncio.gather(*(one(question) for question in questions)))


async def _ask(client: httpx.AsyncClient, question: Question) -> Asked:
    exchange = await _say(client, {"message": question.question})
    for _ in range(MAX_REPLIES):
        if not (back := exchange["turn"]["question"]):
            break
        exchange = await _say(client, {"message": reply_of({}, back), "session_id": exchange["session_id"]})
    turn = exchange["turn"]
    cited = [citation["sentence_id"] for citation in turn["citations"]]
    right = content(question, turn["kind"], cited)
    thumb = {"answer_id": exchange["answer_id"], "kind": "thumbs_up" if right else "thumbs_down"}
    (await client.post("/feedback", json=thumb | {"reason": "" if right else "not what I asked"})).raise_for_status()
    return Asked(
        question_id=question.id, answer_id=exchange["answer_id"], kind=turn["kind"], cited=cited,
        passages=[passage["id"] for passage in turn["passages"]], model_version=turn.get("model_version", ""), right=right,
    )  # fmt: skip


async def _say(client: httpx.AsyncClient, body: dict[str, str]) -> dict[str, Any]:
    response = await client.post("/chat", json=body)
    response.raise_for_status()
    exchange: dict[str, Any] = response.json()
    return exchange
