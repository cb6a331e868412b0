"""The server's CPU engine without the server: how a GGUF variant is asked while it is evaluated and published.

Why an ML engineer measures through the engine that serves: it has kernels, rounding and a grammar compiler of its own, and what
users will get is what this engine says, not what the weights would have said elsewhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ml_engineer_track.models import prompt_text
from ml_engineer_track.progress import progress
from ml_engineer_track.serving.catalog import Entry, Limits, build
from ml_engineer_track.serving.completions import Served
from ml_engineer_track.serving.engine import Generation
from ml_engineer_track.serving.grammar import Constraint
from shared.chat import Message

#: Everything is asked at once, so the queue has no end here; cache and batch are those of the server.
LIMITS = Limits(max_waiting=10**9)


@contextmanager
def started(folder: Path) -> Iterator[Served]:
    """The GGUF variant in `folder`, loaded in this process. UserError when the engine cannot read it."""
    served = build(Entry(folder.name, (), folder, "openvino"), LIMITS)
    served.engine.start()
    try:
        yield served
    finally:
        served.engine.close()


def generate(
    served: Served,
    conversations: Sequence[Sequence[Message]],
    max_new_tokens: int,
    constraints: Sequence[Constraint] | None = None,
    name: str = "generate",
) -> list[str]:
    """Greedy replies, in the order of `conversations`; one constraint per conversation where given.

    All of them are submitted at once and batched by the engine. RuntimeError when it fails.
    """

    async def one(conversation: Sequence[Message], constraint: Constraint | None) -> str:
        prompt = served.tokenizer(prompt_text(served.tokenizer, conversation), add_special_tokens=False)["input_ids"]
        stream = served.engine.submit(Generation(prompt, max_new_tokens, constraint=constraint))
        ids = [token.id async for tokens in stream for token in tokens]
        if stream.error:
            raise RuntimeError(stream.error)
        bar.update(1)
        return str(served.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    async def everybody() -> list[str]:
        held_to = constraints or [None] * len(conversations)
        return await asyncio.gather(*(one(c, h) for c, h in zip(conversations, held_to, strict=True)))

    with progress(name, total=len(conversations)) as bar:
        return asyncio.run(everybody())
