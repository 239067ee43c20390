"""Ranks that do not fit together find out, all of them, and none is left waiting."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from lion_dist import ShardedLion
from lion_dist.sharding.agreement import Agreement
from tests.asserts import assert_same_bits, momentum_parts
from tests.harness import device_of, run_ranks, spawn_only


def params(device: torch.device, *shapes: tuple[int, ...]) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(shape, device=device)) for shape in shapes]


def body_constructor(rank: int, world_size: int) -> None:
    device = device_of(rank, world_size)
    odd = rank == world_size - 1  # the rank that is unlike the others

    def check(message: str, odd_error: type[Exception], error: type[Exception], *make: tuple[Any, Any]) -> None:
        group, kwargs = make[odd]
        with pytest.raises(odd_error if odd else error, match=message):
            ShardedLion(group, **{"stage": 1, **kwargs})

    shapes = [(4, 5), (6,), (7, 3)]
    good = params(device, *shapes)
    other_shape = params(device, (4, 5), (9,), (7, 3))
    extra = params(device, *shapes, (2,))
    transposed = [good[0], good[1], nn.Parameter(torch.ones(3, 7, device=device).t())]
    frozen = params(device, *shapes)
    frozen[1].requires_grad_(False)
    named = [("one", good[0]), ("two", good[1]), ("three", good[2])]
    renamed = [("one", good[0]), ("deux", good[1]), ("three", good[2])]
    check(
        r"Rank 0: parameter 1 .*\(6,\).*Rank \d: parameter 1 .*\(9,\)",
        ValueError,
        ValueError,
        (good, {}),
        (other_shape, {}),
    )
    check(r"Only rank . has: parameter 3 of group 0", ValueError, ValueError, (good, {}), (extra, {}))
    check(r"parameter 2 .*strides \(1, 7\)", ValueError, ValueError, (good, {}), (transposed, {}))
    check(r"parameter 1 .*frozen", ValueError, ValueError, (good, {}), (frozen, {}))
    check(r"parameter 1 .* deux", ValueError, ValueError, (named, {}), (renamed, {}))
    check(r"lr=0\.001", ValueError, ValueError, (good, {}), (good, {"lr": 1e-3}))
    check(r"momentum_dtype", ValueError, ValueError, (good, {}), (good, {"momentum_dtype": torch.bfloat16}))
    check(r"lr must be", ValueError, RuntimeError, (good, {}), (good, {"lr": -1.0}))
    check(r"twice", ValueError, RuntimeError, (good, {}), ([*good, good[0]], {}))
    doubles = [nn.Parameter(torch.ones(3, dtype=torch.float64, device=device))]
    check(r"torch.float64", TypeError, RuntimeError, (good, {}), (doubles, {}))
    check(r"stage must be", ValueError, RuntimeError, (good, {}), (good, {"stage": 3}))
    # The group still works, and a second optimizer on the same parameters too.
    optimizer = ShardedLion(good, stage=1)
    before = [p.detach().clone() for p in good]
    more = params(device, (11,) if odd else (10,))
    with pytest.raises(ValueError, match=r"add_param_group\(\).*\(10,\)"):
        optimizer.add_param_group({"params": more})
    with pytest.raises(ValueError if odd else RuntimeError, match="weight_decay"):
        optimizer.add_param_group({"params": params(device, (3,)), "weight_decay": -1.0 if odd else 0.0})
    assert len(optimizer.param_groups) == 1
    for p in good:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, b in zip(good, before, strict=True):
        assert_same_bits(p, b, "untouched by what was refused")


def test_constructor_compares_ranks(tmp_path: Path) -> None:
    run_ranks(body_constructor, 3, tmp_path)


def stacked(seed: int, device: torch.device, *values: float) -> list[nn.Parameter]:
    """Matrices of one shape, random ones first, then constant ones."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(9, 40, generator=generator) for _ in range(4)]
    return [nn.Parameter(t.to(device)) for t in [*drawn, *(torch.full((9, 40), v) for v in values)]]


def body_permuted(rank: int, world_size: int) -> None:
    """Unnamed parameters of one shape, in another order on the last rank, as groups from a Python set have it."""
    device = device_of(rank, world_size)
    odd = rank == world_size - 1
    says = rf"rank {world_size - 1} of the group has .*another order: its parameter {{}} is parameter {{}} of the first"

    def refused(call: Callable[[list[nn.Parameter]], object], params: list[nn.Parameter], i: int, j: int) -> None:
        before = [p.detach().clone() for p in params]
        with pytest.raises(ValueError, match=says.format(i, j) + r".*model\.named_parameters\(\).*set"):
            call(params)
        for p, b in zip(params, before, strict=True):
            assert_same_bits(p, b, "changed by a call that was refused")

    def make(params: list[nn.Parameter]) -> ShardedLion:
        groups: list[dict[str, Any]] = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.1}]
        return ShardedLion(groups)

    def ordered(params: list[nn.Parameter], *order: int) -> list[nn.Parameter]:
        return [params[i] for i in order] if odd else params

    # Two swapped over the groups, a ring of three, and two swapped beside one that is this rank's own.
    refused(make, ordered(stacked(0, device), 0, 2, 1, 3), 1, 2)
    refused(make, ordered(stacked(0, device), 2, 0, 1, 3), 0, 2)
    params = ordered(stacked(0, device), 0, 1, 3, 2)
    if odd:
        params[0].data.fill_(7.0)
    refused(make, params, 2, 3)
    # Gains of ones and biases of zeros.
    refused(make, ordered(stacked(0, device, 1.0, 0.0), 0, 1, 2, 3, 5, 4), 4, 5)
    # A frozen pair is overwritten too.
    params = ordered(stacked(0, device), 0, 2, 1, 3)
    for p in params[1:3]:
        p.requires_grad_(False)
    refused(make, params, 1, 2)
    # A group that comes later.
    optimizer = make(stacked(0, device))
    refused(lambda params: optimizer.add_param_group({"params": params}), ordered(stacked(1, device), 1, 0, 2, 3), 0, 1)
    assert len(optimizer.param_groups) == 2
    torch.stack([p.sum() for group in optimizer.param_groups for p in group["params"]]).sum().backward()
    optimizer.step()

    # No evidence: values of the rank's own, equal tensors at any place, and constant ones where the first rank has
    # been trained. All take the first rank's values, as ever.
    fresh = (0.0, 0.0, 1.0)
    for mine, first in [
        (stacked(rank, device), stacked(0, device)),
        (ordered(stacked(0, device, *fresh), 0, 1, 2, 3, 5, 4, 6), stacked(0, device, *fresh)),
        (stacked(rank, device, *(fresh if rank else (0.5, 0.0, 0.25))), stacked(0, device, 0.5, 0.0, 0.25)),
        (stacked(rank, device, *((0.0, 0.3) if rank else (0.5, 0.0))), stacked(0, device, 0.5, 0.0)),
    ]:
        make(mine).check_replicas()
        for p, want in zip(mine, first, strict=True):
            assert_same_bits(p, want, "the first rank's")
    # Of named ones the names are compared.
    named = [(str(i), p) for i, p in enumerate(ordered(stacked(0, device), 0, 2, 1, 3))]
    ShardedLion(named).check_replicas()


@pytest.mark.parametrize("world_size", [2, 3])
def test_unnamed_parameters_in_another_order(world_size: int, tmp_path: Path) -> None:
    run_ranks(body_permuted, world_size, tmp_path)


def body_bad_input(rank: int, world_size: int) -> None:
    """Refused on every rank alike, by step() too, and nothing has been changed."""
    device = device_of(rank, world_size)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"lr": -1.0}, "lr must be"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"param_sync": "bits"}, "param_sync"),
        ({"stage": 3}, "stage must be 1 or 2"),
        ({"bucket_mb": 0}, "bucket_mb must be > 0"),
    ]
    for kwargs, message in bad:
        with pytest.raises(ValueError, match=message):
            ShardedLion(params(device, (5,)), **{"stage": 1, **kwargs})
    for group in (init_device_mesh(device.type, (world_size,)), 0):
        with pytest.raises(TypeError, match=r"process_group must be a process group of torch.distributed, got a"):
            ShardedLion(params(device, (5,)), process_group=group)  # type: ignore[arg-type]
    gaps = nn.Parameter(torch.ones(10, 10, device=device)[:, :5])
    with pytest.raises(ValueError, match="dense"):
        ShardedLion([gaps], stage=1)
    with pytest.raises(ValueError, match="share memory"):
        ShardedLion([nn.Parameter(torch.ones(5, device=device).expand(4, 5))], stage=1)

    first, second = params(device, (300, 3), (200,))
    groups: list[dict[str, Any]] = [{"params": [first], "weight_decay": 0.5}, {"params": [second]}]
    optimizer = ShardedLion(groups, lr=0.1, stage=1)
    first.grad, second.grad = torch.ones_like(first), torch.ones_like(second)
    second.grad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.tensor([1.0]), (200,), device=device)
    with pytest.raises(TypeError, match="sparse"):
        optimizer.step()
    second.grad = torch.ones_like(second)
    optimizer.param_groups[1]["lr"] = -0.1
    with pytest.raises(ValueError, match="lr must be"):
        optimizer.step()
    optimizer.param_groups[1]["lr"] = 0.1
    with pytest.raises(ValueError, match="max_norm"):
        optimizer.clip_grad_norm_(-1.0)
    second.data = second.data.double()
    second.grad = None
    with pytest.raises(ValueError, match="changed from"):
        optimizer.step()
    second.data = torch.ones(200, device=device)
    assert_same_bits(first, torch.ones_like(first), "nothing was stepped")
    assert not any(part.any() for part in momentum_parts(optimizer))


def test_bad_input_changes_nothing(tmp_path: Path) -> None:
    run_ranks(body_bad_input, 2, tmp_path)


def test_needs_a_process_group() -> None:
    if dist.is_initialized():
        pytest.skip("torchrun's ranks have one")
    with pytest.raises(RuntimeError, match="init_process_group"):
        ShardedLion([nn.Parameter(torch.zeros(3))], stage=1)


def body_absent(rank: int, world_size: int) -> tuple[str, float]:
    group = dist.new_group(timeout=timedelta(seconds=8))
    dist.barrier()
    start = time.monotonic()
    if rank == 2:
        return "", 0.0
    with pytest.raises(RuntimeError) as error, Agreement(group, "roll call"):
        pass
    return str(error.value), time.monotonic() - start


@spawn_only
def test_absent_rank_is_named_on_every_other(tmp_path: Path) -> None:
    results = run_ranks(body_absent, 4, tmp_path)
    for rank in (0, 1, 3):
        message, seconds = results[rank]
        assert "roll call" in message
        assert "ranks [2]" in message
        assert seconds < 10


def body_different_calls(rank: int, world_size: int) -> None:
    group = dist.group.WORLD
    assert group is not None
    with (
        pytest.raises(ValueError, match=r"Rank 0: step.*Rank 1: save"),
        Agreement(group, "save" if rank == 1 else "step"),
    ):
        pass
    with Agreement(group, "again") as agreement:  # in step with each other after all of it
        agreement.says(["the same"])


def test_ranks_in_different_calls(tmp_path: Path) -> None:
    run_ranks(body_different_calls, 3, tmp_path)
