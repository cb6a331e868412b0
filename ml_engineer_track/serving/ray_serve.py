"""The inference server in several replicas (shared/replicas.py): the same API, engines and checks, more than one of each.

    python -m ml_engineer_track serve-ray --replicas 2                       # the current version, on this machine
    python -m ml_engineer_track serve-ray --replicas 2 --max-replicas 6      # as many as the load asks for
    RAY_ADDRESS=auto python -m ml_engineer_track serve-ray --replicas 8      # on the cluster this machine belongs to

Why an ML engineer wants it: when `artifacts/models/current` moves, the replicas are replaced one after another while people are
being answered, and each one repeats its golden replies, from its own copy of the weights on its own machine, before it gets a
request. A version that does not is refused, and the one before goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from starlette.types import ASGIApp

from ml_engineer_track.serving.app import State, create_app
from ml_engineer_track.serving.catalog import EngineName, Limits, entries
from ml_engineer_track.serving.serve import listen, load_all
from shared import handoff
from shared.cluster import need_ray
from shared.level_memory import keep_memory_level
from shared.replicas import plan, serve_replicas

JOURNALS = "inference"


def serve_ray(
    model: Path | None, variants: Sequence[str], engine: EngineName, host: str, port: int, replicas: int, most: int | None,
    artifacts: Path, limits: Limits,
) -> None:  # fmt: skip
    """Serve until a signal comes. UserError when Ray is missing, the port is taken, or there is nothing to serve."""
    need_ray("serve-ray", "serve")
    # Those who wait do so in front of the replicas: what waits inside of one is lost with it.
    wanted = plan(host, port, replicas, most, limits.max_running, limits.max_waiting, torch.cuda.device_count())
    entries(model, variants, engine, artifacts)  # a user's mistakes are told before anything is started
    listen(host, port).close()

    def current() -> tuple[str, tuple[Path, Sequence[str], EngineName, Path, Limits, str]]:
        folder = (model or handoff.current(artifacts / "models")).resolve()
        return folder.name, (folder, variants, engine, artifacts.resolve(), limits, host)

    serve_replicas(wanted, open_replica, current, artifacts.resolve() / "logs" / "replicas" / JOURNALS)


async def open_replica(
    folder: Path, variants: Sequence[str], engine: EngineName, artifacts: Path, limits: Limits, host: str
) -> tuple[ASGIApp, Callable[[], str]]:
    """The API over engines that are loaded and repeat their golden replies. UserError when a file or a reply is another one."""
    keep_memory_level()
    state = State()
    await load_all(state, entries(folder, variants, engine, artifacts), limits)
    return create_app(state, _loaded, host), lambda: state.not_ready


async def _loaded(_: State) -> None:
    """Everything is: a replica is only asked once it can answer."""
