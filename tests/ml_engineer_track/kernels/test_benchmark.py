"""`make kernels` without a GPU, and what its report says of figures that only a GPU gives."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ml_engineer_track import __main__ as cli
from ml_engineer_track.kernels import benchmark as b
from ml_engineer_track.kernels import device, report
from ml_engineer_track.kernels.correctness import Case
from shared.errors import UserError
from shared.hardware import fingerprint

RIGHT = Case("dequant_matvec, 4 bits", (5, 70, 3), "float32", 1e-7, 1e-5)
HARDWARE = fingerprint() | {"triton": "3"}


@pytest.mark.skipif(not device.HAS_TRITON, reason="Triton is not installed (it has wheels for Linux only)")
def test_without_a_gpu_the_kernels_are_checked_and_no_speed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("ARTIFACTS", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["ml_engineer_track", "kernels"])
    assert cli.main() == 0
    told = capsys.readouterr().out
    facts = json.loads((tmp_path / "reports" / "kernels.json").read_text(encoding="utf-8"))
    assert f"correct in Triton's interpreter: {len(facts['cases'])} of {len(facts['cases'])} cases" in told
    assert "not measured here: speeds need a GPU" in told
    assert {case["kernel"] for case in facts["cases"]} == {
        "dequant_matvec, 4 bits", "dequant_matvec, 2 bits", "cross_entropy, loss", "cross_entropy, gradient",
    }  # fmt: skip
    assert all(0 <= case["error"] <= case["bound"] for case in facts["cases"])
    assert (facts["interpreted"], facts["copy_bandwidth"], facts["products"], facts["losses"]) == (True, None, [], [])
    assert [found["reached"] for found in facts["findings"]] == [True, None, None, None]
    page = (tmp_path / "reports" / "kernels.html").read_text(encoding="utf-8")
    assert page.count("not measured here: speeds need a GPU") == 5


def test_a_wrong_kernel_is_reported_and_ends_the_command(tmp_path: Path) -> None:
    wrong = replace(RIGHT, error=float("nan"))
    with pytest.raises(UserError, match=r"1 of 2 cases are wrong on this device in dequant_matvec, 4 bits"):
        report.write(b.Results(HARDWARE, True, [RIGHT, wrong]), tmp_path)
    assert [case["right"] for case in json.loads((tmp_path / "kernels.json").read_text())["cases"]] == [True, False]


def test_goals_are_computed_from_what_a_gpu_measured() -> None:
    """Made-up times: only that the right ones are compared, and that every one has its row."""

    def product(side: str, seconds: float, model: str = "7 B", batch: int = 1) -> b.Product:
        return b.Product(model, 4096, 4096, batch, side, seconds, 2e-5, 10**7, 10**7 / seconds, 10**7 / seconds / 4e12)

    products = [product("ours, 4 bits", 3.2e-6), product("bitsandbytes nf4", 4e-6), product("bf16", 9e-6)]
    products += [product("ours, 4 bits", 9e-6, batch=8), product("bitsandbytes nf4", 4e-6, batch=8)]
    losses = [b.Loss("7 B", 8192, 32000, "ours", 2e6, 10**9), b.Loss("7 B", 8192, 32000, "PyTorch on float32", 1e6, 4 * 10**9)]
    results = b.Results(HARDWARE, False, [RIGHT], 4e12, products, losses)
    found = report.findings(results)
    assert [f["value"] for f in found] == [
        "1 of 1", "78% to 78%", "1.25 to 1.25 times as fast", "0.25 to 0.25 of the memory, 2.00 to 2.00 times as fast",
    ]  # fmt: skip
    assert all(f["reached"] for f in found)
    page = report.page(results)
    assert "not measured" not in page
    assert page.count("<td>4096 x 4096</td>") == len(products)
    slower = replace(results, products=[product("ours, 4 bits", 5e-6), product("bitsandbytes nf4", 4e-6)])
    assert [f["reached"] for f in report.findings(slower)] == [True, False, False, True]
