"""A tiny inference server for tests: it speaks the OpenAI API and honours every constraint, but knows nothing.

    with StubServer() as server:
        server.say("emergency", '{"action":"escalate"}')     # a prompt that contains this text gets that reply
        Llm(settings(server.url)).chat(...)

Constrained requests get the first reply their constraint allows (the first choice, the smallest JSON, the first sentence of
the grammar) unless a rule says otherwise. `server.fault` makes it fail: "down" (500), "slow", "html", "nonsense", "cut".
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import socket
import threading
import time
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse

MODEL = "stub"


class StubServer:
    """Serves from a thread on a free port while the `with` block runs. `requests` holds every request body, in order."""

    def __init__(self) -> None:
        self.rules: list[tuple[str, str]] = []
        self.requests: list[dict[str, Any]] = []
        self.fault = ""
        self.faults_left = 10**9
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._server = uvicorn.Server(uvicorn.Config(self._app(), port=self.port, log_level="error", lifespan="off"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def say(self, when: str, reply: str) -> None:
        """Reply so to prompts that contain `when` (a later rule goes first). A constraint it breaks is ignored."""
        self.rules.insert(0, (when, reply))

    def reset(self) -> None:
        self.rules, self.requests, self.fault, self.faults_left = [], [], "", 10**9

    def __enter__(self) -> StubServer:
        self._thread.start()
        deadline = time.monotonic() + 20
        while not self._server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=10)

    def _app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/v1/models")
        async def models() -> Any:
            return {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "tests"}]}

        @app.post("/v1/chat/completions")
        async def completions(request: Request) -> Any:
            body = await request.json()
            self.requests.append(body)
            if self.fault and self.faults_left > 0:
                self.faults_left -= 1
                if self.fault == "slow":
                    await asyncio.sleep(3)
                elif self.fault == "down":
                    return JSONResponse({"error": {"message": "broken"}}, 500)
                elif self.fault == "html":
                    return HTMLResponse("<html>Bad gateway</html>")
                elif self.fault == "nonsense":
                    return _whole("¿¿¿ 42 <|end|>", body)
            text = self._reply(body)
            if body.get("stream"):
                return StreamingResponse(_pieces(text, body, cut=self.fault == "cut"), media_type="text/event-stream")
            return _whole(text, body)

        return app

    def _reply(self, body: dict[str, Any]) -> str:
        prompt = "\n".join(m["content"] for m in body["messages"])
        return next((reply for when, reply in self.rules if when in prompt), None) or smallest(body.get("structured_outputs"))


def smallest(constraint: dict[str, Any] | None) -> str:
    """The first reply a constraint allows."""
    if not constraint:
        return "Stub."
    if "choice" in constraint:
        return str(constraint["choice"][0])
    if "json" in constraint:
        return json.dumps(_smallest_json(constraint["json"]), separators=(",", ":"))
    if "grammar" in constraint:
        rule = constraint["grammar"].splitlines()[-1]  # `sentence: "..." | "..."`, or the refusal alone
        return str(json.loads(re.findall(r'"(?:[^"\\]|\\.)*"', rule)[0]))
    return re.sub(r"\\(.)", r"\1", re.sub(r"\((.*?)\|.*?\)|\[.*?\][*+?]?|\.\{.*?\}|\.[*+?]", r"\1", constraint["regex"]))


def _smallest_json(schema: dict[str, Any]) -> Any:
    if "enum" in schema:
        return schema["enum"][0]
    kind = schema.get("type")
    if kind == "object":
        return {name: _smallest_json(part) for name, part in schema.get("properties", {}).items()}
    return {"boolean": True, "integer": schema.get("minimum", 0), "number": 0, "array": [], "string": ""}.get(kind)


def _usage(text: str, body: dict[str, Any]) -> dict[str, int]:
    spent = sum(len(m["content"].split()) for m in body["messages"])
    return {"prompt_tokens": spent, "completion_tokens": len(text.split()), "total_tokens": spent + len(text.split())}


def _whole(text: str, body: dict[str, Any]) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    if body.get("logprobs"):
        choice["logprobs"] = {"content": _logprobs(text, (body.get("structured_outputs") or {}).get("choice", [text]))}
    base = {"id": "c", "object": "chat.completion", "created": 0, "model": MODEL}
    return {**base, "choices": [choice], "usage": _usage(text, body)}


def _logprobs(text: str, choices: list[str]) -> list[dict[str, Any]]:
    """One token per character; where the choices part, the reply's character has probability 0.8, the others share 0.2."""
    content = []
    for i, letter in enumerate(text):
        nexts = sorted({c[i] for c in choices if c[:i] == text[:i] and len(c) > i} - {letter})
        options = {letter: 0.8 if nexts else 1.0} | {n: 0.2 / len(nexts) for n in nexts}
        top = [{"token": t, "logprob": _log(p), "bytes": None} for t, p in options.items()]
        content.append({"token": letter, "logprob": _log(options[letter]), "bytes": None, "top_logprobs": top})
    return content


def _log(p: float) -> float:
    return math.log(p)


async def _pieces(text: str, body: dict[str, Any], cut: bool) -> Any:
    base = {"id": "c", "object": "chat.completion.chunk", "created": 0, "model": MODEL}
    words = re.findall(r"\S+\s*", text)
    deltas = [{"role": "assistant", "content": ""}, *({"content": w} for w in words)]
    for n, delta in enumerate(deltas):
        if cut and n == 2:
            yield "data: {broken\n\n"
            return
        yield f"data: {json.dumps({**base, 'choices': [{'index': 0, 'delta': delta, 'finish_reason': None}]})}\n\n"
    end = {**base, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    yield f"data: {json.dumps(end)}\n\n"
    yield f"data: {json.dumps({**base, 'choices': [], 'usage': _usage(text, body)})}\n\n"
    yield "data: [DONE]\n\n"
