"""Teaches the base model the four skills with LoRA, and keeps the best checkpoint.

Why an ML engineer does this: the base model can read, but it has never seen how these questions are asked or what a
decision looks like. LoRA (Hu et al. 2021) trains two thin matrices beside every projection, a few percent of the
weights; `METHOD=qlora` (Dettmers et al. 2023) does the same while the base sits in memory in 4 bits.

    python -m ml_engineer_track finetune [--preset tiny] [--method qlora]

Three things make this loop faster than `transformers.Trainer` with its default collation: rows of like length share a
batch, so little is padding; rows are padded on the *left*, so all replies end at the same place and logits are computed
for the reply only; and weights are held in bf16 where the device multiplies bf16 natively.
The loop writes a checkpoint every few steps. Started again after a crash it goes on from there, with the same data in
the same order. Several workers (`launch.py` starts them) each take their share of every step's rows (`distributed.py`).
"""

from __future__ import annotations

import math
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ml_engineer_track.checkpoint import Progress
from ml_engineer_track.curate import CuratedData, Row
from ml_engineer_track.distributed import (
    WholeOptimizer,
    adapter_writer,
    exchange,
    is_first,
    need_agreement,
    rank,
    read_adapter,
    shard,
    spread,
    total,
    world_size,
)
from ml_engineer_track.models import load_model, load_tokenizer, prompt_text, without_cpu_fast_path
from ml_engineer_track.progress import progress
from shared.chat import choices
from shared.errors import UserError
from shared.files import need_disk, write_json
from shared.hardware import compute_dtype, device, matmul_peak, synchronize
from shared.settings import Finetune, Settings


@dataclass(frozen=True)
class Tuned:
    """A trained adapter and how its training went. Losses are weighted means per reply token, in nats."""

    adapter: str
    base: str
    method: str
    steps: int
    stopped_early: bool
    resumed_at: int
    best_validation_loss: float
    validation: list[dict[str, float]]
    loss: list[float]
    seconds: float
    tokens_per_second: float
    data_wait_share: float
    mfu: float
    trainable_share: float


@dataclass(frozen=True)
class Example:
    """Token ids of one row; the last `len(weights)` of them are what the model must say, each with its loss weight."""

    ids: list[int]
    weights: list[float]

    @property
    def reply(self) -> int:
        return len(self.weights)


#: What a worker goes through when a step's rows do not go round: nothing is learnt from it.
SILENT = Example([0, 0], [0.0])


@dataclass(frozen=True)
class Batch:
    """Left-padded tensors, all (rows, length); only the last `keep` positions hold replies. `weights` is 0 elsewhere."""

    ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    keep: int

    def split(self, pieces: int) -> list[Batch]:
        """By rows, into at most `pieces` parts of nearly equal size."""
        parts = torch.arange(len(self.ids)).tensor_split(min(pieces, len(self.ids)))
        return [Batch(self.ids[p], self.mask[p], self.labels[p], self.weights[p], self.keep) for p in parts]


def finetune(settings: Settings, data: CuratedData, watch: Callable[[int, float], Any] | None = None) -> Tuned:
    """Train an adapter for `settings.model` on `data`, in `settings.work/finetune`. Resumes what it finds there.

    `watch` gets the step and the validation loss of every look; what it raises ends the run. In a process group every worker
    calls this with the same arguments; `settings.work` is one folder for all, and the first of them writes it.
    """
    options, work = settings.finetune, settings.work / "finetune"
    need_disk(work, 200_000_000)
    target = device()
    tokenizer = load_tokenizer(settings.model_path)
    torch.manual_seed(settings.seed)
    model = add_adapter(load_base(settings), options).train()
    at_once = options.micro_batch_tokens or options.batch_tokens
    train = encode(data.rows("train"), tokenizer, options.choice_weight)
    validation = batches(encode(data.rows("validation"), tokenizer, options.choice_weight), at_once, tokenizer.pad_token_id)
    plan = plan_batches(train, options, settings.seed)

    torch.manual_seed(settings.seed + rank())  # the adapter begins the same on every worker, dropout falls elsewhere
    trained = spread(model, settings.strategy)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=options.learning_rate, fused=True)
    whole = WholeOptimizer(optimizer)
    state = Progress.resume(partial(read_adapter, model), whole, work)
    first, started, seen, waited = state.step, time.perf_counter(), 0, 0.0
    need_agreement(first, work)
    if first and is_first():
        print(f"  finetune: resuming at step {first} of {len(plan)}, from {work / 'checkpoint'}")
    pieces = 1
    flops = 0.0
    with progress("finetune", total=len(plan), start=first) as bar:
        for step in range(first, len(plan)):
            before = time.perf_counter()
            rows = [train[i] for i in plan[step]]
            batch = collate(shard(rows, SILENT), tokenizer.pad_token_id)
            waited += time.perf_counter() - before
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * schedule(step, len(plan), options.warmup_share)
            longest = max(len(row.ids) for row in rows)  # of all workers' rows: they must make equally many passes
            asked = max(pieces, math.ceil(len(batch.ids) / max(1, at_once // longest)))
            loss, fitted = backward(trained, batch, asked, sum(sum(row.weights) for row in rows))
            pieces = fitted if fitted > asked else pieces
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            tokens = sum(len(row.ids) for row in rows)
            seen += tokens
            flops += tokens * lora_flops_per_token(model)
            state.step, state.loss = step + 1, [*state.loss, total(loss)]
            if (step + 1) % options.evaluate_every == 0 or step + 1 == len(plan):
                state.look(validation_loss(trained, validation), adapter_writer(model), work, "finetune.learning_rate")
                if watch:
                    watch(step + 1, state.validation[-1]["loss"])
            bar.update(1, loss=f"{state.loss[-1]:.2f}", best=f"{state.best:.3f}" if state.validation else "-")
            if (step + 1) % options.checkpoint_every == 0:
                state.save(adapter_writer(model), whole, work)
            if state.looks_without_gain >= options.patience:
                break
    synchronize(target)
    seconds = max(time.perf_counter() - started, 1e-9)
    peak = matmul_peak(target, compute_dtype(target)) * world_size()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    result = Tuned(
        adapter=str(work / "best"), base=settings.model_path, method=options.method, steps=state.step,
        stopped_early=state.step < len(plan), resumed_at=first, best_validation_loss=state.best,
        validation=state.validation, loss=state.loss, seconds=seconds, tokens_per_second=seen / seconds,
        data_wait_share=waited / seconds, mfu=flops / seconds / peak, trainable_share=trainable / model.num_parameters(),
    )  # fmt: skip
    if is_first():
        write_json(work / "training.json", asdict(result))
        shutil.rmtree(work / "checkpoint", ignore_errors=True)
    return result


def load_base(settings: Settings) -> PreTrainedModel:
    """The frozen base: full precision in the compute dtype, or NF4 for QLoRA."""
    if settings.finetune.method == "qlora":
        return without_cpu_fast_path(load_model(settings.model_path, variant="nf4"))
    return load_model(settings.model_path)


def add_adapter(model: PreTrainedModel, options: Finetune) -> PeftModel:
    """LoRA matrices in float32 beside the frozen projections."""
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=options.targets,
        task_type="CAUSAL_LM",
    )
    tuned = get_peft_model(model, config)
    if options.gradient_checkpointing:  # keeps what enters each layer and computes the rest again in the backward pass
        model.activation_checkpointing_enable()
    return tuned


def encode(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, choice_weight: float = 1.0) -> list[Example]:
    """Rows through the chat template, replies closed with the end token; tokens that decide weigh `choice_weight`.

    Every reply of a conversation is learnt; the person's turns between them weigh 0.
    """
    pieces = [(row, *piece) for row, own in enumerate(rows) for piece in _pieces(own, tokenizer)]
    encoded = tokenizer([text for _, text, _ in pieces], add_special_tokens=False, return_offsets_mapping=True)
    examples = [Example([], []) for _ in rows]
    for (row, text, is_reply), ids, offsets in zip(pieces, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        example = examples[row]
        if is_reply:
            spans = choices(text.removesuffix(tokenizer.eos_token))
            example.weights.extend(choice_weight if any(s < b and a < e for a, b in spans) else 1.0 for s, e in offsets)
        elif example.ids:
            example.weights.extend([0.0] * len(ids))
        example.ids.extend(ids)
    return examples


def _pieces(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """The text of a row cut into (given, False) and (to be said, True); only the last reply where a template rewrites turns."""
    pieces: list[tuple[str, bool]] = []
    done = ""
    for end in range(1, len(row.messages) + 1, 2):
        prompt = prompt_text(tokenizer, row.messages[:end])
        reply = (row.messages[end]["content"] if end < len(row.messages) else row.reply) + tokenizer.eos_token
        if not prompt.startswith(done):
            pieces, done = [], ""
        pieces += [(prompt[len(done) :], False), (reply, True)]
        done = prompt + reply
    return pieces


def plan_batches(examples: Sequence[Example], options: Finetune, seed: int) -> list[list[int]]:
    """Row numbers of every step of the run: a pure function of data and seed, so a resumed run repeats nothing."""
    per_epoch = bucket(examples, options.batch_tokens, options.batch_rows)
    steps = max(1, round(options.epochs * len(per_epoch)))
    plan: list[list[int]] = []
    while len(plan) < steps:
        epoch = list(per_epoch)
        random.Random(f"{seed}/{len(plan)}").shuffle(epoch)
        plan += epoch
    return plan[:steps]


def bucket(examples: Sequence[Example], batch_tokens: int, batch_rows: int | None = None) -> list[list[int]]:
    """Rows sorted by length and cut so that rows x longest stays within `batch_tokens`, and rows within `batch_rows`."""
    order = sorted(range(len(examples)), key=lambda i: (len(examples[i].ids), i))
    groups: list[list[int]] = [[]]
    for i in order:
        full = len(groups[-1]) == batch_rows or (len(groups[-1]) + 1) * len(examples[i].ids) > batch_tokens
        if groups[-1] and full:
            groups.append([])
        groups[-1].append(i)
    return groups


def batches(examples: Sequence[Example], batch_tokens: int, pad: int) -> list[Batch]:
    """All examples, or this worker's share of them, in batches of rows of like length."""
    return [collate(shard([examples[i] for i in group], SILENT), pad) for group in bucket(examples, batch_tokens)]


def collate(examples: Sequence[Example], pad: int) -> Batch:
    """Pad on the left: replies end together at the right edge. Labels are -100 outside replies."""
    length, target = max(len(e.ids) for e in examples), device()
    ids = torch.full((len(examples), length), pad)
    labels = torch.full((len(examples), length), -100)
    mask = torch.zeros((len(examples), length), dtype=torch.long)
    weights = torch.zeros((len(examples), length))
    for row, example in enumerate(examples):
        ids[row, length - len(example.ids) :] = torch.tensor(example.ids)
        mask[row, length - len(example.ids) :] = 1
        labels[row, length - example.reply :] = torch.tensor(example.ids[-example.reply :])
        weights[row, length - example.reply :] = torch.tensor(example.weights)
    return Batch(ids.to(target), mask.to(target), labels.to(target), weights.to(target), max(e.reply for e in examples))


def reply_losses(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, float]:
    """Weighted sum of the cross-entropy over reply tokens (nats), and the sum of the weights."""
    logits = reply_logits(model, batch)
    labels = batch.labels[:, -batch.keep :]
    losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="none")
    weights = batch.weights[:, -batch.keep :].flatten()
    return (losses * weights).sum(), float(weights.sum())


def reply_logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Logits (rows, keep, vocab) of the last `keep` tokens, each from the position before it."""
    target = batch.ids.device
    dtype = compute_dtype(target)
    positions = (batch.mask.cumsum(-1) - 1).clamp(min=0)
    with torch.autocast(target.type, dtype, enabled=dtype != torch.float32):
        logits = model(
            input_ids=batch.ids, attention_mask=batch.mask, position_ids=positions, use_cache=False, logits_to_keep=batch.keep + 1
        ).logits
    return logits[:, :-1]


def backward(model: torch.nn.Module, batch: Batch, pieces: int, weight: float | None = None) -> tuple[float, int]:
    """Gradients of the mean reply loss of a batch, in `pieces` parts; too little memory halves the parts and says so.

    `weight` is what the losses of all workers' rows weigh together, when this batch is one worker's share of a step. Returns
    the loss (the share's part of the mean) and the number of parts that fitted. The gradient does not depend on the number of
    parts or workers. UserError when a single row does not fit.
    """
    weight = weight or float(batch.weights.sum())
    while True:
        try:
            loss = 0.0
            parts = batch.split(pieces)
            for number, part in enumerate(parts, start=1):
                with exchange(model, now=number == len(parts)):
                    summed, _ = reply_losses(model, part)
                    (summed * world_size() / weight).backward()  # workers' gradients are averaged; this makes it their sum
                loss += float(summed.detach())
            return loss / weight, pieces
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            if world_size() > 1:  # the others are in the middle of an exchange, and cannot begin again
                where = f"a worker's {len(batch.ids)} rows of {batch.ids.shape[1]} tokens"
                raise UserError("not enough memory", where, "Set VRAM_GB, or use more WORKERS") from None
            model.zero_grad(set_to_none=True)
            if pieces >= len(batch.ids):
                where = f"a row of {batch.ids.shape[1]} tokens"
                raise UserError(
                    "not enough memory for one row", where, "Lower curate.max_prompt_tokens or use METHOD=qlora"
                ) from None
            pieces *= 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            print(f"  finetune: not enough memory for {len(batch.ids)} rows at once, going on in {pieces} parts")


@torch.no_grad()
def validation_loss(model: torch.nn.Module, validation: Sequence[Batch]) -> float:
    """Weighted mean cross-entropy per reply token over the given batches, in nats."""
    model.eval()
    sums = [reply_losses(model, batch) for batch in validation]
    model.train()
    return total(sum(float(loss) for loss, _ in sums)) / total(sum(n for _, n in sums))


def schedule(step: int, steps: int, warmup_share: float) -> float:
    """Learning-rate factor: linear warm-up, then cosine from 1 to 0.1."""
    warmup = max(1, round(steps * warmup_share))
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def lora_flops_per_token(model: PeftModel) -> float:
    """4 FLOPs per frozen weight (forward, and backward to the inputs) and 6 per trained one."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return 4.0 * (model.num_parameters() - trained) + 6.0 * trained


def out_of_memory(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in text or "can't allocate memory" in text
