"""Vectors of texts are kept between runs, and thrown away with the model that made them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from shared.passages import StoredVectors


def embed(texts: Sequence[str]) -> np.ndarray:
    vectors = np.array([[1.0 + text.count(letter) for letter in "aeiou"] for text in texts], dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_vectors_are_stored_and_dropped_with_another_model(tmp_path: Path) -> None:
    asked: list[str] = []

    def counting(texts: Sequence[str]) -> np.ndarray:
        asked.extend(texts)
        return embed(texts)

    path = tmp_path / "v.npz"
    first = StoredVectors(path, counting)(["one", "two"])
    asked.clear()
    assert np.allclose(StoredVectors(path, counting)(["two", "one"])[::-1], first)
    assert "one" not in asked
    other = StoredVectors(path, lambda texts: -embed(texts))(["one"])
    assert np.allclose(other, -first[:1])


def test_what_is_stored_can_be_looked_up_without_embedding_anything(tmp_path: Path) -> None:
    path = tmp_path / "v.npz"
    made = StoredVectors(path, embed)(["one", "two"])
    known = StoredVectors(path, embed).known(["two", "three", "two"])
    assert list(known) == ["two"]
    assert np.allclose(known["two"], made[1])


def test_a_link_to_the_file_stays_one(tmp_path: Path) -> None:
    path, link = tmp_path / "v.npz", tmp_path / "link.npz"
    link.symlink_to(path)
    StoredVectors(link, embed)(["one"])
    assert link.is_symlink()
    assert list(StoredVectors(path, embed).known(["one"])) == ["one"]


def test_a_damaged_file_is_no_file(tmp_path: Path) -> None:
    path = tmp_path / "v.npz"
    expected = StoredVectors(path, embed)(["one", "two"])
    whole = path.read_bytes()
    for damaged in (b"", b"nothing", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        assert np.allclose(StoredVectors(path, embed)(["one", "two"]), expected)
