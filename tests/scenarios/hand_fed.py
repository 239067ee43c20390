"""A model without a forward, sharded in every way that `Lion` steps; its gradients are cut by hand from whole ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from lion_dist import Lion, clip_grad_norm_
from lion_dist.checkpoint.logical import flat_slices
from tests.scenarios.fsdp_toy import plain_name
from tests.scenarios.precision import BF16, F32, gradient_of, rounded_half_away, weights_of

# They split badly, but for "even", which 2 and 4 ranks cut at multiples of 128.
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "odd": {"weight": (13, 7), "gain": (13,), "bias": (3,)},
    "long": {"row": (1, 129), "gain": (127,), "weight": (300, 3)},
    "even": {"weight": (64, 16)},
}


MAX_NORM = 2.0

whole_gradient = cache(gradient_of)  # every run of a test has the same


class Unit(nn.Module):
    def __init__(self, shapes: dict[str, tuple[int, ...]], values: Callable[[tuple[int, ...]], Tensor]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(values(shape)))


class Held(nn.Module):
    """Weights of `weights_of`, rounded to ``dtype``."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        seeds = iter(range(100))

        def values(shape: tuple[int, ...]) -> Tensor:
            w = weights_of(shape, next(seeds))
            return rounded_half_away(w) if dtype == torch.bfloat16 else w

        self.units = nn.ModuleDict({name: Unit(shapes, values) for name, shapes in SHAPES.items()})


def bare(name: str) -> str:
    """The name in the model that is not wrapped."""
    return plain_name(name).removeprefix("module.").replace("/", ".")


def seed_of(name: str) -> int:
    names = [f"units.{unit}.{key}" for unit, shapes in SHAPES.items() for key in shapes]
    return names.index(bare(name))


def shape_of(name: str) -> tuple[int, ...]:
    _, unit, key = bare(name).split(".")
    return SHAPES[unit][key]


def in_fsdp1(model: nn.Module, **options: Any) -> nn.Module:
    options.setdefault("sharding_strategy", ShardingStrategy.FULL_SHARD)
    device = next(model.parameters()).device
    policy = ModuleWrapPolicy({Unit})
    return FSDP(model, use_orig_params=True, auto_wrap_policy=policy, device_id=device, **options)


def in_fsdp2(model: Any, mesh: DeviceMesh) -> nn.Module:
    for module in model.modules():
        if isinstance(module, Unit):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def in_tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            placement = Shard(1) if p.dim() == 2 else Shard(0) if p.numel() > 100 else Replicate()
            sharded = distribute_tensor(p.detach(), mesh, [placement], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(sharded))
    return model


def ways(world_size: int, device: str) -> dict[str, Callable[[nn.Module], nn.Module]]:
    mesh = init_device_mesh(device, (world_size,))
    found: dict[str, Callable[[nn.Module], nn.Module]] = {
        "fsdp1": lambda model: in_fsdp1(model, device_mesh=mesh),
        "fsdp2": lambda model: in_fsdp2(model, mesh),
    }
    if world_size == 2:
        found["ddp"] = DistributedDataParallel
        found["fsdp1, SHARD_GRAD_OP"] = lambda model: in_fsdp1(model, sharding_strategy=ShardingStrategy.SHARD_GRAD_OP)
        found["tensor parallelism"] = lambda model: in_tensor_parallel(model, mesh)
        return found
    both = init_device_mesh(device, (2, world_size // 2), mesh_dim_names=("replicate", "shard"))
    hybrid = ShardingStrategy.HYBRID_SHARD
    found["fsdp1, hybrid"] = lambda model: in_fsdp1(model, sharding_strategy=hybrid, device_mesh=both)
    found["fsdp2, hybrid"] = lambda model: in_fsdp2(model, both)
    return found


class Fed:
    """A wrapped model and its optimizer, in two groups of which one decays.

    Attributes:
        named: the parameters by the names that the wrapped model gives them.
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        self.model = model
        self.named = dict(model.named_parameters())
        self.slices = flat_slices(model)
        shards = model.process_group if isinstance(model, FSDP) else None  # the ranks with other parts
        self._groups = [] if shards is None else [shards]
        decays = [name for name in self.named if name.endswith(("weight", "row"))]
        groups = [
            {"params": [(n, p) for n, p in self.named.items() if n in decays], "weight_decay": 0.3},
            {"params": [(n, p) for n, p in self.named.items() if n not in decays], "lr": 1e-3, "maximize": True},
        ]
        self.optimizer = Lion(groups, lr=3e-4, **options)

    @cached_property
    def _places(self) -> dict[str, Tensor]:
        """Where the elements of this rank's parts are in the whole tensors."""
        numbers = {name: torch.arange(math.prod(shape_of(name))).view(shape_of(name)) for name in self.named}
        return {name: self.part(name, t.to(self.named[name].device)).reshape(-1) for name, t in numbers.items()}

    def part(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of a tensor that belongs to a parameter."""
        p = self.named[name]
        if isinstance(p, DTensor):
            return distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None).to_local()
        if id(p) in self.slices:
            start = self.slices[id(p)].start
            return whole.reshape(-1)[start : start + p.numel()].view(p.shape)
        return whole

    def step(self, step: int) -> None:
        """Clips at every third one, unless the norm is NaN; gradients are rounded to bfloat16 then."""
        for name, p in self.named.items():
            if p.numel():
                whole = whole_gradient(shape_of(name), seed_of(name), step).to(p.device, p.dtype)
                g = whole.reshape(-1)[self._places[name]]
                if isinstance(p, DTensor):
                    p.grad = DTensor.from_local(
                        g.view(p._local_tensor.shape), p.device_mesh, p.placements, run_check=False, shape=p.shape,
                        stride=p.stride(),
                    )  # fmt: skip
                else:
                    p.grad = g.view(p.shape)
        if step % 3 == 2 and step % 20:
            norm = clip_grad_norm_(self.named.values(), MAX_NORM, self._groups)
            assert norm > MAX_NORM
            for p in self.named.values():
                if p.grad is not None and p.dtype == F32:
                    p.grad.copy_(p.grad.to(BF16))
        self.optimizer.step()

    def local_twin(self, **options: Any) -> Fed:
        """Plain parameters that are this rank's parts, with another optimizer."""
        twin = nn.Module()
        for name, p in self.named.items():
            part = (p.to_local() if isinstance(p, DTensor) else p).detach().clone()
            twin.register_parameter(name.replace(".", "/"), nn.Parameter(part))
        return Fed(twin, **options)
