"""Measures every part of the product alone, on the test split: retrieval, triage, harm, refusal, asking back, the judge.

Why an AI engineer does this beside the conversations: a wrong answer has one of six causes, and only figures of the parts say
which one to mend. The thresholds inside the parts were chosen on training and validation rows; here nothing is chosen.

    python -m ai_engineer_track measure
"""

from __future__ import annotations

import random
from typing import Any

from pydantic import BaseModel

from ai_engineer_track.clarify import measure_clarify
from ai_engineer_track.decide import measure_decisions
from ai_engineer_track.harm import measure_harm
from ai_engineer_track.ingest import open_index
from ai_engineer_track.judge import calibrate
from ai_engineer_track.llm import Llm
from ai_engineer_track.retrieve import Retriever, measure, measure_sentences
from ai_engineer_track.roles import Roles
from ai_engineer_track.settings import AiSettings
from ai_engineer_track.triage import measure_triage
from shared import library as lib
from shared.passages import StoredVectors

#: test questions that retrieval is measured on in a smoke run; all of them otherwise
FEW = 40


async def measure_parts(settings: AiSettings) -> dict[str, Any]:
    """Figures by part, as plain data. Needs the index and a model that answers. UserError, LlmUnavailable as they come."""
    index = open_index(settings)
    try:
        retriever = Retriever(index, settings)
        llm, judge_llm = Llm(settings.llm), Llm(settings.judge_llm)
        roles = Roles(settings, retriever, llm, judge_llm)
        embed = StoredVectors(settings.artifacts / "vectors.npz", index.embed)
        library = lib.load_library(settings.datasets)
        questions = _test(settings, "questions.jsonl", lib.Question)
        if settings.preset == "smoke":
            questions = random.Random(settings.seed).sample(questions, FEW)
        modes = measure(retriever, questions, settings.evaluate.bootstrap, settings.seed)
        parts: dict[str, Any] = {
            "judge": await calibrate(
                judge_llm,
                _test(settings, "judge_labels.jsonl", lib.JudgeLabel),
                library,
                settings.evaluate.bootstrap,
                settings.seed,
            ),
            "retrieval": {
                **modes,
                "used": modes[retriever.default_mode],
                "sentences": measure_sentences(retriever, questions, (settings.answer.max_sources,), seed=settings.seed),
            },
            "triage": measure_triage(roles.nurse, settings, embed, "test", settings.seed),
            "harm": measure_harm(roles.harm, settings, embed, "test", settings.seed),
            "refusal": measure_decisions(roles.decider, settings, embed, "test", settings.seed),
            "clarify": measure_clarify(
                roles.interviewer,
                _test(settings, "cases.jsonl", lib.Case),
                embed,
                roles.decider.needs_question,
                seed=settings.seed,
            ),
        }
    finally:
        index.close()
    return {name: _plain(part) for name, part in parts.items()}


def _test(settings: AiSettings, file: str, kind: type[Any]) -> list[Any]:
    return [row for row in lib.read_rows(settings.datasets, file, kind)[0] if row.split == "test"]


def _plain(value: Any) -> Any:
    """Pydantic objects as dictionaries, keys as text."""
    if isinstance(value, BaseModel):
        return _plain(value.model_dump())
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value
