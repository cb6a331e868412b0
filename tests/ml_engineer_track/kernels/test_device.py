"""Where Triton cannot run, one line says so."""

from __future__ import annotations

import pytest
import torch

from ml_engineer_track.kernels import device
from shared.errors import UserError


def test_where_triton_cannot_run_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "HAS_TRITON", False)
    with pytest.raises(UserError, match=r"needs Triton, which is not installed .* -e '\.\[kernels\]'"):
        device.need_triton("--kernel triton")
    monkeypatch.setattr(device, "HAS_TRITON", True)
    monkeypatch.setattr(device, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"--kernel triton needs a GPU, and there is none"):
        device.need_triton("--kernel triton")
    device.need_triton("--kernel triton", gpu=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    with pytest.raises(UserError, match=r"a GPU without Triton: Tesla V100 \(7\.0\)"):
        device.need_triton("--kernel triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    device.need_triton("--kernel triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device, "INTERPRETED", True)
    device.need_triton("--kernel triton")
