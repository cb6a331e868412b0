"""A model with random weights, a server whose delays are known, and results made by hand."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.results import Record, Result
from benchmarks.serving import free_port
from ml_engineer_track.models import load_tokenizer
from shared.settings import BASE_MODEL, OVERRIDES


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (*OVERRIDES, "PRESET", "OPENAI_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def micro_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama of two layers with random weights and the bundled tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "micro"
    tokenizer = load_tokenizer(str(BASE_MODEL))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


# --- a server with known delays --------------------------------------------------------------------------------------


@dataclass
class Stub:
    """How the server behaves, and what it saw. Delays in seconds."""

    first: float = 0.15
    each: float = 0.03
    slots: int = 1000
    queue: bool = True
    knows_ignore_eos: bool = True
    refusal: int = 400
    breaks_after: int | None = None
    url: str = ""
    seen: list[dict[str, Any]] = field(default_factory=list)
    arrived: list[float] = field(default_factory=list)
    running: int = 0
    most: int = 0


def stub_app(stub: Stub) -> FastAPI:
    app = FastAPI()
    gate: dict[str, asyncio.Semaphore] = {}

    @app.get("/health")
    def health() -> dict[str, str]:
        return {}

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"data": [{"id": "stub"}]}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Any:
        body = await request.json()
        stub.seen.append(body)
        stub.arrived.append(time.perf_counter())
        if "ignore_eos" in body and not stub.knows_ignore_eos:
            return JSONResponse({"error": {"message": "unknown field ignore_eos"}}, stub.refusal)
        if not stub.queue and stub.running >= stub.slots:
            return JSONResponse({"error": {"message": "full"}}, 429, headers={"Retry-After": "1"})
        stub.running += 1
        stub.most = max(stub.most, stub.running)
        return StreamingResponse(stream(body), media_type="text/event-stream")

    async def stream(body: dict[str, Any]) -> AsyncIterator[str]:
        prompt = sum(len(m["content"].split()) for m in body["messages"]) * 2
        tokens = body["max_tokens"] if body.get("ignore_eos") else min(3, body["max_tokens"])
        try:
            async with gate.setdefault("slots", asyncio.Semaphore(stub.slots)):
                yield event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
                await asyncio.sleep(stub.first)
                for n in range(tokens):
                    if n:
                        await asyncio.sleep(stub.each)
                    if n == stub.breaks_after:
                        return
                    yield event({"choices": [{"delta": {"content": f"w{n} "}}]})
                usage = {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}
                yield event({"choices": [], "usage": usage})
                yield "data: [DONE]\n\n"
        finally:
            stub.running -= 1

    return app


def event(part: dict[str, Any]) -> str:
    return f"data: {json.dumps(part)}\n\n"


@pytest.fixture
def make_stub() -> Iterator[Callable[..., Stub]]:
    """Start a stub server; it is stopped when the test ends."""
    servers: list[tuple[uvicorn.Server, threading.Thread]] = []

    def make(**behaviour: Any) -> Stub:
        stub = Stub(**behaviour)
        port = free_port()
        server = uvicorn.Server(uvicorn.Config(stub_app(stub), host="127.0.0.1", port=port, log_level="error"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        servers.append((server, thread))
        stub.url = f"http://127.0.0.1:{port}/v1"
        return stub

    yield make
    for server, thread in servers:
        server.should_exit = True
        thread.join(timeout=10)


# --- results made by hand --------------------------------------------------------------------------------------------

ENVIRONMENT = {
    "cpu_info": "A CPU", "cpu_cores": 2, "n_threads": 2, "memory_gib": 24.0, "gpu_info": None, "power_source": "mains",
    "build_commit": "abc1234", "build_dirty": False, "libraries": {"torch": "2.13.0"}, "python": "3.11", "driver": None,
    "busy_share": 0.02, "load_average": [0.1, 0.1, 0.1], "last_level_cache": 32 * 2**20,
}  # fmt: skip


@pytest.fixture(scope="session")
def make_result() -> Callable[..., Result]:
    """A result with the given records; keyword arguments replace parts of the environment."""

    def make(records: list[Record], time: str = "2026-11-23T10:00:00+00:00", **environment: Any) -> Result:
        suites = list(dict.fromkeys(r.suite for r in records))
        models = {"bf16": {"model_filename": "bf16", "sha256": environment.pop("sha256", "aa"), "model_size": 1}}
        return Result.model_validate(
            {
                "test_time": time, "suites": suites, "environment": ENVIRONMENT | environment, "status": "complete",
                "models": models, "records": [r.model_dump() for r in records],
            }
        )  # fmt: skip

    return make
