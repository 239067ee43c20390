"""Stage 2 on GPUs over NCCL: the host waits for nothing, memory does not grow, and streams wait for each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lion_dist import ShardedLion
from tests.harness import device_of
from tests.scenarios.hybrid import Case, body_cases

from .common import BF16, needs_gpu, run_on_gpus

pytestmark = needs_gpu


def small_model(device: torch.device) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(301, 301), nn.LayerNorm(301), nn.GELU()) for _ in range(8)]
    return nn.Sequential(*layers).to(device)


def body_no_host_synchronisation(rank: int, world_size: int, clip: bool, reduce_dtype: torch.dtype | None) -> None:
    device = device_of(rank, world_size)
    model = small_model(device)
    optimizer = ShardedLion(model.parameters(), lr=1e-3, bucket_mb=0.5, reduce_dtype=reduce_dtype)
    x = torch.randn(16, 301, device=device)
    used = (
        nn.Sequential(*list(model)[:3], *list(model)[4:]) if rank == world_size - 1 else model
    )  # the last rank leaves one layer out

    def step() -> None:
        with optimizer.no_sync():
            used(x).square().mean().backward()
        used(x).square().mean().backward()
        if clip:
            optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()  # learns the order, for which the host waits
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # Nor by a call that the debug mode does not know: with the device held up, the host runs ahead of it.
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)
    held_up = torch.cuda.Event()
    held_up.record()
    step()
    step()
    assert not held_up.query()
    torch.cuda.synchronize()


in_16_bits_too = pytest.mark.parametrize("reduce_dtype", [None, torch.bfloat16], ids=["", "reduced-in-bf16"])


@in_16_bits_too
@pytest.mark.parametrize("clip", [False, True], ids=["plain", "clipped"])
def test_no_host_synchronisation(clip: bool, reduce_dtype: torch.dtype | None, tmp_path: Path) -> None:
    run_on_gpus(body_no_host_synchronisation, 2, tmp_path, (clip, reduce_dtype))


def body_no_growth(rank: int, world_size: int, reduce_dtype: torch.dtype | None) -> None:
    device = device_of(rank, world_size)
    model = small_model(device)
    optimizer = ShardedLion(model.parameters(), lr=1e-3, bucket_mb=0.5, reduce_dtype=reduce_dtype)
    x = torch.randn(16, 301, device=device)

    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(20):
        step()
    torch.cuda.synchronize()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    peaks = []
    for i in range(500):
        step()
        if i % 100 == 99:
            torch.cuda.synchronize()
            peaks.append(torch.cuda.max_memory_allocated())
    assert torch.cuda.memory_allocated() == allocated
    assert torch.cuda.memory_reserved() == reserved
    assert len(set(peaks)) == 1


@in_16_bits_too
def test_no_growth_of_memory(reduce_dtype: torch.dtype | None, tmp_path: Path) -> None:
    run_on_gpus(body_no_growth, 2, tmp_path, (reduce_dtype,))


class Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        torch.cuda._sleep(500_000_000)
        return g.clone()


def body_branches_on_two_streams(rank: int, world_size: int, reduce_dtype: torch.dtype | None) -> None:
    """A bucket is launched when its last gradient arrives, while the other stream has yet to compute its own."""
    device, numel = device_of(rank, world_size), 1 << 20
    a, b = (nn.Parameter(torch.zeros(numel, device=device)) for _ in range(2))
    optimizer = ShardedLion([a, b], lr=0.5, reduce_dtype=reduce_dtype)
    usual, side = torch.cuda.current_stream(), torch.cuda.Stream()
    for step in range(1, 4):
        first = b.sum()  # whose gradient comes last
        side.wait_stream(usual)
        with torch.cuda.stream(side):
            second = Slow.apply(a).sum()
            stale = torch.full((numel,), -1.0, device=device)
            del stale  # a's gradient may lie there
        usual.wait_stream(side)
        (first + second).backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, p in (("a", a), ("b", b)):
            assert (p == -0.5 * step).all(), f"{name} after step {step}: {p.detach().unique().tolist()}"


@in_16_bits_too
@pytest.mark.parametrize("world_size", [1, 2])
def test_branches_on_two_streams(world_size: int, reduce_dtype: torch.dtype | None, tmp_path: Path) -> None:
    run_on_gpus(body_branches_on_two_streams, world_size, tmp_path, (reduce_dtype,))


def body_memory_of_a_branch(rank: int, world_size: int, reduce_dtype: torch.dtype | None) -> None:
    """The stream that launches a bucket is held up, and has yet to read the gradients of a branch on another stream,
    which asks for memory meanwhile. A parameter of 5 elements is copied by the launch, and its gradient dropped."""
    device, sizes = device_of(rank, world_size), (5, 1 << 20)
    params = [nn.Parameter(torch.zeros(numel, device=device)) for numel in (*sizes, 1 << 20)]
    optimizer = ShardedLion(params, lr=0.5, reduce_dtype=reduce_dtype)
    usual, side = torch.cuda.current_stream(), torch.cuda.Stream()
    for step in range(1, 4):
        last = Slow.apply(params[-1]).sum()
        side.wait_stream(usual)
        with torch.cuda.stream(side):
            branch = sum(p.sum() for p in params[:-1])
        usual.wait_stream(side)
        (last + branch).backward()
        with torch.cuda.stream(side):
            _ = [torch.full((numel,), -1.0, device=device) for numel in sizes for _ in range(64 if numel == 5 else 4)]
        optimizer.step()
        optimizer.zero_grad()
        for number, p in enumerate(params):
            assert (p == -0.5 * step).all(), f"{number} after step {step}: {p.detach().unique().tolist()}"


@in_16_bits_too
def test_memory_of_a_branch(reduce_dtype: torch.dtype | None, tmp_path: Path) -> None:
    run_on_gpus(body_memory_of_a_branch, 1, tmp_path, (reduce_dtype,))


def test_over_fsdp2(tmp_path: Path) -> None:
    """Gradients come on FSDP2's stream, and are those of one process."""
    cases = [Case(clip=5.0), Case(accumulate="optimizer", reduce_dtype=BF16)]
    run_on_gpus(body_cases, 2, tmp_path, ({(2, 1): cases, (1, 2): cases}, 3))


def body_gradients_leave(rank: int, world_size: int, reduce_dtype: torch.dtype | None) -> None:
    """Full gradients exist only for the buckets under way: two of them, one parameter each here."""
    device = device_of(rank, world_size)
    torch.manual_seed(0)
    x = torch.randn(8, 2048, device=device)
    nn.Linear(2048, 2048, bias=False, device=device)(x).mean().backward()  # allocates the workspaces of cuBLAS
    base = torch.cuda.memory_allocated()
    model = nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(16)]).to(device)
    size = 4 * 2048 * 2048
    optimizer = ShardedLion(model.parameters(), lr=1e-3, bucket_mb=16, reduce_dtype=reduce_dtype)
    for _ in range(3):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(x).mean().backward()
        grown = torch.cuda.max_memory_allocated() - before
        optimizer.step()
        optimizer.zero_grad()
    assert grown < 5 * size  # of 16: the buckets under way, the one that is filling, and the sentinel
    # Parameters, half of the momentum, half of the gradients, and the sentinel's zeros.
    assert torch.cuda.memory_allocated() - base < 16 * size * (1 + 1 / 2 + 1 / 2) + 2 * size


@in_16_bits_too
def test_gradients_leave_in_the_backward(reduce_dtype: torch.dtype | None, tmp_path: Path) -> None:
    run_on_gpus(body_gradients_leave, 2, tmp_path, (reduce_dtype,))
