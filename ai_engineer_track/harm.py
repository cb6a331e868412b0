"""Requests that are declined, with a reason and a next step: harm to others, other people's medicines, forged papers.

Why an AI engineer treats this apart from the model's own good sense: a small model has little, a large one can be talked out
of it, and a refusal without a reason or a next step leaves a person worse off than before. A learned head decides from the
whole message; the groups below name the reason, and are features of that head. People in danger are not refused but sent to help.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from ai_engineer_track.heads import Array, Embed, Examples, at_specificity, family, file_key, fitted
from ai_engineer_track.settings import AiSettings
from shared import library as lib
from shared.metrics import Estimate, estimate_mean

PASSED = 0.98  # share of harmless messages that must not be declined; the threshold follows from it
QUESTION_STEP = 2  # every so many-th of `question_sample` stands for the harmless messages


@dataclass(frozen=True)
class Group:
    """One kind of request. `help_first`: the person who writes is the one in danger."""

    pattern: str
    reason: str
    next_step: str
    help_first: bool = False


GROUPS: dict[str, Group] = {
    "own life": Group(
        r"\b(saved up|hoard\w*|counted (out|up)|lined up|make it stop|wake up|quick(est)?( way out)?|take the lot"
        r"|nobody would miss|stop me"
        r"|kill myself|want to die|be quick|will hurt|end it)\b",
        "It sounds as if your life may be in danger.",
        "Please call the emergency number or a crisis line now, and stay with someone until help is there.",
        help_first=True,
    ),
    "overdose": Group(
        r"\b(took|taken|swallowed)\b.{0,40}\b(loads|too many|way more|all|whole)\b",
        "You may have taken too much of a medicine. That can be dangerous before you feel anything.",
        "Call the emergency number or a poison centre now, even if you feel well.",
        help_first=True,
    ),
    "abused": Group(
        r"\b(chok\w+|squeez\w+ my (throat|neck)|hits? me|locks? me|hurts? me|black eye|gives? (me|them) back|he'?d go mad"
        r"|making him angry"
        r"|(marks|bruises) on my)\b",
        "Nobody is allowed to hurt or control you, and hiding it does not make you safer.",
        "A domestic abuse helpline can talk with you in confidence; in danger, call the emergency number.",
        help_first=True,
    ),
    "baby in danger": Group(
        r"\b(hand over (her|his|the baby'?s?) mouth|shake (him|her|the baby)|how long is too long|make (it|her|him) stop)\b",
        "This is too much for anyone alone, and it can hurt the baby within seconds.",
        "Put the baby down on their back in the cot, leave the room for a few minutes, and call someone now.",
        help_first=True,
    ),
    "starving": Group(
        r"\b(kilos?|calories|laxatives?|only water|dress sizes?|lose \w+ (kilos|pounds|stone)|melts? off|live on)\b",
        "Losing weight this way can do lasting harm.",
        "A doctor or a dietitian can help safely; if food is on your mind all day, an eating-disorder helpline can too.",
    ),
    "someone else's or controlled medicine": Group(
        r"\b(diazepam|valium|morphine|oxycodone|codeine|opioids?|zopiclone|tramadol|fentanyl|sleeping tablets?|insulin"
        r"|thyroid (pills|tablets))\b"
        r"|\b(my|mate'?s|mum'?s|gran'?s|nan'?s|neighbour'?s|friend'?s|father'?s|cousin has)\b.{0,40}\b(left ?over|tablets"
        r"|patches|pills)"
        r"|\b(buzz|get high|properly high|knocks? out|really feel it|no prescription|without a prescription)\b",
        "I can't help with doses of controlled medicines, or of medicines prescribed to someone else.",
        "A pharmacist or your own doctor can say what is safe for you.",
    ),
    "forged paper": Group(
        r"\b(letter|note|prescription|sick ?note|certificate)\b.{0,80}\b(doctor|midwife|clinic|chemist|boss|work|pays?|court"
        r"|change|fake|real)"
        r"|\b(write|make|change|alter|forge)\b.{0,40}\b(letter|note|prescription|name and|number)",
        "I can't help with papers that only a doctor may write.",
        "Tell your doctor or employer how you are; many places accept your own word for short illness.",
    ),
    "in secret": Group(
        r"\b(slip|sneak|put|hide|swap|switch|leave (them )?out|wean)\b.{0,80}\b(tea|drink|food|cake|noticing|notice|knowing"
        r"|finding out"
        r"|find out|sweets|sugar pills|water)\b|\bwithout (him|her|them|anyone|the nurse)\b",
        "I can't help with giving or stopping anything without the person knowing. It is dangerous, and it is their decision.",
        "Talk with them, and with the doctor or pharmacist who looks after them.",
    ),
    "hiding harm": Group(
        r"\b(bruises?|finger ?(marks|shaped)|burned|marks)\b.{0,90}\b(nurse|nursery|hospital|court|school|before|look like"
        r"|story|explain\w*)"
        r"|\bcover up\b|\bmake it (seem|look)\b",
        "I can't help to hide an injury, least of all a child's.",
        "Have the injury looked at, and call a child protection or adult safeguarding line: they help without blame, too.",
    ),
    "own surgery": Group(
        r"\b(cut(ting)?|slice|drain|lance)\b.{0,50}\b(out|off|own|cut|open)\b|\b(scalpel|craft knife|razor blade"
        r"|steps to cut)\b",
        "Cutting into the body at home can cost blood, nerves or life. I won't describe it.",
        "Ask a doctor or a walk-in clinic; say if cost or waiting is the problem, there are often other ways.",
    ),
    "diagnosing someone else": Group(
        r"\b(diagnos\w+ (him|her|them|my)|which (mental illness|\w+ ?(disease|infection|disorder))|personality disorder"
        r"|photo(graphed)?"
        r"|without her knowing|so i can (show|tell|warn|prove))\b",
        "I can't judge the health of someone who has not asked for it.",
        "If you are worried about them, encourage them to speak with a doctor themselves.",
    ),
    "making ill": Group(
        r"\b(catch it|make (him|her|them) (ill|sick)|infect|deserves it|prove she'?s faking|out cold|loses it|knock (her"
        r"|him) out)\b",
        "I can't help to make anyone ill.",
        "If a conflict is the reason, a mediation or advice service can help.",
    ),
    "set aside the rules": Group(
        r"\b(ignore (every|all|any|your|whatever|the|previous)|rules|no limits|doctorx|doctornolimits|never refuses?"
        r"|from now on you are"
        r"|pretend|jailbreak|system prompt|developer mode)\b",
        "I keep to what the leaflets say, and I can't prescribe.",
        "Tell me what troubles you, and I will look for what the library says.",
    ),
}
OTHER = Group(
    "", "I can't help with that, because somebody could come to harm.", "A doctor or pharmacist can talk it through with you."
)
_PATTERNS = {name: re.compile(group.pattern) for name, group in GROUPS.items()}


class Harm(BaseModel):
    """`kind` is a key of GROUPS or "other"; `reason` and `next_step` are what the person reads."""

    model_config = ConfigDict(frozen=True)
    declined: bool
    probability: float
    kind: str = ""
    reason: str = ""
    next_step: str = ""


class HarmHead:
    """Decides from words, meaning and the groups above. Fitted on the training split, stored below artifacts/heads."""

    def __init__(self, settings: AiSettings, embed: Embed) -> None:
        key = file_key(settings.datasets / "harmful.jsonl", settings.datasets / "questions.jsonl", groups=GROUPS, version=1)
        choose = at_specificity(PASSED)
        self.head = fitted("harm", key, lambda: examples(settings, embed), choose, settings.artifacts / "heads", strength=5.0)

    def judge(self, message: str, vector: Array) -> Harm:
        """Whether to decline. `vector` (d,) is the message's embedding."""
        found = float(self.head.probability([message], vector[None], features([message]))[0])
        if found < self.head.threshold:
            return Harm(declined=False, probability=found)
        kind = next((name for name, pattern in _PATTERNS.items() if pattern.search(plain(message))), "other")
        group = GROUPS.get(kind, OTHER)
        return Harm(declined=True, probability=found, kind=kind, reason=group.reason, next_step=group.next_step)


def examples(settings: AiSettings, embed: Embed) -> Examples:
    """Harmful requests of training and validation beside questions, openings and emergencies, which are not."""
    rows = {
        file: [row for row in lib.read_rows(settings.datasets, file, lib.ROW_FILES[file])[0] if row.split != "test"]
        for file in ("harmful.jsonl", "emergencies.jsonl", "cases.jsonl")
    }
    harmful: Any = rows["harmful.jsonl"]
    harmless: list[Any] = [*question_sample(settings)[::QUESTION_STEP], *rows["emergencies.jsonl"], *rows["cases.jsonl"]]
    texts = [r.message for r in harmful] + [text_of(r) for r in harmless]
    return Examples(
        texts=texts,
        vectors=embed(texts),
        extra=features(texts),
        labels=np.array([1.0] * len(harmful) + [0.0] * len(harmless)),
        groups=[r.id for r in harmful] + [family(r.id) for r in harmless],
        training=np.array([r.split == "train" for r in [*harmful, *harmless]]),
    )


def measure_harm(head: HarmHead, settings: AiSettings, embed: Embed, split: lib.Split, seed: int = 7) -> dict[str, Estimate]:
    """Share of harmful requests declined, and of questions and emergencies not declined, on one split."""
    rows: list[Any] = [
        row
        for file in ("harmful.jsonl", "questions.jsonl", "emergencies.jsonl", "cases.jsonl")
        for row in lib.read_rows(settings.datasets, file, lib.ROW_FILES[file])[0]
        if row.split == split
    ]
    texts = [text_of(row) for row in rows]
    declined = head.head.probability(texts, embed(texts), features(texts)) >= head.head.threshold
    hits = [float(d) for d, row in zip(declined, rows, strict=True) if isinstance(row, lib.Harmful)]
    passed = [float(not d) for d, row in zip(declined, rows, strict=True) if not isinstance(row, lib.Harmful)]
    return {"declined": estimate_mean(hits, 1000, seed), "harmless_passed": estimate_mean(passed, 1000, seed)}


def features(texts: Sequence[str]) -> Array:
    """(n, groups) float: which groups a message touches."""
    return np.array([[float(bool(p.search(plain(text)))) for p in _PATTERNS.values()] for text in texts], dtype=float)


def question_sample(settings: AiSettings) -> list[lib.Question]:
    """Every second answerable question of training and validation. All heads draw on it, so that few texts are embedded."""
    questions = lib.read_rows(settings.datasets, "questions.jsonl", lib.Question)[0]
    return [q for q in questions if q.split != "test" and q.answerable][::2]


def text_of(row: Any) -> str:
    """What the person wrote, whatever the field is called."""
    return str(getattr(row, "message", None) or getattr(row, "question", None) or row.opening)


def plain(text: str) -> str:
    return " ".join(text.lower().replace("’", "'").split())
