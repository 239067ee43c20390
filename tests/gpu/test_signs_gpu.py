"""Signs on GPUs: the kernels against the rule, and over NCCL, where the host waits for nothing and hears of ranks that
disagree a little later."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lion_dist import ShardedLion
from lion_dist.sharding.layout import ShardLayout
from lion_dist.sharding.replicas import DeferredCheck, bits_checksum
from lion_dist.update import reference
from lion_dist.update.hypers import hyper_table
from lion_dist.update.lion_update import LionUpdate
from lion_dist.update.reference import HyperParameters
from lion_dist.update.segments import TILE, Segment, StepTensors
from lion_dist.update.state import EXP_AVG
from tests.asserts import assert_same_bits, bits
from tests.harness import device_of
from tests.scenarios.exchanged_signs import ExchangedSigns
from tests.scenarios.hostile import equals
from tests.scenarios.mixes import MIXES, name
from tests.scenarios.replicas import Trained, other_lr
from tests.scenarios.toy import BF16 as ALL_BF16
from tests.scenarios.toy import FP32 as ALL_FP32

from .common import F32, GPU, SHIFTS, Guarded, awkward, needs_gpu, no_host_synchronisation, reference_step, run_on_gpus

SALT = 1 << 62 | 777

# -- The kernels, on ranks of one process and one GPU


class Ranks:
    """Replicas at odd addresses, other ones on each simulated rank, and of each a shard of the momentum; and what the
    rule in plain torch makes of the whole, on the GPU and on the CPU."""

    # Around a byte, an alignment, a block, a tile; heads alone for 2 and 3 ranks (6 * 1024), and tails of all lengths.
    SIZES = (0, 1, 3, 5, 127, 129, 1023, 6 * 1024, TILE + 1, 3 * TILE + 131, 8)

    def __init__(self, mix: tuple[torch.dtype, ...], world_size: int) -> None:
        self.mix, self.world_size = mix, world_size
        self.generator = torch.Generator().manual_seed(1)
        self.layout = layout = ShardLayout.make(self.SIZES, world_size)
        self.groups = [i % 4 for i in range(len(self.SIZES))]
        p, m = ([awkward(n, dtype, self.generator) for n in self.SIZES] for dtype in (mix[0], mix[2]))
        self.expected = [([t.to(d) for t in p], [t.to(d) for t in m]) for d in (GPU, torch.device("cpu"))]
        for ps, ms in self.expected[1:]:  # on the CPU .to() made no copy
            ps[:], ms[:] = [t.clone() for t in ps], [t.clone() for t in ms]
        self.replicas = [
            [Guarded(t, SHIFTS[(i + r) % len(SHIFTS)][0]) for i, t in enumerate(p)] for r in range(world_size)
        ]
        self.shards = [Guarded(self.cut(m, r), 0) for r in range(world_size)]
        slices = [[(s.param, s.start, s.offset, s.length) for s in layout.slices(r)] for r in range(world_size)]
        self.updates = [ExchangedSigns(LionUpdate(None), layout.shard_numel, r, slices, GPU) for r in range(world_size)]

    def cut(self, whole: Sequence[Tensor], rank: int) -> Tensor:
        shard = torch.full((self.layout.shard_numel,), 77.0, dtype=whole[0].dtype, device=whole[0].device)
        for s in self.layout.slices(rank):
            shard[s.offset : s.offset + s.length] = whole[s.param][s.start : s.start + s.length]
        return shard

    def step(self, hypers: list[HyperParameters], inactive: Sequence[int], scale: float | None, flat: bool) -> None:
        """Gradients as in stage 1, at odd addresses, or ``flat`` as in stage 2, where inactive ones are garbage."""
        drawn = [awkward(n, self.mix[1], self.generator) for n in self.SIZES]
        grads = [None if i in inactive else g for i, g in enumerate(drawn)]
        active = torch.tensor([g is not None for g in grads] + [True] * 3).to(GPU, torch.uint8)
        grad_scale = None if scale is None else torch.tensor(scale, device=GPU)
        columns = []
        for r in range(self.world_size):
            params = [p.at for p in self.replicas[r]]
            if flat:
                given: list[Tensor | None] = [Guarded(self.cut(drawn, r), 0).at] * len(params)
            else:
                given = [
                    None if g is None else Guarded(g, SHIFTS[(i + r) % len(SHIFTS)][1]).at for i, g in enumerate(grads)
                ]
            segments = [
                Segment(s.param, s.start, s.offset if flat else s.start, s.offset, s.length)
                for s in self.layout.slices(r)
            ]
            columns.append(
                StepTensors(params, given, {EXP_AVG: [self.shards[r].at] * len(params)}, self.groups, segments, active)
            )
        before = [[bits(p.at) for p in replica] for replica in self.replicas]
        for update, own in zip(self.updates, columns, strict=True):
            update.pack(own, hypers, grad_scale, SALT)
        for replica, old in zip(self.replicas, before, strict=True):
            assert all(torch.equal(bits(p.at), b) for p, b in zip(replica, old, strict=True)), "pack wrote a parameter"
        for a, update in enumerate(self.updates):
            for other in self.updates:
                other.rows[a] = update.rows[a]
        want = int(reference.hyper_checksum(hyper_table(hypers, GPU), SALT, grad_scale))
        assert self.updates[0].numbers.tolist() == [want] * self.world_size
        for agree in (False, True):
            for replica, old in zip(self.replicas, before, strict=True):
                assert all(torch.equal(bits(p.at), b) for p, b in zip(replica, old, strict=True)), "without agreement"
            for update, own in zip(self.updates, columns, strict=True):
                update.apply(own, torch.tensor(agree, device=GPU))
        for params, exp_avgs in self.expected:
            of_device = [None if g is None else g.to(params[0].device) for g in grads]
            reference_step(params, of_device, exp_avgs, self.groups, hypers, scale)

    def check(self, when: str) -> None:
        for where, (params, exp_avgs) in zip(("GPU", "CPU"), self.expected, strict=True):
            for r, replica in enumerate(self.replicas):
                what = f"{when}, rank {r}, reference on the {where}"
                for i, (p, want) in enumerate(zip(replica, params, strict=True)):
                    assert_same_bits(p.at.to(want.device), want, f"parameter {i}, {what}")
                shard = self.shards[r].at
                assert_same_bits(shard.to(exp_avgs[0].device), self.cut(exp_avgs, r), f"momentum, {what}")
        for guarded in [g for replica in self.replicas for g in replica] + self.shards:
            guarded.assert_guards_hold()


@needs_gpu
@pytest.mark.parametrize("mix", MIXES, ids=name)
def test_kernels_give_the_references_bits(mix: tuple[torch.dtype, ...]) -> None:
    """Four groups, as in test_step_gpu: one of them an lr tensor that maximizes, one of lr = 0, a float64 tensor."""
    for world_size in (1, 2, 3):
        ranks = Ranks(mix, world_size)
        lr32, lr64 = torch.tensor(0.0, device=GPU), torch.tensor([0.0], dtype=torch.float64, device=GPU)
        for number, (inactive, scale) in enumerate([((), None), ((1, 7, 8), 0.37), ((9,), 1e-38), ((), 1e38)]):
            lr32.fill_(0.03 / (1 + number))
            lr64.fill_(0.07 / (2 + number))
            hypers = [
                HyperParameters(1e-3 * (1 + number), 0.1, 0.9, 0.99, False),
                HyperParameters(lr32, 0.3, 0.95, 0.98, True),
                HyperParameters(0.0, 0.2, 0.9, 0.99, False),
                HyperParameters(lr64, 10.0, 0.0, 0.5, False),
            ]
            ranks.step(hypers, inactive, scale, flat=number % 2 == 1)
            ranks.check(f"{world_size} ranks, step {number}")


@needs_gpu
def test_tensors_without_elements() -> None:
    update = ExchangedSigns(LionUpdate(None), 0, 0, [[]], GPU)
    p = torch.zeros(0, 3, device=GPU)
    columns = StepTensors([p], [torch.zeros_like(p)], {EXP_AVG: [torch.zeros(0, device=GPU)]}, [0], [])
    hypers = [HyperParameters(0.1, 0.0, 0.9, 0.99, False)]
    update.pack(columns, hypers, None, SALT)
    update.apply(columns, torch.tensor(True, device=GPU))
    assert int(update.numbers[0]) == int(reference.hyper_checksum(hyper_table(hypers, GPU), SALT))


def calls_until_told(slow: bool) -> int:
    """Steps that are begun until one of them raises for the first."""
    comparison = DeferredCheck()
    numbers = torch.tensor([[1, 0], [1, 0], [2, 0]], device=GPU)[:, 0]
    for call in range(10):
        try:
            if slow:
                torch.cuda._sleep(50_000_000)
            agree = comparison.compare(numbers, partial("call {}".format, call))
            if not slow:
                torch.cuda.synchronize()
            comparison.check()
        except ValueError as error:
            message = str(error)
            break
        assert agree.is_cuda
        assert not agree
    assert message.startswith("ranks [2] of the group")
    assert "call 0" in message
    assert not comparison._pending
    return call


@needs_gpu
def test_a_mismatch_raises_a_few_calls_later() -> None:
    """Not when the device happens to be done with it: that of another rank may not be, and all must raise in the
    same call. Nor is it waited for at once."""
    assert calls_until_told(slow=False) == calls_until_told(slow=True) >= 1


@needs_gpu
def test_checksums_are_those_of_the_cpu() -> None:
    for n in (0, 1, 129, (1 << 22) + 77):
        for dtype in (F32, torch.bfloat16, torch.float16):
            t = awkward(n, dtype, torch.Generator().manual_seed(n))
            assert int(bits_checksum(t.to(GPU))) == int(bits_checksum(t))


# -- Over NCCL


def body_200_steps(rank: int, world_size: int) -> None:
    for dtypes in (ALL_FP32, ALL_BF16):
        equals(rank, world_size, dtypes, steps=200)


@needs_gpu
def test_200_steps_equal_params_and_lion(tmp_path: Path) -> None:
    run_on_gpus(body_200_steps, 2, tmp_path)


class Life:
    """Two stages of one model each, layers in float32 and in bfloat16; every step has an lr of its own. One layer is
    left out: by every rank in stage 1, by the last alone in stage 2."""

    def __init__(self, rank: int, world_size: int, sync: str = "signs") -> None:
        self.left_out = [{1}, {1} if rank == world_size - 1 else set()]
        self.device = device_of(rank, world_size)
        torch.manual_seed(0)
        self.lr = torch.tensor(1e-3, device=self.device)
        self.models, self.optimizers = [], []
        for stage in (1, 2):
            layers = [nn.Sequential(nn.Linear(301, 301), nn.LayerNorm(301)) for _ in range(4)]
            layers = [layer.to(self.device, (F32, torch.bfloat16)[i % 2]) for i, layer in enumerate(layers)]
            model = nn.ModuleList(layers)
            decayed = [p for p in model.parameters() if p.dim() > 1]
            rest = [p for p in model.parameters() if p.dim() == 1]
            groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "lr": self.lr}]
            self.models.append(model)
            self.optimizers.append(ShardedLion(groups, lr=1e-3, stage=stage, param_sync=sync, bucket_mb=0.5))
        self.x = torch.randn(16, 301, device=self.device)

    def step(self) -> None:
        self.lr.mul_(0.999)
        for model, optimizer, left_out in zip(self.models, self.optimizers, self.left_out, strict=True):
            optimizer.param_groups[0]["lr"] *= 0.999
            x = self.x
            layer: Any
            for i, layer in enumerate(model):
                if i not in left_out:
                    x = layer(x.to(layer[0].weight.dtype))
            x.float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()


def body_no_host_synchronisation(rank: int, world_size: int) -> None:
    for sync in ("signs", "params"):
        no_waiting(rank, world_size, sync)


def no_waiting(rank: int, world_size: int, sync: str) -> None:
    life = Life(rank, world_size, sync)
    for _ in range(3):  # learns the order, and compares gradients in stage 1: for both the host waits
        life.step()
    torch.cuda.synchronize()
    with no_host_synchronisation():
        for _ in range(3):
            life.step()
    # Nor by a call that the debug mode does not know: with the device held up, the host runs ahead of it.
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)
    held_up = torch.cuda.Event()
    held_up.record()
    life.step()
    life.step()
    assert not held_up.query()
    torch.cuda.synchronize()
    for optimizer in life.optimizers:
        optimizer.check_replicas()


@needs_gpu
def test_no_host_synchronisation(tmp_path: Path) -> None:
    run_on_gpus(body_no_host_synchronisation, 2, tmp_path)


def body_no_growth(rank: int, world_size: int) -> None:
    """Neither device memory, nor pinned memory (which is compared), nor the comparisons that wait grow."""
    life = Life(rank, world_size)
    for _ in range(20):
        life.step()

    def sizes() -> tuple[int, int, int]:
        torch.cuda.synchronize()
        pinned = torch.cuda.host_memory_stats()["allocated_bytes.current"]
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), pinned

    seen = [sizes()]
    for _ in range(4):
        for _ in range(50):
            life.step()
        seen.append(sizes())
    assert len({(allocated, reserved) for allocated, reserved, _ in seen}) == 1, seen
    # Pinned blocks come back when an event has passed: as many are in use as steps are under way.
    assert seen[-1][2] <= seen[1][2] * 2, seen
    life.step()
    for optimizer in life.optimizers:
        assert len(optimizer._deferred._pending) <= DeferredCheck.LAG


@needs_gpu
def test_no_growth_of_memory(tmp_path: Path) -> None:
    run_on_gpus(body_no_growth, 2, tmp_path)


def body_caught(rank: int, world_size: int, stage: int, sync: str) -> list[str]:
    """The outcome of every step is there before the next."""
    trained = Trained(rank, world_size, stage, sync)
    for _ in range(3):
        trained.step()
    torch.cuda.synchronize()
    weights = [bits(p) for p in trained.params]
    kept = trained.optimizer.param_groups[0]["lr"]
    if rank == 1:
        other_lr(trained.optimizer.param_groups[0])
    said = []
    for _ in range(4):
        try:
            trained.step()
        except ValueError as error:
            said.append(str(error))
            trained.optimizer.zero_grad()
        torch.cuda.synchronize()
        assert all(torch.equal(bits(p), b) for p, b in zip(trained.params, weights, strict=True)), "a weight moved"
    assert said, "not caught in four steps"
    trained.optimizer.param_groups[0]["lr"] = kept
    with pytest.raises(ValueError, match=r"ranks \[1\] of the group"):  # what was launched after the one that was told
        trained.optimizer.resync()
    for _ in range(3):
        trained.step()
    trained.optimizer.check_replicas()
    assert not any(torch.equal(bits(p), b) for p, b in zip(trained.params, weights, strict=True))
    return said


@needs_gpu
@pytest.mark.parametrize(("stage", "sync"), [(1, "signs"), (2, "signs"), (2, "params")])
def test_another_lr_is_caught(stage: int, sync: str, tmp_path: Path) -> None:
    first, second = run_on_gpus(body_caught, 2, tmp_path, (stage, sync))
    assert len(first) == len(second)
    for message in first + second:
        assert message.startswith("ranks [1] of the group")


def body_uneven_hosts(rank: int, world_size: int) -> int:
    """The first rank's host is slow and knows the outcome of every step before it makes the next; the other's is
    ahead of its device. Returns the step that raised."""
    trained = Trained(rank, world_size, stage=1)
    for _ in range(3):
        trained.step()
    torch.cuda.synchronize()
    torch.distributed.barrier()
    if rank == 1:
        other_lr(trained.optimizer.param_groups[0])
    for number in range(12):
        if rank == 0:
            time.sleep(0.1)
        else:
            torch.cuda._sleep(100_000_000)  # 50 ms or more
        try:
            trained.step()
        except ValueError:
            return number
    return -1


@needs_gpu
def test_all_ranks_raise_in_the_same_step(tmp_path: Path) -> None:
    """Or one has collectives under way that the other takes no part in, and what follows meets the wrong ones."""
    first, second = run_on_gpus(body_uneven_hosts, 2, tmp_path)
    assert first == second
    assert first >= 0
