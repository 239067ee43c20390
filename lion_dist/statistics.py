"""Numbers that describe the next step of an optimizer, for whoever watches a run: norms, and what becomes of signs.

Row: what numbers are given for: a parameter group, or a parameter.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .members import Members
from .meshes import Placing, device_without_tensors, groups_to_sum, reduced_over, sum_over_meshes
from .param_groups import Group, names_of
from .update import sums
from .update.backends.batch import Prepared
from .update.hypers import HyperTables, StepHypers
from .update.reference import HyperParameters
from .update.sums import Signs
from .upload import is_capturing

_NORMS = {"param": sums.PARAM, "moment": sums.MOMENT, "update": sums.UPDATE, "grad": sums.GRAD}
_SIGNS = {"zero": sums.ZERO, "agree": sums.AGREE}
ALL = "global"
Groups = Iterable[dist.ProcessGroup]


class Rows(NamedTuple):
    """The rows of a call.

    Attributes:
        names: the name of each.
        of: the row of each parameter, by its id.
    """

    names: list[str]
    of: dict[int, int]

    @staticmethod
    def find(groups: Sequence[Group], params: Sequence[Tensor], by: str) -> Rows:
        """The rows of an optimizer.

        Args:
            groups: its groups.
            params: the parameters that are measured.
            by: see `Lion.statistics`.
        """
        if by == "group":
            given = [group.get("name") for group in groups]
            names = _distinct(given) or [f"group{i}" for i in range(len(groups))]
            return Rows(names, {id(p): i for i, group in enumerate(groups) for p in group["params"]})
        given = [name for group in groups for name in names_of(group) or [""] * len(group["params"])]
        names = _distinct(given) or list(map(str, range(len(given))))
        measured = set(map(id, params))
        everyone = [p for group in groups for p in group["params"]]
        named = [(name, id(p)) for name, p in zip(names, everyone, strict=True) if id(p) in measured]
        return Rows([name for name, _ in named], {i: row for row, (_, i) in enumerate(named)})

    def zeros(self) -> Tensor:
        """Sums of nothing, for each row: float64, shape (rows, sums.COLUMNS), on the CPU."""
        return torch.zeros(len(self.names), sums.COLUMNS, dtype=torch.float64, device="cpu")


def _distinct(names: Sequence[Any]) -> list[str] | None:
    """The names, if all are strings, not empty, and no two are the same, nor one that of all rows."""
    fit = all(isinstance(name, str) and name for name in names) and len({ALL, *names}) == len(names) + 1
    return list(names) if fit else None


class KeptSigns:
    """The signs of the last call of ``statistics(flips=True)``: 2 bits for each element that was measured."""

    def __init__(self) -> None:
        self._params: list[Tensor] = []
        self._signs: Signs = {}

    def add_up(
        self,
        measured: Sequence[tuple[Sequence[Tensor], Prepared]],
        groups: Sequence[Group],
        hypers: list[HyperParameters],
        scale: Tensor | None,
        rows: Rows,
        flips: bool,
    ) -> dict[Placing, Tensor]:
        """Adds up over what this rank holds, and keeps the signs if ``flips``; else none are kept from now on.

        Args:
            measured: parameters, as the optimizer was given them, and their prepared step.
            groups, hypers: those of the optimizer.
            scale: float32, shape (), multiplied into every gradient; None is 1.
            rows: the rows.
            flips: see `Lion.statistics`.

        Returns:
            For each placing the sums of each row: float64, shape (rows, sums.COLUMNS), on the CPU. The host waits.
        """
        params = [p for group in groups for p in group["params"]]
        same = len(params) == len(self._params) and all(p is q for p, q in zip(params, self._params, strict=True))
        last, kept = self._signs if same and flips else {}, Signs()
        numbers = {id(p): i for i, p in enumerate(params)}
        step_hypers = StepHypers(HyperTables(), hypers, scale)
        found: list[tuple[list[Tensor], Tensor]] = []
        for of_params, prepared in measured:
            tensors = replace(prepared.tensors, numbers=[numbers[id(p)] for p in of_params])
            numbered = replace(prepared, tensors=tensors)
            for batch in prepared.batches:
                entries, of_runs = batch.add_up(numbered, step_hypers, last, kept if flips else None)
                found.append(([of_params[entry] for entry in entries], of_runs))
        total = {Placing.of(p): rows.zeros() for of_params, _ in measured for p in of_params}
        for of_params, of_runs in found:
            on_cpu, placings = of_runs.cpu(), [Placing.of(p) for p in of_params]
            for placing in set(placings):
                runs = [i for i, own in enumerate(placings) if own == placing]
                index = torch.tensor([rows.of[id(of_params[i])] for i in runs], dtype=torch.int64, device="cpu")
                total[placing].index_add_(0, index, on_cpu[runs])
        self._params, self._signs = (params, kept) if flips else ([], {})
        return total


def check_arguments(by: str, flips: bool) -> None:
    """Raises ValueError, TypeError or RuntimeError where statistics() cannot be called so."""
    if is_capturing():
        raise RuntimeError(
            "statistics() cannot be captured in a CUDA graph, since the host reads its numbers: call it between replays"
        )
    if by not in ("group", "parameter"):
        raise ValueError(f'by must be "group" or "parameter", got {by!r}')
    if not isinstance(flips, bool):
        raise TypeError(f"flips must be True or False, got {type(flips).__name__} {flips!r}")


def name_numbers(names: Sequence[str], of_rows: Tensor) -> dict[str, float]:
    """The numbers of a call; see `Lion.statistics`.

    Args:
        names: the names of the rows.
        of_rows: their sums over all ranks, shape (rows, sums.COLUMNS).
    """
    found = {}
    of_all = of_rows.sum(0).tolist()
    for name, row in [(ALL, of_all), *zip(names, of_rows.tolist(), strict=True)]:
        for what, column in _NORMS.items():
            found[f"l2_norm/{what}/{name}"] = math.sqrt(row[column])
        for what, column in _SIGNS.items():
            found[f"sign/{what}/{name}"] = row[column] / max(row[sums.ELEMENTS], 1.0)
        if row[sums.COMPARED]:
            found[f"sign/flipped/{name}"] = row[sums.FLIPPED] / row[sums.COMPARED]
    return found


def check_same_names(names: Sequence[str], process_groups: Sequence[dist.ProcessGroup], device: torch.device) -> None:
    """Compares the names of rows over the ranks of process groups; a collective call for them.

    Raises:
        ValueError: on every rank, where they differ.
    """
    if not process_groups:
        return
    number = zlib.crc32("\n".join(names).encode())
    largest = torch.tensor([number, -number], dtype=torch.int64, device=device)
    largest = reduced_over(process_groups, largest, dist.ReduceOp.MAX)
    if largest[0] != -largest[1]:
        raise ValueError(
            f"the ranks of process_groups give numbers for different names, here {list(names)[:5]}: they must be the "
            'same. Stages of a pipeline have other parameters: use by="group", with the same groups on every rank'
        )


def local_statistics(
    members: Members,
    prepared: Prepared,
    groups: Sequence[Group],
    hypers: list[HyperParameters],
    kept: KeptSigns,
    by: str,
    flips: bool,
    process_groups: Groups,
) -> dict[str, float]:
    """Measures what the next step of a Lion would do; a collective call of its meshes and of ``process_groups``.

    Args:
        members, prepared: of the step.
        groups, hypers: those of the optimizer.
        kept: the signs of its last call.
        by, flips, process_groups: see `Lion.statistics`.
    """
    params = members.params
    rows = Rows.find(groups, params, by)
    process_groups = groups_to_sum(process_groups, map(Placing.of, params))
    of_placings = {Placing(): rows.zeros(), **kept.add_up([(params, prepared)], groups, hypers, None, rows, flips)}
    device = next((p.device for p in prepared.tensors.params), None) or device_without_tensors(process_groups)
    check_same_names(rows.names, process_groups, device)
    total = sum_over_meshes((placing, own.to(device)) for placing, own in of_placings.items())
    total = reduced_over(process_groups, total)
    return name_numbers(rows.names, total.cpu())
