"""With a draft the engine says what it says without one: alone, together, under grammars, and after a client has left."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ml_engineer_track.models import prompt_text
from ml_engineer_track.serving import speculative as sp
from ml_engineer_track.serving.catalog import Entry, Limits, build, entries
from ml_engineer_track.serving.engine import Engine, Generation, Token
from ml_engineer_track.serving.grammar import constraint
from shared import handoff
from shared.chat import Decision, grounded_grammar
from shared.errors import UserError
from tests.ml_engineer_track.serving.conftest import (
    DECIDE,
    QUESTION,
    SOURCES,
    address_of,
    generated,
    run_serve,
    stop,
    tokens_of,
    wait_ready,
)


@pytest.fixture(scope="module")
def drafts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artifacts")


@pytest.fixture(scope="module")
def drafted(artifact: Path, drafts: Path) -> Entry:
    """The bundled model in 8 bits, its own 4-bit variant as its draft: often right, and now and then not."""
    return sp.with_draft(entries(artifact, ["q8_0"], "auto", drafts), "q4_0", drafts)[0]


@pytest.fixture(scope="module")
def engine(drafted: Entry) -> Iterator[Engine]:
    made = build(drafted, Limits(cache_mb=64, max_running=16)).engine
    made.start()
    yield made
    made.close()


@pytest.fixture(scope="module")
def plain(drafted: Entry) -> Iterator[Engine]:
    made = build(Entry(drafted.name, (), drafted.folder, "openvino"), Limits(cache_mb=64, max_running=16)).engine
    made.start()
    yield made
    made.close()


def prompts(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return [tokenizer(prompt_text(tokenizer, m), add_special_tokens=False)["input_ids"] for m in (QUESTION, DECIDE)]


def ids(tokens: list[Token]) -> list[int]:
    return [token.id for token in tokens]


def test_the_published_golden_replies_are_repeated(
    engine: Engine, artifact: Path, base_tokenizer: PreTrainedTokenizerBase
) -> None:
    for golden in handoff.read_manifest(artifact).variants["q8_0"].golden:
        prompt = base_tokenizer(prompt_text(base_tokenizer, golden.messages), add_special_tokens=False)["input_ids"]
        tokens, _ = generated(engine, Generation(prompt, golden.max_tokens))
        assert ids(tokens) == golden.token_ids


def test_many_long_prompts_at_once_get_what_each_gets_alone(
    engine: Engine, plain: Engine, base_tokenizer: PreTrainedTokenizerBase
) -> None:
    """More prompt tokens than fit one step: a prompt that is cut in two would make the engine say tokens twice."""
    long = [
        [*prompts(base_tokenizer)[0][:20], *range(100 + 7 * n, 300 + 7 * n), *prompts(base_tokenizer)[n % 2]] for n in range(6)
    ]
    assert sum(map(len, long)) > 3 * 512

    async def together(asked: Engine) -> list[tuple[list[int], str | None]]:
        done = await asyncio.gather(*(tokens_of(asked, Generation(p, 24)) for p in long))
        return [(ids(tokens), finish) for tokens, finish in done]

    assert asyncio.run(together(engine)) == asyncio.run(together(plain))


@pytest.mark.parametrize("kind", ["grammar", "json", "choice", "regex"])
def test_grammars_hold_and_choose_the_same(
    engine: Engine, plain: Engine, base_tokenizer: PreTrainedTokenizerBase, kind: str
) -> None:
    """Under a grammar the draft proposes what the grammar allows, or is ignored."""
    value = {
        "grammar": grounded_grammar(SOURCES), "json": Decision.model_json_schema(), "choice": ["yes", "no", "yes and no"],
        "regex": "[a-c]{3}-[0-9]{2}",
    }[kind]  # fmt: skip
    held = constraint({kind: value})
    for prompt in prompts(base_tokenizer):
        asked = Generation(prompt, 40, constraint=held)
        assert [(t.id) for t in generated(engine, asked)[0]] == [t.id for t in generated(plain, asked)[0]]


def test_lengths_and_log_probabilities_are_the_same(
    engine: Engine, plain: Engine, base_tokenizer: PreTrainedTokenizerBase
) -> None:
    prompt = prompts(base_tokenizer)[0]
    for most in (1, 2, 7):
        asked = Generation(prompt, most, logprobs=True, ignore_eos=True)
        (ours, finish), (theirs, wanted) = generated(engine, asked), generated(plain, asked)
        assert finish == wanted == "length"
        assert ids(ours) == ids(theirs)
        assert [t.logprob for t in ours] == pytest.approx([t.logprob for t in theirs], abs=0.05)


def test_a_request_that_leaves_takes_nobody_with_it(
    engine: Engine, plain: Engine, base_tokenizer: PreTrainedTokenizerBase
) -> None:
    prompt = prompts(base_tokenizer)[0]

    async def run() -> list[int]:
        leaving = engine.submit(Generation(prompt, 200, ignore_eos=True))
        async for _ in leaving:
            leaving.cancel()
            break
        return ids((await tokens_of(engine, Generation(prompt, 24)))[0])

    assert asyncio.run(run()) == ids(generated(plain, Generation(prompt, 24))[0])


def test_acceptance_and_speed_are_measured_and_the_replies_compared(
    drafted: Entry, base_tokenizer: PreTrainedTokenizerBase
) -> None:
    assert drafted.draft is not None
    found = sp.measure(drafted.folder, drafted.draft, prompts(base_tokenizer), 24, 1, 100, 7)
    assert found.same_replies
    assert found.prompts == 2
    assert 2 <= found.tokens <= 2 * 24
    assert 0.3 < found.acceptance_rate <= 1  # the same model in half the bits mostly says the same
    assert found.plain_throughput > 0
    assert found.draft_throughput > 0


class MadeUpSide:
    """Replies of three tokens; with a draft they take half the time, and every second proposal is accepted."""

    def __init__(self, gguf: Path, draft: Path | None) -> None:
        self.draft, self.accepted, self.proposed, self.last = draft, 0, 0, 9

    def reply(self, prompt: list[int], max_tokens: int, to_the_end: bool = False) -> tuple[list[int], float]:
        if self.draft:
            self.accepted, self.proposed = self.accepted + 2, self.proposed + 4
        said = [7, 8, self.last if self.draft and self.draft.name == "other" else 9][:max_tokens]
        return said * (2 if to_the_end else 1), (0.5 if self.draft else 1.0) * len(prompt)


def test_the_figures_are_those_of_the_replies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sp, "Side", MadeUpSide)
    asked = [[1, 2], [1, 2, 3, 4]]
    found = sp.measure(Path("large"), Path("small"), asked, 96, 3, 100, 7)
    assert (found.prompts, found.tokens, found.same_replies) == (2, 6, True)
    assert (found.accepted_tokens, found.draft_tokens, found.acceptance_rate) == (4, 8, 0.5)  # of one round, not of all
    assert found.plain_throughput == pytest.approx(1.0)  # 6 tokens in 6 seconds
    assert found.draft_throughput == pytest.approx(2.0)
    assert [found.speed_up.low, found.speed_up.value, found.speed_up.high] == pytest.approx([2, 2, 2])
    assert found.speed_up.n == 6
    monkeypatch.setattr(
        MadeUpSide, "__init__", lambda self, _, draft: vars(self).update(draft=draft, accepted=0, proposed=0, last=5)
    )
    assert not sp.measure(Path("large"), Path("other"), asked, 96, 1, 100, 7).same_replies


def test_alone_a_model_decodes_exactly_the_tokens_that_are_counted(
    drafted: Entry, base_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    real = sp.Side.reply

    def reply(self: sp.Side, *given: Any, **options: Any) -> tuple[list[int], float]:
        said, seconds = real(self, *given, **options)
        lengths.append(len(said))
        return said, seconds

    monkeypatch.setattr(sp.Side, "reply", reply)
    turn = sp.decoder(drafted.folder, prompts(base_tokenizer), 40)
    assert turn(0) > 0
    assert turn(1) > 0  # a decision, over after some ten tokens when it may end
    assert lengths == [40, 40]


def test_a_draft_is_converted_once(artifact: Path, drafts: Path, drafted: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    import openvino_genai

    assert drafted.draft is not None
    assert {"openvino_model.xml", "openvino_tokenizer.xml", "config.json"} <= {p.name for p in drafted.draft.iterdir()}
    assert not list(drafts.glob("serving/.*"))
    monkeypatch.setattr(openvino_genai, "Tokenizer", None)
    assert sp.draft_folder(artifact / "q4_0", drafts) == drafted.draft


def test_an_unknown_draft_is_refused(artifact: Path, drafts: Path) -> None:
    found = entries(artifact, ["q8_0"], "auto", drafts)
    with pytest.raises(UserError, match=r"no draft model 'q9' in --draft. A folder, or a variant: bf16, q4_0, q8_0"):
        sp.with_draft(found, "q9", drafts)


def test_a_draft_with_another_tokenizer_is_refused(artifact: Path, drafts: Path, tmp_path: Path) -> None:
    found = entries(artifact, ["q8_0"], "auto", drafts)
    other = tmp_path / "other"
    other.mkdir()
    for file in (artifact / "q4_0").iterdir():
        (other / file.name).symlink_to(file)
    changed = AutoTokenizer.from_pretrained(artifact / "q4_0")
    changed.add_tokens(["<|new|>"])
    for file in other.glob("tokenizer*"):
        file.unlink()
    changed.save_pretrained(other)
    with pytest.raises(UserError, match=r"the tokenizers differ \(8192 and 8193 tokens.*in --draft"):
        sp.with_draft(found, str(other), drafts)


def test_a_draft_with_another_vocabulary_is_refused(artifact: Path, drafts: Path, tmp_path: Path) -> None:
    found, other = entries(artifact, ["q8_0"], "auto", drafts), tmp_path / "other"
    other.mkdir()
    for file in (artifact / "q4_0").iterdir():
        (other / file.name).symlink_to(file)
    config = json.loads((artifact / "q4_0" / "config.json").read_text(encoding="utf-8"))
    (other / "config.json").unlink()
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 8256}), encoding="utf-8")
    with pytest.raises(UserError, match=r"vocab_size differs \(8192 and 8256 tokens in config.json\) in --draft"):
        sp.with_draft(found, str(other), drafts)


def test_only_the_cpu_engine_takes_a_draft(artifact: Path, drafts: Path) -> None:
    found = entries(artifact, ["bf16"], "transformers", drafts)
    with pytest.raises(UserError, match="--draft works with the CPU engine, not with transformers"):
        sp.with_draft(found, "q4_0", drafts)


@pytest.mark.slow
def test_the_server_with_a_draft_repeats_its_golden_replies(artifact: Path) -> None:
    process = run_serve("--model", str(artifact), "--variant", "q8_0", "--draft", "q4_0")
    try:
        wait_ready(process, address_of(process))  # it compares them before it is ready
    finally:
        stop(process)
