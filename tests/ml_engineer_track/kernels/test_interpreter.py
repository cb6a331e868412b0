"""Runs the files `interpreted_*.py` in a process where Triton interprets: it decides that when it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ml_engineer_track.kernels.device import HAS_TRITON
from shared.settings import ROOT

FILES = sorted(Path(__file__).parent.glob("interpreted_*.py"))


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed (it has wheels for Linux only)")
def test_the_kernels_in_tritons_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--noconftest", *map(str, FILES)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
