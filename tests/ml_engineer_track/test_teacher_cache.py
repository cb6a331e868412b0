"""The cache says what the teacher says, also after a crash, and never what another teacher said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from ml_engineer_track import finetune as ft
from ml_engineer_track import teacher_cache as tc
from ml_engineer_track.finetune import Batch, Example
from ml_engineer_track.teacher_cache import TeacherCache

K, T = 5, 2.0


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ft, "compute_dtype", lambda target: torch.float32)


def an_example(length: int, reply: int, seed: int) -> Example:
    numbers = torch.Generator().manual_seed(seed)
    return Example(torch.randint(100, 8000, (length,), generator=numbers).tolist(), [1.0] * reply)


EXAMPLES = [an_example(8 + 3 * (n % 4), 1 + n % 5, n) for n in range(8)]


def made(
    folder: Path, teacher: PreTrainedModel, examples: list[Example] = EXAMPLES, temperature: float = T, weights: str = "weights"
) -> TeacherCache:
    return tc.teacher_cache(folder, examples, teacher, weights, 0, K, temperature, batch_tokens=30)


@torch.no_grad()
def test_every_line_holds_the_likeliest_tokens_and_what_is_left(micro: PreTrainedModel, tmp_path: Path) -> None:
    cache = made(tmp_path / "teacher", micro)
    for number, example in enumerate(EXAMPLES):
        right = (micro(torch.tensor([example.ids])).logits[0, -example.reply - 1 : -1].double() / T).log_softmax(-1)
        ids, log_probs = cache.batch([number], example.reply)
        best = right.topk(K)
        assert ids[0].tolist() == best.indices.tolist()
        torch.testing.assert_close(log_probs[0, :, :K].double(), best.values, rtol=2e-3, atol=2e-3)
        rest = 1 - best.values.exp().sum(-1)
        torch.testing.assert_close(log_probs[0, :, K].double().exp(), rest, rtol=1e-2, atol=1e-4)


def test_a_batch_is_aligned_to_the_right_like_the_rows(micro: PreTrainedModel, tmp_path: Path) -> None:
    cache = made(tmp_path / "teacher", micro)
    chosen = [3, 0, 6]
    keep = max(EXAMPLES[i].reply for i in chosen)
    ids, log_probs = cache.batch(chosen, keep)
    assert ids.shape == (3, keep, K)
    assert log_probs.shape == (3, keep, K + 1)
    assert torch.isfinite(log_probs).all()
    for row, number in enumerate(chosen):
        alone, _ = cache.batch([number], EXAMPLES[number].reply)
        assert torch.equal(ids[row, -EXAMPLES[number].reply :], alone[0])


class Counting:
    """`view_of`, counted, and failing at one of its calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_at: int = 0) -> None:
        self.real, self.calls, self.fail_at = tc.view_of, 0, fail_at
        monkeypatch.setattr(tc, "view_of", self)
        monkeypatch.setattr(tc, "FLUSH_EVERY", 1)

    def __call__(self, model: PreTrainedModel, batch: Batch, top_k: int, temperature: float) -> Any:
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        return self.real(model, batch, top_k, temperature)


def same(first: TeacherCache, second: TeacherCache) -> bool:
    return bool(np.array_equal(first.ids, second.ids) and np.array_equal(first.log_probs, second.log_probs))


def test_a_cache_that_is_there_is_read_and_not_made_again(
    micro: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = made(tmp_path / "teacher", micro)
    calls = Counting(monkeypatch)
    assert same(made(tmp_path / "teacher", micro), first)
    assert calls.calls == 0


def test_after_a_crash_only_what_is_missing_is_asked(
    micro: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = made(tmp_path / "whole", micro)
    with monkeypatch.context() as patch:
        Counting(patch, fail_at=3)
        with pytest.raises(KeyboardInterrupt):
            made(tmp_path / "teacher", micro)
    calls = Counting(monkeypatch)
    assert same(made(tmp_path / "teacher", micro), whole)
    assert calls.calls == len(ft.bucket(EXAMPLES, 30)) - 2
    assert "resuming at batch 2" in capsys.readouterr().out


@pytest.mark.parametrize("harm", ["temperature", "text", "teacher", "short file", "no progress"])
def test_a_cache_of_something_else_is_made_anew(
    micro: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    made(tmp_path / "teacher", micro)
    examples, temperature, weights = EXAMPLES, T, "weights"
    if harm == "teacher":
        weights = "other weights"
    elif harm == "temperature":
        temperature = 1.0
    elif harm == "text":
        examples = [an_example(9, 2, 50), *EXAMPLES[1:]]
    elif harm == "short file":
        path = tmp_path / "teacher" / "log_probs.npy"
        path.write_bytes(path.read_bytes()[:-20])
    else:
        (tmp_path / "teacher" / "progress.json").unlink()
    calls = Counting(monkeypatch)
    again = made(tmp_path / "teacher", micro, examples, temperature, weights)
    assert calls.calls == len(ft.bucket(examples, 30))
    assert same(again, made(tmp_path / "fresh", micro, examples, temperature))
