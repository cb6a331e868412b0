"""A GGUF file says what the model says: token by token where nothing was rounded, and for every architecture we write."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM as Auto
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, Qwen2Config, Qwen3Config

from ml_engineer_track.gguf_export import FILE_NAME, rotary_order, write_gguf
from ml_engineer_track.models import load_model, prompt_text
from ml_engineer_track.quantize import save_gguf
from ml_engineer_track.serving.catalog import Entry, Limits, build
from ml_engineer_track.serving.engine import Engine, Generation
from shared.errors import UserError
from shared.settings import BASE_MODEL
from tests.ml_engineer_track.serving.conftest import DECIDE, QUESTION, generated

SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip


def engine_over(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Engine:
    save_gguf(model, tokenizer, folder, "f16")
    engine = build(Entry("x", (), folder, "openvino"), Limits(cache_mb=8)).engine
    engine.start()
    return engine


def prompts(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return [tokenizer(prompt_text(tokenizer, m), add_special_tokens=False)["input_ids"] for m in (QUESTION, DECIDE)]


@torch.no_grad()
def test_the_bundled_model_answers_the_same_from_f16(base_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = load_model(str(BASE_MODEL), torch.float32)
    engine = engine_over(model, base_tokenizer, tmp_path / "f16")
    for prompt in prompts(base_tokenizer):
        wanted = model.generate(torch.tensor([prompt]), max_new_tokens=48, do_sample=False, eos_token_id=1, pad_token_id=0)
        assert [token.id for token in generated(engine, Generation(prompt, 48))[0]] == wanted[0, len(prompt) :].tolist()
    engine.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(vocab_size=8192, tie_word_embeddings=False, head_dim=32, rope_theta=50000.0, **SIZES),
        Qwen2Config(vocab_size=8192, tie_word_embeddings=True, **SIZES),
        Qwen3Config(vocab_size=8192, tie_word_embeddings=False, head_dim=32, **SIZES),
    ],
    ids=lambda config: config.model_type,
)
@torch.no_grad()
def test_other_architectures_choose_the_same_token_from_f16(
    config: LlamaConfig, base_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Random weights have near ties everywhere, so the first token need only be among the very best."""
    torch.manual_seed(0)
    model = Auto.from_config(config, dtype=torch.float32).eval()
    engine = engine_over(model, base_tokenizer, tmp_path / "f16")
    for prompt in prompts(base_tokenizer):
        token = generated(engine, Generation(prompt, 1))[0][0]
        wanted = torch.log_softmax(model(torch.tensor([prompt])).logits[0, -1], dim=-1)
        assert wanted[token.id] > wanted.max() - 0.5  # the others lie some ten lower
    engine.close()


def test_kinds_take_the_bytes_they_promise(
    micro: PreTrainedModel, base_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    for kind, projections, embeddings in (("f16", "F16", "F16"), ("q8_0", "Q8_0", "Q8_0"), ("q4_0", "Q4_0", "Q8_0")):
        write_gguf(micro, base_tokenizer, tmp_path / kind, kind)
        read = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / kind).tensors}
        assert read["blk.0.ffn_up.weight"].tensor_type.name == projections
        assert read["token_embd.weight"].tensor_type.name == embeddings
        assert read["blk.0.attn_norm.weight"].tensor_type.name == "F32"
        bits = {"F16": 16, "Q8_0": 8.5, "Q4_0": 4.5}[projections]
        assert read["blk.0.ffn_up.weight"].n_bytes == 64 * 128 * bits / 8
        assert "output.weight" not in read  # tied embeddings are stored once


def test_tokens_merges_and_template_travel_with_the_weights(
    micro: PreTrainedModel, base_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    write_gguf(micro, base_tokenizer, tmp_path / FILE_NAME, "q8_0")
    fields = gguf.GGUFReader(tmp_path / FILE_NAME).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert tokens == base_tokenizer.convert_ids_to_tokens(range(len(base_tokenizer)))
    assert fields["tokenizer.chat_template"].contents() == base_tokenizer.chat_template
    assert fields["tokenizer.ggml.eos_token_id"].contents() == base_tokenizer.eos_token_id
    assert fields["tokenizer.ggml.pre"].contents() == "qwen2"


def test_rotary_order_puts_what_rotates_together_side_by_side() -> None:
    rows = np.array([[head * 10 + n] for head in range(2) for n in range(6)])  # two heads of six rows
    assert rotary_order(rows, heads=2)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 10, 13, 11, 14, 12, 15]


def test_rows_that_do_not_fill_blocks_stay_in_16_bits(base_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    odd = LlamaForCausalLM(LlamaConfig(vocab_size=8192, **{**SIZES, "intermediate_size": 72}))
    write_gguf(odd, base_tokenizer, tmp_path / FILE_NAME, "q4_0")
    read = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / FILE_NAME).tensors}
    assert read["blk.0.ffn_down.weight"] == "F16"
    assert read["blk.0.ffn_up.weight"] == "Q4_0"


def test_other_models_are_refused_and_nothing_is_left(base_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8192, rope_parameters=scaled, **SIZES))
    with pytest.raises(UserError, match="rope type 'linear'"):
        write_gguf(model, base_tokenizer, tmp_path / FILE_NAME, "q8_0")
    model.config.model_type = "gpt2"
    with pytest.raises(UserError, match="models of type 'gpt2'"):
        write_gguf(model, base_tokenizer, tmp_path / FILE_NAME, "q8_0")
    assert list(tmp_path.iterdir()) == []
