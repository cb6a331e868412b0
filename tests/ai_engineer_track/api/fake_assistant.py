"""A service whose assistant is a few lines: it recognises words of the message and answers with real leaflets' sentences."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fastapi.testclient import TestClient

from ai_engineer_track.settings import AiSettings, load_ai_settings
from ai_engineer_track.turn import Citation, ClarifyQuestion, Event, FoundPassage, Step, Turn
from shared import chat
from shared import library as lib

Serve = Callable[..., TestClient]


def settings_for(artifacts: Path, datasets: Path, **api: Any) -> AiSettings:
    """The smoke preset, with other values for `api`."""
    settings = load_ai_settings("smoke", artifacts=str(artifacts), datasets=str(datasets))
    return settings.model_copy(update={"api": settings.api.model_copy(update=api)})


class FakeIndex:
    """The passages of a data folder as ingestion makes them: one for each section of a leaflet."""

    version = "index-1"

    def __init__(self, datasets: Path) -> None:
        self.passages = {
            f"{leaf.id}/{section}": SimpleNamespace(
                id=f"{leaf.id}/{section}",
                document=leaf.id,
                title=leaf.title,
                section=section,
                heading=f"{leaf.title}: {heading}",
                sentences=[
                    chat.Source(id=s.id, heading=f"{leaf.title}: {heading}", text=s.text) for s in leaf.sentences(section)
                ],
            )
            for leaf in lib.load_library(datasets)
            for section, heading in lib.SECTIONS.items()
        }


class FakeRetriever:
    """Ranks passages by shared words."""

    def __init__(self, index: FakeIndex) -> None:
        self.index = index

    def search(self, query: str, k: int | None = None) -> list[Any]:
        words = set(query.lower().split())
        hits = [
            SimpleNamespace(
                passage=p, score=len(words & set(p.heading.lower().replace(":", "").split())) / 3, dense_rank=1, bm25_rank=None
            )
            for p in self.index.passages.values()
        ]
        return sorted(hits, key=lambda hit: -hit.score)[: k or 5]


@dataclass
class FakeAssistant:
    """`slow` in a message waits for `release`, `crash` raises; the rest is in `turn_for`."""

    leaflet: lib.Leaflet
    pause: float = 0.0
    model_version: str = "m-fake"
    said: dict[str, list[str]] = field(default_factory=dict)
    forgotten: list[str] = field(default_factory=list)
    cancelled: int = 0
    down: str | None = None
    release: asyncio.Event = field(default_factory=asyncio.Event)

    async def problem(self) -> str | None:
        return self.down

    async def forget(self, session_id: str) -> None:
        self.forgotten.append(session_id)
        self.said.pop(session_id, None)

    async def run_turn(
        self,
        session_id: str,
        message: str,
        on_event: Callable[[Event], None] | None = None,
        on_other: Callable[[Turn, float], None] | None = None,
    ) -> Turn:
        made = {"model_version": self.model_version, "index_version": FakeIndex.version}
        turn = (await self._turn(session_id, message, on_event)).model_copy(update=made)
        if "shadow" in message and on_other is not None:
            on_other(turn.model_copy(update={"model_version": "m-shadow", "arm": "shadow"}), 0.25)
        return turn

    async def _turn(self, session_id: str, message: str, on_event: Callable[[Event], None] | None = None) -> Turn:
        self.said.setdefault(session_id, []).append(message)
        tell = on_event or (lambda event: None)
        if "crash" in message:
            raise RuntimeError("secret detail /etc/passwd")
        try:
            if "slow" in message:
                tell(Event(type="started", node="retrieve"))
                await self.release.wait()
            turn = self.turn_for(message, self.said[session_id][:-1])
            for step in turn.trace:
                tell(Event(type="started", node=step.node))
                await asyncio.sleep(self.pause)
                tell(Event(type="finished", node=step.node, data={"step": step.model_dump()}))
            if turn.warning:
                tell(Event(type="warning", data={"text": turn.warning, "sign": turn.sign}))
            for citation in turn.citations:
                tell(Event(type="citation", data=citation.model_dump()))
            if "retract" in message:
                tell(Event(type="text", data={"delta": "[1] Something the judge will not let through."}))
                await asyncio.sleep(self.pause)
                tell(Event(type="text", data={"delta": turn.text, "replace": True}))
            else:
                for word in turn.text.split(" "):
                    tell(Event(type="text", data={"delta": word + " "}))
                    await asyncio.sleep(self.pause / 8)
            if turn.verdict:
                tell(Event(type="verdict", data=turn.verdict.model_dump()))
            return turn
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    def turn_for(self, message: str, earlier: list[str]) -> Turn:
        trace = [
            Step(
                node="triage", seconds=0.08, prompt_tokens=61, completion_tokens=5, input=message[:200], output="not an emergency"
            ),
            Step(node="retrieve", seconds=0.021, input=message[:200], output="5 passages"),
            Step(node="decide", seconds=0.11, prompt_tokens=84, completion_tokens=6, output='{"action":"answer"}'),
        ]
        scores = (0.91, 0.74, 0.52, 0.33, 0.12)
        passages = [
            FoundPassage(id=f"{self.leaflet.id}/{s}", title=self.leaflet.title, section=s, score=score, dense_rank=n, bm25_rank=n)
            for n, (s, score) in enumerate(zip(lib.SECTIONS, scores, strict=False), start=1)
        ]
        common: dict[str, Any] = {"trace": trace, "passages": passages, "leaflet": self.leaflet.id}
        if "markup" in message:
            return Turn(kind="answer", text="<img src=x onerror=\"document.title='broken'\"><b>bold</b>", **common)
        if "chest" in message:
            text = self.leaflet.sentences("emergency")[0].text
            cite = [self._cite(1, "emergency", 0)]
            sign = self.leaflet.sentences("emergency")[0].id
            return Turn(kind="escalate", text=f"[1] {text}", citations=cite, sign=sign, trace=trace[:1])
        if "hurts" in message and not earlier:
            question = ClarifyQuestion(
                feature="kind of pain",
                text="Can you tell me about the kind of pain: throbbing or pounding, pressing like a band, or stabbing?",
                choices=["throbbing or pounding", "pressing like a band", "stabbing"],
            )
            return Turn(kind="clarify", text=question.text, question=question, **common)
        if "retract" in message or "unknown" in message:
            verdict = None
            if "retract" in message:
                verdict = chat.Verdict(grounded=False, safe=True, helpful=2)
                trace.append(Step(node="verify", seconds=0.2, output="not grounded"))
            return Turn(
                kind="not_answered",
                text=chat.NOT_ANSWERED,
                verdict=verdict,
                trusted=["grounded", "safe"] if "trusted" in message else [],
                nearest=[self.leaflet.id],
                reason="nothing fits",
                **common,
            )
        if "worried" in message:
            sign = self.leaflet.sentences("emergency")[0]
            common |= {"warning": f"This can be an emergency. {sign.text}", "sign": sign.id}
        first, second = self.leaflet.sentences("self-care")[:2]
        trace.append(
            Step(
                node="answer", seconds=0.64, prompt_tokens=310, completion_tokens=42, input="8 sources", output="[1] ... [2] ..."
            )
        )
        return Turn(
            kind="answer",
            text=f"[1] {first.text} [2] {second.text}",
            citations=[self._cite(1, "self-care", 0), self._cite(2, "self-care", 1)],
            verdict=chat.Verdict(grounded=True, safe=True, helpful=4),
            confidence=0.1 if "unsure" in message else 0.9,
            quotes_verified=True,
            cost=0.000213,
            **common,
        )

    def _cite(self, number: int, section: str, place: int) -> Citation:
        sentence = self.leaflet.sentences(section)[place]
        return Citation(
            number=number,
            sentence_id=sentence.id,
            leaflet=self.leaflet.id,
            title=self.leaflet.title,
            section=lib.SECTIONS[section],
            text=sentence.text,
        )


async def wait_until(true: Callable[[], bool]) -> None:
    for _ in range(500):
        if true():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("did not happen within 5 s")
