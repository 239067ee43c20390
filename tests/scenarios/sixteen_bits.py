"""Training with ``reduce_dtype=torch.bfloat16`` beside its definition in plain torch, for gradients of any values.

Each process plays all ranks: it knows the gradients of every rank, and works out which of them travel together, what
their average is, and what Lion makes of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from lion_dist import Lion, ShardedLion
from lion_dist.update import reference
from tests.asserts import assert_same_bits
from tests.harness import device_of
from tests.scenarios.hybrid import FEW as HYBRID_MB
from tests.scenarios.hybrid import mesh_of
from tests.scenarios.passes import FEW, ONE, TINY
from tests.scenarios.wire import Counter

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

# Heads with and without tails on 2, 3 and 4 ranks, tails alone, an odd memory order, one element, and none.
SHAPES: tuple[tuple[int, ...], ...] = (
    (40, 33),
    (3072,),
    (8, 6, 5, 5),
    (24, 48),
    (129,),
    (127,),
    (3,),
    (1,),
    (),
    (0, 3),
)
ALL = list(range(len(SHAPES)))


def average_of(gradients: Sequence[Tensor | None]) -> Tensor | None:
    """The definition: the ranks' gradients, in order, of one parameter. None where no rank has one."""
    like = next((g for g in gradients if g is not None), None)
    if like is None:
        return None
    total: Tensor | None = None
    for g in gradients:
        rounded = (torch.zeros_like(like) if g is None else g).to(BF16).to(F32)
        total = rounded if total is None else total + rounded
    assert total is not None
    return total / torch.full((), float(len(gradients)), device=like.device)  # on GPUs no product with an inverse


def gradient(i: int, p: Tensor, number: int, rank: int) -> Tensor:
    """One rank's gradient of parameter i: of any value, over forty binary orders of magnitude."""
    generator = torch.Generator().manual_seed(1_000_003 * number + 1009 * i + rank)
    exponents = torch.randint(-30, 10, p.shape, generator=generator)
    return (torch.randn(p.shape, generator=generator) * 2.0**exponents).to(p.device, p.dtype)


def awkward(n: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """n numbers, the second half of them normal draws. The first half have any bits: all orders of magnitude, halves
    between two numbers of bfloat16, zeros of both signs, denormals, infinities and NaNs."""
    integer = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    info = torch.iinfo(integer)
    patterns = torch.randint(info.min, info.max, (n,), generator=generator, dtype=torch.int64)
    if dtype == F32:
        low = torch.tensor([0x8000, 0x7FFF, 0x8001, 0])[torch.randint(4, (n,), generator=generator)]
        near_half = torch.rand(n, generator=generator) < 0.5
        patterns = torch.where(near_half, (patterns & ~0xFFFF) | low, patterns)
    patterns[::17] = 0
    patterns[1::17] = info.min  # -0.0
    normal = torch.randn(n, generator=generator).to(dtype).view(integer)
    return torch.where(torch.arange(n) < n // 2, patterns.to(integer), normal).view(dtype)


def assert_same_numbers(got: Tensor, expected: Tensor, what: str) -> None:
    """The same bits, but for those of a NaN."""
    assert torch.equal(got.isnan(), expected.isnan()), what
    assert_same_bits(got.nan_to_num(1.5, torch.inf, -torch.inf), expected.nan_to_num(1.5, torch.inf, -torch.inf), what)


class Twins:
    """Parameters under ShardedLion, and copies under Lion, which is given the averages that the definition says.

    Args:
        dtypes: of the parameters, over and over.
        options: of both optimizers.
        sharding: options of ShardedLion alone.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        dtypes: Sequence[torch.dtype] = (F32,),
        options: dict[str, Any] | None = None,
        shapes: Sequence[tuple[int, ...]] = SHAPES,
        **sharding: Any,
    ) -> None:
        self.rank, self.world_size = rank, world_size
        device = device_of(rank, world_size)
        generator = torch.Generator().manual_seed(5)
        self.params: list[nn.Parameter] = []
        self.copies: list[nn.Parameter] = []
        for i, shape in enumerate(shapes):
            value = torch.randn(shape, generator=generator).to(device, dtypes[i % len(dtypes)])
            if value.dim() == 4:
                value = value.contiguous(memory_format=torch.channels_last)
            self.params.append(nn.Parameter(value.clone()))
            self.copies.append(nn.Parameter(value.clone()))
            self.copies[-1].grad_dtype = F32  # averages of 16-bit gradients are float32
        kwargs: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, **(options or {})}
        self.sharded = ShardedLion(self.params, **kwargs, **{"bucket_mb": TINY, "reduce_dtype": BF16, **sharding})
        self.lion = Lion(self.copies, **kwargs)
        self.local: list[dict[int, Tensor]] = [{} for _ in range(world_size)]  # what lies in p.grad, of every rank
        self.left: list[dict[int, Tensor] | None] = [None] * world_size  # what has left in this interval's round
        self.sums: dict[int, Tensor] = {}
        self.has_sums = False

    # Passes -------------------------------------------------------------------------------------

    def loss(self, number: int, uses: Sequence[int]) -> Tensor:
        terms = [(self.params[i] * gradient(i, self.params[i], number, self.rank)).sum().float() for i in uses]
        return torch.stack(terms).sum()

    def backward(self, number: int, uses: Sequence[Sequence[int]], sync: bool = True) -> None:
        """A pass in which rank r uses the parameters ``uses[r]``."""
        with nullcontext() if sync else self.sharded.no_sync():
            if uses[self.rank]:
                self.loss(number, uses[self.rank]).backward()
        for rank, of_rank in enumerate(uses):
            for i in of_rank:
                g, own = gradient(i, self.params[i], number, rank), self.local[rank]
                own[i] = own[i] + g if i in own else g
            if of_rank and sync and self.left[rank] is None:
                self.left[rank], self.local[rank] = self.local[rank], {}

    def _average(self, gradients: Sequence[dict[int, Tensor]]) -> None:
        """A round: averages replace those of the last accumulation, or are added to what there is."""
        for i, p in enumerate(self.params):
            average = average_of([own.get(i) for own in gradients])
            if self.has_sums and i in self.sums:
                self.sums[i] = self.sums[i] + (torch.zeros_like(self.sums[i]) if average is None else average)
            elif average is not None:
                self.sums[i] = torch.zeros_like(p, dtype=F32) + average if self.has_sums else average
        self.has_sums = True

    def reduce(self) -> None:
        """What step() and clip_grad_norm_() do first."""
        first = [own if left is None else left for own, left in zip(self.local, self.left, strict=True)]
        late = [{} if left is None else own for own, left in zip(self.local, self.left, strict=True)]
        self._average(first)
        if any(late):
            self._average(late)
        self.local = [{} for _ in self.local]
        self.left = [None] * self.world_size
        for i, copy in enumerate(self.copies):
            copy.grad = self.sums[i].clone() if i in self.sums else None

    # Steps --------------------------------------------------------------------------------------

    def step(self, what: str, clip: float | None = None, zero: bool = True) -> None:
        self.reduce()
        if clip is not None:
            grads = [p.grad for p in self.copies if p.grad is not None]
            norm, scale = reference.clip_coefficient(torch.stack([*map(reference.sum_of_squares, grads)]).sum(), clip)
            assert_same_bits(self.sharded.clip_grad_norm_(clip), norm, f"{what}: norm")
            for g in grads:
                g.mul_(scale)
        self.sharded.step()
        self.lion.step()
        for i, (p, copy) in enumerate(zip(self.params, self.copies, strict=True)):
            assert_same_bits(p, copy, f"{what}: parameter {i}")
        if zero:
            self.zero()

    def zero(self) -> None:
        self.sharded.zero_grad()
        self.sums, self.has_sums = {}, False

    def finish(self) -> None:
        """All state too."""
        got, expected = self.sharded.full_state_dict()["state"], self.lion.state_dict()["state"]
        for i, entry in expected.items():
            assert list(got[i]) == list(entry)
            for name, t in entry.items():
                assert_same_bits(got[i][name], t.cpu(), f"{name} of parameter {i}")
        self.sharded.check_replicas()


def train(twins: Twins, clip: bool) -> None:
    """Every way that a gradient may take."""
    ranks = range(twins.world_size)
    everywhere = [ALL] * twins.world_size

    def parts(salt: int) -> list[list[int]]:
        """Other parameters on every rank; of some no rank has a gradient."""
        return [[i for i in ALL if (i * 7 + r * 3 + salt) % 5 < 2 and i != 4] or [0] for r in ranks]

    twins.backward(1, everywhere)
    twins.step("plain")
    twins.backward(2, parts(0))
    twins.step("parts", 5.0 if clip else None)
    for number in (3, 4):
        twins.backward(number, parts(number), sync=False)
    twins.backward(5, parts(5))
    twins.step("no_sync")
    twins.backward(6, parts(6), sync=False)
    twins.step("no_sync alone", 0.5 if clip else None)
    for number in (7, 8, 9):
        twins.backward(number, everywhere if number == 7 else parts(number))
    twins.step("several passes", zero=False)
    twins.backward(10, parts(3))
    twins.step("not zeroed", 2.0 if clip else None, zero=False)
    twins.step("the same once more")
    twins.backward(11, [ALL if r == twins.world_size - 1 else [] for r in ranks])
    twins.step("of one rank")
    twins.finish()


Case = tuple[tuple[torch.dtype, ...], str, float]
CASES: list[Case] = [((F32,), "signs", TINY), ((BF16,), "params", FEW), ((BF16, F32, F16), "signs", ONE)]


def body_cases(
    rank: int, world_size: int, cases: Sequence[Case], options: Sequence[dict[str, Any]], clip: bool = True
) -> None:
    for dtypes, sync, bucket_mb in cases:
        for own in options:
            what = f"{dtypes}, {sync}, bucket_mb={bucket_mb}, {own}"
            try:
                train(Twins(rank, world_size, dtypes, own, param_sync=sync, bucket_mb=bucket_mb), clip)
            except Exception as error:
                raise AssertionError(what) from error


def body_hybrid(rank: int, world_size: int, replicas: int, shards: int) -> None:
    """ShardedLion between nodes. A model without ShardedLion says what FSDP2 gives to it; the gradients of its replicas
    are averaged as the definition says."""
    mesh, device = mesh_of(replicas, shards), device_of(rank, world_size)
    group = mesh["replicate"].get_group()

    def model(seed: int) -> Any:
        torch.manual_seed(seed)
        blocks = [nn.Sequential(nn.Linear(n, m), nn.Tanh()) for n, m in pairwise((19, 129, 127, 3))]
        net = nn.Sequential(*blocks).to(device)
        for block in net:
            fully_shard(block, mesh=mesh["shard"])
        return fully_shard(net, mesh=mesh["shard"])

    net, other = model(mesh.get_local_rank("replicate")), model(0)
    optimizer = ShardedLion(
        net.parameters(), lr=1e-2, weight_decay=0.1, process_group=group, reduce_dtype=BF16, bucket_mb=HYBRID_MB
    )
    lion = Lion(other.parameters(), lr=1e-2, weight_decay=0.1)
    sizes, unit = [p._local_tensor.numel() for p in net.parameters()], 128 * replicas
    padded = sum(-(-(n % unit) // 128) * 128 for n in sizes)  # tails, each at a multiple of 128
    numel = sum(n - n % unit for n in sizes) + -(-padded // unit) * unit
    for step in range(4):
        for micro_step in range(1 + step % 2):
            x = torch.randn(8, 19, generator=torch.Generator().manual_seed(100 * step + 10 * micro_step + rank))
            unsynced = bool(step % 2 and not micro_step)
            with optimizer.no_sync() if unsynced else nullcontext(), Counter(group) as counter:
                net(x.to(device)).square().mean().backward()
            assert sum(counter.bytes["all to all"]) == (0 if unsynced else 2 * numel)
            assert not counter.bytes["scatter"]
            other(x.to(device)).square().mean().backward()
        for p in other.parameters():
            own = p.grad._local_tensor
            of_replicas = [torch.empty_like(own) for _ in range(replicas)]
            dist.all_gather(of_replicas, own, group=group)
            average = average_of(of_replicas)
            assert average is not None
            own.copy_(average)
        optimizer.step()
        lion.step()
        optimizer.zero_grad()
        lion.zero_grad()
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            assert_same_bits(p._local_tensor, q._local_tensor, f"step {step}")
