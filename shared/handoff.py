"""The handoff: one folder with a manifest, written by the ML track and checked by everyone who reads it.

    artifacts/models/<version>/manifest.json      what this is, what it may do, what every file must hash to
    artifacts/models/<version>/<variant>/...      weights and tokenizer of each variant
    artifacts/models/<version>/assets/...         what else was trained for the product, such as the ranker
    artifacts/models/<version>/SHA256SUMS         checksums of the manifest and the model card (`sha256sum -c` reads it, too)
    artifacts/models/current                      one line: the version consumers use
    artifacts/models/previous                     those before it, the newest first: where a rollback goes to

A version is written to a temporary folder and renamed into place; `current` moves only after verification. A wrong byte, a
missing file, a file nobody published or a manifest from the future is refused with an error that says which. Checksums find
accidents and careless changes; who can write the whole folder can write new ones (SECURITY.md).

    python -m shared.handoff verify [VERSION]     check every file of a version (default: the current one)
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from shared.chat import Message
from shared.errors import UserError
from shared.files import sha256_file, write_text
from shared.metrics import Estimate
from shared.settings import ROOT

SCHEMA_VERSION = 1
MODELS = ROOT / "artifacts" / "models"
#: folder of the assets inside a version; no variant may be called so
ASSETS = "assets"
SUMS = "SHA256SUMS"
#: versions in `previous`: one to go back to, and one should power fail while the first is written
REMEMBERED = 2


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class File(_Strict):
    sha256: str
    size: int


class Golden(_Strict):
    """A prompt and the greedy reply a variant gave when it was published. A server must say the same."""

    messages: list[Message]
    max_tokens: int
    token_ids: list[int]
    reply: str


class BaseModelInfo(_Strict):
    id: str
    licence: str
    edition: str | None = None


class DataInfo(_Strict):
    """The curated set a version was trained on, and the data folder that was made of (None: published before it was kept)."""

    version: str
    counts: dict[str, dict[str, int]]
    datasets: str | None = None


class Variant(_Strict):
    """One set of weights. `files` are relative to the version's folder; figures are null where nobody could read them."""

    name: str
    weight_bytes: int
    quality: dict[str, Estimate]
    performance: dict[str, Any]
    files: dict[str, File]
    golden: list[Golden]


class Lineage(_Strict):
    """Where a version that came out of another one comes from: `parent` was trained on with what people had labelled.

    `feedback` is the content hash of those labels, `labels` their ids, `reason` why the model was changed at all.
    """

    parent: str
    reason: str
    feedback: str
    labels: list[str] = []


class Manifest(_Strict):
    schema_version: Literal[1] = 1
    model_id: str
    version: str
    created: str
    commit: str | None
    base_model: BaseModelInfo
    data: DataInfo
    training: dict[str, Any]
    seed: int
    prompt_version: int
    chat_template_sha256: str
    tokenizer_sha256: str
    context_window: int
    stop_tokens: list[str]
    stop_token_ids: list[int]
    use: dict[Literal["cpu", "cuda"], str]
    hardware: dict[str, Any]
    variants: dict[str, Variant]
    #: files beside the variants, by path relative to the version's folder
    assets: dict[str, File] = {}
    #: None for a version that was trained from the base model
    lineage: Lineage | None = None


def publish(
    manifest: Manifest,
    folders: dict[str, Path],
    models: Path,
    extra: Callable[[Path], None],
    assets: Sequence[Path] = (),
    make_current: bool = True,
) -> Path:
    """Copy the variants and assets, write the manifest, verify the copy, rename it into place, then move `current`.

    `extra` may add files (the model card) to the folder before it is renamed. A version is named by its content, so one that
    is already there and verifies is kept. Nothing visible changes when any step fails. With `make_current` False the version
    is only laid beside the others: a candidate, which somebody has yet to decide about.
    """
    final = models / manifest.version
    if is_whole(final):
        if make_current:
            set_current(models, manifest.version)
        return final
    aside = models / f".{manifest.version}.part"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        for name, folder in folders.items():
            shutil.copytree(folder, aside / name)
            manifest.variants[name].files = {
                f"{name}/{path.relative_to(folder).as_posix()}": File(sha256=sha256_file(path), size=path.stat().st_size)
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            }
        for path in assets:
            (aside / ASSETS).mkdir(exist_ok=True)
            copy = Path(shutil.copy2(path, aside / ASSETS / path.name))
            manifest.assets[f"{ASSETS}/{path.name}"] = File(sha256=sha256_file(copy), size=copy.stat().st_size)
        write_text(aside / "manifest.json", manifest.model_dump_json(indent=2) + "\n")
        extra(aside)
        write_sums(aside)
        verify(aside)
        shutil.rmtree(final, ignore_errors=True)  # only a damaged copy can still be here
        aside.rename(final)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    if make_current:
        set_current(models, manifest.version)
    return final


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a version. UserError when it is missing, malformed or of a newer schema."""
    path = folder / "manifest.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("no manifest.json", str(folder), "Run `make ml` to publish a model") from None
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise UserError("manifest is damaged (not JSON)", str(path), "Publish the version again") from None
    schema = raw.get("schema_version") if isinstance(raw, dict) else None
    if isinstance(schema, int) and schema > SCHEMA_VERSION:
        raise UserError(f"manifest has schema {schema}, this code reads up to {SCHEMA_VERSION}", str(path), "Update the code")
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"manifest field {where}: {first['msg']}", str(path), "Publish the version again") from None


def verify(folder: Path) -> Manifest:
    """Check schema and every checksum of a version. UserError names the first file that is missing, wrong or unheard of."""
    manifest = read_manifest(folder)
    listed: set[str] = set()
    for files in (*(variant.files for variant in manifest.variants.values()), manifest.assets):
        for name, expected in files.items():
            path = folder / name
            if not path.resolve().is_relative_to(folder.resolve()):
                raise UserError(f"file {name} lies outside the artifact", str(folder), "Do not use it")
            if not path.is_file():
                raise UserError(f"file {name} is missing", str(folder), "Publish the version again")
            if path.stat().st_size != expected.size or sha256_file(path) != expected.sha256:
                raise UserError(f"file {name} is not what was published (checksum)", str(folder), "Publish the version again")
        listed |= files.keys()
    listed |= _check_sums(folder)
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}
    if extra := sorted(present - listed):  # a chat template or generation settings beside the weights would be obeyed
        raise UserError(f"file {extra[0]} was not published with this version", str(folder), "Remove it")
    return manifest


def write_sums(folder: Path) -> None:
    """Checksums of the files the manifest does not list: itself, and what stands beside it."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != SUMS)
    write_text(folder / SUMS, "".join(f"{sha256_file(path)}  {path.name}\n" for path in files))


def _check_sums(folder: Path) -> set[str]:
    """The files that `SHA256SUMS` vouches for, and itself. UserError when one is missing or wrong, or it is no such list."""
    try:
        *lines, rest = (folder / SUMS).read_text(encoding="ascii").split("\n")
    except FileNotFoundError:
        raise UserError(f"file {SUMS} is missing", str(folder), "Publish the version again") from None
    except UnicodeDecodeError:
        lines, rest = [], "not text"
    sums: dict[str, str] = {}
    for line in lines:
        found = re.fullmatch(r"([0-9a-f]{64})  (\w[\w.-]*)", line)
        if not found or rest:
            raise UserError(f"file {SUMS} is damaged", str(folder), "Publish the version again")
        sums[found[2]] = found[1]
    for name in ("manifest.json", *sums):
        path = folder / name
        if name not in sums or not path.is_file() or sha256_file(path) != sums[name]:
            raise UserError(f"file {name} is not what was published (checksum)", str(folder), "Publish the version again")
    return {SUMS, *sums}


def asset(folder: Path, name: str) -> Path | None:
    """An asset of a version, checked against its checksum; None when the version has none of this name."""
    expected = read_manifest(folder).assets.get(f"{ASSETS}/{name}")
    if expected is None:
        return None
    path = folder / ASSETS / name
    if not path.is_file() or sha256_file(path) != expected.sha256:
        raise UserError(f"file {ASSETS}/{name} is missing or not what was published", str(folder), "Publish the version again")
    return path


def is_whole(folder: Path) -> bool:
    """Does this folder hold a version that verifies?"""
    try:
        verify(folder)
    except UserError:
        return False
    return True


def current(models: Path = MODELS) -> Path:
    """The folder of the current version. UserError when nothing has been published or the pointer dangles."""
    try:
        version = (models / "current").read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        raise UserError("no model has been published", str(models), "Run `make ml`") from None
    except UnicodeDecodeError:
        raise UserError("the pointer is damaged", str(models / "current"), "Run `make ml`") from None
    folder = models / version
    if not re.fullmatch(r"\w[\w.-]*", version) or not folder.is_dir():
        raise UserError(f"current points to {version!r}, which does not exist", str(models / "current"), "Run `make ml`")
    return folder


def earlier(models: Path) -> list[str]:
    """The versions that were current before the current one, the newest first.

    `previous` is written before `current` moves: when power fails between the two it names the current version itself, and what
    counts stands below that.
    """
    try:
        found = (models / "previous").read_text(encoding="utf-8").split()
    except (FileNotFoundError, UnicodeDecodeError):
        return []
    now = _pointed_to(models)
    return found[found.index(now) + 1 :] if now in found else found


def set_current(models: Path, version: str, remember: bool = True) -> None:
    """Point `current` at a version: one atomic rename. The one it leaves is remembered first, unless it is the same.

    With `remember` False it goes back: what is left is not to be come back to.
    """
    left = _pointed_to(models)
    if remember and left not in (None, version):
        before = [left, *(name for name in earlier(models) if name not in (left, version))]
        write_text(models / "previous", "".join(f"{name}\n" for name in before[:REMEMBERED]))
    write_text(models / "current", version + "\n")


def _pointed_to(models: Path) -> str | None:
    try:
        return current(models).name
    except UserError:
        return None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.handoff", description="Check published models.")
    parser.add_argument("command", choices=["verify"])
    parser.add_argument("version", nargs="?", help="default: the current one")
    parser.add_argument("--models", type=Path, default=MODELS)
    options = parser.parse_intermixed_args(argv)
    try:
        folder = options.models / options.version if options.version else current(options.models)
        manifest = verify(folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    files = sum(len(v.files) for v in manifest.variants.values())
    beside = f" and {len(manifest.assets)} beside them" if manifest.assets else ""
    print(f"{manifest.version}: {files} files in {len(manifest.variants)} variants{beside} are as published")
    return 0


if __name__ == "__main__":
    sys.exit(main())
