"""Starts the service again when it dies.

    make serve          (python -m ai_engineer_track serve)

Why: a process that is killed (out of memory, a fault in a library) cannot help itself, and nobody may be at the machine. The
process that was started only watches: it holds no model, no connection and no data, so there is little in it that can fail. On a
server of yours systemd (`Restart=on-failure`) or Kubernetes do the same; then run `serve --unsupervised`.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence

#: seconds before it is started again: doubled each time it dies young, up to the last
FIRST_WAIT, LAST_WAIT = 0.5, 30.0
#: a process that lived as long, in seconds, did not die of its start
YOUNG = 60.0
#: UserError: starting again would say the same
USER_ERROR = 2


def supervise(command: Sequence[str]) -> int:
    """Run `command` until it ends by itself, by a mistake of the user's, or by our own SIGTERM or Ctrl-C. Its exit status."""
    asked_to_stop = False
    process: subprocess.Popen[bytes] | None = None

    def stop(number: int, _: object) -> None:
        nonlocal asked_to_stop
        asked_to_stop = True
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    wait = FIRST_WAIT
    while True:
        began = time.monotonic()
        process = subprocess.Popen(command, start_new_session=True)  # Ctrl-C reaches it through us, once
        status = process.wait()
        if asked_to_stop or status in (0, USER_ERROR):
            return 0 if asked_to_stop else status
        wait = FIRST_WAIT if time.monotonic() - began > YOUNG else min(2 * wait, LAST_WAIT)
        how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        print(f"the service ended unexpectedly ({how}); starting it again in {wait:.0f} s", file=sys.stderr, flush=True)
        time.sleep(wait)
        if asked_to_stop:
            return 0
