"""The outer loop, whole: from a published model to a product that was talked to, judged and measured. The table of contents.

    make ai            (python -m ai_engineer_track run [--preset tiny])

Each stage is a file of its own. The model is checked and served first, because everything else talks to it; the index is
brought up to date; the service starts; people are simulated; parts are measured; the report is written.
"""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
import uvicorn
from tqdm import tqdm

from ai_engineer_track import report
from ai_engineer_track.api.main import create_app
from ai_engineer_track.evaluate import KINDS, Outcome, run_suite, scenarios, summarise, worst
from ai_engineer_track.inference import free_port, inference_server
from ai_engineer_track.ingest import ingest
from ai_engineer_track.measure import measure_parts
from ai_engineer_track.settings import AiSettings
from shared.errors import UserError
from shared.hardware import fingerprint

T = TypeVar("T")
#: the suite is one client that sends as fast as it can; the limit is for people
SUITE_RATE_PER_MINUTE = 1_000_000


def run(settings: AiSettings) -> Path:
    """All stages in order. Returns the path of the report's page."""
    seconds: dict[str, float] = {}

    def stage(name: str, work: Callable[[], T], says: Callable[[T], str]) -> T:
        began = time.perf_counter()
        result = work()
        seconds[name] = time.perf_counter() - began
        print(f"{name:<10} {says(result)}  ({seconds[name]:.1f} s)", flush=True)
        return result

    began = time.perf_counter()
    with inference_server(settings) as served:
        seconds["model"] = time.perf_counter() - began
        address = served.llm.base_url
        print(
            f"{'model':<10} verified and served at {address}. Why: what is published is what answers  ({seconds['model']:.1f} s)",
            flush=True,
        )
        index = stage(
            "ingest",
            lambda: ingest(served),
            lambda r: (
                f"{r.passages} passages, {r.added} new, {len(r.skipped)} files skipped. "
                "Why: an answer is only as good as what is found for it"
            ),
        )
        for path, reason in index.skipped:
            print(f"  skipped {path}: {reason}")
        with service(served) as url:
            outcomes = stage(
                "converse",
                lambda: converse(url, served),
                lambda o: (
                    f"{len(o)} conversations over HTTP, {sum(x.ok for x in o)} right, {sum(bool(x.error) for x in o)} errors. "
                    "Why: parts can work while the product fails between them"
                ),
            )
        parts = stage(
            "measure",
            lambda: asyncio.run(measure_parts(served)),
            lambda p: f"{', '.join(p)}. Why: when an answer is wrong, these say which part was",
        )
        model = asyncio.run(_model_name(served))
    facts: dict[str, Any] = {
        "preset": settings.preset,
        "seed": settings.seed,
        "model": model,
        "hardware": fingerprint(),
        "index": {"version": index.version, "passages": index.passages},
        "suite": summarise(outcomes, settings),
        **parts,
        "worst": [_story(o) for o in worst(outcomes)],
        "samples": [_story(next(o for o in outcomes if o.scenario.kind == kind)) for kind in KINDS if _has(outcomes, kind)],
        "seconds": seconds,
    }
    return report.write(facts, settings.artifacts / "reports")


def converse(url: str, settings: AiSettings) -> list[Outcome]:
    """The scenario suite, with a bar."""
    suite = scenarios(settings)
    with tqdm(total=len(suite), desc="  converse", leave=False) as bar:
        return asyncio.run(run_suite(url, settings, suite, on_done=lambda _: bar.update(1)))


@contextmanager
def service(settings: AiSettings, start_seconds: float = 120.0) -> Iterator[str]:
    """The service in a thread of this process, on a free port; yields its address.

    Its conversations, cached answers and feedback go to `artifacts/suite`, emptied first: simulated people are no feedback to
    learn from (they ask the test questions), and an answer of the last run is no answer of this one. UserError when it does not
    become ready, with what `/ready` says.
    """
    api = settings.api.model_copy(update={"rate_per_minute": SUITE_RATE_PER_MINUTE, "host": "127.0.0.1", "port": free_port()})
    settings = settings.model_copy(update={"api": api, "artifacts": own_folder(settings.artifacts, "suite")})
    server = uvicorn.Server(uvicorn.Config(create_app(settings), host=api.host, port=api.port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    url = f"http://{api.host}:{api.port}"
    try:
        _wait(url, start_seconds)
        yield url
    finally:
        server.should_exit = True
        thread.join(timeout=15)


def own_folder(artifacts: Path, name: str, copied: Sequence[str] = ()) -> Path:
    """An empty `artifacts/<name>` in which only what was made before it is seen; `copied` folders may be written to."""
    folder = artifacts / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (artifacts / "heads").mkdir(exist_ok=True)
    for name in ("index", "models", "heads", "judge"):
        if name in copied:
            shutil.copytree(artifacts / name, folder / name)
        elif (artifacts / name).exists():
            (folder / name).symlink_to((artifacts / name).resolve(), target_is_directory=True)
    (folder / "vectors.npz").symlink_to((artifacts / "vectors.npz").resolve())
    return folder


def _wait(url: str, seconds: float) -> None:
    deadline, said = time.monotonic() + seconds, "it never answered"
    while time.monotonic() < deadline:
        try:
            answer = httpx.get(f"{url}/ready", timeout=5.0)
            if answer.status_code == 200:
                return
            said = answer.text[:200]
        except httpx.HTTPError:
            pass
        time.sleep(0.3)
    raise UserError(f"the service was not ready after {seconds:.0f} s: {said}", url, "Look at artifacts/logs/inference.log")


async def _model_name(settings: AiSettings) -> str:
    from ai_engineer_track.llm import Llm

    return await Llm(settings.llm).model()


def _story(outcome: Outcome) -> dict[str, Any]:
    return {
        "id": outcome.scenario.id,
        "kind": outcome.scenario.kind,
        "ok": outcome.ok,
        "why": outcome.why,
        "transcript": outcome.transcript,
    }


def _has(outcomes: list[Outcome], kind: str) -> bool:
    return any(o.scenario.kind == kind for o in outcomes)
