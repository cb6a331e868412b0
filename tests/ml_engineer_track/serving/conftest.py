"""A published artifact of the bundled model, a real server over it, and a counting engine where the model does not matter."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from ml_engineer_track.curate import Row
from ml_engineer_track.models import load_model, load_tokenizer
from ml_engineer_track.publish import golden, golden_served
from ml_engineer_track.quantize import save_gguf
from ml_engineer_track.serving.completions import Served
from ml_engineer_track.serving.engine import Engine, Generation, Job, Token
from shared import handoff
from shared.chat import PROMPT_VERSION, Message, Source, answer_messages, decide_messages
from shared.settings import BASE_MODEL, ROOT

SOURCES = [
    Source(id="common-cold/self-care/1", heading="Common cold: Self-care", text="Drink plenty of water."),
    Source(id="common-cold/self-care/2", heading="Common cold: Self-care", text='Rest – "properly" – until you feel better.'),
    Source(id="influenza/see-a-doctor/1", heading="Influenza: See a doctor", text="See a doctor when a fever lasts three days."),
]
QUESTION: list[Message] = answer_messages("What helps with a cold?", SOURCES)
DECIDE: list[Message] = decide_messages("I have had a headache since Monday.", ["Migraine", "Tension headache"])


def run_serve(*options: str) -> subprocess.Popen[str]:
    """The command as a user starts it."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(
        [sys.executable, "-m", "ml_engineer_track", "serve", "--port", "0", *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip


def address_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    for line in process.stdout:
        if line.startswith("listening on "):
            return line.split()[2].removesuffix(",").removesuffix("/v1")
    raise AssertionError(f"the server stopped: {process.stderr.read() if process.stderr else ''}")


def wait_ready(process: subprocess.Popen[str], address: str, seconds: float = 280) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        try:
            urllib.request.urlopen(f"{address}/ready", timeout=5)
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("not ready in time")


def stop(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def base_tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(str(BASE_MODEL))


@pytest.fixture(scope="session")
def artifact(base_tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published version of the bundled base model with the variants bf16, q8_0 and q4_0."""
    work = tmp_path_factory.mktemp("served")
    model = load_model(str(BASE_MODEL), torch.float32)
    folders = {name: work / "work" / name for name in ("bf16", "q8_0", "q4_0")}
    shutil.copytree(BASE_MODEL, folders["bf16"])
    sizes = {name: save_gguf(model, base_tokenizer, folders[name], name) for name in ("q8_0", "q4_0")}
    rows = [Row(id=str(n), skill="answer", split="validation", messages=m, reply="") for n, m in enumerate((QUESTION, DECIDE))]
    replies = {name: golden_served(folders[name], base_tokenizer, rows) for name in sizes}
    replies["bf16"] = golden(load_model(str(BASE_MODEL)), base_tokenizer, rows)
    manifest = handoff.Manifest(
        model_id="tiny-bundled", version="m-test", created="2026-11-23T00:00:00+00:00", commit=None,
        base_model=handoff.BaseModelInfo(id="bundled", licence="Apache-2.0"), data=handoff.DataInfo(version="d", counts={}),
        training={}, seed=7, prompt_version=PROMPT_VERSION, chat_template_sha256="", tokenizer_sha256="", context_window=2048,
        stop_tokens=["<|end|>"], stop_token_ids=[1], use={"cpu": "q8_0", "cuda": "bf16"}, hardware={},
        variants={
            name: handoff.Variant(
                name=name, weight_bytes=sizes.get(name, 1), quality={}, performance={}, files={}, golden=replies[name]
            )
            for name in folders
        },
    )  # fmt: skip
    return handoff.publish(manifest, folders, work / "models", lambda aside: None)


@pytest.fixture(scope="session")
def address(artifact: Path) -> Iterator[str]:
    """A real server over two variants at once."""
    process = run_serve("--model", str(artifact), "--variant", "q8_0", "--variant", "q4_0")
    try:
        found = address_of(process)
        wait_ready(process, found)
        yield found
    finally:
        stop(process)


@pytest.fixture(scope="session")
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)


class CountingEngine(Engine):
    """Answers every prompt with the tokens 100, 101, 102, ... one a step, as slowly as it is told to."""

    name = "counting"

    def __init__(self, seconds: float = 0.0, max_running: int = 4, max_waiting: int = 4, capacity: int = 1000) -> None:
        super().__init__(max_running, max_waiting)
        self.seconds, self.capacity, self.steps, self.recovered = seconds, capacity, 0, 0
        self.fail_at: Callable[[CountingEngine], bool] = lambda engine: False
        self.stopped: list[Job] = []

    def do_load(self) -> None:
        self.capacity_tokens = self.capacity

    def do_begin(self, job: Job) -> None:
        job.state = 100

    def do_step(self) -> None:
        self.steps += 1
        time.sleep(self.seconds)
        if self.fail_at(self):
            raise RuntimeError("the matrix fell over")
        for job in list(self.running):
            job.state += 1
            self.emit(job, [Token(job.state - 1, -0.5)], "length" if job.remaining == 1 else None)

    def do_stop(self, job: Job) -> None:
        self.stopped.append(job)

    def do_recover(self) -> None:
        self.recovered += 1


@pytest.fixture
def counting() -> Iterator[Callable[..., CountingEngine]]:
    """Makes started engines, and closes them."""
    made: list[CountingEngine] = []

    def make(**options: float) -> CountingEngine:
        engine = CountingEngine(**options)  # type: ignore[arg-type]
        engine.start()
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.close()


def served(engine: Engine, tokenizer: PreTrainedTokenizerBase, name: str = "counting") -> Served:
    return Served(name, engine, tokenizer, context=512)


async def tokens_of(engine: Engine, generation: Generation) -> tuple[list[Token], str | None]:
    stream = engine.submit(generation)
    found = [token async for tokens in stream for token in tokens]
    return found, stream.finish


def generated(engine: Engine, generation: Generation) -> tuple[list[Token], str | None]:
    return asyncio.run(tokens_of(engine, generation))
