"""Fused dequantise + matrix-vector product for weights of 4 or 2 bits: what decoding spends its time on.

Why an ML engineer writes one: a decoding step multiplies every weight with one vector (or a few), so it takes as long as reading
the weights takes. Weights of four bits are a quarter of bf16's bytes, but only if they are unpacked *on the way* to the
multiplication: unpacking them into memory first would write and read back the very bytes that were saved.

    python -m ml_engineer_track kernels                          # is it right on this device, and how fast
    python -m ml_engineer_track serve --kernel triton            # a model served with it

Layout, for a weight of N rows (outputs) and K columns (inputs), in groups of `group` columns (64 unless said otherwise), the last
group filled up with zeros; groups = ceil(K / group), codes = 32 / bits in a word:

    words   int32 (N, groups, group / codes)    two codes a byte at 4 bits, four at 2 bits, in words of 32 bits
    scales  fp16 or bf16 (N, groups)            weight = scale * (code - zero)
    zeros   fp16 or bf16 (N, groups)            not rounded to a whole code

Word j of a group holds the columns j, j + W, j + 2 W, ... (W = group / codes words in a group), the first in its lowest bits.
Neighbouring words so hold neighbouring columns at every bit position: a thread reads four words (16 bytes, the widest load
there is) and, for each position, the four neighbouring inputs they meet. Had a word held neighbouring columns, as the plain
order has it, every one of those inputs would be a load of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ml_engineer_track.kernels.device import HAS_TRITON, INTERPRETED, launching_on

if HAS_TRITON:
    import triton
    import triton.language as tl

BITS = (4, 2)
GROUP = 64
#: Rows of inputs the operator takes. Beyond, arithmetic is the limit, and unpacking once for a matrix product is faster.
MAX_BATCH = 8
#: Batches are rounded up to these, so that only so many kernels are compiled; rows that do not exist are masked.
BATCHES = (1, 2, 4, 8)
#: The bits of 1.0 in float32.
ONE = 0x3F800000


class Packed(NamedTuple):
    """A weight in the layout above; the arguments that the operator takes after its inputs, in its order."""

    words: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    bits: int


# --- packing ----------------------------------------------------------------------------------------------------------


def quantize(weight: torch.Tensor, bits: int, group: int = GROUP, dtype: torch.dtype = torch.bfloat16) -> Packed:
    """Round a weight (N, K) to the nearest of 2**bits evenly spaced values in each group; `dtype` is that of scales and zeros.

    The values span the group's own smallest to largest weight, zero included. The codes are chosen for the scale and zero as
    they are stored, so rounding those two costs no accuracy of its own. ValueError for other bits or group sizes.
    """
    rows, columns = weight.shape
    check(bits, group)
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % group)).view(rows, -1, group)
    low, high = padded.amin(-1).clamp(max=0), padded.amax(-1).clamp(min=0)
    scales = ((high - low) / (2**bits - 1)).to(dtype)
    scales[scales == 0] = 1  # a group of zeros
    zeros = (-low / scales.float()).to(dtype)
    codes = (padded / scales.float()[..., None] + zeros.float()[..., None]).round().clamp(0, 2**bits - 1)
    return Packed(pack(codes.to(torch.int32), bits), scales, zeros, bits)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes int32 (N, groups, group) as words int32 (N, groups, group * bits / 32)."""
    rows, groups, _ = codes.shape
    places = codes.view(rows, groups, 32 // bits, -1)  # (.., position in the word, word)
    words = torch.zeros_like(places[:, :, 0])
    for place in range(32 // bits):
        words |= places[:, :, place] << (bits * place)
    return words


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes int32 (N, groups, group) of `pack`."""
    shifts = torch.arange(0, 32, bits, device=words.device, dtype=torch.int32)
    codes = (words[:, :, None, :] >> shifts[:, None]) & (2**bits - 1)
    return codes.flatten(2)


def dequantize(words: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """The weight (N, columns) in the scales' dtype; in float64 when the scales and zeros are given so."""
    weight = (unpack(words, bits).to(scales.dtype) - zeros[..., None]) * scales[..., None]
    return weight.flatten(1)[:, :columns]


def check(bits: int, group: int) -> None:
    # Triton's blocks have powers of two as sizes, and a group is one side of a block.
    if bits not in BITS or group not in (16, 32, 64, 128):
        raise ValueError(f"{bits} bits in groups of {group}: bits must be 4 or 2, a group 16, 32, 64 or 128")


# --- the operator -----------------------------------------------------------------------------------------------------


@torch.library.custom_op("two_engineers::dequant_matvec", mutates_args=(), device_types="cpu")
def dequant_matvec(x: torch.Tensor, words: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int) -> torch.Tensor:
    """Inputs x (B, K), B up to 8, times the packed weight's transpose: (B, N) in x's dtype, added up in float32.

    A GPU runs the kernel, a CPU the reference (or the kernel, interpreted). ValueError when the shapes do not belong together.
    There is no gradient: packed weights are for serving.
    """
    return by_triton(x, words, scales, zeros, bits) if INTERPRETED else reference(x, words, scales, zeros, bits)


@dequant_matvec.register_kernel("cuda")
def _(x: torch.Tensor, words: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int) -> torch.Tensor:
    return by_triton(x, words, scales, zeros, bits)


@dequant_matvec.register_fake
def _(x: torch.Tensor, words: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int) -> torch.Tensor:
    return x.new_empty(x.shape[0], words.shape[0])


def reference(x: torch.Tensor, words: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int) -> torch.Tensor:
    """The same in plain PyTorch: unpack all, then multiply."""
    check_shapes(x, words, scales, zeros, bits)
    weight = dequantize(words, scales.float(), zeros.float(), bits, x.shape[1])
    return (x.float() @ weight.T).to(x.dtype)


def by_triton(x: torch.Tensor, words: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int) -> torch.Tensor:
    """Launch the kernel: one program for every `ROWS` rows of the weight."""
    check_shapes(x, words, scales, zeros, bits)
    batch, columns = x.shape
    rows, groups, words_in_group = words.shape
    # The interpreter rounds to bf16 wrongly (a carry into the exponent is lost), so there the rounding is left to PyTorch.
    out = torch.empty(batch, rows, dtype=torch.float32 if INTERPRETED else x.dtype, device=x.device)
    with launching_on(x):
        dequant_matvec_kernel[lambda tuned: (triton.cdiv(rows, tuned["ROWS"]),)](
            x.contiguous(), words.contiguous(), scales.contiguous(), zeros.contiguous(), out, batch, columns, rows, groups,
            ONE, BITS=bits, WORDS=words_in_group, BATCH=next(size for size in BATCHES if size >= batch),
        )  # fmt: skip
    return out.to(x.dtype)


def check_shapes(x: torch.Tensor, words: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int) -> None:
    rows, groups, words_in_group = words.shape
    group = words_in_group * 32 // bits
    check(bits, group)
    fits = -(-x.shape[1] // group) == groups and scales.shape == zeros.shape == (rows, groups)
    if not fits or not 1 <= x.shape[0] <= MAX_BATCH or words.dtype != torch.int32:
        raise ValueError(
            f"x {tuple(x.shape)}, words {tuple(words.shape)} {words.dtype}, scales {tuple(scales.shape)} and zeros "
            f"{tuple(zeros.shape)} are no product of up to {MAX_BATCH} rows in the layout of dequant_matvec.py"
        )


# --- the kernel -------------------------------------------------------------------------------------------------------

if HAS_TRITON:
    # (rows of the weight, warps) of a program; the fastest is measured once for every shape and kept on disk. A program reads its
    # rows piece by piece, 128 words for each warp: four for each thread. More rows use every input that was read more often. Few
    # rows with many warps split the columns among the warps, which keeps a GPU busy that has more multiprocessors than a small
    # matrix has blocks of rows ("split-K", inside a program). Splitting them among programs would need a second kernel to add up,
    # or additions in an order that changes from run to run, and with it the replies.
    SHAPES = [(4, 1), (8, 1), (2, 2), (4, 2), (1, 4), (2, 4), (4, 4)]
    CONFIGS = [triton.Config({"ROWS": rows, "PIECE": 128 * warps}, num_warps=warps, num_stages=1) for rows, warps in SHAPES]
    if INTERPRETED:  # nothing can be measured there; small, so that small matrices take several turns of every loop
        CONFIGS = [triton.Config({"ROWS": 4, "PIECE": 16})]

    def with_sums_in_registers(configs, arguments, BATCH, **_):
        """A thread keeps a sum for each of its rows and each input row; too many would be moved to memory and back."""
        return [config for config in configs if config.kwargs["ROWS"] * BATCH <= 16]

    @triton.autotune(
        CONFIGS, key=["columns", "rows", "BITS", "BATCH"], cache_results=True,
        prune_configs_by={"early_config_prune": with_sums_in_registers},
    )  # fmt: skip
    @triton.jit
    def dequant_matvec_kernel(
        x, words, scales, zeros, out, batch, columns, rows, groups, one,
        BITS: tl.constexpr, WORDS: tl.constexpr, BATCH: tl.constexpr, ROWS: tl.constexpr, PIECE: tl.constexpr,
    ):  # fmt: skip
        """out[b, row] = sum over groups of scale * (sum of code * x - zero * sum of x), for `ROWS` rows and all b.

        A code becomes a float without a conversion, which GPUs do at a fraction of their usual rate: shifted to the top of the
        mantissa of 1.0, it reads as 1 + code / 2**BITS. One shift, one and-or, one multiply-add for each weight is all the time
        there is: at 4 bits and 4 TB/s, eight weights arrive every picosecond. The 1 goes out again together with the zero:

            sum of code * x - zero * sum of x  =  2**BITS * (sum of (1 + code / 2**BITS) * x - (1 + zero / 2**BITS) * sum of x)

        `one`, the bits of 1.0, is an argument because an instruction takes one constant: and-or with two would be two of them.
        """
        CODES: tl.constexpr = 32 // BITS
        GROUPS: tl.constexpr = PIECE // WORDS
        LEVELS: tl.constexpr = 2**BITS
        TOP: tl.constexpr = 23 - BITS  # float32 has 23 bits of mantissa
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        word = tl.arange(0, WORDS)
        # One running sum for each thread's own words; threads are added up once, at the end.
        sums = ()
        for _ in tl.static_range(BATCH):
            sums = sums + (tl.zeros((ROWS, GROUPS, WORDS), tl.float32),)  # noqa: RUF005 - Triton knows no unpacking
        for first in range(0, groups, GROUPS):
            group = first + tl.arange(0, GROUPS)
            place = row[:, None] * groups + group[None, :]
            exists = (row < rows)[:, None] & (group < groups)[None, :]
            # Weights are read once: they need not push anything else out of the cache.
            packed = tl.load(
                words + place[:, :, None] * WORDS + word, mask=exists[:, :, None], other=0, eviction_policy="evict_first"
            )
            scale = tl.load(scales + place, mask=exists, other=0).to(tl.float32)
            zero = tl.load(zeros + place, mask=exists, other=0).to(tl.float32)
            offset = 1 + zero / LEVELS
            new = ()
            for b in tl.static_range(BATCH):
                dot = tl.zeros((ROWS, GROUPS, WORDS), tl.float32)
                sum_x = tl.zeros((GROUPS, WORDS), tl.float32)
                for i in tl.static_range(CODES):
                    column = (group[:, None] * CODES + i) * WORDS + word[None, :]
                    x_i = tl.load(x + b * columns + column, mask=(column < columns) & (b < batch), other=0).to(tl.float32)
                    bits = (packed << (TOP - BITS * i)) if BITS * i <= TOP else (packed >> (BITS * i - TOP))
                    bits = (bits & ((LEVELS - 1) << TOP)) | one
                    dot += bits.to(tl.float32, bitcast=True) * x_i[None, :, :]
                    sum_x += x_i
                new = new + (sums[b] + scale[:, :, None] * (dot - offset[:, :, None] * sum_x[None, :, :]),)  # noqa: RUF005
            sums = new
        for b in tl.static_range(BATCH):
            total = tl.sum(tl.sum(sums[b], axis=2), axis=1) * LEVELS
            tl.store(out + b * rows + row, total, mask=(row < rows) & (b < batch))
