"""Where a training run is, on disk: what fine-tuning and distillation both need to be stopped at any moment and go on.

Why an ML engineer writes aside and renames: a machine that dies while it writes must find the checkpoint before, whole. What a
checkpoint costs is the steps since the last one, and `best` is not what came last but what did best on validation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

import torch

from ml_engineer_track.distributed import is_first
from shared.errors import UserError
from shared.files import replace_folder, write_json

#: Writes weights into a folder, or reads them from one.
Weights = Callable[[Path], Any]


class Diverged(UserError):  # noqa: N818 -- said of a training, as it is told
    """The losses are no numbers any more. Trying again with the same rows and settings would end in the same way."""


class Optimizer(Protocol):
    """An optimiser, or what collects its state from several workers."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class Progress:
    """What a checkpoint holds beside weights and optimiser: where the run is and what it has seen."""

    step: int = 0
    best: float = math.inf
    looks_without_gain: int = 0
    loss: list[float] = field(default_factory=list)
    validation: list[dict[str, float]] = field(default_factory=list)

    def look(self, loss: float, write: Weights, work: Path, setting: str) -> None:
        """Record a validation loss; the best weights so far are kept in `work/best`. Diverged when it is no number."""
        if not math.isfinite(loss):
            raise Diverged(f"training diverged (validation loss {loss})", f"step {self.step}", f"Lower {setting}")
        self.validation.append({"step": self.step, "loss": loss})
        self.looks_without_gain = 0 if loss < self.best else self.looks_without_gain + 1
        if loss < self.best:
            self.best = loss
            if is_first():
                replace_folder(work / "best", write)

    def save(self, write: Weights, optimizer: Optimizer, work: Path) -> None:
        """Write the checkpoint, in place of the last one. Of several workers all must call this, and the first one writes."""
        moments = optimizer.state_dict()

        def whole(folder: Path) -> None:
            write(folder)
            torch.save(moments, folder / "optimizer.pt")
            write_json(folder / "state.json", vars(self))

        if is_first():
            replace_folder(work / "checkpoint", whole)

    @classmethod
    def resume(cls, read: Weights, optimizer: Optimizer, work: Path) -> Self:
        """The last whole checkpoint, weights and optimiser put back; a fresh start when there is none."""
        # A kill between the two renames of `replace_folder` leaves the last checkpoint under its old name.
        folder = next((f for f in (work / "checkpoint", work / "checkpoint.old") if (f / "state.json").exists()), None)
        if folder is None:
            return cls()
        read(folder)
        optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
        return cls(**json.loads((folder / "state.json").read_text(encoding="utf-8")))
