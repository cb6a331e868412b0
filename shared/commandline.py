"""How every command line of this project ends: a user's mistake is one line and exit status 2, never a traceback.

The two tracks and the benchmarks have commands of their own and call `run_app` from their `main`.
"""

from __future__ import annotations

import errno
import sys

import typer

from shared.errors import UserError

STOPPED = 130  # the shell's status for Ctrl-C; typer turns Ctrl-C into this return value


def run_app(app: typer.Typer, when_stopped: str = "stopped") -> int:
    """Run a command and return the exit status. A full disk and a lost GPU count as the user's to put right, too."""
    try:
        status = app(standalone_mode=False)
        if status == STOPPED:
            raise KeyboardInterrupt
        return status if isinstance(status, int) else 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"\n{when_stopped}", file=sys.stderr)
        return STOPPED
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"error: the disk is full while writing {error.filename or ''}. Free some space or set ARTIFACTS", file=sys.stderr)
    except typer.Exit as leaving:
        return leaving.exit_code
    except RuntimeError as error:
        if "CUDA error" not in str(error):
            raise
        first = str(error).splitlines()[0]
        print(f"error: the GPU stopped answering ({first}). Run the same command again to resume", file=sys.stderr)
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("click", "typer"):
            raise
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        print(f"error: {message}", file=sys.stderr)
    return 2
