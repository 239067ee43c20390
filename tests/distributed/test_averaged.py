"""Stage 1 takes gradients for averaged; the first steps find out where they are not, before anything is changed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from lion_dist import ShardedLion
from lion_dist.sharding.averaged import AveragedGradients
from tests.asserts import assert_same_bits, momentum_parts
from tests.harness import device_of, run_ranks

NOT_AVERAGED = r"on ranks \[1\] .*gradients must be averaged.*DistributedDataParallel.*stage=2"


def net(device: torch.device) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 33), nn.LayerNorm(33), nn.Linear(33, 5)).to(device)


def data(rank: int, step: int, device: torch.device) -> Tensor:
    return torch.randn(8, 20, generator=torch.Generator().manual_seed(100 * step + rank)).to(device)


def backward(model: nn.Module, rank: int, step: int) -> None:
    model(data(rank, step, next(model.parameters()).device)).square().mean().backward()


class Untouched:
    """Parameters and momenta that a refused call must leave alone, and what ends it: zero_grad()."""

    def __init__(self, optimizer: ShardedLion) -> None:
        self.optimizer = optimizer
        self.before = [t.detach().clone() for t in self.tensors()]

    def tensors(self) -> list[Tensor]:
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        return params + momentum_parts(self.optimizer)

    def by(self, call: Callable[[], Any], message: str = NOT_AVERAGED) -> None:
        with pytest.raises(ValueError, match=message):
            call()
        for t, b in zip(self.tensors(), self.before, strict=True):
            assert_same_bits(t, b, "changed by a call that was refused")


def body_not_averaged(rank: int, world_size: int) -> None:
    device = device_of(rank, world_size)
    for sync in ("signs", "params"):
        model = net(device)
        optimizer = ShardedLion(model.named_parameters(), lr=0.01, stage=1, param_sync=sync)
        untouched = Untouched(optimizer)
        backward(model, rank, 0)
        untouched.by(optimizer.step)
        untouched.by(lambda optimizer=optimizer: optimizer.clip_grad_norm_(1.0))  # type: ignore[misc]
        untouched.by(optimizer.step)  # no clipping was left behind
        # The remedy, with the same optimizer.
        optimizer.zero_grad()
        wrapped = DistributedDataParallel(model)
        for step in range(3):
            backward(wrapped, rank, step)
            optimizer.step()
            optimizer.zero_grad()
        optimizer.check_replicas()


def body_second_step(rank: int, world_size: int) -> None:
    """Gradients that are alike in the first step, though nobody averages them; and steps without any but zeros, as
    torch's checkpoints make one, which do not count."""
    p, idle = (nn.Parameter(torch.ones(300, device=device_of(rank, world_size))) for _ in range(2))
    optimizer = ShardedLion([p, idle], lr=0.25, stage=1)
    for value in (0.0, 0.0, 0.0, 1.0):
        p.grad = torch.full_like(p, value)
        optimizer.step()
    p.grad = torch.full_like(p, 1.0 + rank)
    Untouched(optimizer).by(optimizer.step)
    # Clipping and the step after it are one step. What it saw, step() need not look at.
    for _ in range(AveragedGradients.STEPS):
        p.grad = torch.ones_like(p)
        optimizer.clip_grad_norm_(1.0)
        optimizer.clip_grad_norm_(0.5)
        optimizer.step()
    # What the rounding of one factor makes different, is averaged nonetheless; and so is NaN, if it is on every rank.
    p.grad = torch.linspace(-1, 1, 300, device=p.device) * (1 + rank * 2**-20)
    optimizer = ShardedLion([p, idle], lr=0.25, stage=1)
    optimizer.step()
    p.grad[7] = torch.nan if rank == 0 else torch.inf
    optimizer.step()
    optimizer = ShardedLion([p, idle], lr=0.25, stage=1)
    p.grad[7] = torch.inf if rank == 0 else 0.0
    Untouched(optimizer).by(optimizer.step)
    # A gradient in another memory order is the same gradient.
    square = nn.Parameter(torch.ones(20, 20, device=p.device))
    optimizer = ShardedLion([square], lr=0.25, stage=1)
    g = torch.arange(400.0, device=p.device).view(20, 20)
    square.grad = g if rank == 0 else g.t().contiguous().t()
    optimizer.step()


def body_gradients_on_some_ranks(rank: int, world_size: int) -> None:
    """That is another fault, with its own message; the others are compared."""
    device = device_of(rank, world_size)
    for sync in ("signs", "params"):
        a, b = (nn.Parameter(torch.ones(300, device=device)) for _ in range(2))
        optimizer = ShardedLion([a, b], lr=0.25, stage=1, param_sync=sync)
        a.grad = torch.ones_like(a)
        b.grad = torch.ones_like(b) if rank == 0 else None
        if device.type == "cpu":
            with pytest.raises(ValueError, match="made a step that differs from that of the group's first rank"):
                optimizer.step()
        a.grad = torch.full_like(a, 1.0 + rank)
        Untouched(optimizer).by(optimizer.step)


def body_came_later(rank: int, world_size: int) -> None:
    """DistributedDataParallel averages only what was there and trainable when it was made."""
    device = device_of(rank, world_size)
    for how in ("unfrozen", "added"):
        model = net(device)
        model[1].requires_grad_(how != "unfrozen")
        wrapped = DistributedDataParallel(model)
        optimizer = ShardedLion(model.named_parameters(), lr=0.01, stage=1)
        for step in range(3):
            backward(wrapped, rank, step)
            optimizer.step()
            optimizer.zero_grad()
        if how == "unfrozen":
            model[1].requires_grad_(True)
            optimizer.init_state()
        else:
            model.append(nn.Linear(5, 5).to(device))
            optimizer.add_param_group({"params": list(model[3].named_parameters("new"))})
        backward(wrapped, rank, 3)
        Untouched(optimizer).by(optimizer.step)
        optimizer.zero_grad()
        wrapped = DistributedDataParallel(model)
        for step in range(3):
            backward(wrapped, rank, step)
            optimizer.step()
            optimizer.zero_grad()
        optimizer.check_replicas()


def body_no_false_alarm(rank: int, world_size: int) -> None:
    """Every way in which DistributedDataParallel averages gives ranks the same bits."""
    device = device_of(rank, world_size)
    ways: list[dict[str, Any]] = [
        {}, {"gradient_as_bucket_view": True}, {"static_graph": True}, {"hook": fp16_compress_hook},
    ]  # fmt: skip
    for kwargs in ways:
        hook = kwargs.pop("hook", None)
        model = net(device)
        wrapped = DistributedDataParallel(model, bucket_cap_mb=0.001, **kwargs)
        if hook is not None:
            wrapped.register_comm_hook(None, hook)
        optimizer = ShardedLion(model.named_parameters(), lr=0.01, stage=1)
        for step in range(3):
            for micro in range(2):
                accumulates = micro == 0 and "static_graph" not in kwargs
                with wrapped.no_sync() if accumulates else nullcontext():
                    backward(wrapped, rank, 10 * step + micro)
            optimizer.clip_grad_norm_(0.1)
            optimizer.step()
            optimizer.zero_grad()
        optimizer.check_replicas()
    # Accumulated under no_sync() alone, nobody averages.
    model = net(device)
    wrapped = DistributedDataParallel(model)
    optimizer = ShardedLion(model.named_parameters(), lr=0.01, stage=1)
    with wrapped.no_sync():
        backward(wrapped, rank, 0)
    Untouched(optimizer).by(optimizer.step)


def body_all(rank: int, world_size: int) -> None:
    assert dist.get_world_size() == world_size
    body_not_averaged(rank, world_size)
    body_second_step(rank, world_size)
    body_gradients_on_some_ranks(rank, world_size)
    body_came_later(rank, world_size)
    body_no_false_alarm(rank, world_size)


def test_gradients_that_nobody_averages(tmp_path: Path) -> None:
    run_ranks(body_all, 2, tmp_path)


def body_which_ranks(rank: int, world_size: int) -> None:
    """The ranks that are unlike the first which has a gradient."""
    p, q = (nn.Parameter(torch.ones(300, device=device_of(rank, world_size))) for _ in range(2))
    optimizer = ShardedLion([q, p], lr=0.25, stage=1)
    p.grad = None if rank == 0 else torch.full_like(p, 2.0 if rank == 2 else 1.0)
    q.grad = torch.ones_like(q)
    message = r"1 of 2 gradients differ .* parameter 1 \(shape \(300,\)\) on ranks \[2\] .* not that on rank 1"
    Untouched(optimizer).by(optimizer.step, message)


def test_which_ranks_are_named(tmp_path: Path) -> None:
    run_ranks(body_which_ranks, 3, tmp_path)
