"""What the teacher thinks of every token of the training rows, written down once: its likeliest tokens and their probabilities.

Why an ML engineer caches it: the teacher is several times as expensive as the student and says the same in every epoch. All its
logits would be the vocabulary times as large as the text; the `top_k` likeliest tokens hold nearly all of the probability, and
the rest is kept as one number, so that the student also learns how much is left.

Two memory-mapped NumPy files, one line per token to predict, in the order of the rows:

    ids.npy          (tokens, k)      the likeliest tokens, the likeliest first
    log_probs.npy    (tokens, k + 1)  their log probabilities at the temperature, and that of all others together, float16

`progress.json` counts the batches that are safely on the disk. Started again after a crash the cache goes on from there; one of
another teacher, temperature or text is thrown away.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from transformers import PreTrainedModel

from ml_engineer_track.finetune import Batch, Example, bucket, collate, reply_logits
from ml_engineer_track.progress import progress
from shared.files import need_disk, sha256_text, write_json
from shared.hardware import device

#: Batches between two looks at the disk: what a crash can cost.
FLUSH_EVERY = 20
#: Log probability of what is as good as impossible; float16 and the arithmetic on it stay finite.
FLOOR = -30.0


@dataclass(frozen=True)
class TeacherCache:
    """The two files, and where each example's lines begin."""

    ids: np.ndarray[Any, Any]
    log_probs: np.ndarray[Any, Any]
    starts: list[int]

    def batch(self, chosen: Sequence[int], keep: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids (rows, keep, k) and log probabilities (rows, keep, k + 1) of some examples, right-aligned like a Batch.

        Positions before an example's first prediction hold finite values that mean nothing; a Batch weighs them 0.
        """
        k = self.ids.shape[1]
        ids = np.zeros((len(chosen), keep, k), dtype=np.int64)
        log_probs = np.full((len(chosen), keep, k + 1), FLOOR, dtype=np.float32)
        for row, example in enumerate(chosen):
            lines = slice(self.starts[example], self.starts[example + 1])
            length = lines.stop - lines.start
            ids[row, keep - length :] = self.ids[lines]
            log_probs[row, keep - length :] = self.log_probs[lines]
            ids[row, : keep - length] = np.arange(k)  # distinct, as in every real line
        target = device()
        return torch.from_numpy(ids).to(target), torch.from_numpy(log_probs).to(target)


def teacher_cache(
    folder: Path, examples: Sequence[Example], teacher: PreTrainedModel, weights: str, pad: int, top_k: int, temperature: float,
    batch_tokens: int,
) -> TeacherCache:  # fmt: skip
    """The cache of these examples in `folder`, made or completed where lines are missing.

    `weights` is a hash of the teacher's. UserError when the disk is too small.
    """
    vocab = teacher.config.vocab_size
    top_k = min(top_k, vocab - 1)
    starts = list(accumulate((example.reply for example in examples), initial=0))
    text = sha256_text(json.dumps([[e.ids, e.reply] for e in examples]))
    key = sha256_text(json.dumps([weights, text, top_k, temperature, batch_tokens]))
    plan = bucket(examples, batch_tokens)
    kind = np.uint16 if vocab <= 2**16 else np.uint32
    done, files = _resume(folder, key, (starts[-1], top_k), kind)
    if files is None:
        need_disk(folder, starts[-1] * (top_k * np.dtype(kind).itemsize + 2 * (top_k + 1)))
        files = _create(folder, (starts[-1], top_k), kind)
        write_json(folder / "progress.json", {"key": key, "done": 0})
    ids, log_probs = files
    if done < len(plan):
        if done:
            print(f"  teacher's view: resuming at batch {done} of {len(plan)}", flush=True)
        with progress("teacher's view", total=len(plan), start=done) as bar:
            for number in range(done, len(plan)):
                chosen = plan[number]
                likeliest, values = view_of(teacher, collate([examples[i] for i in chosen], pad), top_k, temperature)
                for row, example in enumerate(chosen):
                    lines = slice(starts[example], starts[example + 1])
                    ids[lines] = likeliest[row, -examples[example].reply :]
                    log_probs[lines] = values[row, -examples[example].reply :]
                bar.update(1)
                if (number + 1) % FLUSH_EVERY == 0 or number + 1 == len(plan):
                    ids.flush()
                    log_probs.flush()
                    write_json(folder / "progress.json", {"key": key, "done": number + 1})
    return TeacherCache(ids, log_probs, starts)


@torch.no_grad()
def view_of(
    model: PreTrainedModel, batch: Batch, top_k: int, temperature: float
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Ids (rows, keep, k) and log probabilities at `temperature` (rows, keep, k + 1); the last one is of everything else."""
    scaled = reply_logits(model, batch).float() / temperature
    best = scaled.topk(top_k, dim=-1)
    rest = scaled.scatter(-1, best.indices, float("-inf")).logsumexp(-1, keepdim=True)
    values = (torch.cat([best.values, rest], dim=-1) - scaled.logsumexp(-1, keepdim=True)).clamp(min=FLOOR)
    return best.indices.cpu().numpy(), values.cpu().numpy()


def _create(folder: Path, shape: tuple[int, int], kind: Any) -> tuple[Any, Any]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    ids = open_memmap(folder / "ids.npy", mode="w+", dtype=kind, shape=shape)
    return ids, open_memmap(folder / "log_probs.npy", mode="w+", dtype=np.float16, shape=(shape[0], shape[1] + 1))


def _resume(folder: Path, key: str, shape: tuple[int, int], kind: Any) -> tuple[int, tuple[Any, Any] | None]:
    """How many batches of this very cache are on the disk, and its files; (0, None) when there is none to go on with."""
    try:
        last = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
        for name in ("ids.npy", "log_probs.npy"):
            np.load(folder / name, mmap_mode="r")  # a short file is refused here; opened for writing it would be filled up
        ids, log_probs = (np.load(folder / name, mmap_mode="r+") for name in ("ids.npy", "log_probs.npy"))
    except (OSError, ValueError):  # missing, not JSON, or shorter than its header says
        return 0, None
    if last.get("key") != key or ids.shape != shape or ids.dtype != kind or log_probs.shape != (shape[0], shape[1] + 1):
        return 0, None
    return int(last["done"]), (ids, log_probs)
