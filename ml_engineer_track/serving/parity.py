"""Golden replies: what this very variant said when it was published, and whether it says the same now.

Why an ML engineer insists: "the model behaves differently once it is served" is what users of fine-tuning tools report
most: another chat template, a lost stop token, a quantisation that went wrong. A server that cannot repeat the golden
replies token by token does not become ready.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from transformers import PreTrainedTokenizerBase

from ml_engineer_track.models import prompt_text
from ml_engineer_track.serving.engine import Engine, Generation
from shared.chat import Message
from shared.errors import UserError
from shared.handoff import Golden

#: a place, the token expected there and the one found; None is the end
Difference = tuple[int, int | None, int | None]


async def greedy(engine: Engine, prompt: list[int], max_tokens: int) -> list[int]:
    """One greedy reply, alone in the engine. RuntimeError when the engine fails."""
    stream = engine.submit(Generation(prompt, max_tokens))
    ids = [token.id async for tokens in stream for token in tokens]
    if stream.error:
        raise RuntimeError(stream.error)
    return ids


async def replies(
    engine: Engine, tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[Message]], max_tokens: int
) -> list[list[int]]:
    """Greedy replies, one prompt at a time: batching may change the last bit of a logit, and with it a token."""
    prompts = [tokenizer(prompt_text(tokenizer, c), add_special_tokens=False)["input_ids"] for c in conversations]
    return [await greedy(engine, prompt, max_tokens) for prompt in prompts]


async def check(engine: Engine, tokenizer: PreTrainedTokenizerBase, name: str, golden: Sequence[Golden]) -> None:
    """UserError naming the prompt and the first token that differ from the published ones."""
    for number, wanted in enumerate(golden, start=1):
        got = (await replies(engine, tokenizer, [wanted.messages], wanted.max_tokens))[0]
        if difference := first_difference(wanted.token_ids, got):
            raise differs(
                tokenizer, number, len(golden), wanted, difference, f"variant {name}",
                "Do not serve it; publish the model again on this machine",
            )  # fmt: skip


def differs(
    tokenizer: PreTrainedTokenizerBase, number: int, of: int, wanted: Golden, difference: Difference, where: str, fix: str
) -> UserError:
    """What to say of golden prompt `number` of `of`."""
    place, expected, found = difference
    said = [repr(tokenizer.decode([i])) if i is not None else "the end" for i in (expected, found)]
    return UserError(
        f"golden prompt {number} of {of} ({wanted.messages[-1]['content'].splitlines()[-1][:60]!r}) is answered "
        f"differently from token {place + 1} on: {said[1]} instead of {said[0]}",
        where, fix,
    )  # fmt: skip


def first_difference(expected: Sequence[int], found: Sequence[int]) -> Difference | None:
    """Place and tokens of the first difference; None when there is none."""
    for place, (a, b) in enumerate(zip_longest(expected, found)):
        if a != b:
            return place, a, b
    return None
