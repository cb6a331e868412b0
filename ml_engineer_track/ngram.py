"""A 5-gram language model over tokens: the yardstick a neural model must clear by a margin to be called one.

Interpolated Witten-Bell smoothing (Witten & Bell 1991; Chen & Goodman 1999, section 2.5): the chance of falling back to a
shorter history is the number of different tokens seen after the long one. Counts are sorted arrays, looked up by bisection.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class _Order:
    """Counts of one order: n-grams with their counts, and their histories with totals and numbers of different followers."""

    grams: np.ndarray
    counts: np.ndarray
    histories: np.ndarray
    totals: np.ndarray
    followers: np.ndarray


class NGram:
    """Trained on one flat array of token ids; `order` is the length of the longest n-gram."""

    def __init__(self, tokens: np.ndarray, vocab: int, order: int = 5) -> None:
        self.vocab, self.order = vocab, order
        tokens = tokens.astype(np.uint64)
        self.orders = [self._count(tokens, n) for n in range(1, order + 1)]

    def nats(self, tokens: np.ndarray) -> float:
        """Negative log-likelihood of a token sequence, in nats, with shorter histories at its beginning."""
        tokens = tokens.astype(np.uint64)
        probability = np.full(len(tokens), 1.0 / self.vocab)
        for n, known in enumerate(self.orders, start=1):
            if len(tokens) < n:
                break
            grams = _hash(tokens, n)
            histories = _hash(tokens, n - 1)[: len(grams)] if n > 1 else np.zeros(len(grams), dtype=np.uint64)
            counts = _lookup(known.grams, known.counts, grams)
            totals = _lookup(known.histories, known.totals, histories)
            followers = _lookup(known.histories, known.followers, histories)
            place = slice(n - 1, None)
            mixed = (counts + followers * probability[place]) / np.maximum(totals + followers, 1)
            probability[place] = np.where(totals > 0, mixed, probability[place])
        return float(-np.log(probability).sum())

    @staticmethod
    def _count(tokens: np.ndarray, n: int) -> _Order:
        hashed = _hash(tokens, n)
        grams, first, counts = np.unique(hashed, return_index=True, return_counts=True)
        before = _hash(tokens, n - 1)[first] if n > 1 else np.zeros(len(grams), dtype=np.uint64)
        histories, place, followers = np.unique(before, return_inverse=True, return_counts=True)
        totals = np.bincount(place, weights=counts)
        return _Order(grams, counts, histories, totals, followers)


def _hash(tokens: np.ndarray, n: int) -> np.ndarray:
    """64-bit hashes of all runs of `n` tokens; with millions of n-grams collisions are too rare to matter."""
    result = np.full(len(tokens) - n + 1, 14695981039346656037, dtype=np.uint64)
    for k in range(n):
        with np.errstate(over="ignore"):
            result = (result ^ (tokens[k : len(tokens) - n + 1 + k] + np.uint64(1))) * np.uint64(0x9E3779B97F4A7C15)
            result ^= result >> np.uint64(29)
    return result


def _lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0).astype(np.float64)
