"""The inference server beside the product: found, started, waited for and never left behind."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import httpx
import pytest

from ai_engineer_track import inference
from ai_engineer_track.inference import free_port, inference_server, need_port
from ai_engineer_track.settings import AiSettings, load_ai_settings
from shared import handoff
from shared.errors import UserError
from shared.handoff import BaseModelInfo, DataInfo, Manifest, Variant

#: what stands in for `python -m ml_engineer_track serve`: notes its arguments and process id, then does as the test says
STAND_IN = """
import http.server, os, pathlib, signal, sys, time
pathlib.Path("started").write_text(f"{os.getpid()} {' '.join(sys.argv[1:])}")
class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/ready" else 404)
        self.end_headers()
    def log_message(self, *_):
        pass
def serve():
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Ready).serve_forever()
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`stand_in("code")` is what the command runs from now on."""
    package = tmp_path / "here" / "ml_engineer_track"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()  # a package, or one further down the path would go first
    monkeypatch.chdir(package.parent)  # `python -m` looks here first

    def put(code: str) -> None:
        (package / "__main__.py").write_text(STAND_IN + code, encoding="utf-8")

    return put


@pytest.fixture
def published(tmp_path: Path) -> AiSettings:
    """Settings whose artifacts hold a published model of one small file."""
    made = tmp_path / "made"
    made.mkdir()
    (made / "config.json").write_text("{}")
    manifest = Manifest(
        model_id="smoke", version="m-1", created="2026-11-23T00:00:00+00:00", commit=None,
        base_model=BaseModelInfo(id="bundled", licence="Apache-2.0"), data=DataInfo(version="d-1", counts={}),
        training={}, seed=7, prompt_version=1, chat_template_sha256="a", tokenizer_sha256="b", context_window=64,
        stop_tokens=["<|end|>"], stop_token_ids=[1], use={"cpu": "bf16", "cuda": "bf16"}, hardware={},
        variants={"bf16": Variant(name="bf16", weight_bytes=2, quality={}, performance={}, files={}, golden=[])},
    )  # fmt: skip
    handoff.publish(manifest, {"bf16": made}, tmp_path / "artifacts" / "models", lambda folder: None)
    return load_ai_settings("smoke", artifacts=tmp_path / "artifacts")


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def started() -> int:
    return int(Path("started").read_text().split()[0])


def test_an_address_that_is_set_is_used_and_nothing_is_started(tmp_path: Path, stand_in) -> None:
    stand_in("serve()")
    settings = load_ai_settings("smoke", llm_base_url="http://127.0.0.1:9/v1", artifacts=tmp_path / "artifacts")
    with inference_server(settings) as served:
        assert served == settings
    assert not Path("started").exists()
    assert not (tmp_path / "artifacts").exists()


def test_without_a_published_model_it_says_so(tmp_path: Path, stand_in) -> None:
    stand_in("serve()")
    settings = load_ai_settings("smoke", artifacts=tmp_path / "artifacts")
    with pytest.raises(UserError, match=r"no model has been published.*make ml"), inference_server(settings):
        pass
    assert not Path("started").exists()


def test_a_damaged_model_is_not_served(published: AiSettings, stand_in) -> None:
    stand_in("serve()")
    (published.artifacts / "models" / "m-1" / "bf16" / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config\.json is not what was published"), inference_server(published):
        pass
    assert not Path("started").exists()


def test_the_server_answers_inside_the_block_and_is_gone_after_it(published: AiSettings, stand_in) -> None:
    stand_in("serve()")
    with inference_server(published) as served:
        assert served.llm.base_url is not None
        assert httpx.get(served.llm.base_url.removesuffix("/v1") + "/ready").status_code == 200
        assert served.model_copy(update={"llm": published.llm}) == published
        _, *arguments = Path("started").read_text().split()
        assert arguments[:3] == ["serve", "--model", str(published.artifacts / "models" / "m-1")]
    assert not is_running(started())


def test_models_without_an_address_are_the_bundled_servers(published: AiSettings, stand_in) -> None:
    stand_in("serve()")
    other = published.llm.model_copy(update={"base_url": "http://127.0.0.1:9/v1"})
    judge = published.llm.model_copy(update={"model": "int8"})
    with inference_server(published.model_copy(update={"large": other, "judge": judge})) as served:
        assert served.large == other
        assert served.judge is not None
        assert (served.judge.base_url, served.judge.model) == (served.llm.base_url, "int8")


def test_it_is_stopped_when_the_work_fails(published: AiSettings, stand_in) -> None:
    stand_in("serve()")
    with pytest.raises(ZeroDivisionError), inference_server(published):
        raise ZeroDivisionError
    assert not is_running(started())


def test_a_server_that_will_not_stop_is_killed(published: AiSettings, stand_in, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in("signal.signal(signal.SIGTERM, signal.SIG_IGN)\nserve()")
    monkeypatch.setattr(inference, "STOP_SECONDS", 0.3)
    with inference_server(published):
        pass
    assert not is_running(started())


@pytest.mark.parametrize(
    ("code", "said"),
    [('print("loading"); sys.exit("error: no memory left")', "error: no memory left"), ("sys.exit(3)", "no output")],
)
def test_a_server_that_dies_at_its_start_says_why(published: AiSettings, stand_in, code: str, said: str) -> None:
    stand_in(code)
    with pytest.raises(UserError, match=said) as refused, inference_server(published):
        pass
    assert str(published.artifacts / "logs" / "inference.log") in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not is_running(started())


def test_a_server_that_is_never_ready_is_given_up(published: AiSettings, stand_in, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in("time.sleep(60)")
    monkeypatch.setattr(inference, "START_SECONDS", 1.5)
    with pytest.raises(UserError, match="not ready after"), inference_server(published):
        pass
    assert not is_running(started())


def test_a_taken_port_is_refused_and_a_free_one_is_not() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="Set PORT"):
            need_port("127.0.0.1", taken.getsockname()[1])
    need_port("127.0.0.1", free_port())


def test_an_address_that_is_not_this_machines_is_refused() -> None:
    with pytest.raises(UserError, match=r"192\.0\.2\.1:8000"):  # reserved for documentation (RFC 5737)
        need_port("192.0.2.1", 8000)
