"""What a model costs: the figures exist, have the shape reports rely on, and are computed as they say."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from ml_engineer_track import benchmark as b
from ml_engineer_track import benchmark_training as bt
from ml_engineer_track.benchmark_training import training_throughput
from ml_engineer_track.curate import CuratedData
from ml_engineer_track.finetune import Batch, encode
from ml_engineer_track.models import load_tokenizer
from shared.errors import UserError
from shared.metrics import percentiles
from shared.settings import Benchmark, Finetune, Settings

OPTIONS = Benchmark(batch_sizes=[1, 2], prompt_tokens=8, new_tokens=4, repeats=5, training_steps=2)
CUDA = torch.cuda.is_available()


# --- one run ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "new_tokens"), [(1, 2), (3, 6)])
def test_a_run_times_the_first_token_and_every_further_one(micro: PreTrainedModel, batch: int, new_tokens: int) -> None:
    started = time.perf_counter()
    run = b.one_run(micro, batch, 8, new_tokens)
    passed = time.perf_counter() - started
    assert len(run["itl"]) == new_tokens - 1
    assert all(gap > 0 for gap in [run["ttft"], *run["itl"]])
    assert run["ttft"] + sum(run["itl"]) <= passed


def test_a_run_decodes_with_the_cache(micro: PreTrainedModel) -> None:
    lengths: list[int] = []
    micro.register_forward_pre_hook(lambda _, __, given: lengths.append(given["input_ids"].shape[1]), with_kwargs=True)
    b.one_run(micro, 1, 16, 4)
    assert lengths == [16, 1, 1, 1]


# --- the arithmetic --------------------------------------------------------------------------------------------------

RUNS = [{"ttft": 0.5, "itl": [0.1, 0.3]}, {"ttft": 1.5, "itl": [0.2, 0.2]}]


def test_throughputs_are_totals_over_totals() -> None:
    made = b.summarise(RUNS, batch=4, options=OPTIONS)
    assert made["repeats"] == 2
    assert made["prefill_throughput"] == pytest.approx(4 * 8 * 2 / 2.0)
    assert made["decode_throughput"] == pytest.approx(4 * 4 / 0.8)
    assert made["raw"] == {"ttft": [0.5, 1.5], "tpot": pytest.approx([0.2, 0.2])}


def test_percentiles_are_taken_over_the_raw_samples() -> None:
    made = b.summarise(RUNS, batch=4, options=OPTIONS)
    assert made["ttft"] == pytest.approx({"p50": 1.0, "p90": 1.4, "p99": 1.49})
    assert made["itl"] == pytest.approx(percentiles([0.1, 0.3, 0.2, 0.2]))
    assert made["tpot"]["p50"] == pytest.approx(0.2)
    assert all(p["p50"] <= p["p90"] <= p["p99"] for p in (made["ttft"], made["itl"], made["tpot"]))


# --- the whole -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def figures(micro_path: str, small_settings: Settings) -> dict[str, Any]:
    return b.benchmark(small_settings.model_copy(update={"benchmark": OPTIONS}), {"micro": micro_path})


@pytest.mark.slow
def test_a_benchmark_says_what_was_measured_where_and_how(figures: dict[str, Any]) -> None:
    assert set(figures) == {"hardware", "busy_share", "settings", "models"}
    assert figures["settings"] == OPTIONS.model_dump()
    assert {"cpu_info", "n_threads", "gpu_info", "libraries"} <= set(figures["hardware"])
    assert 0 <= figures["busy_share"] <= 1
    assert json.loads(json.dumps(figures)) == figures


@pytest.mark.slow
def test_every_batch_size_has_every_figure(figures: dict[str, Any], micro_path: str) -> None:
    model = figures["models"]["micro"]
    assert set(model) == {"load_seconds", "disk_bytes", "memory", "batch"}
    assert model["load_seconds"] > 0
    assert model["disk_bytes"] == (Path(micro_path) / "model.safetensors").stat().st_size
    assert set(model["batch"]) == {"1", "2"}
    for measured in model["batch"].values():
        assert set(measured) == {"repeats", "ttft", "tpot", "itl", "prefill_throughput", "decode_throughput", "raw"}
        assert measured["repeats"] == len(measured["raw"]["ttft"]) == 5
        assert measured["prefill_throughput"] > 0
        assert measured["decode_throughput"] > 0


@pytest.mark.slow
def test_memory_is_read_in_a_process_of_its_own(figures: dict[str, Any]) -> None:
    memory = figures["models"]["micro"]["memory"]
    assert memory["max_ram"] > memory["model_ram"] > 0
    assert memory["max_ram"] > 50_000_000  # an interpreter with PyTorch in it
    if not CUDA:
        assert memory["max_process_vram"] is None
        assert memory["max_allocated"] is None


def test_the_memory_pass_counts_what_the_model_adds(micro_path: str) -> None:
    memory = b._memory_pass(micro_path, 8, 4)
    assert set(memory) == {"max_ram", "model_ram", "max_process_vram", "max_allocated"}
    assert memory["max_ram"] > 0
    assert (memory["max_process_vram"] is None) is not CUDA


@pytest.mark.slow
def test_a_memory_pass_that_fails_is_an_error_for_the_user(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the memory pass failed") as caught:
        b.memory(str(tmp_path), OPTIONS)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_training_throughput_compares_the_same_rows_and_steps(small_settings: Settings, small_data: CuratedData) -> None:
    made = training_throughput(small_settings.model_copy(update={"benchmark": OPTIONS}), small_data)
    assert made["rows"] > 0
    assert made["tokens"] > made["rows"]
    assert made["ratio"] == pytest.approx(made["tokens_per_second"] / made["trainer_tokens_per_second"])
    assert {len(times) for times in made["raw_seconds"].values()} == {2}
    assert made["tokens_per_second"] == pytest.approx(2 * made["tokens"] / sum(made["raw_seconds"]["ours"]))


def test_under_a_memory_limit_both_sides_train_in_the_parts_that_were_fitted(
    small_settings: Settings, small_data: CuratedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that goes through at once has more tokens than were fitted, but for a single row, and the steps stay the same."""
    seen: dict[str, Any] = {"ours": [], "checkpointing": set()}

    def backward(model: object, batch: Batch, pieces: int) -> None:
        seen["ours"] += [part.ids.shape for part in batch.split(pieces)]

    class Trainer:
        def __init__(self, args: Any, train_dataset: list[dict[str, Any]], **_: Any) -> None:
            seen["trainer"], seen["rows"] = args, train_dataset

        def remove_callback(self, _: object) -> None:
            pass

        def train(self) -> Any:
            return SimpleNamespace(metrics={"train_runtime": 1.0})

    def add_adapter(model: object, options: Finetune) -> torch.nn.Module:
        seen["checkpointing"].add(options.gradient_checkpointing)
        return torch.nn.Linear(1, 1)

    for name, stand_in in (("backward", backward), ("Trainer", Trainer), ("add_adapter", add_adapter)):
        monkeypatch.setattr(bt, name, stand_in)
    monkeypatch.setattr(bt, "load_base", lambda _: None)
    longest = max(len(e.ids) for e in encode(small_data.rows("train"), load_tokenizer(small_settings.model_path)))
    tight = {"batch_tokens": 4 * longest, "micro_batch_tokens": longest, "gradient_checkpointing": True}
    fitted = small_settings.finetune.model_copy(update=tight)
    settings = small_settings.model_copy(update={"benchmark": OPTIONS, "finetune": fitted})
    made = bt.training_throughput(settings, small_data)
    assert seen["checkpointing"] == {True}
    assert all(rows * length <= longest for rows, length in seen["ours"])
    assert len(seen["ours"]) > made["optimizer_steps"] * (bt.ROUNDS + 1)
    arguments, rows = seen["trainer"], seen["rows"]
    assert arguments.per_device_train_batch_size * max(len(row["input_ids"]) for row in rows) <= longest
    in_step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    assert in_step == -(-made["rows"] // made["optimizer_steps"])

    seen["ours"] = []
    free = settings.model_copy(update={"finetune": fitted.model_copy(update={"micro_batch_tokens": None})})
    whole = bt.training_throughput(free, small_data)
    assert len(seen["ours"]) == whole["optimizer_steps"] * (bt.ROUNDS + 1)
    assert seen["trainer"].gradient_accumulation_steps == 1
