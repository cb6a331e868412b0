"""The loss on a CPU without Triton, where the reference does the work."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ml_engineer_track.kernels.cross_entropy import IGNORE, cross_entropy, cross_entropy_rows


def test_it_is_pytorchs_loss_in_any_shape() -> None:
    logits = torch.randn(2, 5, 30, requires_grad=True)
    targets = torch.randint(30, (2, 5))
    targets[0, 3] = IGNORE
    loss = cross_entropy(logits, targets)
    want = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, want)
    (got,) = torch.autograd.grad(loss, logits)
    (gradient,) = torch.autograd.grad(want, logits)
    torch.testing.assert_close(got, gradient)
    assert cross_entropy(logits, torch.full((2, 5), IGNORE)).isnan()


def test_its_gradient_belongs_to_it() -> None:
    """Beside differences of the loss itself, which float32 gives to three digits; with a term of lse, as z-loss has it."""
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 11), torch.tensor([4, IGNORE, 0])

    def value(x: torch.Tensor) -> torch.Tensor:
        losses, lse = cross_entropy_rows(x, targets, IGNORE)
        return losses.sum() + (lse**2).sum()

    leaf = logits.clone().requires_grad_()
    (got,) = torch.autograd.grad(value(leaf), leaf)
    for place in ((0, 4), (0, 5), (1, 2), (2, 0)):
        step = torch.zeros_like(logits)
        step[place] = 1e-2
        assert float((value(logits + step) - value(logits - step)) / 2e-2) == pytest.approx(float(got[place]), abs=5e-3)


def test_it_is_registered_as_pytorch_wants_it() -> None:
    logits, targets = torch.randn(3, 20, requires_grad=True), torch.tensor([1, IGNORE, 19])
    torch.library.opcheck(cross_entropy_rows, (logits, targets, IGNORE))
    with pytest.raises(RuntimeError):
        cross_entropy(logits, torch.tensor([1, 20, 2]))
