"""Every private name of torch.distributed that lion_dist uses; see _torch_compat.py.

This is a file of its own because lion_dist/update, which uses _torch_compat.py, never imports torch.distributed. What
takes long to import (DTensor, FSDP, torch.distributed.checkpoint) is imported in the functions that need it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import AllgatherOptions
from torch.distributed import distributed_c10d as c10d

if TYPE_CHECKING:
    from torch.distributed.checkpoint.utils import _DistWrapper
    from torch.distributed.tensor import DTensor

__all__ = [
    "AllgatherOptions", "all_gather_coalesced", "all_gather_single", "backend_name", "backend_timeouts",
    "drop_gathered_flat_param", "dtensor_offset", "flat_param_slices", "group_devices", "is_known_group",
    "process_group_store", "rank_steps", "reduce_scatter_coalesced", "unwrapped_names",
]  # fmt: skip

# Process groups -------------------------------------------------------------------------------------

# The functions that torch's coalescing manager calls in the end. Its own Python would take 20 us a tensor in every
# backward. torch 2.13 has renamed all three.
all_gather_coalesced: Callable[..., Any] = getattr(
    dist.ProcessGroup, "all_gather_single_coalesced", None
) or dist.ProcessGroup.allgather_into_tensor_coalesced  # fmt: skip
all_gather_single: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_coalesced: Callable[..., Any] = getattr(
    dist.ProcessGroup, "reduce_scatter_single_coalesced", None
) or dist.ProcessGroup.reduce_scatter_tensor_coalesced  # fmt: skip

# The key-value store through which a group's ranks have found each other. Agreements between ranks go through it,
# because it works when the ranks' tensors no longer fit together.
process_group_store: Callable[[dist.ProcessGroup], c10d.Store] = c10d._get_process_group_store


def backend_name(group: dist.ProcessGroup, device: torch.device) -> str:
    """Name of the backend that carries a group's tensors on a device.

    The public `dist.get_backend` has one answer for the group, which may have a backend for each type of device.
    """
    return group._get_backend(device).name()


# The devices for which a group has a backend.
group_devices: Callable[[dist.ProcessGroup], list[Any]] = attrgetter("_device_types")


def backend_timeouts(group: dist.ProcessGroup) -> list[timedelta]:
    """How long a group's collectives wait for a rank, one value for each backend that says so."""
    options = [group._get_backend(device).options for device in group_devices(group)]
    return [o._timeout for o in options if getattr(o, "_timeout", None) is not None]


def is_known_group(group: dist.ProcessGroup) -> bool:
    """Whether a group still exists: destroy_process_group() has not been called for it, nor for all groups."""
    return group in c10d._world.pg_map


# DTensor and FSDP -----------------------------------------------------------------------------------


def dtensor_offset(t: DTensor) -> tuple[int, ...]:
    """Index of the first element that this rank has of a DTensor, in each dimension."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return tuple(compute_local_shape_and_global_offset(t.shape, t.device_mesh, t.placements)[1])


def flat_param_slices(model: nn.Module) -> Iterator[tuple[Tensor, torch.Size, Sequence[int], int]]:
    """For every parameter that FSDP1 has flattened: the parameter as it is on this rank, the whole one's shape and
    strides, and the index of the first element that this rank has of it.

    Raises:
        ValueError: a module was wrapped with use_orig_params=False.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel

    for module in FullyShardedDataParallel.fsdp_modules(model):
        handle = module._handle
        if handle is None:
            continue
        flat: Any = handle.flat_param
        if flat._params is None:
            raise ValueError(
                "FSDP with use_orig_params=False has one parameter per wrapped module, whose momentum no other "
                "strategy could load: wrap the model with use_orig_params=True"
            )
        slices = zip(flat._params, flat._shapes, flat._strides, flat._shard_param_infos, strict=True)
        for p, shape, strides, info in slices:
            yield p, shape, strides, info.intra_param_start_idx or 0


def drop_gathered_flat_param(module: Any) -> None:
    """Frees the gathered flat parameter of an FSDP1 module, if the last forward has left one, as a backward would."""
    from torch.distributed.fsdp._runtime_utils import _reshard

    handle = module._handle
    # Before the first forward there is no buffer yet to gather into.
    if handle is None or not hasattr(handle.flat_param, "_full_param_padded"):
        return
    if handle.uses_sharded_strategy and not handle.needs_unshard():
        _reshard(module, handle, True)


# torch.distributed.checkpoint -----------------------------------------------------------------------


def unwrapped_names(model: nn.Module, name: str) -> set[str]:
    """Names of a parameter or buffer without what DDP, FSDP, torch.compile and activation checkpointing put into it.

    These are the names that torch.distributed.checkpoint.state_dict uses.
    """
    from torch.distributed.checkpoint.state_dict import _get_fqns

    return _get_fqns(model, name)


def rank_steps(group: dist.ProcessGroup | None) -> _DistWrapper:
    """Runs functions on the ranks of a group, or in this process alone if it is None. If a function raises on one
    rank, every rank raises: this is how torch.distributed.checkpoint reports errors."""
    from torch.distributed.checkpoint.utils import _DistWrapper

    return _DistWrapper(group, group is not None, 0)
