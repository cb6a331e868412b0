"""The service in several replicas (shared/replicas.py): the same routes and page, more than one assistant behind them.

    python -m ai_engineer_track serve-ray --replicas 2                       # then open http://127.0.0.1:8000
    LLM_BASE_URL=http://models:8001/v1 python -m ai_engineer_track serve-ray --replicas 2 --max-replicas 6

Why an AI engineer has to think about state first: two messages of a conversation may meet two replicas. So whatever belongs to
a person is in files that all replicas share: conversations and cookies' key (`service/sessions.sqlite`), the assistant's memory
(`sessions.sqlite`), who is being answered right now (`service/working.lock`), cached answers, feedback. Counted by every replica
for itself: rates and places, so a client gets up to as many times `rate_per_minute` as there are replicas.

New documents (`python -m ai_engineer_track ingest`) move `artifacts/index/current`; then one replica after another is replaced.
"""

from __future__ import annotations

from collections.abc import Callable

from starlette.types import ASGIApp

from ai_engineer_track.api.main import create_app
from ai_engineer_track.api.service import Service
from ai_engineer_track.api.sessions import SessionStore
from ai_engineer_track.inference import inference_server, need_port
from ai_engineer_track.ingest import ingest as bring_up_to_date
from ai_engineer_track.settings import AiSettings
from shared.cluster import need_ray
from shared.level_memory import keep_memory_level
from shared.replicas import plan, serve_replicas

JOURNALS = "service"


def serve_ray(settings: AiSettings, replicas: int, most: int | None) -> None:
    """Serve until a signal comes. UserError when Ray is missing, the port is taken, or there is no model to ask."""
    need_ray("serve-ray", "serve")
    api = settings.api
    wanted = plan(api.host, api.port, replicas, most, api.concurrency, replicas * api.concurrency)
    need_port(api.host, api.port)
    elsewhere = settings.llm.base_url is not None
    with inference_server(settings) as served:
        served = served.model_copy(update={"artifacts": served.artifacts.resolve()})
        bring_up_to_date(served)
        SessionStore(served.artifacts / "service" / "sessions.sqlite").close()  # made by one, not by two at once

        def current() -> tuple[str, tuple[AiSettings]]:
            return _version(served, elsewhere), (served,)

        serve_replicas(wanted, open_replica, current, served.artifacts / "logs" / "replicas" / JOURNALS)


async def open_replica(settings: AiSettings) -> tuple[ASGIApp, Callable[[], str]]:
    """The application; its assistant is opened when it starts, and a replica whose assistant is not gets no messages."""
    keep_memory_level()
    app = create_app(settings)
    service: Service = app.state.service
    return app, lambda: "" if service.assistant is not None else service.broken


def _version(settings: AiSettings, with_model: bool) -> str:
    """The index; and the published model, whose ranker the service uses, unless it was started here and stays as it is."""
    pointers = [settings.artifacts / "index" / "current", settings.artifacts / "models" / "current"]
    read = [path.read_text(encoding="utf-8").strip() for path in pointers[: 1 + with_model] if path.exists()]
    return " with ".join(read)
