"""The engine comparison on the bundled model, at tiny sizes: equal work on all sides, real refusals, goals that can be missed."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvicorn
from transformers import AutoConfig

from benchmarks import connections, engines, goals, grammar_cost, peers, report, runner, serving
from benchmarks.budget import Task
from benchmarks.engines import Bench, Size
from benchmarks.load import Target
from benchmarks.results import Record, Result, spread
from benchmarks.sides import Chats, Generate, InProcess, gguf_folders, over_http, random_model
from ml_engineer_track.serving.app import State, create_app
from ml_engineer_track.serving.catalog import Limits, entries
from ml_engineer_track.serving.grammar import constraint
from ml_engineer_track.serving.serve import load_all
from shared.settings import BASE_MODEL

SLO = {"ttft": 1000.0}
TINY = Size(
    20, 8, {1: 2, 32: 4, 128: 6}, 2, ("llama.cpp",),
    {"single stream": (1, 1), "prefix": (1, 1), "grammar": (1, 1), "throughput": (1, 1), "connections": (1, 1)}, 12,
)  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return gguf_folders(str(BASE_MODEL), tmp_path_factory.mktemp("gguf"))


@pytest.fixture(scope="module")
def target(folders: dict[str, Path]) -> Iterator[Target]:
    """The real server on the bundled model, in a thread, with room for two in its batch and four in its queue."""
    state = State()
    found = entries(folders["q8_0"], [], "openvino", folders["q8_0"])
    app = create_app(state, lambda s: load_all(s, found, Limits(cache_mb=64, max_running=2, max_waiting=4)))
    port = serving.free_port()
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while state.not_ready:
        assert thread.is_alive()
        time.sleep(0.05)
    yield Target(f"http://127.0.0.1:{port}/v1", "q8_0", {"ignore_eos": True})
    server.should_exit = True
    thread.join(timeout=30)


def some_chats(new_tokens: int = 6) -> Chats:
    return Chats(1.6, 20, new_tokens, 7)


# --- the sides -------------------------------------------------------------------------------------------------------


def test_no_chat_is_asked_twice_and_the_same_seed_asks_the_same() -> None:
    chats = some_chats()
    taken = [ask.prompt for ask in (*chats.take(30), *chats.take(30))]
    assert len(set(taken)) == 60
    assert taken == [ask.prompt for ask in some_chats().take(60)]


def test_every_side_gets_the_same_work(target: Target, folders: dict[str, Path]) -> None:
    asks = some_chats().take(5)
    generate = Generate(str(BASE_MODEL))
    sides = [
        over_http("server", target, 2, 5), InProcess(folders["q8_0"]).side(2, 5),
        generate.one_at_a_time(5), generate.static_batch(3),
    ]  # fmt: skip
    loads = [side.run(asks) for side in sides]
    for side, load in zip(sides, loads, strict=True):
        assert all(a.ok for a in load.answers), side.name
        assert [a.output_tokens for a in load.answers] == [6] * 5
        assert sorted(a.prompt_tokens for a in load.answers) == sorted(a.prompt_tokens for a in loads[0].answers)
        assert load.duration > 0
    for load in loads[:2]:
        assert all(0 < a.ttft <= a.e2el for a in load.answers)
        assert any(a.tpot for a in load.answers)  # on a busy machine a whole reply may come in one piece


def test_the_random_model_is_served_and_every_token_can_be_seen(tmp_path: Path) -> None:
    small = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    }  # fmt: skip
    for name in ("a", "b"):
        random_model(tmp_path / name, 7, small)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]
    engine = InProcess(gguf_folders(str(tmp_path / "a"), tmp_path / "gguf")["q8_0"])
    handle = engine.engine.ask(engine.prompt("How are you?"), 12, engine_generation(), None)
    while engine.engine.pipeline.has_non_finished_requests():
        engine.engine.pipeline.step()
    ids = [token.id for token in engine.engine.new_tokens(handle, logprobs=False)]
    assert len(ids) == 12
    assert all(engine.tokenizer.decode([i], skip_special_tokens=True) for i in ids)


def engine_generation() -> Any:
    from ml_engineer_track.serving.engine import Generation

    return Generation([], 12, ignore_eos=True)


def test_the_large_model_has_the_size_it_is_said_to_have() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from benchmarks.sides import RANDOM_SIZES

    config = LlamaConfig(vocab_size=AutoConfig.from_pretrained(BASE_MODEL).vocab_size, tie_word_embeddings=True, **RANDOM_SIZES)
    import torch

    with torch.device("meta"):
        parameters = LlamaForCausalLM(config).num_parameters()
    assert 95e6 < parameters < 97e6


# --- grammars --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", grammar_cost.KINDS, ids=lambda kind: kind.name)
def test_grammars_are_new_in_every_turn_and_jump_where_it_is_said(kind: grammar_cost.Kind) -> None:
    made = [constraint(kind.structured(turn, 0)) for turn in (1, 2)]
    assert made[0].ebnf != made[1].ebnf
    assert [c.literal for c in made] == [kind.jumps] * 2


def test_quotations_differ_between_the_requests_of_a_batch() -> None:
    assert grammar_cost.quotations(1, 0) != grammar_cost.quotations(1, 1)


def test_grammars_cost_is_measured_on_replies_of_equal_length(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_cost, "BATCH", 2)
    monkeypatch.setattr(grammar_cost, "NEW_TOKENS", 40)
    records = list(grammar_cost.grammar_cost(target, some_chats(), lambda seconds: 2, SLO))
    by_name = {str(r.case["grammar"]): r for r in records}
    assert set(by_name) == {grammar_cost.FREE, *(kind.name for kind in grammar_cost.KINDS)}
    for record in records:
        assert record.metrics["completed"] == 4
        assert record.metrics["total_output_tokens"] == 4 * 40
        assert "did not have" not in record.note
    assert "grammar_cost" not in by_name[grammar_cost.FREE].metrics
    for kind in grammar_cost.KINDS:
        found = by_name[kind.name].metrics
        assert (found["grammar_cost"] or 0) > 0
        assert ((found["forced_share"] or 0) > 0.3) is kind.jumps
        assert ("forced tokens" in by_name[kind.name].note) is kind.jumps


# --- a crowd ---------------------------------------------------------------------------------------------------------


def test_a_crowd_beyond_the_queue_is_answered_or_refused_and_nothing_changes(target: Target) -> None:
    record = connections.rush(target, psutil.Process(), some_chats(24).take(40), 1e12, SLO)
    found = record.metrics
    assert found["failed"] == 0
    assert (found["rejected"] or 0) >= 10
    # Four wait. Whether the two places of the batch are taken when the crowd comes depends on which thread is faster.
    assert (found["completed"] or 0) >= 4
    assert (found["completed"] or 0) + (found["rejected"] or 0) == 40
    assert found["refused_without_retry_after"] == 0
    assert found["same_replies"] == 1
    assert found["p99_ttft_ms"]
    judged = {str(r.case["goal"]): r.metrics for r in goals.judge([record], "engines", "base", ["connections"])}
    assert {m["met"] for m in judged.values()} == {1.0}


def test_a_server_that_hangs_up_or_refuses_without_a_time_is_found_out(make_stub: Callable[..., Any]) -> None:
    stub = make_stub(first=0.2, each=0.0, breaks_after=1)
    record = connections.rush(Target(stub.url, "stub", {"ignore_eos": True}), psutil.Process(), some_chats().take(5), 1.0, SLO)
    assert record.metrics["failed"] == 5
    assert record.metrics["same_replies"] == 0  # its whole replies are no JSON
    assert "broke off" in record.note
    judged = goals.judge([record], "engines", "base", ["connections"])
    assert [r.metrics["met"] for r in judged] == [0.0, 0.0, 0.0]


# --- goals -----------------------------------------------------------------------------------------------------------


def side(name: str, level: int, rates: list[float], what: str = "throughput", **metrics: float) -> Record:
    found = {"output_throughput": sum(rates) / max(len(rates), 1), **metrics}
    case: dict[str, str | int | float] = {"what": what, "max_concurrency": level}
    return Record(suite="engines", model=f"base: {name}", case=case, metrics=found, samples={"output_throughput": rates})


def throughputs(server: float) -> list[Record]:
    return [
        side(goals.OURS, 1, [200, 210]), side(goals.OURS, 32, [server, server * 1.1]), side(goals.OURS, 128, [server * 0.9]),
        side(goals.ONE_AT_A_TIME, 1, [100, 100]), side(goals.IN_PROCESS, 32, [1500, 1500]),
    ]  # fmt: skip


def test_goals_are_met_missed_or_not_measured() -> None:
    parts = ["throughput", "single stream", "grammar"]
    judged = goals.judge(throughputs(1200), "engines", "base", parts)
    found = {str(r.case["goal"]).split(" /")[0]: r.metrics for r in judged}
    assert len(judged) == 5
    gain = found["32 chats over HTTP"]  # the second of that name: the share of the engine in process
    assert gain["value"] == pytest.approx(1260 / 1500)
    assert gain["met"] == 0
    assert judged[0].metrics == {"value": 12.6, "bound": 12.0, "met": 1.0, "lowest_round": 12.0, "highest_round": 13.2}
    assert found["128 chats"]["met"] == 0
    assert found["tpot"]["met"] is None
    assert found["time per token with a grammar"]["value"] is None


def test_the_dearest_grammar_decides() -> None:
    records = [
        Record(suite="engines", model="base", case={"what": "grammar"}, metrics={"grammar_cost": cost})
        for cost in (0.7, 1.2, 1.1)
    ]
    (judged,) = goals.judge(records, "engines", "base", ["grammar"])
    assert (judged.metrics["value"], judged.metrics["met"]) == (1.2, 0.0)


def test_a_single_stream_is_set_against_llama_cpp_on_the_same_file() -> None:
    records = [
        side(name, 1, [1.0], "single stream", median_tpot_ms=tpot)
        for name, tpot in ((goals.OURS, 2.0), (goals.OURS_Q4, 1.8), (goals.LLAMA_Q4, 1.5))
    ]
    (judged,) = goals.judge(records, "engines", "base", ["single stream"])
    assert judged.metrics["value"] == pytest.approx(1.2)
    assert judged.metrics["met"] == 1


def test_the_report_shows_misses_as_misses(make_result: Callable[..., Result]) -> None:
    records = [*throughputs(900), side("x", 1, [1.0], "prefix", **{k: v or 0.0 for k, v in spread("ttft_reused", [3.0]).items()})]
    page = report.page(make_result([*records, *goals.judge(records, "engines", "base", ["throughput", "grammar"])]))
    section = page[page.index("<h2>Engines side by side</h2>") : page.index("<h2>Not measured</h2>")]
    assert section.count("<table>") == 2
    assert section.count("<td>missed</td>") == 3
    assert section.count("<td>not measured</td>") == 1
    assert "<td>at least 12</td>" in section


# --- the suite -------------------------------------------------------------------------------------------------------


def test_rounds_follow_the_time_there_is() -> None:
    assert [engines.rounds_in(seconds, 5, 10.0) for seconds in (1000, 30, 1)] == [5, 3, 2]


def test_parts_share_the_time_and_what_does_not_fit_is_named() -> None:
    task = Task("engines", {}, 60)
    given = list(engines.shares(task, "base", engines.SMALL.parts, engines.LARGE.parts))
    assert [name for name, _ in given][:2] == ["single stream", "prefix"]
    assert all(seconds >= engines.SMALL.parts[name][0] for name, seconds in given)
    short = Task("engines", {}, 9)
    assert [name for name, _ in engines.shares(short, "base", engines.SMALL.parts, {})] == ["prefix"]
    assert "base, grammar (about 25 s" in short.skipped[1]


def test_the_whole_suite_is_within_its_time() -> None:
    parts = [*engines.SMALL.parts.values(), *engines.LARGE.parts.values()]
    assert sum(least for least, _ in parts) < engines.FULL
    assert runner.SUITES["engines"].measure is engines.measure


def test_a_url_and_a_gpu_are_not_this_suites_business() -> None:
    task = Task("engines", {}, 60, url="http://x")
    assert list(engines.measure(task)) == []
    assert "starts its own servers" in task.skipped[0]


def test_a_peer_that_is_not_there_is_one_line(
    folders: dict[str, Path], target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "HOME", tmp_path)
    task = Task("engines", {}, 60)
    bench = Bench(task, "base", str(BASE_MODEL), folders, TINY, target, some_chats(), "")
    with ExitStack() as stack:
        assert engines.peer(bench, "llama.cpp", stack, {1: 1}, "q4_0") == []
    assert len(task.skipped) == 1
    assert "make bench-peers PEERS=llama.cpp INSTALL=1" in task.skipped[0]


def test_a_side_that_never_answers_is_left_out_and_the_others_take_turns(target: Target) -> None:
    task = Task("engines", {}, 60)
    bench = Bench(task, "base", "", {}, TINY, target, some_chats(), "")
    nowhere = over_http("nowhere", Target("http://127.0.0.1:9/v1", "x"), 1, 1)
    (record,) = engines.in_turns(bench, "throughput", [over_http(goals.OURS, target, 2, 4), nowhere], 60)
    assert "nowhere: no chat was answered" in task.skipped[0]
    assert record.model == f"base: {goals.OURS}"
    assert record.metrics["rounds"] == len(record.samples["output_throughput"]) == 2
    assert record.metrics["total_output_tokens"] == 2 * 4 * 6
    assert "2 rounds" in record.note


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_suite_runs_to_its_end_on_a_real_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {name: TINY.parts[name] for name in engines.LARGE.parts}
    small = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    }  # fmt: skip
    monkeypatch.setattr(engines, "SMALL", TINY)
    monkeypatch.setattr(engines, "LARGE", replace(TINY, parts=parts))
    monkeypatch.setattr(engines, "FULL", 1e6)
    monkeypatch.setattr(engines, "STATIC_BATCH", 2)
    monkeypatch.setattr(engines, "random_model", lambda folder, seed: random_model(folder, seed, small))
    monkeypatch.setattr(grammar_cost, "BATCH", 2)
    monkeypatch.setattr(grammar_cost, "NEW_TOKENS", 24)
    monkeypatch.setattr(serving, "REPEATS", 1)
    monkeypatch.setattr(peers, "HOME", tmp_path)
    monkeypatch.setattr(engines, "REPEATS", 2)
    task = Task("engines", {"base": str(BASE_MODEL)}, 1e6)
    records = list(engines.measure(task))
    kinds = [(r.model.split(":")[0], str(r.case["what"])) for r in records]
    assert {what for model, what in kinds if model == "base"} == {*TINY.parts, "goal"}
    assert {what for model, what in kinds if model == engines.RANDOM} == {*parts, "goal"}
    met = [r.metrics["met"] for r in records if r.case["what"] == "goal"]
    assert len(met) == 9 + 5
    assert met.count(None) == 2  # no llama.cpp here
    assert {line.split(".")[0] for line in task.skipped} == {f"engines: {model}, llama" for model in ("base", engines.RANDOM)}
    json.dumps([r.model_dump() for r in records])
    assert not list(itertools.filterfalse(lambda r: r.suite == "engines", records))
