"""Engines side by side: what the server's batching gains, what HTTP, grammars and a crowd cost, and what others reach.

Why: "fast" is a ratio. Every figure here has another side measured in the same minutes with the same chats, in turns, and the
goals the server was built for stand beside what came out (goals.py), met or not.

    python -m benchmarks run --suite engines [--model FOLDER | --model bundled]     about six minutes, or less with --budget

Parts, the shorter ones first: a single stream (Q8_0, Q4_0, llama.cpp); a reused prefix; grammars (grammar_cost.py);
throughput at 1, 32 and 128 chats beside `model.generate`, a static batch, the engine without a server, and peers; a thousand
connections (connections.py). Then single stream, prefix and throughput again for a Llama of 96 million random weights, with
fewer rounds and shorter chats. A chat has the median lengths of the serving suite's mix `chat`.
The model is written as GGUF for the run, and llama.cpp gets the same file. CPU only: this is about the CPU engine.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from benchmarks import serving
from benchmarks.budget import REPEATS, Task, interleaved, share
from benchmarks.connections import CONNECTIONS, allow_open_files, rush
from benchmarks.goals import IN_PROCESS, LLAMA_Q4, ONE_AT_A_TIME, OURS, OURS_Q4, judge
from benchmarks.grammar_cost import grammar_cost
from benchmarks.limits import Limits
from benchmarks.load import Load, Target, figures, samples
from benchmarks.results import Record
from benchmarks.sides import Chats, Generate, InProcess, Side, gguf_folders, over_http, random_model
from ml_engineer_track.serving.catalog import Limits as ServerLimits
from shared.errors import UserError
from shared.hardware import device

NAME = "engines"
#: The whole suite takes about this long, in seconds, when no budget is given.
FULL = 360.0
#: Fewer rounds than this say nothing.
FEWEST = 2
STATIC_BATCH = 32
RANDOM = "random 96M"


@dataclass(frozen=True)
class Size:
    """How much is asked of a model: lengths, chats of a turn at each concurrency, rounds, peers, and the time of each part.

    `parts`: name -> fewest seconds it makes sense in, and its weight when the time is shared out.
    """

    prompt_tokens: int
    new_tokens: int
    levels: dict[int, int]
    rounds: int
    peers: tuple[str, ...]
    parts: dict[str, tuple[float, float]]
    connections: int = CONNECTIONS


CHAT = (serving.MIXES["chat"][0], serving.MIXES["chat"][2])
SMALL = Size(
    CHAT[0], CHAT[1], {1: 4, 32: 64, 128: 128}, REPEATS, ("transformers", "llama.cpp"),
    {"single stream": (10, 1), "prefix": (8, 1), "grammar": (25, 6), "throughput": (40, 10), "connections": (20, 4)},
)  # fmt: skip
LARGE = Size(
    CHAT[0] // 2, CHAT[1] // 2, {1: 2, 32: 32, 128: 128}, 3, ("llama.cpp",),
    {"single stream": (25, 2), "prefix": (15, 2), "throughput": (40, 7)},
)  # fmt: skip


@dataclass
class Bench:
    """A model with its server running: what every part needs."""

    task: Task
    name: str
    path: str
    folders: dict[str, Path]
    size: Size
    target: Target
    chats: Chats
    note: str
    records: list[Record] = field(default_factory=list)


def measure(task: Task, limits: Limits | None = None) -> Iterator[Record]:
    """The first model of the task, then the one with random weights; each with its goals at the end."""
    del limits
    if task.url:
        return task.skip("it starts its own servers; --url is for the suite serving")
    if device().type != "cpu":
        return task.skip("it compares CPU engines: run it with --device cpu")
    task.seconds = min(task.seconds, FULL)
    allow_open_files(SMALL.connections)
    name, path = next(iter(task.models.items()))
    yield from of_model(task, name, path, SMALL, LARGE.parts)
    with tempfile.TemporaryDirectory() as folder:
        if task.fits(sum(least for least, _ in LARGE.parts.values()) / 2, RANDOM):
            random_model(Path(folder), task.seed)
            yield from of_model(task, RANDOM, folder, LARGE, {})


def of_model(task: Task, name: str, path: str, size: Size, later: dict[str, tuple[float, float]]) -> Iterator[Record]:
    """All parts that fit, for one model; `later` are the parts other models still need time for."""
    try:
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            folders = gguf_folders(path, Path(folder))
            url, _ = stack.enter_context(serving.server(str(folders["q8_0"])))
            target, words, note = serving.calibrate(Target(url, serving.first_model(url)))
            chats = Chats(words, size.prompt_tokens, size.new_tokens, task.seed)
            bench = Bench(task, name, path, folders, size, target, chats, note)
            for part, seconds in shares(task, name, size.parts, later):
                try:
                    for record in PARTS[part](bench, seconds):
                        bench.records.append(record)
                        yield record
                except UserError as error:
                    task.skip(f"{name}, {part}: {error}")
            yield from judge(bench.records, NAME, name, list(size.parts))
    except UserError as error:
        task.skip(f"{name}: {error}")


def shares(
    task: Task, name: str, parts: dict[str, tuple[float, float]], later: dict[str, tuple[float, float]]
) -> Iterator[tuple[str, float]]:
    """Each part that fits, with its seconds."""
    told = parts | {f"later {part}": numbers for part, numbers in later.items()}
    least, weight = ({part: numbers[i] for part, numbers in told.items()} for i in (0, 1))
    names = list(told)
    for place, part in enumerate(parts):
        if task.fits(least[part], f"{name}, {part}"):
            yield part, share(part, names[place + 1 :], weight, least, task.left)


# --- the parts -------------------------------------------------------------------------------------------------------


def single_stream(bench: Bench, seconds: float) -> Iterator[Record]:
    """One chat after the other: our server with eight and with four bits, and llama.cpp on the same four-bit file."""
    turn = max(1, bench.size.levels[1] // 2)
    with ExitStack() as stack:
        url, _ = stack.enter_context(serving.server(str(bench.folders["q4_0"])))
        q4 = replace(bench.target, base_url=url, model=serving.first_model(url))
        sides = [over_http(OURS, bench.target, 1, turn, bench.note), over_http(OURS_Q4, q4, 1, turn, bench.note)]
        if "llama.cpp" in bench.size.peers:
            sides += peer(bench, "llama.cpp", stack, {1: turn}, "q4_0")
        yield from in_turns(bench, "single stream", sides, seconds)


def prefix(bench: Bench, seconds: float) -> Iterator[Record]:
    """The serving suite's case: a 600-token prefix never seen, and seen before."""
    found = serving.prefix(bench.target, "", bench.chats.tokens_per_word, bench.task.seed)
    found.metrics["rounds"] = float(len(found.samples["ttft_cold_ms"]))
    yield named(bench, OURS, found)


def grammar(bench: Bench, seconds: float) -> Iterator[Record]:
    """Sixteen chats of 200 tokens, held to grammars and not."""
    rounds = partial(rounds_in, seconds, REPEATS)
    for record in grammar_cost(bench.target, bench.chats, rounds, bench.task.slo):
        record.metrics["rounds"] = float(len(record.samples["output_throughput"]))
        yield named(bench, OURS, record)


def throughput(bench: Bench, seconds: float) -> Iterator[Record]:
    """Our server at every concurrency, and at 32 everything it is to be set against."""
    size = bench.size
    with ExitStack() as stack:
        generate = Generate(bench.path)
        sides = [over_http(OURS, bench.target, level, chats, bench.note) for level, chats in size.levels.items()]
        sides += [generate.one_at_a_time(max(1, size.levels[1] // 2)), generate.static_batch(STATIC_BATCH)]
        try:
            sides.append(InProcess(bench.folders["q8_0"]).side(32, size.levels[32]))
        except UserError as error:
            bench.task.skip(f"{bench.name}: {IN_PROCESS}: {error}")
        for name in size.peers:
            sides += peer(bench, name, stack, {1: 1, 32: 32}, "q8_0")
        found = list(in_turns(bench, "throughput", sides, seconds))
    floor = next((r.metrics["output_throughput"] for r in found if r.model.endswith(ONE_AT_A_TIME)), None)
    for record in found:
        mine = record.metrics["output_throughput"]
        record.metrics["times_one_at_a_time"] = mine / floor if mine is not None and floor else None
        yield record


def connections(bench: Bench, seconds: float) -> Iterator[Record]:
    """A thousand at once, on a fresh server. What it may take: what it took when it was ready, and its cache."""
    with serving.server(str(bench.folders["q8_0"])) as (url, process):
        target = replace(bench.target, base_url=url, model=serving.first_model(url))
        ready = serving.peak_memory(process)
        budget = None if ready is None else ready + ServerLimits().cache_mb * 2**20
        asks = bench.chats.take(bench.size.connections)
        yield named(bench, OURS, rush(target, process, asks, budget, bench.task.slo))


PARTS: dict[str, Callable[[Bench, float], Iterator[Record]]] = {
    "single stream": single_stream,
    "prefix": prefix,
    "grammar": grammar,
    "throughput": throughput,
    "connections": connections,
}


# --- helpers ---------------------------------------------------------------------------------------------------------


def in_turns(bench: Bench, what: str, sides: Sequence[Side], seconds: float) -> Iterator[Record]:
    """Every side once to warm up, then in rounds, each side in turn, as many as fit into `seconds`."""
    kept: list[Side] = []
    needed = 0.0
    for side in sides:
        warm = side.run(bench.chats.take(min(side.chats, side.concurrency)))
        answered = [a for a in warm.answers if a.ok]
        if not answered:
            bench.task.skip(f"{bench.name}, {side.name}: no chat was answered: {warm.answers[0].error}")
            continue
        kept.append(side)
        needed += warm.duration * side.chats / len(warm.answers)
    turns = {f"{side.name} {side.concurrency}": (lambda s=side: s.run(bench.chats.take(s.chats))) for side in kept}
    rounds = rounds_in(seconds, bench.size.rounds, needed)
    for side, loads in zip(kept, interleaved(turns, rounds).values(), strict=True):
        yield named(bench, side.name, describe(bench, what, side, loads))


def rounds_in(seconds: float, wanted: int, needed: float) -> int:
    """Rounds of `needed` seconds that fit into `seconds`: `wanted` of them at most, FEWEST at least."""
    return max(FEWEST, min(wanted, int(seconds / max(needed, 1e-9))))


def describe(bench: Bench, what: str, side: Side, loads: list[Load]) -> Record:
    """All figures of a side; of one that does not know when its tokens came, only counts and totals over totals."""
    found, raw = figures(loads, bench.task.slo), samples(loads)
    if not side.timed:
        found = {key: value for key, value in found.items() if not key.endswith("_ms") and key != "request_goodput"}
        raw = {"output_throughput": raw["output_throughput"]}
    found["rounds"] = float(len(loads))
    case: dict[str, str | int | float] = {
        "what": what, "max_concurrency": side.concurrency,
        "prompt_tokens": bench.size.prompt_tokens, "new_tokens": bench.size.new_tokens,
    }  # fmt: skip
    return Record(suite=NAME, model=side.name, case=case, metrics=found, samples=raw, note=side.note)


def named(bench: Bench, side: str, record: Record) -> Record:
    """A record of this suite: the model both sides serve, then the side; few rounds are said."""
    rounds = record.metrics.get("rounds")
    few = f"{rounds:.0f} rounds" if rounds is not None and rounds < REPEATS else ""
    note = "; ".join(part for part in (record.note, few) if part)
    return record.model_copy(update={"suite": NAME, "model": f"{bench.name}: {side}", "note": note})


def peer(bench: Bench, name: str, stack: ExitStack, levels: dict[int, int], kind: str) -> list[Side]:
    """A peer's server on the same model, until `stack` is left; no sides, and one line, where it is not installed or fails."""
    from benchmarks import peers  # it imports the runner, which imports this suite

    try:
        python = peers.environment_of(name, peers.PEERS[name], install=False)
        if name == "llama.cpp":
            label = LLAMA_Q4 if kind == "q4_0" else f"llama.cpp, {kind.upper()}"
            command, served = peers.llama_cpp_command(python, bench.folders[kind] / "model.gguf"), "model"
        else:
            label = "transformers serve, continuous batching"
            command, served = peers.transformers_command(python, bench.path), bench.path
        url, _ = stack.enter_context(serving.server(bench.path, command))
        target, _, note = serving.calibrate(Target(url, served))
    except UserError as error:
        bench.task.skip(f"{bench.name}, {name}: {error}")
        return []
    return [over_http(label, target, level, chats, note) for level, chats in levels.items()]
