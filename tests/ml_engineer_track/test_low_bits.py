"""A packed model says what its dequantised weights say, is as large as predicted, and comes back from the disk as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ml_engineer_track import low_bits as lb
from ml_engineer_track.half_quadratic import LowBitEmbedding, LowBitLinear, LowBitMatrix
from ml_engineer_track.models import check_model_path, load_model, load_tokenizer, weight_bytes
from shared.errors import UserError
from shared.settings import BASE_MODEL

IDS = torch.arange(100, 140)[None, :]
PROJECTIONS = 2 * 7
EMBEDDING = "model.embed_tokens"


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(IDS.to(model.device)).logits.float().cpu()


def dequantised(model: PreTrainedModel, plan: lb.Plan) -> PreTrainedModel:
    """The same in dense weights, written for tests."""
    with torch.no_grad():
        for name, bits in plan.bits.items():
            weight = model.get_submodule(name).weight
            weight.copy_(LowBitMatrix.of(weight, bits, plan.group).dense(weight.dtype))
    return model


@pytest.fixture(params=[False, True], ids=["projections", "everywhere"])
def everywhere(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_all_projections_are_found_and_the_tied_embedding_once(micro: PreTrainedModel) -> None:
    inner, all_of_them = lb.matrices(micro, everywhere=False), lb.matrices(micro, everywhere=True)
    assert len(inner) == PROJECTIONS
    assert set(all_of_them) - set(inner) == {EMBEDDING}


def test_untied_embedding_and_output_layer_are_two_matrices() -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=False
    )
    model = LlamaForCausalLM(config)
    assert set(lb.matrices(model, True)) - set(lb.matrices(model, False)) == {EMBEDDING, "lm_head"}
    assert "lm_head" not in lb.matrices(model, False)
    packed = lb.pack_model(model, lb.uniform(model, 4, 16, everywhere=True))
    assert isinstance(packed.lm_head, LowBitLinear)
    assert packed.lm_head not in lb.linear_layers(packed)


def test_a_packed_model_says_what_its_dense_weights_say(micro: PreTrainedModel, micro_path: str, everywhere: bool) -> None:
    plan = lb.uniform(micro, 3, 16, everywhere)
    expected = logits(dequantised(load_model(micro_path, torch.float32), plan))
    packed = lb.pack_model(micro, plan)
    torch.testing.assert_close(logits(packed), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(lb.keep_dense(packed)), expected, rtol=1e-4, atol=1e-4)


def test_a_tied_output_layer_shares_the_packed_embedding(micro: PreTrainedModel) -> None:
    packed = lb.pack_model(micro, lb.uniform(micro, 4, 32, everywhere=True))
    embedding, head = packed.get_input_embeddings(), packed.get_output_embeddings()
    assert isinstance(embedding, LowBitEmbedding)
    assert isinstance(head, LowBitLinear)
    assert head.matrix is embedding.matrix
    assert head not in lb.linear_layers(packed)
    assert len(lb.linear_layers(packed)) == PROJECTIONS


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_size_of_a_packed_model_is_exactly_what_is_predicted(micro_path: str, bits: int, everywhere: bool) -> None:
    model = load_model(micro_path, torch.bfloat16)
    plan = lb.uniform(model, bits, 64, everywhere)
    unpacked = sum(2 * model.get_submodule(name).weight.numel() for name in plan.bits)
    expected = weight_bytes(model) - unpacked + lb.plan_bytes(model, plan)
    assert lb.bits_per_weight(model, plan) == pytest.approx(bits + 0.5)
    assert weight_bytes(lb.pack_model(model, plan)) == expected


def test_the_bundled_model_is_mostly_embedding_at_two_bits() -> None:
    """The reason why sizes are those of whole models."""
    model = load_model(str(BASE_MODEL), torch.bfloat16)
    plan = lb.uniform(model, 2, 64)
    embedding = 2 * model.get_input_embeddings().weight.numel()
    assert embedding > lb.plan_bytes(model, plan)


# --- files -----------------------------------------------------------------------------------------------------------


def adapted(model: PreTrainedModel) -> PreTrainedModel:
    torch.manual_seed(3)
    for layer in lb.linear_layers(model):
        layer.add_adapter(2, torch.bfloat16)
        torch.nn.init.normal_(layer.up, 0, 0.05)
    return model


@pytest.mark.parametrize("with_adapter", [False, True])
def test_what_is_saved_is_what_is_loaded(
    micro_path: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, everywhere: bool, with_adapter: bool
) -> None:
    model = load_model(micro_path, torch.bfloat16)
    plan = lb.uniform(model, 2, 32, everywhere)
    plan.bits["model.layers.0.mlp.down_proj"] = 8
    packed = lb.pack_model(model, plan)
    if with_adapter:
        adapted(packed)
    lb.save_low_bits(packed, tokenizer, tmp_path / "m")
    loaded = load_model(str(tmp_path / "m"), torch.bfloat16)
    assert torch.equal(logits(loaded), logits(packed))
    assert weight_bytes(loaded) == weight_bytes(packed)
    on_disk = (tmp_path / "m" / lb.FILE).stat().st_size
    assert on_disk == pytest.approx(weight_bytes(packed), rel=0.05)
    assert loaded.generation_config.eos_token_id == model.generation_config.eos_token_id
    assert load_tokenizer(str(tmp_path / "m")).chat_template
    assert not any(p.requires_grad for p in loaded.parameters())
    check_model_path(str(tmp_path / "m"))


def test_a_packed_model_generates(micro_path: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = load_model(micro_path, torch.float32)
    lb.save_low_bits(lb.pack_model(model, lb.uniform(model, 4, 32, True)), tokenizer, tmp_path / "m")
    loaded = load_model(str(tmp_path / "m"), torch.float32)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(loaded.generate(IDS, **options), model.generate(IDS, **options))


def test_plain_auto_classes_refuse_the_folder(micro: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Better than a model with random projections."""
    lb.save_low_bits(lb.pack_model(micro, lb.uniform(micro, 2, 16)), tokenizer, tmp_path / "m")
    with pytest.raises(OSError, match="safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / lb.LAYOUT_FILE).write_text("{}"), "do not fit"),
        (lambda f: (f / lb.LAYOUT_FILE).write_text('{"rank": 0, "matrices": {"model.nothing": [2, 16]}}'), "do not fit"),
        (lambda f: (f / lb.LAYOUT_FILE).write_text('{"rank": 0, "matrices": {}}'), "do not fit"),
        (lambda f: (f / lb.FILE).write_bytes(b"\x00" * 7), "weights are damaged"),
        (lambda f: (f / lb.FILE).unlink(), "cannot load the model"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_one_line(
    micro: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, damage: Callable[[Path], object], said: str
) -> None:
    lb.save_low_bits(lb.pack_model(micro, lb.uniform(micro, 2, 16)), tokenizer, tmp_path / "m")
    damage(tmp_path / "m")
    with pytest.raises(UserError, match=said) as caught:
        load_model(str(tmp_path / "m"))
    assert "\n" not in str(caught.value)


def test_other_bits_of_a_matrix_than_were_stored_are_refused(
    micro: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    lb.save_low_bits(lb.pack_model(micro, lb.uniform(micro, 2, 16)), tokenizer, tmp_path / "m")
    path = tmp_path / "m" / lb.LAYOUT_FILE
    layout = json.loads(path.read_text(encoding="utf-8"))
    layout["matrices"]["model.layers.0.mlp.down_proj"] = [4, 16]
    path.write_text(json.dumps(layout), encoding="utf-8")
    with pytest.raises(UserError, match="do not fit"):
        load_model(str(tmp_path / "m"))


def test_a_model_that_is_packed_already_is_refused(micro: PreTrainedModel) -> None:
    packed = lb.pack_model(micro, lb.uniform(micro, 2, 16, everywhere=True))
    with pytest.raises(UserError, match="no linear layer to quantise"):
        lb.matrices(packed, everywhere=True)


@pytest.mark.parametrize("bits", ["1", "8", "16", "two", "", "2.5"])
def test_unknown_bits_are_one_line(bits: str) -> None:
    with pytest.raises(UserError, match="Use one of: 2, 3, 4, mixed"):
        lb.check_bits(bits)
