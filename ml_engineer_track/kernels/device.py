"""Where Triton can run here: on a GPU, or, with TRITON_INTERPRET=1, slowly on any CPU.

Triton decides when it is imported whether its kernels are compiled or interpreted, so the variable must be set before that; the
command `kernels` and the tests start a process of their own for it. The interpreter runs a kernel block by block in NumPy: good
for checking indices and masks, not for measuring, and it does not check what only the compiler does.
"""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext

import torch

from shared.errors import UserError

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
#: Triton supports NVIDIA GPUs from Ampere on (compute capability 8.0).
OLDEST = (8, 0)


def need_triton(wanted_by: str, gpu: bool = True) -> None:
    """UserError, one line, when Triton is missing or, with `gpu`, when there is nothing here that it can run on."""
    if not HAS_TRITON:
        fix = "pip install -c torch.txt -c constraints.txt -e '.[kernels]' (Linux only)"
        raise UserError(f"{wanted_by} needs Triton, which is not installed", "this environment", fix)
    if not gpu or INTERPRETED:
        return
    if not torch.cuda.is_available():
        fix = "Leave it out, or set TRITON_INTERPRET=1 to see it work, very slowly, on the CPU"
        raise UserError(f"{wanted_by} needs a GPU, and there is none", "this machine", fix)
    if not triton_gpu():
        major, minor = torch.cuda.get_device_capability()
        fix = f"It takes compute capability {OLDEST[0]}.{OLDEST[1]} or newer; leave {wanted_by} out"
        raise UserError(f"a GPU without Triton: {torch.cuda.get_device_name()} ({major}.{minor})", "this machine", fix)


def triton_gpu() -> bool:
    """Is there a GPU that Triton compiles for?"""
    return torch.cuda.is_available() and (torch.version.hip is not None or torch.cuda.get_device_capability() >= OLDEST)


def launching_on(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current GPU, which need not be the one that holds the tensors."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
