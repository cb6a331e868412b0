"""LoRA adapters by name: served beside their base over HTTP, handed to vLLM, and refused in one line where they do not fit."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import torch
import uvicorn
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedTokenizerBase

from ml_engineer_track.models import load_merged, load_model, prompt_text
from ml_engineer_track.serving.adapters import Adapter, base_of, read
from ml_engineer_track.serving.app import State, create_app
from ml_engineer_track.serving.catalog import Limits, with_adapters
from ml_engineer_track.serving.serve import load_all
from ml_engineer_track.serving.vllm import arguments
from shared.errors import UserError
from tests.ml_engineer_track.serving.conftest import DECIDE


@pytest.fixture(scope="module")
def adapter(micro_path: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of the micro model that changes what it says."""
    folder = tmp_path_factory.mktemp("adapters") / "tuned"
    torch.manual_seed(3)
    options = LoraConfig(r=20, lora_alpha=40, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(load_model(micro_path, torch.float32), options).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def client(micro_path: str, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """The server over the micro model and its adapter, with the transformers engine."""
    found = with_adapters(base_of(read([f"tuned={adapter}"]), Path(micro_path), [], "auto"), read([f"tuned={adapter}"]), adapter)
    limits, state = Limits(cache_mb=4, max_running=4), State()
    taken = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(state, lambda s: load_all(s, found, limits)), log_level="critical"))
    thread = threading.Thread(target=server.run, args=([taken],))
    thread.start()
    address = f"http://127.0.0.1:{taken.getsockname()[1]}"
    try:
        deadline = time.monotonic() + 120
        while state.not_ready:
            assert time.monotonic() < deadline, state.not_ready
            time.sleep(0.02)
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60)
    finally:
        server.should_exit = True
        thread.join(timeout=60)
        assert not thread.is_alive()


def test_an_adapter_is_a_model_with_a_parent(client: openai.OpenAI) -> None:
    listed = {model["id"]: model for model in httpx.get(f"{client.base_url}models").json()["data"]}
    assert listed["micro"]["parent"] is None
    assert (listed["tuned"]["parent"], listed["tuned"]["engine"]) == ("micro", "transformers")


@torch.no_grad()
def test_each_name_answers_for_its_own_weights(
    client: openai.OpenAI, micro_path: str, adapter: Path, base_tokenizer: PreTrainedTokenizerBase
) -> None:
    prompt = base_tokenizer(prompt_text(base_tokenizer, DECIDE), add_special_tokens=False, return_tensors="pt")

    def said(name: str) -> str:
        reply = client.chat.completions.create(model=name, messages=DECIDE, temperature=0, max_tokens=6)  # type: ignore[arg-type]
        return str(reply.choices[0].message.content)

    replies = {}
    for name, model in (("micro", load_model(micro_path)), ("tuned", load_merged(micro_path, str(adapter)))):
        ids = model.generate(**prompt.to(model.device), max_new_tokens=6, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        replies[name] = base_tokenizer.decode(ids, skip_special_tokens=True)
        assert said(name) == replies[name]
    assert replies["micro"] != replies["tuned"]


def test_vllm_is_told_the_adapters_and_room_for_their_rank(micro_path: str, adapter: Path) -> None:
    plain = ["serve", micro_path, "--host", "127.0.0.1", "--port", "8001", "--served-model-name", "micro"]
    assert arguments(Path(micro_path), ["micro"], [], "127.0.0.1", 8001) == plain
    assert arguments(Path(micro_path), ["micro"], read([f"a={adapter}", f"b={adapter}"]), "127.0.0.1", 8001) == [
        *plain, "--enable-lora", "--max-lora-rank", "32", "--lora-modules", f"a={adapter}", f"b={adapter}",
    ]  # fmt: skip


# --- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "tuned", "tuned=", "=folder"])
def test_other_texts_than_name_and_folder_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="is not NAME=FOLDER"):
        read([text])


def test_folders_without_a_lora_adapter_are_refused(adapter: Path, tmp_path: Path) -> None:
    def copy(name: str, **changes: object) -> Path:
        folder = Path(shutil.copytree(adapter, tmp_path / name))
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        (folder / "adapter_config.json").write_text(json.dumps(config | changes), encoding="utf-8")
        return folder

    weightless, broken = copy("weightless"), copy("broken")
    (weightless / "adapter_model.safetensors").unlink()
    (broken / "adapter_config.json").write_text("{", encoding="utf-8")
    for folder, told in (
        (tmp_path, "adapter_config.json is missing"),
        (weightless, "adapter_model.safetensors is missing"),
        (broken, "adapter_config.json is damaged"),
        (copy("nameless", base_model_name_or_path=None, r=None), "adapter_config.json is damaged"),
        (copy("other", peft_type="IA3"), "an adapter of type 'IA3'"),
    ):
        with pytest.raises(UserError, match=told):
            read([f"tuned={folder}"])
    with pytest.raises(UserError, match="two adapters are called 'tuned'"):
        read([f"tuned={adapter}", f"tuned={adapter}"])


def test_what_an_adapter_cannot_be_served_with_is_said(micro_path: str, adapter: Path, tmp_path: Path) -> None:
    found, published = read([f"tuned={adapter}"]), tmp_path / "m-1"
    published.mkdir()
    (published / "manifest.json").write_text("{}", encoding="utf-8")
    other = Path(shutil.copytree(micro_path, tmp_path / "other"))
    for model, variants, engine, told in (
        (published, [], "auto", f"a published version holds merged weights.*Use --model {micro_path}"),
        (None, [], "vllm", f"a published version holds merged weights.*Use --model {micro_path}"),
        (Path(micro_path), [], "openvino", "the openvino engine serves no adapters.*Use --engine transformers or vllm"),
        (Path(micro_path), ["q8_0"], "auto", "adapters come without --variant"),
        (other, [], "transformers", f"adapter 'tuned' was tuned on {micro_path}, not on this model"),
        (tmp_path / "nothing", [], "vllm", "config.json is missing"),
    ):
        with pytest.raises(UserError, match=told):
            base_of(found, model, variants, engine)
    with pytest.raises(UserError, match="'micro' is the name of the base model"):
        base_of(read([f"micro={adapter}"]), Path(micro_path), [], "auto")


@pytest.mark.parametrize(
    ("recorded", "fits"),
    [("/another/machine/micro", True), ("somebody/micro", True), ("/another/machine/mini", False), ("somebody/mini", False)],
)
def test_a_base_recorded_elsewhere_is_known_by_its_name(micro_path: str, recorded: str, fits: bool) -> None:
    adapters = [Adapter("tuned", Path("anywhere"), recorded, 8)]
    if fits:
        assert base_of(adapters, Path(micro_path), [], "auto") == Path(micro_path)
    else:
        with pytest.raises(UserError, match="was tuned on"):
            base_of(adapters, Path(micro_path), [], "auto")


def test_a_base_in_the_hubs_cache_is_known_by_its_folder(micro_path: str, tmp_path: Path) -> None:
    snapshot = Path(shutil.copytree(micro_path, tmp_path / "models--somebody--mini" / "snapshots" / "0123abcd"))
    adapters = [Adapter("tuned", Path("anywhere"), "somebody/mini", 8)]
    assert base_of(adapters, snapshot, [], "transformers") == snapshot


def test_matrices_of_another_shape_are_one_line(adapter: Path, tmp_path: Path, micro_path: str) -> None:
    """The names agree and the weights do not: a base model that was made again in another size."""
    from transformers import LlamaForCausalLM

    config = load_model(micro_path).config
    config.hidden_size, config.head_dim = 96, 24
    LlamaForCausalLM(config).save_pretrained(tmp_path / "micro")
    with pytest.raises(UserError, match="weights do not fit"):
        load_merged(str(tmp_path / "micro"), str(adapter))
