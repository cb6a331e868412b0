"""What one turn of a conversation is, for the agent that makes it, the API that sends it and the page that shows it."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from shared.chat import PROMPT_VERSION, Verdict
from shared.outcomes import Arm

Kind = Literal["answer", "clarify", "escalate", "decline", "not_answered", "unavailable"]
KINDS: tuple[Kind, ...] = ("answer", "clarify", "escalate", "decline", "not_answered", "unavailable")
UNKNOWN_REPLY = re.compile(r"\b(don'?t know|dunno|not sure|no idea|can'?t (say|tell)|unsure|no clue|skip)\b", re.IGNORECASE)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Citation(_Strict):
    """One quoted sentence: `number` is its mark in the text, `sentence_id` is `<leaflet>/<section>/<n>`."""

    number: int = Field(ge=1)
    sentence_id: str
    leaflet: str
    title: str
    section: str
    text: str


class ClarifyQuestion(_Strict):
    """A question back, with the answers that would tell the candidates apart. Free text is always welcome too."""

    feature: str
    text: str
    choices: list[str]


class Reply(BaseModel):
    """What the person said when asked about a feature."""

    model_config = ConfigDict(frozen=True)
    feature: str
    text: str

    @property
    def unknown(self) -> bool:
        return bool(UNKNOWN_REPLY.search(self.text)) or not self.text.strip()


class Step(_Strict):
    """One node's work, for the trace. Input and output are short texts a person can read."""

    node: str
    seconds: float = Field(ge=0)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    input: str = ""
    output: str = ""


class FoundPassage(_Strict):
    """A retrieved passage as the panel "how this answer came about" lists it."""

    id: str
    title: str
    section: str
    score: float
    dense_rank: int | None = None
    bm25_rank: int | None = None


class Turn(_Strict):
    """The result of one message.

    `text` carries citation marks (`[1] Drink plenty.`) that `citations` resolve. `leaflet` is the best candidate now,
    `nearest` the leaflets to read instead when nothing answers. `quotes_verified` is the deterministic check that
    every quoted sentence stands verbatim in the library (None: nothing was quoted); `verdict` is the judge's opinion.
    `warning` stands above the text: what would make this an emergency. `sign` is the sentence it, or an escalation, names.
    `trusted` are the rubrics in which the judge agreed with the labels well enough for `verdict` to count. `confidence` (0 to 1)
    is how sure retrieval was that the library answers (None: it was not asked). `model_version` is
    `<published version>:<variant>` of what answered, or the name a provider gives its model; `arm` says whether that was the
    current one or a candidate on trial.
    """

    kind: Kind
    text: str
    citations: list[Citation] = []
    question: ClarifyQuestion | None = None
    verdict: Verdict | None = None
    quotes_verified: bool | None = None
    leaflet: str | None = None
    nearest: list[str] = []
    sign: str | None = None
    warning: str = ""
    reason: str = ""
    passages: list[FoundPassage] = []
    trace: list[Step] = []
    trusted: list[str] = []
    confidence: float | None = None
    cached: bool = False
    cost: float = 0.0
    model_version: str = ""
    index_version: str = ""
    prompt_version: int = PROMPT_VERSION
    arm: Arm = "current"


class Event(_Strict):
    """Something that happened while a turn is made, in order: for streams and progress.

    `started` and `finished` name a node in `node` (`finished` also carries its Step in `data`); `text` carries the next piece
    of the answer in `data["delta"]`, and with `data["replace"]` true that piece replaces all text so far, because the answer
    was withheld or repaired; `citation` and `verdict` carry theirs in `data`, `warning` its `text` and `sign`.
    """

    type: Literal["started", "finished", "text", "citation", "verdict", "warning"]
    node: str = ""
    data: dict[str, Any] = {}
