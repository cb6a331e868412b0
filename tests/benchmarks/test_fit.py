"""Predicted memory against the allocator's own count of a real step, and the formulas against numbers worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, LlamaConfig

from benchmarks import fit as f
from shared.errors import UserError
from shared.hardware import compute_dtype, device
from shared.settings import BASE_MODEL

DTYPE = str(compute_dtype(device())).removeprefix("torch.")


def plan(model: str, method: f.Method = "lora", context: int = 128, batch: int = 2, **more: int) -> f.Plan:
    return f.Plan(model, method, context, batch, dtype=DTYPE, **more)


# --- against measured peaks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", ["lora", pytest.param("qlora", marks=pytest.mark.slow), pytest.param("full", marks=pytest.mark.slow)]
)
def test_a_prediction_is_within_15_percent_of_the_measured_peak(method: f.Method) -> None:
    asked = plan(str(BASE_MODEL), method, context=192, batch=2, reply_tokens=48)
    measured = f.measured_peak(asked)
    assert f.predict_training(asked).total == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(("context", "batch", "reply_tokens"), [(64, 8, 0), (500, 1, 16)])
def test_it_is_so_for_other_shapes_and_another_model(context: int, batch: int, reply_tokens: int, micro_path: str) -> None:
    asked = plan(micro_path, context=context, batch=batch, reply_tokens=reply_tokens)
    assert f.predict_training(asked).total == pytest.approx(f.measured_peak(asked), rel=0.15)


# --- the formulas ----------------------------------------------------------------------------------------------------


def test_weights_gradients_and_optimiser_are_counted_by_parameter(micro_path: str) -> None:
    parameters = sum(p.numel() for p in f.skeleton(AutoConfig.from_pretrained(micro_path), torch.float32).parameters())
    full = f.predict_training(plan(micro_path, "full")).components
    assert full["weights"] == pytest.approx(4 * parameters, rel=0.001)  # the rotary buffers are a few bytes more
    assert full["optimizer"] == 8 * parameters
    lora = f.predict_training(plan(micro_path, "lora", rank=4)).components
    assert lora["weights"] == pytest.approx(getattr(torch, DTYPE).itemsize * parameters, rel=0.001)
    # All-linear, rank 4: 4 (in + out) float32 for q, o (64+64), k, v (64+32), gate, up, down (64+128), in two layers.
    adapter = 2 * 4 * (2 * 128 + 2 * 96 + 3 * 192)
    assert lora["adapter"] == 4 * adapter
    assert lora["optimizer"] == 8 * adapter


def test_nf4_takes_a_quarter_of_the_projections(micro_path: str) -> None:
    lora = f.predict_training(plan(micro_path, "lora")).components
    qlora = f.predict_training(plan(micro_path, "qlora")).components
    projections = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    saved = projections * (getattr(torch, DTYPE).itemsize - f.NF4_BITS / 8)
    assert lora["weights"] - qlora["weights"] == pytest.approx(saved, abs=20)
    assert qlora["activations"] == lora["activations"]


def test_activations_grow_with_the_batch_and_the_kv_cache_with_both(micro_path: str) -> None:
    one, four = (f.predict_training(plan(micro_path, batch=b)).components["activations"] for b in (1, 4))
    assert four == pytest.approx(4 * one, rel=0.05)
    serving = f.predict_serving(plan(micro_path, context=100, batch=3))
    # keys and values, two layers, two heads of 16
    assert serving.components["KV cache"] == 2 * 2 * 2 * 16 * getattr(torch, DTYPE).itemsize * 100 * 3


def test_the_largest_batch_is_the_largest_that_fits() -> None:
    prediction = f.Prediction({"weights": 100, "activations": 40}, per_row=10)  # four rows of 10
    assert prediction.largest_batch(149, 4) == 4
    assert prediction.largest_batch(150, 4) == 5
    assert prediction.largest_batch(50, 4) == 0


def test_a_model_larger_than_this_machine_is_predicted_from_its_config_alone(tmp_path: Path) -> None:
    """A 7-billion-parameter shape with few layers counted by hand: no weight is ever allocated."""
    LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=2, num_attention_heads=32,
        max_position_embeddings=4096,
    ).save_pretrained(tmp_path)  # fmt: skip
    asked = f.Plan(str(tmp_path / "config.json"), "qlora", context=4096, batch=4, dtype="bfloat16")
    found = f.fit(asked)
    per_layer = 4 * 4096 * 4096 + 3 * 4096 * 11008
    assert found["training"]["weights"] == pytest.approx(2 * per_layer * f.NF4_BITS / 8 + 2 * 2 * 32000 * 4096, rel=0.01)
    assert found["training"]["total"] > 5 * 2**30
    assert json.loads(json.dumps(found)) == found
    by_gpu = {g["gpu"]: g for g in found["gpus"]}
    assert not by_gpu["RTX 4060 (8)"]["training_fits"]
    assert by_gpu["H200 (141)"]["training_fits"]
    batches = [g["training_largest_batch"] for g in found["gpus"]]
    assert batches == sorted(batches)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_bad_input_is_refused_in_one_line(micro_path: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="longer than the model's 512"):
        f.predict_training(plan(micro_path, context=513))
    with pytest.raises(UserError, match="cannot read the config"):
        f.predict_training(plan(str(tmp_path)))
    with pytest.raises(UserError, match="batch at least 1"):
        f.predict_training(plan(micro_path, batch=0))
