"""Ray is asked for in one place, and what hinders it is told in one line."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from shared.cluster import need_ray, start_ray
from shared.errors import UserError
from shared.settings import ROOT


class NoRay(SimpleNamespace):
    """Stands in for the package: it remembers what it was asked, and does not start."""

    def init(self, **asked: Any) -> None:
        self.asked = asked
        raise ConnectionError("no head node at that address. Read the manual\nand so on")

    def shutdown(self) -> None:
        self.ended = True


def test_without_ray_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"Ray is not installed in serve-ray\. pip install .* '\.\[ray\]'"):
        need_ray("serve-ray")


def test_a_ray_without_its_serving_part_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(__path__=[], __spec__=None))
    with pytest.raises(UserError, match=r"without what ray\.serve needs \(.*\) in serve-ray\. pip install") as caught:
        need_ray("serve-ray", "serve")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("address", "says"),
    [
        (None, "Ray did not start: no head node at that address in this machine. It gives up after 30 seconds: "),
        ("node0:6379", "Ray did not start: no head node at that address in node0:6379. Is the cluster up?"),
    ],
)
def test_a_ray_that_does_not_start_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch, address: str | None, says: str) -> None:
    ray = NoRay()
    monkeypatch.setitem(sys.modules, "ray", ray)
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "RAY_worker_niceness", "PYTHONPATH"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("RAY_ADDRESS", address or "")
    with pytest.raises(UserError) as caught:
        start_ray(3, 10**8)
    assert str(caught.value).startswith(says)
    assert len(str(caught.value).splitlines()) == 1
    assert ray.ended
    assert ray.asked["address"] == (address or "local")
    assert ("num_cpus" in ray.asked) == (address is None)  # of a cluster, nothing is decided here

    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert os.environ["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)
