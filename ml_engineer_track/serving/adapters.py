"""LoRA adapters by name: a base model and what was tuned on top of it, side by side behind one address.

    python -m ml_engineer_track serve --model ml_engineer_track/base_model --adapter tuned=artifacts/runs/<run>/finetune/best

Why an ML engineer wants this before publishing: an adapter is a small file, so several can be asked the same questions while
none of them is merged, quantised or handed over yet. The transformers engine merges each into a copy of the base as it loads:
simple and exact, at the price of one model's memory each. vLLM keeps one base and adds the adapters per request. The openvino
engine reads GGUF files, which hold merged weights.

A published version holds merged weights too, and an adapter on top of those would be applied twice: `--model` is the base.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ml_engineer_track.models import check_model_path
from shared.errors import UserError


@dataclass(frozen=True)
class Adapter:
    """`base` is the model it was tuned on, as PEFT wrote it down: a folder or a hub id. `rank` is the largest of its layers."""

    name: str
    folder: Path
    base: str
    rank: int


def read(given: Sequence[str]) -> list[Adapter]:
    """Adapters written as NAME=FOLDER. UserError for other texts, folders without an adapter, and a name given twice."""
    found: dict[str, Adapter] = {}
    for text in given:
        name, _, folder = text.partition("=")
        if not name or not folder:
            raise UserError(f"{text!r} is not NAME=FOLDER", "--adapter", "For instance --adapter tuned=path/to/adapter")
        if name in found:
            raise UserError(f"two adapters are called {name!r}", "--adapter", "Give each a name of its own")
        found[name] = _read(name, Path(folder))
    return list(found.values())


def _read(name: str, folder: Path) -> Adapter:
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        if config["peft_type"] != "LORA":
            raise UserError(f"an adapter of type {config['peft_type']!r}", str(folder), "Only LoRA adapters are served")
        base, rank = str(config["base_model_name_or_path"]), max(config["r"], *(config.get("rank_pattern") or {}).values(), 0)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            "no adapter here (adapter_config.json is missing)", str(folder), "--adapter takes a PEFT folder"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError):
        raise UserError("adapter_config.json is damaged", str(folder), "Train or fetch the adapter again") from None
    if not (folder / "adapter_model.safetensors").exists():
        raise UserError("no weights here (adapter_model.safetensors is missing)", str(folder), "Only safetensors are read")
    return Adapter(name, folder, base, rank)


def base_of(adapters: Sequence[Adapter], model: Path | None, variants: Sequence[str], engine: str) -> Path:
    """The folder of the base model they are served with. UserError when they do not belong to it or cannot be served so."""
    first = adapters[0]
    if engine == "openvino" or variants:
        what = "the openvino engine serves no adapters" if engine == "openvino" else "adapters come without --variant"
        raise UserError(what, "--adapter", "Use --engine transformers or vllm, with the base model as --model")
    if model is None or (model / "manifest.json").exists():
        what = "a published version holds merged weights, an adapter needs its base model"
        raise UserError(what, str(model or "the current version"), f"Use --model {first.base}")
    check_model_path(str(model.resolve()))
    for adapter in adapters:
        if not _same_model(adapter.base, model.resolve()):
            what = f"adapter {adapter.name!r} was tuned on {adapter.base}, not on this model"
            raise UserError(what, str(model), f"Use --model {adapter.base}")
        if adapter.name == model.resolve().name:
            raise UserError(f"{adapter.name!r} is the name of the base model", "--adapter", "Give the adapter another name")
    return model


def _same_model(recorded: str, folder: Path) -> bool:
    """Is `folder` the recorded model? Where the record is a hub id, or a folder of another machine, its name must be the same."""
    if Path(recorded).is_dir():
        return Path(recorded).resolve() == folder
    return Path(recorded).name == folder.name or f"models--{recorded.replace('/', '--')}" in folder.parts
