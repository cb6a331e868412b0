"""The kernels through the whole compiler, for GPUs that need not be here: types and layouts, which no interpreter checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ml_engineer_track.kernels import cross_entropy, dequant_matvec
from ml_engineer_track.kernels.device import HAS_TRITON, INTERPRETED

pytestmark = pytest.mark.skipif(not HAS_TRITON or INTERPRETED, reason="Triton is not installed, or only interprets")

POINTERS = {"x": "*bf16", "words": "*i32", "scales": "*bf16", "zeros": "*bf16", "out": "*bf16"}
SIZES = dict.fromkeys(("batch", "columns", "rows", "groups", "one"), "i32")


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, int], capability: int, warps: int) -> Any:
    """A kernel compiled down to machine code; pointers and sizes are multiples of 16, as those of real models."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    even = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(kernel.arg_names) if name in types}
    source = ASTSource(kernel, signature, constants, even)
    return compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize(("capability", "bits", "batch"), [(80, 4, 1), (90, 4, 1), (90, 2, 1), (90, 4, 8)])
def test_the_matrix_vector_kernel_compiles_and_reads_sixteen_bytes_at_a_time(capability: int, bits: int, batch: int) -> None:
    first = dequant_matvec.with_sums_in_registers(dequant_matvec.CONFIGS, {}, BATCH=batch)[0]
    constants = {"BITS": bits, "WORDS": 2 * bits, "BATCH": batch} | first.kwargs
    made = compiled(dequant_matvec.dequant_matvec_kernel.fn, POINTERS | SIZES, constants, capability, first.num_warps)
    ptx = made.asm["ptx"]
    assert "v4.b32" in ptx  # four words of packed weights in one load
    assert "cvt.rn.f32.s32" not in ptx  # codes become floats without a conversion


def test_the_cross_entropy_kernels_compile() -> None:
    forward = {"logits": "*bf16", "targets": "*i64", "losses": "*fp32", "lse": "*fp32", "vocabulary": "i32"}
    compiled(cross_entropy.forward_kernel, forward | {"ignore": "i32"}, {"BLOCK": 4096}, 90, 8)
    backward = {"d_loss": "*fp32", "d_lse": "*fp32", "logits": "*bf16", "targets": "*i64", "lse": "*fp32", "gradient": "*bf16"}
    types = backward | {"vocabulary": "i32", "ignore": "i32"}
    assert "st.global" in compiled(cross_entropy.backward_kernel, types, {"BLOCK": 4096}, 90, 8).asm["ptx"]
