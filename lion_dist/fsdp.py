"""What FSDP and tensor parallelism need beyond the segment table.

DTensor: a parameter of FSDP2 or tensor parallelism. This rank holds its *local* tensor, a plain one, perhaps empty;
    that is what Lion steps. The momentum is a DTensor in the same sharding, because torch's state dicts, full and
    sharded, read from it whose part of what it is.
Flat parameter: FSDP1 lays the parameters of a wrapped module one after another, with gaps of a few elements, and
    shards that. What is left of a parameter on this rank is a plain view of the shard, perhaps empty. Momenta of
    neighbours are views of one buffer, laid out as the shard is: one allocation, and offsets that agree with those of
    the gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from ._torch_compat import FSDP_FLATTENED, LOCAL_TENSOR, SPEC, is_traceable_wrapper_subclass
from ._torch_compat_distributed import drop_gathered_flat_param
from .frozen import takes_part
from .memory_order import is_dense

# FSDP1 aligns each parameter to 16 bytes of the dtype it computes in.
LARGEST_GAP = 7  # elements


def is_dtensor(t: Tensor) -> bool:
    if not is_traceable_wrapper_subclass(t):
        return False
    from torch.distributed.tensor import DTensor  # half a second to import, but there is a DTensor only if it has been

    return isinstance(t, DTensor)


def local(t: Any) -> Any:
    """The local tensor of a DTensor; anything else as it is. (`to_local` costs 20 us, for autograd's sake.)"""
    return getattr(t, LOCAL_TENSOR, t)


# Through C loops, since they run over every tensor of every step; a model of DTensors alone is the rule.
_LOCAL, _SPEC = attrgetter(LOCAL_TENSOR), attrgetter(SPEC)


def locals_of(tensors: Sequence[Any]) -> list[Any]:
    """`local` of each."""
    try:
        return list(map(_LOCAL, tensors))
    except AttributeError:  # some are plain, or None
        return list(map(local, tensors))


def local_gradients(params: Sequence[Any], grads: Sequence[Any]) -> list[Any]:
    """This rank's part of each gradient that is not None, sharded as its parameter is.

    Tensor parallelism may leave a gradient otherwise, for one as sums to be added up (of a norm's gains under sequence
    parallelism). It is brought into its parameter's placements by a collective, on every rank alike, as DTensor does
    in the steps of torch's optimizers and FSDP2 in its own backward.
    """
    try:
        # FSDP2 gives both one spec, so as a rule nothing more than that is looked at.
        alike = all(map(is_, map(_SPEC, params), map(_SPEC, grads)))
    except AttributeError:
        alike = False
    parts = list(map(_LOCAL, grads)) if alike else list(map(_local_gradient, params, grads))
    if set(map(type, parts)) <= _PLAIN:
        return parts
    # Those that a collective is still to deliver.
    return [part.wait() if hasattr(part, "wait") else part for part in parts]


_PLAIN = {Tensor, type(None)}


def _local_gradient(p: Any, g: Any) -> Any:
    if g is None:
        return None
    wanted, got = getattr(p, SPEC, None), getattr(g, SPEC, None)
    if wanted is got:
        return local(g)
    if wanted is None or got is None:
        raise TypeError(
            f"a {type(g).__name__} is the gradient of a {type(p).__name__} (shape {tuple(p.shape)}); expected both "
            "to be DTensors, or neither: was the model sharded after its backward?"
        )
    if wanted.placements != got.placements or wanted.mesh != got.mesh:
        g = g.redistribute(wanted.mesh, wanted.placements)
    return local(g)


def new_momenta(params: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Zeros in each parameter's shape, memory order, sharding and device.

    Raises:
        ValueError: FSDP1 manages parameters of one dtype whose momenta were to have several. A flat parameter may hold
            some of each; torch gathers its state in one dtype, and would fail on some ranks, at the first save. Which
            parameters share one is not known everywhere, so all ranks judge by all of them.
    """
    of_flat: dict[torch.dtype, torch.dtype] = {}
    for p, dtype in zip(params, dtypes, strict=True):
        if is_flat_view(p) and of_flat.setdefault(p.dtype, dtype) != dtype:
            raise ValueError(
                f"momentum_dtype is {of_flat[p.dtype]} in one group and {dtype} in another; FSDP1 saves the state of "
                "parameters that lie together in one dtype: give all groups the same momentum_dtype, or use FSDP2"
            )
    momenta: dict[int, Tensor] = {}
    for run in _flat_runs(params, dtypes):
        first, last = params[run[0]], params[run[-1]]
        start, size = first.storage_offset(), last.storage_offset() + last.numel() - first.storage_offset()
        buffer = torch.zeros(size, dtype=dtypes[run[0]], device=first.device)
        for i in run:
            p = params[i]
            momenta[i] = buffer.as_strided(p.shape, p.stride(), p.storage_offset() - start)
    return [momenta[i] if i in momenta else _zeros_like(p, dtypes[i]) for i, p in enumerate(params)]


def _zeros_like(p: Tensor, dtype: torch.dtype) -> Tensor:
    # Of a DTensor too, where its part lies: that may be on the CPU though its mesh is one of GPUs (CPUOffloadPolicy).
    return torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)


def _flat_runs(params: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> Iterator[list[int]]:
    """Numbers of parameters that lie next to each other in a flat parameter of FSDP1 and whose momenta share a dtype,
    in the order of their addresses. A frozen one between them, which has no momentum, parts two runs."""
    shards: dict[tuple[Any, ...], list[int]] = {}
    for i, p in enumerate(params):
        if is_flat_view(p) and p.numel() and is_dense(p):
            shards.setdefault((p.untyped_storage().data_ptr(), p.dtype, dtypes[i]), []).append(i)
    for shard in shards.values():
        shard.sort(key=lambda i: params[i].storage_offset())
        run = shard[:1]
        for i in shard[1:]:
            gap = params[i].storage_offset() - params[run[-1]].storage_offset() - params[run[-1]].numel()
            if not 0 <= gap <= LARGEST_GAP:
                yield run
                run = []
            run.append(i)
        yield run


def is_flat_view(p: Tensor) -> bool:
    """Whether FSDP1 manages p: it says so on what it flattens and on what it made of that."""
    return getattr(p, FSDP_FLATTENED, False)


def reshard(model: Any) -> None:
    """Drops the whole parameters that a forward without a backward, as of an evaluation, has left in some modules:
    under FSDP2 they stand where the sharded ones belong, and under FSDP1 the next forward would take them for current
    though the shards had been loaded anew. Nothing is communicated."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    for module in FullyShardedDataParallel.fsdp_modules(model):
        drop_gathered_flat_param(module)


def refuse_sharded(params: Sequence[Tensor]) -> None:
    """Raises TypeError where a parameter that takes part is sharded already."""
    for i, p in enumerate(params):
        if takes_part(p) and (is_dtensor(p) or is_flat_view(p)):
            kind = "a DTensor (FSDP2, tensor parallelism)" if is_dtensor(p) else "part of a flat parameter of FSDP1"
            raise TypeError(
                f"parameter {i} of the group (shape {tuple(p.shape)}) is {kind}: its model is sharded already, and "
                "ShardedLion shards replicated parameters. Use lion_dist.Lion(model.parameters(), ...) over this "
                "model: it steps each rank's part in place, and its momentum is sharded as the parameters are"
            )


def misfit(m: Any, p: Any) -> str:
    """Why m, of a state_dict, cannot become the momentum of p; "" where their shardings are no obstacle."""
    through = (
        "FSDP's state goes through torch.distributed.checkpoint.state_dict.set_optimizer_state_dict, or FSDP1's "
        "FSDP.optim_state_dict_to_load, which shard it"
    )
    if is_dtensor(m) != is_dtensor(p):
        return f"is a {type(m).__name__} and the parameter a {type(p).__name__}: {through}"
    if is_dtensor(p) and (m.placements != p.placements or m.device_mesh != p.device_mesh):
        return (
            f"is placed as {m.placements} on {m.device_mesh} and the parameter as {p.placements} on {p.device_mesh}: "
            + through
        )
    if is_flat_view(p) and m.shape != p.shape:
        return f"has shape {tuple(m.shape)} and this rank's part of the parameter {tuple(p.shape)}: {through}"
    return ""
