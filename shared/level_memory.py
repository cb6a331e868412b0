"""Keeps the memory of a process that serves for weeks level.

Why: three stores meant for programs that end grow with every new length of text. oneDNN and PyTorch's bridge to it keep a
prepared kernel for each shape they have met (1,024 of them, about a megabyte each for a small transformer), and the C library
keeps what each thread has freed for that thread alone. None of it is a leak and all of it ends somewhere, hundreds of
megabytes later; `make soak` is the measurement. A training run meets few shapes many times and is left as it is.
"""

from __future__ import annotations

import ctypes
import os
import sys

#: Shapes whose kernels are kept; preparing one anew takes about a millisecond.
KERNELS_KEPT = "64"
#: Pools of freed memory, however many threads there are.
ARENAS = 2
M_ARENA_MAX = -8  # from malloc.h


def keep_memory_level() -> None:
    """Call before the first tensor is computed: the limits are read once. Values set in the environment are left alone."""
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, KERNELS_KEPT)
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have no arenas to limit
        if mallopt is not None and "MALLOC_ARENA_MAX" not in os.environ:
            mallopt(M_ARENA_MAX, ARENAS)
