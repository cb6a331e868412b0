"""The serving suite drives a server: what it asks, how it adapts, what it records."""

from __future__ import annotations

import asyncio
import sys
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks import serving
from benchmarks.budget import Task
from benchmarks.load import Ask, Target, open_loop
from shared.errors import UserError


def test_calibration_learns_the_tokens_of_a_word(make_stub: Callable[..., Any]) -> None:
    stub = make_stub(first=0.0, each=0.0)
    target, words, note = serving.calibrate(Target(stub.url, "stub"))
    assert words == pytest.approx(2.0)
    assert target.extra == {"ignore_eos": True}
    assert note == ""
    assert len(serving.text(words, 100, "x").split()) == 50


@pytest.mark.parametrize("refusal", [400, 422])
def test_a_server_without_ignore_eos_is_measured_and_the_record_says_so(make_stub: Callable[..., Any], refusal: int) -> None:
    stub = make_stub(first=0.0, each=0.0, knows_ignore_eos=False, refusal=refusal)
    target, _, note = serving.calibrate(Target(stub.url, "stub"))
    assert target.extra == {}
    assert "ignore_eos" in note


def test_the_suite_measures_a_url_with_both_loops_and_the_prefix(
    make_stub: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = make_stub(first=0.02, each=0.001, slots=4)
    monkeypatch.setattr(serving, "LEVELS", (1, 4))
    monkeypatch.setattr(serving, "RATE_SHARES", (0.5, 1.5))
    records = list(serving.measure(Task("serving", {}, 8.0, url=stub.url)))
    assert {str(r.case["what"]) for r in records} == {"closed", "open", "prefix"}
    closed = {r.case["max_concurrency"]: r for r in records if r.case["what"] == "closed"}
    assert set(closed) == {1, 4}
    for record in closed.values():
        assert len(record.samples["output_throughput"]) == 5
        assert record.metrics["failed"] == 0
        assert (record.metrics["total_output_tokens"] or 0) == 32 * (record.metrics["completed"] or 0)
    assert (closed[4].metrics["output_throughput"] or 0) > 1.5 * (closed[1].metrics["output_throughput"] or 0)
    opened = [r for r in records if r.case["what"] == "open"]
    assert {str(r.case["mix"]) for r in opened} == {"chat", "rag"}
    assert all(r.case["slo"] == "ttft:1000 tpot:100" for r in opened)
    assert stub.seen[-1]["model"] == "stub"


@pytest.mark.parametrize(("each_second", "behind"), [(5, False), (60, True)])
def test_a_server_that_cannot_keep_up_is_called_saturated(
    each_second: float, behind: bool, make_stub: Callable[..., Any]
) -> None:
    stub = make_stub(first=0.05, each=0.0, slots=1)  # at most 20 a second
    target = Target(stub.url, "stub", {"ignore_eos": True})
    load = asyncio.run(open_loop(target, [Ask("one", 1)], each_second, 20, 7))
    assert serving.falls_behind(load, each_second, 7) is behind


def test_prompts_are_fixed_by_the_seed_and_share_no_prefix() -> None:
    asks = serving.mixed_asks("chat", 1.5, 200, 7)
    assert asks == serving.mixed_asks("chat", 1.5, 200, 7)
    assert asks != serving.mixed_asks("chat", 1.5, 200, 8)
    openings = {ask.prompt[:40] for ask in asks if len(ask.prompt) > 40}
    assert len(openings) > 0.95 * sum(len(ask.prompt) > 40 for ask in asks)


def test_the_mixes_have_the_shapes_they_are_named_after() -> None:
    chat = sorted(len(a.prompt.split()) for a in serving.mixed_asks("chat", 1.0, 500, 7))
    rag = sorted(len(a.prompt.split()) for a in serving.mixed_asks("rag", 1.0, 500, 7))
    assert 60 <= chat[250] <= 130
    assert chat[450] > 3 * chat[250]  # few, but long
    assert 800 <= rag[250] <= 1000
    assert rag[450] < 1.3 * rag[250]


def test_an_slo_is_written_as_in_vllm() -> None:
    assert serving.parse_slo(["ttft:200", "e2el:5000"]) == {"ttft": 200.0, "e2el": 5000.0}
    for wrong in ("ttft", "latency:3", "ttft:fast"):
        with pytest.raises(UserError, match="not an SLO"):
            serving.parse_slo([wrong])


def test_a_server_that_stops_at_once_is_reported_with_its_last_line() -> None:
    command = [sys.executable, "-c", "print('a first line'); raise SystemExit('no such model {port}')"]
    with pytest.raises(UserError, match="the server stopped: no such model"), serving.server("", command):
        pass


@pytest.mark.parametrize("ready", ["[503, 503, 200]", "[404]"])
def test_a_server_is_started_waited_for_and_stopped(ready: str) -> None:
    script = (
        "import http.server as h, sys\n"
        f"codes = {ready}\n"
        "class H(h.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        code = (codes.pop(0) if len(codes) > 1 else codes[0]) if self.path == '/ready' else 200\n"
        "        self.send_response(code); self.end_headers(); self.wfile.write(str(len(codes)).encode())\n"
        "h.HTTPServer(('127.0.0.1', int(sys.argv[1])), H).serve_forever()\n"
    )
    with serving.server("", [sys.executable, "-c", script, "{port}"]) as (url, process):
        assert url.endswith("/v1")
        # /health said 200 all along; only the last answer of /ready counts.
        assert urllib.request.urlopen(f"{url}/x").read() == b"1"
        assert process.is_running()
        assert (serving.peak_memory(process) or 1e6) > 1e5
    assert not process.is_running()


def test_nothing_at_a_url_is_an_error_for_the_user() -> None:
    with pytest.raises(UserError, match="no model list"):
        serving.first_model("http://127.0.0.1:9/v1")
