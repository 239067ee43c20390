"""Hyper-parameters as tensors on the devices that the rule runs on.

Hyper-parameter table: float64, shape (groups, HYPER_COLUMNS), one row for each parameter group (reference.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..upload import upload
from . import reference
from .reference import HYPER_COLUMNS, LR, SEED, HyperParameters


def hyper_table(hypers: Sequence[HyperParameters], device: torch.device) -> Tensor:
    """A new table on ``device``. An lr tensor on a GPU is copied there without a host synchronisation."""
    rows = [
        (
            0.0 if isinstance(h.lr, Tensor) and h.lr.is_cuda else float(h.lr),
            h.weight_decay,
            h.beta1,
            h.beta2,
            -1.0 if h.maximize else 1.0,
            float(h.seed),
        )
        for h in hypers
    ]
    assert all(len(row) == HYPER_COLUMNS for row in rows)
    table = upload(rows, torch.float64, device)
    for i, h in enumerate(hypers):
        if isinstance(h.lr, Tensor) and h.lr.is_cuda:
            table[i, LR].copy_(h.lr.reshape(()), non_blocking=device.type == "cuda")
    return table


class HyperTables:
    """Tables and scalars, kept between steps for as long as the hyper-parameters are the same numbers.

    A table that has been returned is never written to: a launch may still have to read it.
    """

    def __init__(self) -> None:
        self._tables: dict[torch.device, tuple[list[HyperParameters], Tensor]] = {}
        self._scalars: dict[tuple[torch.device, int], tuple[Tensor, reference.Scalars]] = {}  # with their table

    def table(self, hypers: list[HyperParameters], device: torch.device) -> Tensor:
        """The table of these hyper-parameters on a device."""
        kept = self._tables.get(device)
        constant = not any(isinstance(h.lr, Tensor) for h in hypers)  # an lr tensor is filled in place
        if constant and kept is not None and kept[0] == hypers:
            return kept[1]
        table = hyper_table(hypers, device)
        if constant:
            self._tables[device] = (list(hypers), table)
        else:
            self._tables.pop(device, None)
        return table

    def scalars(self, table: Tensor, group: int) -> reference.Scalars:
        """The scalars of one row of a table that `table` returned."""
        at = table.device, group
        kept = self._scalars.get(at)
        if kept is None or kept[0] is not table:
            kept = self._scalars[at] = table, reference.scalars(table[group])
        return kept[1]


class StepHypers:
    """The hyper-parameters of one step, on whichever device a backend needs them.

    Args:
        tables: where tables and scalars are kept between steps.
        hypers: one for each parameter group.
        grad_scale: float32, shape (), multiplied into every gradient; None is 1.
    """

    def __init__(self, tables: HyperTables, hypers: list[HyperParameters], grad_scale: Tensor | None) -> None:
        self._kept = tables
        self._hypers = hypers
        self._grad_scale = grad_scale
        self._tables: dict[torch.device, Tensor] = {}
        self._scalars: dict[tuple[torch.device, int], reference.Scalars] = {}

    def table(self, device: torch.device) -> Tensor:
        """The hyper-parameter table on a device."""
        if device not in self._tables:
            self._tables[device] = self._kept.table(self._hypers, device)
        return self._tables[device]

    def grad_scale(self, device: torch.device) -> Tensor | None:
        """The factor of the gradients on a device."""
        if self._grad_scale is None:
            return None
        return self._grad_scale.to(device, non_blocking=device.type == "cuda")  # a CPU reads it at once

    def seed(self, device: torch.device, group: int) -> Tensor:
        """The seed of a parameter group: int64, shape (), on a device."""
        return self.table(device)[group, SEED].long()

    def scalars(self, device: torch.device, group: int) -> reference.Scalars:
        """The rule's scalars of a parameter group on a device."""
        if (device, group) not in self._scalars:
            table, scale = self.table(device), self.grad_scale(device)
            self._scalars[device, group] = (
                self._kept.scalars(table, group) if scale is None else reference.scalars(table[group], scale)
            )
        return self._scalars[device, group]
