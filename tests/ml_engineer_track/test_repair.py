"""A repair brings a model of few bits closer to what it was, and touches nothing but its adapter."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ml_engineer_track import finetune as ft
from ml_engineer_track import low_bits as lb
from ml_engineer_track import repair as rp
from ml_engineer_track.curate import CuratedData, curate
from ml_engineer_track.models import load_model, load_tokenizer, weight_bytes
from shared.errors import UserError
from shared.settings import Settings
from tests.ml_engineer_track.conftest import RANKER

MakeSettings = Callable[..., Settings]


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ft, "compute_dtype", lambda target: torch.float32)
    monkeypatch.setattr("ml_engineer_track.models.compute_dtype", lambda target: torch.float32)


@pytest.fixture
def settings(make_settings: MakeSettings) -> Settings:
    options = {"repair_steps": 30, "repair_rank": 8, "repair_learning_rate": 5e-3, "divergence_rows": 8}
    return make_settings(low_bits=options, finetune={"batch_tokens": 1024, "batch_rows": 4, "epochs": 15.0})


@pytest.fixture
def data(settings: Settings) -> CuratedData:
    return curate(settings, RANKER)


@pytest.fixture
def packed(settings: Settings, tmp_path: Path) -> str:
    model = load_model(settings.model, torch.bfloat16)
    lb.save_low_bits(lb.pack_model(model, lb.uniform(model, 2, 64)), load_tokenizer(settings.model), tmp_path / "packed")
    return str(tmp_path / "packed")


def test_a_repair_lowers_the_loss_and_leaves_the_packed_weights_alone(
    settings: Settings, data: CuratedData, packed: str, tmp_path: Path
) -> None:
    done = rp.repair(settings, data, settings.model, packed, tmp_path / "repaired")
    assert done.steps == len(done.loss) == 30
    assert sum(done.loss[-5:]) < 0.8 * sum(done.loss[:5])
    assert done.validation_after < 0.95 * done.validation_before
    before, after = (load_model(path, torch.bfloat16) for path in (packed, done.folder))
    frozen = dict(before.state_dict())
    assert all(torch.equal(value, frozen[name]) for name, value in after.state_dict().items() if name in frozen)
    assert weight_bytes(after) - weight_bytes(before) == done.adapter_bytes > 0
    assert {path.name for path in tmp_path.iterdir()} >= {"packed", "repaired"}
    assert not (tmp_path / "repaired.part").exists()


def test_a_repair_is_the_same_each_time(settings: Settings, data: CuratedData, packed: str, tmp_path: Path) -> None:
    short = settings.model_copy(update={"low_bits": settings.low_bits.model_copy(update={"repair_steps": 3})})
    first, second = (rp.repair(short, data, settings.model, packed, tmp_path / name) for name in ("a", "b"))
    assert first.loss == second.loss
    assert first.validation_after == second.validation_after


def test_a_diverged_repair_is_an_error_for_the_user_and_leaves_nothing(
    settings: Settings, data: CuratedData, packed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rp, "one_step", lambda *_: math.nan)
    with pytest.raises(UserError, match=r"the repair diverged .* Lower low_bits.repair_learning_rate"):
        rp.repair(settings, data, settings.model, packed, tmp_path / "repaired")
    assert not (tmp_path / "repaired").exists()


def test_too_little_memory_is_an_error_for_the_user(
    settings: Settings, data: CuratedData, packed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(rp, "divergences", full)
    with pytest.raises(UserError, match=r"not enough memory for one batch .* Lower finetune.batch_tokens"):
        rp.repair(settings, data, settings.model, packed, tmp_path / "repaired")
