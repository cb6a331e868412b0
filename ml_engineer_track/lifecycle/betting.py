"""Tests that may be looked at after every message: bets against "nothing changed".

Why not a test each hour: at a level of 1 % one that is made 168 times a week cries wolf in far more than 1 % of weeks
(`drift_study.py` measures it). A bet has no such level for a look. A bettor starts a round with a wealth of 1 and stakes part of
it on every message: that some function of it is larger than the same function of reference messages that nothing was bet on
yet. While messages and reference come from one distribution no stake is worth anything on average, whatever was learnt before,
so the wealth is a martingale and ever reaches 1 / alpha with probability alpha at most (Ville 1939). That holds over all looks of
a round, however many there are.

Betting on two samples: Shekhar & Ramdas, *Nonparametric two-sample testing by betting* (IEEE Trans. Information Theory 70,
2024). The mean of several such wealths is one, too, however the tests depend on each other (Vovk & Wang, *E-values: calibration,
combination and applications*, Annals of Statistics 49, 2021).

Messages are arrays here, in the order of time. A function learns from *whole blocks before* a message's own, so that a round's
wealth after a message never depends on a later one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

#: messages between two lessons of what is learnt on the way
BLOCK = 10
#: about how many messages the reference is dealt to: early ones are compared with 1 / HORIZON of it each, later ones with less
HORIZON = 800
#: stakes, as shares of the wealth; it is divided among bettors who keep to one of them each
STAKES = np.array([0.05, 0.1, 0.2, 0.4, 0.8])
#: rows of a category that are added to both sides before frequencies are compared
SMOOTHING = 10.0


@dataclass(frozen=True)
class Deal:
    """Which reference messages every message is compared with; each is dealt once. `rows` of message t begin at `starts[t]`."""

    rows: Array
    starts: Array

    @property
    def of(self) -> Array:
        """For every dealt row the message it was dealt to."""
        return np.repeat(np.arange(len(self.starts)), np.diff([*self.starts, len(self.rows)]))

    def mean(self, values: Array) -> Array:
        """(messages,) mean of `values`, one for each dealt row, over a message's rows; NaNs do not count, NaN where all are."""
        known = ~np.isnan(values)
        sums = np.add.reduceat(np.where(known, values, 0.0), self.starts)
        counts = np.add.reduceat(known.astype(float), self.starts)
        return np.where(counts > 0, sums / np.maximum(counts, 1.0), np.nan)


def deal(reference: int, messages: int, seed: int) -> Deal:
    """Shuffled reference rows for at most `messages` messages, fewer when the reference is used up: a round ends there.

    How many a message gets follows from how many are left, never from how many messages will come.
    """
    sizes, left = [], reference
    while left and len(sizes) < messages:
        sizes.append(max(1, left // HORIZON))
        left -= sizes[-1]
    rows = np.random.default_rng(seed).permutation(reference)[: sum(sizes)]
    return Deal(rows, np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(int) if sizes else np.zeros(0, int))


def log_wealth(payoffs: Array, two_sided: bool) -> Array:
    """(n,) natural log of the wealth after each message. `payoffs` lie in [-1, 1] and are 0 on average if nothing changed.

    A NaN is a message that says nothing. `two_sided` bets on smaller as well as on larger.
    """
    stakes = np.concatenate([STAKES, -STAKES]) if two_sided else STAKES
    grown = np.cumsum(np.log1p(np.outer(np.nan_to_num(payoffs), stakes)), axis=0)
    top = grown.max(axis=1, keepdims=True)
    return np.asarray(top[:, 0] + np.log(np.exp(grown - top).mean(axis=1)))


def bet_on_mean(now: Array, before: Array, dealt: Deal) -> Array:
    """Payoffs for values in [0, 1]: how much larger than its reference each one is."""
    return np.asarray(now - dealt.mean(before[dealt.rows]))


def bet_on_categories(now: Array, before: Array, dealt: Deal, categories: int) -> Array:
    """Payoffs for categories 0, 1, ... (-1: none): those that were more frequent so far than in the reference are bet on."""
    theirs = before[dealt.rows]
    block, their_block = np.arange(len(now)) // BLOCK, dealt.of // BLOCK
    ours, others = _counts_before(now, block, categories), _counts_before(theirs, their_block, categories)
    pooled = (ours + others + 1.0) / (ours + others + 1.0).sum(axis=1, keepdims=True)
    ours = (ours + SMOOTHING * pooled) / (ours.sum(axis=1, keepdims=True) + SMOOTHING)
    others = (others + SMOOTHING * pooled) / (others.sum(axis=1, keepdims=True) + SMOOTHING)
    liking = np.clip(0.5 * np.log(ours / others), -0.5, 0.5)  # (blocks, categories)
    mine = np.where(now >= 0, liking[block, now], np.nan)
    return np.asarray(mine - dealt.mean(np.where(theirs >= 0, liking[their_block, theirs], np.nan)))


def bet_on_meaning(now: Array, before: Array, dealt: Deal) -> Array:
    """Payoffs for rows of kernel features: what resembles the messages so far more than the reference so far is bet on.

    That is the witness function of the maximum mean discrepancy (Gretton et al. 2012), learnt on the way. NaN rows say nothing.
    """
    theirs = before[dealt.rows]
    block, their_block = np.arange(len(now)) // BLOCK, dealt.of // BLOCK
    witness = _means_before(now, block) - _means_before(theirs, their_block)  # (blocks, features)
    mine = np.einsum("nd,nd->n", now, witness[block])
    other = np.einsum("nd,nd->n", theirs, witness[their_block])
    squares = np.bincount(their_block, np.nan_to_num(other) ** 2, block[-1] + 1)
    known = np.bincount(their_block, ~np.isnan(other), block[-1] + 1)
    spread = np.sqrt((np.cumsum(squares) - squares) / np.maximum(np.cumsum(known) - known, 1))
    scale = 4.0 * np.maximum(spread, 1e-9)  # from earlier blocks; what lies beyond two spreads counts as two
    liking, theirs_liking = np.clip(mine / scale[block], -0.5, 0.5), np.clip(other / scale[their_block], -0.5, 0.5)
    enough = spread > 0
    return np.asarray(np.where(enough[block], liking - dealt.mean(theirs_liking), np.nan))


def _counts_before(values: Array, block: Array, categories: int) -> Array:
    """(blocks, categories) how often each category occurred before each block."""
    counts = np.zeros((int(block[-1]) + 1, categories))
    known = values >= 0
    np.add.at(counts, (block[known], values[known]), 1.0)
    return np.asarray(np.cumsum(counts, axis=0) - counts)


def _means_before(rows: Array, block: Array) -> Array:
    """(blocks, features) the mean of the rows before each block; 0 before the first."""
    known = ~np.isnan(rows[:, 0])
    firsts = np.searchsorted(block, np.arange(int(block[-1]) + 1))
    sums = np.add.reduceat(np.where(known[:, None], rows, 0.0), firsts, axis=0)
    counts = np.add.reduceat(known.astype(float), firsts)
    return np.asarray((np.cumsum(sums, axis=0) - sums) / np.maximum(np.cumsum(counts) - counts, 1.0)[:, None])
