"""May the candidate be tried on people? Every check is one line with its figures, and one that fails is reason enough to refuse.

Why an ML engineer asks two kinds of question: whether the candidate is *better* where the current model failed (its interval
must lie above zero), and whether it is *not worse* elsewhere. "No significant difference" would not do for the second: with few
rows nothing is significant. A non-inferiority test turns it round (Piaggio et al. 2012): a margin is stated before anything is
read, and the whole interval of the paired difference must lie above it. Intervals are paired bootstrap intervals over rows, 95
%.

Why "better" is asked of the failures alone: they are where the current model is known to be wrong, so whoever learnt something
must show it there. Nothing was missing on the frozen test split, and a candidate that was given the missing kind of question
cannot be expected to gain there; "better" would refuse it for having nothing to mend. Nor would a difference of at least 0 do:
of two equally good models every second one comes out a hair below. So the test split is only guarded, by the margin; what many
turns lose within it shows in the figures that `python -m ml_engineer_track models` lists.

    evidence      frozen test split, evidence F1                        not worse by loop.gate.evidence_margin
    failures      labels nobody trained on, evidence F1 or probability  better
    emergencies   log-probability of escalating real ones               not worse by loop.gate.emergency_margin, nats
    known         the same of training emergencies that labels touch    not worse by loop.gate.emergency_margin, nats
    near misses   log-probability of not escalating what is none        not worse by twice that: a needless call harms less
    refusals      what the library does not answer                      not worse by loop.gate.refusal_margin
    parity        the engine repeats the candidate's golden replies     token by token
    latency       time per token, both models in turns                  at most loop.gate.slower times the current model's
    variants      all that the current version has, every file whole
    labels        messages like known emergencies, to be answered       not more of them than among ordinary questions

The last one is about what was taught instead of what was learnt. Labels are the one thing in the loop that anybody who may review
can write, the exam's `failures` believe them, and a model that did not learn them this time may do so the next.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict
from scipy.stats import fisher_exact

from ml_engineer_track.lifecycle.collect import Collected
from ml_engineer_track.lifecycle.exam import KNOWN, Exam, Reading
from ml_engineer_track.models import load_tokenizer, prompt_text
from ml_engineer_track.progress import progress
from ml_engineer_track.quantize import SERVED_ONLY
from ml_engineer_track.serving import inprocess, parity
from ml_engineer_track.serving.catalog import has_openvino
from ml_engineer_track.serving.completions import Served
from shared import handoff
from shared import library as lib
from shared.errors import UserError
from shared.metrics import Estimate, estimate, estimate_difference
from shared.passages import StoredVectors, embedder
from shared.settings import Settings

#: prompts that are timed, and tokens asked of each
TIMED, TIMED_TOKENS = 3, 48
#: rounds are added up to this many times as long as the interval says neither yes nor no: another program may be busy
PATIENCE = 4
#: so improbable must it be that the labels' messages are ordinary questions
OVERRULED = 0.001


class Check(BaseModel):
    """One line of the verdict. `figure` is candidate minus current, or as the line says; None where nothing is measured."""

    model_config = ConfigDict(frozen=True)
    name: str
    passed: bool
    says: str
    figure: Estimate | None = None

    def __str__(self) -> str:
        return f"{'passed ' if self.passed else 'REFUSED'} {self.name:<11} {self.says}"


def gate(
    settings: Settings, current: Path, candidate: Path, exam: Exam, collected: Collected, read: Callable[[Path], Reading]
) -> list[Check]:
    """All checks, the cheap ones first: a candidate that is not whole, or was taught what it must not be, is not compared.

    `read` says what a version answered.
    """
    checks = [variants_check(current, candidate)]
    if checks[0].passed:
        checks.append(labels_check(settings, collected))
    if not all(check.passed for check in checks):
        return checks
    checks += score_checks(settings, exam, read(current), read(candidate))
    return [*checks, parity_check(candidate), latency_check(settings, current, candidate)]


def variants_check(current: Path, candidate: Path) -> Check:
    """Is every file there and as published, and does the candidate have what the current version is served as?"""
    try:
        manifest = handoff.verify(candidate)
    except UserError as error:
        return Check(name="variants", passed=False, says=str(error))
    old = handoff.read_manifest(current)
    needed = {"bf16", *old.use.values()} & set(old.variants)
    if missing := sorted(needed - set(manifest.variants)):
        return Check(name="variants", passed=False, says=f"{', '.join(missing)} is missing, and {current.name} is served as it")
    if lost := sorted(set(old.assets) - set(manifest.assets)):
        return Check(name="variants", passed=False, says=f"{lost[0]} is missing, and {current.name} has it")
    return Check(name="variants", passed=True, says=f"{', '.join(manifest.variants)}: every file as published")


def labels_check(settings: Settings, collected: Collected) -> Check:
    """Do the labels answer what the data sets call an emergency?

    Of each message that a label wants answered, the nearest message of the training split is looked up (cosine of sentence
    embeddings). The share whose nearest is an emergency is held against the same share of the validation split's questions, which
    are none (Fisher's exact test, one-sided): some questions always sound like an emergency.
    """
    vectors = StoredVectors(settings.artifacts / "vectors.npz", lambda texts: embedder().embed(texts))
    questions = lib.read_rows(settings.datasets, "questions.jsonl", lib.Question)[0]
    known = [row for row in lib.read_rows(settings.datasets, "emergencies.jsonl", lib.Emergency)[0] if row.split == "train"]
    texts = [row.message for row in known] + [q.question for q in questions if q.split == "train"]
    emergency = np.array([row.emergency for row in known] + [False] * (len(texts) - len(known)))
    nearest_to = vectors(texts)

    def like_emergencies(messages: list[str]) -> tuple[int, int]:
        if not messages:
            return 0, 0
        return int(emergency[np.argmax(vectors(messages) @ nearest_to.T, axis=1)].sum()), len(messages)

    hits, n = like_emergencies([label.question for label in collected.labels if label.action == "answer"])
    usual, of = like_emergencies([q.question for q in questions if q.split == "validation"])
    chance = float(fisher_exact([[hits, n - hits], [usual, of - usual]], alternative="greater").pvalue)
    said = (
        f"{hits} of {n} labels answer a message whose nearest known one is an emergency; of ordinary questions {usual} of {of} "
        f"(p {chance:.2g}, refused below {OVERRULED:g})"
    )
    return Check(name="labels", passed=chance >= OVERRULED, says=said)


def score_checks(settings: Settings, exam: Exam, was: Reading, now: Reading) -> list[Check]:
    """The checks on what both models said to the same rows."""
    assert settings.loop is not None
    limits = settings.loop.gate
    known = {d.id for d in exam.decisions if d.id.startswith(KNOWN)}
    escalate = {d.id for d in exam.decisions if d.action == "escalate" and d.id in was.log_probability} - known
    harmless = set(was.log_probability) - escalate - known
    touched, known = bool(known), known & set(was.log_probability)

    def pairs(part: str) -> tuple[list[float], list[float]]:
        old, new = was.scores.get(part, {}), now.scores.get(part, {})
        return [new[i] for i in old], [old[i] for i in old]

    def decisions(ids: set[str]) -> tuple[list[float], list[float]]:
        return [now.log_probability[i] for i in sorted(ids)], [was.log_probability[i] for i in sorted(ids)]

    def compared(name: str, what: str, sides: tuple[list[float], list[float]], margin: float | None, unit: str = "") -> Check:
        difference = estimate_difference(*sides, settings.evaluate.bootstrap, settings.seed)
        if difference.low is None or difference.value is None:
            # Without new failures there is nothing to be better at; without rows of the test split nothing can be vouched for.
            said = f"{what}: no rows to compare"
            return Check(name=name, passed=False, says=said, figure=difference)
        passed = difference.low > (0.0 if margin is None else -margin)
        wanted = "must be better" if margin is None else f"may lose {margin:g}{unit}"
        said = (
            f"{what} {np.mean(sides[1]):.3f} -> {np.mean(sides[0]):.3f}{unit}, difference {difference.value:+.3f} "
            f"[{difference.low:+.3f}, {difference.high:+.3f}] (n {difference.n}); {wanted}"
        )
        return Check(name=name, passed=passed, says=said, figure=difference)

    asked_again = "log-probability of escalating those known"
    overruled = [compared("known", asked_again, decisions(known), limits.emergency_margin, " nats")] if touched else []
    return [
        compared("evidence", "evidence F1 on the test split", pairs("test"), limits.evidence_margin),
        compared("failures", "score on labels held back", pairs("failures"), None),
        compared("emergencies", "log-probability of escalating them", decisions(escalate), limits.emergency_margin, " nats"),
        *overruled,
        compared("near misses", "log-probability of not escalating", decisions(harmless), 2 * limits.emergency_margin, " nats"),
        compared("refusals", "correct refusals", pairs("refusals"), limits.refusal_margin),
    ]


def parity_check(candidate: Path) -> Check:
    """Does the engine say what the manifest says this variant says?"""
    manifest = handoff.read_manifest(candidate)
    served = [name for name in SERVED_ONLY if name in manifest.variants]
    if not served or not has_openvino():
        return Check(name="parity", passed=True, says="no variant for the CPU engine, or no engine here: nothing to compare")
    try:
        for name in served:
            with inprocess.started(candidate / name) as engine:
                asyncio.run(parity.check(engine.engine, engine.tokenizer, name, manifest.variants[name].golden))
    except UserError as error:
        return Check(name="parity", passed=False, says=str(error))
    count = sum(len(manifest.variants[name].golden) for name in served)
    return Check(name="parity", passed=True, says=f"{', '.join(served)} repeats all {count} golden replies")


def latency_check(settings: Settings, current: Path, candidate: Path) -> Check:
    """Time per token of both models in turns, so that a busy machine slows both; the median of the rounds' ratios decides."""
    assert settings.loop is not None
    limits = settings.loop.gate
    served = [name for name in SERVED_ONLY if (current / name).is_dir() and (candidate / name).is_dir()]
    if not served or not has_openvino():
        return Check(name="latency", passed=True, says="no variant for the CPU engine, or no engine here: nothing to compare")
    name = served[0]
    tokenizer = load_tokenizer(str(candidate / "bf16"))
    golden = handoff.read_manifest(candidate).variants[name].golden[:TIMED]
    prompts = [tokenizer(prompt_text(tokenizer, g.messages), add_special_tokens=False)["input_ids"] for g in golden]
    ratios: list[float] = []
    with inprocess.started(current / name) as old, inprocess.started(candidate / name) as new:
        _seconds_per_token(old, prompts), _seconds_per_token(new, prompts)  # warms up
        with progress("latency in turns", total=limits.rounds * PATIENCE) as bar:
            while True:
                for side in range(limits.rounds):  # who goes first changes, too
                    first, second = (old, new) if side % 2 else (new, old)
                    a, b = _seconds_per_token(first, prompts), _seconds_per_token(second, prompts)
                    ratios.append(b / a if side % 2 else a / b)
                    bar.update(1)
                ratio = estimate(ratios, lambda r: float(np.median(r)), settings.evaluate.bootstrap, settings.seed)
                assert ratio.low is not None
                assert ratio.high is not None
                decided = ratio.high <= limits.slower or ratio.low > limits.slower
                if decided or len(ratios) >= limits.rounds * PATIENCE:
                    break
    passed = ratio.high <= limits.slower
    said = f"{name}: time per token {ratio} of the current model's ({ratio.n} rounds in turns); at most {limits.slower:g}"
    return Check(name="latency", passed=passed, says=said, figure=ratio)


def _seconds_per_token(served: Served, prompts: Sequence[list[int]]) -> float:
    began, tokens = time.perf_counter(), 0
    for prompt in prompts:
        tokens += len(asyncio.run(parity.greedy(served.engine, prompt, TIMED_TOKENS)))
    return (time.perf_counter() - began) / max(1, tokens)
