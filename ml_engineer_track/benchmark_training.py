"""Fine-tuning throughput beside `transformers.Trainer` with its default collation, in one run, on the same rows.

Why an ML engineer measures this: training time is mostly decided by what the batches look like. Random batches padded to
their longest row spend much of their arithmetic on padding, and logits over prompts that nobody trains on cost as much as
those that count. Both sides here see each row once, take the same number of optimiser steps, use the same dtype, adapter
and optimiser, and take turns, so that a machine that slows down slows both. Under a memory limit (VRAM_GB) both train as
fine-tuning does there: in parts of a step, recomputing activations where that was chosen.

    python -m ml_engineer_track benchmark [--preset tiny]      (its last part)
"""

from __future__ import annotations

import math
import random
import tempfile
import time
from typing import Any

import torch
from peft import PeftModel
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainingArguments

from ml_engineer_track.curate import CuratedData
from ml_engineer_track.finetune import Example, add_adapter, backward, bucket, collate, encode, load_base
from ml_engineer_track.models import load_tokenizer
from ml_engineer_track.progress import watched
from shared.hardware import compute_dtype, device, synchronize
from shared.settings import Finetune, Settings

ROUNDS = 2


def training_throughput(settings: Settings, data: CuratedData) -> dict[str, Any]:
    """Reply and prompt tokens (no padding) trained per second, ours and Trainer's, and their ratio."""
    tokenizer = load_tokenizer(settings.model_path)
    rows = data.rows("train")
    mean_length = sum(len(e.ids) for e in encode(rows[:200], tokenizer)) / len(rows[:200])
    wanted = max(4, round(settings.benchmark.training_steps * settings.finetune.batch_tokens / mean_length))
    examples = encode(random.Random(settings.seed).sample(rows, min(len(rows), wanted)), tokenizer)
    groups = bucket(examples, settings.finetune.batch_tokens, settings.finetune.batch_rows)
    tokens = sum(len(e.ids) for e in examples)
    seconds: dict[str, list[float]] = {"ours": [], "trainer": []}
    for turn in watched(range(ROUNDS + 1), "benchmark training"):  # the first turn warms both up
        ours = _ours(settings, examples, groups, tokenizer)
        trainer = _trainer(settings, examples, len(groups), tokenizer)
        if turn:
            seconds["ours"].append(ours)
            seconds["trainer"].append(trainer)
    rate = {side: tokens * ROUNDS / sum(times) for side, times in seconds.items()}
    return {
        "rows": len(examples),
        "tokens": tokens,
        "optimizer_steps": len(groups),
        "tokens_per_second": rate["ours"],
        "trainer_tokens_per_second": rate["trainer"],
        "ratio": rate["ours"] / rate["trainer"],
        "raw_seconds": seconds,
    }


def _model(settings: Settings) -> PeftModel:
    torch.manual_seed(settings.seed)
    return add_adapter(load_base(settings), settings.finetune).train()


def parts(options: Finetune, rows: int, length: int) -> int:
    """In how many parts `rows` rows of `length` tokens go through the model, as fine-tuning has it."""
    return math.ceil(rows / max(1, (options.micro_batch_tokens or options.batch_tokens) // length))


def _ours(settings: Settings, examples: list[Example], groups: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> float:
    model = _model(settings)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=settings.finetune.learning_rate, fused=True
    )
    order = random.Random(settings.seed).sample(groups, len(groups))
    start = time.perf_counter()
    for group in order:
        batch = collate([examples[i] for i in group], tokenizer.pad_token_id)
        backward(model, batch, parts(settings.finetune, *batch.ids.shape))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    synchronize(device())
    return time.perf_counter() - start


def _trainer(settings: Settings, examples: list[Example], steps: int, tokenizer: PreTrainedTokenizerBase) -> float:
    rows = [
        {"input_ids": e.ids, "attention_mask": [1] * len(e.ids), "labels": [-100] * (len(e.ids) - e.reply) + e.ids[-e.reply :]}
        for e in examples
    ]
    in_step = -(-len(rows) // steps)
    # Trainer knows rows, not tokens: every part must also hold when all of its rows are as long as the longest.
    pieces = parts(settings.finetune, in_step, max(len(e.ids) for e in examples)) if settings.finetune.micro_batch_tokens else 1
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=-(-in_step // pieces),
            gradient_accumulation_steps=pieces,
            num_train_epochs=1,
            learning_rate=settings.finetune.learning_rate,
            bf16=compute_dtype(device()) == torch.bfloat16,
            use_cpu=device().type == "cpu",
            optim="adamw_torch_fused",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=settings.seed,
        )
        trainer = Trainer(
            model=_model(settings), args=arguments, train_dataset=rows, data_collator=DataCollatorForSeq2Seq(tokenizer)
        )
        trainer.remove_callback(PrinterCallback)
        return float(trainer.train().metrics["train_runtime"])
