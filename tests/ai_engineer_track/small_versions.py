"""Published versions of a few bytes, the server that stands in for theirs, and roles that only pass messages on to it.

The server is a process of its own, started and stopped like the real one. Its replies name the version and take a while; being
stopped in the middle of one loses it, so that a test can tell. A version called `m-bad` fails its golden replies.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ai_engineer_track.llm import LlmUnavailable
from ai_engineer_track.router import Router
from ai_engineer_track.trace import step
from ai_engineer_track.turn import ClarifyQuestion, Turn
from shared import chat, handoff
from shared.handoff import BaseModelInfo, DataInfo, Manifest, Variant

SERVER = """
import http.server, json, pathlib, signal, sys, time
option = lambda name: sys.argv[sys.argv.index(name) + 1]
version = pathlib.Path(option("--model")).name
with open("started", "a") as note:
    note.write(version + "\\n")
if version == "m-bad":
    sys.exit("error: golden prompt 1 of 1 is answered differently from token 3 on")
if version == "m-slow":
    time.sleep(2)
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def reply(self, body):
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def do_GET(self):
        self.reply({"object": "list", "data": [{"id": "tiny:q4_0", "object": "model", "created": 0, "owned_by": "tests"}]})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][-1]["content"]
        time.sleep(0.1)
        message = {"role": "assistant", "content": f"{version} says: {asked}"}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        self.reply({"id": "c", "object": "chat.completion", "created": 0, "model": "tiny", "choices": [choice]})
    def log_message(self, *_):
        pass
http.server.ThreadingHTTPServer.request_queue_size = 64
http.server.ThreadingHTTPServer(("127.0.0.1", int(option("--port"))), Handler).serve_forever()
"""


def publish(models: Path, version: str) -> None:
    """A version that verifies; `current` points to it afterwards."""
    made = models.parent / f"made-{version}"
    made.mkdir(parents=True)
    (made / "config.json").write_text("{}")
    manifest = Manifest(
        model_id="tiny", version=version, created="2026-11-23T00:00:00+00:00", commit=None,
        base_model=BaseModelInfo(id="bundled", licence="Apache-2.0"), data=DataInfo(version="d-1", counts={}),
        training={}, seed=7, prompt_version=chat.PROMPT_VERSION, chat_template_sha256="a", tokenizer_sha256="b",
        context_window=64, stop_tokens=["<|end|>"], stop_token_ids=[1], use={"cpu": "q4_0", "cuda": "q4_0"}, hardware={},
        variants={"q4_0": Variant(name="q4_0", weight_bytes=2, quality={}, performance={}, files={}, golden=[])},
    )  # fmt: skip
    handoff.publish(manifest, {"q4_0": made}, models, lambda folder: None)


class EchoRoles:
    """The nodes of the graph with nothing in them but one call of the model. `vague` is asked back."""

    def __init__(self, llm: Any, judge_llm: Any) -> None:
        self.router, self.judge_llm = Router(llm), judge_llm
        self.cache, self.caching = None, True
        self.index: Any = None
        self.retriever: Any = None

    async def triage(self, state: Any) -> Any:
        return {"next": "retrieve", "opening": state.get("opening") or state["message"], "reading": {"shown": {}}}

    async def retrieve(self, state: Any) -> Any:
        return {}

    async def decide(self, state: Any) -> Any:
        return {"next": "clarify" if state["opening"] == "vague" and not state.get("replies") else "answer"}

    async def clarify(self, state: Any) -> Any:
        return {"question": ClarifyQuestion(feature="place", text="Where?", choices=["here", "there"]).model_dump()}

    async def answer(self, state: Any) -> Any:
        asked = " ".join([state["opening"], *(reply["text"] for reply in state.get("replies", []))])
        with step("answer"):
            try:
                reply = await self.router.chat("answer", [{"role": "user", "content": asked}], max_tokens=8)
            except LlmUnavailable as error:
                return self._end(Turn(kind="unavailable", text="Sorry.", reason=str(error)))
            return self._end(Turn(kind="answer", text=reply.text))

    verify = refuse = escalate = decline = retrieve

    def _end(self, turn: Turn) -> Any:
        return {"turn": turn.model_dump(mode="json"), "next": "end", "question": None}
