"""The handoff folder: whoever reads it gets exactly what was published, or one line that says what is wrong."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared import handoff
from shared.errors import UserError
from shared.handoff import BaseModelInfo, DataInfo, File, Golden, Manifest, Variant
from shared.metrics import Estimate

ROOT = Path(handoff.__file__).resolve().parent.parent
FILES = {"config.json": b"{}", "model.safetensors": bytes(range(256)), "sub/tokenizer.json": b'{"a": 1}', "empty.txt": b""}


def a_manifest(version: str = "m-1", variants: tuple[str, ...] = ("bf16", "nf4")) -> Manifest:
    figure = Estimate(value=0.5, low=0.25, high=0.75, n=8)
    none = Estimate(value=None, low=None, high=None, n=0)
    golden = Golden(messages=[{"role": "user", "content": "Hi “you”"}], max_tokens=4, token_ids=[5, 1], reply="é")
    return Manifest(
        model_id="smoke", version=version, created="2026-11-23T00:00:00+00:00", commit=None,
        base_model=BaseModelInfo(id="bundled", licence="Apache-2.0"),
        data=DataInfo(version="d-1", counts={"train": {"answer": 3}}), training={"rank": 4}, seed=7, prompt_version=1,
        chat_template_sha256="a", tokenizer_sha256="b", context_window=64, stop_tokens=["<|end|>"], stop_token_ids=[1],
        use={"cpu": "nf4", "cuda": "bf16"}, hardware={"gpu_info": None},
        variants={
            name: Variant(name=name, weight_bytes=9, quality={"f1": figure, "none": none}, performance={"x": None}, files={},
                          golden=[golden])
            for name in variants
        },
    )  # fmt: skip


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Two variants as a stage would leave them."""
    made = {name: tmp_path / "work" / name for name in ("bf16", "nf4")}
    for name, folder in made.items():
        for file, content in FILES.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(content + name.encode() if content else b"")
    return made


def a_card(folder: Path) -> None:
    (folder / "MODEL_CARD.md").write_text("card", encoding="utf-8")


@pytest.fixture
def version(models: Path, folders: dict[str, Path]) -> Path:
    """A published version."""
    return handoff.publish(a_manifest(), folders, models, a_card)


def test_a_manifest_from_before_the_data_folder_was_named_is_read(version: Path) -> None:
    path = version / "manifest.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    del raw["data"]["datasets"]
    path.write_text(json.dumps(raw), encoding="utf-8")
    handoff.write_sums(version)
    assert handoff.verify(version).data.datasets is None


def refusal(check: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        check()
    message = str(caught.value)
    assert "\n" not in message
    return message


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "manifest.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    change(raw)
    path.write_text(json.dumps(raw), encoding="utf-8")


# --- what is published is what is read -------------------------------------------------------------------------------


def test_a_manifest_is_read_back_as_it_was_written(models: Path, folders: dict[str, Path]) -> None:
    manifest = a_manifest()
    folder = handoff.publish(manifest, folders, models, a_card)
    assert folder == models / "m-1"
    assert handoff.read_manifest(folder) == manifest
    assert handoff.verify(folder) == manifest


def test_every_file_of_every_variant_is_copied_and_listed(version: Path, folders: dict[str, Path]) -> None:
    manifest = handoff.verify(version)
    for name, variant in manifest.variants.items():
        assert set(variant.files) == {f"{name}/{file}" for file in FILES}
        assert all(
            (version / file).read_bytes() == (folders[name] / file.split("/", 1)[1]).read_bytes() for file in variant.files
        )
        assert all((version / file).stat().st_size == entry.size for file, entry in variant.files.items())


def test_publishing_moves_current_and_leaves_nothing_else_behind(models: Path, version: Path) -> None:
    assert handoff.current(models) == version
    assert (version / "MODEL_CARD.md").read_text(encoding="utf-8") == "card"
    assert {p.name for p in models.iterdir()} == {"current", "m-1"}


def test_a_second_version_stands_beside_the_first(models: Path, version: Path, folders: dict[str, Path]) -> None:
    before = tree(version)
    second = handoff.publish(a_manifest("m-2"), folders, models, a_card)
    assert handoff.current(models) == second
    assert tree(version) == before


def test_publishing_the_same_version_again_keeps_the_first_copy(models: Path, version: Path, folders: dict[str, Path]) -> None:
    before = tree(version)
    handoff.publish(a_manifest("m-2"), folders, models, a_card)
    later = a_manifest().model_copy(update={"created": "2030-01-01T00:00:00+00:00"})
    assert handoff.publish(later, folders, models, fails) == version
    assert handoff.current(models) == version
    assert tree(version) == before


def test_publishing_a_version_again_mends_a_damaged_first_copy(models: Path, version: Path, folders: dict[str, Path]) -> None:
    (version / "nf4" / "model.safetensors").write_bytes(b"x")
    assert handoff.publish(a_manifest(), folders, models, a_card) == version
    assert handoff.is_whole(version)
    assert handoff.current(models) == version


# --- assets beside the variants --------------------------------------------------------------------------------------


@pytest.fixture
def with_asset(models: Path, folders: dict[str, Path], tmp_path: Path) -> Path:
    """A published version that carries a ranker."""
    (tmp_path / "ranker.json").write_text('{"weights": [1]}', encoding="utf-8")
    return handoff.publish(a_manifest(), folders, models, a_card, [tmp_path / "ranker.json"])


def test_an_asset_is_copied_listed_and_found(with_asset: Path) -> None:
    manifest = handoff.verify(with_asset)
    assert set(manifest.assets) == {"assets/ranker.json"}
    assert manifest.assets["assets/ranker.json"].size == 16
    found = handoff.asset(with_asset, "ranker.json")
    assert found is not None
    assert found.read_text(encoding="utf-8") == '{"weights": [1]}'
    assert handoff.asset(with_asset, "other.json") is None


def test_a_damaged_or_missing_asset_is_refused_by_name(with_asset: Path) -> None:
    path = with_asset / "assets" / "ranker.json"
    path.write_text('{"weights": [2]}', encoding="utf-8")
    assert "assets/ranker.json is not what was published" in refusal(lambda: handoff.verify(with_asset))
    assert "assets/ranker.json" in refusal(lambda: handoff.asset(with_asset, "ranker.json"))
    path.unlink()
    assert "assets/ranker.json is missing" in refusal(lambda: handoff.verify(with_asset))
    assert "assets/ranker.json" in refusal(lambda: handoff.asset(with_asset, "ranker.json"))


def test_a_manifest_without_assets_is_still_read(version: Path) -> None:
    """Versions published before there were assets."""
    rewrite(version, lambda raw: raw.pop("assets"))
    handoff.write_sums(version)
    assert handoff.verify(version).assets == {}
    assert handoff.asset(version, "ranker.json") is None


# --- what is damaged is refused --------------------------------------------------------------------------------------

NAMES = [f"{variant}/{file}" for variant in ("bf16", "nf4") for file in FILES]


@pytest.mark.parametrize("name", [n for n in NAMES if "empty" not in n])
def test_a_truncated_file_is_refused_by_name(version: Path, name: str) -> None:
    content = (version / name).read_bytes()
    for kept in (len(content) - 1, 0):
        (version / name).write_bytes(content[:kept])
        assert name in refusal(lambda: handoff.verify(version))
    (version / name).write_bytes(content)
    handoff.verify(version)


@pytest.mark.parametrize("name", [n for n in NAMES if "empty" not in n])
def test_one_flipped_bit_in_any_byte_is_refused_by_name(version: Path, name: str) -> None:
    content = (version / name).read_bytes()
    for at in sorted({0, len(content) // 2, len(content) - 1}):
        (version / name).write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert f"{name} is not what was published" in refusal(lambda: handoff.verify(version))


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_refused_by_name(version: Path, name: str) -> None:
    (version / name).unlink()
    assert f"{name} is missing" in refusal(lambda: handoff.verify(version))


def test_a_file_that_grew_is_refused_by_name(version: Path) -> None:
    (version / "nf4" / "empty.txt").write_bytes(b"x")
    assert "nf4/empty.txt" in refusal(lambda: handoff.verify(version))


def test_a_manifest_from_the_future_is_refused(version: Path) -> None:
    rewrite(version, lambda raw: raw.update(schema_version=handoff.SCHEMA_VERSION + 1, brand_new={"field": 1}))
    message = refusal(lambda: handoff.verify(version))
    assert f"schema {handoff.SCHEMA_VERSION + 1}" in message
    assert "Update the code" in message


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"null", b"3", b'"text"', b"{}", b'{"schema_version": 1}'])
def test_a_manifest_that_is_none_is_refused_in_one_line(version: Path, content: bytes) -> None:
    (version / "manifest.json").write_bytes(content)
    assert str(version / "manifest.json") in refusal(lambda: handoff.verify(version))


def test_every_truncation_of_a_manifest_is_refused(version: Path) -> None:
    path = version / "manifest.json"
    content = path.read_bytes().rstrip()
    for kept in range(0, len(content), 97):
        path.write_bytes(content[:kept])
        refusal(lambda: handoff.verify(version))


def test_an_unknown_field_is_refused_by_name(version: Path) -> None:
    rewrite(version, lambda raw: raw["variants"]["nf4"].update(weigth_bytes=1))
    assert "variants.nf4.weigth_bytes" in refusal(lambda: handoff.read_manifest(version))


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    assert "no manifest.json" in refusal(lambda: handoff.verify(tmp_path))


@pytest.mark.parametrize("name", ["../outside.txt", "nf4/../../outside.txt", "/etc/hostname"])
def test_a_path_outside_the_folder_is_refused(version: Path, name: str) -> None:
    (version.parent / "outside.txt").write_bytes(b"x")
    entry = File(sha256=handoff.sha256_file(version.parent / "outside.txt"), size=1).model_dump()
    rewrite(version, lambda raw: raw["variants"]["nf4"]["files"].update({name: entry}))
    assert "lies outside the artifact" in refusal(lambda: handoff.verify(version))


def test_a_link_that_leads_outside_the_folder_is_refused(version: Path) -> None:
    file = version / "nf4" / "config.json"
    outside = version.parent / "outside.json"
    shutil.move(file, outside)
    file.symlink_to(outside)
    assert "lies outside the artifact" in refusal(lambda: handoff.verify(version))


# --- the pointer -----------------------------------------------------------------------------------------------------


def test_without_a_published_model_current_is_an_error_for_the_user(models: Path) -> None:
    assert "no model has been published" in refusal(lambda: handoff.current(models))


@pytest.mark.parametrize(
    "pointer", ["m-9", "", "  ", "../models/m-1", "..", ".", "/", "m-1/nf4", "m-1/", "m-1\nm-1", "m-1\\nf4", ".m-1", "-m", "\0"]
)
def test_a_pointer_to_no_version_is_an_error_for_the_user(models: Path, version: Path, pointer: str) -> None:
    (models / ".m-1").mkdir()  # hidden folders are publications under way
    (models / "current").write_text(pointer + "\n", encoding="utf-8")
    assert str(models / "current") in refusal(lambda: handoff.current(models))


def test_a_pointer_that_is_no_text_is_an_error_for_the_user(models: Path, version: Path) -> None:
    (models / "current").write_bytes(b"\xff\xfe")
    assert str(models / "current") in refusal(lambda: handoff.current(models))


def test_current_can_be_moved_back_to_an_earlier_version(models: Path, version: Path, folders: dict[str, Path]) -> None:
    handoff.publish(a_manifest("m-2"), folders, models, a_card)
    handoff.set_current(models, "m-1")
    assert handoff.current(models) == version


# --- publishing that fails -------------------------------------------------------------------------------------------


def fails(_: Path) -> None:
    raise RuntimeError("disk on fire")


def test_a_failed_publication_changes_nothing(models: Path, version: Path, folders: dict[str, Path]) -> None:
    before = tree(models)
    with pytest.raises(RuntimeError, match="disk on fire"):
        handoff.publish(a_manifest("m-2"), folders, models, fails)
    assert tree(models) == before
    assert handoff.current(models) == version


def test_a_failed_first_publication_leaves_no_current(models: Path, folders: dict[str, Path]) -> None:
    with pytest.raises(RuntimeError):
        handoff.publish(a_manifest(), folders, models, fails)
    assert list(models.iterdir()) == []


def test_a_copy_that_went_wrong_is_never_made_current(models: Path, version: Path, folders: dict[str, Path]) -> None:
    def damages(aside: Path) -> None:
        (aside / "nf4" / "model.safetensors").write_bytes(b"x")

    assert "nf4/model.safetensors" in refusal(lambda: handoff.publish(a_manifest("m-2"), folders, models, damages))
    assert handoff.current(models) == version
    assert not (models / "m-2").exists()


def test_a_failed_republication_keeps_the_version_that_is_current(
    models: Path, version: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same version again, and the last rename fails: what consumers read must still be there."""

    def broken(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", broken)
        with contextlib.suppress(OSError):  # keeping the first copy needs no rename at all
            handoff.publish(a_manifest(), folders, models, a_card)
    handoff.verify(handoff.current(models))


def test_a_kill_before_current_moves_leaves_the_old_version_valid(
    models: Path, version: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "m-2.json").write_text(a_manifest("m-2").model_dump_json(), encoding="utf-8")
    program = textwrap.dedent(f"""
        import os, signal; from pathlib import Path
        from shared import handoff
        handoff.set_current = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        manifest = handoff.Manifest.model_validate_json(Path({str(tmp_path / "m-2.json")!r}).read_text())
        folders = {{name: Path(folder) for name, folder in { ({k: str(v) for k, v in folders.items()})!r}.items()}}
        handoff.publish(manifest, folders, Path({str(models)!r}), lambda _: None)
    """)
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == -signal.SIGKILL
    assert handoff.current(models) == version
    handoff.verify(version)
    assert handoff.verify(models / "m-2").version == "m-2"  # whole, and only not pointed to


def test_what_a_killed_publication_left_behind_does_not_hinder_the_next(models: Path, folders: dict[str, Path]) -> None:
    (models / ".m-1.part" / "nf4").mkdir(parents=True)
    (models / ".m-1.part" / "nf4" / "stale.txt").write_text("x", encoding="utf-8")
    folder = handoff.publish(a_manifest(), folders, models, a_card)
    assert not (folder / "nf4" / "stale.txt").exists()
    assert {p.name for p in models.iterdir()} == {"current", "m-1"}


# --- the command -----------------------------------------------------------------------------------------------------


def verify_command(models: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shared.handoff", "verify", *arguments, "--models", str(models)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_command_says_how_many_files_are_as_published(models: Path, version: Path) -> None:
    for done in (verify_command(models), verify_command(models, "m-1")):
        assert done.returncode == 0
        assert done.stdout == f"m-1: {len(NAMES)} files in 2 variants are as published\n"
        assert done.stderr == ""


@pytest.mark.parametrize(
    "words", ["verify m-1 --models {}", "verify --models {} m-1", "--models {} verify m-1", "--models={} verify"]
)
def test_the_command_takes_its_option_anywhere(
    models: Path, version: Path, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert handoff.main([word.format(models) for word in words.split()]) == 0
    assert capsys.readouterr().out.startswith("m-1: ")


def test_the_command_refuses_a_damaged_version_in_one_line(models: Path, version: Path) -> None:
    (version / "nf4" / "config.json").unlink()
    done = verify_command(models)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: file nf4/config.json is missing")
    assert done.stderr.count("\n") == 1


def test_the_command_refuses_a_version_that_does_not_exist(
    models: Path, version: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert handoff.main(["verify", "m-9", "--models", str(models)]) == 2
    assert handoff.main(["verify", "--models", str(models / "nowhere")]) == 2
    assert [line[:6] for line in capsys.readouterr().err.splitlines()] == ["error:"] * 2
