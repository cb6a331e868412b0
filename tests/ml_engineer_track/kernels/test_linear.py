"""A model with packed linear layers: the same model, a little rounded."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from ml_engineer_track.kernels.dequant_matvec import dequantize
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


def test_a_packed_model_is_the_model_with_rounded_weights(micro: PreTrainedModel) -> None:
    """Beside the same model with every weight replaced by what its packed layer holds: a prompt, then few rows of input."""
    unpacked, size = copy.deepcopy(micro), weight_bytes(micro)
    pack_linears(micro, "micro")
    packed = {name: layer for name, layer in micro.named_modules() if isinstance(layer, PackedLinear)}
    assert len(packed) == 2 * 7
    assert type(micro.get_output_embeddings()) is nn.Linear  # it is the embedding, too
    assert weight_bytes(micro) < size
    ids = torch.arange(3, 27)[None]
    for tokens, precise in ((24, False), (8, True)):  # a prompt is unpacked in bf16, few rows in float32
        for name, layer in packed.items():
            words, scales, zeros, bits = layer.packed
            scales, zeros = (scales.float(), zeros.float()) if precise else (scales, zeros)
            weight = dequantize(words, scales, zeros, bits, layer.in_features).float()
            unpacked.get_submodule(name).weight.data.copy_(weight)
        with torch.no_grad():
            torch.testing.assert_close(micro(ids[:, :tokens]).logits, unpacked(ids[:, :tokens]).logits, rtol=1e-3, atol=1e-3)


def test_a_model_that_is_packed_already_is_refused(micro: PreTrainedModel) -> None:
    pack_linears(micro, "micro")
    with pytest.raises(UserError, match=r"no linear layer of full precision to pack in micro\. .*--variant bf16"):
        pack_linears(micro, "micro")
