"""Which folder is served by which engine under which name; what cannot be is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from ml_engineer_track.gguf_export import FILE_NAME
from ml_engineer_track.serving import catalog
from ml_engineer_track.serving.catalog import choose_engine, entries
from shared import handoff
from shared.errors import UserError
from shared.files import write_text


def test_the_manifest_chooses_the_variant_for_this_machine(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (entry,) = entries(artifact, [], "auto", artifact.parent)
    assert (entry.name, entry.aliases, entry.engine) == ("tiny-bundled:q8_0", ("q8_0",), "openvino")
    assert len(entry.golden) == 2
    (entry,) = entries(artifact, [], "transformers", artifact.parent)
    assert (entry.name, entry.engine) == ("tiny-bundled:bf16", "transformers")
    monkeypatch.setattr(catalog, "has_openvino", lambda: False)
    (entry,) = entries(artifact, [], "auto", artifact.parent)
    assert (entry.name, entry.engine) == ("tiny-bundled:bf16", "transformers")


def test_without_a_folder_the_current_version_is_served(artifact: Path) -> None:
    handoff.set_current(artifact.parent, artifact.name)
    found = entries(None, ["q4_0", "bf16", "q4_0"], "auto", artifact.parent.parent)
    assert [(entry.aliases, entry.engine) for entry in found] == [(("q4_0",), "openvino"), (("bf16",), "transformers")]
    with pytest.raises(UserError, match="no model has been published"):
        entries(None, [], "auto", artifact / "nowhere")


def test_a_plain_model_folder_is_written_as_gguf_once(micro_path: str, tmp_path: Path) -> None:
    (entry,) = entries(Path(micro_path), ["q4_0"], "auto", tmp_path)
    assert (entry.name, entry.engine, entry.golden) == ("micro:q4_0", "openvino", ())
    written = (entry.folder / FILE_NAME).stat().st_mtime_ns
    assert entries(Path(micro_path), ["q4_0"], "auto", tmp_path) == [entry]
    assert (entry.folder / FILE_NAME).stat().st_mtime_ns == written
    (plain,) = entries(Path(micro_path), [], "transformers", tmp_path)
    assert (plain.name, plain.folder, plain.engine) == ("micro", Path(micro_path), "transformers")


def test_what_cannot_be_served_is_said(artifact: Path, micro_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for options, told in (
        ((artifact, ["q2"], "auto"), "no variant 'q2'"),
        ((artifact, ["bf16"], "openvino"), "engine openvino cannot serve this variant"),
        ((artifact, ["q8_0"], "transformers"), "engine transformers cannot serve this variant"),
        ((Path(micro_path), ["nf4"], "auto"), "served as one of: f16, q8_0, q4_0"),
        ((tmp_path / "nothing", [], "auto"), "no such folder"),
        ((tmp_path, [], "auto"), "config.json is missing"),
    ):
        with pytest.raises(UserError, match=told):
            entries(*options, tmp_path)  # type: ignore[arg-type]
    monkeypatch.setattr(catalog, "has_openvino", lambda: False)
    with pytest.raises(UserError, match="openvino-genai is not installed"):
        choose_engine(artifact / "q8_0", "auto")


def test_other_words_in_the_prompts_are_refused(artifact: Path, tmp_path: Path) -> None:
    manifest = handoff.read_manifest(artifact)
    manifest.prompt_version += 1
    manifest.variants = {}
    write_text(tmp_path / "manifest.json", manifest.model_dump_json())
    handoff.write_sums(tmp_path)
    with pytest.raises(UserError, match="trained on prompt version"):
        entries(tmp_path, [], "auto", tmp_path)
