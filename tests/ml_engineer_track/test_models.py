"""A model path that holds no usable model is refused in one line that says what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ml_engineer_track import models as m
from shared.errors import UserError


@pytest.fixture
def copy(micro_path: str, tmp_path: Path) -> Path:
    """A model folder to damage."""
    return Path(shutil.copytree(micro_path, tmp_path / "model"))


def refusal(check: Callable[[], Any], folder: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        check()
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


def load(folder: Path) -> PreTrainedModel:
    return m.load_model(str(folder))


# --- what is loaded --------------------------------------------------------------------------------------------------


def test_a_model_is_loaded_in_eval_mode_and_in_the_dtype_asked_for(micro_path: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = m.load_model(micro_path, dtype)
        assert not model.training
        assert model.dtype == dtype


@pytest.mark.parametrize("variant", ["nf4", "int8"])
def test_a_model_can_be_quantised_while_it_loads(micro_path: str, variant: str) -> None:
    model = m.load_model(micro_path, variant=variant)
    kind = type(model.model.layers[0].self_attn.q_proj).__name__
    assert kind == {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[variant]
    assert not model.training


def test_the_tokenizer_pads_on_the_left_and_always_has_a_padding_token(copy: Path) -> None:
    config = json.loads((copy / "tokenizer_config.json").read_text(encoding="utf-8"))
    del config["pad_token"]
    (copy / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer = m.load_tokenizer(str(copy))
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_a_prompt_ends_where_the_reply_begins(tokenizer: PreTrainedTokenizerBase) -> None:
    assert m.prompt_text(tokenizer, [{"role": "user", "content": "Hi"}]) == "<|user|>Hi<|end|><|assistant|>"


def test_a_model_that_thinks_aloud_is_told_not_to(copy: Path) -> None:
    tokenizer = m.load_tokenizer(str(copy))
    tokenizer.chat_template = "{{ messages[0]['content'] }}{% if enable_thinking is false %}<no-thinking>{% endif %}"
    assert m.prompt_text(tokenizer, [{"role": "user", "content": "Hi"}]) == "Hi<no-thinking>"


def test_every_token_that_ends_a_reply_is_a_stop_token(micro: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    end = tokenizer.eos_token_id
    assert m.stop_token_ids(micro, tokenizer) == [end]
    micro.generation_config.eos_token_id = [9, end, 4]
    assert m.stop_token_ids(micro, tokenizer) == sorted([4, 9, end])
    micro.generation_config.eos_token_id = None
    assert m.stop_token_ids(micro, tokenizer) == [end]


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_folder_without_a_config_is_refused(copy: Path) -> None:
    (copy / "config.json").unlink()
    assert "config.json is missing" in refusal(lambda: m.check_model_path(str(copy)), copy)
    refusal(lambda: load(copy), copy)


def test_a_folder_without_weights_is_refused(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    assert "no weights here" in refusal(lambda: m.check_model_path(str(copy)), copy)
    refusal(lambda: load(copy), copy)


def test_pickled_weights_are_not_read(copy: Path, micro: PreTrainedModel) -> None:
    (copy / "model.safetensors").unlink()
    torch.save(micro.state_dict(), copy / "pytorch_model.bin")
    refusal(lambda: m.check_model_path(str(copy)), copy)
    refusal(lambda: load(copy), copy)


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./nowhere", "~/nowhere"])
def test_a_path_that_does_not_exist_is_refused_before_any_work(path: str) -> None:
    assert "no model here" in refusal(lambda: m.check_model_path(path), path)


def test_a_hub_id_is_left_to_loading(micro_path: str) -> None:
    m.check_model_path("somebody/some-model")
    m.check_model_path(micro_path)


def test_a_hub_id_without_the_hub_is_refused_in_one_line() -> None:
    refusal(lambda: m.load_model("somebody/some-model-nobody-has"), "somebody/some-model-nobody-has")
    refusal(lambda: m.load_tokenizer("somebody/some-model-nobody-has"), "somebody/some-model-nobody-has")


@pytest.mark.parametrize("kept", [0, 4, 100, 5_000, -1])
def test_truncated_weights_are_refused(copy: Path, kept: int) -> None:
    content = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(content[:kept])
    assert "damaged" in refusal(lambda: load(copy), copy)


def test_weights_that_are_something_else_are_refused(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(b"<html>404</html>" * 100)
    assert "damaged" in refusal(lambda: load(copy), copy)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model_type": "no-such-architecture"}'])
def test_a_config_that_is_none_is_refused(copy: Path, content: str) -> None:
    (copy / "config.json").write_text(content, encoding="utf-8")
    refusal(lambda: load(copy), copy)


def test_weights_of_another_size_than_the_config_says_are_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    (copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 256}), encoding="utf-8")
    assert "do not fit config.json" in refusal(lambda: load(copy), copy)


def test_a_tokenizer_without_a_chat_template_is_refused(copy: Path) -> None:
    (copy / "chat_template.jinja").unlink()
    assert "no chat template" in refusal(lambda: m.load_tokenizer(str(copy)), copy)


def test_a_folder_without_a_tokenizer_is_refused(copy: Path) -> None:
    for file in copy.glob("tokenizer*"):
        file.unlink()
    refusal(lambda: m.load_tokenizer(str(copy)), copy)


@pytest.mark.parametrize("content", ["", "{", "{}"])
def test_a_damaged_tokenizer_is_refused(copy: Path, content: str) -> None:
    (copy / "tokenizer.json").write_text(content, encoding="utf-8")
    refusal(lambda: m.load_tokenizer(str(copy)), copy)


def test_too_little_memory_is_an_error_for_the_user(micro_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(m.AutoModelForCausalLM, "from_pretrained", full)
    assert "not enough memory" in refusal(lambda: m.load_model(micro_path), micro_path)


# --- two models of one vocabulary ------------------------------------------------------------------------------------


def test_the_same_tokenizer_and_vocabulary_are_accepted(copy: Path, micro_path: str) -> None:
    m.check_same_tokenizer(micro_path, str(copy), "--student")


def test_another_tokenizer_is_refused(copy: Path, micro_path: str, tokenizer: PreTrainedTokenizerBase) -> None:
    other = AutoTokenizer.from_pretrained(copy)
    other.add_tokens(["<|new|>"])
    other.save_pretrained(copy)
    message = refusal(lambda: m.check_same_tokenizer(micro_path, str(copy), "--student x"), "--student x")
    assert "the tokenizers differ (8192 and 8193 tokens, 0 of them with another number)" in message


def test_another_vocabulary_under_the_same_tokenizer_is_refused(copy: Path, micro_path: str) -> None:
    """Matrices of more rows than the tokenizer has tokens: probabilities of the two would have different lengths."""
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    (copy / "config.json").write_text(json.dumps(config | {"vocab_size": 8256}), encoding="utf-8")
    message = refusal(lambda: m.check_same_tokenizer(micro_path, str(copy), "--student x"), "--student x")
    assert "the tokenizers are the same, but vocab_size differs (8192 and 8256 tokens in config.json)" in message


# --- a model named on the command line -------------------------------------------------------------------------------


def test_a_folder_is_itself(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy.parent)
    monkeypatch.setenv("HOME", str(copy.parent))
    assert [m.local_model(given, "--teacher").resolve() for given in (str(copy), "./model", "model", "~/model")] == [copy] * 4


@pytest.mark.parametrize("given", ["./nothing", "nothing/", "~/nothing", "/nothing", "a/b/nothing", "here/nothing", ".", ""])
def test_a_path_without_a_model_is_never_looked_for_on_the_hub(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(m, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    message = refusal(lambda: m.local_model(given, "--teacher"), f"--teacher {given}")
    assert "no model here (config.json is missing)" in message
    assert "--teacher takes a model folder or a hub id" in message


def test_a_hub_id_becomes_the_folder_it_was_fetched_into(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(m, "snapshot_download", lambda name, **_: asked.append(name) or str(copy))
    assert m.local_model("someone/model", "--teacher") == copy
    (copy / "model.safetensors").unlink()
    assert "no weights here" in refusal(lambda: m.local_model("someone/model", "--teacher"), "--teacher someone/model")
    assert asked == ["someone/model"] * 2


@pytest.mark.parametrize("given", ["nobody/nothing-of-this-name", "nothing-of-this-name", "not a name"])
def test_a_name_that_nobody_knows_is_one_line(given: str) -> None:
    message = refusal(lambda: m.local_model(given, "--teacher"), f"--teacher {given}")
    assert message.startswith("cannot load the model (the hub is switched off): ")
