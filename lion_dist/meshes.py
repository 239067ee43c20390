"""Parameters that are sharded over a mesh already, and that a ShardedLion shards further over another process group.

FSDP2 inside a node with replicas on other nodes is the usual case, tensor parallelism with data parallelism another.
ShardedLion treats the local tensor of such a DTensor as a parameter, of which the ranks of the process group hold
replicas. They do if the group is *orthogonal* to the mesh: none of its other ranks is in the mesh,
or only along dimensions over which the parameter is replicated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ._torch_compat_distributed import dtensor_offset
from .dtensors import is_dtensor, local, placed_like
from .frozen import is_freed, takes_part
from .sharding.box_tensor import BoxTensor
from .sharding.boxes import Box
from .sharding.collectives import all_reduced, device_types


class Placing(NamedTuple):
    """The mesh over which a parameter is sharded.

    Attributes:
        mesh: its DeviceMesh; None for a plain tensor.
        replicated: for each dimension of the mesh, whether the parameter is replicated over it.
    """

    mesh: Any = None
    replicated: tuple[bool, ...] = ()

    @staticmethod
    def of(p: Any) -> Placing:
        """How a parameter is placed."""
        if not is_dtensor(p):
            return Placing()
        return Placing(p.device_mesh, tuple(placement.is_replicate() for placement in p.placements))

    @property
    def counts_here(self) -> bool:
        """Whether this rank counts what it holds, where each element counts once: of replicas, the first counts."""
        if self.mesh is None:
            return True
        return not any(r and at for r, at in zip(self.replicated, self.mesh.get_coordinate(), strict=True))

    def is_part_of(self, widest: dist.ProcessGroup, group: dist.ProcessGroup) -> bool:
        """Whether ranks of a wider process group hold other parameters than those that are placed so.

        Args:
            widest: the wider group.
            group: the ranks that hold replicas of what this rank holds. ``widest`` includes them.

        Raises:
            ValueError: that is so, and ranks of ``widest`` are in the mesh too.
        """
        if widest is group:
            return False
        replicas, all_ranks = dist.get_process_group_ranks(group), set(dist.get_process_group_ranks(widest))
        in_mesh = {dist.get_rank()} if self.mesh is None else set(self.mesh.mesh.flatten().tolist())
        parts = len(in_mesh & all_ranks) // len(in_mesh.intersection(replicas))  # of the mesh, on ranks of widest
        if parts * len(replicas) == len(all_ranks):
            return False
        if parts == 1:
            return True
        raise ValueError(
            f"of ranks {sorted(all_ranks)}, the process group of one optimizer, some are in the mesh of DTensors of "
            f"another one (ranks {sorted(in_mesh)}; its process group has ranks {replicas}), and others hold other "
            "parameters: expected all of these ranks to hold parts of the DTensors, or only replicas"
        )

    @property
    def is_elsewhere(self) -> bool:
        """Whether this rank is not the first of the mesh."""
        return self.mesh is not None and any(self.mesh.get_coordinate())


def local_box(p: Any) -> Box:
    """The box of the whole parameter that this rank holds."""
    offsets = dtensor_offset(p) if is_dtensor(p) else (0,) * p.dim()
    return Box(offsets, tuple(local(p).shape))


def own_part(t: Any, p: Any) -> Any:
    """Cuts a whole tensor as a DTensor of its shape is cut. Nothing is communicated.

    Args:
        t: a plain tensor of the shape of p; anything else is returned as it is.
        p: the DTensor.

    Returns:
        A DTensor placed as p, on its device; ``t`` itself where it cannot be read, or p is `misplaced`.
    """
    if not isinstance(t, Tensor) or type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__ or t.shape != p.shape:
        return t
    if t.layout != torch.strided or t.is_meta or is_freed(t) or misplaced(p):
        return t
    return placed_like(t[local_box(p).slices()].contiguous(), p)


def mesh_groups(params: Iterable[Any], group: dist.ProcessGroup | None = None) -> list[dist.ProcessGroup]:
    """The process groups of this rank in the meshes of DTensors, one for each dimension of more than one rank.

    Args:
        params: the parameters.
        group: process groups that have other ranks of this one are left out.
    """
    meshes = {p.device_mesh: None for p in params if is_dtensor(p) and p.device_mesh.get_coordinate() is not None}
    found = [mesh.get_group(d) for mesh in meshes for d in range(mesh.ndim) if mesh.size(d) > 1]
    own = set() if group is None else set(dist.get_process_group_ranks(group)) - {dist.get_rank()}
    return [other for other in found if own.isdisjoint(dist.get_process_group_ranks(other))]


def of_same_boxes(whole: Tensor, part: Tensor) -> Tensor:
    """A part of what this rank holds of a tensor, if another tensor of the same shape is a BoxTensor.

    Returns:
        A view of ``whole``, with the boxes of ``part``.
    """
    if not isinstance(part, BoxTensor) or isinstance(whole, BoxTensor):
        return whole
    held, origin = local(whole), local_box(whole).offsets
    parts = [held[box.slices(origin)] for box in part.boxes]
    return BoxTensor(part.shape, part.boxes, parts, whole.dtype, held.device)


def describe_part(p: Any) -> str:
    """Describes this rank's part of a DTensor, for a line that must be the same on all ranks; "" for a plain tensor."""
    if not is_dtensor(p):
        return ""
    box = local_box(p)
    return f", of which this rank holds shape {box.sizes}, strides {local(p).stride()}, from index {box.offsets} on"


def check_orthogonal(params: Sequence[Any], group: dist.ProcessGroup, averaged: bool) -> None:
    """Checks that the ranks of a process group hold replicas of what this rank holds of each parameter.

    Args:
        params: the parameters. Those that do not take part may be anything.
        group: the process group.
        averaged: whether something else averages the gradients over the group, so that parameters may be replicated
            over a dimension of their mesh that holds the group's ranks.

    Raises:
        ValueError: other ranks of the group are in the mesh of a parameter, or this rank is not; FSDP2 offloads it to
            the CPU; or torch does not know which part of it this rank holds.
    """
    ranks, rank = set(dist.get_process_group_ranks(group)), dist.get_rank()
    known: dict[Placing, str] = {}
    for i, p in enumerate(params):
        placing = Placing.of(p) if takes_part(p) else Placing()
        if placing.mesh is not None and placing.mesh.get_coordinate() is None:
            raise ValueError(
                f"parameter {i} of the group, shape {tuple(p.shape)}, is a DTensor on a mesh of ranks "
                f"{placing.mesh.mesh.flatten().tolist()}, which rank {rank} is not in: give each rank the parameters "
                "of which it holds a part"
            )
        if placing.mesh is not None and (reason := misplaced(p)):
            raise ValueError(f"parameter {i} of the group, shape {tuple(p.shape)}, {reason}")
        if placing not in known:
            known[placing] = _overlap(placing, ranks, rank, averaged)
        part = local(p)
        if placing.mesh is not None and part.device.type != placing.mesh.device_type:
            raise ValueError(
                f"parameter {i} of the group is on {part.device} and its mesh is one of {placing.mesh.device_type} "
                "devices (FSDP2's CPUOffloadPolicy?): ShardedLion does not offload; use lion_dist.Lion, which does"
            )
        if known[placing]:
            raise ValueError(f"parameter {i} of the group, shape {tuple(p.shape)}, {known[placing]}")


def misplaced(p: Any) -> str:
    """Why torch is wrong about which part of a DTensor this rank holds; "" if it is right.

    torch 2.13 is wrong on some ranks where FSDP2 over tensor parallelism shards one dimension twice and unevenly. No
    checkpoint could be saved then.
    """
    for dim, cuts in uneven_cuts(p).items():
        start, length = 0, p.shape[dim]
        for _, at, size in sorted(cuts, key=lambda cut: cut[0]):
            chunk = -(-length // size)
            start, length = start + min(at * chunk, length), max(0, min(chunk, length - at * chunk))
        found = dtensor_offset(p)[dim]
        if length and found != start:
            return (
                f"is sharded {len(cuts)} times and unevenly along dimension {dim}: this rank holds the part that "
                f"starts at index {start}, and torch takes it for one that starts at {found}, so no checkpoint could "
                "be saved. Pad the dimension, or shard another one (shard_placement_fn of fully_shard)"
            )
    return ""


def uneven_cuts(p: Any) -> dict[int, list[tuple[bool, int, int]]]:
    """The dimensions of a DTensor that several dimensions of its mesh shard, and not into equal parts.

    Returns:
        For each, by dimension of the mesh: whether it shards what another one has sharded, as FSDP2 does over tensor
        parallelism; this rank's coordinate; and the number of ranks.
    """
    sharding: dict[int, list[tuple[bool, int, int]]] = {}
    for placement, at, size in zip(p.placements, p.device_mesh.get_coordinate(), p.device_mesh.shape, strict=True):
        if hasattr(placement, "dim") and size > 1:
            sharding.setdefault(placement.dim, []).append((type(placement).__name__ != "Shard", at, size))
    return {
        dim: cuts
        for dim, cuts in sharding.items()
        if len(cuts) > 1 and p.shape[dim] % math.prod(size for _, _, size in cuts)
    }


def _overlap(placing: Placing, ranks: set[int], rank: int, averaged: bool) -> str:
    """How the other ranks of the group are in the mesh of parameters that are placed so; "" where they may be."""
    mesh = placing.mesh
    if mesh is None:
        return ""
    names = mesh.mesh_dim_names or tuple(f"dimension {d}" for d in range(mesh.ndim))
    here = mesh.get_coordinate()
    wrong = False
    for other in ranks - {rank}:
        where = (mesh.mesh == other).nonzero()
        if len(where):
            moved = [d for d, (a, b) in enumerate(zip(where[0].tolist(), here, strict=True)) if a != b]
            wrong = wrong or not averaged or not all(placing.replicated[d] for d in moved)
    if not wrong:
        return ""
    return (
        f"is a DTensor on the mesh ({', '.join(names)}) of ranks {mesh.mesh.flatten().tolist()}, and process_group has "
        f"ranks {sorted(ranks)}: they must hold replicas of one part of it, and so must be along another dimension of "
        "the mesh than those over which the model is sharded:\n"
        '    fully_shard(model, mesh=mesh["shard"])\n'
        '    optimizer = ShardedLion(model.named_parameters(), process_group=mesh["replicate"].get_group())\n'
        'with mesh = init_device_mesh("cuda", (replicas, shards), mesh_dim_names=("replicate", "shard")). '
        + ("" if averaged else "Stage 2 averages over the replicas itself, so FSDP2 must not. ")
        + "Over a model that is sharded over all ranks, use lion_dist.Lion"
    )


def groups_to_sum(
    groups: Any, placings: Iterable[Placing], own: Iterable[dist.ProcessGroup] = ()
) -> list[dist.ProcessGroup]:
    """Checks that a norm counts the elements on the ranks of further groups, and none of them twice.

    Args:
        groups: the argument ``process_groups``: the groups that the norm is to include.
        placings: the placings of the parameters, over whose meshes it sums.
        own: the optimizers' process groups, over which it sums too.

    Returns:
        The groups.

    Raises:
        TypeError: ``groups`` are no process groups.
        ValueError: this rank is not in one of ``groups``, or one has other ranks of a mesh, of ``own`` or of another.
    """
    if not isinstance(groups, Iterable):
        raise TypeError(f"process_groups must be a list of process groups, got a {type(groups).__name__}: give [group]")
    found = list(groups)
    here = dist.get_rank() if dist.is_initialized() else 0
    counted = {r for mesh in {placing.mesh for placing in placings} if mesh for r in mesh.mesh.flatten().tolist()}
    counted = counted.union(*map(dist.get_process_group_ranks, own)) - {here}
    given: set[int] = set()
    for group in found:
        if group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("this rank is not in one of process_groups: give each rank the groups that it is in")
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"process_groups must be a list of process groups, got a {type(group).__name__} in it: of a mesh, give "
                "mesh.get_group()"
            )
        ranks = set(dist.get_process_group_ranks(group)) - {here}
        if shared := counted & ranks:
            raise ValueError(
                f"process_groups has a group with ranks {sorted(shared)}, which the norm includes by itself: it sums "
                "over a ShardedLion's process group and the meshes of DTensors. Give only groups whose ranks hold "
                "other parameters, such as those of pipeline stages"
            )
        if shared := given & ranks:
            raise ValueError(
                f"two of process_groups have ranks {sorted(shared)}, whose elements would count twice: each other rank "
                "may be in one of them only"
            )
        given |= ranks
    return found


def device_on(mesh: Any, device: torch.device) -> torch.device:
    """The device on which a tensor of ``device`` is communicated over a mesh: ``device`` itself, also if another GPU is
    the current one. A tensor on the CPU is communicated on the current GPU if the mesh is of GPUs."""
    return device if device.type == mesh.device_type else torch.device(mesh.device_type)


def device_without_tensors(groups: Iterable[dist.ProcessGroup]) -> torch.device:
    """The device on which a rank without tensors makes the numbers that it exchanges over these groups: the accelerator
    if one of the groups has a backend for it, since the tensors of the other ranks are probably there, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and any(accelerator.type in device_types(group) for group in groups):
        return accelerator
    return torch.device("cpu")


def reduced_over(
    groups: Iterable[dist.ProcessGroup], own: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> Tensor:
    """Reduces a tensor over one group after another; a collective call for their ranks."""
    for group in groups:
        own = all_reduced(own, group, op)
    return own


def sum_over_meshes(of_placings: Iterable[tuple[Placing, Tensor]]) -> Tensor:
    """The sum over all ranks of all meshes, each element counting once; a collective call for the ranks of the meshes.

    Args:
        of_placings: at least one placing, with the sum over what this rank holds of parameters that are placed so: of
            any shape, the same for all. All ranks of a mesh give the same placings in the same order.

    Returns:
        The sum, in that shape.
    """
    by_mesh: dict[Any, Tensor] = {}
    for placing, own in of_placings:
        counted = own if placing.counts_here else torch.zeros_like(own)
        by_mesh[placing.mesh] = by_mesh[placing.mesh] + counted if placing.mesh in by_mesh else counted
    for mesh, of_mesh in by_mesh.items():
        if mesh is not None:
            # The same on all of its ranks; FSDP2 may keep gradients on the CPU.
            sent = of_mesh.to(device_on(mesh, of_mesh.device))
            by_mesh[mesh] = reduced_over(map(mesh.get_group, range(mesh.ndim)), sent).to(of_mesh.device)
    return torch.stack(list(by_mesh.values())).sum(0)
