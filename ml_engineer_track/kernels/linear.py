"""A loaded model with its linear layers packed to 4 (or 2) bits, multiplied by the kernel of dequant_matvec.py.

    python -m ml_engineer_track serve --kernel triton

Why an ML engineer does this by hand once: every 4-bit engine is this file and a kernel. What a loader of quantised models does
besides is choosing better codes; here they are rounded to the nearest, so expect a little less quality than NF4 has.

Up to eight rows of input, a decoding step of eight requests or fewer, are multiplied by the kernel. More rows, a prompt, are
limited by arithmetic: the weight is unpacked to the inputs' dtype, used for one matrix product and thrown away.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from ml_engineer_track.kernels.dequant_matvec import BATCHES, GROUP, MAX_BATCH, Packed, dequant_matvec, dequantize, quantize
from shared.errors import UserError


class PackedLinear(nn.Module):
    """Stands in for `linear` (in_features K, out_features N): x (..., K) to (..., N). Its weights get no gradient."""

    words: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    def __init__(self, linear: nn.Linear, bits: int, group: int = GROUP) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = linear.in_features, linear.out_features, bits
        kept = linear.weight.dtype if linear.weight.dtype in (torch.float16, torch.bfloat16) else torch.bfloat16
        packed = quantize(linear.weight.detach(), bits, group, kept)
        for name in ("words", "scales", "zeros"):
            self.register_buffer(name, getattr(packed, name))
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    @property
    def packed(self) -> Packed:
        return Packed(self.words, self.scales, self.zeros, self.bits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features)
        if 0 < len(rows) <= MAX_BATCH:
            out = dequant_matvec(rows, *self.packed)
        else:
            out = F.linear(rows, dequantize(*self.packed, self.in_features).to(x.dtype))
        if self.bias is not None:
            out = out + self.bias
        return out.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


def pack_linears(model: nn.Module, where: str, bits: int = 4, group: int = GROUP) -> None:
    """Replace every linear layer in place, except the head: it is often one matrix with the embedding, and most sensitive.

    UserError naming `where` when there is none of full precision: a model loaded in 4 or 8 bits is packed already.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    found = [(name, layer) for name, layer in model.named_modules() if type(layer) is nn.Linear and layer is not head]
    if not found:
        fix = "--kernel triton packs full-precision weights itself: use --variant bf16"
        raise UserError("no linear layer of full precision to pack", where, fix)
    for name, layer in tqdm(found, desc=f"packing to {bits} bits", unit="layer", leave=False, delay=2):
        model.set_submodule(name, PackedLinear(layer, bits, group))


@torch.no_grad()
def warm_up(model: PreTrainedModel) -> None:
    """Compile and tune the kernel for every shape and batch of the model, so that no request waits for it. Kept on disk."""
    if model.device.type != "cuda":
        return
    shapes = {(layer.words.shape, layer.in_features): layer for layer in model.modules() if isinstance(layer, PackedLinear)}
    work = [(layer, batch) for layer in shapes.values() for batch in BATCHES]
    for layer, batch in tqdm(work, desc="tuning the kernel", unit="shape", leave=False, delay=2):
        layer(torch.zeros(batch, layer.in_features, dtype=model.dtype, device=layer.words.device))
