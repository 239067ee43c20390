"""State of parameters of FSDP and tensor parallelism.

DTensor: a parameter of FSDP2 or tensor parallelism (dtensors.py). Its momentum is a DTensor with the same placements,
    because torch's state dicts, full and sharded, take each shard's placement from it.
Flat parameter: FSDP1 lays the parameters of a wrapped module one after another, with gaps of a few elements, and shards
    the result. A parameter on this rank is a plain view of that shard, and may be empty. The momenta of neighbours are
    views of one buffer, laid out as the shard is: one allocation, and the same offsets as those of the gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ._torch_compat import FSDP_FLATTENED
from ._torch_compat_distributed import drop_gathered_flat_param
from .dtensors import is_dtensor, local
from .frozen import takes_part
from .memory_order import is_dense
from .update.state import StateColumn

# Elements. FSDP1 aligns each parameter to 16 bytes in the dtype that it computes in.
LARGEST_GAP = 7


def new_state(params: Sequence[Tensor], columns: Sequence[StateColumn]) -> list[Tensor]:
    """Makes zeros on each parameter's device: in its shape, memory order and sharding, or, where elements of the
    parameter share one of the state, 1-D for this rank's part.

    Args:
        params: the parameters.
        columns: the column of the new tensor for each parameter, all of one name.

    Returns:
        The new tensors.

    Raises:
        ValueError: parameters of one dtype that FSDP1 manages were to have state of several dtypes. A flat parameter
            may hold some of each; torch gathers its state in one dtype, and would fail on some ranks, at the first
            save. A rank does not know which parameters share a flat parameter, so every rank compares all of them.
    """
    of_flat: dict[torch.dtype, torch.dtype] = {}
    dtypes = [column.dtype for column in columns]
    for p, column in zip(params, columns, strict=True):
        dtype = column.dtype
        if is_flat_view(p) and of_flat.setdefault(p.dtype, dtype) != dtype:
            raise ValueError(
                f"momentum_dtype is {of_flat[p.dtype]} in one group and {dtype} in another; FSDP1 saves the state of "
                "parameters that lie together in one dtype: give all groups the same momentum_dtype, or use FSDP2"
            )
    made: dict[int, Tensor] = {}
    with_blocks = {i for i, column in enumerate(columns) if column.block > 1}
    for run in _flat_runs([] if with_blocks else params, dtypes):
        first, last = params[run[0]], params[run[-1]]
        start, size = first.storage_offset(), last.storage_offset() + last.numel() - first.storage_offset()
        buffer = torch.zeros(size, dtype=dtypes[run[0]], device=first.device)
        for i in run:
            p = params[i]
            made[i] = buffer.as_strided(p.shape, p.stride(), p.storage_offset() - start)
    return [made[i] if i in made else _zeros(p, columns[i]) for i, p in enumerate(params)]


def _zeros(p: Tensor, column: StateColumn) -> Tensor:
    if column.block > 1:
        # A plain tensor: blocks begin at the start of this rank's part, so nothing can be said of the whole parameter.
        part = local(p)
        return torch.zeros(column.shape(part.shape), dtype=column.dtype, device=part.device)
    # A DTensor's zeros are on the device of its local tensor: with CPUOffloadPolicy the CPU, whatever its mesh.
    return torch.zeros_like(p, dtype=column.dtype, memory_format=torch.preserve_format, requires_grad=False)


def _flat_runs(params: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> Iterator[list[int]]:
    """Finds parameters that are neighbours in a flat parameter of FSDP1 and whose state has one dtype.

    A frozen parameter between them, which has no state, separates two runs.

    Yields:
        The indices of the parameters of each run, in the order of their addresses.
    """
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
    """Whether FSDP1 manages p. FSDP1 sets an attribute on every parameter that it flattens and on its views."""
    return getattr(p, FSDP_FLATTENED, False)


def reshard(model: Any) -> None:
    """Frees the unsharded parameters that a forward without a backward, such as an evaluation, has left behind.

    Under FSDP2 they take the place of the sharded ones. Under FSDP1 the next forward would use them, though new values
    had been loaded into the shards. Nothing is communicated.
    """
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    for module in FullyShardedDataParallel.fsdp_modules(model):
        drop_gathered_flat_param(module)


def refuse_flat(params: Sequence[Tensor]) -> None:
    """Raises TypeError if FSDP1 has flattened a parameter that takes part."""
    for i, p in enumerate(params):
        if takes_part(p) and is_flat_view(p):
            raise TypeError(
                f"parameter {i} of the group (shape {tuple(p.shape)}) is part of a flat parameter of FSDP1, which "
                "ShardedLion does not support. Use lion_dist.Lion(model.parameters(), ...) over this model: it steps "
                "each rank's part in place, and its momentum is sharded as the parameters are. Or shard the model by "
                "FSDP2 (fully_shard) over one dimension of a mesh, and make ShardedLion over the other"
            )


def misfit(t: Any, p: Any, shape: Sequence[int]) -> str:
    """Why the sharding of a tensor does not fit a parameter's.

    Args:
        t: a tensor from a state_dict.
        p: the parameter whose state it is to become.
        shape: the shape that it must have on this rank.

    Returns:
        The end of a sentence that begins with the tensor's name; "" if the sharding fits.
    """
    advice = (
        "load FSDP's state through torch.distributed.checkpoint.state_dict.set_optimizer_state_dict, or FSDP1's "
        "FSDP.optim_state_dict_to_load, which shard it"
    )
    if is_dtensor(t) != is_dtensor(p):
        return f"is a {type(t).__name__} and the parameter a {type(p).__name__}: {advice}"
    if is_dtensor(p) and (t.placements != p.placements or t.device_mesh != p.device_mesh):
        return (
            f"is placed as {t.placements} on {t.device_mesh} and the parameter as {p.placements} on {p.device_mesh}: "
            f"{advice}"
        )
    if is_flat_view(p) and t.shape != torch.Size(shape):
        return f"has shape {tuple(t.shape)} and this rank's part of the parameter {tuple(shape)}: {advice}"
    return ""
