"""Progress bars for everything that takes longer than two seconds; plain lines where the output is not a terminal.

They go to stderr: stdout is for results, which people redirect into files (`python -m ml_engineer_track benchmark > FILE`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO, TypeVar

from tqdm import tqdm

DELAY_SECONDS = 2.0
T = TypeVar("T")


class Progress:
    """A bar that appears after two seconds. In a log file it becomes a line every twenty seconds."""

    def __init__(self, name: str, total: int, start: int) -> None:
        self.name, self.total, self.done = name, total, start
        self._stream = stream()
        self._bar = (
            tqdm(total=total, initial=start, desc=f"  {name}", delay=DELAY_SECONDS, leave=False, file=self._stream)
            if self._stream.isatty()
            else None
        )
        self._said = time.monotonic()

    def update(self, n: int, **shown: str) -> None:
        self.done += n
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(n)
        elif time.monotonic() - self._said > 20:
            self._said = time.monotonic()
            facts = " ".join(f"{k} {v}" for k, v in shown.items())
            print(f"  {self.name}: {self.done} of {self.total} {facts}".rstrip(), file=self._stream, flush=True)


def stream() -> TextIO:
    """Where progress is told: on stderr, or where whoever redirected stdout from within (a worker's log) wants everything."""
    return sys.stderr if sys.stdout is sys.__stdout__ else sys.stdout


def watched(items: Sequence[T], name: str) -> Iterator[T]:
    """The items, with a bar that moves as they are taken."""
    with progress(name, total=len(items)) as bar:
        for item in items:
            yield item
            bar.update(1)


@contextmanager
def progress(name: str, total: int, start: int = 0) -> Iterator[Progress]:
    bar = Progress(name, total, start)
    try:
        yield bar
    finally:
        if bar._bar is not None:
            bar._bar.close()
