"""Merging changes no answer, fewer bits need fewer bytes, and what is saved is what is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ml_engineer_track import finetune as ft
from ml_engineer_track import quantize as q
from ml_engineer_track.finetune import Tuned
from ml_engineer_track.models import load_model, weight_bytes
from shared.errors import UserError
from shared.settings import Settings

IDS = torch.arange(100, 140)[None, :]


def an_adapter(settings: Settings, folder: Path) -> Tuned:
    """LoRA matrices with random numbers in both, as if long trained."""
    torch.manual_seed(1)
    model = ft.add_adapter(load_model(settings.model_path, torch.float32), settings.finetune)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    model.save_pretrained(folder)
    return Tuned(
        adapter=str(folder), base=settings.model_path, method="lora", steps=1, stopped_early=False, resumed_at=0,
        best_validation_loss=1.0, validation=[], loss=[1.0], seconds=1.0, tokens_per_second=1.0, data_wait_share=0.0, mfu=0.1,
        trainable_share=0.1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def tuned(small_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    return an_adapter(small_settings, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def variants(small_settings: Settings, tuned: Tuned, tmp_path_factory: pytest.TempPathFactory) -> q.Variants:
    both = small_settings.quantize.model_copy(update={"variants": ["nf4", "int8"]})
    changes = {"quantize": both, "artifacts": tmp_path_factory.mktemp("quantized")}
    return q.quantize(small_settings.model_copy(update=changes), tuned)


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(IDS.to(model.device)).logits.float().cpu()


def test_the_merged_model_says_what_base_and_adapter_say(tuned: Tuned, micro: PreTrainedModel) -> None:
    plain = logits(micro)
    adapted = logits(PeftModel.from_pretrained(micro, tuned.adapter).eval())
    assert (adapted - plain).abs().max() > 0.1  # the adapter does something
    torch.testing.assert_close(logits(q.merge(tuned)), adapted, rtol=1e-4, atol=1e-4)


def test_merging_after_qlora_starts_from_full_precision(tuned: Tuned) -> None:
    assert {p.dtype for p in q.merge(tuned).parameters()} == {torch.float32}


def test_fewer_bits_need_fewer_bytes(variants: q.Variants) -> None:
    size = variants.weight_bytes
    assert set(size) == set(variants.folders) == {"bf16", "nf4", "int8"}
    assert size["nf4"] < size["int8"] < size["bf16"]
    matrices = 2 * (64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 128)  # weights of all projections of the micro model
    rest = size["bf16"] - 2 * matrices  # embeddings and norms stay in bf16
    assert matrices / 2 + rest < size["nf4"] < matrices + rest
    assert matrices + rest < size["int8"] < 1.2 * matrices + rest


def test_bytes_of_shared_weights_are_counted_once(micro: PreTrainedModel) -> None:
    buffers = sum(b.numel() * b.element_size() for b in micro.buffers())
    assert weight_bytes(micro) == sum(p.numel() * 4 for p in micro.parameters()) + buffers


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_bytes_can_be_counted_after_a_forward_pass(variants: q.Variants, name: str) -> None:
    """bitsandbytes moves its statistics about at the first forward pass."""
    model = load_model(variants.folders[name])
    before = weight_bytes(model)
    logits(model)
    assert weight_bytes(model) == pytest.approx(before, rel=0.1)


@pytest.mark.parametrize("name", ["bf16", "nf4", "int8"])
def test_a_variant_loads_with_plain_auto_classes_and_stays_close_to_the_merged_model(
    variants: q.Variants, tuned: Tuned, name: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(variants.folders[name], dtype=torch.bfloat16).eval()
    assert AutoTokenizer.from_pretrained(variants.folders[name]).chat_template
    similarity = torch.nn.functional.cosine_similarity(logits(model).flatten(), logits(q.merge(tuned)).flatten(), dim=0)
    assert similarity > {"bf16": 0.999, "nf4": 0.8, "int8": 0.99}[name]


@pytest.mark.parametrize("name", ["bf16", "nf4", "int8"])
def test_embeddings_stay_tied_and_are_stored_once(variants: q.Variants, name: str) -> None:
    model = load_model(variants.folders[name])
    assert model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    config = json.loads((Path(variants.folders[name]) / "config.json").read_text(encoding="utf-8"))
    assert config["tie_word_embeddings"] is True
    stored = {key for file in Path(variants.folders[name]).glob("*.safetensors") for key in load_file(file)}
    assert "model.embed_tokens.weight" in stored
    assert "lm_head.weight" not in stored


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_a_variant_gives_the_same_numbers_each_time_it_is_loaded(variants: q.Variants, name: str) -> None:
    assert torch.equal(logits(load_model(variants.folders[name])), logits(load_model(variants.folders[name])))


def test_a_variant_that_loads_back_otherwise_is_refused(variants: q.Variants, micro: PreTrainedModel) -> None:
    other = load_model(variants.folders["bf16"], torch.float32)
    with pytest.raises(UserError, match="nf4 does not load back"):
        q.check_round_trip(micro, other, "nf4")


def test_embeddings_that_came_apart_are_refused(micro: PreTrainedModel, micro_path: str) -> None:
    loaded = load_model(micro_path, torch.float32)
    loaded.lm_head.weight = torch.nn.Parameter(loaded.lm_head.weight.detach().clone())
    with pytest.raises(UserError, match="lost its tied embeddings"):
        q.check_round_trip(micro, loaded, "nf4")


def test_quantizing_again_replaces_what_is_there(make_settings: Callable[..., Settings], tuned: Tuned, tmp_path: Path) -> None:
    settings = make_settings()
    stale = settings.work / "quantize" / "nf4" / "stale.txt"
    stale.parent.mkdir(parents=True)
    stale.write_text("x", encoding="utf-8")
    made = q.quantize(settings, tuned)
    assert set(made.folders) == {"bf16", "nf4", "q8_0"}
    assert not stale.exists()
    assert sorted(p.name for p in (settings.work / "quantize").iterdir()) == ["bf16", "nf4", "q8_0"]
