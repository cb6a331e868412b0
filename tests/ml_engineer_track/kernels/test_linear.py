"""A model with packed linear layers: the same model, a little rounded."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from ml_engineer_track.kernels.linear import PackedLinear, pack_linears
from ml_engineer_track.models import weight_bytes
from shared.errors import UserError


def test_both_ways_to_multiply_agree_and_the_bias_is_kept() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(70, 6)
    packed = PackedLinear(linear, 4)
    x = torch.randn(2, 9, 70)
    few, many = packed(x[:, :4]), packed(x)
    assert many.shape == (2, 9, 6)
    torch.testing.assert_close(few, many[:, :4], atol=0.02, rtol=0)  # unpacked to bf16 on the way
    torch.testing.assert_close(many, linear(x), atol=0.2, rtol=0)
    assert packed(x[:0]).shape == (0, 9, 6)


def test_a_packed_model_is_smaller_and_says_nearly_the_same(micro: PreTrainedModel) -> None:
    ids = torch.arange(3, 27)[None]
    with torch.no_grad():
        before, size = micro(ids).logits, weight_bytes(micro)
        pack_linears(micro, "micro")
        after = micro(ids).logits
    assert type(micro.get_output_embeddings()) is nn.Linear  # it is the embedding, too
    assert sum(isinstance(m, PackedLinear) for m in micro.modules()) == 2 * 7
    assert weight_bytes(micro) < size
    assert torch.nn.functional.cosine_similarity(before, after, dim=-1).min() > 0.95
    with pytest.raises(UserError, match=r"no linear layer of full precision to pack in micro\. .*--variant bf16"):
        pack_linears(micro, "micro")
