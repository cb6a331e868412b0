"""vLLM is started on the published files and held to their golden replies; a small server that answers like it stands in."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from shared import handoff
from shared.files import write_text
from shared.settings import ROOT
from tests.ml_engineer_track.serving.test_app import wait

STAND_IN = """#!{python}
import http.server, json, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def do_GET(self): self.answer({{}})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        assert asked["model"] == "tiny-bundled:bf16" and asked["temperature"] == 0, asked
        self.answer({{"choices": [REPLIES.pop(0)]}})
    def answer(self, body):
        self.send_response(200); self.end_headers(); self.wfile.write(json.dumps(body).encode())
REPLIES = {replies}
print("vllm", *sys.argv[1:], flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(artifact: Path, folder: Path, replies: list[dict[str, object]], port: int) -> subprocess.Popen[str]:
    program = folder / "vllm"
    write_text(program, STAND_IN.format(python=sys.executable, replies=repr(replies)))
    program.chmod(0o755)
    return subprocess.Popen(
        [sys.executable, "-m", "ml_engineer_track", "serve", "--engine", "vllm", "--model", str(artifact), "--port", str(port)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


@pytest.fixture
def replies(artifact: Path) -> list[dict[str, object]]:
    """What vLLM says where it repeats the golden replies: once with tokens (and the end token), once as older ones do."""
    first, second = handoff.read_manifest(artifact).variants["bf16"].golden
    return [{"text": first.reply, "token_ids": first.token_ids}, {"text": second.reply}]


def answers(port: int) -> bool:
    try:
        return bool(urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).status == 200)
    except OSError:
        return False


def test_it_is_ready_when_it_repeats_the_golden_replies_and_stops_with_us(
    artifact: Path, tmp_path: Path, replies: list[dict[str, object]]
) -> None:
    port = free_port()
    process = start(artifact, tmp_path, replies, port)
    try:
        assert process.stdout
        lines = iter(process.stdout)
        told = next(lines).split()
        assert told[:3] == ["vllm", "serve", str(artifact / "bf16")]
        assert told[-3:] == ["--served-model-name", "tiny-bundled:bf16", "bf16"]
        assert next(lines) == "ready\n"
        assert answers(port)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
        wait(lambda: not answers(port))
    finally:
        process.kill()
        process.communicate()


def test_another_reply_is_named_and_ends_it(artifact: Path, tmp_path: Path, replies: list[dict[str, object]]) -> None:
    ids = list(replies[0]["token_ids"])  # type: ignore[call-overload]
    ids[2] += 1
    process = start(artifact, tmp_path, [{**replies[0], "token_ids": ids}], free_port())
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 2
    assert "ready" not in output
    assert "golden prompt 1 of 2" in errors
    assert "is answered differently from token 3 on" in errors
    assert errors.strip().endswith("in model tiny-bundled:bf16. Do not serve it with this engine")


def test_a_port_in_use_is_said_before_vllm_starts(artifact: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = start(artifact, tmp_path, [], taken.getsockname()[1])
        output, errors = process.communicate(timeout=240)
    assert process.returncode == 2
    assert output == ""
    assert "is in use. Choose another with --port" in errors
