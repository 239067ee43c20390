"""ShardedLion over FSDP2: bad input is named on every rank before anything is changed; ranks that differ; bytes."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d as c10d
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, fully_shard

from lion_dist import Lion, ShardedLion, clip_grad_norm_
from lion_dist.sharding import flag_exchange
from lion_dist.sharding.exchange import FOOTER
from tests.asserts import bits, momentum_parts
from tests.harness import device_of, run_ranks, spawn_only
from tests.scenarios.hybrid import Case, HybridToy, Twins, local, mesh_of, refused, shard_
from tests.scenarios.pair import SHORT, Fails, OwnError
from tests.scenarios.passes import TINY
from tests.scenarios.wire import Counter


def body_bad_groups(rank: int, world_size: int) -> None:
    device, mesh = device_of(rank, world_size), mesh_of(2, 2)
    turned = DeviceMesh(device.type, [[0, 1], [3, 2]], mesh_dim_names=("replicate", "shard"))
    alone = mesh_of(4, 1)
    replicas, shards = mesh["replicate"].get_group(), mesh["shard"].get_group()
    world = dist.group.WORLD
    assert world is not None
    advice = r'(?s)fully_shard\(model, mesh=mesh\["shard"\]\).*process_group=mesh\["replicate"\]\.get_group\(\)'

    def refuse(
        model: Any, kind: type[Exception], match: str, group: dist.ProcessGroup = replicas, stages: tuple = (1, 2)
    ) -> None:
        for stage in stages:
            with refused(model, kind, match):
                ShardedLion(model.named_parameters(), process_group=group, stage=stage)

    seed = mesh.get_local_rank("replicate")  # or nothing could move
    refuse(shard_(HybridToy(device, seed=seed), mesh["shard"]), ValueError, advice, world)
    refuse(shard_(HybridToy(device, seed=seed), mesh["shard"]), ValueError, advice, shards)
    refuse(shard_(HybridToy(device, seed=seed), mesh), ValueError, advice, replicas, (2,))
    refuse(shard_(HybridToy(device, seed=seed), mesh), ValueError, advice, world)
    flat: Any = FullyShardedDataParallel(HybridToy(device, seed=seed), shards, use_orig_params=True, device_id=device)
    refuse(flat, TypeError, "flat parameter of FSDP1")
    # One unit is sharded over the replicas themselves.
    model = HybridToy(device, seed=seed)
    fully_shard(model.units["second"], mesh=mesh["replicate"])
    refuse(model, ValueError, advice)
    # Replicas whose shards differ: in their number, and in their order.
    differ = r"(?s)ShardedLion\(\).*of which this rank holds shape"
    own = mesh["shard"] if rank < 2 else alone["shard"]
    refuse(shard_(HybridToy(device), own), ValueError, differ)
    refuse(shard_(HybridToy(device), turned["shard"]), ValueError, differ)


def body_offloaded(rank: int, world_size: int) -> None:
    """Among CPUs nothing is offloaded."""
    device, mesh = device_of(rank, world_size), mesh_of(2, 2)
    model = shard_(HybridToy(device), mesh["shard"], offload_policy=CPUOffloadPolicy(pin_memory=device.type == "cuda"))
    if device.type == "cuda":
        with refused(model, ValueError, "CPUOffloadPolicy"):
            ShardedLion(model.parameters(), process_group=mesh["replicate"].get_group())


def body_late(rank: int, world_size: int) -> None:
    """Sharded once the optimizer was made, which then has no parameters that get gradients."""
    device, mesh = device_of(rank, world_size), mesh_of(2, 2)
    model = HybridToy(device)
    optimizer = ShardedLion(model.parameters(), process_group=mesh["replicate"].get_group())
    shard_(model, mesh["shard"])
    model(0, rank, world_size).backward()
    before = [bits(local(p)) for p in model.parameters()]
    with pytest.warns(UserWarning, match="make the optimizer after that"):
        optimizer.step()
    assert all(torch.equal(bits(local(p)), b) for p, b in zip(model.parameters(), before, strict=True))


def body_bad_input(rank: int, world_size: int) -> None:
    body_bad_groups(rank, world_size)
    body_offloaded(rank, world_size)
    body_late(rank, world_size)


def test_bad_groups(tmp_path: Path) -> None:
    run_ranks(body_bad_input, 4, tmp_path, on_cpu=True)


# Between a backward and its step --------------------------------------------------------------------


def scale_by_hand(model: nn.Module) -> None:
    for p in model.parameters():
        if p.grad is not None:
            p.grad.mul_(0.5)


def clip_norm(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def clip_norm_as_for_lion(model: nn.Module) -> None:
    clip_grad_norm_(model.parameters(), 1.0)


def clip_value(model: nn.Module) -> None:
    nn.utils.clip_grad_value_(model.parameters(), 1.0)


def body_tampered(rank: int, world_size: int) -> None:
    """An error instead of a step with gradients that were not changed; and zero_grad() makes all well."""
    twins = Twins(Case(use="all"), mesh_of(2, 2))
    step = 0

    def backward() -> None:
        twins.model(step + 50, rank, world_size).backward()

    for tamper in (scale_by_hand, clip_norm, clip_norm_as_for_lion, clip_value):
        for call in (twins.optimizer.step, lambda: twins.optimizer.clip_grad_norm_(1.0)):
            backward()
            tamper(twins.model)
            with refused(twins.model, RuntimeError, r"ShardedLion's own clip_grad_norm_"):
                call()
            twins.optimizer.zero_grad()
            twins.step(step := step + 1)
            twins.check(f"after {tamper.__name__}")
    backward()
    scale_by_hand(twins.model)
    with refused(twins.model, RuntimeError, r"ShardedLion's own clip_grad_norm_"):
        backward()  # after which FSDP2 cannot go on


def body_sentinel_first(rank: int, world_size: int) -> None:
    """The smallest parameter, by which changes are noticed, is of the last module, so that its gradient comes first."""
    device, mesh = device_of(rank, world_size), mesh_of(2, 2)
    for tamper in (zero_in_place, scale_by_hand, clip_norm):
        torch.manual_seed(0)
        model: Any = nn.Sequential(nn.Linear(8, 30), nn.Tanh(), nn.Linear(30, 8, bias=False), nn.RMSNorm(8)).to(device)
        for layer in (model[0], model[2], model[3], model):
            fully_shard(layer, mesh=mesh["shard"])
        optimizer = ShardedLion(model.named_parameters(), process_group=mesh["replicate"].get_group(), bucket_mb=TINY)
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(rank)).to(device)

        def backward(model: Any = model, x: Tensor = x) -> None:
            model(x).square().mean().backward()

        def backward_and_step(optimizer: ShardedLion = optimizer) -> None:
            backward()
            optimizer.step()

        backward_and_step()  # which learns in which order gradients come
        optimizer.zero_grad()
        backward()
        if tamper is zero_in_place:
            optimizer.step()
        tamper(model)
        with refused(model, RuntimeError, r"ShardedLion's own clip_grad_norm_"):
            backward_and_step()


def zero_in_place(model: nn.Module) -> None:
    model.zero_grad(set_to_none=False)


def body_zeroed_by_model(rank: int, world_size: int) -> None:
    """There is nothing to step, nor what a later backward would be added to."""
    for sync in ("signs", "params"):
        twins = Twins(Case(sync=sync), mesh_of(2, 2))
        twins.step(0)
        twins.model(50, rank, world_size).backward()
        twins.model.zero_grad()
        twins.optimizer.step()
        twins.check("nothing to step")
        twins.model(51, rank, world_size).backward()
        twins.model.zero_grad()
        twins.step(1)
        twins.check("a backward after the zeroing")


def body_between(rank: int, world_size: int) -> None:
    body_zeroed_by_model(rank, world_size)
    body_tampered(rank, world_size)


def test_sentinel_whose_gradient_comes_first(tmp_path: Path) -> None:
    run_ranks(body_sentinel_first, 4, tmp_path)


def test_gradients_changed_before_the_step(tmp_path: Path) -> None:
    run_ranks(body_between, 4, tmp_path)


# Ranks that differ -----------------------------------------------------------------------------------


def twins_for_failures(case: Case) -> Twins:
    """DeviceMesh makes groups that wait for half an hour, whatever the default group's time-out."""
    mesh = mesh_of(2, 2)
    for dimension in ("replicate", "shard"):
        c10d._set_pg_timeout(SHORT, mesh[dimension].get_group())
    return Twins(case, mesh)


def body_no_sync_left_out(rank: int, world_size: int, waits: bool) -> float:
    """By rank 1, in the first of two passes. Where the host waits for gradients that come late, as on CPUs, the sum is
    right all the same; elsewhere every rank ends with an error, those of the other group in FSDP2."""
    twins = twins_for_failures(Case(use="all"))
    twins.step(0)
    start = time.monotonic()

    def passes(step: int) -> None:
        with nullcontext() if rank == 1 else twins.optimizer.no_sync():
            twins.model(step, rank, world_size).backward()
        twins.model(step + 30, rank, world_size).backward()
        twins.optimizer.step()
        twins.optimizer.zero_grad()

    def several() -> None:
        for step in range(1, 5):
            passes(step)

    if waits:
        passes(1)
        for name, p in twins.single.named_parameters():
            found = [twins.single.average_gradient(name, step, world_size) for step in (1, 31)]
            p.grad = None if found[0] is None or found[1] is None else found[0] + found[1]
        twins.single_lion.step()
        twins.hsdp = None
        twins.check("no_sync left out")
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(flag_exchange, "WAITING_DEVICES", frozenset())
            with pytest.raises(RuntimeError, match=r"Did a rank leave out a step\(\)" if rank == 1 else ""):
                several()
    return time.monotonic() - start


def body_one_raises(rank: int, world_size: int) -> float:
    """Rank 1, in its backward, once some of its gradients have left. Rank 3 is in its group, and the others wait for
    them in FSDP2."""
    twins = twins_for_failures(Case(use="all"))
    twins.step(0)
    params = list(twins.model.parameters())
    before = [bits(local(p)) for p in params]
    if rank == 1:
        twins.model.units["second"].register_forward_hook(lambda _, __, out: Fails.apply(out, OwnError))
    start = time.monotonic()

    def train() -> None:
        twins.model(1, rank, world_size).backward()
        twins.optimizer.step()

    with pytest.raises(OwnError if rank == 1 else RuntimeError, match="of this rank's own" if rank == 1 else ""):
        train()
    with pytest.raises(RuntimeError, match=r"can no longer be used|a collective of ShardedLion failed"):
        twins.optimizer.step()
    for p, b in zip(params, before, strict=True):
        assert torch.equal(bits(local(p)), b)
    return time.monotonic() - start


def body_unfrozen_unlike(rank: int, world_size: int) -> None:
    """On one replica only. Where the host waits, as on CPUs, every rank refuses the step before a collective fails."""
    for waits in (True, False):
        twins = twins_for_failures(Case())
        twins.step(0)  # learns the order of gradients, for which the host waits
        twins.step(1)
        frozen = twins.model.get_parameter("units.first.frozen")
        frozen.requires_grad_(rank >= 2)
        twins.model(2, rank, world_size).backward()
        with pytest.MonkeyPatch.context() as patch:
            if not waits:
                patch.setattr(flag_exchange, "WAITING_DEVICES", frozenset())
            kind, match = (ValueError, r"after unfreezing.*requires_grad") if waits else (RuntimeError, "were unfrozen")
            with refused(twins.model, kind, match):
                twins.optimizer.step()


@spawn_only
@pytest.mark.parametrize("waits", [True, False])
def test_no_sync_left_out(waits: bool, tmp_path: Path) -> None:
    seconds = run_ranks(body_no_sync_left_out, 4, tmp_path, (waits,), timeout=SHORT, on_cpu=True)
    assert max(seconds) < 5 * SHORT.total_seconds()


@spawn_only
def test_unfrozen_unlike(tmp_path: Path) -> None:
    run_ranks(body_unfrozen_unlike, 4, tmp_path, timeout=SHORT, on_cpu=True)


@spawn_only
def test_one_rank_raises(tmp_path: Path) -> None:
    seconds = run_ranks(body_one_raises, 4, tmp_path, timeout=SHORT, on_cpu=True)
    assert max(seconds) < 5 * SHORT.total_seconds()


# Bytes on the wire -----------------------------------------------------------------------------------


class Shapes(nn.Module):
    """A loss of which all gradients are a number. Over two shards: heads with and without tails, and nothing."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        shapes = [(40, 64), (33, 40), (3,), (1,)]
        self.params = nn.ParameterList(nn.Parameter(torch.zeros(s, device=device)) for s in shapes)

    def forward(self, factor: int) -> Tensor:
        return torch.stack([(p * factor).sum() for p in self.params]).sum()


def body_bytes(rank: int, world_size: int) -> list[int]:
    """As test_bytes_on_the_wire of test_signs.py, on the wire between the replicas alone: 4.25 bytes an element of the
    local shard, where HSDP sends 8. Returns the numbers of elements on this rank: of the parameters, of the momentum,
    and of the momentum under HSDP."""
    device, mesh = device_of(rank, world_size), mesh_of(2, 2)
    group = mesh["replicate"].get_group()
    replicas, unit = 2, 2 * 128
    for sync in ("params", "signs"):
        model: Any = fully_shard(Shapes(device), mesh=mesh["shard"])
        sizes = [local(p).numel() for p in model.parameters()]
        padded = sum(-(-(n % unit) // 128) * 128 for n in sizes)
        numel = sum(sizes) - sum(n % unit for n in sizes) + -(-padded // unit) * unit
        optimizer = ShardedLion(model.named_parameters(), lr=0.25, process_group=group, param_sync=sync)
        for step in range(3):
            with Counter(group) as counter:
                model(step + 1).backward()
                optimizer.step()
                optimizer.zero_grad()
            assert sum(counter.bytes["scatter"]) == 4 * numel
            first, *more = counter.bytes["gather"]
            if sync == "signs":
                assert (first, more) == (numel // 4 + replicas * FOOTER, [])
            else:
                assert (first, sum(more)) == (8 * replicas, 4 * numel)
            assert sum(counter.bytes["reduce"]) <= len(sizes) + 8
            assert not counter.bytes["broadcast"] or step == 0
        assert all((local(p) == -3 * 0.25).all() for p in model.parameters())
        kept = sum(part.numel() for part in momentum_parts(optimizer))
        assert kept <= numel // replicas
    hsdp: Any = fully_shard(Shapes(device), mesh=mesh)
    lion = Lion(hsdp.parameters(), lr=0.25)
    with Counter(group) as counter:
        hsdp(1).backward()
        lion.step()
    # FSDP2 pads the rows of a shard. An all-reduce sends its bytes twice: to the rank that adds, and back.
    rows = sum(-(-p.shape[0] // 2) * p[0].numel() for p in Shapes(device).params)
    assert 2 * sum(counter.bytes["reduce"]) == 8 * rows
    assert not counter.bytes["scatter"] + counter.bytes["gather"]
    return [sum(sizes), kept, sum(local(entry["exp_avg"]).numel() for entry in lion.state.values())]


def test_bytes_on_the_wire(tmp_path: Path) -> None:
    """Each rank keeps 1 / (replicas * shards) of the momentum, up to padding for alignment; under HSDP, 1 / shards."""
    on_ranks = run_ranks(body_bytes, 4, tmp_path)
    total = 40 * 64 + 33 * 40 + 3 + 1
    assert [sum(counts) for counts in zip(*on_ranks, strict=True)] == [2 * total, total, 2 * total]
    assert all(kept <= total // 4 + 3 * 128 for _, kept, _ in on_ranks)
