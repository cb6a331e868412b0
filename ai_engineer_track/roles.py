"""The roles of the graph in `agent.py`: triage nurse, librarian, decider, interviewer, writer, reviewer.

Why an AI engineer gives each role its own function, prompt and model call: each can then be measured and replaced alone. A role
reads the state, does one thing with the tools of its own file, writes a step into the trace, and names who comes next.
"""

from __future__ import annotations

import asyncio
import copy
from typing import TYPE_CHECKING, Any

import numpy as np

from ai_engineer_track import intake
from ai_engineer_track.answer import Written, cite, write
from ai_engineer_track.cache import AnswerCache
from ai_engineer_track.clarify import Interviewer, names, phrase_pattern
from ai_engineer_track.decide import Decider
from ai_engineer_track.evidence import Evidence
from ai_engineer_track.harm import HarmHead
from ai_engineer_track.judge import fails, judge, trusted_rubrics
from ai_engineer_track.llm import Llm, LlmNonsense, LlmUnavailable
from ai_engineer_track.memory import Fact, in_context, recall, remember
from ai_engineer_track.router import Router
from ai_engineer_track.settings import AiSettings
from ai_engineer_track.trace import recorder, step
from ai_engineer_track.triage import TriageNurse
from ai_engineer_track.turn import ClarifyQuestion, Event, FoundPassage, Reply, Turn
from shared import chat
from shared import library as lib
from shared.errors import UserError
from shared.passages import StoredVectors

if TYPE_CHECKING:
    from ai_engineer_track.agent import State

SORRY = "I can't answer right now, because the language model cannot be reached. Please try again in a moment."
EMERGENCY = "This sounds like an emergency. Call the emergency number now, or go to the nearest emergency department."
WARNING = "This can be an emergency. Call the emergency number now if it gets worse fast, or if this is true:"
WARNING_ALONE = "This can be an emergency. Call the emergency number now if it gets worse fast, or if you are afraid for a life."
WITHHELD = "I found something, but it did not pass the check, so I don't show it. Please see the leaflets below."
NEAREST = 3  # leaflets named when nothing answers
COVERED = 0.55  # cosine of a document above which a message needs no context to be understood
REPLY_EMERGENCY, SHORT_REPLY = 0.5, 6  # probability from which, and words beyond which, a reply is an emergency by the heads
SURE = 0.5  # share of its threshold below which a refusal is out of the question


class Roles:
    """Everything the roles need, opened once. `retriever` is a `retrieve.Retriever` with its index."""

    def __init__(self, settings: AiSettings, retriever: Any, llm: Llm, judge_llm: Llm, large: Llm | None = None) -> None:
        self.settings, self.retriever, self.index = settings, retriever, retriever.index
        self.router, self.judge_llm = Router(llm, large), judge_llm
        embed = StoredVectors(settings.artifacts / "vectors.npz", self.index.embed)
        passages = self.index.passages.values()
        signs = [s for p in passages if p.section == "emergency" for s in p.sentences]
        self.nurse = TriageNurse(settings, embed, signs)
        self.harm = HarmHead(settings, embed)
        self.evidence = Evidence(self.index)
        self.decider = Decider(settings, self.evidence, embed)
        self.interviewer = Interviewer(_leaflets(settings), self.evidence, embed, self.index.embed)
        self.families = {p.document: p.family or "" for p in passages}
        self.cache: AnswerCache | None = None
        self.caching = True  # False: this model's answers are neither taken from the cache nor put there

    def with_model(self, settings: AiSettings, retriever: Any, llm: Llm, judge_llm: Llm, large: Llm | None = None) -> Roles:
        """The same roles over another model and its ranker. What was learnt from the library and the rows is shared."""
        other = copy.copy(self)
        other.settings, other.caching = settings, False
        other.retriever, other.router, other.judge_llm, other.cache = retriever, Router(llm, large), judge_llm, None
        return other

    # --- the triage nurse ---------------------------------------------------------------------------------------------

    async def triage(self, state: State) -> State:
        """Emergencies first, then harm, then whether there is anything to read."""
        with step("triage", state["message"]) as work:
            message = intake.take(state["message"], self.settings.api.max_chars, self.evidence.vocabulary)
            replying = bool(state.get("replies"))
            if message.problem and not (replying and message.reason in ("another language", "empty")):
                work.output = message.reason
                return {"next": "refuse", "reading": {"why": message.problem, "reason": message.reason}, "warning": {}}
            vector = await asyncio.to_thread(self._vector, message.text or "-")
            vote = self.nurse.judge(message.text, vector)
            harm = self.harm.judge(message.text, vector)
            work.output = (
                "; ".join(f"{voter}: {said}" for voter, said in vote.votes().items()) + f"; harm: {harm.probability:.2f}"
            )
            # The heads know whole messages: of a reply ("yes, sweating") they have to be surer.
            surer = vote.probability >= REPLY_EMERGENCY and len(message.text.split()) > SHORT_REPLY
            emergency = vote.rule is not None or (surer if replying else vote.emergency)
            if emergency:
                sign = await self._sign(message.text, vector)
                reading: dict[str, Any] = {"sign": sign, "why": "", "reason": vote.rule or ", ".join(vote.alarms)}
                return {"next": "escalate", "reading": reading, "warning": {}}
            if harm.declined and not replying:
                why = f"{harm.reason} {harm.next_step}"
                return {"next": "decline", "reading": {"why": why, "reason": harm.kind}, "warning": {}}
            opening = state.get("opening") or message.text
            warning = self._warn(await self._sign(message.text, vector)) if vote.warning and not replying else {}
            return {"next": "retrieve", "message": message.text, "opening": opening, "reading": {}, "warning": warning}

    async def _sign(self, message: str, vector: Any) -> str | None:
        """The emergency sign this falls under, from the leaflet that a search finds first."""
        hits = await asyncio.to_thread(self.retriever.search, message, 1)
        return self.nurse.nearest_sign(vector, hits[0].passage.document if hits else None)[0]

    def _warn(self, sign: str | None) -> dict[str, Any]:
        """Shown at once, whatever the answer will be. Replies to a question back are too short to be warned about."""
        source = next((s for s in self.nurse.signs if s.id == sign), None)
        warning = {"text": f"{WARNING} {source.text}" if source else WARNING_ALONE, "sign": sign}
        recorder().emit(Event(type="warning", data=warning))
        return warning

    async def escalate(self, state: State) -> State:
        """The emergency number, and the sign in the leaflets that this falls under."""
        with step("escalate") as work:
            text, citations = EMERGENCY, []
            sign = state["reading"].get("sign")
            source = next((s for s in self.nurse.signs if s.id == sign), None)
            if source is not None:
                citations = [cite(1, source, self.index.passages)]
                text = f"{EMERGENCY} {chat.quote(1, source.text)}"
            turn = Turn(
                kind="escalate", text=text, citations=citations, sign=sign, reason=state["reading"]["reason"],
                leaflet=sign.split("/")[0] if sign else None, quotes_verified=bool(citations) or None,
            )  # fmt: skip
            work.output = text
            _show(turn)
            return _end(turn)

    async def decline(self, state: State) -> State:
        """A reason and a next step."""
        with step("decline") as work:
            turn = Turn(kind="decline", text=state["reading"]["why"], reason=state["reading"]["reason"])
            work.output = turn.text
            _show(turn)
            return _end(turn)

    # --- the librarian ------------------------------------------------------------------------------------------------

    async def retrieve(self, state: State) -> State:
        """Passages for the problem: its opening, read in the context of the last answer where it leans on it."""
        with step("retrieve", state["opening"]) as work:
            opening, replies = state["opening"], [Reply(**r) for r in state.get("replies", [])]
            vector = await asyncio.to_thread(self._vector, opening)
            covered = float(self.evidence.document_scores(vector[None]).max()) >= COVERED
            last = self.evidence.titles.get(state.get("last", ""), "")
            query = in_context(opening, last, covered)
            if query != opening:
                vector = await asyncio.to_thread(self._vector, query)
            first = self.interviewer.believe(vector)
            known = recall([Fact(**f) for f in state.get("facts", [])], self.families.get(first.best, ""))
            belief = self.interviewer.believe(vector, [*known, *replies])
            # Once somebody has told what sets the leaflets apart, the passages come from the one that fits.
            where = {"document": belief.best} if replies else None
            hits = await asyncio.to_thread(self.retriever.search, query, None, None, where)
            sources = await asyncio.to_thread(self.retriever.best_sentences, query, hits, self.settings.answer.max_sources)
            best = belief.best if replies or known else (hits[0].passage.document if hits else belief.best)
            found = [
                FoundPassage(
                    id=h.passage.id, title=h.passage.title, section=h.passage.section, score=float(h.score),
                    dense_rank=h.dense_rank, bm25_rank=h.bm25_rank,
                ).model_dump()
                for h in hits
            ]  # fmt: skip
            nearest = list(dict.fromkeys([best, *(h.passage.document for h in hits), *belief.candidates]))[:NEAREST]
            work.output = "; ".join(f"{f['id']} ({f['score']:.3f})" for f in found)
            reading = {
                "query": query, "personal": bool(known or replies or query != opening),
                "sources": [s.model_dump() for s in sources],
                "known": [r.model_dump() for r in known],
                "shown": {"leaflet": best, "nearest": nearest, "passages": found},
            }  # fmt: skip
            return {"reading": reading}

    # --- the decider --------------------------------------------------------------------------------------------------

    async def decide(self, state: State) -> State:
        """From the cache, ask back, answer, or say that the library does not answer. The model's own vote is noted."""
        with step("decide", state["opening"]) as work:
            reading = state["reading"]
            query = reading["query"]
            vector = await asyncio.to_thread(self._vector, query)
            cache = await self._open_cache()
            if cache is not None and not reading["personal"] and (cached := cache.get(query, vector)):
                work.output = "answered before"
                turn = cached.model_copy(update={"cached": True})
                _show(turn)
                return {**_end(turn), "last": turn.leaflet or ""}
            ask, refusal = self.decider.ask_back(query, vector), self.decider.refusal(query, vector)
            vote = await self._model_vote(query, reading["shown"]["passages"], work)
            work.output = f"ask back {ask:.2f}, not answered {refusal:.2f}; model: {vote}"
            reading = {**reading, "refusal": refusal / max(1e-6, self.decider.refusal_threshold)}
            asked = len(state.get("replies", []))
            vague = asked > 0 or self.decider.needs_question(query, vector)
            if vague and asked < self.settings.clarify.max_turns:
                replies = [Reply(**r) for r in [*reading["known"], *state.get("replies", [])]]
                question = self.interviewer.ask(self.interviewer.believe(vector, replies), vector, replies)
                if question is not None:
                    reading["ask"] = {"feature": question.feature, "values": question.values}
                    return {"next": "clarify", "reading": reading}
            told = any(not Reply(**r).unknown for r in state.get("replies", []))  # asked in vain, the opening is all there is
            if not told and (asked or not vague) and self.decider.needs_refusal(query, vector):
                return {"next": "refuse", "reading": {**reading, "why": "", "reason": "not in the library"}}
            return {"next": "answer", "reading": reading}

    async def _model_vote(self, query: str, passages: list[dict[str, Any]], work: Any) -> str:
        titles = list(dict.fromkeys(p["title"] for p in passages))[:3]
        choices = {chat.to_json(chat.Decision(action=a)): a for a in chat.ACTIONS}
        try:
            reply = work.count(
                await self.router.chat(
                    "decide", chat.decide_messages(query, titles), max_tokens=16, structured={"choice": list(choices)}
                )
            )
        except (LlmUnavailable, LlmNonsense):
            return "no opinion"
        return choices[reply.text.strip()]

    # --- the interviewer ----------------------------------------------------------------------------------------------

    async def clarify(self, state: State) -> State:
        """One question, in the model's words where it finds some, in the contract's otherwise."""
        reading = state["reading"]
        feature, values = reading["ask"]["feature"], reading["ask"]["values"]
        with step("clarify", f"{feature}: {'; '.join(values)}") as work:
            text = chat.clarify_text(feature, values)
            try:
                reply = await self.router.chat(
                    "phrase",
                    chat.clarify_messages(state["opening"], feature, values),
                    max_tokens=128,
                    structured={"regex": phrase_pattern(feature, values)},
                )
                phrased = work.count(reply).text.strip()
                text = phrased if names(phrased.split(":")[0], feature) else text
            except (LlmUnavailable, LlmNonsense):
                pass
            work.output = text
            recorder().text(text)
            return {"question": ClarifyQuestion(feature=feature, text=text, choices=values).model_dump()}

    # --- the writer ---------------------------------------------------------------------------------------------------

    async def answer(self, state: State) -> State:
        """Quotations from the sources, streamed as they are written."""
        reading = state["reading"]
        sources = [chat.Source(**s) for s in reading["sources"]]
        with step("answer", reading["query"]) as work:
            try:
                written = await write(
                    reading["query"], sources, self.index.passages, self.router, self.settings.answer,
                    may_refuse=reading["refusal"] > SURE,
                    confidence=_confidence(reading) or 0.0,
                    on_text=recorder().text,
                )  # fmt: skip
            except (LlmUnavailable, LlmNonsense) as error:
                work.output = f"unavailable: {error}"
                recorder().text(SORRY, replace=True)
                return _end(Turn(kind="unavailable", text=SORRY, reason=str(error)))
            for reply in written.replies:
                work.count(reply)
            work.output = written.text
            if written.refused:
                return {"next": "refuse", "reading": {**reading, "why": "", "reason": "the model found no answer in the sources"}}
            for citation in written.citations:
                recorder().emit(Event(type="citation", data=citation.model_dump()))
            return {"next": "verify", "reading": {**reading, "written": _plain(written)}}

    # --- the reviewer -------------------------------------------------------------------------------------------------

    async def verify(self, state: State) -> State:
        """An exact check of the quotations, then the judge's opinion, which counts as far as its calibration allows."""
        reading = state["reading"]
        written = reading["written"]
        with step("verify", written["text"]) as work:
            verdict, why, trusted = None, None, set[str]()
            try:
                judged = await judge(
                    self.judge_llm, reading["query"], [chat.Source(**s) for s in reading["sources"]], written["text"]
                )
                work.count(judged.reply)
                verdict = judged.verdict
                trusted = trusted_rubrics(self.settings.artifacts, judged.reply.model)
                why = fails(verdict, trusted)
                recorder().emit(Event(type="verdict", data=verdict.model_dump()))
            except (LlmUnavailable, LlmNonsense) as error:
                work.output = f"no verdict: {error}"
            if self.settings.answer.mode == "grounded" and not written["verified"]:
                why = "a quotation does not stand in the library"
            shown = reading["shown"]
            if why is not None:
                recorder().text(WITHHELD, replace=True)
                turn = Turn(
                    kind="not_answered", text=WITHHELD, verdict=verdict, quotes_verified=written["verified"], reason=why, **shown
                )
            else:
                turn = Turn(
                    kind="answer", text=written["text"], citations=written["citations"], verdict=verdict,
                    quotes_verified=written["verified"], **{**shown, "leaflet": self._leaflet(state, written)},
                )  # fmt: skip
            turn = turn.model_copy(update={"trusted": sorted(trusted), "confidence": _confidence(reading)})
            work.output = work.output or f"{verdict!r}; quotations {'verbatim' if written['verified'] else 'in own words'}"
            family = self.families.get(turn.leaflet or "", "")
            facts = remember([Fact(**f) for f in state.get("facts", [])], [Reply(**r) for r in state.get("replies", [])], family)
            cache = await self._open_cache()
            if cache is not None:
                query = reading["query"]
                cache.put(query, self._vector(query), turn, reading["personal"])
            return {**_end(turn), "facts": [f.model_dump() for f in facts], "last": turn.leaflet or ""}

    def _leaflet(self, state: State, written: dict[str, Any]) -> str:
        """After questions back the leaflet that fits best; else the one quoted first."""
        return str(state["reading"]["shown"]["leaflet"] if state.get("replies") else written["citations"][0]["leaflet"])

    async def refuse(self, state: State) -> State:
        """Says that there is no answer, and where to look instead."""
        reading = state["reading"]
        with step("refuse") as work:
            shown = reading.get("shown", {"nearest": [], "passages": []})
            text = reading.get("why") or chat.NOT_ANSWERED
            if not reading.get("why") and shown["nearest"]:
                titles = [self.evidence.titles[slug] for slug in shown["nearest"]]
                text += f" The nearest leaflets are: {'; '.join(titles)}."
            work.output = text
            recorder().text(text, replace=True)
            turn = Turn(
                kind="not_answered", text=text, reason=reading.get("reason", ""), confidence=_confidence(reading), **shown
            )
            cache = await self._open_cache()
            if cache is not None and "query" in reading:
                cache.put(reading["query"], self._vector(reading["query"]), turn, reading["personal"])
            return _end(turn)

    # --- shared -------------------------------------------------------------------------------------------------------

    def _vector(self, text: str) -> Any:
        embed_query = getattr(self.index, "embed_query", None)
        return embed_query(text) if embed_query else np.asarray(self.index.embed([text])[0])

    async def _open_cache(self) -> AnswerCache | None:
        """Opened on first use: its version names the models, and they say their names only when they are up."""
        if not (self.settings.cache.enabled and self.caching):
            return None
        if self.cache is None:
            try:
                models = [await self.router.small.identity(), await self.judge_llm.identity()]
            except (LlmUnavailable, LlmNonsense):
                return None
            mode = self.settings.answer
            version = f"{self.index.version} {models} {chat.PROMPT_VERSION} {mode.model_dump()}"
            path = self.settings.artifacts / "cache" / "answers.sqlite"
            self.cache = self.cache or AnswerCache(path, version, self.settings.cache.semantic_threshold)
        return self.cache


def _show(turn: Turn) -> None:
    """A turn that is known at once, as events."""
    recorder().text(turn.text, replace=True)
    for citation in turn.citations:
        recorder().emit(Event(type="citation", data=citation.model_dump()))


def _confidence(reading: dict[str, Any]) -> float | None:
    """How sure it is that the library answers: 0 where it is refused, None where that was not looked at."""
    return round(1.0 - min(1.0, reading["refusal"]), 4) if "refusal" in reading else None


def _end(turn: Turn) -> State:
    return {"turn": turn.model_dump(mode="json"), "next": "end", "question": None}


def _plain(written: Written) -> dict[str, Any]:
    return {"text": written.text, "verified": written.verified, "citations": [c.model_dump() for c in written.citations]}


def _leaflets(settings: AiSettings) -> dict[str, lib.Leaflet]:
    """The features of the leaflets; a corpus of other documents has none."""
    try:
        found = {}
        for path in sorted(settings.corpus_path.glob("*.md")):
            found[path.stem] = lib.parse_leaflet(path)
        return found
    except UserError:
        return {}
