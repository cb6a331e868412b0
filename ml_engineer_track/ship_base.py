"""Turns a training run into the base model the repository carries: bf16 shards, tokenizer, and the facts for its card.

Why this is a step of its own: the run keeps float32 weights and optimiser state; what people clone must be small, load with
plain `AutoModelForCausalLM`, and say how it came about.

    python -m ml_engineer_track pretrain --corpus FOLDER      (its last step)
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from ml_engineer_track.pretrain import EDITIONS, new_model
from shared.files import write_json
from shared.hardware import fingerprint


def ship(work: Path, destination: Path) -> Path:
    """The last checkpoint as the repository carries it: bf16 safetensors in shards of at most 15 MiB, with tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    edition = EDITIONS[json.loads((work / "edition.json").read_text(encoding="utf-8"))["name"]]
    model = new_model(replace(edition, embedding_init="normal"), tokenizer)
    model.load_state_dict(load_file(work / "checkpoint" / "model.safetensors"), strict=False)
    aside = destination.with_name(destination.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(aside, max_shard_size="15MB")
    tokenizer.save_pretrained(aside)
    _plain_tokenizer_config(aside / "tokenizer_config.json")
    write_json(aside / "edition.json", training_facts(work))
    for kept in ("card_notes.md", "figures.json"):
        if (destination / kept).exists():
            shutil.copy(destination / kept, aside / kept)
    shutil.rmtree(destination, ignore_errors=True)
    aside.rename(destination)
    return destination


def training_facts(work: Path) -> dict[str, Any]:
    """What the card says about the run: size, tokens, wall time, speed, the curriculum. Read from settings and log."""
    edition = json.loads((work / "edition.json").read_text(encoding="utf-8"))
    log = {row["step"]: row for row in map(json.loads, (work / "log.jsonl").read_text(encoding="utf-8").splitlines())}
    tokens = sum(stage["steps"] * stage["length"] * stage["batch"] for stage in edition["stages"])
    every = min(log)
    at = EDITIONS[edition["name"]]
    seconds = sum(
        every * at.stage_at(s - 1).length * at.stage_at(s - 1).batch / row["tokens_per_second"] for s, row in log.items()
    )
    mfu = sorted(row["mfu"] for row in log.values())
    shape = {k: edition[k] for k in ("vocab", "hidden", "layers", "heads", "kv_heads", "intermediate", "context")}
    return {
        "edition": edition["name"],
        "shape": shape,
        "tokens seen": tokens,
        "wall time, minutes": round(seconds / 60, 1),
        "MFU (median, of the matrix-product peak measured on the device)": mfu[len(mfu) // 2],
        "device": fingerprint()["gpu_info"] or fingerprint()["cpu_info"],
        "curriculum": "; ".join(f"{s['name']}: {s['steps']} steps of {s['batch']} x {s['length']}" for s in edition["stages"]),
        "optimiser": f"Muon at {edition['muon_lr']}, AdamW at {edition['adam_lr']} for the rest, warm-up-stable-decay",
        "seed": edition["seed"],
    }


def _plain_tokenizer_config(path: Path) -> None:
    """The class name every release of transformers knows, and nothing about the machine it was written on."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(path, {k: v for k, v in config.items() if k not in ("is_local", "local_files_only", "backend")})
