"""The versions that are there, who is current, and the ways between them: promote, roll back, pin, collect garbage.

Why an ML engineer keeps this apart from training: a bad model is put right in a second by the one that was there before, if that
one is still there and nobody has to think. Each move is one atomic rename (`shared.handoff.set_current`); power may fail before
or after it, and the model that is served is a whole one that was promoted at some time.

    python -m ml_engineer_track models                        list versions, figures, who is current, what is pinned
    python -m ml_engineer_track models rollback               the version before the current one becomes current
    python -m ml_engineer_track models pin VERSION            never removed (unpin VERSION)
    python -m ml_engineer_track models gc                     remove what nobody needs

    artifacts/models/previous     the version before the current one, whoever moved it (`make ml` and `make distill` do, too)
    artifacts/models/pins         a version a line
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ml_engineer_track.lifecycle.turn import Begin, open_turn, step
from shared import feedback, handoff, labels, outcomes
from shared.errors import UserError
from shared.files import write_text
from shared.rollout import clear_rollout, read_rollout

#: what is shown of a version: its served variant's figures, as far as somebody read them
SHOWN = ("grounded/evidence_f1", "grounded/correct_refusal", "grounded/decision_accuracy")


@dataclass(frozen=True)
class Version:
    """`roles` say why it is kept: current, previous, on trial, candidate (of the turn that is open), pinned, in feedback, and
    ancestor (one of these was trained on from it: its data are part of theirs). Empty: nobody needs it.
    """

    manifest: handoff.Manifest
    roles: list[str]


def versions(models: Path, feedback_folder: Path) -> list[Version]:
    """All readable versions, the newest first."""
    roles: dict[str, list[str]] = {}
    named = [(_current(models), "current"), (previous(models), "previous"), (on_trial(models), "on trial")]
    parent, candidate = in_turn(models)
    named.append((candidate, "candidate"))
    for version, role in [*named, *((name, "pinned") for name in pins(models))]:
        if version:
            roles.setdefault(version, []).append(role)
    for version in referenced(feedback_folder):
        roles.setdefault(version, []).append("in feedback")
    manifests: dict[str, handoff.Manifest] = {}
    for path in models.glob("*/manifest.json"):
        try:
            manifests[path.parent.name] = handoff.read_manifest(path.parent)
        except UserError:
            continue  # a damaged or newer one is nobody's candidate; `handoff verify` says what is wrong with it
    for version in {*ancestors(manifests, roles), *([parent] if parent else [])}:
        roles.setdefault(version, []).append("ancestor")
    found = [Version(manifest, roles.get(name, [])) for name, manifest in manifests.items()]
    return sorted(found, key=lambda v: v.manifest.created, reverse=True)


def ancestors(manifests: Mapping[str, handoff.Manifest], of: Iterable[str]) -> set[str]:
    """The versions that these were trained on from, and those that they were, as far as the manifests tell."""
    found: set[str] = set()
    waiting = list(of)
    while waiting:
        manifest = manifests.get(waiting.pop())
        if manifest and manifest.lineage and manifest.lineage.parent not in found:
            found.add(manifest.lineage.parent)
            waiting.append(manifest.lineage.parent)
    return found


def in_turn(models: Path) -> tuple[str | None, str | None]:
    """The version that the open turn began from, and its candidate; None where there is none yet. Turns lie beside `models`."""
    turn = open_turn(models.parent / "loop")
    return (turn.get("begin", Begin).parent, turn.get("candidate", str)) if turn else (None, None)


def promote(models: Path, version: str) -> None:
    """`version` becomes current: verified first, then one rename. What was current is remembered before it is left."""
    handoff.verify(models / version)
    handoff.set_current(models, version)


def roll_back(models: Path) -> str:
    """The version before the current one becomes current again. UserError when there is none, or it is no longer whole.

    A rollout that is going on ends first: it was begun beside a model that is no longer trusted, and must not go on beside the
    restored one when power fails between the two. What is left is not come back to: a second rollback goes further back.
    """
    current = handoff.current(models).name
    target = previous(models)
    if target is None:
        lineage = handoff.read_manifest(models / current).lineage
        target = lineage.parent if lineage else None
    if target is None or not (models / target).is_dir():
        raise UserError(
            "there is no version to go back to", str(models), "`python -m ml_engineer_track models` lists what is there"
        )
    handoff.verify(models / target)
    clear_rollout(models)
    step("rollback: the trial has ended")
    handoff.set_current(models, target, remember=False)
    return target


def previous(models: Path) -> str | None:
    return next(iter(handoff.earlier(models)), None)


def pins(models: Path) -> list[str]:
    try:
        return (models / "pins").read_text(encoding="utf-8").split()
    except FileNotFoundError:
        return []


def pin(models: Path, version: str, pinned: bool = True) -> None:
    """Keep a version for ever, or no longer. UserError for a version that is not there."""
    if not (models / version / "manifest.json").exists():
        raise UserError(f"no version {version!r}", str(models), "`python -m ml_engineer_track models` lists what is there")
    kept = [name for name in pins(models) if name != version] + ([version] if pinned else [])
    write_text(models / "pins", "".join(f"{name}\n" for name in kept))


def referenced(folder: Path) -> set[str]:
    """Versions whose answers somebody remarked on: without the model such a record cannot be reproduced."""
    found: Iterable[str] = (
        record.model_version for read in (feedback.read, labels.read, outcomes.read) for record in read(folder)[0]
    )
    return {name.split(":")[0] for name in found}


def collect_garbage(models: Path, feedback_folder: Path, keep: int) -> list[str]:
    """Remove versions that nobody needs, but for the newest `keep` of them and their ancestors; the names of those removed.

    A version is renamed out of sight before its files go, so that nobody finds half of one.
    """
    for left in models.glob(".*.gone"):
        shutil.rmtree(left, ignore_errors=True)
    unneeded = {v.manifest.version: v.manifest for v in versions(models, feedback_folder) if not v.roles}
    spared = ancestors(unneeded, list(unneeded)[:keep])
    removed = []
    for name in [name for name in list(unneeded)[keep:] if name not in spared]:
        gone = models / f".{name}.gone"
        (models / name).rename(gone)
        shutil.rmtree(gone)
        removed.append(name)
    return removed


def show(found: Iterable[Version]) -> None:
    """A table on the terminal."""
    shown = Table("version", "made", "why", *(key.split("/")[1] for key in SHOWN), "kept as")
    for version in found:
        m = version.manifest
        quality = m.variants.get(m.use.get("cpu", "bf16"), next(iter(m.variants.values()))).quality
        why = f"from {m.lineage.parent}: {m.lineage.reason}" if m.lineage else f"from {m.base_model.id}"
        figures = [str(quality[key]) if key in quality else "-" for key in SHOWN]
        shown.add_row(m.version, m.created[:16], why, *figures, ", ".join(version.roles) or "-")
    Console(width=150).print(shown)


def on_trial(models: Path) -> str | None:
    rollout = read_rollout(models)
    return rollout.candidate if rollout else None


def _current(models: Path) -> str | None:
    try:
        return handoff.current(models).name
    except UserError:
        return None
