"""How much each matrix of a model minds being held in few bits, measured; and the bits that follow from it.

Why an ML engineer measures this: matrices differ by orders of magnitude in what rounding them does to the model's words, and
neither their size nor their place tells which. So each is quantised alone, all others left as they are, and the model reads
calibration rows of the train split. The figure is the Kullback-Leibler divergence of its next-token distribution from the
untouched model's, over the reply tokens, weighted as in training (the tokens that decide count most).

Which bits follow is a knapsack with one choice per matrix: the least sum of divergences that fits a number of bytes. That the
divergences of several matrices add up is an assumption (true for small ones, where the divergence is quadratic and the matrices'
effects are nearly uncorrelated); the evaluation of the whole model afterwards says how far it held.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ml_engineer_track.curate import Row
from ml_engineer_track.finetune import Batch, batches, encode, reply_logits
from ml_engineer_track.half_quadratic import LowBitMatrix, matrix_bytes
from ml_engineer_track.low_bits import matrices
from ml_engineer_track.progress import progress
from shared.errors import UserError

#: Divergence in nats by matrix and bits.
Sensitivity = dict[str, dict[int, float]]


@torch.no_grad()
def measure_sensitivity(model: PreTrainedModel, calibration: Sequence[Batch], choices: Sequence[int], group: int) -> Sensitivity:
    """What quantising each matrix alone does, the embedding included, at each number of bits. The model ends as it was."""
    found: Sensitivity = {}
    expected = log_probabilities(model, calibration)
    asked = matrices(model, everywhere=True)
    with progress("sensitivity", total=len(asked) * len(choices)) as bar:
        for name, module in asked.items():
            own = module.weight.data
            found[name] = {}
            for bits in choices:
                module.weight.data = LowBitMatrix.of(own, bits, group).dense(own.dtype)
                found[name][bits] = weighted_divergence(model, calibration, expected)
                bar.update(1)
            module.weight.data = own
    return found


def log_probabilities(model: PreTrainedModel, read: Sequence[Batch]) -> list[torch.Tensor]:
    """By batch (rows, keep, vocab), float32: the next-token distribution before each of the last `keep` tokens."""
    return [reply_logits(model, batch).float().log_softmax(-1) for batch in read]


def divergences(expected: torch.Tensor, said: torch.Tensor) -> torch.Tensor:
    """KL(expected || said) in nats by position, of log probabilities (..., vocab)."""
    return (expected.exp() * (expected - said)).sum(-1)


@torch.no_grad()
def weighted_divergence(model: PreTrainedModel, read: Sequence[Batch], expected: Sequence[torch.Tensor]) -> float:
    """The divergence from what is expected, as a weighted mean over reply tokens."""
    total = weights = 0.0
    for batch, right in zip(read, expected, strict=True):
        by_place = divergences(right, log_probabilities(model, [batch])[0])
        heavy = batch.weights[:, -batch.keep :]
        total += float((by_place * heavy).sum())
        weights += float(heavy.sum())
    return total / weights


@torch.no_grad()
def row_divergences(model: PreTrainedModel, original: PreTrainedModel, read: Sequence[Batch]) -> list[float]:
    """The divergence of a model from its original by row, each a weighted mean over the row's reply tokens."""
    found: list[float] = []
    for batch in read:
        by_place = divergences(*(log_probabilities(side, [batch])[0] for side in (original, model)))
        heavy = batch.weights[:, -batch.keep :]
        found += ((by_place * heavy).sum(1) / heavy.sum(1)).tolist()
    return found


def choose_bits(sensitivity: Sensitivity, sizes: dict[str, dict[int, int]], budget: int) -> dict[str, int]:
    """The bits of every matrix with the least sum of divergences among all choices of at most `budget` bytes.

    `sizes` are bytes by matrix and bits. UserError when even the fewest bits need more.
    """
    least = sum(min(size.values()) for size in sizes.values())
    if least > budget:
        raise UserError(
            f"{budget:,} bytes are too few: the fewest bits need {least:,}", "low_bits.mixed_like", "Raise it, or low_bits.group"
        )
    options = [(name, bits) for name, by_bits in sensitivity.items() for bits in by_bits]
    loss = np.array([sensitivity[name][bits] for name, bits in options])
    one_each = np.array([[name == own for own, _ in options] for name in sensitivity], dtype=float)
    # In units that divide every size: the solver's tolerance is then far below one of them, and the budget holds to the byte.
    unit = math.gcd(*(sizes[name][bits] for name, bits in options))
    weight = np.array([sizes[name][bits] // unit for name, bits in options], dtype=float)
    solved = milp(
        loss / max(float(loss.max()), 1e-30),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(weight[None, :], -np.inf, budget // unit)],
        integrality=np.ones(len(options)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-6, "time_limit": 60},
    )
    return {name: bits for (name, bits), chosen in zip(options, solved.x, strict=True) if chosen > 0.5}


def sizes_of(model: PreTrainedModel, choices: Sequence[int], group: int) -> dict[str, dict[int, int]]:
    """Bytes of every matrix at each number of bits."""
    shapes = {name: module.weight.shape for name, module in matrices(model, everywhere=True).items()}
    return {name: {bits: matrix_bytes(*shape, bits, group) for bits in choices} for name, shape in shapes.items()}


def read_batches(
    rows: Sequence[Row], count: int, tokenizer: PreTrainedTokenizerBase, choice_weight: float, batch_tokens: int
) -> list[Batch]:
    """At most `count` rows spread over the skills, as batches."""
    every = max(1, len(rows) // count)
    chosen = rows[every // 2 :: every][:count]
    return batches(encode(chosen, tokenizer, choice_weight), batch_tokens, tokenizer.pad_token_id)
