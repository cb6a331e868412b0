"""The model behind the product: an address that somebody set, or the bundled server, started and stopped with us.

Why an AI engineer keeps this to one address: everything above it speaks the OpenAI API, so vLLM, llama.cpp's server or a hosted
provider take the bundled server's place by `LLM_BASE_URL`, `LLM_MODEL` and `LLM_API_KEY`, and nothing else changes. The
bundled server is started as a process of its own, never imported: the handoff is an artifact and an HTTP API.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from ai_engineer_track.settings import AiSettings
from shared import handoff
from shared.errors import UserError

START_SECONDS = 180.0
STOP_SECONDS = 15.0


@contextmanager
def inference_server(settings: AiSettings, port: int | None = None) -> Iterator[AiSettings]:
    """Settings whose models answer for as long as the block runs: those without an address get the bundled server's.

    UserError when no model has been published, when an artifact is damaged, or when the server does not become ready.
    """
    if settings.llm.base_url:
        yield settings
        return
    folder = handoff.current(settings.artifacts / "models")
    handoff.verify(folder)
    port = port or free_port()
    log = settings.artifacts / "logs" / "inference.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "ml_engineer_track", "serve", "--model", str(folder), "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        _wait(process, f"http://127.0.0.1:{port}/ready", log)
        here = {"base_url": f"http://127.0.0.1:{port}/v1"}
        models = {"llm": settings.llm, "large": settings.large, "judge": settings.judge}
        without = {name: llm.model_copy(update=here) for name, llm in models.items() if llm and not llm.base_url}
        yield settings.model_copy(update=without)
    finally:
        stop(process)


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def need_port(host: str, port: int) -> None:
    """UserError when somebody already listens there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(f"cannot listen ({error.strerror})", f"{host}:{port}", "Set PORT to another one") from None


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise UserError(
                f"the inference server stopped at its start: {lines[-1] if lines else 'no output'}", str(log), "Read it"
            )
        try:
            if httpx.get(url, timeout=2.0).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise UserError(f"the inference server was not ready after {START_SECONDS:.0f} s", str(log), "Read the log")


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask it to finish what it is doing, then insist."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
