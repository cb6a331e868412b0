"""A model with random weights and the bundled tokenizer, small data, and settings that make a stage take a second."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ml_engineer_track.curate import CuratedData, curate
from ml_engineer_track.models import load_model, load_tokenizer
from shared.library import ROW_FILES
from shared.settings import BASE_MODEL, OVERRIDES, ROOT, Settings, load_settings

#: every how many-th row of a real file goes into the small copy
THINNING = {"questions.jsonl": 40, "cases.jsonl": 12, "emergencies.jsonl": 12, "harmful.jsonl": 4, "judge_labels.jsonl": 10}


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell that is set up for a run must not change what is tested; and nothing here needs a hub."""
    for variable in (*OVERRIDES, "PRESET"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def micro_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama of two layers with random weights: every code path, none of the waiting."""
    folder = tmp_path_factory.mktemp("models") / "micro"
    tokenizer = load_tokenizer(str(BASE_MODEL))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True, initializer_range=0.2,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def micro(micro_path: str) -> PreTrainedModel:
    """A fresh float32 copy for a test to use up."""
    return load_model(micro_path, torch.float32)


@pytest.fixture(scope="session")
def tokenizer(micro_path: str) -> PreTrainedTokenizerBase:
    return load_tokenizer(micro_path)


@pytest.fixture(scope="session")
def small_datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All real leaflets and a thin sample of the real rows, every split included."""
    folder = tmp_path_factory.mktemp("small") / "datasets"
    shutil.copytree(ROOT / "datasets" / "health_library", folder / "health_library")
    for file in ROW_FILES:
        by_split: dict[str, list[str]] = {}
        for line in (ROOT / "datasets" / file).read_text(encoding="utf-8").splitlines():
            by_split.setdefault(json.loads(line)["split"], []).append(line)
        kept = [line for lines in by_split.values() for line in lines[:: THINNING[file]]]
        (folder / file).write_text("\n".join(kept) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def small_settings(micro_path: str, small_datasets: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """The smoke preset on the micro model and the small data, with artifacts of its own."""
    artifacts = tmp_path_factory.mktemp("artifacts")
    made = load_settings("smoke", model=micro_path, artifacts=artifacts, datasets=small_datasets)
    return made.model_copy(update={"curate": made.curate.model_copy(update={"max_rows": None, "max_prompt_tokens": 500})})


@pytest.fixture(scope="session")
def small_data(small_settings: Settings) -> CuratedData:
    return curate(small_settings)


@pytest.fixture
def make_settings(micro_path: str, mini_datasets: Path, tmp_path: Path) -> Callable[..., Settings]:
    """Settings on the micro model and the mini data; parts are changed by name: make_settings(finetune={"epochs": 2})."""

    def make(**changes: Any) -> Settings:
        given = {"model": micro_path, "artifacts": tmp_path / "artifacts", "datasets": mini_datasets}
        given |= {k: changes.pop(k) for k in list(changes) if k in ("model", "artifacts", "datasets", "seed", "method")}
        made = load_settings("smoke", **given)
        return made.model_copy(update={name: getattr(made, name).model_copy(update=part) for name, part in changes.items()})

    return make
