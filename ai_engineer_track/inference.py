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
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from ai_engineer_track.settings import AiSettings
from shared import handoff
from shared.errors import UserError

START_SECONDS = 180.0
STOP_SECONDS = 15.0


@dataclass(frozen=True)
class Server:
    """A bundled server that is ready: it has repeated the golden replies of the version it serves."""

    version: str
    folder: Path
    url: str
    process: subprocess.Popen[bytes]

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def serves(self, settings: AiSettings) -> AiSettings:
        """The settings with this server behind every model that has no address of its own."""
        here = {"base_url": self.url, "published": self.version}
        models = {"llm": settings.llm, "large": settings.large, "judge": settings.judge}
        without = {name: llm.model_copy(update=here) for name, llm in models.items() if llm and not llm.base_url}
        return settings.model_copy(update=without)


class Servers:
    """The inference servers of a service, one a version. None is left behind when the block ends, however it ends."""

    def __init__(self, settings: AiSettings) -> None:
        self.settings, self.models = settings, settings.artifacts / "models"
        self._running: list[Server] = []
        self._lock, self._closed = threading.Lock(), threading.Event()

    def start(self, version: str, log: str = "") -> Server:
        """Serve a version, and wait until it is ready. UserError when it is damaged, missing, or does not become ready."""
        folder = self.models / version
        if not version or not folder.is_dir():
            raise UserError(f"there is no version {version!r}", str(self.models), "Run `make ml`")
        server = start_server(self.settings, folder, log or f"inference-{version}.log", given_up=self._closed)
        with self._lock:
            self._running.append(server)
        if self._closed.is_set():
            self.stop(server)
        return server

    def current(self) -> Server:
        """The server of the current version, started when it does not run yet. UserError as in `start`, or without any."""
        version = handoff.current(self.models).name
        running = next((server for server in self._running if server.version == version and server.alive), None)
        return running or self.start(version, "inference.log")

    def give_up(self) -> None:
        """Wait no longer for servers that are starting: the service ends."""
        self._closed.set()

    def stop(self, server: Server) -> None:
        """It finishes what it is doing first."""
        stop(server.process)
        with self._lock:
            self._running = [other for other in self._running if other is not server]

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, *_: object) -> None:
        self.give_up()
        for server in list(self._running):
            self.stop(server)


@contextmanager
def inference_server(settings: AiSettings, port: int | None = None) -> Iterator[AiSettings]:
    """Settings whose models answer for as long as the block runs: those without an address get the bundled server's.

    UserError when no model has been published, when an artifact is damaged, or when the server does not become ready.
    """
    if settings.llm.base_url:
        yield settings
        return
    server = start_server(settings, handoff.current(settings.artifacts / "models"), "inference.log", port)
    try:
        yield server.serves(settings)
    finally:
        stop(server.process)


def start_server(
    settings: AiSettings, folder: Path, log_name: str, port: int | None = None, given_up: threading.Event | None = None
) -> Server:
    """The bundled server on a version's folder, ready. UserError as in `inference_server`; nothing is left running then."""
    handoff.verify(folder)
    port = port or free_port()
    log = settings.artifacts / "logs" / log_name
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "ml_engineer_track", "serve", "--model", str(folder), "--port", str(port)]
    with log.open("wb") as output:  # our end of its stdin closes when we die, however we die: nobody is left behind
        process = subprocess.Popen(
            [*command, "--with-parent"], stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        _wait(process, f"http://127.0.0.1:{port}/ready", log, given_up or threading.Event())
    except BaseException:
        stop(process)
        raise
    return Server(folder.name, folder, f"http://127.0.0.1:{port}/v1", process)


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


def _wait(process: subprocess.Popen[bytes], url: str, log: Path, given_up: threading.Event) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and not given_up.is_set():
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
        given_up.wait(0.2)
    if given_up.is_set():
        raise UserError("the service ended while a server was starting", str(log))
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
