"""What the loop did, for people (`artifacts/reports/loop.html`) and programs (`loop.json`): every turn and why it ended so."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_engineer_track.lifecycle.collect import Collected
from ml_engineer_track.lifecycle.gate import Check
from ml_engineer_track.lifecycle.sequential import Comparison
from ml_engineer_track.lifecycle.turn import Begin, Turn, turns
from shared import page
from shared.files import write_json, write_text
from shared.hardware import fingerprint
from shared.settings import Settings


def write(settings: Settings, shown: dict[str, Any] | None = None, reports: Path | None = None) -> Path:
    """The page's path. `shown` are the demonstrations' figures; without them those of the last report are kept."""
    folder = reports or settings.artifacts / "reports"
    path = folder / "loop.json"
    if shown is None and path.exists():
        shown = json.loads(path.read_text(encoding="utf-8")).get("demonstrations")
    records = [record(turn) for turn in turns(settings.artifacts / "loop")]
    document = {"hardware": fingerprint(), "seed": settings.seed, "turns": records, "demonstrations": shown}
    write_json(path, document)
    write_text(folder / "loop.html", html(document))
    return folder / "loop.html"


def record(turn: Turn) -> dict[str, Any]:
    """One turn as plain data."""
    begin: Begin = turn.get("begin", Begin)
    collected: Collected = turn.get("collected", Collected)
    checks: Sequence[Check] = turn.get("checks", list[Check]) or []
    trial = {name: found for name in ("shadow", "canary") if (found := turn.get(name, Comparison))}
    return {
        "turn": turn.number,
        "begin": begin.model_dump(),
        "labels": {"id": collected.id, "taught": len(collected.taught), "held back": len(collected.examined)},
        "counts": collected.counts,
        "notes": collected.notes,
        "checks": [check.model_dump() for check in checks],
        "trial": {name: {**vars(found), "says": str(found)} for name, found in trial.items()},
        "end": turn.end.model_dump() if turn.end else None,
    }


def html(document: dict[str, Any]) -> str:
    hardware = document["hardware"]
    where = f"{hardware['cpu_info']}, {hardware['n_threads']} threads, GPU: {hardware['gpu_info'] or 'none'}"
    parts = [
        page.heading("Closing the loop", 1),
        page.paragraph(
            f"What the product got wrong became the next model, or a reason why not. Seed {document['seed']}; {where}.", True
        ),
    ]
    if shown := document["demonstrations"]:
        parts += [page.heading("The demonstrations"), *(page.paragraph(line) for line in shown["removed"])]
        goals = [[goal["name"], "shown" if goal["met"] else "not shown", goal["says"]] for goal in shown["goals"]]
        parts.append(page.table(["what is to be shown", "", "figures"], goals))
        parts.append(page.table(["questions", "before", "after", "difference", "n"], shown["rows"]))
        parts += [page.paragraph(line) for line in shown["says"]]
        parts.append(page.table(["part", "question", "reply before", "reply after"], shown["samples"]))
        minutes = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in shown["seconds"].items())
        parts.append(page.paragraph(f"Wall time: {minutes}."))
    for turn in document["turns"]:
        begin, end = turn["begin"], turn["end"]
        parts += [
            page.heading(f"Turn {turn['turn']}: {end['result'] if end else 'not finished'}"),
            page.paragraph(
                f"{begin['parent']} was retrained at {begin['time']}: {begin['reason']}. {turn['labels']['taught']} labels were "
                f"taught and {turn['labels']['held back']} held back (batch {turn['labels']['id']})."
            ),
            *(page.paragraph(note) for note in turn["notes"][:20]),
            page.table(
                ["check", "", "figures"],
                [[c["name"], "passed" if c["passed"] else "refused", c["says"]] for c in turn["checks"]]
                + [[name, found["verdict"], found["says"]] for name, found in turn["trial"].items()],
            ),
            page.paragraph(f"{end['candidate'] or 'No candidate'}: {end['why']}" if end else "It goes on at the next look."),
        ]
    return page.document("Closing the loop", parts)
