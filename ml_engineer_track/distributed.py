"""Several workers train one model: which rows each of them takes, how their gradients become one, and who writes.

Why an ML engineer does this: a step's rows can be gone through at the same time, on as many devices as there are. What is
learnt must not depend on how many there were, so every step has the same rows whatever their number; each worker takes
its share of them, and what the shares give is added up.

Two strategies. `ddp` (Li et al. 2020): every worker holds the whole model, gradients are averaged before each update, and
all copies stay equal. `fsdp` (Zhao et al. 2023; FSDP2, PyTorch's `fully_shard`): every worker holds a share of each layer
and borrows the rest while it computes, for models that fit no single device. Workers talk through NCCL on GPUs, Gloo on CPUs.

These are PyTorch's own two calls and not Accelerate's wrappers of them: Accelerate 1.15 leaves its FSDP plugin out without a
word where the workers are CPUs, so that what a machine without a GPU tests would not be what a cluster runs.

Without a process group everything here means one worker: nothing is exchanged, and this worker writes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from shared.errors import UserError
from shared.hardware import device

T = TypeVar("T")


def world_size() -> int:
    """How many workers train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This worker's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Is this the worker that writes and speaks for all?"""
    return rank() == 0


@contextmanager
def joined() -> Iterator[None]:
    """The process group that torchrun's environment variables describe, each worker on a GPU of its own where there are any."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    yield
    dist.destroy_process_group()  # not after an error: another worker may be gone, and leaving together would wait for it


def shard(items: Sequence[T], filler: T, number: int | None = None, workers: int | None = None) -> list[T]:
    """This worker's share: every `workers`-th item from its number on, filled up so that all shares are equally long.

    Every item is in exactly one share. Equal lengths matter because workers exchange gradients (and with FSDP weights) in
    each of their passes: one that makes fewer leaves the others waiting for ever.
    """
    workers = world_size() if workers is None else workers
    number = rank() if number is None else number
    return [*items, *[filler] * (-len(items) % workers)][number::workers]


def total(value: float) -> float:
    """The sum of the workers' values, the same number on all of them."""
    if world_size() == 1:
        return value
    summed = torch.tensor(value, dtype=torch.float64, device=device())
    dist.all_reduce(summed)
    return float(summed)


def need_agreement(step: int, where: Path) -> None:
    """UserError when the workers found different checkpoints: then their folders are not one and the same."""
    found = [step] * world_size()
    if world_size() > 1:
        dist.all_gather_object(found, step)
    if len(set(found)) > 1:
        raise UserError(f"the workers found checkpoints of different steps ({found})", str(where), "ARTIFACTS must be shared")


def spread(model: PeftModel, strategy: str) -> torch.nn.Module:
    """The model to train with: its copies are kept equal (`ddp`), or it is cut into shares (`fsdp`, in place, by layers).

    UserError for 4-bit weights under fsdp: they are bytes whose meaning is kept elsewhere, and cannot be cut.
    """
    if world_size() == 1:
        return model
    if strategy == "ddp":
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    base = model.get_base_model()
    if getattr(base, "quantization_method", None):
        raise UserError("4-bit weights cannot be sharded", "METHOD=qlora with STRATEGY=fsdp", "Use STRATEGY=ddp or METHOD=lora")
    for layer in [m for m in model.modules() if type(m).__name__ in (base._no_split_modules or ())]:
        fully_shard(layer)
    return fully_shard(model)


@contextmanager
def exchange(model: torch.nn.Module, now: bool) -> Iterator[None]:
    """Backward passes in this block exchange gradients only if `now`; before that they add up on each worker."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
    if isinstance(model, DistributedDataParallel) and not now:
        with model.no_sync():
            yield
    else:
        yield


# --- checkpoints: the same file whatever the number of workers and the strategy, so that other workers can go on from it ---


def adapter_writer(model: PeftModel) -> Callable[[Path], Any]:
    """Collects the adapter from all workers, now; what is returned writes it into a folder."""
    trained = {name: _whole(p.detach()) for name, p in model.named_parameters() if p.requires_grad}

    def write(folder: Path) -> None:
        model.save_pretrained(str(folder), state_dict=trained)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card: it only names a path of this machine

    return write


def read_adapter(model: PeftModel, folder: Path) -> None:
    """Put back what `adapter_writer` wrote; every worker takes its share."""
    held = get_peft_model_state_dict(model)
    stored = load_file(folder / "adapter_model.safetensors")
    set_peft_model_state_dict(model, {name: _share(tensor, held[name]) for name, tensor in stored.items()})


class WholeOptimizer:
    """An optimiser's state as one worker would hold it, collected from all of them and given back to each in shares."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """Every worker must ask for it."""
        return dict(tree_map(_whole, self.optimizer.state_dict()))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        moments = {
            i: {name: _share(value, parameters[i]) if value.ndim else value for name, value in own.items()}
            for i, own in state["state"].items()
        }
        self.optimizer.load_state_dict({**state, "state": moments})


def _whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _share(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This worker's share of a tensor that all of them have, cut as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
