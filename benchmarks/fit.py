"""Will it fit? Predicts the memory of training and of serving a model, component by component, from its config alone.

Why: renting a GPU to find out that it is too small is the dear way of finding out.

    python -m benchmarks fit --model ml_engineer_track/base_model --method lora --context 512 --batch 4
    python -m benchmarks fit --model folder/config.json --method qlora --context 4096 --batch 4
    ... --check      also runs one step in a fresh process and prints the measured peak beside the prediction

How training is predicted stands in `ml_engineer_track/accounting.py`; serving is predicted here in the same way: the very model
class runs on tensors that have a shape and no memory, and every storage that would be alive is counted. The KV cache is added by
formula (2 · layers · kv heads · head dim · bytes, for each token).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig

from ml_engineer_track.accounting import (
    ALLOWANCE,
    GIB,
    NF4_BITS,
    LiveMemory,
    Method,
    Plan,
    Prediction,
    check_context,
    materialise,
    predict_training,
    quantised_parameters,
    read_config,
    skeleton,
)
from ml_engineer_track.accounting_measure import in_fresh_process, measured_peak

METHODS: tuple[Method, ...] = ("lora", "qlora", "full")
#: Memory of common GPUs, GiB.
GPUS = {
    "RTX 4060 (8)": 8, "RTX 3060 (12)": 12, "T4 (16)": 15, "RTX 4090 / L4 / A10 (24)": 24, "RTX 5090 (32)": 32,
    "A100 (40)": 40, "L40S (48)": 48, "A100 / H100 (80)": 80, "H200 (141)": 140,
}  # fmt: skip


def predict_serving(plan: Plan) -> Prediction:
    """`batch` sequences of `context` tokens in the cache, prompts prefilled one at a time; NF4 weights for `qlora`."""
    config, dtype = read_config(plan.model), getattr(torch, plan.dtype)
    check_context(config, plan)
    model = skeleton(config, dtype).train(False)
    with FakeTensorMode(allow_non_fake_inputs=True), LiveMemory() as live, torch.no_grad():
        materialise(model)
        weights = live.now
        ids = torch.zeros((1, plan.context), dtype=torch.long)
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, logits_to_keep=1)
    cache = plan.batch * plan.context * kv_bytes_per_token(config, dtype)
    components = {"weights": weights, "KV cache": cache, "prefill (temporary)": live.peak - weights}
    if plan.method == "qlora":
        linear = quantised_parameters(model)
        components["weights"] += sum(int(n * NF4_BITS / 8) for n in linear) - sum(n * dtype.itemsize for n in linear)
    return Prediction(components, cache // plan.batch)


def kv_bytes_per_token(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Keys and values of one token in all layers, in bytes."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * dtype.itemsize)


def check(plan: Plan) -> int:
    """The measured peak of two training steps in a fresh process, in bytes of tensors (as the prediction counts)."""
    return int(in_fresh_process("benchmarks.fit", plan))


# --- what people read ------------------------------------------------------------------------------------------------


def fit(plan: Plan, checked: bool = False) -> dict[str, Any]:
    """Predictions for training and serving, what fits where, and the measured peak when asked."""
    training, serving = predict_training(plan), predict_serving(plan)
    found: dict[str, Any] = {
        "model": plan.model, "method": plan.method, "context": plan.context, "batch": plan.batch,
        "training": {**training.components, "total": training.total},
        "serving": {**serving.components, "total": serving.total},
        "gpus": [row(name, size, training, serving, plan) for name, size in GPUS.items()],
        "measured": None,
    }  # fmt: skip
    if checked:
        found["measured"] = check(plan)
        found["predicted_to_measured"] = training.total / found["measured"]
    return found


def row(name: str, gib: float, training: Prediction, serving: Prediction, plan: Plan) -> dict[str, Any]:
    capacity = gib * GIB * (1 - ALLOWANCE)
    return {
        "gpu": name,
        "training_fits": training.total <= capacity,
        "training_largest_batch": training.largest_batch(capacity, plan.batch),
        "serving_fits": serving.total <= capacity,
        "serving_largest_batch": serving.largest_batch(capacity, plan.batch),
    }


def print_fit(found: dict[str, Any]) -> None:
    """Components in GiB, then the list of GPUs."""
    for what in ("training", "serving"):
        print(f"{what}, {found['method']}, context {found['context']}, batch {found['batch']}")
        for name, size in found[what].items():
            print(f"  {name:32s} {size / GIB:10.3f} GiB")
    if found["measured"]:
        print(f"  {'measured training peak':32s} {found['measured'] / GIB:10.3f} GiB")
    print(f"{'GPU (GiB)':28s} {'training':>9s} {'largest batch':>14s} {'serving':>9s} {'most chats':>11s}")
    for gpu in found["gpus"]:
        fits = ["fits" if gpu[f"{what}_fits"] else "no" for what in ("training", "serving")]
        most = (gpu["training_largest_batch"], gpu["serving_largest_batch"])
        print(f"{gpu['gpu']:28s} {fits[0]:>9s} {most[0]:>14,d} {fits[1]:>9s} {most[1]:>11,d}")
    print(f"{ALLOWANCE:.0%} of each GPU is left for the CUDA context, workspaces and fragmentation.")


def local_config(path: str) -> str:
    """A folder's or file's path made absolute; a hub id as it is."""
    return str(Path(path).resolve()) if Path(path).exists() else path


if __name__ == "__main__":
    print(measured_peak(Plan(**json.loads(sys.argv[1]))))
