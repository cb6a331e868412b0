"""Every shipped preset loads; the environment and arguments replace single values; mistakes are one line."""

import pytest

from ai_engineer_track.settings import OVERRIDES, PRESETS, load_ai_settings
from shared.errors import UserError


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    for name in (*OVERRIDES, "PRESET"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("path", sorted(PRESETS.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_presets_load_and_comment_every_value(path):
    settings = load_ai_settings(path.stem)
    assert settings.preset == path.stem
    assert settings.corpus_path == settings.datasets / "health_library"
    commented = [line for line in path.read_text().splitlines() if ":" in line and "#" in line]
    assert len(commented) > 20


def test_a_preset_only_the_other_track_has_uses_tiny():
    assert load_ai_settings("qwen3-0.6b").retrieve == load_ai_settings("tiny").retrieve


def test_environment_then_arguments(monkeypatch):
    monkeypatch.setenv("LLM_BASE_URL", "http://one/v1")
    monkeypatch.setenv("PORT", "9001")
    assert load_ai_settings().llm.base_url == "http://one/v1"
    settings = load_ai_settings(llm_base_url="http://two/v1", llm_api_key="s3cret")
    assert settings.llm.base_url == "http://two/v1"
    assert settings.api.port == 9001
    assert "s3cret" not in repr(settings)


def test_the_judge_is_the_assistant_unless_set(monkeypatch):
    assert load_ai_settings().judge is None
    assert load_ai_settings().judge_llm == load_ai_settings().llm
    settings = load_ai_settings(llm_base_url="http://one/v1", judge_model="big")
    assert settings.judge_llm.model == "big"
    assert settings.judge_llm.base_url == "http://one/v1"
    assert settings.llm.model is None


@pytest.mark.parametrize("wrong", [{"port": "many"}, {"llm_base_url": "127.0.0.1:8001"}, {"port": 70000}])
def test_a_wrong_value_is_one_line(wrong):
    with pytest.raises(UserError) as error:
        load_ai_settings(**wrong)
    assert "\n" not in str(error.value)
    assert next(iter(wrong)).split("_")[-1] in str(error.value)
