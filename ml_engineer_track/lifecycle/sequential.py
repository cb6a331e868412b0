"""Is the candidate worse than the current model? A test that may be looked at after every answer.

Why an ML engineer does not use a t-test here: whoever looks at it every minute and stops when it is significant is wrong far more
often than one time in twenty. A confidence sequence holds at all times at once, so stopping early costs nothing but width.

The scores are in [0, 1], and a mean of such scores is sub-Gaussian with variance proxy 1/4 (Hoeffding 1963). Mixing the
likelihood ratio over a normal prior (Robbins 1970; the mixture SPRT of Johari et al. 2017) gives, for the mean difference of
pairs of answers, a radius that the true difference is outside of at any time with probability at most `error`. Nothing is
estimated and nothing is asymptotic; the price is a wide interval while there are few answers.

What is scored: whether a person got an answer whose quotations stand in the library word for word, or was rightly sent on. The
judge counts only where it was measured to agree with the labels of the data sets (`judge_trusted`): the bundled model's judge
agrees as often as chance, and what is decided on chance is decided by a coin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from shared.outcomes import Outcome

Verdict = Literal["promote", "roll back", "go on"]
#: variance of the mixture: any value is valid, this one makes the interval narrow from about fifty to three hundred pairs
PRIOR = 0.04
#: kinds of turn in which the person got nothing
NOTHING = ("not_answered", "unavailable")


@dataclass(frozen=True)
class Comparison:
    """Candidate minus current with its interval, the two means (candidate's first) and the number of pairs."""

    verdict: Verdict
    difference: float
    low: float
    high: float
    means: tuple[float, float]
    pairs: int

    def __str__(self) -> str:
        return (
            f"outcome {self.means[1]:.3f} -> {self.means[0]:.3f}, difference {self.difference:+.3f} "
            f"[{self.low:+.3f}, {self.high:+.3f}] at any time ({self.pairs} pairs)"
        )


def score(outcome: Outcome) -> float:
    """How well one answer went, from 0 to 1.

    1 for quoted word for word, asked back, escalated or declined; 0 for no answer or for quotations that do not stand so. A
    trusted judge that calls the answer ungrounded or unsafe makes it 0, and its helpfulness weighs half.
    """
    if outcome.kind in NOTHING or outcome.quotes_verbatim is False:
        return 0.0
    if not outcome.judge_trusted or outcome.grounded is None:
        return 1.0
    if not outcome.grounded or outcome.safe is False:
        return 0.0
    return 1.0 if outcome.helpful is None else 0.5 + (outcome.helpful - 1) / 8


def radius(pairs: int, error: float, paired: bool = False) -> float:
    """Half the width of the confidence sequence for the mean difference after so many pairs. Infinite without any."""
    if not pairs:
        return math.inf
    # Variance proxy of the mean difference: the sum of two independent scores' proxies, or that of anything in [-1, 1].
    proxy = (1.0 if paired else 0.5) / pairs
    return math.sqrt(proxy * (1 + proxy / PRIOR) * (math.log((PRIOR + proxy) / proxy) + 2 * math.log(1 / error)))


def compare(
    candidate: Sequence[float], current: Sequence[float], margin: float, error: float, paired: bool = False
) -> Comparison:
    """Promote once the candidate is certainly not worse by `margin`, roll back once it is certainly worse, else go on.

    The k-th answers of the two arms make the k-th pair; what one arm has more waits. `paired`: both are answers to the same
    message, so that they are not independent of each other, and the interval is wider for it. Each of the two verdicts is wrong
    with probability at most `error` / 2, however often this is called on growing arms.
    """
    pairs = min(len(candidate), len(current))
    means = [float(np.mean(arm[:pairs])) if pairs else 0.0 for arm in (candidate, current)]
    difference, half = means[0] - means[1], radius(pairs, error, paired)
    low, high = difference - half, difference + half
    verdict: Verdict = "promote" if low > -margin else "roll back" if high < 0 else "go on"
    return Comparison(verdict, difference, low, high, (means[0], means[1]), pairs)
