"""What the update and its backends say to each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..hypers import StepHypers
from ..segments import StepTensors

SIGNS = "signs"  # name of packed signs as the state of the segments that `Batch.apply_signs` updates


class Mix(NamedTuple):
    """Storage dtypes of the tensors of a batch, and the names of its state columns, in the order of ``state``."""

    param: torch.dtype
    grad: torch.dtype
    state: tuple[torch.dtype, ...]
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Prepared:
    """The tensors of one step, once they are known to be right, and the batches that step them.

    It holds the gradients, so drop it after the step. It is valid until its `LionUpdate` prepares other tensors.

    Attributes:
        tensors: as they were given.
        grads: the gradient of each entry, or None; each laid out as its parameter is.
        batches: each segment of the step is in one of them.
        complete: whether no gradient is None.
    """

    tensors: StepTensors
    grads: list[Tensor | None]
    batches: Sequence[Batch]
    complete: bool

    def present(self) -> list[Tensor | None]:
        """The gradients of active entries, for torch, which reads no flags. The host waits for the flags if they are on
        a GPU; kernels read them there."""
        active = self.tensors.active
        if active is None:
            return self.grads
        return [g if flag else None for g, flag in zip(self.grads, active.tolist(), strict=False)]


class Batch(Protocol):
    """Segments of one device and one mix of dtypes, and the backend that steps them."""

    def set_gradients(self, grads: Sequence[Tensor | None]) -> None:
        """Takes the addresses of the gradients of each entry. Called when one lies elsewhere than in the last step."""

    def step(self, prepared: Prepared, hypers: StepHypers) -> None:
        """Writes the new parameters and momenta of all segments with a gradient."""

    def pack_signs(self, prepared: Prepared, hypers: StepHypers, signs: Tensor, checksum: Tensor, salt: int) -> None:
        """Writes the new momenta and their packed signs, and the checksum of the step (see `SignUpdate.pack`)."""

    def apply_signs(self, active: Tensor | None, table: Tensor, agree: Tensor) -> None:
        """Writes the new parameters by the packed signs, which are the state of the segments.

        Args:
            active: as of `StepTensors`.
            table: the hyper-parameter table, on the device of the batch.
            agree: bool, shape (); False leaves every parameter untouched.
        """

    def sum_of_squares(self, prepared: Prepared) -> Tensor | None:
        """The sum of squares of the gradients, float64, shape (), or None where there are none."""


def mark_changed(params: Sequence[Tensor]) -> None:
    """Tells autograd that parameters have been written. It does not see writes by address, and a graph that has saved a
    weight must not use the changed one."""
    torch.autograd.graph.increment_version(params)
