"""Stage 2: bad arguments are refused, and so is compiled autograd; functions may be compiled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd

from lion_dist import ShardedLion
from tests.asserts import assert_unmoved
from tests.harness import device_of, run_ranks
from tests.scenarios.pair import Pair, gradient


def body_bucket_mb(rank: int, world_size: int) -> None:
    params = [nn.Parameter(torch.ones(3, device=device_of(rank, world_size)))]
    for bad in (float("inf"), float("nan"), 0, -1):
        with pytest.raises(ValueError, match="bucket_mb must be > 0 and finite"):
            ShardedLion(params, bucket_mb=bad)
    for other in ("25", None):
        with pytest.raises(TypeError, match="bucket_mb must be a number"):
            ShardedLion(params, bucket_mb=other)  # type: ignore[arg-type]
    ShardedLion(params, bucket_mb=1e-9)


def test_bucket_mb_is_checked_on_every_rank(tmp_path: Path) -> None:
    run_ranks(body_bucket_mb, 2, tmp_path)


def linear_backward(params: list[nn.Parameter], gradients: list[Tensor]) -> None:
    torch.stack([(p * g).sum() for p, g in zip(params, gradients, strict=True)]).sum().backward()


def body_compiled_training(rank: int, world_size: int) -> None:
    """Hooks called from within a compiled function are not to be compiled. (The eager backend compiles nothing.)"""
    backward = torch.compile(linear_backward, backend="eager")
    pair = Pair(rank, world_size)
    for step in range(3):
        backward(pair.params, [gradient(i, p, step, rank, world_size) for i, p in enumerate(pair.params)])
        pair.expect(step)
        pair.step(f"step {step}")
    pair.finish()


def body_compiled_autograd(rank: int, world_size: int) -> None:
    """Hooks would be traced, and what they did in the first backward compiled into the others."""
    for enable in (
        lambda: compiled_autograd._enable(torch.compile(backend="eager")),
        lambda: torch._dynamo.config.patch(compiled_autograd=True),
    ):
        pair = Pair(rank, world_size)
        gradients = [gradient(i, p, 0, rank, world_size) for i, p in enumerate(pair.params)]
        weights = [p.detach().clone() for p in pair.params]
        with enable():
            backward = torch.compile(linear_backward, backend="eager")
            with pytest.raises(RuntimeError, match=r"compiled autograd.*stage=1"):
                backward(pair.params, gradients)
        assert_unmoved(pair.params, weights)


def test_function_that_is_compiled_with_its_backward(tmp_path: Path) -> None:
    run_ranks(body_compiled_training, 2, tmp_path)


def test_compiled_autograd_is_refused(tmp_path: Path) -> None:
    run_ranks(body_compiled_autograd, 1, tmp_path)
