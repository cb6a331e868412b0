"""The cross-entropy kernels themselves, run block by block by Triton's interpreter. Started by test_interpreter.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ml_engineer_track.kernels import cross_entropy as ce
from ml_engineer_track.kernels.correctness import BOUND
from ml_engineer_track.kernels.device import INTERPRETED

assert INTERPRETED


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(
    rows=st.integers(2, 5),
    vocabulary=st.integers(1, 3 * ce.BLOCK + 1),
    spread=st.sampled_from((0.1, 4.0, 60.0)),
    dtype=st.sampled_from(tuple(BOUND)),
    ignored=st.booleans(),
    seed=st.integers(0, 99),
)
def test_loss_and_gradient_are_float64s_to_rounding(
    rows: int, vocabulary: int, spread: float, dtype: torch.dtype, ignored: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    logits = (spread * torch.randn(rows, vocabulary)).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (rows,))
    if ignored:
        targets[0] = ce.IGNORE
    loss = ce.cross_entropy(logits, targets)
    loss.backward()
    exact = logits.detach().double().requires_grad_()
    want = F.cross_entropy(exact, targets)
    want.backward()
    assert logits.grad is not None
    assert exact.grad is not None
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5 * spread)
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=BOUND[dtype], atol=2 * BOUND[torch.float32])


def test_kernel_and_reference_agree_with_a_gradient_into_both_results() -> None:
    """What z-loss does: it adds a multiple of lse squared. Ignored rows have no loss, but an lse."""
    logits = torch.randn(4, 37)
    targets = torch.tensor([3, ce.IGNORE, 36, 0])
    d_loss, d_lse = torch.randn(2, 4)
    losses, lse = ce.by_triton(logits, targets, ce.IGNORE)
    other_losses, other_lse = ce.reference(logits, targets, ce.IGNORE)
    torch.testing.assert_close(losses, other_losses)
    torch.testing.assert_close(lse, other_lse)
    got = ce.backward_by_triton(d_loss, d_lse, logits, targets, lse, ce.IGNORE)
    torch.testing.assert_close(got, ce.backward_reference(d_loss, d_lse, logits, targets, lse, ce.IGNORE))


def test_the_operators_are_registered_as_pytorch_wants_them() -> None:
    logits, targets = torch.randn(3, 20, requires_grad=True), torch.tensor([1, ce.IGNORE, 19])
    torch.library.opcheck(ce.cross_entropy_rows, (logits, targets, ce.IGNORE))
    d_loss, d_lse = torch.randn(2, 3)
    lse = logits.detach().logsumexp(-1)
    torch.library.opcheck(ce.cross_entropy_backward, (d_loss, d_lse, logits.detach(), targets, lse, ce.IGNORE))


def test_words_that_cannot_be_said_and_targets_that_do_not_exist() -> None:
    masked = torch.randn(2, 40)
    masked[0, :33] = float("-inf")  # the whole first blocks
    targets = torch.tensor([35, 2])
    torch.testing.assert_close(ce.cross_entropy(masked, targets), F.cross_entropy(masked, targets))
    losses, _ = ce.by_triton(torch.randn(2, 40), torch.tensor([40, 2]), ce.IGNORE)
    assert losses.isnan().tolist() == [True, False]
    empty = torch.randn(0, 40, requires_grad=True)
    ce.cross_entropy_rows(empty, torch.zeros(0, dtype=torch.long), ce.IGNORE)[0].sum().backward()
    assert empty.grad is not None
