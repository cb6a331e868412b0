"""What came back from the product since the model was last changed, and whether it is reason enough to change it again.

Why an ML engineer does not simply train on everything in the file: a label on an answer of a model nobody knows cannot be
reproduced, one about a leaflet of the test split would spoil the test, and one that was tried before and made the model worse
must not come again with the next batch. What is used is laid aside under its content hash, so that a turn that was interrupted
goes on with the same.

    artifacts/loop/turns/<n>/collected.json      the labels of a turn, and what was left out and why
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from shared import feedback, labels, outcomes
from shared.files import sha256_text
from shared.handoff import read_manifest
from shared.labels import Label
from shared.library import BadRow, Library
from shared.settings import Loop
from shared.versions import batch_version


class Collected(BaseModel):
    """`taught` are trained on; `examined` never are: the gate asks the candidate these. `notes` say what was left out.

    `decided` are the ids of labels that correct a decision: something else should have been done than was. The others only say
    which sentences answer; as decisions they would teach that everything is to be answered.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    id: str
    taught: list[Label]
    examined: list[Label]
    decided: list[str]
    counts: dict[str, int]
    notes: list[str]

    @property
    def labels(self) -> list[Label]:
        return [*self.taught, *self.examined]


def collect(folder: Path, models: Path, library: Library, options: Loop, tried: Collection[str]) -> Collected:
    """The labels that can be learnt from, without those of `tried`. Lines that cannot be read are noted, never fatal."""
    records, bad = feedback.read(folder)
    written, bad_labels = labels.read(folder)
    answers, bad_outcomes = outcomes.read(folder)
    notes = [_said(row) for row in (*bad, *bad_labels, *bad_outcomes)]
    known = {path.parent.name for path in models.glob("*/manifest.json")}
    for what, found in (("feedback records", records), ("labels", written), ("outcomes", answers)):
        if strangers := Counter(r.model_version.split(":")[0] for r in found if r.model_version.split(":")[0] not in known):
            names = ", ".join(sorted(strangers))
            notes.append(f"{sum(strangers.values())} {what} are about model versions that are not here ({names}): not used")
    usable = [label for label in written if label.model_version.split(":")[0] in known and label.id not in tried]
    fit: list[Label] = []
    for label in usable:
        if problem := _problem(label, library):
            notes.append(f"label {label.id}: {problem}: not used")
        else:
            fit.append(label)
    # By the label's own hash, so that no later label changes on which side an earlier one stands.
    examined = [label for label in fit if int(sha256_text(label.id)[:8], 16) / 2**32 < options.exam_share]
    ids = {label.id for label in examined}
    done = {record.answer_id: record.turn.kind for record in records}
    return Collected(
        id=batch_version(fit),
        taught=[label for label in fit if label.id not in ids],
        examined=examined,
        decided=[label.id for label in fit if _corrects(label, done.get(label.answer_id))],
        counts={"feedback": len(records), "labels": len(written), "outcomes": len(answers), "new labels": len(fit)},
        notes=notes,
    )


def reason_to_retrain(
    collected: Collected, current: Path, options: Loop, drifted: Callable[[], str | None] = lambda: None
) -> str | None:
    """Why the model should change now, as a clause; None when it should not.

    There is nothing to learn without a new label, whatever else happens. `drifted` says in a sentence what has changed, or None.
    """
    if not collected.taught:
        return None
    new = len(collected.labels)
    if new >= options.enough_labels:
        return f"{new} new labels, {options.enough_labels} are enough"
    if sentence := drifted():
        return f"drift, and {new} new labels: {sentence}"
    age = datetime.now(UTC) - datetime.fromisoformat(read_manifest(current).created)
    if options.oldest_days is not None and age.days >= options.oldest_days:
        return f"the model is {age.days} days old, and there are {new} new labels"
    return None


def leaflets_of(label: Label, library: Library) -> list[str]:
    """The leaflets whose text the label teaches; of a question without an answer the one that was found first."""
    ids = label.answer_sentences or (label.passages[:1] if label.action == "not_answered" else [])
    return list(dict.fromkeys(slug for sid in ids if (slug := sid.split("/")[0]) in library.leaflets))


def _corrects(label: Label, done: str | None) -> bool:
    """Should something else have been done? What was done is not known of an answer that nobody remarked on."""
    if label.action == "not_answered":
        return False  # that is decided when the sources are read, not before
    return label.action != ("answer" if done in (None, "not_answered", "unavailable") else done)


def _problem(label: Label, library: Library) -> str:
    """Why this label cannot become a training row; empty when it can."""
    if gone := [sid for sid in label.answer_sentences if not library.has(sid)]:
        return f"sentence {gone[0]} is not in the library"
    about = leaflets_of(label, library)
    if label.action in ("answer", "not_answered") and not about:
        return "it names no leaflet of the library"
    held = [slug for slug in about if library.leaflets[slug].split != "train"]
    return f"{held[0]} is of the {library.leaflets[held[0]].split} split, which nothing is trained on" if held else ""


def _said(row: BadRow) -> str:
    return f"skipped {row.file}:{row.line}: {row.reason}"
