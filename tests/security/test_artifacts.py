"""A published version with one wrong bit, or one byte less, in any of its files is refused, by the check and by the server."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "shared"))
from test_handoff import FILES, a_card, a_manifest, refusal

from ml_engineer_track.serving.catalog import entries
from shared import handoff

FLIPS = 12  # places tried in every file


@pytest.fixture
def version(tmp_path: Path) -> Path:
    folders = {name: tmp_path / "work" / name for name in ("bf16", "nf4")}
    for folder in folders.values():
        for file, content in FILES.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(content)
    ranker = tmp_path / "ranker.json"
    ranker.write_text('{"weights": [1, 2]}', encoding="utf-8")
    return handoff.publish(a_manifest(), folders, tmp_path / "models", a_card, [ranker])


def files_of(version: Path) -> list[Path]:
    return sorted(path for path in version.rglob("*") if path.is_file())


def test_every_flipped_bit_is_refused(version: Path) -> None:
    rng = random.Random(7)
    tried = 0
    for path in files_of(version):
        whole = path.read_bytes()
        for place in rng.sample(range(len(whole)), min(FLIPS, len(whole))):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :])
            assert refusal(lambda: handoff.verify(version)), path
            tried += 1
        path.write_bytes(whole)
    handoff.verify(version)
    assert tried > 80


def test_every_cut_file_is_refused(version: Path) -> None:
    rng = random.Random(7)
    for path in files_of(version):
        whole = path.read_bytes()
        for end in {0, len(whole) - 1, rng.randrange(len(whole) or 1)} - {len(whole), -1}:
            path.write_bytes(whole[:end])
            assert refusal(lambda: handoff.verify(version)), (path, end)
        path.write_bytes(whole + b"\n")
        assert refusal(lambda: handoff.verify(version)), path
        path.unlink()
        assert refusal(lambda: handoff.verify(version)), path
        path.write_bytes(whole)
    handoff.verify(version)


def test_the_server_refuses_at_its_start_what_the_check_refuses(version: Path, tmp_path: Path) -> None:
    for path in files_of(version):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2] + b"?")
        assert refusal(lambda: entries(version, ["bf16"], "transformers", tmp_path))
        path.write_bytes(whole)


@pytest.mark.parametrize("name", ["bf16/chat_template.jinja", "bf16/modeling_evil.py", "pytorch_model.bin", "new/config.json"])
def test_a_file_nobody_published_is_refused(version: Path, name: str) -> None:
    """A template or a generation config beside the weights would be obeyed without any checksum being wrong."""
    (version / name).parent.mkdir(exist_ok=True)
    (version / name).write_text("{}", encoding="utf-8")
    assert f"file {name} was not published" in refusal(lambda: handoff.verify(version))


def test_a_link_in_place_of_a_file_is_refused(version: Path, tmp_path: Path) -> None:
    original = version / "bf16" / "config.json"
    (tmp_path / "elsewhere.json").write_bytes(original.read_bytes())
    original.unlink()
    original.symlink_to(tmp_path / "elsewhere.json")
    assert "outside the artifact" in refusal(lambda: handoff.verify(version))


def test_the_checksums_are_in_the_format_of_sha256sum(version: Path) -> None:
    lines = (version / handoff.SUMS).read_text(encoding="ascii").splitlines()
    assert [line.split("  ")[1] for line in lines] == ["MODEL_CARD.md", "manifest.json"]


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "a/b", "..", "", ".hidden", "m-1\nm-2"])
def test_the_pointer_leads_nowhere_else(version: Path, name: str) -> None:
    (version.parent / "current").write_text(name, encoding="utf-8")
    assert refusal(lambda: handoff.current(version.parent))
