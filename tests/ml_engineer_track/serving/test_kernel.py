"""`--kernel triton`: which weights are packed, that the server speaks with them, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ml_engineer_track import __main__ as cli
from ml_engineer_track.kernels.linear import pack_linears
from ml_engineer_track.models import load_model
from ml_engineer_track.serving import catalog
from ml_engineer_track.serving.catalog import Entry, Limits, build, with_kernel
from ml_engineer_track.serving.engine import Engine, Generation
from shared.errors import UserError
from tests.ml_engineer_track.serving.conftest import generated


@pytest.fixture(scope="module")
def packed_engine(micro_path: str) -> Iterator[Engine]:
    made = build(Entry("x", (), Path(micro_path), "transformers", packed=True), Limits(cache_mb=4, max_running=4)).engine
    made.start()
    yield made
    made.close()


def test_the_server_speaks_with_packed_weights(packed_engine: Engine, micro_path: str) -> None:
    """The very tokens that the packed model gives on its own."""
    model = load_model(micro_path)
    pack_linears(model, micro_path)
    prompt = list(range(10, 30))
    tokens, _ = generated(packed_engine, Generation(prompt, 6, ignore_eos=True))
    ids = torch.tensor([prompt])
    with torch.no_grad():
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert [t.id for t in tokens] == alone[0, 20:].tolist()


def test_full_precision_is_packed_under_a_name_of_its_own(
    artifact: Path, micro_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "need_triton", lambda wanted_by: None)
    (entry,) = with_kernel(artifact, [], "auto", artifact.parent)
    assert (entry.name, entry.aliases, entry.engine) == ("tiny-bundled:bf16-packed4", ("bf16-packed4",), "transformers")
    assert (entry.packed, entry.golden) == (True, ())
    (plain,) = with_kernel(Path(micro_path), [], "transformers", artifact.parent)
    assert (plain.name, plain.folder) == ("micro-packed4", Path(micro_path))
    with pytest.raises(UserError, match="engine transformers cannot serve"):
        with_kernel(artifact, ["q8_0"], "auto", artifact.parent)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--kernel", "cuda"], "error: unknown kernel 'cuda' in --kernel. There is: triton"),
        (["--kernel", "triton", "--engine", "vllm"], "error: --kernel does not work with --engine vllm"),
        (["--kernel", "triton", "--engine", "openvino"], "error: --kernel works with the transformers engine"),
        (["--kernel", "triton"], "error: --kernel triton needs "),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], told: str, micro_path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["ml_engineer_track", "serve", "--model", micro_path, *words])
    assert cli.main() == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(told)
