"""What to serve: folders on disk to loaded engines. A published version, or any model folder.

artifacts/models/<version>/            variants by name; the manifest says which one fits this machine, and what it must answer
any folder with config.json            served as it is; for the CPU engine a GGUF file is written beside the artifacts first
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from ml_engineer_track.gguf_export import FILE_NAME, KINDS, write_gguf
from ml_engineer_track.kernels.device import need_triton
from ml_engineer_track.models import check_model_path, load_model, load_tokenizer
from ml_engineer_track.serving.adapters import Adapter
from ml_engineer_track.serving.completions import Served
from ml_engineer_track.serving.engine import Engine
from ml_engineer_track.serving.engine_process import EngineProcess
from shared import handoff
from shared.chat import PROMPT_VERSION
from shared.errors import UserError
from shared.files import sha256_tree
from shared.handoff import Golden
from shared.hardware import device

EngineName = Literal["auto", "openvino", "transformers"]


@dataclass(frozen=True)
class Limits:
    """What one engine may take: cache in MiB, requests in a batch, requests in the queue."""

    cache_mb: int = 512
    max_running: int = 64  # 128 looked slower than 32 on two busy cores; to be measured on quiet ones
    max_waiting: int = 512


@dataclass(frozen=True)
class Entry:
    """A model to serve. `aliases` are other names for it; without golden replies there is nothing to compare with.

    With `adapter`, it is that LoRA adapter on top of the model in `folder`, which is served as `parent`. With `draft`, a smaller
    model proposes its tokens (serving/speculative.py). `packed`: its linear layers are packed to 4 bits when it is loaded.
    """

    name: str
    aliases: tuple[str, ...]
    folder: Path
    engine: Literal["openvino", "transformers"]
    golden: tuple[Golden, ...] = ()
    adapter: Path | None = None
    parent: str | None = None
    draft: Path | None = None
    packed: bool = False


def with_adapters(base: Path, adapters: Sequence[Adapter], artifacts: Path) -> list[Entry]:
    """The base model and, under their names, the adapters on top of it."""
    (below,) = entries(base, [], "transformers", artifacts)
    return [below, *(replace(below, name=a.name, aliases=(), adapter=a.folder, parent=below.name) for a in adapters)]


def with_kernel(model: Path | None, variants: Sequence[str], engine: EngineName, artifacts: Path) -> list[Entry]:
    """Full-precision variants (bf16 unless named), to be multiplied by our own 4-bit kernel (kernels/linear.py).

    They get a name of their own, and golden replies they have none: those of bf16 were given by other weights.
    """
    if engine == "openvino":
        raise UserError("--kernel works with the transformers engine, not with openvino", "--engine", "Leave one of them out")
    need_triton("--kernel triton")
    folder = model or handoff.current(artifacts / "models")
    full = variants or (["bf16"] if (folder / "manifest.json").exists() else [])
    found = entries(folder, full, "transformers", artifacts)
    return [
        replace(e, name=f"{e.name}-packed4", aliases=tuple(f"{a}-packed4" for a in e.aliases), golden=(), packed=True)
        for e in found
    ]


def entries(model: Path | None, variants: Sequence[str], engine: EngineName, artifacts: Path) -> list[Entry]:
    """What to serve for these options. UserError when there is no such model or variant, or no engine for it."""
    folder = model or handoff.current(artifacts / "models")
    if not folder.is_dir():
        raise UserError("no such folder", str(folder), "--model takes a published version or a model folder")
    if (folder / "manifest.json").exists():
        return _published(folder, variants, engine)
    check = folder / FILE_NAME
    if not check.exists():
        check_model_path(str(folder.resolve()))
    return [_plain(folder, kind, engine, artifacts) for kind in variants or [""]]


def _published(folder: Path, variants: Sequence[str], engine: EngineName) -> list[Entry]:
    manifest = handoff.verify(folder)
    if manifest.prompt_version != PROMPT_VERSION:
        raise UserError(
            f"the model was trained on prompt version {manifest.prompt_version}, this code speaks {PROMPT_VERSION}",
            str(folder), "Publish it again with this code",
        )  # fmt: skip
    named = list(dict.fromkeys(variants)) or [_default(manifest, folder, engine)]
    found = []
    for name in named:
        if name not in manifest.variants:
            raise UserError(f"no variant {name!r}", str(folder), f"There is: {', '.join(manifest.variants)}")
        chosen = choose_engine(folder / name, engine)
        found.append(Entry(f"{manifest.model_id}:{name}", (name,), folder / name, chosen, tuple(manifest.variants[name].golden)))
    return found


def _default(manifest: handoff.Manifest, folder: Path, engine: EngineName) -> str:
    """The variant the manifest names for this device; where its engine is missing or unwanted, one the other can serve."""
    wanted = manifest.use["cuda" if device().type == "cuda" else "cpu"]
    gguf = {name: (folder / name / FILE_NAME).exists() for name in manifest.variants}
    served = engine if engine != "auto" else "openvino" if has_openvino() else "transformers"
    if gguf[wanted] and served == "transformers":
        return next((name for name in ("bf16", *gguf) if name in gguf and not gguf[name]), wanted)
    if not gguf[wanted] and engine == "openvino":
        return next((name for name in ("q8_0", *gguf) if gguf.get(name)), wanted)
    return wanted


def _plain(folder: Path, kind: str, engine: EngineName, artifacts: Path) -> Entry:
    """A model nobody published: as GGUF where the CPU engine serves it, else as it is. A variant names the GGUF kind."""
    name = folder.resolve().name
    if kind and kind not in KINDS:
        raise UserError(f"no variant {kind!r}", str(folder), f"A model folder is served as one of: {', '.join(KINDS)}")
    if kind and engine == "transformers":
        raise UserError(f"engine transformers cannot serve variant {kind!r}", str(folder), "Leave out --variant or --engine")
    if (folder / FILE_NAME).exists():
        return Entry(name, (), folder, choose_engine(folder, engine))
    if engine == "transformers" or (engine == "auto" and not kind and (device().type == "cuda" or not has_openvino())):
        return Entry(name, (), folder, "transformers")
    kind = kind or "q8_0"
    written = artifacts / "serving" / f"{name}-{sha256_tree([folder])[:12]}-{kind}"
    if not (written / FILE_NAME).exists():
        model, tokenizer = load_model(str(folder)), load_tokenizer(str(folder))
        save_beside(folder, written, tokenizer)
        write_gguf(model, tokenizer, written / FILE_NAME, kind)
    return Entry(f"{name}:{kind}", (kind, name), written, choose_engine(written, engine))


def save_beside(source: Path, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Config, generation settings and tokenizer of a model, which a GGUF file needs beside it here."""
    folder.mkdir(parents=True, exist_ok=True)
    AutoConfig.from_pretrained(source).save_pretrained(folder)
    if (source / "generation_config.json").exists():
        GenerationConfig.from_pretrained(source).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def choose_engine(folder: Path, wanted: EngineName) -> Literal["openvino", "transformers"]:
    """The engine for a folder. UserError when the wanted one cannot read it or is not installed."""
    needed: Literal["openvino", "transformers"] = "openvino" if (folder / FILE_NAME).exists() else "transformers"
    if wanted not in ("auto", needed):
        raise UserError(f"engine {wanted} cannot serve this variant", str(folder), f"Use --engine {needed} or another --variant")
    if needed == "openvino" and not has_openvino():
        raise UserError("openvino-genai is not installed", "this environment", "pip install openvino-genai, or --variant bf16")
    return needed


def has_openvino() -> bool:
    return importlib.util.find_spec("openvino_genai") is not None


def build(entry: Entry, limits: Limits, own_process: bool = False) -> Served:
    """The model with its tokenizer and its engine, not yet started.

    With `own_process` the CPU engine runs in one (engine_process.py); the other releases the interpreter while it computes.
    """
    tokenizer = load_tokenizer(str(entry.folder))
    stops = stop_ids(entry.folder, tokenizer)
    engine: Engine
    if entry.engine == "openvino":
        from ml_engineer_track.serving.openvino_engine import OpenVinoEngine

        make = partial(
            OpenVinoEngine, entry.folder / FILE_NAME, tokenizer, stops, limits.cache_mb, limits.max_running, limits.max_waiting,
            entry.draft,
        )  # fmt: skip
        engine = EngineProcess(make) if own_process else make()
    else:
        from ml_engineer_track.serving.transformers_engine import TransformersEngine

        adapter = str(entry.adapter) if entry.adapter else None
        engine = TransformersEngine(
            str(entry.folder), tokenizer, stops, limits.cache_mb, limits.max_running, limits.max_waiting, adapter,
            entry.packed,
        )  # fmt: skip
    return Served(entry.name, engine, tokenizer, context_window(entry.folder), entry.parent)


def stop_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a reply: the model's own list and the tokenizer's end token."""
    path = folder / "generation_config.json"
    own = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.exists() else None
    ids = own if isinstance(own, list) else [own]
    return sorted({i for i in (*ids, tokenizer.eos_token_id) if i is not None})


def context_window(folder: Path) -> int:
    return int(AutoConfig.from_pretrained(folder).get_text_config().max_position_embeddings)
