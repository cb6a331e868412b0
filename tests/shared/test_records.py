"""What is appended survives a kill at any moment; the other promises of the store are tested with feedback."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from shared import outcomes
from shared.outcomes import Outcome, OutcomeStore

WRITER = """
import sys
from pathlib import Path
from shared.outcomes import Outcome, OutcomeStore
store = OutcomeStore(Path(sys.argv[1]))
for n in range(10**6):
    store.add(Outcome(answer_id=f"{sys.argv[2]}-{n}", arm="current", model_version="m-1:q4_0", kind="answer", seconds=0.1))
    print(n, flush=True)
"""


def test_two_writers_killed_in_the_middle_lose_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    store = OutcomeStore(tmp_path)
    acknowledged = 0
    for round_ in range(2):
        writers = [
            subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), f"w{round_}{n}"], stdout=subprocess.PIPE)
            for n in range(2)
        ]
        for writer in writers:
            assert writer.stdout is not None
            writer.stdout.readline()
        time.sleep(random.Random(round_).uniform(0.05, 0.3))
        for writer in writers:
            os.kill(writer.pid, signal.SIGKILL)
        for writer in writers:
            acknowledged += 1 + len(writer.communicate()[0].splitlines())
        assert store.add(Outcome(answer_id=f"a-{round_}", arm="current", model_version="m-1:q4_0", kind="answer", seconds=0.1))
    read, bad = outcomes.read(tmp_path)
    assert len(read) >= acknowledged + 2
    assert len({o.id for o in read}) == len(read)
    assert len(bad) <= 4
