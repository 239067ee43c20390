"""The runs that tests/digests.py takes digests of: a model with exact gradients, and one function for each strategy."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

STEPS = 20
SMALL: dict[str, tuple[int, ...]] = {
    "matrix": (64, 33),
    "kernel": (8, 6, 5, 5),
    "sometimes": (301,),  # it has a gradient in every third step
    "idle": (10, 7),  # it never has a gradient
    "wide": (1, 129),
    "bias": (127,),
    "one": (1,),
}
# Large enough for the CPU backend to compile the step, on one rank and on each of two ranks.
LARGE: dict[str, tuple[int, ...]] = {"large": (2_200_007,), "million": (1_000_003,), "bias": (127,)}
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {"small": SMALL, "large": LARGE}
# Storage dtype of the parameters, momentum_dtype.
DTYPES: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "bf16_fp32": (torch.bfloat16, torch.float32),
    "fp16": (torch.float16, None),
}

# Numbers from integers ------------------------------------------------------------------------------


def integers(name: str, numel: int, salt: int, bound: int) -> Tensor:
    """Integers in [-bound, bound], int64, that depend on the name, the salt and the index alone."""
    seed = int.from_bytes(hashlib.sha256(f"{name}/{salt}".encode()).digest()[:4], "little")
    h = (torch.arange(numel) * 2_654_435_761 + seed) & 0xFFFFFFFF
    for _ in range(2):
        h = ((h ^ (h >> 15)) * 739_993) & 0xFFFFFFFF
    return (h ^ (h >> 13)) % (2 * bound + 1) - bound


class Toy(nn.Module):
    """A model whose loss is linear: the sum over its parameters of parameter * coefficient.

    The coefficients of a step and rank are world_size * k / 4 * 2^-(step % 3) with integers k in [-8, 8]: averages
    over the ranks are exact in every dtype and order.

    Args:
        shapes: name of an entry of SHAPES.
        infinite: whether one element of "matrix" has an infinite gradient on rank 0 in step 11.
    """

    def __init__(self, shapes: str, dtype: torch.dtype, device: torch.device, infinite: bool = False) -> None:
        super().__init__()
        self.shapes, self.infinite = SHAPES[shapes], infinite
        self._bases: dict[tuple[str, int], Tensor] = {}
        for name, shape in self.shapes.items():
            value = (integers(name, torch.Size(shape).numel(), -1, 1000).double() / 997).reshape(shape)
            setattr(self, name, nn.Parameter(value.to(device, dtype)))

    def forward(self, step: int, rank: int, world_size: int) -> Tensor:
        loss = torch.zeros((), device=next(self.parameters()).device)
        for name in self.shapes:
            if self.uses(name, step):
                p = getattr(self, name)
                loss = loss + (p * self.coefficient(name, step, rank, world_size).to(p.device, p.dtype)).float().sum()
        return loss

    def uses(self, name: str, step: int) -> bool:
        return name != "idle" and (name != "sometimes" or step % 3 == 1)

    def coefficient(self, name: str, step: int, rank: int, world_size: int) -> Tensor:
        if (name, rank) not in self._bases:
            numel = torch.Size(self.shapes[name]).numel()
            self._bases[name, rank] = integers(name, numel, rank, 8).float() * world_size
        c = self._bases[name, rank].roll(7919 * step) * (0.25 * 0.5 ** (step % 3))
        if self.infinite and (name, step, rank) == ("matrix", 11, 0):
            c[77] = torch.inf
        return c.reshape(self.shapes[name])

    def average_gradient(self, name: str, step: int, world_size: int) -> Tensor | None:
        """The average over the ranks, float32; None where the parameter is not used."""
        if not self.uses(name, step):
            return None
        return sum(self.coefficient(name, step, r, world_size) for r in range(world_size)) / world_size  # type: ignore

    def groups(self) -> list[dict[str, Any]]:
        """Matrices decay and have other betas; vectors do not decay, have a higher lr and are maximised."""
        params = [getattr(self, name) for name in self.shapes]
        return [
            {"params": [p for p in params if p.dim() > 1], "weight_decay": 0.3, "betas": (0.95, 0.98)},
            {"params": [p for p in params if p.dim() <= 1], "lr": 3e-3, "maximize": True},
        ]


# Scenarios ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenario:
    """One run of 20 steps.

    Attributes:
        strategy: name of an entry of STRATEGIES.
        world_size: number of ranks.
        dtypes: name of an entry of DTYPES.
        triton: whether the step runs in Triton: on the CPU, in its interpreter.
        shapes: name of an entry of SHAPES.
        variant: "", "clip", "decoupled", "infinite", "lr_tensor" or "accumulate".
        options: further arguments of ShardedLion.
    """

    strategy: str
    world_size: int
    dtypes: str = "fp32"
    triton: bool = False
    shapes: str = "small"
    variant: str = ""
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        options = [f"{key}{value}" if key == "stage" else str(value) for key, value in self.options.items()]
        parts = [self.strategy, *options, self.dtypes, f"{self.world_size} ranks"]
        parts += ["triton" if self.triton else "plain", self.shapes, self.variant]
        return "/".join(part for part in parts if part)

    @property
    def plain_name(self) -> str:
        """Name of the same scenario without Triton."""
        return self.name.replace("/triton/", "/plain/")

    def toy(self, device: torch.device) -> Toy:
        return Toy(self.shapes, DTYPES[self.dtypes][0], device, self.variant == "infinite")

    def arguments(self) -> dict[str, Any]:
        """Arguments of both optimizers."""
        lr = torch.tensor(0.01) if self.variant == "lr_tensor" else 0.01
        return {
            "lr": lr,
            "betas": (0.9, 0.99),
            "use_triton": self.triton,
            "decoupled_weight_decay": self.variant == "decoupled",
            "momentum_dtype": DTYPES[self.dtypes][1],
        }


@dataclass
class Rank:
    """Where a scenario runs."""

    rank: int
    world_size: int
    device: torch.device


State = tuple[dict[str, Tensor], dict[str, Tensor]]  # weights and momenta, whole, by the parameter's name


def schedule(optimizer: Any) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 4 else 0.5 ** (step / 8))


def lion(scenario: Scenario, here: Rank) -> State:
    from lion_dist import Lion

    toy = scenario.toy(here.device)
    optimizer = Lion(toy.groups(), **scenario.arguments())
    scheduler = schedule(optimizer)
    for step in range(STEPS):
        for name, p in toy.named_parameters():
            grad = toy.average_gradient(name, step, 2)
            p.grad = None if grad is None else grad.to(p.device, p.dtype)
        optimizer.step()
        scheduler.step()
    params: dict[str, Tensor] = dict(toy.named_parameters())
    return params, {name: optimizer.state[p]["exp_avg"] for name, p in params.items()}


def by_name(toy: Toy, saved: dict[str, Any]) -> dict[str, Tensor]:
    """The momenta of a state_dict, whose indices count through the groups."""
    names = {id(p): name for name, p in toy.named_parameters()}
    order = [names[id(p)] for group in toy.groups() for p in group["params"]]
    indices = [i for group in saved["param_groups"] for i in group["params"]]
    return {name: saved["state"][i]["exp_avg"] for name, i in zip(order, indices, strict=True)}


def in_ddp(toy: Toy, here: Rank) -> nn.Module:
    return nn.parallel.DistributedDataParallel(toy, find_unused_parameters=True, broadcast_buffers=False)


def ddp(scenario: Scenario, here: Rank) -> State:
    from lion_dist import Lion

    toy = scenario.toy(here.device)
    model = in_ddp(toy, here)
    optimizer = Lion(toy.groups(), **scenario.arguments())
    train(scenario, here, model, optimizer)
    return dict(toy.named_parameters()), by_name(toy, optimizer.state_dict())


def sharded(scenario: Scenario, here: Rank) -> State:
    from lion_dist import ShardedLion

    toy = scenario.toy(here.device)
    model = toy if scenario.options["stage"] == 2 else in_ddp(toy, here)
    # Several buckets, most of which hold more than one parameter.
    optimizer = ShardedLion(toy.groups(), bucket_mb=0.006, **scenario.options, **scenario.arguments())
    train(scenario, here, model, optimizer)
    momenta = by_name(toy, optimizer.full_state_dict())
    optimizer.check_replicas()
    return dict(toy.named_parameters()), momenta


def train(scenario: Scenario, here: Rank, model: nn.Module, optimizer: Any) -> None:
    scheduler = schedule(optimizer)
    for step in range(STEPS):
        backwards = 2 if scenario.variant == "accumulate" and step % 4 == 2 else 1
        for _ in range(backwards):
            model(step, here.rank, here.world_size).backward()
        if scenario.variant == "clip":
            optimizer.clip_grad_norm_(2.0 + step)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


def fsdp1(scenario: Scenario, here: Rank) -> State:
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    toy = scenario.toy(here.device)
    return train_fsdp(scenario, here, FSDP(toy, use_orig_params=True, device_id=here.device))


def fsdp2(scenario: Scenario, here: Rank) -> State:
    from torch.distributed.fsdp import fully_shard

    toy = scenario.toy(here.device)
    fully_shard(toy, mesh=init_device_mesh(here.device.type, (here.world_size,)))
    return train_fsdp(scenario, here, toy)


def hsdp(scenario: Scenario, here: Rank) -> State:
    from torch.distributed.fsdp import fully_shard

    toy = scenario.toy(here.device)
    fully_shard(toy, mesh=init_device_mesh(here.device.type, (2, 2), mesh_dim_names=("replicas", "shards")))
    return train_fsdp(scenario, here, toy)


def train_fsdp(scenario: Scenario, here: Rank, model: nn.Module) -> State:
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
    )

    from lion_dist import Lion

    params = list(model.parameters())
    named = {name.rsplit(".", 1)[-1]: p for name, p in model.named_parameters()}
    vectors = [named[name] for name, shape in SHAPES[scenario.shapes].items() if len(shape) <= 1]
    matrices = [p for p in params if all(p is not v for v in vectors)]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": 0.3, "betas": (0.95, 0.98)},
        {"params": vectors, "lr": 3e-3, "maximize": True},
    ]
    optimizer = Lion(groups, **scenario.arguments())
    train(scenario, here, model, optimizer)
    options = StateDictOptions(full_state_dict=True)
    state: Any = get_optimizer_state_dict(model, optimizer, options=options)["state"]
    weights: Any = get_model_state_dict(model, options=options)
    return weights, {name: state[name]["exp_avg"] for name in weights}


def tp(scenario: Scenario, here: Rank) -> State:
    """Every parameter is a DTensor, sharded in its first or its last dimension, and so is its gradient."""
    from torch.distributed.tensor import Shard, distribute_tensor

    from lion_dist import Lion

    mesh = init_device_mesh(here.device.type, (here.world_size,))
    toy = scenario.toy(here.device)
    placements = {name: [Shard(len(shape) - 1 if i % 2 else 0)] for i, (name, shape) in enumerate(toy.shapes.items())}
    for name in toy.shapes:
        setattr(toy, name, nn.Parameter(distribute_tensor(getattr(toy, name).detach(), mesh, placements[name])))
    optimizer = Lion(toy.groups(), **scenario.arguments())
    scheduler = schedule(optimizer)
    for step in range(STEPS):
        for name, p in toy.named_parameters():
            grad = toy.average_gradient(name, step, 2)
            p.grad = None if grad is None else distribute_tensor(grad.to(p.device, p.dtype), mesh, placements[name])
        optimizer.step()
        scheduler.step()
    params = dict(toy.named_parameters())
    momenta = {name: optimizer.state[p]["exp_avg"].full_tensor() for name, p in params.items()}
    return {name: p.detach().full_tensor() for name, p in params.items()}, momenta  # type: ignore[attr-defined]


def deepspeed_zero(scenario: Scenario, here: Rank) -> State:
    """The momenta lie in DeepSpeed's flat partitions; they are digested rank after rank, as they are."""
    from tests.deepspeed.common import start_deepspeed

    deepspeed = start_deepspeed(here.rank, here.world_size)
    import lion_dist.deepspeed

    toy = scenario.toy(here.device)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "Lion", "params": {"lr": 1e-2, "betas": [0.9, 0.99], "use_triton": scenario.triton}},
        "zero_optimization": {"stage": int(scenario.strategy[-1])},
    }
    if scenario.dtypes != "fp32":
        config[scenario.dtypes] = {"enabled": True}
    with lion_dist.deepspeed.registered():
        groups: Any = toy.groups()
        engine, *_ = deepspeed.initialize(model=toy, model_parameters=groups, config=config)
    for step in range(STEPS):
        engine.backward(engine(step, here.rank, here.world_size))
        engine.step()
    params = dict(toy.named_parameters())
    gathered = deepspeed.zero.GatheredParameters(list(params.values())) if scenario.strategy[-1] == "3" else None
    if gathered is not None:
        gathered.__enter__()
    weights = {name: p.detach().clone() for name, p in params.items()}
    if gathered is not None:
        gathered.__exit__(None, None, None)
    own = [entry["exp_avg"].detach().cpu().reshape(-1) for entry in engine.basic_optimizer.state.values()]
    parts: list[Any] = [None] * here.world_size
    dist.all_gather_object(parts, own)
    engine.destroy()
    return weights, {f"{rank}.{i}": t for rank, part in enumerate(parts) for i, t in enumerate(part)}


STRATEGIES: dict[str, Callable[[Scenario, Rank], State]] = {
    "lion": lion,
    "ddp": ddp,
    "sharded": sharded,
    "fsdp1": fsdp1,
    "fsdp2": fsdp2,
    "hsdp": hsdp,
    "tp": tp,
    **{f"deepspeed_zero{stage}": deepspeed_zero for stage in (1, 2, 3)},
}
