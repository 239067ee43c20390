"""What the ranks of a save hold together.

Ranks may hold different parts of a model, as the stages of a pipeline do: names, buffers and groups are the union over
the ranks. A name is one tensor on all the ranks that have it. The rules:

- What several ranks have and a checkpoint has once, such as buffers, is the first rank's that has it.
- Groups of different ranks that share parameters are one group: they must have the same parameters and values. All
  other groups stay apart, in the order of the ranks. Groups without parameters are those of the first rank.
- Schedulers are the first rank's. What they keep for each group (base_lrs and the like) is put together as the groups.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .._torch_compat import LAST_LR
from .._torch_compat_distributed import dtensor_offset
from ..fsdp import is_dtensor, local
from ..sharding.box_tensor import BoxTensor
from .named import difference
from .plain import dtype_name

Place = tuple[Any, ...]  # in a state: the keys and indices that lead there
# What torch's schedulers keep as a list with a value for each parameter group.
_BY_GROUP = frozenset({"base_lrs", LAST_LR, "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums"})
_SAMPLE = 64  # elements
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size, since not all dtypes are indexed


@dataclass
class RankState:
    """What one rank would save. Values are plain (`plain.to_plain`), since they are sent to the first rank.

    Attributes:
        tensors: shape and dtype of every tensor, by key.
        samples: checksums of a few elements of parts of tensors, by key and where the part begins.
        once: keys of what is saved as the first rank has it.
        groups: of `named.groups_by_name`.
        schedulers: of each, what it keeps for each group: see `by_group`.
    """

    tensors: dict[str, tuple[tuple[int, ...], str]]
    samples: dict[tuple[str, tuple[int, ...]], int]
    once: set[str]
    groups: list[dict[str, Any]] = field(default_factory=list)
    schedulers: list[dict[Place, list[Any]]] = field(default_factory=list)


@dataclass
class Share:
    """What one rank is to save of it.

    Attributes:
        once: keys, of those that it has.
        groups, schedulers: of all ranks; None on other ranks than the first.
    """

    once: set[str]
    groups: list[dict[str, Any]] | None = None
    schedulers: list[dict[Place, list[Any]]] | None = None


def describe(tensors: dict[str, Tensor]) -> dict[str, tuple[tuple[int, ...], str]]:
    """`RankState.tensors`."""
    return {key: (tuple(t.shape), dtype_name(t.dtype)) for key, t in tensors.items()}


@torch.no_grad()
def samples(tensors: dict[str, Tensor]) -> dict[tuple[str, tuple[int, ...]], int]:
    """`RankState.samples`. Of tensors on a GPU one copy is waited for."""
    found: dict[torch.device, list[tuple[tuple[str, tuple[int, ...]], Tensor]]] = {}
    for key, t in tensors.items():
        begin, part = _first_part(t)
        if part is None or not part.numel() or type(part) not in (Tensor, Parameter) or part.itemsize not in _BITS:
            continue
        bits = part.detach().view(_BITS[part.itemsize])
        numbers = torch.arange(0, bits.numel(), max(1, bits.numel() // _SAMPLE), device=bits.device)
        some = bits[torch.unravel_index(numbers, bits.shape)] if bits.dim() else bits.reshape(1)
        found.setdefault(bits.device, []).append(((key, begin), some.view(torch.uint8)))
    sums = {}
    for of_device in found.values():
        raw = torch.cat([some for _, some in of_device]).cpu()
        for (place, _), some in zip(of_device, raw.split([some.numel() for _, some in of_device]), strict=True):
            sums[place] = zlib.crc32(bytes(some.tolist()))
    return sums


def _first_part(t: Any) -> tuple[tuple[int, ...], Tensor | None]:
    if isinstance(t, BoxTensor):
        return (t.boxes[0].offsets, t.parts[0]) if t.boxes else ((), None)
    if is_dtensor(t):
        if t.device_mesh.get_coordinate() is None:
            return (), None
        return dtensor_offset(t), local(t)
    return (0,) * t.dim(), t


def by_group(state: Any, count: int, path: Place = ()) -> Iterator[tuple[Place, list[Any]]]:
    """The lists of a scheduler's state that have a value for each of ``count`` groups, and where they stand in it."""
    if type(state) is dict:
        for key, value in state.items():
            if key in _BY_GROUP and isinstance(value, list) and len(value) == count:
                yield (*path, key), value
            else:
                yield from by_group(value, count, (*path, key))
    elif isinstance(state, (list, tuple)) and any(type(value) is dict for value in state):
        for i, value in enumerate(state):
            yield from by_group(value, count, (*path, i))


def with_lists(state: Any, lists: dict[Place, list[Any]], path: Place = ()) -> Any:
    """A scheduler's state with other lists in these places."""
    if path in lists:
        return lists[path]
    if not any(place[: len(path)] == path for place in lists):
        return state
    if type(state) is dict:
        return {key: with_lists(value, lists, (*path, key)) for key, value in state.items()}
    return type(state)(with_lists(value, lists, (*path, i)) for i, value in enumerate(state))


def unite(ranks: Sequence[RankState]) -> list[Share]:
    """Each rank's share.

    Raises:
        ValueError: naming what the ranks hold in ways that no checkpoint can.
    """
    _check_same([held.tensors for held in ranks], "shape and dtype")
    _check_kinds(ranks)
    _check_samples(ranks)
    taken: set[str] = set()
    shares = []
    for held in ranks:
        shares.append(Share(held.once - taken))
        taken |= held.once
    groups, origins = _unite_groups(ranks)
    shares[0].groups, shares[0].schedulers = groups, _unite_schedulers(ranks, origins)
    return shares


def _check_same(ranks: Sequence[dict[str, Any]], what: str) -> None:
    first: dict[str, tuple[int, Any]] = {}
    for rank, tensors in enumerate(ranks):
        for key, value in tensors.items():
            there, other = first.setdefault(key, (rank, value))
            if other != value:
                raise ValueError(
                    f"{key} has {what} {other} on rank {there} and {value} on rank {rank}. A name is one tensor on all "
                    "ranks: give the parts of the model that the ranks hold the names that they have in the whole model"
                )


def _check_kinds(ranks: Sequence[RankState]) -> None:
    """That nothing is sharded on one rank and saved once, as another has it."""
    sharded: dict[str, int] = {}
    for rank, held in enumerate(ranks):
        for key in held.tensors.keys() - held.once:
            sharded.setdefault(key, rank)
    for rank, held in enumerate(ranks):
        for key in sorted(held.once & sharded.keys()):
            raise ValueError(
                f"{key} is a part of a sharded tensor on rank {sharded[key]}, by its shape, and a small value on rank "
                f"{rank}: keep a counter as a number or a tensor without dimensions, and what is sharded as the "
                "parameter is in the parameter's own kind (torch.zeros_like(p))"
            )


def _check_samples(ranks: Sequence[RankState]) -> None:
    first: dict[Any, tuple[int, int]] = {}
    for rank, held in enumerate(ranks):
        for place, total in held.samples.items():
            there, other = first.setdefault(place, (rank, total))
            if other != total:
                raise ValueError(
                    f"{place[0]} has other values on rank {rank} than on rank {there}. A name is one tensor on all "
                    "ranks. If the ranks hold different parts of a model, such as stages of a pipeline, give these the "
                    "names that they have in the whole model; if they hold replicas, these have gone apart: make them "
                    "equal (ShardedLion.resync()), or save one by itself (process_group of one rank)"
                )


def _unite_groups(ranks: Sequence[RankState]) -> tuple[list[dict[str, Any]], list[tuple[int, int]]]:
    """The groups, and of each a rank and its number there."""
    groups: list[dict[str, Any]] = []
    origins: list[tuple[int, int]] = []
    place: dict[str, int] = {}  # of a parameter
    for rank, held in enumerate(ranks):
        for i, group in enumerate(held.groups):
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


def _unite_schedulers(ranks: Sequence[RankState], origins: Sequence[tuple[int, int]]) -> list[dict[Place, list[Any]]]:
    counts = [len(held.schedulers) for held in ranks]
    if len(set(counts)) > 1:
        raise ValueError(f"the ranks have {counts} schedulers; give as many on every rank")
    united = []
    for number, lists in enumerate(ranks[0].schedulers):
        together: dict[Place, list[Any]] = {}
        for path in lists:
            together[path] = []
            for rank, i in origins:
                theirs = ranks[rank].schedulers[number].get(path)
                if theirs is None:
                    raise ValueError(
                        f"scheduler {number} keeps {'.'.join(map(str, path))} for each parameter group on rank 0, but "
                        f"not on rank {rank}: make the same schedulers on every rank"
                    )
                together[path].append(theirs[i])
        united.append(together)
    return united
