"""Ranks that are not alike find out, all of them, before a weight has moved: what each must have in common with the
others travels behind its signs, or before its parameters."""

from __future__ import annotations

import gc
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lion_dist import ShardedLion
from lion_dist.sharding.collectives import all_reduce_sum
from lion_dist.sharding.replicas import DeferredCheck
from tests.asserts import assert_same_bits, bits
from tests.harness import device_of, run_ranks, spawn_only
from tests.scenarios.replicas import Trained, other_lr, step_until_known

LR = 0.25


def other_decay(group: dict[str, Any]) -> None:
    group["weight_decay"] = 0.25


def other_betas(group: dict[str, Any]) -> None:
    group["betas"] = (0.9, 0.98)


def other_direction(group: dict[str, Any]) -> None:
    group["maximize"] = True


def body_disagree(rank: int, world_size: int) -> list[list[str]]:
    return [disagree(rank, world_size, stage, sync) for stage in (1, 2) for sync in ("signs", "params")]


def disagree(rank: int, world_size: int, stage: int, sync: str) -> list[str]:
    trained = Trained(rank, world_size, stage, sync)
    trained.step()
    said = []
    for number, change in enumerate((other_lr, other_decay, other_betas, other_direction)):
        odd = number % world_size  # the first rank among them
        group = trained.optimizer.param_groups[number % 2]
        kept = dict(group)
        if rank == odd:
            change(group)
        message = trained.refused()
        assert f"group {number % 2}: {{'lr': {group['lr']}" in message  # what this rank did
        said.append(message.split(" of the group")[0])
        group.update(kept)
        for _ in range(2):
            before = [bits(p) for p in trained.params]
            trained.step()
            assert all((bits(p) != b).any() for p, b in zip(trained.params, before, strict=True))
        trained.optimizer.check_replicas()
    return said


@pytest.mark.parametrize("world_size", [2, 3])
def test_other_hyper_parameters(world_size: int, tmp_path: Path) -> None:
    odd_ranks = [number % world_size for number in range(4)]
    # Where the first rank is the odd one, so are all others.
    expected = [f"ranks {[odd] if odd else list(range(1, world_size))}" for odd in odd_ranks]
    assert run_ranks(body_disagree, world_size, tmp_path) == [[expected] * 4] * world_size


def body_clipped_otherwise(rank: int, world_size: int) -> None:
    for stage in (1, 2):
        for sync in ("signs", "params"):
            clipped_otherwise(rank, world_size, stage, sync)


def clipped_otherwise(rank: int, world_size: int, stage: int, sync: str) -> None:
    trained = Trained(rank, world_size, stage, sync)
    trained.max_norm = 2.0
    trained.step()
    for usual, other in [(2.0, 2.0 * (1 + 2**-20)), (1e9, 0.5)]:
        trained.max_norm = other if rank == 1 else usual
        message = trained.refused()
        assert message.startswith("ranks [1] of the group made a step")
        assert f"clipped to max_norm {trained.max_norm}, by a factor of" in message
        trained.max_norm = usual
        trained.step()
    # Above the norm any max_norm is the same, as long as nothing is clipped by it.
    trained.max_norm = 1e9 * (1 + rank)
    trained.step()
    # Of NaN the coefficient is NaN everywhere, which is no difference.
    trained.gradients()
    for p in trained.params if stage == 1 else []:
        p.grad.fill_(torch.nan)  # type: ignore[union-attr]
    trained.optimizer.clip_grad_norm_(1.0)
    trained.optimizer.step()
    trained.optimizer.check_replicas()


def test_another_max_norm(tmp_path: Path) -> None:
    run_ranks(body_clipped_otherwise, 2, tmp_path)


def body_sums_in_another_order(rank: int, world_size: int) -> None:
    """Groups that hold other parts of the model may add up in other orders, and get sums that differ in their last
    bits (here by more, so that the coefficients differ). The ranks that step together clip by the same all the same."""
    others = dist.new_group([0]), dist.new_group([1])  # each rank alone

    def summed(tensor: torch.Tensor, group: dist.ProcessGroup) -> None:
        all_reduce_sum(tensor, group)
        if group is others[rank]:
            tensor.mul_(1 + rank * 2**-20)

    for stage in (1, 2):
        for sync in ("signs", "params"):
            trained = Trained(rank, world_size, stage, sync)
            for _ in range(3):
                trained.gradients()
                with pytest.MonkeyPatch.context() as monkeypatch:
                    monkeypatch.setattr("lion_dist.stepper.all_reduce_sum", summed)
                    norm = trained.optimizer.clip_grad_norm_(torch.pi, process_groups=[others[rank]])
                trained.optimizer.step()
                trained.optimizer.zero_grad()
                assert norm.item() > torch.pi
            assert all((p != 1).any() for p in trained.params)
            trained.optimizer.check_replicas()


def test_sums_in_another_order(tmp_path: Path) -> None:
    run_ranks(body_sums_in_another_order, 2, tmp_path)


def body_lr_tensors(rank: int, world_size: int) -> None:
    for sync in ("signs", "params"):
        lr_tensors(rank, world_size, sync)


def lr_tensors(rank: int, world_size: int, sync: str) -> None:
    """Read where they lie: on the device, or on the CPU."""
    trained = Trained(rank, world_size, 1, sync)
    group = trained.optimizer.param_groups[0]
    for device in {trained.device, torch.device("cpu")}:
        group["lr"] = torch.tensor(LR, device=device)
        trained.step()
        group["lr"].fill_(LR + (rank == 1) * 2**-24)
        assert "ranks [1]" in trained.refused()
        group["lr"].fill_(LR)
        trained.step()
    trained.optimizer.check_replicas()


def test_other_lr_tensors(tmp_path: Path) -> None:
    run_ranks(body_lr_tensors, 2, tmp_path)


def body_absent_gradients(rank: int, world_size: int) -> None:
    for sync in ("signs", "params"):
        absent_gradients(rank, world_size, sync)


def absent_gradients(rank: int, world_size: int, sync: str) -> None:
    """Stage 1, where a gradient is None on all ranks or on none. None on one rank; on two, of other parameters: of
    one part, and of two, whose flags alone are alike."""
    device = device_of(rank, world_size)
    a, b = (nn.Parameter(torch.ones(300, device=device)) for _ in range(2))
    c = nn.Parameter(torch.ones(300, device=device, dtype=torch.bfloat16))
    d = nn.Parameter(torch.ones(300, device=device, dtype=torch.bfloat16))
    params = [a, b, c, d]
    optimizer = ShardedLion(params, lr=LR, stage=1, param_sync=sync)
    for absent in ([a], []), ([], [c]), ([a], [b]), ([a, b], [c, d]), ([a], [c]), ([b, c], [b, d]):
        for p in params:
            p.grad = torch.ones_like(p)
        for p in absent[rank]:
            p.grad = None
        before = [bits(p) for p in params]
        with pytest.raises(ValueError, match=r"ranks \[1\]"):
            step_until_known(optimizer, device)
        assert all(torch.equal(bits(p), x) for p, x in zip(params, before, strict=True))
    for p in params:  # of which all ranks know: they are not stepped, and not refused
        p.grad = None if p is b else torch.ones_like(p)
    before = [bits(p) for p in params]
    optimizer.step()
    assert [torch.equal(bits(p), x) for p, x in zip(params, before, strict=True)] == [False, True, False, False]
    optimizer.check_replicas()


def test_gradients_absent_on_some_ranks(tmp_path: Path) -> None:
    run_ranks(body_absent_gradients, 2, tmp_path)


def body_skips(rank: int, world_size: int, scheduled: bool) -> list[str]:
    """Rank 1 leaves one step out, so that its later ones meet those before them. (On a GPU the last would not end.)"""
    p = nn.Parameter(torch.ones(300))
    optimizer = ShardedLion([p], lr=LR, stage=1, param_sync="signs")
    said = []
    for step in range(4):
        if scheduled:
            optimizer.param_groups[0]["lr"] = LR / (1 + step)
        if rank == 1 and step == 1:
            continue
        p.grad = torch.ones_like(p)
        try:
            optimizer.step()
            said.append("stepped")
        except (ValueError, RuntimeError) as error:
            said.append(f"{type(error).__name__}: {error}")
    return [*said, f"weight {p[0].item()}"]


@spawn_only
@pytest.mark.parametrize("scheduled", [False, True])
def test_a_skipped_step(scheduled: bool, tmp_path: Path) -> None:
    """Under a scheduler hyper-parameters do not fit; without, the steps that meet are alike, and so are the replicas
    that they leave. Either way the last is missed within the time-out."""
    first, second = run_ranks(body_skips, 2, tmp_path, (scheduled,), timeout=timedelta(seconds=2), on_cpu=True)
    assert first[0] == second[0] == "stepped"
    assert first[3].startswith("RuntimeError: a collective of ShardedLion failed")
    for said in (*first[1:3], *second[1:3]):
        assert said.startswith("ValueError: ranks [1]") if scheduled else said == "stepped"
    assert first[-1] == second[-1] == f"weight {1 - LR * (1 if scheduled else 3)}"


def body_fails_alone(rank: int, world_size: int) -> None:
    """A step that raises on one rank only, before its collective, and is repeated there: fine."""
    device = device_of(rank, world_size)
    p = nn.Parameter(torch.ones(300, device=device))
    optimizer = ShardedLion([p], lr=LR, stage=1, param_sync="signs")
    if rank == 1:
        p.grad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.tensor([1.0]), (300,), device=device)
        with pytest.raises(TypeError, match="sparse"):
            optimizer.step()
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert_same_bits(p, torch.full_like(p, 1 - LR))


def test_a_step_that_failed_alone_can_be_repeated(tmp_path: Path) -> None:
    run_ranks(body_fails_alone, 2, tmp_path)


def body_no_growth(rank: int, world_size: int) -> list[int]:
    """Returns by how many tensors this process grows in 40 steps."""
    growth = []
    for sync in ("signs", "params"):
        trained = Trained(rank, world_size, 2, sync)
        held = []
        for step in range(51):
            trained.step()
            if step in (10, 50):
                gc.collect()
                held.append(sum(isinstance(o, torch.Tensor) for o in gc.get_objects()))
        growth.append(held[1] - held[0])
    return growth


def test_comparisons_do_not_pile_up(tmp_path: Path) -> None:
    """A comparison keeps a tensor. On a GPU the outcomes of the last few steps may not be known yet."""
    for growth in run_ranks(body_no_growth, 2, tmp_path):
        assert max(growth) < 20, growth


class Late:
    """The event of a GPU, which may come as late as it likes."""

    def synchronize(self) -> None:
        pass


def body_judged_before_they_count(
    rank: int, world_size: int, sync: str, monkeypatch: pytest.MonkeyPatch
) -> list[torch.Tensor]:
    """Returns the bits of all weights."""
    compare = DeferredCheck.compare

    def compare_late(self: DeferredCheck, *args: Any) -> torch.Tensor:
        agree = compare(self, *args)
        event: Any
        event, numbers, message = self._pending.pop()
        if event is None:
            event, numbers = Late(), numbers.clone()
        self._pending.append((event, numbers, message))
        return agree

    monkeypatch.setattr(DeferredCheck, "compare", compare_late)
    weights = []
    for call in ("check_replicas", "full_state_dict", "resync", "load_state_dict"):
        trained = Trained(rank, world_size, 2, sync)
        optimizer = trained.optimizer
        trained.step()
        saved = optimizer.full_state_dict()
        lr = torch.tensor(0.125 * (1 + rank))
        optimizer.param_groups[0]["lr"] = lr
        before = [bits(p) for p in trained.params]
        trained.step()  # not heard of yet
        for p, b in zip(trained.params, before, strict=True):
            assert torch.equal(bits(p), b), "a weight moved"
        lr.fill_(LR)
        if call == "load_state_dict":
            optimizer.load_state_dict(saved)
        else:
            with pytest.raises(ValueError, match=rf"ranks \[1\] .*tensor\({0.125 * (1 + rank)}0*\)"):
                getattr(optimizer, call)()
        for _ in range(2 * DeferredCheck.LAG):
            before = [bits(p) for p in trained.params]
            trained.step()
            assert all((bits(p) != b).any() for p, b in zip(trained.params, before, strict=True))
        optimizer.check_replicas()
        weights += [bits(p) for p in trained.params]
    return weights


def body_judged(rank: int, world_size: int) -> None:
    weights = []
    for sync in ("signs", "params"):
        with pytest.MonkeyPatch.context() as monkeypatch:
            weights.append(body_judged_before_they_count(rank, world_size, sync, monkeypatch))
    assert all(map(torch.equal, *weights))


def test_steps_are_judged_before_state_is_read(tmp_path: Path) -> None:
    run_ranks(body_judged, 2, tmp_path)
