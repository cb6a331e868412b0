"""What the tests of the pages share: the service with a fake assistant on a free port, and what makes a text hard to read."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn

sys.path.append(str(Path(__file__).parent.parent / "ai_engineer_track" / "api"))
from fake_assistant import FakeAssistant, FakeIndex, FakeRetriever, settings_for

from ai_engineer_track.api.main import create_app
from shared import library as lib

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NEEDS_CHROMIUM = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH; on Debian: apt-get install chromium")
PHONE = {"width": 360, "height": 740}


@contextmanager
def serving(artifacts: Path, datasets: Path, pause: float = 0.0, **api: Any) -> Iterator[str]:
    """The service on a free port, in a thread."""
    index = FakeIndex(datasets)
    assistant = FakeAssistant(lib.load_library(datasets).leaflets["sunburn"], pause=pause)
    app = create_app(settings_for(artifacts, datasets, **api), assistant, index, FakeRetriever(index))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.02)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()


#: elements whose text has a contrast with what lies behind it below 4.5 (WCAG 2, level AA)
CONTRAST = """(() => {
  const parse = (colour) => (colour.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = (rgb) => {
    const [r, g, b] = rgb.slice(0, 3).map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const colour = parse(getComputedStyle(e).backgroundColor);
      if ((colour[3] ?? 1) > 0) return colour;
    }
  };
  const hasText = (e) => [...e.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  return [...document.querySelectorAll("body *")].filter((e) => e.checkVisibility() && !e.disabled && hasText(e)).map((e) => {
    const [a, b] = [light(parse(getComputedStyle(e).color)), light(behind(e))];
    return [e.className || e.tagName, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
  }).filter(([, contrast]) => contrast < 4.5);
})()"""
