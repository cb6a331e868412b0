"""The watcher: a process that dies is started again, one that was told to stop or made a mistake of the user's is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

#: dies in the way its first argument says until the file named by its second has as many lines as the third says, then stays
CHILD = """
import os, pathlib, signal, sys, time
log = pathlib.Path(sys.argv[2]); log.write_text(log.read_text() + f"{os.getpid()}\\n" if log.exists() else f"{os.getpid()}\\n")
if len(log.read_text().splitlines()) < int(sys.argv[3]):
    if sys.argv[1] == "kill": os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(int(sys.argv[1]))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
time.sleep(60)
"""


def watch(how: str, log: Path, times: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, how, str(log), str(times)]
    code = f"import sys; from ai_engineer_track.supervise import supervise; sys.exit(supervise({command!r}))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=environment)


def wait_for(log: Path, lines: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if log.exists() and len(log.read_text().splitlines()) >= lines:
            return
        time.sleep(0.05)
    raise AssertionError("it was not started again")


def test_a_killed_process_is_started_again_and_ends_when_we_are_asked_to(tmp_path: Path) -> None:
    log = tmp_path / "pids"
    watcher = watch("kill", log, 2)
    wait_for(log, 2)
    time.sleep(0.3)
    watcher.send_signal(signal.SIGTERM)
    _, said = watcher.communicate(timeout=20)
    assert watcher.returncode == 0
    assert "killed by SIGKILL" in said
    last = int(log.read_text().splitlines()[-1])
    assert not Path(f"/proc/{last}").exists()


def test_a_mistake_of_the_users_is_passed_on(tmp_path: Path) -> None:
    log = tmp_path / "pids"
    watcher = watch("2", log, 99)
    assert watcher.wait(timeout=20) == 2
    assert len(log.read_text().splitlines()) == 1
