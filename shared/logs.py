"""Structured logs: one JSON object a line, the same in both servers, tied together by one request id.

Why: at three in the morning one asks "what happened to this person's message?". The page sends an id with each message, the
service passes it on to the inference server, and both write it into every line, so that one search finds the whole story:

    grep 4f1c9a30d2b7e855 artifacts/logs/*.jsonl

What people write is never logged. An exception's own text may hold it (a parser quotes what it could not parse), so the log
has the exception's type and where it was raised; LOG_CONTENT=1 adds the text, for a machine on which only you ask.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import traceback
from contextvars import ContextVar
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from shared.settings import ROOT

#: the header that carries the id, as proxies and vLLM name it
HEADER = "X-Request-ID"
#: the id of the request being worked on; empty outside of one
request_id: ContextVar[str] = ContextVar("request_id", default="")
MAX_BYTES, KEPT = 10_000_000, 3


def setup_logs(path: Path) -> None:
    """Send this process's log lines to `path` as JSON; a file that has grown to MAX_BYTES begins anew and KEPT old ones stay.

    What goes to the terminal stays as it is: warnings, for whoever started the process. UserError never: without a place to
    write, the servers run all the same.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = RotatingFileHandler(path, maxBytes=MAX_BYTES, backupCount=KEPT, encoding="utf-8")
    except OSError:
        return
    handler.setFormatter(JsonLines())
    for name in ("shared", "ml_engineer_track", "ai_engineer_track"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        for old in [h for h in logger.handlers if isinstance(h, RotatingFileHandler)]:
            logger.removeHandler(old)
        logger.addHandler(handler)


class JsonLines(logging.Formatter):
    """`log.info("turn", extra={"facts": {"kind": "answer"}})` becomes one line with time, level, logger, event and the facts."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            "request_id": request_id.get(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            line["exception"] = told(record.exc_info[1])
        return json.dumps(line, ensure_ascii=False, default=str)


def told(error: BaseException) -> dict[str, Any]:
    """An exception without its text: its type, where it was raised, and the chain of causes."""
    frames = traceback.extract_tb(error.__traceback__)
    found: dict[str, Any] = {
        "type": type(error).__name__,
        "at": [f"{_short(f.filename)}:{f.lineno} {f.name}" for f in frames[-8:]],
    }
    if os.environ.get("LOG_CONTENT") == "1":
        found["text"] = str(error)
    if error.__cause__ is not None:
        found["cause"] = told(error.__cause__)
    return found


def accept_id(given: str) -> str:
    """The client's id when it is a sensible one (8 to 64 letters, digits, `_`, `.` or `-`), else a new one."""
    return given if re.fullmatch(r"[\w.-]{8,64}", given, re.ASCII) else secrets.token_hex(8)


def _short(file: str) -> str:
    path = Path(file)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
