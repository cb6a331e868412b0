"""The fallback and CUDA engine: the same replies, masks, seeds and log probabilities, whatever else is in the batch."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from ml_engineer_track.models import prompt_text
from ml_engineer_track.serving import parity
from ml_engineer_track.serving.catalog import Entry, Limits, build
from ml_engineer_track.serving.engine import Engine, Generation
from ml_engineer_track.serving.grammar import constraint
from shared import handoff
from shared.chat import ACTIONS, NOT_ANSWERED, Verdict, grounded_grammar, parse_answer
from shared.settings import BASE_MODEL
from tests.ml_engineer_track.serving.conftest import DECIDE, QUESTION, SOURCES, generated, tokens_of


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    made = build(Entry("x", (), BASE_MODEL, "transformers"), Limits(cache_mb=16, max_running=16)).engine
    made.start()
    yield made
    made.close()


@pytest.fixture(scope="module")
def prompt(base_tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(base_tokenizer(prompt_text(base_tokenizer, DECIDE), add_special_tokens=False)["input_ids"])


def text(tokenizer: PreTrainedTokenizerBase, engine: Engine, generation: Generation) -> str:
    return str(tokenizer.decode([t.id for t in generated(engine, generation)[0]], skip_special_tokens=True))


def test_it_repeats_the_golden_replies_of_the_published_model(
    artifact: Path, engine: Engine, base_tokenizer: PreTrainedTokenizerBase
) -> None:
    golden = handoff.read_manifest(artifact).variants["bf16"].golden
    assert golden
    asyncio.run(parity.check(engine, base_tokenizer, "bf16", golden))


def test_constraints_hold(engine: Engine, prompt: list[int], base_tokenizer: PreTrainedTokenizerBase) -> None:
    def ask(ids: list[int], **structured: object) -> str:
        return text(base_tokenizer, engine, Generation(ids, 100, constraint=constraint(structured)))

    assert ask(prompt, choice=list(ACTIONS)) in ACTIONS
    assert Verdict.model_validate_json(ask(prompt, json=Verdict.model_json_schema()))
    assert ask(prompt, regex=r"[xyz]{2}\d").isalnum()
    assert isinstance(json.loads(ask(prompt, json={"type": "string", "maxLength": 5})), str)
    ids = base_tokenizer(prompt_text(base_tokenizer, QUESTION), add_special_tokens=False)["input_ids"]
    reply = ask(ids, grammar=grounded_grammar(SOURCES))
    assert reply == NOT_ANSWERED or all(q.text == SOURCES[(q.number or 0) - 1].text for q in parse_answer(reply))


def test_a_seed_repeats_a_reply_in_the_middle_of_any_batch(engine: Engine, prompt: list[int]) -> None:
    wanted = Generation(prompt, 12, temperature=1.5, seed=5)
    alone = [t.id for t in generated(engine, wanted)[0]]

    async def run() -> list[list[int]]:
        others = [Generation(prompt, 12, temperature=1.5, seed=n) for n in range(100, 106)]
        found = await asyncio.gather(*(tokens_of(engine, g) for g in [others[0], wanted, *others[1:]]))
        return [[t.id for t in tokens] for tokens, _ in found]

    batch = asyncio.run(run())
    assert batch[1] == alone
    assert len({tuple(ids) for ids in batch}) > 2


def test_log_probabilities_come_with_alternatives(engine: Engine, prompt: list[int]) -> None:
    tokens, _ = generated(engine, Generation(prompt, 4, logprobs=True, top_logprobs=3))
    for token in tokens:
        assert token.alternatives[0] == (token.id, token.logprob)
        assert len(token.alternatives) == 3
        assert 0 >= token.alternatives[0][1] >= token.alternatives[1][1] >= token.alternatives[2][1]
    held = Generation(prompt, 4, logprobs=True, top_logprobs=20, constraint=constraint({"choice": list(ACTIONS)}))
    first = generated(engine, held)[0][0]
    assert first.id == first.alternatives[0][0]
    assert len(first.alternatives) < 20  # only what the choices allow


def test_a_cancelled_request_frees_its_slot(engine: Engine, prompt: list[int]) -> None:
    async def run() -> None:
        stream = engine.submit(Generation(prompt, 1500, ignore_eos=True))
        async for _ in stream:
            stream.cancel()
        assert stream.finish == "cancelled"

    asyncio.run(run())
    assert engine.stats().running == 0
    assert len(generated(engine, Generation(prompt, 3, ignore_eos=True))[0]) == 3
