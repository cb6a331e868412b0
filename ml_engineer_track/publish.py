"""Hands the model over: variants, manifest, golden outputs and model card, in one verified folder.

Why an ML engineer stops here and not at "the loss went down": whoever serves the model must know which prompts it was
trained on, what it can do and cannot, what every file must hash to, and what it should answer. The golden prompts catch
what users of fine-tuning tools report most: a model that behaves differently once it is served.

    python -m ml_engineer_track publish [--preset tiny]
"""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ml_engineer_track.curate import CuratedData, Row
from ml_engineer_track.evaluate import Scores
from ml_engineer_track.finetune import Tuned
from ml_engineer_track.models import load_model, load_tokenizer, prompt_text, stop_token_ids
from ml_engineer_track.progress import watched
from ml_engineer_track.quantize import SERVED_ONLY, Variants
from ml_engineer_track.serving import inprocess, parity
from ml_engineer_track.serving.catalog import has_openvino
from shared import handoff
from shared.chat import PROMPT_VERSION
from shared.files import need_disk, sha256_text, sha256_tree, write_text
from shared.metrics import Estimate
from shared.settings import BASE_MODEL, ROOT, Settings

GOLDEN_PROMPTS_PER_SKILL = 2
GOLDEN_TOKENS = 48
#: A variant is recommended only while it keeps this share of the merged model's scores.
KEEP = 0.97


@dataclass(frozen=True)
class Published:
    version: str
    folder: str


def publish(
    settings: Settings,
    data: CuratedData,
    tuned: Tuned,
    variants: Variants,
    scores: dict[str, Scores],
    figures: dict[str, Any],
    assets: Sequence[Path] = (),
) -> Published:
    """Write `artifacts/models/<version>/` and move `current` to it. UserError, and nothing changed, when a check fails.

    `assets` are files that travel beside the variants, such as the ranker.
    """
    models = settings.artifacts / "models"
    need_disk(models, 2 * sum(variants.weight_bytes.values()))
    folders = {name: Path(folder) for name, folder in variants.folders.items()}
    tokenizer = load_tokenizer(variants.folders["bf16"])
    rows = golden_rows(data)
    described: dict[str, handoff.Variant] = {}
    for name, folder in watched(list(folders.items()), "publish: golden replies"):
        if name in SERVED_ONLY:
            described[name] = handoff.Variant(
                name=name, weight_bytes=variants.weight_bytes[name], quality=scores[name].figures if name in scores else {},
                performance={}, files={}, golden=golden_served(folder, tokenizer, rows),
            )  # fmt: skip
            continue
        model = load_model(str(folder))
        described[name] = handoff.Variant(
            name=name, weight_bytes=variants.weight_bytes[name], quality=scores[name].figures,
            performance=figures["models"][name], files={}, golden=golden(model, tokenizer, rows),
        )  # fmt: skip
        context, stops = model.config.max_position_embeddings, stop_token_ids(model, tokenizer)
    manifest = handoff.Manifest(
        model_id=f"{settings.preset}-{Path(settings.model_path).name if settings.model != 'bundled' else 'bundled'}",
        version=version_of(folders, data, scores, figures, assets),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=commit(),
        base_model=base_info(settings),
        data=handoff.DataInfo(version=data.version, counts=data.counts, datasets=data.datasets),
        training={**settings.finetune.model_dump(), "steps": tuned.steps, "validation_loss": tuned.best_validation_loss},
        seed=settings.seed,
        prompt_version=PROMPT_VERSION,
        chat_template_sha256=sha256_text(str(tokenizer.chat_template)),
        tokenizer_sha256=_tokenizer_hash(folders["bf16"]),
        context_window=context,
        stop_tokens=[tokenizer.convert_ids_to_tokens(i) for i in stops],
        stop_token_ids=stops,
        use=recommend(scores, figures, variants.weight_bytes),
        hardware=figures["hardware"],
        variants=described,
    )
    folder = handoff.publish(manifest, folders, models, lambda aside: write_text(aside / "MODEL_CARD.md", card(manifest)), assets)
    return Published(manifest.version, str(folder))


def add_variants(
    published: Path, folders: dict[str, Path], described: dict[str, handoff.Variant], training: dict[str, Any]
) -> Published:
    """A new version: all of a published one, these variants beside (or in place of) its own, `training` added to its training.

    Named by content, so adding the same again gives the same version. It becomes the current one.
    """
    old = handoff.verify(published)
    kept = {name: variant for name, variant in old.variants.items() if name not in folders}
    content = [
        {name: [f.sha256 for f in variant.files.values()] for name, variant in kept.items()},
        {name: sha256_tree([folder]) for name, folder in folders.items()},
        {name: variant.model_dump(mode="json", include={"quality", "performance"}) for name, variant in described.items()},
        {name: file.sha256 for name, file in old.assets.items()},
    ]
    manifest = old.model_copy(
        update={
            "version": f"m-{sha256_text(json.dumps(content, sort_keys=True))[:12]}",
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "training": {**old.training, **training},
            "variants": {**kept, **described},
            "assets": {},
        }
    )
    need_disk(published, 2 * sum(v.weight_bytes for v in manifest.variants.values()))
    copied = {name: published / name for name in kept} | folders
    assets = [published / name for name in old.assets]
    write_card = lambda aside: write_text(aside / "MODEL_CARD.md", card(manifest))  # noqa: E731
    return Published(manifest.version, str(handoff.publish(manifest, copied, published.parent, write_card, assets)))


def golden_rows(data: CuratedData) -> list[Row]:
    """The first rows of every skill of the validation split: real prompts that no training row repeats."""
    skills = ("answer", "decide", "clarify", "judge")
    return [row for skill in skills for row in data.rows("validation", skill)[:GOLDEN_PROMPTS_PER_SKILL]]


def golden(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[Row]) -> list[handoff.Golden]:
    """Greedy replies one prompt at a time: batching may change the last bit of a logit, and with it a token."""
    stops = stop_token_ids(model, tokenizer)
    found = []
    for row in rows:
        batch = tokenizer(prompt_text(tokenizer, row.messages), add_special_tokens=False, return_tensors="pt").to(model.device)
        output = model.generate(
            **batch, max_new_tokens=GOLDEN_TOKENS, do_sample=False, eos_token_id=stops, pad_token_id=tokenizer.pad_token_id
        )
        ids = output[0, batch["input_ids"].shape[1] :].tolist()
        reply = tokenizer.decode(ids, skip_special_tokens=True)
        found.append(handoff.Golden(messages=row.messages, max_tokens=GOLDEN_TOKENS, token_ids=ids, reply=reply))
    return found


def golden_served(folder: Path, tokenizer: PreTrainedTokenizerBase, rows: list[Row]) -> list[handoff.Golden]:
    """The same from the engine that serves the variant; none where it is not installed, and then none can be compared."""
    if not has_openvino():
        return []
    with inprocess.started(folder) as served:
        found = asyncio.run(parity.replies(served.engine, tokenizer, [row.messages for row in rows], GOLDEN_TOKENS))
    return [
        handoff.Golden(
            messages=row.messages, max_tokens=GOLDEN_TOKENS, token_ids=ids, reply=tokenizer.decode(ids, skip_special_tokens=True)
        )
        for row, ids in zip(rows, found, strict=True)
    ]


def recommend(scores: dict[str, Scores], figures: dict[str, Any], weight_bytes: dict[str, int]) -> dict[str, str]:
    """Which variant to use where: the fastest of those that keep their quality; `bf16` on a device nobody measured.

    Fastest is the one with the least time per token at batch 1. On a CPU the server's engine outruns transformers on every
    GGUF file, and the fewer bytes such a file has the more (`benchmarks/serving`), so there the smallest one comes first.
    """
    measured = "cuda" if figures["hardware"]["gpu_info"] else "cpu"
    good = [name for name in scores if name != "base" and keeps_quality(scores[name], scores["bf16"])]
    timed = [name for name in figures["models"] if name in good]
    fastest = min(timed, key=lambda name: next(iter(figures["models"][name]["batch"].values()))["tpot"]["p50"])
    use = {"cpu": "bf16", "cuda": "bf16", measured: fastest}
    if served := [name for name in good if name in SERVED_ONLY]:
        use["cpu"] = min(served, key=lambda name: weight_bytes[name])
    return use


def keeps_quality(scores: Scores, reference: Scores) -> bool:
    """Evidence F1 and decision accuracy at least KEEP of the reference's, under the grammar, or short of it by one row at most.

    With the few rows of a small preset a single row would decide which engine serves the model.
    """

    def kept(mine: Estimate, its: Estimate) -> bool:
        return (mine.value or 0.0) >= KEEP * (its.value or 0.0) - 1 / max(mine.n, 1)

    return all(kept(scores.figures[k], reference.figures[k]) for k in ("grounded/evidence_f1", "grounded/decision_accuracy"))


def version_of(
    folders: dict[str, Path], data: CuratedData, scores: dict[str, Scores], figures: dict[str, Any], assets: Sequence[Path] = ()
) -> str:
    """Named by content: the same weights from the same data with the same figures are the same version."""
    quality = {name: {key: e.model_dump() for key, e in s.figures.items()} for name, s in scores.items()}
    weights = {name: sha256_tree([folder]) for name, folder in folders.items()}
    beside = {path.name: sha256_tree([path]) for path in assets}
    return f"m-{sha256_text(json.dumps([weights, data.version, quality, figures, beside], sort_keys=True))[:12]}"


def base_info(settings: Settings) -> handoff.BaseModelInfo:
    if settings.model == "bundled":
        edition = json.loads((BASE_MODEL / "edition.json").read_text(encoding="utf-8"))["edition"]
        licence = "Apache-2.0; licences of its training text: ml_engineer_track/base_model/MODEL_CARD.md"
        return handoff.BaseModelInfo(id="bundled", licence=licence, edition=edition)
    return handoff.BaseModelInfo(id=settings.model, licence="see the base model's own card")


def card(manifest: handoff.Manifest) -> str:
    """MODEL_CARD.md: what a reader must know before using the model."""
    keys = (
        "grounded/evidence_f1",
        "free/evidence_f1",
        "grounded/correct_refusal",
        "grounded/decision_accuracy",
        "judge/grounded_kappa",
    )
    head = "| variant | weights, MB | " + " | ".join(keys) + " |\n|---|---|" + "---|" * len(keys)
    lines = [
        f"| {v.name} | {v.weight_bytes / 1e6:.1f} | " + " | ".join(str(v.quality.get(k, _NONE)) for k in keys) + " |"
        for v in manifest.variants.values()
    ]
    samples = "\n".join(f"- {g.messages[0]['content'].splitlines()[-1]}\n  → {g.reply}" for g in manifest.variants["bf16"].golden)
    return f"""# Model card: {manifest.version}

A worked example, not a medical product: it quotes health leaflets written for a teaching repository. Education, never a
diagnosis; nobody should act on its replies.

- base model: {manifest.base_model.id} ({manifest.base_model.licence})
- data version: {manifest.data.version}; rows by split and skill: {json.dumps(manifest.data.counts)}
- training: {json.dumps(manifest.training)}; seed {manifest.seed}
- prompt contract: version {manifest.prompt_version}; context window {manifest.context_window} tokens
- recommended variant: {json.dumps(manifest.use)}
- measured on: {manifest.hardware["cpu_info"]}, {manifest.hardware["n_threads"]} threads, GPU: {manifest.hardware["gpu_info"]}

## Quality on the test split (value [95 % interval])

{head}
{chr(10).join(lines)}

## What it says (greedy, validation prompts, as they came)

{samples}

Made by `python -m ml_engineer_track publish` at commit {manifest.commit}.
"""


_NONE = Estimate(value=None, low=None, high=None, n=0)


def _tokenizer_hash(folder: Path) -> str:
    return sha256_tree(sorted(p for p in folder.iterdir() if p.name.startswith("tokenizer") or p.suffix == ".jinja"))


def commit() -> str | None:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
