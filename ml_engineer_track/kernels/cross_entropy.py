"""Fused cross-entropy over a large vocabulary, forward and backward: what training a small model spends its memory on.

Why an ML engineer writes one: the logits of 8,192 tokens over 151,936 words are 2.5 GB in bf16, and the usual way copies them:
to float32 (5 GB), to log probabilities (5 GB), to a gradient in float32 (5 GB) and back to bf16. Here each row is read once,
keeping two numbers, its largest logit so far and the sum of exponentials relative to it ("online softmax", Milakov and Gimelshein
2018), and the gradient is written once, in the logits' own dtype. Nothing of the logits' size is made but that gradient.

    python -m ml_engineer_track kernels      # is it right on this device, how fast, how much memory

    loss[row] = lse[row] - logits[row, target[row]],  lse = log(sum(exp(logits)))
    d loss[row] / d logits[row, v] = exp(logits[row, v] - lse[row]) - (1 if v is the target else 0)
"""

from __future__ import annotations

import torch

from ml_engineer_track.kernels.device import HAS_TRITON, INTERPRETED, launching_on

if HAS_TRITON:
    import triton
    import triton.language as tl

#: PyTorch's mark for a token that carries no loss.
IGNORE = -100
#: Columns a program holds at a time: 16 values for each of 256 threads. Small under the interpreter, so that loops take turns.
BLOCK = 16 if INTERPRETED else 4096


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, ignore: int = IGNORE) -> torch.Tensor:
    """Mean loss in nats (float32) over the targets that are not `ignore`; nan when all are, as in PyTorch.

    logits (..., V) in any float dtype, targets (...) int64. A target outside the vocabulary is an IndexError on a CPU and makes
    the loss nan on a GPU.
    """
    losses, _ = cross_entropy_rows(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), ignore)
    return losses.sum() / (targets != ignore).sum()


# --- the operators: forward, backward, and how autograd goes from one to the other --------------------------------------


@torch.library.custom_op("two_engineers::cross_entropy", mutates_args=(), device_types="cpu")
def cross_entropy_rows(logits: torch.Tensor, targets: torch.Tensor, ignore: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (rows, V) and targets int64 (rows,) to the losses and `lse`, both float32 (rows,); an ignored row's loss is 0."""
    return (by_triton if INTERPRETED else reference)(logits, targets, ignore)


@cross_entropy_rows.register_kernel("cuda")
def _(logits: torch.Tensor, targets: torch.Tensor, ignore: int) -> tuple[torch.Tensor, torch.Tensor]:
    return by_triton(logits, targets, ignore)


@cross_entropy_rows.register_fake
def _(logits: torch.Tensor, targets: torch.Tensor, ignore: int) -> tuple[torch.Tensor, torch.Tensor]:
    return targets.new_empty(targets.shape, dtype=torch.float32), targets.new_empty(targets.shape, dtype=torch.float32)


@torch.library.custom_op("two_engineers::cross_entropy_backward", mutates_args=(), device_types="cpu")
def cross_entropy_backward(
    d_loss: torch.Tensor, d_lse: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor, lse: torch.Tensor, ignore: int
) -> torch.Tensor:
    """The gradient of the logits (rows, V), in their dtype, from those of both results (rows,). `lse` may be trained, too."""
    return (backward_by_triton if INTERPRETED else backward_reference)(d_loss, d_lse, logits, targets, lse, ignore)


@cross_entropy_backward.register_kernel("cuda")
def _(
    d_loss: torch.Tensor, d_lse: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor, lse: torch.Tensor, ignore: int
) -> torch.Tensor:
    return backward_by_triton(d_loss, d_lse, logits, targets, lse, ignore)


@cross_entropy_backward.register_fake
def _(
    d_loss: torch.Tensor, d_lse: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor, lse: torch.Tensor, ignore: int
) -> torch.Tensor:
    return logits.new_empty(logits.shape)


def remember(ctx, inputs, output) -> None:
    logits, targets, ctx.ignore = inputs
    ctx.save_for_backward(logits, targets, output[1])


def backward(ctx, d_loss: torch.Tensor, d_lse: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    logits, targets, lse = ctx.saved_tensors
    return cross_entropy_backward(d_loss, d_lse, logits, targets, lse, ctx.ignore), None, None


cross_entropy_rows.register_autograd(backward, setup_context=remember)


# --- the same in plain PyTorch ------------------------------------------------------------------------------------------


def reference(logits: torch.Tensor, targets: torch.Tensor, ignore: int) -> tuple[torch.Tensor, torch.Tensor]:
    kept = targets != ignore
    values = logits.float()
    lse = values.logsumexp(-1)
    picked = values.gather(1, torch.where(kept, targets, 0)[:, None])[:, 0]
    return torch.where(kept, lse - picked, 0.0), lse


def backward_reference(
    d_loss: torch.Tensor, d_lse: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor, lse: torch.Tensor, ignore: int
) -> torch.Tensor:
    kept = targets != ignore
    d_loss = torch.where(kept, d_loss, 0.0)
    gradient = (logits.float() - lse[:, None]).exp() * (d_loss + d_lse)[:, None]
    gradient.scatter_add_(1, torch.where(kept, targets, 0)[:, None], -d_loss[:, None])
    return gradient.to(logits.dtype)


# --- the kernels --------------------------------------------------------------------------------------------------------


def by_triton(logits: torch.Tensor, targets: torch.Tensor, ignore: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One program a row."""
    rows, vocabulary = logits.shape
    losses, lse = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    if rows:
        with launching_on(logits):
            forward_kernel[(rows,)](
                logits.contiguous(), targets.contiguous(), losses, lse, vocabulary, ignore, BLOCK, num_warps=8
            )
    return losses, lse


def backward_by_triton(
    d_loss: torch.Tensor, d_lse: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor, lse: torch.Tensor, ignore: int
) -> torch.Tensor:
    """One program for every block of every row: with the sum known, no block needs another."""
    rows, vocabulary = logits.shape
    # In float32 under the interpreter, which rounds to bf16 wrongly.
    gradient = torch.empty(logits.shape, dtype=torch.float32 if INTERPRETED else logits.dtype, device=logits.device)
    if rows:
        with launching_on(logits):
            backward_kernel[(rows, triton.cdiv(vocabulary, BLOCK))](
                d_loss.contiguous(), d_lse.contiguous(), logits.contiguous(), targets.contiguous(), lse, gradient, vocabulary,
                ignore, BLOCK, num_warps=8,
            )  # fmt: skip
    return gradient.to(logits.dtype)


if HAS_TRITON:

    @triton.jit
    def forward_kernel(logits, targets, losses, lse, vocabulary, ignore, BLOCK: tl.constexpr):
        """Largest logit and sum of exponentials in one pass: when a block brings a larger one, the sum so far shrinks."""
        row = tl.program_id(0).to(tl.int64)  # rows * vocabulary does not fit 32 bits
        start = logits + row * vocabulary
        highest = tl.full((), -3e38, tl.float32)  # not -inf: the difference of two infinities is nan
        total = tl.full((), 0.0, tl.float32)
        for first in range(0, vocabulary, BLOCK):
            column = first + tl.arange(0, BLOCK)
            value = tl.load(start + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(highest, tl.max(value, axis=0))
            total = total * tl.exp(highest - higher) + tl.sum(tl.exp(value - higher), axis=0)
            highest = higher
        log_sum = highest + tl.log(total)
        target = tl.load(targets + row)
        # Outside the vocabulary there is nothing to read: nan says so without ending the process, as an assertion would.
        inside = (target >= 0) & (target < vocabulary)
        picked = tl.load(start + target, mask=inside, other=float("nan")).to(tl.float32)
        tl.store(losses + row, tl.where(target == ignore, 0.0, log_sum - picked))
        tl.store(lse + row, log_sum)

    @triton.jit
    def backward_kernel(d_loss, d_lse, logits, targets, lse, gradient, vocabulary, ignore, BLOCK: tl.constexpr):
        """Softmax times what arrives, less what arrives at the target."""
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        target = tl.load(targets + row)
        arrived = tl.where(target == ignore, 0.0, tl.load(d_loss + row))
        value = tl.load(logits + row * vocabulary + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
        softmax = tl.exp(value - tl.load(lse + row))
        result = softmax * (arrived + tl.load(d_lse + row)) - tl.where(column == target, arrived, 0.0)
        tl.store(gradient + row * vocabulary + column, result, mask=column < vocabulary)
