"""A model for FSDP2 to shard over one dimension of a mesh and for ShardedLion over the other, with exact gradients.

Its loss is linear with the coefficients of toy.py, so that one process knows the averages. Shapes split badly: heads
and tails of ShardLayout within a local shard, fewer rows than ranks, so that a rank holds nothing of a parameter.
Every rank of the mesh has a part of the batch of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from lion_dist import Lion, ShardedLion, clip_grad_norm_
from lion_dist.update import reference
from tests.asserts import assert_same_bits, bits
from tests.harness import device_of
from tests.scenarios.fsdp_toy import term
from tests.scenarios.toy import coefficient

F32, BF16 = torch.float32, torch.bfloat16
FEW = 6_000 / 2**20  # MiB a bucket: a few parameters each

UNITS: dict[str, dict[str, tuple[int, ...]]] = {
    "first": {"weight": (129, 24), "frozen": (33, 9), "bias": (129,)},
    "second": {"weight": (127, 17), "row": (1, 300), "three": (3, 129), "unused": (6, 5)},
    "idle": {"weight": (9, 5)},  # not used at all
    "sometimes": {"weight": (30, 11), "one": (1,)},
}
OWN: dict[str, tuple[int, ...]] = {"embedding": (37, 29), "scale": (2,)}  # of the root; the embedding has two names
UNUSED = "units.second.unused"


def uses(unit: str, step: int, replica: int, use: str) -> bool:
    """Whether a replica uses a unit in a step.

    Args:
        use: "alike": all replicas use the same units; "apart": "sometimes" in different steps; "all": all units always.
    """
    if use == "all":
        return True
    return unit != "idle" and (unit != "sometimes" or (step + (replica if use == "apart" else 0)) % 3 == 1)


class Unit(nn.Module):
    def __init__(self, name: str, params: dict[str, Tensor]) -> None:
        super().__init__()
        self.name = name
        for key, value in params.items():
            self.register_parameter(key, nn.Parameter(value, requires_grad=key != "frozen"))

    def forward(self, loss: Tensor, step: int, rank: int, size: int) -> Tensor:
        for key in UNITS[self.name]:
            if f"units.{self.name}.{key}" != UNUSED:
                loss = loss + term(f"{self.name}.{key}", getattr(self, key), step, rank, size)
        return loss


class HybridToy(nn.Module):
    """
    Args:
        dtypes: of the root's own parameters, then of each unit, over and over.
        shards: the number of ranks of a replica; rank r is in replica r // shards.
        use: see `uses`.
        reentrant: None, or use_reentrant of a checkpoint around each unit.
        tied: whether the embedding has a second name.
    """

    embedding: nn.Parameter
    scale: nn.Parameter

    def __init__(
        self,
        device: torch.device,
        dtypes: tuple[torch.dtype, ...] = (F32,),
        seed: int = 0,
        *,
        shards: int = 1,
        use: str = "alike",
        reentrant: bool | None = None,
        tied: bool = True,
    ) -> None:
        super().__init__()
        self.shards, self.use, self.reentrant = shards, use, reentrant
        generator = torch.Generator().manual_seed(seed)

        def make(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
            return {key: torch.randn(shape, generator=generator).to(device, dtype) for key, shape in shapes.items()}

        for name, value in make(OWN, dtypes[0]).items():
            self.register_parameter(name, nn.Parameter(value))
        if tied:
            self.tied = self.embedding
        self.units = nn.ModuleDict()
        for i, (name, shapes) in enumerate(UNITS.items()):
            self.units[name] = Unit(name, make(shapes, dtypes[(i + 1) % len(dtypes)]))

    def forward(self, step: int, rank: int, size: int) -> Tensor:
        loss = term("embedding", self.embedding, step, rank, size)
        loss = loss + term("again", getattr(self, "tied", self.embedding), step, rank, size)
        loss = loss + term("scale", self.scale, step, rank, size)
        for name, unit in self.units.items():
            if uses(name, step, rank // self.shards, self.use):
                if self.reentrant is None:
                    loss = unit(loss, step, rank, size)
                else:
                    loss = checkpoint(unit, loss, step, rank, size, use_reentrant=self.reentrant)
        return loss

    def average_gradient(self, name: str, step: int, size: int) -> Tensor | None:
        """Over all ranks of the mesh; None where no rank has one."""
        p = dict(self.named_parameters())[name]
        unit = name.split(".")[1] if "." in name else ""
        ranks = [r for r in range(size) if not unit or uses(unit, step, r // self.shards, self.use)]
        if name == UNUSED or not p.requires_grad or not ranks:
            return None
        names = ["embedding", "again"] if name == "embedding" else [name.removeprefix("units.")]
        total = torch.zeros(p.shape, device=p.device)
        for n in names:
            for r in ranks:
                total += coefficient(n, p, step, r, size).float()
        return (total / size).to(p.dtype)


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Decay for matrices, none for the rest, at another lr; and one parameter in a group of its own. With names."""
    named = dict(model.named_parameters())
    own = [("units.second.three", named.pop("units.second.three"))]
    decays = [n for n in named if n.endswith(("weight", "embedding", "unused", "frozen", "row"))]
    return [
        {"params": [(n, p) for n, p in named.items() if n in decays], "weight_decay": 0.3},
        {"params": [(n, p) for n, p in named.items() if n not in decays], "lr": 3e-3},
        {"params": own, "betas": (0.95, 0.98), "maximize": True},
    ]


def mesh_of(replicas: int, shards: int) -> DeviceMesh:
    """Of the first ranks; all ranks must make it."""
    device = device_of(dist.get_rank(), dist.get_world_size())
    ranks = torch.arange(replicas * shards).view(replicas, shards)
    return DeviceMesh(device.type, ranks, mesh_dim_names=("replicate", "shard"))


def shard_(model: Any, mesh: DeviceMesh, **options: Any) -> Any:
    for unit in model.units.values():
        fully_shard(unit, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def local(t: Any) -> Tensor:
    return t._local_tensor if isinstance(t, DTensor) else t


def part_of(whole: Tensor, p: Any) -> Tensor:
    """What this rank holds of a tensor that is placed as a DTensor is."""
    return distribute_tensor(whole.detach(), p.device_mesh, p.placements, src_data_rank=None).to_local()


def exact_clip(grads: Sequence[Tensor], max_norm: float) -> Tensor:
    """One process's clipping, by the reference. Returns the norm."""
    norm, scale = reference.clip_coefficient(torch.stack([reference.sum_of_squares(g) for g in grads]).sum(), max_norm)
    for g in grads:
        assert g.dtype == F32  # in 16 bits the product would be rounded once more
        g.mul_(scale)
    return norm


@dataclass(frozen=True)
class Case:
    """A way to train the toy.

    Attributes:
        stage, sync: of ShardedLion. In stage 1 FSDP2 averages over the whole mesh.
        accumulate: how gradients of two passes a step accumulate: "" (one pass), "optimizer" (its no_sync()), "fsdp"
            (set_requires_gradient_sync(False)) or "both".
        use: see `uses`. FSDP2's policy fails under accumulation for units that were never used.
        clip: the max_norm, if any.
        policy: whether FSDP2 computes in bfloat16 and reduces in float32.
        reduce_dtype: of ShardedLion. What it rounds is exact.
        options: of the optimizers.
    """

    stage: int = 2
    sync: str = "signs"
    dtypes: tuple[torch.dtype, ...] = (F32,)
    accumulate: str = ""
    clip: float | None = None
    policy: bool = False
    reshard: bool = True
    reentrant: bool | None = None
    use: str = "alike"
    reduce_dtype: torch.dtype | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def made(self, device: torch.device, shards: int, seed: int = 0) -> HybridToy:
        return HybridToy(device, self.dtypes, seed, shards=shards, use=self.use, reentrant=self.reentrant)

    def kwargs(self) -> dict[str, Any]:
        return {"lr": 1e-2, "weight_decay": 0.1, **self.options}

    def sharded(self, model: HybridToy, mesh: DeviceMesh) -> Any:
        policy = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=F32) if self.policy else MixedPrecisionPolicy()
        return shard_(model, mesh, reshard_after_forward=self.reshard, mp_policy=policy)


def make_hybrid(case: Case, mesh: DeviceMesh, seed: int) -> tuple[Any, ShardedLion]:
    device = device_of(dist.get_rank(), dist.get_world_size())
    toy = case.made(device, mesh["shard"].size(), seed)
    model = case.sharded(toy, mesh["shard"] if case.stage == 2 else mesh)
    optimizer = ShardedLion(
        groups_of(model), **case.kwargs(), process_group=mesh["replicate"].get_group(), stage=case.stage,
        param_sync=case.sync, bucket_mb=FEW, reduce_dtype=case.reduce_dtype,
    )  # fmt: skip
    return model, optimizer


class Twins:
    """The toy under ShardedLion over a mesh; under FSDP2's own HSDP and Lion; and under Lion on one process."""

    def __init__(self, case: Case, mesh: DeviceMesh) -> None:
        self.case, self.mesh = case, mesh
        self.rank, self.size = dist.get_rank(), mesh.size()
        device = device_of(self.rank, dist.get_world_size())
        shards = mesh["shard"].size()
        # Replicas begin with other weights: the first one's are what counts.
        self.model, self.optimizer = make_hybrid(case, mesh, mesh.get_local_rank("replicate"))
        kwargs = case.kwargs()
        self.single = case.made(device, shards)
        self.single_lion = Lion(groups_of(self.single), **kwargs)
        # FSDP2 itself waits for ever where the replicas use different units.
        self.hsdp = None if case.use == "apart" else case.sharded(case.made(device, shards), mesh)
        self.hsdp_lion = None if self.hsdp is None else Lion(groups_of(self.hsdp), **kwargs)
        # One process cuts blocks of an 8-bit momentum where the parameter begins, and not where a shard does.
        self.knows = case.options.get("momentum_dtype") != "int8"
        assert self.knows or self.hsdp is not None

    def unfreeze(self) -> None:
        for model in (self.model, self.single, self.hsdp):
            if model is not None:
                model.get_parameter("units.first.frozen").requires_grad_(True)

    def step(self, step: int) -> None:
        case = self.case
        micro_steps = [step, step + 30] if case.accumulate else [step]
        both: list[tuple[Any, bool]] = [(self.model, True), (self.hsdp, False)]
        for model, of_us in both:
            if model is None:
                continue
            for micro_step in micro_steps:
                last = micro_step == micro_steps[-1]
                by_fsdp = case.accumulate in ("fsdp", "both") or not of_us or case.stage == 1
                if case.accumulate and by_fsdp:
                    model.set_requires_gradient_sync(last)
                unsynced: AbstractContextManager[Any] = nullcontext()
                if not last and of_us and case.stage == 2 and case.accumulate in ("optimizer", "both"):
                    unsynced = self.optimizer.no_sync()
                with unsynced:
                    model(micro_step, self.rank, self.size).backward()
        for name, p in self.single.named_parameters():
            found = [self.single.average_gradient(name, s, self.size) for s in micro_steps]
            grads = [g for g in found if g is not None]
            p.grad = sum(grads[1:], grads[0]) if grads else None
        if case.clip is not None:
            norm = self.optimizer.clip_grad_norm_(case.clip)
            assert norm > case.clip
            expected = exact_clip([p.grad for p in self.single.parameters() if p.grad is not None], case.clip)
            assert_same_bits(norm, expected, "norm")
            if self.hsdp is not None:
                assert_same_bits(norm, clip_grad_norm_(self.hsdp.parameters(), case.clip), "norm of HSDP")
        for optimizer in (self.optimizer, self.single_lion, self.hsdp_lion):
            if optimizer is not None:
                self.make_step(optimizer)
                optimizer.zero_grad()

    def make_step(self, optimizer: Any) -> None:
        """Makes one step: of ShardedLion, of Lion on one process, or of Lion under FSDP2's HSDP, in this order."""
        optimizer.step()

    def check(self, what: str) -> None:
        """All weights on this rank."""
        for name, p in self.model.named_parameters():
            if self.knows:
                assert_same_bits(local(p), part_of(self.single.get_parameter(name), p), f"{what}: {name}")
            if self.hsdp is not None:
                assert_same_bits(local(p), local(self.hsdp.get_parameter(name)), f"{what}: {name} beside HSDP")

    def check_state(self, what: str) -> None:
        """All state, whole; a collective call."""
        if self.hsdp_lion is not None and self.hsdp is not None:
            check_whole(self.optimizer, self.hsdp_lion, self.hsdp, f"{what}, beside HSDP")
        if self.knows:
            check_whole(self.optimizer, self.single_lion, self.single, f"{what}, beside one process")


def whole(t: Any) -> Any:
    return t.full_tensor() if isinstance(t, DTensor) else t


def check_whole(optimizer: ShardedLion, lion: Lion, model: nn.Module, what: str) -> None:
    """full_state_dict() is what Lion's state_dict() shows, once gathered; a collective call."""
    got, expected = optimizer.full_state_dict(), lion.state_dict()
    params = dict(model.named_parameters())
    for number, group in enumerate(expected["param_groups"]):
        assert got["param_groups"][number]["params"] == group["params"]
        for i, name in zip(group["params"], group["param_names"], strict=True):
            entry = {key: whole(t) for key, t in expected["state"].get(i, {}).items()}
            own = got["state"].get(i, {})
            if not own:
                assert not entry or not params[name].requires_grad, f"{what}: no state of {name}"
                continue
            assert own.keys() == entry.keys(), f"{what}: {name}"
            for key, t in entry.items():
                shown = t.float() if t.dtype == torch.int16 else t  # as of DTensors, whose gathers have no int16
                assert_same_bits(own[key], shown.cpu(), f"{what}: {key} of {name}")


def train_case(case: Case, mesh: DeviceMesh, steps: int) -> None:
    """The same bits in every step."""
    what = f"{tuple(mesh.shape)} {case}"
    try:
        twins = Twins(case, mesh)
        twins.check("before")
        for step in range(steps):
            if step == 2:
                twins.unfreeze()
            twins.step(step)
            twins.check(f"step {step}")
        twins.optimizer.check_replicas()
        twins.check_state("in the end")
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error


def body_cases(rank: int, world_size: int, cases: Mapping[tuple[int, int], Sequence[Case]], steps: int) -> None:
    """Cases by their meshes of all ranks: (replicas, shards)."""
    for (replicas, shards), of_mesh in cases.items():
        mesh = mesh_of(replicas, shards)
        for case in of_mesh:
            train_case(case, mesh, steps)


@contextmanager
def refused(model: nn.Module, kind: type[Exception], match: str) -> Iterator[None]:
    """An error on this rank, and no weight moved."""
    params = dict(model.named_parameters())  # a backward that fails leaves FSDP2's model with whole ones
    before = [bits(local(p)) for p in params.values()]
    with pytest.raises(kind, match=match):
        yield
    for (name, p), b in zip(params.items(), before, strict=True):
        assert torch.equal(bits(local(p)), b), f"{name} moved"
