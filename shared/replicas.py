"""Several replicas of one HTTP service, on Ray Serve: what the `serve-ray` commands of both tracks have in common.

    python -m ml_engineer_track serve-ray --replicas 2
    python -m ai_engineer_track serve-ray --replicas 2

Why not one process: it is one fault away from no service, and a new version can only take its place by stopping it. Here
- a request goes to Serve's proxy and from there to the replica that has less to do; what none has room for waits in the proxy
- a replica that dies takes along what it was working on and nothing else; another one is started
- a new version starts as one replica more than there are, checks itself, takes requests, and only then does an old one
  finish its replies and go, one after another; a version that fails its own check never gets a request

A track says how one replica is opened (`Open`) and which version is wanted; routes and applications are those of the single
server. With RAY_ADDRESS set, the replicas spread over that cluster; else a Ray of its own is started here and ended with us.
Each replica keeps a journal of requests, so that after a crash somebody can say what was lost (`unfinished`).
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shared.cluster import start_ray
from shared.errors import UserError

#: Which replica answered; a client may send REQUEST_ID, and finds its request in the journal under it.
REPLICA_HEADER, REQUEST_ID = "X-Replica", "X-Request-ID"
APPLICATION, DEPLOYMENT = "service", "replicas"
POLL_SECONDS = 1.0
#: A replica is asked after its health so often, and is given up after so long without an answer, in seconds.
HEALTH_PERIOD, HEALTH_TIMEOUT = 1.0, 30.0
#: A replica that is replaced may take so long to finish its replies, in seconds.
DRAIN_SECONDS = 120.0
#: Extra replicas while a version is replaced, in percent (rounded up), and starts that may fail before the version is given up.
SURGE_PERCENT, TRIES = 25, 2
LOGGING = {"log_level": "ERROR", "enable_access_log": False}  # the journal is the access log
JOURNAL_BYTES = 64 * 2**20
#: Serve passes no large objects around.
OBJECT_STORE_BYTES = 100 * 2**20

#: Opens one replica: the application, and a question it is asked every second: why can it not serve? ("" when it can.)
Open = Callable[..., Awaitable[tuple[ASGIApp, Callable[[], str]]]]


@dataclass(frozen=True)
class Plan:
    """Where to listen; how many replicas (between two numbers, by load); how many requests each works on, and how many wait."""

    host: str
    port: int
    replicas: int
    most: int
    ongoing: int
    waiting: int
    gpus: float = 0.0

    @property
    def places(self) -> int:
        """Replicas that can be alive at once: the most, and those a rolling update adds."""
        return self.most + -(-self.most * SURGE_PERCENT // 100)


def plan(
    host: str, port: int, replicas: int, most: int | None, ongoing: int, waiting: int, gpus: int = 0
) -> Plan:  # fmt: skip
    """UserError when there could be fewer replicas than there shall be. `gpus` of this machine are shared out evenly."""
    if most is not None and most < replicas:
        raise UserError(f"at most {most} replicas, but at least {replicas}", "--max-replicas", f"Give {replicas} or more")
    wanted = Plan(host, port, replicas, most or replicas, ongoing, waiting)
    return Plan(host, port, replicas, most or replicas, ongoing, waiting, min(1.0, gpus / wanted.places))


def serve_replicas(
    plan: Plan, open_replica: Open, wanted: Callable[[], tuple[str, tuple[Any, ...]]], journals: Path
) -> None:  # fmt: skip
    """Serve until a signal comes. `wanted` is asked again and again for the version and the arguments `open_replica` then gets.

    UserError when Ray is not installed or the first version cannot be served. A later one that cannot is told, and the one
    before goes on.
    """
    version, arguments = wanted()
    with _cluster(plan):
        for old in journals.glob("*.jsonl"):
            old.unlink()
        _deploy(plan, open_replica, version, arguments, journals)
        print(f"ready: {version}, {plan.replicas} replicas on http://{plan.host}:{plan.port}", flush=True)
        serving, refused = (version, arguments), ""
        while True:
            time.sleep(POLL_SECONDS)
            try:
                version, arguments = wanted()
            except UserError:
                continue  # whoever moves the pointer is not done yet
            if version in (serving[0], refused):
                continue
            print(f"replacing {serving[0]} with {version}", flush=True)
            try:
                _deploy(plan, open_replica, version, arguments, journals)
            except UserError as problem:
                refused = version
                print(f"{version} is not served: {problem}", flush=True)
                _deploy(plan, open_replica, *serving, journals)
                print(f"{serving[0]} goes on", flush=True)
            else:
                serving, refused = (version, arguments), ""
                print(f"serving {version}", flush=True)


@contextmanager
def _cluster(plan: Plan) -> Iterator[None]:
    """Ray and Serve's proxy, ended with the block; Ctrl-C and SIGTERM end it."""
    start_ray(plan.places, OBJECT_STORE_BYTES)
    import ray
    from ray import serve

    signal.signal(signal.SIGTERM, _stopped)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        serve.start(
            proxy_location="EveryNode", http_options={"host": plan.host, "port": plan.port},
            logging_config=LOGGING,
        )  # fmt: skip
        yield
    except KeyboardInterrupt:
        print("stopping", flush=True)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        serve.shutdown()
        ray.shutdown()


def _deploy(plan: Plan, open_replica: Open, version: str, arguments: tuple[Any, ...], journals: Path) -> None:
    """Bring every replica to a version; returns when they all serve it. UserError with a replica's own reason when it cannot."""
    from ray import serve

    class Replica:
        """What Serve makes copies of."""

        async def __serve_build_asgi_app__(self) -> ASGIApp:
            app, self.problem = await open_replica(*arguments)
            name = serve.get_replica_context().replica_id.unique_id
            return Journal(app, journals / f"{name}.jsonl", name, version)

        def check_health(self) -> None:
            if why := self.problem():
                raise UserError(why)

    scale = {"min_replicas": plan.replicas, "max_replicas": plan.most, "target_ongoing_requests": max(1, plan.ongoing // 2)}
    replicas = {"num_replicas": plan.replicas} if plan.most == plan.replicas else {"autoscaling_config": scale}
    deployment = serve.deployment(serve.ingress()(Replica)).options(
        name=DEPLOYMENT, max_ongoing_requests=plan.ongoing, max_queued_requests=plan.waiting,
        ray_actor_options={"num_cpus": 1, "num_gpus": plan.gpus}, max_surge_percent=SURGE_PERCENT,
        max_constructor_retry_count=TRIES, health_check_period_s=HEALTH_PERIOD, health_check_timeout_s=HEALTH_TIMEOUT,
        graceful_shutdown_timeout_s=DRAIN_SECONDS, graceful_shutdown_wait_loop_s=0.5, logging_config=LOGGING,
        **replicas,
    )  # fmt: skip
    try:
        serve.run(deployment.bind(), name=APPLICATION, route_prefix="/")
    except RuntimeError:
        why = serve.status().applications[APPLICATION].deployments[DEPLOYMENT].message.strip()
        told = re.findall(r"UserError: (.+)", why) or why.splitlines()
        raise UserError(f"no replica of {version} can serve: {told[-1].strip()}") from None


def _stopped(number: int, frame: object) -> None:
    raise KeyboardInterrupt


class Journal:
    """ASGI middleware of a replica: one line when a request begins and one when it has ended, and REPLICA_HEADER on its answer.

    Written at once and without a buffer, so that a replica which is killed leaves behind what it was working on.
    """

    def __init__(self, app: ASGIApp, path: Path, replica: str, version: str) -> None:
        self.app, self.replica = app, replica
        self.head = {"replica": replica, "pid": os.getpid(), "version": version, "ready": time.time()}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._running: set[str] = set()
        self._write(self.head)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        name = Headers(scope=scope).get(REQUEST_ID, "")
        name = name if re.fullmatch(r"[\w.-]{8,64}", name, re.ASCII) else secrets.token_hex(8)
        status = 0

        async def marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REPLICA_HEADER] = self.replica
            await send(message)

        self._running.add(name)
        self._write({"begun": name, "path": scope["path"], "at": time.time()})
        try:
            await self.app(scope, receive, marked)
        finally:
            self._running.discard(name)
            self._write({"ended": name, "status": status, "at": time.time()})

    def _write(self, line: dict[str, Any]) -> None:
        """A disk that is full costs the line, not the request. A file that has grown large begins anew with what is running."""
        try:
            if os.fstat(self._file).st_size > JOURNAL_BYTES:
                os.ftruncate(self._file, 0)
                lines = [self.head, *({"begun": name, "path": "", "at": 0.0} for name in self._running)]
            else:
                lines = [line]
            os.write(self._file, "".join(json.dumps(each) + "\n" for each in lines).encode())
        except OSError:
            pass


@dataclass(frozen=True)
class Journaled:
    """What a replica's journal says: who it was, since when it was ready (Unix time), and how many requests it began."""

    replica: str
    pid: int
    version: str
    ready: float
    begun: int
    unfinished: frozenset[str]


def read_journals(folder: Path) -> list[Journaled]:
    """Every replica of the last start, in the order in which they became ready."""
    found = []
    for path in folder.glob("*.jsonl"):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        if lines:
            head = lines[0]
            begun = [line["begun"] for line in lines if "begun" in line]
            open_ones = frozenset(begun) - {line["ended"] for line in lines if "ended" in line}
            found.append(Journaled(head["replica"], head["pid"], head["version"], head["ready"], len(begun), open_ones))
    return sorted(found, key=lambda journal: journal.ready)
