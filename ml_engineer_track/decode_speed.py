"""How many times as fast one model decodes as another: plain greedy decoding to a fixed length, the sides taking turns.

Why an ML engineer measures it like this: a grammar decides most tokens of a reply by itself and would hide the model; replies
that end where they like compare lengths, not speed; and sides measured one after the other compare two moods of the machine. Here
both sides answer the same prompt right after each other, in changing order, and the ratio is taken over such pairs, with an
interval.

    python -m ml_engineer_track distill      (its benchmark)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel

from ml_engineer_track.benchmark import one_run
from ml_engineer_track.progress import progress
from shared.metrics import Estimate, estimate_ratio

#: Seconds that decoding a fixed number of tokens after a prompt took, by the number of the prompt.
Turn = Callable[[int], float]


@dataclass(frozen=True)
class SpeedUp:
    """`ratio` is the second side's throughput over the first's; `seconds` are those of every turn, by side."""

    new_tokens: int
    turns: int
    throughput: dict[str, float]
    ratio: Estimate
    seconds: dict[str, list[float]]


def take_turns(
    sides: Mapping[str, Turn], prompts: int, new_tokens: int, repeats: int, resamples: int, seed: int, what: str
) -> SpeedUp:
    """Two sides, slower one first; every prompt `repeats` times by both, after a round that is not counted."""
    first, second = sides
    seconds: dict[str, list[float]] = {first: [], second: []}
    with progress(f"speed, {what}", total=(repeats + 1) * prompts) as bar:
        for repeat in range(repeats + 1):
            for prompt in range(prompts):
                for name in (first, second) if (repeat + prompt) % 2 else (second, first):
                    passed = sides[name](prompt)
                    if repeat:
                        seconds[name].append(passed)
                bar.update(1)
    turns = repeats * prompts
    throughput = {name: turns * new_tokens / sum(times) for name, times in seconds.items()}
    ratio = estimate_ratio(seconds[first], seconds[second], resamples, seed)
    return SpeedUp(new_tokens, turns, throughput, ratio, seconds)


def in_transformers(model: PreTrainedModel, prompt_tokens: int, new_tokens: int) -> Turn:
    """One request after a prompt of `prompt_tokens`; only the steps of `new_tokens` tokens after the first are timed."""
    return lambda _: sum(one_run(model, 1, prompt_tokens, new_tokens + 1)["itl"])
