"""The interface between the update and its backends: `Prepared` tensors, and the `Batch` protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..hypers import StepHypers
from ..segments import Segment, StepTensors
from ..sums import Key, Signs

SIGNS = "signs"  # name of packed signs as the state of the segments that `Batch.apply_signs` updates


class Mix(NamedTuple):
    """Storage dtypes of the tensors of a batch, and the names of its state columns, in the order of ``state``."""

    param: torch.dtype
    grad: torch.dtype
    state: tuple[torch.dtype, ...]
    columns: tuple[str, ...]

    def place(self, column: str) -> int | None:
        """Index of a state column of this name; None if there is none."""
        return self.columns.index(column) if column in self.columns else None


@dataclass(frozen=True)
class Prepared:
    """The validated tensors of one step, and the batches that step them.

    It keeps the gradients alive, so drop it after the step. It is valid until its `LionUpdate` prepares other tensors.

    Attributes:
        tensors: the tensors that `LionUpdate.prepare` was given.
        grads: for each entry its gradient, with the parameter's strides, or None.
        batches: the batches. Every segment of the step is in one of them.
        complete: whether no gradient is None.
    """

    tensors: StepTensors
    grads: list[Tensor | None]
    batches: Sequence[Batch]
    complete: bool

    def present(self) -> list[Tensor | None]:
        """The gradients of active entries, for backends that cannot read the flags. If the flags are on a GPU the host
        waits for them."""
        active = self.tensors.active
        if active is None:
            return self.grads
        return [g if flag else None for g, flag in zip(self.grads, active.tolist(), strict=False)]


class Batch(Protocol):
    """Segments of one device and one mix of dtypes, and the backend that steps them."""

    def set_gradients(self, addresses: Sequence[int]) -> None:
        """Takes the addresses of the gradients, one for each entry; 0 where there is none. Called when one of them has
        changed."""

    def step(self, prepared: Prepared, hypers: StepHypers) -> None:
        """Writes the new parameters and momenta of all segments with a gradient."""

    def pack_signs(self, prepared: Prepared, hypers: StepHypers, signs: Tensor, checksum: Tensor, salt: int) -> None:
        """Writes the new momenta and their packed signs, and the checksum of the step (see `SignUpdate.pack`)."""

    def apply_signs(self, active: Tensor | None, table: Tensor, agree: Tensor) -> None:
        """Writes the new parameters according to the packed signs, which are the state of the segments.

        Args:
            active: see `StepTensors`.
            table: the hyper-parameter table, on the device of the batch.
            agree: bool, shape (); False leaves every parameter untouched.
        """

    def sum_of_squares(self, prepared: Prepared) -> Tensor | None:
        """The sum of squares of the gradients, float64, shape (), or None where there are none."""

    def add_up(
        self, prepared: Prepared, hypers: StepHypers, last: Mapping[Key, Tensor], kept: Signs | None
    ) -> tuple[list[int], Tensor]:
        """Adds up over each segment what the step would do (sums.py), and writes nothing.

        Args:
            prepared: of the step.
            hypers: of the step.
            last: the signs of an earlier step.
            kept: takes the signs of this step; None: they are neither compared nor kept.

        Returns:
            The entries of the segments, and their sums: float64, shape (segments, sums.COLUMNS), on their device.
        """


def key_of(tensors: StepTensors, segment: Segment) -> Key:
    """The key of a segment's signs."""
    device = tensors.params[segment.entry].device
    return tensors.number(segment.entry), device, segment.param_start, segment.length


def mark_changed(params: Sequence[Tensor]) -> None:
    """Raises the parameters' version counters. Autograd does not see that kernels write to an address, and must fail
    if a graph has saved a weight that has changed since."""
    torch.autograd.graph.increment_version(params)
