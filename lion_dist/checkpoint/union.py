"""The union of what the ranks of a save hold.

Ranks may hold different parts of a model, as pipeline stages do. Names, buffers and groups of the checkpoint are the
union over the ranks. A name stands for one tensor on all ranks that have it.

- A checkpoint holds some things once though several ranks have them, such as buffers: the first of these ranks saves
  them.
- Groups of different ranks that share parameters are one group: they must have the same parameters and values. All
  other groups stay apart, in the order of the ranks. Groups without parameters are taken from the first rank.
- Schedulers are taken from the first rank. Their lists with one value for each group (base_lrs and others) are put
  together in the order of the groups.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .._torch_compat_distributed import dtensor_offset
from ..dtensors import is_dtensor, local
from ..dtypes import dtype_name
from ..sharding.box_tensor import BoxTensor
from .computed import Computed
from .groups import difference
from .schedulers import GroupLists

_SAMPLE = 64  # elements of a tensor that are compared
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size; torch cannot index every dtype
PartKey = tuple[str, tuple[int, ...]]  # key of a tensor, and offsets at which a rank's part of it begins


@dataclass
class RankState:
    """One rank's tensors, groups and values, described. Values are JSON (`json_values.to_json`), because the first rank
    receives them.

    Attributes:
        tensors: shape and dtype of every tensor, by key.
        samples: checksum of a few elements of each part of a tensor.
        once: keys of what one rank saves for all that have it.
        groups: the parameter groups, from `groups.named_groups`.
        schedulers: for each scheduler its `schedulers.group_lists`, by path.
    """

    tensors: dict[str, tuple[tuple[int, ...], str]]
    samples: dict[PartKey, int]
    once: set[str]
    groups: list[dict[str, Any]] = field(default_factory=list)
    schedulers: list[GroupLists] = field(default_factory=list)


@dataclass
class Share:
    """The part of the union that one rank saves, beside its own tensors.

    Attributes:
        once: the keys in `RankState.once` that this rank saves.
        groups, schedulers: those of all ranks together; None on every rank but the first.
    """

    once: set[str]
    groups: list[dict[str, Any]] | None = None
    schedulers: list[GroupLists] | None = None


def describe(tensors: Mapping[str, Tensor | Computed]) -> dict[str, tuple[tuple[int, ...], str]]:
    """`RankState.tensors` for these tensors."""
    return {key: (tuple(t.shape), dtype_name(t.dtype)) for key, t in tensors.items()}


@torch.no_grad()
def samples(tensors: dict[str, Tensor]) -> dict[PartKey, int]:
    """`RankState.samples` for these tensors. The host waits for each GPU once."""
    found: dict[torch.device, list[tuple[PartKey, Tensor]]] = {}
    for key, t in tensors.items():
        offsets, part = _first_part(t)
        if part is None or not part.numel() or type(part) not in (Tensor, Parameter) or part.itemsize not in _INTEGERS:
            continue
        bits = part.detach().view(_INTEGERS[part.itemsize])
        indices = torch.arange(0, bits.numel(), max(1, bits.numel() // _SAMPLE), device=bits.device)
        some = bits[torch.unravel_index(indices, bits.shape)] if bits.dim() else bits.reshape(1)
        found.setdefault(bits.device, []).append(((key, offsets), some.view(torch.uint8)))
    checksums = {}
    for of_device in found.values():
        raw = torch.cat([some for _, some in of_device]).cpu()
        for (part_key, _), some in zip(of_device, raw.split([some.numel() for _, some in of_device]), strict=True):
            checksums[part_key] = zlib.crc32(bytes(some.tolist()))
    return checksums


def _first_part(t: Any) -> tuple[tuple[int, ...], Tensor | None]:
    """The offsets of this rank's first part of a tensor, and the part; None if this rank has nothing of it."""
    if isinstance(t, BoxTensor):
        return (t.boxes[0].offsets, t.parts[0]) if t.boxes else ((), None)
    if is_dtensor(t):
        if t.device_mesh.get_coordinate() is None:
            return (), None
        return dtensor_offset(t), local(t)
    return (0,) * t.dim(), t


def unite(ranks: Sequence[RankState]) -> list[Share]:
    """Divides what the ranks hold among them.

    Returns:
        Each rank's share.

    Raises:
        ValueError: the ranks hold something in ways that no checkpoint can; names it.
    """
    _check_tensors(ranks)
    _check_kinds(ranks)
    _check_samples(ranks)
    taken: set[str] = set()
    shares = []
    for state in ranks:
        shares.append(Share(state.once - taken))
        taken |= state.once
    groups, origins = _unite_groups(ranks)
    shares[0].groups, shares[0].schedulers = groups, _unite_schedulers(ranks, origins)
    return shares


def _check_tensors(ranks: Sequence[RankState]) -> None:
    """Checks that a name has one shape and dtype on all ranks."""
    first: dict[str, tuple[int, Any]] = {}
    for rank, state in enumerate(ranks):
        for key, value in state.tensors.items():
            there, other = first.setdefault(key, (rank, value))
            if other != value:
                raise ValueError(
                    f"{key} has shape and dtype {other} on rank {there} and {value} on rank {rank}. A name stands for "
                    "one tensor on all ranks: give the parts of the model that the ranks hold the names that they have "
                    "in the whole model"
                )


def _check_kinds(ranks: Sequence[RankState]) -> None:
    """Checks that nothing is a part of a tensor on one rank and a value that is saved once on another."""
    sharded: dict[str, int] = {}
    for rank, state in enumerate(ranks):
        for key in state.tensors.keys() - state.once:
            sharded.setdefault(key, rank)
    for rank, state in enumerate(ranks):
        for key in sorted(state.once & sharded.keys()):
            raise ValueError(
                f"{key} is a part of a sharded tensor on rank {sharded[key]}, by its shape, and a small value on rank "
                f"{rank}: keep a counter as a number or a tensor without dimensions, and keep what is sharded like the "
                "parameter in a tensor of the parameter's type (torch.zeros_like(p))"
            )


def _check_samples(ranks: Sequence[RankState]) -> None:
    """Checks that ranks that hold the same part of a tensor hold the same values, by a sample."""
    first: dict[Any, tuple[int, int]] = {}
    for rank, state in enumerate(ranks):
        for part_key, checksum in state.samples.items():
            there, other = first.setdefault(part_key, (rank, checksum))
            if other != checksum:
                raise ValueError(
                    f"{part_key[0]} has other values on rank {rank} than on rank {there}. A name stands for one tensor "
                    "on all ranks. If the ranks hold different parts of a model, such as pipeline stages, give these "
                    "the names that they have in the whole model. If the ranks hold replicas, these differ: make them "
                    "equal (ShardedLion.resync()), or save one by itself (process_group of one rank)"
                )


def _unite_groups(ranks: Sequence[RankState]) -> tuple[list[dict[str, Any]], list[tuple[int, int]]]:
    """The groups of all ranks, and for each its origin: a rank, and the group's index there."""
    groups: list[dict[str, Any]] = []
    origins: list[tuple[int, int]] = []
    place: dict[str, int] = {}  # index in `groups`, by parameter
    for rank, state in enumerate(ranks):
        for i, group in enumerate(state.groups):
            params = group["params"]
            there = {place.get(name) for name in params}
            if there == {None} or (not params and rank == 0):
                place.update((name, len(groups)) for name in params)
                groups.append(group)
                origins.append((rank, i))
            elif params:
                (j,) = there if len(there) == 1 else (None,)
                known = None if j is None else groups[j]
                if known is None or set(known["params"]) != set(params):
                    name = next(name for name in params if name in place)
                    raise ValueError(
                        f"the parameter group {i} of rank {rank} and a group of rank {origins[place[name]][0]} both "
                        f"hold {name}, but not the same parameters: make the same groups on all ranks that hold it"
                    )
                key = difference(known, group)
                if key:
                    raise ValueError(
                        f"{key!r} of the parameter group with {params[0]} is {known.get(key)!r} on rank "
                        f"{origins[place[params[0]]][0]} and {group.get(key)!r} on rank {rank}; it must be the same"
                    )
    return groups, origins


def _unite_schedulers(ranks: Sequence[RankState], origins: Sequence[tuple[int, int]]) -> list[GroupLists]:
    """For each scheduler its lists with one value for each of the groups of all ranks."""
    counts = [len(state.schedulers) for state in ranks]
    if len(set(counts)) > 1:
        raise ValueError(f"the ranks have {counts} schedulers; give the same number on every rank")
    united = []
    for number, lists in enumerate(ranks[0].schedulers):
        of_all: GroupLists = {}
        for path in lists:
            of_all[path] = []
            for rank, i in origins:
                values = ranks[rank].schedulers[number].get(path)
                if values is None:
                    raise ValueError(
                        f"scheduler {number} keeps {'.'.join(map(str, path))} for each parameter group on rank 0, but "
                        f"not on rank {rank}: make the same schedulers on every rank"
                    )
                of_all[path].append(values[i])
        united.append(of_all)
    return united
