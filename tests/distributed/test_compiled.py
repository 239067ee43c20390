"""ShardedLion's calls within what torch.compile compiles: they run as they are, between the compiled parts."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim.lr_scheduler import LambdaLR

from lion_dist import ShardedLion
from tests.asserts import assert_same_bits
from tests.harness import device_of, run_ranks


class Trained:
    """A net under ShardedLion. Data are the ranks' own in stage 2, and the same on all in stage 1."""

    def __init__(self, rank: int, world_size: int, stage: int) -> None:
        self.device = device_of(rank, world_size)
        self.seed = rank if stage == 2 else 0
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(20, 33), nn.GELU(), nn.Linear(33, 20)).to(self.device)
        self.optimizer = ShardedLion(self.model.named_parameters(), lr=0.01, stage=stage, bucket_mb=0.001)
        self.scheduler = LambdaLR(self.optimizer, lambda step: 1 / (1 + step))
        self.run: Callable[[Tensor], Tensor] = self.train

    def train(self, x: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.model(x).square().mean()
        loss.backward()
        self.optimizer.clip_grad_norm_(0.1)
        self.optimizer.step()
        return loss.detach()

    def train_accumulating(self, x: Tensor) -> Tensor:
        with self.optimizer.no_sync():
            self.model(x).square().mean().backward()
        loss = self.model(x + 1).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def step_alone(self, x: Tensor) -> Tensor:
        self.model(x).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return x

    def everything_else(self, x: Tensor) -> Tensor:
        """Every other collective call, between computations."""
        optimizer = self.optimizer
        optimizer.init_state()
        y = x * 2
        optimizer.check_replicas()
        optimizer.resync()
        optimizer.broadcast_buffers([y])
        state = optimizer.full_state_dict()
        optimizer.state_dict()
        y = y + 1
        optimizer.load_state_dict(state)
        optimizer.zero_grad(set_to_none=False)
        return y * 3

    def go(self, step: int) -> Tensor:
        x = torch.randn(4, 20, generator=torch.Generator().manual_seed(100 * step + self.seed)).to(self.device)
        loss = self.run(x)
        self.scheduler.step()
        return loss


def body_compiled(rank: int, world_size: int) -> None:
    for stage in (1, 2):
        plain, compiled = (Trained(rank, world_size, stage) for _ in range(2))
        for how in ("train", "step_alone", "everything_else", *(["train_accumulating"] if stage == 2 else [])):
            plain.run, compiled.run = getattr(plain, how), getattr(compiled, how)
            if how == "step_alone":
                compiled.optimizer.step = torch.compile(compiled.optimizer.step, backend="eager")  # type: ignore
            else:
                compiled.run = torch.compile(compiled.run, backend="eager")
            for step in range(3):
                assert_same_bits(compiled.go(step), plain.go(step), f"stage {stage}, {how}, step {step}")
                for p, want in zip(compiled.model.parameters(), plain.model.parameters(), strict=True):
                    assert_same_bits(p, want, f"stage {stage}, {how}, step {step}")
            if how == "step_alone":
                del compiled.optimizer.step


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_compiled_training_step(world_size: int, tmp_path: Path) -> None:
    run_ranks(body_compiled, world_size, tmp_path)


def test_no_public_method_is_traced() -> None:
    """A method that is added to the class is left out of graphs without another word; its signature stays."""

    def public(cls: type) -> dict[str, Any]:
        return {k: f for k, f in vars(cls).items() if not k.startswith("_") and inspect.isfunction(f)}

    left_out = _disable_dynamo(public).__code__
    methods = public(ShardedLion)
    assert {"step", "clip_grad_norm_", "zero_grad", "no_sync", "load_state_dict", "init_state"} <= methods.keys()
    for name, method in methods.items():
        assert any(code is left_out for code in wrapped(method)), name
    assert list(inspect.signature(ShardedLion.clip_grad_norm_).parameters) == ["self", "max_norm", "process_groups"]


def wrapped(method: Any) -> list[Any]:
    """The code of a method and of all that it wraps."""
    found = [method]
    while hasattr(found[-1], "__wrapped__"):
        found.append(found[-1].__wrapped__)
    return [f.__code__ for f in found]
