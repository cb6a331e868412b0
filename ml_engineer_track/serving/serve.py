"""Starts the server: finds the models, takes the port, loads, compares with the golden replies, and only then is ready.

    python -m ml_engineer_track serve [--variant q8_0] [--port 8001]

SIGTERM (or Ctrl-C) stops taking requests, lets running replies finish for up to DRAIN_SECONDS, and ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import uvicorn

from ml_engineer_track.serving import parity
from ml_engineer_track.serving.adapters import Adapter, base_of
from ml_engineer_track.serving.app import State, create_app
from ml_engineer_track.serving.catalog import EngineName, Entry, Limits, build, entries, with_adapters, with_kernel
from ml_engineer_track.serving.speculative import with_draft
from shared.errors import UserError
from shared.logs import setup_logs

DRAIN_SECONDS = 10
#: Connections the system may hold ready for us: a burst of a thousand must not be refused by the kernel.
BACKLOG = 2048


def serve(
    model: Path | None, variants: Sequence[str], adapters: Sequence[Adapter], engine: EngineName, host: str, port: int,
    artifacts: Path, limits: Limits, draft: str | None = None, kernel: str | None = None,
) -> None:  # fmt: skip
    """Serve until a signal comes. UserError when there is nothing to serve, the port is taken, or the parity check fails."""
    if adapters:
        found = with_adapters(base_of(adapters, model, variants, engine), adapters, artifacts)
    elif kernel:
        found = with_kernel(model, variants, engine, artifacts)
    else:
        found = entries(model, variants, engine, artifacts)
    if draft:
        found = with_draft(found, draft, artifacts)
    taken = listen(host, port)
    setup_logs(artifacts / "logs" / "inference.jsonl")
    state = State()
    problems: list[UserError] = []

    async def load(state: State) -> None:
        try:
            await load_all(state, found, limits)
        except UserError as problem:
            state.not_ready = str(problem)
            problems.append(problem)
            server.should_exit = True
        except Exception as error:
            state.not_ready = f"loading failed: {error!r}"
            server.should_exit = True
            raise

    config = uvicorn.Config(
        create_app(state, load, host),
        log_level="warning",
        timeout_graceful_shutdown=DRAIN_SECONDS,
        backlog=BACKLOG,
        lifespan="on",
    )
    server = uvicorn.Server(config)
    print(f"listening on http://{host}:{taken.getsockname()[1]}/v1, loading {', '.join(e.name for e in found)}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn has drained; it raises the signal again for whoever started it
        server.run(sockets=[taken])
    if problems:
        raise problems[0]
    if not server.started or (state.not_ready and state.not_ready != "loading"):
        raise UserError("the server could not start", state.not_ready, "See the message above")


def end_with_parent() -> None:
    """End, in good order, when whoever started us is gone: its end of our standard input is closed then, whatever killed it."""

    def wait() -> None:
        while sys.stdin.buffer.read(4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def listen(host: str, port: int) -> socket.socket:
    """The socket, taken before anything is loaded. UserError when the port is in use or not ours to take."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    taken = socket.socket(family, socket.SOCK_STREAM)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((host, port))
        taken.listen(BACKLOG)
    except OSError as error:
        taken.close()
        why = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be taken ({error.strerror})"
        raise UserError(f"port {port} of {host} {why}", "", "Choose another with --port") from None
    except OverflowError:
        taken.close()
        raise UserError(f"port {port} does not exist", "--port", "Ports go from 0 to 65535") from None
    return taken


async def load_all(state: State, found: Sequence[Entry], limits: Limits) -> None:
    """Load every model and check its golden replies; `state` is ready only after the last one."""
    for entry in found:
        state.not_ready = f"loading {entry.name}"
        served = await asyncio.to_thread(build, entry, limits, own_process=True)
        await asyncio.to_thread(served.engine.start)
        state.models[entry.name] = served  # closed with the rest when the check fails
        state.not_ready = f"comparing {entry.name} with its golden replies"
        await parity.check(served.engine, served.tokenizer, entry.name, entry.golden)
        state.aliases |= {alias: entry.name for alias in entry.aliases if alias not in state.aliases}
        checked = f"{len(entry.golden)} golden replies repeated" if entry.golden else "no golden replies to compare with"
        print(f"{entry.name}: {served.engine.name}, {served.context} tokens of context, {checked}", flush=True)
    gc.collect()
    gc.freeze()  # libraries and tokenizers stay; looking through them all takes longer than a step, again and again
    state.not_ready = ""
    print("ready", flush=True)
