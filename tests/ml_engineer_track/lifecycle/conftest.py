"""Published versions of a few bytes, labels, and a loop whose training takes no time: what is tested is who is served."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared import handoff
from shared.handoff import BaseModelInfo, DataInfo, Lineage, Manifest, Variant
from shared.labels import Label
from shared.settings import Settings, load_settings


def a_manifest(version: str, lineage: Lineage | None = None, variants: tuple[str, ...] = ("bf16", "q8_0")) -> Manifest:
    return Manifest(
        model_id="loop", version=version, created=f"2026-11-23T00:00:{len(version):02d}+00:00", commit=None,
        base_model=BaseModelInfo(id="bundled", licence="Apache-2.0"), data=DataInfo(version="d-1", counts={}), training={},
        seed=7, prompt_version=1, chat_template_sha256="a", tokenizer_sha256="b", context_window=64, stop_tokens=["<|end|>"],
        stop_token_ids=[1], use={"cpu": "q8_0", "cuda": "bf16"}, lineage=lineage,
        hardware={"cpu_info": "a CPU", "n_threads": 2, "gpu_info": None},
        variants={
            name: Variant(name=name, weight_bytes=9, quality={}, performance={}, files={}, golden=[]) for name in variants
        },
    )  # fmt: skip


def published(models: Path, version: str, make_current: bool = True, **changes: Any) -> Path:
    """A version whose files are a few bytes."""
    manifest = a_manifest(version, **changes)
    folders = {}
    for name in manifest.variants:
        folders[name] = models.parent / "work" / version / name
        folders[name].mkdir(parents=True, exist_ok=True)
        (folders[name] / "model.safetensors").write_bytes(f"{version} {name}".encode())
    return handoff.publish(manifest, folders, models, lambda aside: None, make_current=make_current)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "artifacts" / "models"


@pytest.fixture
def publish_version(models: Path) -> Callable[..., Path]:
    return lambda version, **changes: published(models, version, **changes)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings("loop", artifacts=tmp_path / "artifacts")


@pytest.fixture
def a_label() -> Callable[..., Label]:
    """A label on a training leaflet; parts are changed by name."""

    def make(number: int = 0, **changes: Any) -> Label:
        given: dict[str, Any] = {
            "answer_id": f"a-{number}", "question": f"How long do I cool a sprained ankle, number {number}?",
            "passages": ["ankle-sprain/self-care"], "action": "answer", "answer_sentences": ["ankle-sprain/self-care/2"],
            "reviewers": ["ann", "bob"], "agreed": True, "model_version": "m-old:q8_0",
        }  # fmt: skip
        return Label(**{**given, **changes})

    return make
