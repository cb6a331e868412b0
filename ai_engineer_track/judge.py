"""One LLM as a judge, used twice: on-line on the answer just written, off-line on the whole suite; and a judge of the judge.

Why an AI engineer calibrates before trusting: a judge is one more model that can be wrong, and its errors are systematic. So
its agreement with labelled answers stands on top of every report that uses it, and on-line its verdict has power only over
rubrics in which it agreed with labels beyond chance (`Calibration.trusted`). Whether quotations are verbatim needs no opinion:
that is checked exactly, and reported as a field of its own.

    python -m ai_engineer_track calibrate
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from ai_engineer_track.llm import Llm, LlmNonsense, Reply
from shared import chat
from shared import library as lib
from shared.files import write_text
from shared.metrics import Estimate, cohen_kappa, estimate, estimate_mean

RUBRICS = ("grounded", "safe", "helpful")
TRUSTED_KAPPA = 0.4  # "moderate" and better (Landis & Koch 1977): the lower end of the interval has to reach it
SCHEMA = {"json": chat.Verdict.model_json_schema()}


class Judged(BaseModel):
    """A verdict and what it took."""

    model_config = ConfigDict(frozen=True)
    verdict: chat.Verdict
    reply: Reply


async def judge(llm: Llm, question: str, sources: Sequence[chat.Source], answer: str) -> Judged:
    """The model's verdict at temperature 0. LlmUnavailable and LlmNonsense as they come."""
    reply = await llm.chat(chat.judge_messages(question, sources, answer), max_tokens=48, structured=SCHEMA)
    try:
        return Judged(verdict=chat.Verdict.model_validate_json(reply.text), reply=reply)
    except ValidationError:
        raise LlmNonsense("the verdict does not have the form that was asked for") from None


class Calibration(BaseModel):
    """How far the judge agrees with labels. `confusion[rubric][label][verdict]` counts rows.

    `position`: share of rows whose verdict on grounded stays the same when the passages stand in reverse order. `length`: how
    much more helpful (in points) the judge rates, relative to the labels, the longer half of the answers than the shorter
    half. `repeat`: share of rows with the same verdict when asked again. `failed`: rows without a valid verdict.
    """

    model_config = ConfigDict(extra="forbid")
    model: str
    prompt_version: int
    rows: int
    failed: int
    accuracy: dict[str, Estimate]
    kappa: dict[str, Estimate]
    confusion: dict[str, dict[str, dict[str, int]]]
    position: Estimate
    length: Estimate
    repeat: Estimate

    @property
    def trusted(self) -> set[str]:
        """Rubrics in which the judge may act on its own."""
        return {name for name, found in self.kappa.items() if found.low is not None and found.low >= TRUSTED_KAPPA}

    def lines(self) -> list[str]:
        """What stands on top of every report that uses the judge."""
        return [
            f"judge {self.model}: {self.rows} labelled answers, {self.failed} without a verdict",
            *(
                f"{name}: kappa {self.kappa[name]}, accuracy {self.accuracy[name]}"
                + ("" if name in self.trusted else " (shown, not trusted)")
                for name in RUBRICS
            ),
            f"same verdict with passages reversed {self.position}, when asked again {self.repeat}; longer answers +{self.length}",
        ]


async def calibrate(
    llm: Llm, labels: Sequence[lib.JudgeLabel], library: lib.Library, resamples: int = 1000, seed: int = 7
) -> Calibration:
    """Judge every labelled answer three times: as it is, again, and with its passages reversed. LlmUnavailable as it comes."""

    async def verdict(label: lib.JudgeLabel, reverse: bool = False) -> chat.Verdict | None:
        sources = sources_of(label.passages, library)
        answer = label.answer
        if reverse:
            sources, answer = sources[::-1], renumbered(answer, len(sources))
        try:
            return (await judge(llm, label.question, sources, answer)).verdict
        except LlmNonsense:
            return None

    async def all_of(reverse: bool = False) -> list[chat.Verdict | None]:
        return list(await asyncio.gather(*(verdict(label, reverse) for label in labels)))

    first, again, reversed_ = await all_of(), await all_of(), await all_of(reverse=True)
    rows = [(label, v) for label, v in zip(labels, first, strict=True) if v is not None]
    pairs = {name: [(int(getattr(label, name)), int(getattr(v, name))) for label, v in rows] for name in RUBRICS}

    def kappa(name: str) -> Estimate:
        weights: Any = "quadratic" if name == "helpful" else "none"
        return estimate(pairs[name], lambda chosen: cohen_kappa(chosen, weights), resamples, seed)

    def mean(values: Sequence[float]) -> Estimate:
        return estimate_mean([float(v) for v in values], resamples, seed)

    lengths = [len(label.answer.split()) for label, _ in rows]
    middle = float(np.median(lengths)) if lengths else 0.0
    excess = [(words > middle, v.helpful - label.helpful) for words, (label, v) in zip(lengths, rows, strict=True)]
    return Calibration(
        model=await llm.identity(),
        prompt_version=chat.PROMPT_VERSION,
        rows=len(rows),
        failed=len(labels) - len(rows),
        accuracy={name: mean([a == b for a, b in pairs[name]]) for name in RUBRICS},
        kappa={name: kappa(name) for name in RUBRICS},
        confusion={name: confusion(pairs[name]) for name in RUBRICS},
        position=mean([a.grounded == b.grounded for a, b in zip(first, reversed_, strict=True) if a and b]),
        length=estimate(excess, long_minus_short, resamples, seed),
        repeat=mean([a == b for a, b in zip(first, again, strict=True) if a]),
    )


def save_calibration(found: Calibration, artifacts: Path) -> Path:
    """Where the service looks it up."""
    path = artifacts / "judge" / "calibration.json"
    write_text(path, found.model_dump_json(indent=2) + "\n")
    return path


def trusted_rubrics(artifacts: Path, model: str) -> set[str]:
    """Rubrics the judge may act on: none without a calibration of this model under this prompt contract."""
    try:
        found = Calibration.model_validate_json((artifacts / "judge" / "calibration.json").read_bytes())
    except (OSError, ValidationError):
        return set()
    return found.trusted if (found.model, found.prompt_version) == (model, chat.PROMPT_VERSION) else set()


def fails(verdict: chat.Verdict, trusted: set[str]) -> str | None:
    """Why a trusted part of the verdict forbids an answer; None when it may be shown."""
    if "safe" in trusted and not verdict.safe:
        return "the check found it unsafe"
    if "grounded" in trusted and not verdict.grounded:
        return "the check found it not supported by the sources"
    return None


def sources_of(passages: Sequence[str], library: lib.Library) -> list[chat.Source]:
    """Sentence ids as the numbered sources of a prompt."""
    found = []
    for sentence_id in passages:
        slug, section, _ = sentence_id.split("/")
        heading = f"{library.leaflets[slug].title}: {lib.SECTIONS[section]}"
        found.append(chat.Source(id=sentence_id, heading=heading, text=library.sentence(sentence_id).text))
    return found


def renumbered(answer: str, sources: int) -> str:
    """The answer's marks after its sources were put in reverse order."""

    def turn(match: re.Match[str]) -> str:
        number = int(match[1])
        return f"[{sources + 1 - number}]" if 1 <= number <= sources else match[0]

    return re.sub(r"\[(\d{1,3})\]", turn, answer)


def confusion(pairs: Sequence[tuple[int, int]]) -> dict[str, dict[str, int]]:
    """Label -> verdict -> rows."""
    table: dict[str, dict[str, int]] = {}
    for label, verdict in pairs:
        row = table.setdefault(str(label), {})
        row[str(verdict)] = row.get(str(verdict), 0) + 1
    return table


def long_minus_short(rows: Sequence[tuple[bool, float]]) -> float:
    """Mean of the longer half less mean of the shorter half; 0 when one half is empty."""
    long, short = [x for is_long, x in rows if is_long], [x for is_long, x in rows if not is_long]
    return float(np.mean(long) - np.mean(short)) if long and short else 0.0
