"""From labels to a candidate: old rows that must not be forgotten, new ones, a short training, a version nobody is served yet.

Why an ML engineer replays: a model that is trained on what it got wrong alone forgets what it got right. A first version of this
loop replayed rows in proportion to their number, refusals were few among them, and the candidate never again said that the
library has no answer. So every skill has its own share (`loop.replay`).

Training goes on from the current version's merged weights, a new adapter on top: a minute instead of the five that training
anew takes, and what the model could do is where it starts from. The ranker, which is quick, is fitted anew on all questions.
"""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ml_engineer_track import curate as c
from ml_engineer_track.finetune import finetune
from ml_engineer_track.lifecycle.collect import Collected, leaflets_of
from ml_engineer_track.models import load_model, load_tokenizer
from ml_engineer_track.publish import card, commit, golden, golden_rows, golden_served
from ml_engineer_track.quantize import SERVED_ONLY, Variants, quantize
from ml_engineer_track.train_ranker import train_ranker
from shared import chat, handoff
from shared import library as lib
from shared.errors import UserError
from shared.files import replace_folder, sha256_text, sha256_tree, write_text
from shared.hardware import fingerprint
from shared.labels import Label
from shared.metrics import Estimate
from shared.ranking import read_ranker
from shared.settings import Loop, Settings

#: how the ids of labels begin, and with them those of the rows that were made of labels
PREFIX = "l-"
#: of the taught labels, one in so many only tells when to stop
VALIDATED = 10


class Trained(BaseModel):
    """What a retraining left on disk: model folders by variant, the ranker, and the data it was made from."""

    folders: dict[str, str]
    weight_bytes: dict[str, int]
    ranker: str
    data: str
    steps: int
    validation_loss: float
    seconds: float


def retrain(settings: Settings, current: Path, collected: Collected, before: Sequence[Collected], work: Path) -> Trained:
    """A candidate from `current`, a published version, in the folder `work`. Goes on where it was when it is called again.

    `before` is what promoted turns taught; it is replayed, too. UserError when the training diverges.
    """
    own = settings_of(settings, current, work)
    datasets = grown(settings.datasets, [label for one in (*before, collected) for label in one.taught], work / "datasets")
    ranker = train_ranker(own.model_copy(update={"datasets": datasets}))
    kept = settings.artifacts / "data"
    data = training_rows(own.model_copy(update={"datasets": datasets}), ranker.path, collected, before, kept)
    tuned = finetune(own, data)
    variants: Variants = quantize(own, tuned)
    return Trained(
        folders=variants.folders, weight_bytes=variants.weight_bytes, ranker=ranker.path, data=str(data.folder),
        steps=tuned.steps, validation_loss=tuned.best_validation_loss, seconds=tuned.seconds,
    )  # fmt: skip


def settings_of(settings: Settings, current: Path, work: Path) -> Settings:
    """The same settings for a training that starts from a published version and leaves everything in `work`."""
    share_vectors(settings, work)
    whole = settings.curate.model_copy(update={"max_rows": None, "copies": loop_of(settings).label_copies})
    return settings.model_copy(update={"model": str(current / "bf16"), "artifacts": work, "curate": whole})


def share_vectors(settings: Settings, work: Path) -> None:
    """What was embedded for the current version need not be embedded again."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "vectors.npz").is_symlink():
        (work / "vectors.npz").symlink_to((settings.artifacts / "vectors.npz").resolve())


def grown(datasets: Path, labels: Sequence[Label], folder: Path) -> Path:
    """A copy of `datasets` with the labels among its questions. Where both ask the same, the label counts: it is newer."""
    library = lib.load_library(datasets)
    old, bad = lib.read_rows(datasets, "questions.jsonl", lib.Question)
    made = [question for label in labels if (question := question_of(label, library))]
    asked = {_plain(question.question) for question in made}
    kept = [question for question in old if _plain(question.question) not in asked or question.split != "train"]

    def write(target: Path) -> None:
        shutil.copytree(datasets, target, dirs_exist_ok=True)
        lines = [q.model_dump_json(by_alias=True) for q in (*kept, *made)] + [row.text for row in bad]
        write_text(target / "questions.jsonl", "".join(f"{line}\n" for line in lines))

    replace_folder(folder, write)
    return folder


def question_of(label: Label, library: lib.Library) -> lib.Question | None:
    """The label as a row of the data sets; None for one that only teaches a decision."""
    if label.action not in ("answer", "not_answered"):
        return None
    slugs = leaflets_of(label, library)
    return lib.Question(
        id=label.id, split=library.leaflets[slugs[0]].split, question=label.question,
        answerable=label.action == "answer", leaflets=slugs, answer_sentences=label.answer_sentences, register="feedback",
    )  # fmt: skip


def training_rows(
    settings: Settings, ranker: str, collected: Collected, before: Sequence[Collected], folder: Path
) -> c.CuratedData:
    """A data version in `folder`: the labels' rows and the replayed ones, with the test rows of the data sets."""
    curated = c.curate(settings, read_ranker(Path(ranker)))
    library = lib.load_library(settings.datasets)
    rng = random.Random(f"{settings.seed}/replay")
    rows = curated.rows("train")
    new = [row for row in rows if row.id.startswith(PREFIX) and row.skill == "answer"]
    corrected = [label for one in (*before, collected) for label in one.taught if label.id in one.decided]
    decisions = [row for label in corrected for row in decision_rows(label, library, settings.curate.copies)]
    said = {row.messages[0]["content"].rpartition("Message: ")[2] for row in decisions}
    old = [r for r in rows if not r.id.startswith(PREFIX) and r.messages[0]["content"].rpartition("Message: ")[2] not in said]
    replayed = [*replay(old, loop_of(settings), rng), *replay_decisions(old, decisions, loop_of(settings), rng)]
    held = {label.id for label in collected.taught[::VALIDATED]}
    train = [row for row in new if row.id.split("#")[0] not in held]
    validation = [row.model_copy(update={"split": "validation"}) for row in new if row.id.split("#")[0] in held]
    loss_rows = rng.sample(old_validation := curated.rows("validation"), min(len(old_validation), 160))
    chosen: dict[lib.Split, list[c.Row]] = {
        "train": [*train, *decisions, *replayed],
        "validation": [*validation, *loss_rows],
        "test": curated.rows("test"),
    }
    return c.write_version(chosen, [], folder, curated.datasets)


def replay(rows: Sequence[c.Row], options: Loop, rng: random.Random) -> list[c.Row]:
    """Old rows by what they teach, as many of each as the settings say, or all there are; decisions are not among them."""
    groups: dict[str, list[c.Row]] = {}
    for row in rows:
        refusal = row.skill == "answer" and row.reply == chat.NOT_ANSWERED
        groups.setdefault("not_answered" if refusal else row.skill, []).append(row)
    chosen = []
    for name, wanted in options.replay.items():
        found = groups.get(name, []) if name != "decide" else []
        chosen += rng.sample(found, min(wanted, len(found)))
    return chosen


def replay_decisions(rows: Sequence[c.Row], new: Sequence[c.Row], options: Loop, rng: random.Random) -> list[c.Row]:
    """Old decisions that, together with the `new` ones, show every action in proportion, emergencies more often than before.

    Labels say what should have been answered and hardly ever what should have been escalated: on top of a plain sample they
    would teach that emergencies are rarer than they are. And what does most harm when forgotten is rehearsed most
    (`loop.emergencies`). Where labels fill an action's share more than once, all shares grow.
    """
    groups: dict[str, list[c.Row]] = {}
    for row in rows:
        if row.skill == "decide":
            groups.setdefault(row.reply, []).append(row)
    escalate = chat.to_json(chat.Decision(action="escalate"))
    weights = {reply: len(found) * (options.emergencies if reply == escalate else 1.0) for reply, found in groups.items()}
    shares = {reply: weight / sum(weights.values()) for reply, weight in weights.items()}
    known = Counter(row.reply for row in new)
    size = max([float(options.replay["decide"]), *(known[reply] / share for reply, share in shares.items())])
    return [
        row
        for reply, found in groups.items()
        for row in rng.sample(found, min(len(found), max(0, round(size * shares[reply]) - known[reply])))
    ]


def decision_rows(label: Label, library: lib.Library, copies: int) -> list[c.Row]:
    """What to do with the message, laid out as the product asks it: the titles of what was found."""
    titles = [library.leaflets[slug].title for sid in label.passages if (slug := sid.split("/")[0]) in library.leaflets]
    assert label.action != "not_answered"
    reply = chat.to_json(chat.Decision(action=label.action))
    messages = chat.decide_messages(label.question, list(dict.fromkeys(titles))[:3])
    return [
        c.Row(id=f"{label.id}#d{copy}", split="train", skill="decide", messages=messages, reply=reply, made_from=[label.id])
        for copy in range(copies)
    ]


def publish_candidate(
    settings: Settings, current: Path, trained: Trained, quality: dict[str, dict[str, Estimate]], lineage: handoff.Lineage
) -> Path:
    """The candidate as a version beside the current one; `current` stays. UserError, and nothing changed, when a check fails."""
    old = handoff.verify(current)
    data = c.load_curated(Path(trained.data))
    folders = {name: Path(folder) for name, folder in trained.folders.items()}
    tokenizer, rows = load_tokenizer(trained.folders["bf16"]), golden_rows(data)
    described = {
        name: handoff.Variant(
            name=name, weight_bytes=trained.weight_bytes[name], quality=quality.get(name, {}), performance={}, files={},
            golden=golden_served(folder, tokenizer, rows) if name in SERVED_ONLY
            else golden(load_model(str(folder)), tokenizer, rows),
        )
        for name, folder in folders.items()
    }  # fmt: skip
    content = [{n: sha256_tree([f]) for n, f in folders.items()}, sha256_tree([Path(trained.ranker)]), lineage.model_dump()]
    manifest = old.model_copy(
        update={
            "version": f"m-{sha256_text(json.dumps(content, sort_keys=True))[:12]}",
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "data": handoff.DataInfo(version=data.version, counts=data.counts, datasets=data.datasets),
            "training": _training(settings, trained),
            "seed": settings.seed,
            "hardware": fingerprint(),
            "use": {where: name if name in described else "bf16" for where, name in old.use.items()},
            "variants": described,
            "assets": {},
            "lineage": lineage,
        }
    )
    models = settings.artifacts / "models"
    write_card = lambda aside: write_text(aside / "MODEL_CARD.md", card(manifest))  # noqa: E731
    return handoff.publish(manifest, folders, models, write_card, [Path(trained.ranker)], make_current=False)


def loop_of(settings: Settings) -> Loop:
    """The preset's settings of the loop. UserError when it has none."""
    if settings.loop is None:
        raise UserError("this preset has no `loop:` group", f"preset {settings.preset}", "Use PRESET=loop, or add the group")
    return settings.loop


def _training(settings: Settings, trained: Trained) -> dict[str, Any]:
    return {**settings.finetune.model_dump(), "steps": trained.steps, "validation_loss": trained.validation_loss}


def _plain(text: str) -> str:
    return " ".join(c.normalise(text).lower().split())
