"""Hyper-parameters as tensors on the devices that the rule runs on.

Hyper-parameter table: float64, shape (groups, HYPER_COLUMNS), one row for each parameter group (reference.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..upload import current_stream_number, is_capturing, upload
from . import reference
from .reference import HYPER_COLUMNS, LR, SEED, HyperParameters


def hyper_table(hypers: Sequence[HyperParameters], device: torch.device) -> Tensor:
    """A new table on ``device``. An lr tensor on a GPU is copied there without a host synchronisation."""
    table = _table_of(list(map(_on_host, hypers)), device)
    _copy_lrs(table, hypers)
    return table


def _on_host(h: HyperParameters) -> HyperParameters:
    """Hyper-parameters whose lr is a number: 0 in place of a tensor on a GPU, for which the host would have to wait."""
    if not isinstance(h.lr, Tensor):
        return h
    return h._replace(lr=0.0 if h.lr.is_cuda else float(h.lr))


def _table_of(numbers: Sequence[HyperParameters], device: torch.device) -> Tensor:
    rows = [
        (h.lr, h.weight_decay, h.beta1, h.beta2, -1.0 if h.maximize else 1.0, float(h.seed)) for h in numbers
    ]  # fmt: skip
    assert all(len(row) == HYPER_COLUMNS for row in rows)
    return upload(rows, torch.float64, device)


def _copy_lrs(table: Tensor, hypers: Sequence[HyperParameters]) -> None:
    """Copies each lr that is a tensor on a GPU into its row, on the device."""
    for i, h in enumerate(hypers):
        if isinstance(h.lr, Tensor) and h.lr.is_cuda:
            table[i, LR].copy_(h.lr.reshape(()), non_blocking=table.is_cuda)


class HyperTables:
    """Tables and scalars, kept between steps for as long as the hyper-parameters are the same numbers.

    A table that has been returned is never written to: a launch may still have to read it.
    """

    def __init__(self) -> None:
        # By device: numbers, their table, and the stream that it was made on. An lr on a GPU counts as 0.
        self._tables: dict[torch.device, tuple[list[HyperParameters], Tensor, int]] = {}
        self._scalars: dict[tuple[torch.device, int], tuple[Tensor, reference.Scalars]] = {}  # with their table
        self._captured: list[Tensor] = []  # [Note: Captured memory] (capture.py)

    def table(self, hypers: list[HyperParameters], device: torch.device) -> Tensor:
        """The table of these hyper-parameters on a device, for launches on the current stream. An lr tensor on a GPU is
        copied there without a host synchronisation."""
        numbers = list(map(_on_host, hypers))
        kept, stream = self._tables.get(device), current_stream_number(device)
        if kept is None or kept[0] != numbers:
            kept = self._tables[device] = numbers, _table_of(numbers, device), stream
        table = kept[1]
        if is_capturing():
            self._captured.append(table)
        elif kept[2] != stream:
            table.record_stream(torch.cuda.current_stream(device))
        if any(isinstance(h.lr, Tensor) and h.lr.is_cuda for h in hypers):
            table = table.clone()
            _copy_lrs(table, hypers)
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
