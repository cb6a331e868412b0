"""Is what people ask, or how well it is answered, still what it was? A verdict in plain words that may be asked for every hour.

Why an ML engineer watches this: the evaluation says how good a model is on the questions of that day. When people begin to
ask about something else, or in another way, its figures are about a product that is no longer there.

    python -m ml_engineer_track drift [--since 2026-11-23]       this week beside the four weeks before

Seven tests watch what is asked (its meaning, its topic, its length, its distance from the library) and what came of it (the
judge's score, the share answered, the share refused). Each is a bet that nothing changed (`betting.py`), and an alarm is raised
when their mean reaches 1 / ALPHA: once in a hundred weeks at most by chance, however often one looks, and however often the
reference is used up and dealt anew (`wealth`). Beside that stand two
measures of how much changed, each with its chance for *one* look: the maximum mean discrepancy with a permutation test (Gretton
et al., *A kernel two-sample test*, JMLR 13, 2012), and the population stability index, which over its chance level is
chi-squared (Yurdakul & Naranjo, *Statistical properties of the population stability index*, 2020).

What no test here can do: tell a change that matters from one that does not (hay fever comes back every spring), or see one in
fewer messages than it takes. Messages count as independent of each other; one person who asks forty times is a change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
from scipy.stats import chi2

from ml_engineer_track.lifecycle import betting
from ml_engineer_track.lifecycle.betting import Array
from ml_engineer_track.progress import progress
from shared import exchanges, feedback, outcomes
from shared.chat import Verdict as JudgeVerdict
from shared.feedback import Feedback
from shared.library import Library, load_library
from shared.outcomes import Outcome
from shared.passages import StoredVectors, embedder, leaflet_passages, unit_texts
from shared.settings import Settings

#: chance that a round (a week) without any change ends in an alarm
ALPHA = 0.01
#: messages on either side below which nothing is compared
FEWEST = 100
#: more reference messages than this add little and take long to embed; they are then thinned evenly
MOST = 8_000
REFERENCE = timedelta(days=28)
#: random features of the kernel (Rahimi & Recht 2007), and the share of the library's median distance that is its width
FEATURES, WIDTH = 512, 0.5
PERMUTATIONS = 500
#: cosine with the nearest sentence of the library at which a question is at home there, and at which it is foreign
AT_HOME, FOREIGN = 0.8, 0.3
#: words a message may have to fall into each class of lengths; fixed, because classes cut by the reference would favour it
LENGTHS = np.array([3, 5, 8, 12, 17, 24, 35, 60])
SEED = 7
REFUSALS = ("not_answered", "decline")

#: test -> (what it watches, in words; the measure's unit)
WATCHED = {
    "meaning": "what is asked, by meaning",
    "topic": "the topics",
    "length": "the length of messages",
    "distance": "the distance from the library",
    "score": "the judge's score",
    "answered": "the share answered",
    "refused": "the share refused",
}


@dataclass(frozen=True)
class Seen:
    """One message and what came of it. `time` is in seconds since 1970; `kind` is the turn's.

    `question` is None where it was not kept, `score` where nothing was judged: 0 (not grounded or not safe, or of no use) to 1.
    """

    time: float
    kind: str
    question: str | None = None
    score: float | None = None


@dataclass(frozen=True)
class Window:
    """Messages as the tests see them, in the order of time; (n,) each, `meaning` (n, FEATURES). NaN and -1: not known."""

    time: Array
    meaning: Array
    topic: Array
    words: Array
    distance: Array
    score: Array
    answered: Array
    refused: Array

    def __len__(self) -> int:
        return len(self.time)

    def take(self, rows: Array) -> Window:
        return Window(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Finding:
    """What one test found. `evidence` is the highest wealth of its bet, at least 1: 100 is as surprising as one chance in 100.

    `before` and `now` are means (words, shares, scores); `amount` is the PSI of topics and lengths, the squared MMD of the
    meaning; `chance` its probability in a single look if nothing changed.
    """

    name: str
    evidence: float
    alarm: bool
    before: float | None = None
    now: float | None = None
    amount: float | None = None
    chance: float | None = None
    says: str = ""


@dataclass(frozen=True)
class Verdict:
    """`drifted` is None while there is too little to compare. `since` is when the alarm was first due (seconds since 1970)."""

    drifted: bool | None
    sentence: str
    tests: list[Finding] = field(default_factory=list)
    evidence: float | None = None
    since: float | None = None
    reference: int = 0
    current: int = 0


# --- what is compared ------------------------------------------------------------------------------------------------


def from_feedback(records: Iterable[Feedback]) -> list[Seen]:
    """Answers with a remark, each once: what went wrong, mostly. Compare them with nothing but feedback."""
    made = {r.answer_id: Seen(_seconds(r.time), r.turn.kind, r.question, score_of(r.turn.verdict)) for r in records}
    return sorted(made.values(), key=lambda seen: seen.time)


def from_outcomes(records: Iterable[Outcome], questions: Mapping[str, str]) -> list[Seen]:
    """All answers that people got; `questions` by answer id, as far as they are known."""
    made = []
    for r in records:
        if r.arm != "shadow":
            judged = r.grounded is not None and r.safe is not None and r.helpful is not None
            verdict = JudgeVerdict(grounded=r.grounded, safe=r.safe, helpful=r.helpful) if judged else None
            made.append(Seen(_seconds(r.time), r.kind, questions.get(r.answer_id), score_of(verdict)))
    return sorted(made, key=lambda seen: seen.time)


def from_exchanges(kept: Iterable[exchanges.Exchange]) -> list[Seen]:
    """Conversations that nobody deleted."""
    made = [Seen(e.created, e.turn.kind, e.message, score_of(e.turn.verdict)) for e in kept]
    return sorted(made, key=lambda seen: seen.time)


def score_of(verdict: JudgeVerdict | None) -> float | None:
    """The judge's marks as one number from 0 to 1: what is not grounded or not safe helps nobody."""
    if verdict is None:
        return None
    return (verdict.helpful - 1) / 4 if verdict.grounded and verdict.safe else 0.0


def collected(artifacts: Path) -> list[Seen]:
    """What the product recorded: outcomes with the questions of conversations that are kept, else these alone, else feedback.

    Outcomes and conversations are all of the answers; feedback is only those that somebody remarked on, and never mixed in.
    """
    kept = exchanges.read(artifacts / exchanges.FILE)
    if recorded := outcomes.read(artifacts / "feedback")[0]:
        return from_outcomes(recorded, {e.answer_id: e.message for e in kept})
    return from_exchanges(kept) or from_feedback(feedback.read(artifacts / "feedback")[0])


def split(seen: Sequence[Seen], since: float) -> tuple[list[Seen], list[Seen]]:
    """The reference (four weeks before `since`) and the current window (from then on)."""
    first = since - REFERENCE.total_seconds()
    return [s for s in seen if first <= s.time < since], [s for s in seen if s.time >= since]


def monday(now: float) -> float:
    """When the week began (UTC). A round must begin at a time that was fixed before; a window that slides would not do."""
    day = datetime.fromtimestamp(now, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    return (day - timedelta(days=day.weekday())).timestamp()


class Lens:
    """Turns messages into what the tests see, beside a library. `embed` gives unit vectors, (n, 384)."""

    def __init__(
        self, library: Library, embed_library: Callable[[Sequence[str]], Array], embed: Callable[[Sequence[str]], Array]
    ):
        passages = [p for leaf in library for p in leaflet_passages(leaf, f"{leaf.id}.md")]
        texts = [unit_texts(p) for p in passages]
        systems = {leaf.id: leaf.body_system for leaf in library}
        self.topics = sorted(set(systems.values()))
        self._units = embed_library([text for group in texts for text in group])
        numbers = [self.topics.index(systems[p.document]) for p in passages]
        self._topic = np.repeat(numbers, [len(group) for group in texts])
        self._embed = embed
        rng = np.random.default_rng(SEED)
        one, other = rng.choice(len(self._units), (2, 2_000))
        width = WIDTH * float(np.median(np.linalg.norm(self._units[one] - self._units[other], axis=1)))
        self._frequencies = rng.normal(scale=1 / width, size=(self._units.shape[1], FEATURES // 2)).astype(np.float32)

    def __call__(self, seen: Sequence[Seen]) -> Window:
        """UserError never; messages whose question is not known keep their outcome."""
        asked = [(row, s.question) for row, s in enumerate(seen) if s.question]
        rows = np.array([row for row, _ in asked], dtype=int)
        n = len(seen)
        meaning, topic = np.full((n, FEATURES), np.nan, np.float32), np.full(n, -1)
        words, distance = np.full(n, np.nan), np.full(n, np.nan)
        if asked:
            texts = list(dict.fromkeys(question for _, question in asked))
            vectors = self._embed(texts)
            place = {text: i for i, text in enumerate(texts)}
            angle = vectors @ self._frequencies
            features = np.concatenate([np.cos(angle), np.sin(angle)], axis=1) / np.sqrt(FEATURES / 2)
            nearness = np.concatenate([self._nearest(vectors[i : i + 256]) for i in range(0, len(vectors), 256)], axis=1)
            at = np.array([place[question] for _, question in asked])
            meaning[rows], topic[rows] = features[at], nearness[0][at].astype(int)
            words[rows] = [len(question.split()) for _, question in asked]
            distance[rows] = np.clip((AT_HOME - nearness[1][at]) / (AT_HOME - FOREIGN), 0, 1)
        kinds = [s.kind for s in seen]
        return Window(
            time=np.array([s.time for s in seen]), meaning=meaning, topic=topic, words=words, distance=distance,
            score=np.array([np.nan if s.score is None else s.score for s in seen], dtype=float),
            answered=np.array([kind == "answer" for kind in kinds], dtype=float),
            refused=np.array([kind in REFUSALS for kind in kinds], dtype=float),
        )  # fmt: skip

    def _nearest(self, vectors: Array) -> Array:
        """(2, n): the topic of the nearest unit, and the cosine with it."""
        cosines = vectors @ self._units.T
        best = cosines.argmax(axis=1)
        return np.stack([self._topic[best], cosines[np.arange(len(best)), best]])


# --- the comparison --------------------------------------------------------------------------------------------------


def compare(reference: Window, current: Window, topics: Sequence[str], alpha: float = ALPHA) -> Verdict:
    """Whether `current` is still like `reference`. Both in the order of time, `current` from the beginning of its round."""
    n, m = len(reference), len(current)
    if few := too_little(n, m):
        return few
    reference = reference.take(np.linspace(0, n - 1, min(n, MOST)).astype(int))
    paths = wealth(reference, current, len(topics))
    mean = np.mean([np.exp(path) for path in paths.values()], axis=0)
    over = np.flatnonzero(mean >= 1 / alpha)
    drifted = len(over) > 0
    highest = {name: max(1.0, float(np.exp(path.max()))) for name, path in paths.items()}
    tests = [
        _test(name, evidence, drifted and evidence >= 1 / alpha, reference, current, topics) for name, evidence in highest.items()
    ]
    since = float(current.time[over[0]]) if drifted else None
    seen = f"{m:,} messages now beside {n:,} before"
    by_chance = f"by chance in at most {alpha:.0%} of all weeks"
    if drifted:
        blamed = sorted((t for t in tests if t.alarm), key=lambda t: -t.evidence)
        when = datetime.fromtimestamp(since or 0, UTC).strftime("%d %B %Y %H:%M UTC").lstrip("0")
        sentence = f"Something changed: {'; '.join(t.says for t in blamed)}. Seen in {seen}, first on {when}; {by_chance}."
    else:
        best = max(tests, key=lambda t: t.evidence)
        sentence = (
            f"Nothing changed that the tests can see in {seen}. Most unusual: {best.says} (as rare as one chance in "
            f"{best.evidence:,.0f}; an alarm needs more than {1 / alpha:,.0f})."
        )
    return Verdict(drifted, sentence, tests, float(mean.max()), since, n, m)


def too_little(reference: int, current: int) -> Verdict | None:
    """The verdict on windows of so many messages when they are too few to say anything; None when they are enough."""
    if min(reference, current) >= FEWEST:
        return None
    counts = f"{reference:,} messages to compare with and {current:,} now"
    sentence = f"Too little data: {counts}, of each at least {FEWEST} are needed: nothing was compared."
    return Verdict(None, sentence, reference=reference, current=current)


def wealth(reference: Window, current: Window, topics: int) -> dict[str, Array]:
    """test -> (n,) log wealth after each message. When the reference is used up the next deal of it begins, in a new order.

    Every deal begins with a wealth of its own, and has a chance of its own to cry wolf: with the same threshold for each, a small
    reference and a long week would add up to many times ALPHA. So what is won in deal k counts for 1 / (k (k + 1)) of itself:
    it would have to reach k (k + 1) / ALPHA, which happens with a probability of ALPHA / (k (k + 1)) at most, and these add up
    to ALPHA over all deals there can be. The first deal, which nearly every week ends in, begins at 1/2.

    What stands after a message never depends on later ones, so the same call an hour later goes on where this one ended.
    """
    lengths = _binned(reference.words), _binned(current.words)
    paths: dict[str, list[Array]] = {name: [] for name in WATCHED}
    begin = turn = 0
    while begin < len(current):
        dealt = betting.deal(len(reference), len(current) - begin, SEED + turn)
        part = slice(begin, begin + len(dealt.starts))
        payoffs = {
            "meaning": betting.bet_on_meaning(current.meaning[part], reference.meaning, dealt),
            "topic": betting.bet_on_categories(current.topic[part], reference.topic, dealt, topics),
            "length": betting.bet_on_categories(lengths[1][part], lengths[0], dealt, len(LENGTHS) + 1),
        }
        for name in ("distance", "score", "answered", "refused"):
            payoffs[name] = betting.bet_on_mean(getattr(current, name)[part], getattr(reference, name), dealt)
        for name, gained in payoffs.items():
            won = betting.log_wealth(gained, two_sided=name in ("distance", "score", "answered", "refused"))
            paths[name].append(won - np.log((turn + 1) * (turn + 2)))
        begin, turn = part.stop, turn + 1
    return {name: np.concatenate(parts) for name, parts in paths.items()}


def stability_index(before: Array, now: Array, categories: int) -> tuple[float, float]:
    """The population stability index over categories (-1: none) and its p-value.

    Sum of (q - p) ln(q / p), half a row added to every category. Without a change it is about (1/n + 1/m) times a chi-squared
    variable with one degree of freedom less than there are categories.
    """
    counts = [np.bincount(rows[rows >= 0], minlength=categories) for rows in (before, now)]
    used = counts[0] + counts[1] > 0
    p, q = ((c[used] + 0.5) / (c[used] + 0.5).sum() for c in counts)
    index = float(((q - p) * np.log(q / p)).sum())
    scale = sum(1 / max(c.sum(), 1) for c in counts)
    return index, float(chi2.sf(index / scale, max(int(used.sum()) - 1, 1)))


def discrepancy(before: Array, now: Array, permutations: int = PERMUTATIONS, seed: int = SEED) -> tuple[float, float]:
    """The squared maximum mean discrepancy of two sets of kernel features and its p-value over random relabellings."""
    before, now = before[~np.isnan(before[:, 0])], now[~np.isnan(now[:, 0])]
    if not len(before) or not len(now):
        return 0.0, 1.0
    both, rng = np.concatenate([before, now]), np.random.default_rng(seed)
    total = both.sum(axis=0)
    labels = np.zeros((permutations + 1, len(both)), np.float32)
    labels[0, len(before) :] = 1
    for row in labels[1:]:
        row[rng.choice(len(both), len(now), replace=False)] = 1
    sums = labels @ both
    found = ((sums / len(now) - (total - sums) / len(before)) ** 2).sum(axis=1)
    return float(found[0]), float((found >= found[0]).mean())  # the labels as they are count as one of the relabellings


def _test(name: str, evidence: float, alarm: bool, reference: Window, current: Window, topics: Sequence[str]) -> Finding:
    """The measure of how much changed, in words a person who runs the product understands."""
    before = now = amount = chance = None
    watched = WATCHED[name]
    if name == "meaning":
        amount, chance = discrepancy(reference.meaning, current.meaning)
        says = f"{watched} (squared discrepancy {amount:.4f}; {_chance(chance)})"
    elif name == "topic":
        amount, chance = stability_index(reference.topic, current.topic, len(topics))
        old, new = (np.bincount(rows[rows >= 0], minlength=len(topics)) / len(rows) for rows in (reference.topic, current.topic))
        most = int(np.abs(new - old).argmax())
        moved = (
            f"most in {topics[most]!r}, {old[most]:.0%} before, {new[most]:.0%} now" if old.any() and new.any() else "not known"
        )
        says = f"{watched} ({moved}; stability index {amount:.2f}; {_chance(chance)})"
    else:
        values = "words" if name == "length" else name
        before, now = (_mean(getattr(window, values)) for window in (reference, current))
        if name == "length":
            amount, chance = stability_index(_binned(reference.words), _binned(current.words), len(LENGTHS) + 1)
        shown = "not known" if before is None or now is None else _moved(name, before, now)
        says = f"{watched} ({shown}{f'; stability index {amount:.2f}; {_chance(chance)}' if amount is not None else ''})"
    return Finding(name, evidence, alarm, before, now, amount, chance, says)


def _moved(name: str, before: float, now: float) -> str:
    if name == "length":
        return f"{before:.1f} words on average before, {now:.1f} now"
    if name in ("answered", "refused"):
        return f"{before:.1%} before, {now:.1%} now"
    return f"{before:.3f} before, {now:.3f} now"


def _chance(p: float) -> str:
    return "so much by chance: less than 1 in 100" if p < 0.01 else f"so much by chance: {p:.0%}"


def _mean(values: Array) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def _binned(words: Array) -> Array:
    """The class of lengths of each message; -1 where its text is not known."""
    return np.where(np.isnan(words), -1, np.searchsorted(LENGTHS, np.nan_to_num(words)))


def _seconds(time: str) -> float:
    return datetime.fromisoformat(time).timestamp()


# --- the command -----------------------------------------------------------------------------------------------------


def lens_for(settings: Settings) -> Lens:
    """The library as the last `make ml` embedded it; people's messages are embedded each time and their vectors never stored."""
    library = load_library(settings.datasets)
    stored = StoredVectors(settings.artifacts / "vectors.npz", embedder().embed)

    def embed(texts: Sequence[str]) -> Array:
        with progress("drift: embedding", total=len(texts)) as bar:
            return embedder().embed(texts, bar.update)

    return Lens(library, stored, embed)


def check(settings: Settings, since: float) -> Verdict:
    """What was recorded from `since` on, beside the four weeks before it."""
    reference, current = split(collected(settings.artifacts), since)
    if few := too_little(len(reference), len(current)):  # nothing needs to be loaded to say so
        return few
    lens = lens_for(settings)
    return compare(lens(reference), lens(current), lens.topics)
