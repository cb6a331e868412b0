"""Exercise 6: damage a published model and see who notices.    python artifacts/workshop/ex6.py

Every damage is done to a copy. First `handoff.verify` looks at it, as every consumer does. What gets past that is served: the
server compares its own replies with the golden ones of the manifest before it says that it is ready.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from ai_engineer_track.inference import free_port
from benchmarks.workshop.place import artifacts, keep_run, script
from shared import handoff
from shared.errors import UserError
from shared.files import sha256_tree, write_json


def wrong_byte(version: Path) -> None:
    """One byte of the weights, somewhere in the middle."""
    path = version / served(version) / weights(version)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def missing_file(version: Path) -> None:
    """The tokenizer was not copied."""
    (version / served(version) / "tokenizer.json").unlink()


def other_replies(version: Path) -> None:
    """The manifest promises replies that this model does not give: the state after weights and manifest were mixed up."""

    def change(manifest: dict[str, Any]) -> None:
        for golden in manifest["variants"][served(version)]["golden"]:
            golden["reply"] = "Something else."
            golden["token_ids"] = golden["token_ids"][::-1]

    edit_manifest(version, change)


# --- change this: a damage of your own ---------------------------------------------------------------------------------
def mine(version: Path) -> None:
    """What else can go wrong on the way from one machine to another?"""


# ------------------------------------------------------------------------------------------------------------------------

DAMAGES: list[Callable[[Path], None]] = [wrong_byte, missing_file, other_replies, mine]


def served(version: Path) -> str:
    """The variant that this version says to use on a CPU."""
    return handoff.read_manifest(version).use["cpu"]


def weights(version: Path) -> str:
    """Its largest file."""
    return max((version / served(version)).iterdir(), key=lambda path: path.stat().st_size).name


def edit_manifest(version: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = version / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    change(manifest)
    write_json(path, manifest)


def who_notices(version: Path) -> tuple[str, str]:
    """`verify`, `server` or `nobody`, and what was said."""
    try:
        handoff.verify(version)
    except UserError as error:
        return "verify", str(error)
    port = free_port()
    command = [sys.executable, "-m", "ml_engineer_track", "serve", "--model", str(version), "--port", str(port)]
    with tempfile.TemporaryFile("w+") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            for _ in range(600):
                if server.poll() is not None:
                    output.seek(0)
                    return "server", output.read().strip().splitlines()[-1]
                try:
                    if httpx.get(f"http://127.0.0.1:{port}/ready", timeout=2.0).status_code == 200:
                        return "nobody", "it was served"
                except httpx.HTTPError:
                    pass
                time.sleep(0.2)
            return "server", "it was never ready"
        finally:
            server.terminate()
            server.wait()


def main() -> None:
    whole = handoff.current(artifacts() / "models")
    found: dict[str, dict[str, Any]] = {}
    for damage in DAMAGES:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / whole.name
            shutil.copytree(whole, copy)
            damage(copy)
            changed = sha256_tree([copy]) != sha256_tree([whole])
            who, said = who_notices(copy)
        found[damage.__name__] = {"noticed_by": who, "said": said.replace(f"{folder}/", ""), "changed": changed}
        print(f"{damage.__name__:<14} noticed by {who}: {found[damage.__name__]['said']}", flush=True)
    keep_run(6, {"version": whole.name, "damages": found})


if __name__ == "__main__":
    script(main)
