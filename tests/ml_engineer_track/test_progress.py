"""Progress never mixes with results: stdout is redirected into files."""

from __future__ import annotations

import subprocess
import sys

from shared.settings import ROOT

SAYS = """
import io, sys
from contextlib import redirect_stdout
from ml_engineer_track import progress
progress.time.monotonic = iter(range(0, 1000, 30)).__next__
for _ in progress.watched([1], "reading"):
    pass
with redirect_stdout(io.StringIO()) as log:
    for _ in progress.watched([1], "working"):
        pass
print("result" if "working" in log.getvalue() else "lost")
"""


def test_progress_goes_to_stderr_unless_stdout_was_redirected_from_within() -> None:
    done = subprocess.run([sys.executable, "-c", SAYS], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "result\n"
    assert done.stderr == "  reading: 1 of 1\n"
