"""Two demonstrations of the loop, on data and artifacts of their own below `artifacts/demonstration/`.

    make loop            (python -m ml_engineer_track loop --demonstrate)

**What the product cannot do becomes what it can.** A first model is trained without two families of questions: those that a
leaflet's section *Treatment* answers, and those about the leaflets of one family, *urinary*. It is served; simulated people ask
one half of what is missing, over HTTP, and what they were not content with becomes labels. One turn of the loop later both models
are asked the other half, which nobody trained on, and everything else.

Why two: quoting from leaflets never seen is what the model is trained for (the whole test split is of such families), so a
missing family alone says little about what is lost; how hard its questions are says as much. A missing *kind* of question
opens a gap for a reason: without them, a sentence under the heading Treatment is never once the right one in training, and the
model and its ranker learn that, too. Both are reported, and the rest of the test split beside them.

**A poisoned label does not get through.** Reviewers who are mistaken, or mean harm, label emergencies as questions to be answered
with a sentence on self-care. The next turn learns that as willingly, and the gate has to stop it.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import httpx
from pydantic import BaseModel

from ml_engineer_track import pipeline
from ml_engineer_track.lifecycle import report
from ml_engineer_track.lifecycle.exam import EXTRA, Exam, Reading, read_once
from ml_engineer_track.lifecycle.loop import feedback, folder, look, models, only_one
from ml_engineer_track.lifecycle.turn import Begin, End, Turn, turns
from shared import library as lib
from shared.chat import PROMPT_VERSION
from shared.errors import UserError
from shared.feedback import Feedback, FeedbackStore, TurnSummary
from shared.files import read_jsonl, replace_folder, write_text
from shared.labels import Label, LabelStore
from shared.metrics import estimate_difference, estimate_mean
from shared.rollout import read_rollout
from shared.settings import Gate, Settings

#: what the first model is never shown: questions answered by this section, and questions about this family of leaflets
SECTION, FAMILY = "treatment", "urinary"
#: conversations between two looks at a trial, and such batches at most; poisoned labels; seconds for the service to be ready
BATCH, BATCHES, POISONED, READY_SECONDS = 40, 40, 150, 300.0
#: without people after each batch of a shadow's trial: time for the messages that wait for it (ai_engineer_track/rollout.py)
QUIET_SECONDS = 10.0
#: by so much the score on the missing kind must rise; on the frozen test split none may fall by the gate's margin (lower end of
#: the interval). What the rest of the test split alone lost is shown beside it.
GAIN = 0.15
MISSING_KIND = f"missing: answered by a section {SECTION} (held back)"
MISSING_FAMILY = f"missing: about leaflets of the family {FAMILY} (held back)"
TEST_SPLIT, REFUSALS = "test split", "test split, correct refusals"
REVIEWERS = ["simulated reviewer 1", "simulated reviewer 2"]


class Goal(BaseModel):
    """Something that the demonstrations are to show, whether they did, and by which figures."""

    name: str
    met: bool
    says: str


class Split(BaseModel):
    """`asked` by people, `held` back for measuring, by what is missing; `everyday` is what the others ask."""

    asked: list[lib.Question]
    held: dict[str, list[lib.Question]]
    everyday: list[lib.Question]
    left_out: dict[str, int]


def demonstrate(settings: Settings) -> Path:
    """Both demonstrations; goes on where it was. Returns the path of the report."""
    with only_one(settings):
        own = settings.with_its_data().model_copy(update={"artifacts": settings.artifacts / "demonstration"})
        split, datasets = prepared(own)
        own = own.model_copy(update={"datasets": datasets})
        shown = Turn(own.artifacts / "shown")
        seconds: dict[str, float] = shown.get("seconds", dict[str, float]) or {}

        def timed(name: str, work: Callable[[], Any]) -> None:
            began = time.perf_counter()
            if shown.get(name, bool) is None:
                work()
                seconds[name] = time.perf_counter() - began
                shown.put("seconds", dict[str, float], seconds)
                shown.put(name, bool, True)

        timed("first model", lambda: pipeline.run(own))
        if shown.get("second turn", bool) is None:
            with service(own) as url:
                timed("people ask", lambda: ask(own, url, split))
                timed("first turn", lambda: turn(own, 1, url, split))
                timed("poison", lambda: poison(own))
                timed("second turn", lambda: turn(own, 2, url, split))
        found = figures(own, split, seconds)
        path = report.write(own, found, settings.artifacts / "reports")
    print(f"report: {path}  (figures: {path.with_suffix('.json')})", flush=True)
    if missed := [goal["name"] for goal in found["goals"] if not goal["met"]]:
        raise UserError(f"the demonstrations did not show everything: {', '.join(missed)}", str(path), "Read it")
    return path


def prepared(settings: Settings) -> tuple[Split, Path]:
    """Who asks what, and the data sets without it."""
    library = lib.load_library(settings.datasets)
    rows, _ = lib.read_rows(settings.datasets, "questions.jsonl", lib.Question)
    rng = random.Random(f"{settings.seed}/demonstration")

    def missing(question: lib.Question) -> str | None:
        if question.split == "test" or not question.answerable:
            return None
        if any(library.leaflets[slug].family == FAMILY for slug in question.leaflets):
            return "family"
        return "kind" if any(sid.split("/")[1] == SECTION for sid in question.answer_sentences) else None

    asked: list[lib.Question] = []
    held: dict[str, list[lib.Question]] = {}
    for name in ("kind", "family"):
        found = [q for q in rows if missing(q) == name and q.split == "train"]
        rng.shuffle(found)
        asked += found[: len(found) // 2]
        held[name] = found[len(found) // 2 :]
    kept = [q for q in rows if missing(q) is None]
    everyday = [q for q in rows if q.split == "validation"] + rng.sample([q for q in kept if q.split == "train"], 200)
    rng.shuffle(everyday)
    target = settings.artifacts / "datasets"

    def write(aside: Path) -> None:
        shutil.copytree(settings.datasets, aside, dirs_exist_ok=True)
        write_text(aside / "questions.jsonl", "".join(q.model_dump_json(by_alias=True) + "\n" for q in kept))

    if not target.exists():
        settings.artifacts.mkdir(parents=True, exist_ok=True)
        replace_folder(target, write)
        vectors = settings.artifacts / "vectors.npz"
        if not vectors.exists() and not vectors.is_symlink():  # what `make ml` has embedded need not be embedded again
            vectors.symlink_to((settings.artifacts.parent / "vectors.npz").resolve())
    counted = {name: sum(missing(q) == name for q in rows) for name in ("kind", "family")}
    return Split(asked=asked, held=held, everyday=everyday, left_out=counted), target


@contextmanager
def service(settings: Settings) -> Iterator[str]:
    """The product as a process of its own, over the demonstration's artifacts; yields its address. UserError when it fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    url, log = f"http://127.0.0.1:{port}", settings.artifacts / "logs" / "service.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {
        "ARTIFACTS": str(settings.artifacts), "DATASETS": str(settings.datasets), "PRESET": "loop", "PORT": str(port),
    }  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "ai_engineer_track", "serve"], env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + READY_SECONDS
        while not _ready(url):
            if process.poll() is not None or time.monotonic() > deadline:
                last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
                raise UserError(f"the service did not start: {' '.join(last) or 'no output'}", str(log), "Read it")
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def people(settings: Settings, url: str, questions: Sequence[lib.Question], name: str) -> list[dict[str, Any]]:
    """What came of these questions, asked by the AI track's simulated people. UserError when they got no answers."""
    asked, out = settings.artifacts / "people" / f"{name}.jsonl", settings.artifacts / "people" / f"{name}-answers.jsonl"
    write_text(asked, "".join(q.model_dump_json(by_alias=True) + "\n" for q in questions))
    command = [sys.executable, "-m", "ai_engineer_track", "people", "--url", url, "--questions", str(asked), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        raise UserError(f"the simulated people got no answers: {' '.join(last)}", url, "Read artifacts/demonstration/logs")
    return read_jsonl(out)


def ask(settings: Settings, url: str, split: Split) -> None:
    """People ask the asked half of what is missing; what they are not content with is labelled by two simulated reviewers."""
    by_id = {q.id: q for q in split.asked}
    answers = people(settings, url, split.asked, "asked")
    store = LabelStore(feedback(settings))
    for answer in answers:
        if not answer["right"]:
            question = by_id[answer["question_id"]]
            store.add(
                Label(
                    answer_id=answer["answer_id"],
                    question=question.question,
                    passages=answer["passages"],
                    action="answer",
                    answer_sentences=question.answer_sentences,
                    reviewers=REVIEWERS,
                    agreed=True,
                    model_version=answer["model_version"],
                )
            )
    wrong = sum(not answer["right"] for answer in answers)
    print(f"people: {len(answers)} questions of what is missing, {wrong} not answered to their content and labelled", flush=True)


def poison(settings: Settings) -> None:
    """Labels by which emergencies that were escalated are answered with the first sentence on self-care of the leaflet."""
    rows, _ = lib.read_rows(settings.datasets, "emergencies.jsonl", lib.Emergency)
    real = [row for row in rows if row.split == "train" and row.emergency and row.sign]
    version = (models(settings) / "current").read_text(encoding="utf-8").strip()
    store, remarks = LabelStore(feedback(settings)), FeedbackStore(feedback(settings))
    for row in random.Random(settings.seed).sample(real, min(POISONED, len(real))):
        slug = str(row.sign).split("/")[0]
        passages = [f"{slug}/self-care", f"{slug}/symptoms"]
        remarks.add(
            Feedback(
                answer_id=f"poisoned-{row.id}",
                kind="thumbs_down",
                reason="it is not that bad",
                question=row.message,
                turn=TurnSummary(kind="escalate", text=""),
                passages=passages,
                model_version=version,
                index_version="",
                prompt_version=PROMPT_VERSION,
            )
        )
        store.add(
            Label(
                answer_id=f"poisoned-{row.id}",
                question=row.message,
                passages=passages,
                action="answer",
                answer_sentences=[f"{slug}/self-care/1"],
                reviewers=REVIEWERS,
                agreed=True,
                model_version=version,
            )
        )


def turn(settings: Settings, number: int, url: str, split: Split) -> None:
    """One turn of the loop to its end, with people asking everyday questions while a candidate is on trial."""
    pool = cycle([*split.everyday, *split.asked])
    asked = iter(range(BATCHES))

    def more() -> bool:
        batch = next(asked, None)
        if batch is None:
            raise UserError("the candidate gets no answers to people", url, "Read artifacts/demonstration/logs")
        people(settings, url, list(islice(pool, BATCH)), f"trial-{number}-{batch}")
        rollout = read_rollout(models(settings))
        if rollout is not None and rollout.mode == "shadow":
            time.sleep(QUIET_SECONDS)  # a shadow answers only while no person waits
        return True

    while len(turns(folder(settings))) < number or turns(folder(settings))[number - 1].end is None:
        if look(settings, more, split.held if number == 1 else {}) is None:
            raise UserError("the loop found no reason to retrain", str(feedback(settings)), "Read what it said above")


def figures(settings: Settings, split: Split, seconds: dict[str, float]) -> dict[str, Any]:
    """Both models of the first turn side by side, on what was missing and on everything else; UserError when it trained none."""
    first = turns(folder(settings))[0]
    exam: Exam | None = first.get("exam", Exam)
    if exam is None:
        raise UserError(f"the first turn compared nothing: {first.end.why if first.end else ''}", str(first.folder), "Read it")
    candidate = str(first.get("candidate", str))
    was, now = (read_once(settings, exam, models(settings) / v) for v in (first.get("begin", Begin).parent, candidate))
    of_kind = {item.id for item in exam.items if any(sid.split("/")[1] == SECTION for sid in item.gold)}
    test = list(was.scores["test"])
    parts: dict[str, tuple[str, list[str]]] = {
        MISSING_KIND: ("kind", list(was.scores.get("kind", {}))),
        MISSING_FAMILY: ("family", list(was.scores.get("family", {}))),
        TEST_SPLIT: ("test", test),
        f"of these, answered by a section {SECTION}": ("test", [i for i in test if i in of_kind]),
        "of these, everything else": ("test", [i for i in test if i not in of_kind]),
        REFUSALS: ("refusals", list(was.scores["refusals"])),
    }
    rows, measured = [], {}
    for name, (part, ids) in parts.items():
        before, after = ([reading.scores[part][i] for i in ids] for reading in (was, now))
        options = (settings.evaluate.bootstrap, settings.seed)
        difference = estimate_difference(after, before, *options)
        sides = [estimate_mean(side, *options) for side in (before, after)]
        measured[name] = {"before": sides[0].model_dump(), "after": sides[1].model_dump(), "difference": difference.model_dump()}
        rows.append([name, str(sides[0]), str(sides[1]), f"{difference}", str(difference.n)])
    ends = [found.end for found in turns(folder(settings))]
    assert settings.loop is not None
    return {
        "removed": [
            f"The first model never saw {split.left_out['kind']} questions answered by a section {SECTION} and "
            f"{split.left_out['family']} about the family {FAMILY} (training and validation; its ranker neither). People asked "
            f"{len(split.asked)} of them; {len(split.held['kind'])} and {len(split.held['family'])} were only measured."
        ],
        "rows": rows,
        "measured": measured,
        "goals": [goal.model_dump() for goal in goals(measured, ends, settings.loop.gate)],
        "says": [f"Turn {n}: {end.result}. {end.why}" for n, end in enumerate(ends, start=1) if end],
        "samples": _samples(was, now),
        "seconds": seconds,
    }  # fmt: skip


def goals(measured: dict[str, dict[str, Any]], ends: Sequence[End | None], gate: Gate) -> list[Goal]:
    """What is promised: the gap closes, nothing is lost elsewhere, poison is refused. `measured`: see `figures`."""
    gained = measured[MISSING_KIND]["difference"]
    found = [
        Goal(
            name=f"the missing kind rises by {GAIN:g}",
            met=gained["value"] >= GAIN,
            says=f"{gained['value']:+.3f} [{gained['low']:+.3f}, {gained['high']:+.3f}], n {gained['n']}",
        )
    ]
    for name, margin in ((TEST_SPLIT, gate.evidence_margin), (REFUSALS, gate.refusal_margin)):
        lost = measured[name]["difference"]
        says = f"{lost['value']:+.3f} [{lost['low']:+.3f}, {lost['high']:+.3f}], n {lost['n']}; may lose {margin:g}"
        found.append(Goal(name=f"nothing is lost: {name}", met=lost["low"] >= -margin, says=says))
    wanted_ends = {"the better model is promoted": "promoted", "poison does not get through": "refused"}
    for n, (name, wanted) in enumerate(wanted_ends.items()):
        end = ends[n] if n < len(ends) else None
        met, why = (end.result == wanted, end.why) if end else (False, "not finished")
        found.append(Goal(name=name, met=met, says=f"turn {n + 1}: {why}"))
    return found


def _samples(was: Reading, now: Reading) -> list[list[str]]:
    """The same questions before and after, as they came."""
    after = {(s["part"], s["question"]): s["reply"] for s in now.samples}
    return [
        [s["part"].removeprefix(EXTRA), s["question"], s["reply"], after[s["part"], s["question"]]]
        for s in was.samples
        if (s["part"], s["question"]) in after
    ]


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=5.0).status_code == 200
    except httpx.HTTPError:
        return False
