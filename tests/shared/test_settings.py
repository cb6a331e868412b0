"""Presets, and the handful of words that override them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shared import settings
from shared.errors import UserError
from shared.settings import OVERRIDES, Settings, load_settings, preset_names


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("PRESET", *OVERRIDES):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def own_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a preset `own`, a copy of `tiny` in another folder, to be edited."""
    path = tmp_path / "own.yaml"
    path.write_bytes((settings.PRESETS / "tiny.yaml").read_bytes())
    monkeypatch.setattr(settings, "PRESETS", tmp_path)
    return path


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def refusal(preset: str | None = None, **overrides: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_settings(preset, **overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- presets ---------------------------------------------------------------------------------------------------------


def test_smoke_and_tiny_are_presets() -> None:
    assert {"smoke", "tiny"} <= set(preset_names())


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads(name: str) -> None:
    loaded = load_settings(name)
    assert loaded.preset == name
    assert loaded.curate.max_sources > 0


def test_tiny_is_the_default() -> None:
    assert load_settings() == load_settings("tiny")


def test_the_preset_comes_from_the_argument_then_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRESET", "smoke")
    assert load_settings().preset == "smoke"
    assert load_settings("tiny").preset == "tiny"


@pytest.mark.parametrize("name", ["huge", "../presets/tiny", "TINY"])
def test_an_unknown_preset_is_named_with_the_presets_there_are(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("PRESET", name)
    message = refusal()
    assert repr(name) in message
    assert all(known in message for known in preset_names())


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("rank:", "rnak:", "finetune.rank: Field required"),
        ("seed:", "sede: 8\nseed:", "sede: Extra inputs are not permitted"),
        ("rank: ", "rank: -", "finetune.rank: Input should be greater than 0"),
        ("max_sources: ", "max_sources: 100", "curate.max_sources: Input should be less than or equal to 60"),
        ("[nf4, int8, q8_0, q4_0]", "[nf4, fp4]", "quantize.variants.1: Input should be 'nf4', 'int8', 'q8_0' or 'q4_0'"),
        ("quantize:", "quantise:", "quantize: Field required"),
    ],
)
def test_a_wrong_value_in_a_preset_is_named_with_its_place(own_preset: Path, old: str, new: str, told: str) -> None:
    edit(own_preset, old, new)
    message = refusal("own")
    assert told in message
    assert "own.yaml" in message


@pytest.mark.parametrize("content", [b"seed: 7: 8\n", b"", b"- seed\n", b"model: b\xfcndel\n"])
def test_a_preset_that_is_no_yaml_with_names_is_refused_in_one_line(own_preset: Path, content: bytes) -> None:
    own_preset.write_bytes(content)
    assert "own" in refusal("own")


@pytest.mark.parametrize("value", ["2026-13-45", "0x_", '"\\UFFFFFFFF"', "[" * 3000])
def test_a_value_yaml_cannot_convert_is_refused_in_one_line(own_preset: Path, value: str) -> None:
    edit(own_preset, "seed: 7", f"seed: {value}")
    assert "own" in refusal("own")


@pytest.mark.parametrize("content", ["finetune:\n", "finetune: lora\n"])
def test_a_section_that_has_no_names_is_refused_although_one_of_its_values_is_given(own_preset: Path, content: str) -> None:
    own_preset.write_text(content, encoding="utf-8")
    assert "own" in refusal("own", method="lora")


# --- overrides -------------------------------------------------------------------------------------------------------

GIVEN = {
    "MODEL": "org/model",
    "METHOD": "qlora",
    "SEED": "11",
    "DATASETS": "/some/data",
    "ARTIFACTS": "/some/results",
    "VRAM_GB": "8.0",
    "ENGINE": "torchrun",
    "WORKERS": "4",
    "STRATEGY": "fsdp",
}


def overridden(loaded: Settings) -> dict[str, str]:
    values = (loaded.model, loaded.finetune.method, loaded.seed, loaded.datasets, loaded.artifacts, loaded.vram_gb)
    trained_by = (loaded.engine, loaded.workers, loaded.strategy)
    return dict(zip(GIVEN, map(str, (*values, *trained_by)), strict=True))


@pytest.mark.parametrize("variable", OVERRIDES)
def test_a_variable_replaces_its_value_and_no_other(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    before = overridden(load_settings("tiny"))
    assert before[variable] != GIVEN[variable]
    monkeypatch.setenv(variable, GIVEN[variable])
    assert overridden(load_settings("tiny")) == {**before, variable: GIVEN[variable]}


@pytest.mark.parametrize("variable", OVERRIDES)
def test_an_argument_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "not this")
    assert overridden(load_settings("tiny", **{variable.lower(): GIVEN[variable]}))[variable] == GIVEN[variable]


def test_an_argument_of_none_and_an_empty_variable_mean_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    before = load_settings("tiny")
    for variable in ("PRESET", *OVERRIDES):
        monkeypatch.setenv(variable, "")
    assert load_settings(None, **{variable.lower(): None for variable in OVERRIDES}) == before


@pytest.mark.parametrize("name", ["sede", "SEED", "rank"])
def test_an_argument_that_names_no_setting_is_a_mistake_of_the_caller(name: str) -> None:
    with pytest.raises(TypeError, match=f"no such setting: {name}"):
        load_settings("tiny", **{name: 8})


def test_a_seed_of_zero_is_given() -> None:
    assert load_settings("tiny", seed=0).seed == 0


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("SEED", "seven", "seed: Input should be a valid integer"),
        ("VRAM_GB", "0", "vram_gb: Input should be greater than 0"),
        ("METHOD", "dora", "finetune.method: Input should be 'lora' or 'qlora'"),
    ],
)
def test_a_variable_with_a_wrong_value_is_one_line(monkeypatch: pytest.MonkeyPatch, variable: str, value: str, told: str) -> None:
    monkeypatch.setenv(variable, value)
    message = refusal("tiny")
    assert told in message
    assert "preset tiny" in message


# --- what follows from the settings ----------------------------------------------------------------------------------


def test_bundled_means_the_model_in_this_repository_and_other_names_are_kept() -> None:
    assert load_settings("tiny").model_path == str(settings.BASE_MODEL)
    assert load_settings("tiny", model="org/model").model_path == "org/model"


@pytest.mark.parametrize("model", ["bundled", "org/model", "/models/mine", "../mine", "C:\\models\\mine", "a b;c"])
def test_the_work_folder_is_one_plain_folder_for_each_preset_and_model(tmp_path: Path, model: str) -> None:
    work = load_settings("tiny", model=model, artifacts=tmp_path).work
    assert work.parent == tmp_path / "runs"
    assert work.name.startswith("tiny-")
    assert not set(work.name) & set("/\\ ;:")
    assert work != load_settings("smoke", model=model, artifacts=tmp_path).work


def test_settings_cannot_be_changed_once_loaded() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_settings("tiny").seed = 8  # type: ignore[misc]
