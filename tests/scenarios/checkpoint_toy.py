"""A model that every strategy can train, with an averaged gradient that is the same under all of them.

The ranks' gradients of a step are small dyadic numbers, multiples of world_size, that add up to world_size * base: the
average is base, exactly, whatever the number of ranks, their order or the strategy. So what one process with `Lion`
computes is what all must.

Sizes split badly for 2, 3 and 4 ranks: odd rows, fewer rows than ranks, heads and tails of ShardLayout, parameters of
which a rank holds nothing; a bfloat16 unit, a frozen parameter, tied names, a buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from lion_dist import Lion, ShardedLion
from tests.harness import device_of
from tests.scenarios.toy import hash_of

STRATEGIES = ("single", "ddp", "stage1", "stage2", "signs", "fsdp1", "fsdp2")
# FSDP2 over halves of the ranks; FSDP2, and tensor parallelism over pairs of ranks.
OVER_TWO_DIMENSIONS = ("hsdp", "tp")
# FSDP2 over shards and ShardedLion over replicas, on four ranks: replicas, shards, param_sync.
HYBRIDS = {"hybrid2x2": (2, 2, "signs"), "hybrid4x1": (4, 1, "params"), "hybrid1x4": (1, 4, "signs")}
FIRST, MORE = 3, 2  # steps before a checkpoint, and after it

SHAPES: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "embedding": ((37, 29), torch.float32),
    "gain": ((129,), torch.float32),
    "frozen": ((5, 7), torch.float32),
    "low.weight": ((11, 3, 17), torch.bfloat16),
    "low.bias": ((3,), torch.bfloat16),
    "block.weight": ((2, 600), torch.float32),
    "block.short": ((1, 5), torch.float32),
    "block.one": ((1,), torch.float32),
}


class Unit(nn.Module):
    def __init__(self, params: dict[str, Tensor]) -> None:
        super().__init__()
        for name, value in params.items():
            setattr(self, name, nn.Parameter(value, requires_grad=name != "frozen"))

    def forward(self, loss: Tensor, prefix: str, step: int, rank: int, world_size: int) -> Tensor:
        p: Tensor
        for name, p in self.named_parameters(recurse=False):
            if name not in ("frozen", "tied"):
                c = part(prefix + name, p, step, rank, world_size).to(p.device, p.dtype)
                if isinstance(p, DTensor):  # of tensor parallelism: this rank's part of the sum
                    c = distribute_tensor(c, p.device_mesh, p.placements, src_data_rank=None).to_local()
                    p = p.to_local()
                loss = loss + (p * c).float().sum()
        return loss


class CheckpointToy(Unit):
    gain: nn.Parameter
    low: Unit
    block: Unit

    def __init__(self, seed: int, dtype: torch.dtype | None = None) -> None:
        """``dtype``: of all parameters, none of which is frozen then."""
        generator = torch.Generator().manual_seed(seed)
        values = {n: torch.randn(shape, generator=generator).to(dtype or own) for n, (shape, own) in SHAPES.items()}
        if dtype is not None:
            del values["frozen"]
        super().__init__({n: v for n, v in values.items() if "." not in n})
        self.tied = self.embedding  # two names, one parameter
        for unit in ("low", "block"):
            params = {n.removeprefix(unit + "."): v for n, v in values.items() if n.startswith(unit + ".")}
            self.add_module(unit, Unit(params))
        self.register_buffer("seen", torch.full((2,), float(seed)))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, step: int, rank: int, world_size: int) -> Tensor:  # type: ignore[override]
        loss = super().forward(torch.zeros((), device=self.gain.device), "", step, rank, world_size)
        for unit in ("low", "block"):
            loss = getattr(self, unit)(loss, unit + ".", step, rank, world_size)
        return loss


def base(name: str, p: Tensor, step: int) -> Tensor:
    """k/4 with k in [-8, 8], in p's shape: the averaged gradient."""
    generator = torch.Generator().manual_seed(hash_of(name) + 7919 * step)
    return torch.randint(-8, 9, p.shape, generator=generator) / 4


def part(name: str, p: Tensor, step: int, rank: int, world_size: int) -> Tensor:
    """A rank's gradient: a multiple of world_size, since DDP divides before it adds up."""
    if world_size == 1:
        return base(name, p, step)
    other = base(name + "'", p, step)
    if rank == 0:
        return world_size * (base(name, p, step) + other)
    return -world_size * other if rank == world_size - 1 else torch.zeros(p.shape)


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Decay for matrices, none for the rest at another lr, one parameter in a group of its own."""
    named = {n.replace("_fsdp_wrapped_module.", "").removeprefix("module."): p for n, p in model.named_parameters()}
    own = [named.pop("gain")]
    matrices = [n for n in named if n.endswith(("weight", "embedding", "frozen", "short"))]
    return [
        {"params": [named[n] for n in matrices], "weight_decay": 0.3},
        {"params": [p for n, p in named.items() if n not in matrices], "lr": 3e-3},
        {"params": own, "betas": (0.95, 0.98), "maximize": True},
    ]


def tensor_parallel(model: CheckpointToy, mesh: DeviceMesh) -> None:
    """Two parameters by rows and columns, the rest of the units replicated; the root's are left plain."""
    placements = {"low.weight": Shard(2), "block.weight": Shard(0)}

    def cut(prefix: str, unit: nn.Module) -> None:
        for name, p in list(unit.named_parameters()):
            placement = placements.get(f"{prefix}.{name}", Replicate())
            unit.register_parameter(name, nn.Parameter(distribute_tensor(p.detach(), mesh, [placement])))

    for name in ("low", "block"):
        distribute_module(getattr(model, name), mesh, partial(lambda name, _, module, __: cut(name, module), name))


class Run:
    """A model under a strategy, its optimizer and scheduler.

    Args:
        strategy: one of STRATEGIES, OVER_TWO_DIMENSIONS or HYBRIDS.
        seed: of the weights.
        ranks: the ranks that train.
        dtype: of all parameters, none of which is frozen then.
        options: further arguments of the optimizer.
    """

    def __init__(
        self,
        strategy: str,
        seed: int,
        ranks: dist.ProcessGroup | None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        self.strategy, self.ranks = strategy, ranks
        # Which part of the batch this rank has, of how many.
        self.place = (0, 1) if ranks is None else (dist.get_rank(ranks), dist.get_world_size(ranks))
        device = device_of(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else torch.device("cpu")
        self.model = model = CheckpointToy(seed, dtype).to(device)
        self.wrapped: nn.Module = model
        size = self.place[1]
        kwargs: dict[str, Any] = {"lr": 0.01, **options}
        if strategy in ("ddp", "stage1"):
            self.wrapped = DistributedDataParallel(model, process_group=ranks)
        elif strategy == "fsdp1":
            of_fsdp1: dict[str, Any] = {"process_group": ranks, "use_orig_params": True, "device_id": device}
            for name in ("low", "block"):
                setattr(model, name, FSDP(getattr(model, name), **of_fsdp1))
            self.wrapped = FSDP(model, **of_fsdp1)
        elif strategy in ("fsdp2", *OVER_TWO_DIMENSIONS):
            mesh = init_device_mesh(device.type, (size,))
            if strategy == "hsdp":
                mesh = init_device_mesh(device.type, (2, size // 2), mesh_dim_names=("replicate", "shard"))
            elif strategy == "tp":
                both = init_device_mesh(device.type, (size // 2, 2), mesh_dim_names=("dp", "tp"))
                tensor_parallel(model, both["tp"])
                mesh, self.place = both["dp"], (both.get_local_rank("dp"), size // 2)
            for unit in (model.low, model.block, model):
                fully_shard(unit, mesh=mesh)
        if strategy in HYBRIDS:
            replicas, shards, kwargs["param_sync"] = HYBRIDS[strategy]
            mesh = init_device_mesh(device.type, (replicas, shards), mesh_dim_names=("replicate", "shard"))
            for unit in (model.low, model.block, model):
                fully_shard(unit, mesh=mesh["shard"])
            self.optimizer: Any = ShardedLion(groups(model), **kwargs, process_group=mesh["replicate"].get_group())
        elif strategy in ("stage1", "stage2", "signs"):
            kwargs["stage"] = 1 if strategy == "stage1" else 2
            kwargs["param_sync"] = "signs" if strategy == "signs" else "params"
            self.optimizer = ShardedLion(groups(self.wrapped), **kwargs, process_group=ranks)
        else:
            self.optimizer = Lion(groups(self.wrapped), **kwargs)
        self.scheduler = LambdaLR(self.optimizer, lambda step: min(1.0, (step + 1) / 7))

    def train(self, steps: Sequence[int]) -> Run:
        for step in steps:
            self.wrapped(step, *self.place).backward()
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
        return self

    @torch.no_grad()
    def evaluate(self) -> Run:
        """A forward that no backward follows, after which FSDP2 leaves parameters whole."""
        self.wrapped(0, *self.place)
        return self

    def whole(self) -> dict[str, Tensor]:
        """Weights, buffers and momenta by name ("w" and "m"), whole, through torch's own doors; a collective call."""
        if self.strategy in ("fsdp1", "fsdp2", *OVER_TWO_DIMENSIONS):
            options = StateDictOptions(full_state_dict=True)
            weights: dict[str, Any] = get_model_state_dict(self.wrapped, options=options)
            state: Any = get_optimizer_state_dict(self.wrapped, self.optimizer, options=options)["state"]
            momenta = {n: entry["exp_avg"] for n, entry in state.items()}
        else:
            weights = self.model.state_dict()
            if self.strategy in HYBRIDS:
                weights = get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True))
            full = (
                self.optimizer.full_state_dict if isinstance(self.optimizer, ShardedLion) else self.optimizer.state_dict
            )
            names = {id(p): n for n, p in self.model.named_parameters()}
            params = [p for group in self.optimizer.param_groups for p in group["params"]]
            momenta = {names[id(params[i])]: entry["exp_avg"] for i, entry in full()["state"].items()}
        found = {f"w {n}": t for n, t in weights.items() if n != "tied"}
        found.update({f"m {n}": t for n, t in momenta.items()})
        return {n: t.detach().cpu().clone() for n, t in found.items()}

    def hyper_parameters(self) -> list[dict[str, Any]]:
        return [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]


SEED = 3


def uninterrupted() -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """Whole states of one process with Lion after FIRST and after FIRST + MORE steps, and its last groups."""
    run = Run("single", SEED, None).train(range(FIRST))
    then = run.whole()
    run.train(range(FIRST, FIRST + MORE))
    return then, run.whole(), run.hyper_parameters()
