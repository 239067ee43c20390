"""Two ways to wrap the toy of fsdp_toy.py: FSDP1 and FSDP2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from tests.harness import device_of
from tests.scenarios.fsdp_toy import FsdpToy, Unit

S = ShardingStrategy


def wrap_fsdp1(model: nn.Module, strategy: S = S.FULL_SHARD, **options: Any) -> FSDP:
    device = options.pop("device_id", None) or next(model.parameters()).device
    options = {"use_orig_params": True, "auto_wrap_policy": ModuleWrapPolicy({Unit, nn.Linear}), **options}
    return FSDP(model, sharding_strategy=strategy, device_id=device, **options)


def fsdp1_way(strategy: S = S.FULL_SHARD, **options: Any) -> Callable[[FsdpToy], nn.Module]:
    return lambda model: wrap_fsdp1(model, strategy, **options)


def all_ranks() -> DeviceMesh:
    """fully_shard's own default is a mesh of the device that torch was built for, whether ranks see one or not."""
    ranks = dist.get_world_size()
    return init_device_mesh(device_of(dist.get_rank(), ranks).type, (ranks,))


def shard_fsdp2(model: Any, **options: Any) -> nn.Module:
    options.setdefault("mesh", all_ranks())
    for module in model.modules():
        if isinstance(module, (Unit, nn.Linear)):
            fully_shard(module, **options)
    return fully_shard(model, **options)


def fsdp2_way(**options: Any) -> Callable[[FsdpToy], nn.Module]:
    return lambda model: shard_fsdp2(model, **options)
