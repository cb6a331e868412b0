"""Repairs a model of few bits: LoRA beside its frozen packed matrices learns to say again what the model said before.

Why an ML engineer does this: two bits lose much of what tuning taught, and training the whole model again at full size is what
one wanted to do without. The packed weights stay as they are; two thin bf16 matrices beside each of them learn what rounding took
away (quantisation-aware repair, as in QLoRA, Dettmers et al. 2023). The teacher is the model itself before quantisation: at every
reply token of the curated training rows the repaired one is to give the same distribution (Kullback-Leibler divergence, weighted
as in fine-tuning). That asks for no more than was there; the labels were learnt before.

A repair is a few hundred steps and starts over when it is interrupted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ml_engineer_track.curate import CuratedData
from ml_engineer_track.finetune import Batch, Example, collate, encode, out_of_memory, plan_batches, schedule
from ml_engineer_track.low_bits import linear_layers, save_low_bits
from ml_engineer_track.models import load_model, load_tokenizer
from ml_engineer_track.progress import progress
from ml_engineer_track.sensitivity import divergences, log_probabilities, read_batches, weighted_divergence
from shared.errors import UserError
from shared.files import need_disk
from shared.settings import Settings


@dataclass(frozen=True)
class Repaired:
    """A repaired model's folder and how it went. Divergences are weighted means per reply token, in nats; `loss` is by step."""

    folder: str
    rank: int
    adapter_bytes: int
    steps: int
    loss: list[float]
    validation_before: float
    validation_after: float
    seconds: float


def repair(settings: Settings, data: CuratedData, original: str, packed: str, folder: Path) -> Repaired:
    """Train LoRA beside the packed model of the folder `packed` towards the model of the folder `original`; saved in `folder`.

    UserError when it diverges or the memory does not suffice.
    """
    need_disk(folder, 100_000_000)
    tokenizer, teacher, student = load_tokenizer(original), load_model(original), load_model(packed)
    options, heavy = settings.finetune, settings.finetune.choice_weight
    rows = encode(data.rows("train"), tokenizer, heavy)
    validation = read_batches(data.rows("validation"), settings.low_bits.divergence_rows, tokenizer, heavy, options.batch_tokens)
    torch.manual_seed(settings.seed)
    return train(teacher, student, rows, validation, tokenizer, settings, folder)


def train(
    teacher: PreTrainedModel, student: PreTrainedModel, rows: Sequence[Example], validation: Sequence[Batch],
    tokenizer: PreTrainedTokenizerBase, settings: Settings, folder: Path,
) -> Repaired:  # fmt: skip
    """The loop. Both models stay in eval mode: the packed weights are frozen and LoRA here has no dropout."""
    options = settings.low_bits
    plan = plan_batches(rows, settings.finetune, settings.seed)[: options.repair_steps]
    with torch.no_grad():
        expected = log_probabilities(teacher, validation)
    before = weighted_divergence(student, validation, expected)
    layers = linear_layers(student)
    for layer in layers:
        layer.add_adapter(options.repair_rank)
    trained = [matrix for layer in layers for matrix in (layer.down, layer.up) if matrix is not None]
    optimizer = torch.optim.AdamW(trained, lr=options.repair_learning_rate)
    loss, started = [], time.perf_counter()
    with progress("repair", total=len(plan)) as bar:
        for step, chosen in enumerate(plan):
            for group in optimizer.param_groups:
                group["lr"] = options.repair_learning_rate * schedule(step, len(plan), settings.finetune.warmup_share)
            batch = collate([rows[i] for i in chosen], tokenizer.pad_token_id)
            loss.append(one_step(teacher, student, batch))
            if not math.isfinite(loss[-1]):
                raise UserError(f"the repair diverged (loss {loss[-1]})", f"step {step}", "Lower low_bits.repair_learning_rate")
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            bar.update(1, loss=f"{loss[-1]:.3f}")
    seconds = time.perf_counter() - started
    for matrix in trained:  # measured is what is stored, and it is stored in two bytes
        matrix.data = matrix.data.to(torch.bfloat16)
    after = weighted_divergence(student, validation, expected)
    save_low_bits(student, tokenizer, folder)
    return Repaired(
        folder=str(folder), rank=options.repair_rank, adapter_bytes=sum(2 * matrix.numel() for matrix in trained),
        steps=len(plan), loss=loss, validation_before=before, validation_after=after, seconds=seconds,
    )  # fmt: skip


def one_step(teacher: PreTrainedModel, student: PreTrainedModel, batch: Batch) -> float:
    """Gradients of the weighted mean divergence over a batch's reply tokens; returns it. UserError out of memory."""
    try:
        with torch.no_grad():
            expected = log_probabilities(teacher, [batch])[0]
        said = log_probabilities(student, [batch])[0]
        loss = (divergences(expected, said) * batch.weights[:, -batch.keep :]).sum() / batch.weights.sum()
        loss.backward()
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise UserError("not enough memory for one batch", "repair", "Lower finetune.batch_tokens") from None
    return float(loss.detach())
