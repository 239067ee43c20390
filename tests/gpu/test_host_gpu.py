"""step() on the host and in the device's queue: no waiting, one launch, and results that do not
depend on how far the device is behind, on the stream, or on what becomes of the memory afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.measure import device_activity
from lion_dist import Lion
from lion_dist.sharding.replicas import DeferredCheck
from lion_dist.update.segments import TILE

from .common import BF16, F32, GPU, Twins, needs_gpu, no_host_synchronisation, reuse_freed_memory

pytestmark = needs_gpu

SLOW = 400_000_000  # cycles: 0.2 s or more, several times what the host needs for all that follows it


def hold_up_the_device() -> torch.cuda.Event:
    """The current stream does nothing for a while; the event tells when it goes on."""
    torch.cuda._sleep(SLOW)
    awake = torch.cuda.Event()
    awake.record()
    return awake


@pytest.mark.parametrize("lr", ["number", "tensor"])
def test_two_steps_queued_behind_a_slow_device(lr: str) -> None:
    """Each has its own lr and gradients, and by the time that the device runs the first, the host has
    changed the lr, dropped the gradients and filled their memory. The first round is a warm-up, because first
    uses (compilation, loading of kernels, page-locking) may wait for the device."""
    twins = Twins(lr=torch.tensor(1e-3, device=GPU) if lr == "tensor" else 1e-3)
    for number in range(2):
        rates = [0.01 * (1 + number), 0.25]
        drawn = [[twins.draw(tuple(p.shape), F32) for p in twins.params] for _ in rates]
        uploaded = [[g.to(GPU) for g in grads] for grads in drawn]
        torch.cuda.synchronize()
        awake = hold_up_the_device()
        for rate in rates:
            for group in twins.gpu.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate
            for p, g in zip(twins.params, uploaded.pop(0), strict=True):
                p.grad = g.clone()
            twins.gpu.step()
            twins.gpu.zero_grad()
            del g
            reused = reuse_freed_memory()
        was_behind = not awake.query()
        torch.cuda.synchronize()
        del reused
        for rate, grads in zip(rates, drawn, strict=True):
            for q, g in zip(twins.cpu_params, grads, strict=True):
                q.grad = g
            for group in twins.cpu.param_groups:
                group["lr"] = rate
            twins.cpu.step()
        twins.assert_equal()
    assert was_behind, "the device had caught up: the step waited for it, or SLOW is too short here"


def test_steps_on_a_stream_of_ones_own() -> None:
    twins = Twins()
    twins.step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for number in range(4):
            torch.cuda._sleep(SLOW // 20)
            twins.new_gradients()
            twins.gpu.param_groups[0]["lr"] = 0.01 * (1 + number)
            twins.step()
            del_later = reuse_freed_memory()
        del del_later
    torch.cuda.current_stream().wait_stream(side)
    twins.new_gradients()
    twins.step()
    twins.assert_equal()


def test_tables_made_on_another_stream_outlive_their_last_launch() -> None:
    """Tables belong to the stream that they were made on. A launch from another stream must keep them until it
    has run, though the host replaces them meanwhile: else their memory is given to the next taker."""
    twins = Twins()
    side = torch.cuda.Stream()
    kept: list[Tensor] = []
    for _ in range(2):  # a warm-up, then what counts
        twins.new_gradients(kept)
        twins.gpu.param_groups[0]["lr"] *= 2
        twins.step()  # makes tables of addresses and of hyper-parameters, on the default stream
        drawn = [twins.draw(tuple(p.shape), F32) for p in twins.params]
        uploaded = [g.to(GPU) for g in drawn]
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            awake = hold_up_the_device()
            twins.gpu.step()  # with those tables
            twins.step_cpu()
            for p, q, g, g_cpu in zip(twins.params, twins.cpu_params, uploaded, drawn, strict=True):
                kept += [p.grad] if p.grad is not None else []
                p.grad, q.grad = g, g_cpu
            twins.gpu.param_groups[0]["lr"] *= 2
            twins.gpu.step()  # replaces them
            twins.step_cpu()
        reused = reuse_freed_memory()
        was_behind = not awake.query()
        torch.cuda.synchronize()
        twins.assert_equal()
        del reused
    assert was_behind, "the device had caught up before the memory was taken"


def test_the_mode_that_forbids_synchronisation_works() -> None:
    with pytest.raises(RuntimeError, match="synchroniz"), no_host_synchronisation():
        torch.ones(1, device=GPU).item()


@pytest.mark.parametrize("lr", ["number", "tensor"])
@pytest.mark.parametrize("moved", [False, True], ids=["gradients kept", "gradients moved"])
def test_step_never_waits_for_the_device(lr: str, moved: bool) -> None:
    """After one warm-up step, with a scheduler that changes lr at every step."""
    rate: Any = torch.tensor(0.01, device=GPU) if lr == "tensor" else 0.01
    twins = Twins(lr=rate)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(twins.gpu, gamma=0.5)
    kept: list[Tensor] = []
    twins.step()
    for _ in range(4):
        scheduler.step()
        if moved:
            twins.new_gradients(kept)
        with no_host_synchronisation():
            twins.gpu.step()
        twins.step_cpu()
    assert float(twins.gpu.param_groups[0]["lr"]) == pytest.approx(0.01 * 0.5**4)
    twins.assert_equal()


def test_no_waiting_when_parameters_move_or_gradients_come_and_go() -> None:
    """Nor for tables made anew, gradients in another memory order, or tensors that torch itself steps."""
    twins = Twins(sizes=((64, 32), (40, 30), (100,)))
    twins.params[1].data = torch.empty(40, 60, device=GPU)[:, ::2].copy_(twins.params[1].detach())  # not dense
    twins.step()
    for number in range(3):
        twins.new_gradients()
        for params in (twins.params, twins.cpu_params):
            params[2].grad = None if number == 1 else params[2].grad
        g = twins.params[0].grad
        assert g is not None
        twins.params[0].grad = torch.empty(32, 64, device=GPU).t().copy_(g)
        twins.params[0].data = twins.params[0].data.clone()
        with no_host_synchronisation():
            twins.gpu.step()
        twins.step_cpu()
    twins.assert_equal()


# 146 tensors as in benchmarks/step.py, shrunken: an embedding, 16 layers of seven matrices and two norms, a norm.
LLAMA = [(500, 32), *[(32, 32), (8, 32), (8, 32), (32, 32), (96, 32), (96, 32), (32, 96), (32,), (32,)] * 16, (32,)]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_one_launch_a_step(dtype: torch.dtype) -> None:
    """146 tensors in two groups; whether anything changed since the last step or not."""
    assert len(LLAMA) == 146
    twins = Twins(sizes=LLAMA, dtype=dtype, lr=0.01)
    twins.gpu.step()
    device_activity(twins.gpu.step)  # a first session of the profiler may miss what it is still loading for
    kept: list[Tensor] = []
    for change in ("nothing", "gradients", "lr", "a gradient missing"):
        if change == "gradients":
            twins.new_gradients(kept)
        elif change == "lr":
            twins.gpu.param_groups[0]["lr"] = 0.02
        elif change == "a gradient missing":
            twins.params[7].grad = None
        kernels, copies = device_activity(twins.gpu.step)
        assert len(kernels) == 1, f"{change} changed: {kernels}"
        assert "_lion_kernel" in kernels[0], change
        assert copies == (0 if change == "nothing" else 1), f"{change} changed"


def test_one_launch_with_an_lr_tensor() -> None:
    """Beside it, the copies of lr into the table, one a group."""
    twins = Twins(sizes=LLAMA, lr=torch.tensor(0.01, device=GPU))
    twins.gpu.step()
    device_activity(twins.gpu.step)
    kernels, _ = device_activity(twins.gpu.step)
    assert sum("_lion_kernel" in kernel for kernel in kernels) == 1
    assert len(kernels) <= 1 + len(twins.gpu.param_groups), kernels


def test_one_launch_for_each_mix_of_dtypes() -> None:
    twins = Twins(sizes=[(100, 3)] * 6)
    for p in twins.params[::3] + twins.cpu_params[::3]:
        p.grad = None
        p.data = p.data.to(BF16)
        p.grad = torch.ones_like(p)
    twins.step()
    device_activity(twins.gpu.step)
    twins.step_cpu()
    kernels, _ = device_activity(twins.gpu.step)
    twins.step_cpu()
    assert len(kernels) == 2
    twins.assert_equal()


def test_a_step_takes_next_to_no_memory() -> None:
    twins = Twins(sizes=[(TILE * 64,)] * 4)
    twins.step()
    torch.cuda.synchronize()
    kept: list[Tensor] = []
    twins.new_gradients(kept)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    twins.gpu.step()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= 4096
    twins.step_cpu()
    assert torch.cuda.memory_allocated() - before <= 1024
    twins.assert_equal()


def test_version_counters() -> None:
    """A graph that saved a weight refuses to go backward through its changed value; a weight without a
    gradient keeps its version."""
    twins = Twins()
    twins.step()
    versions = [p._version for p in twins.params]
    twins.params[1].grad = None
    twins.gpu.step()
    for i, (p, before) in enumerate(zip(twins.params, versions, strict=True)):
        assert (p._version > before) == (i != 1)
    p = twins.params[0]
    loss = (p * p).sum()
    twins.gpu.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_devices() -> None:
    """One optimizer over parameters on both, and one on the device that is not current; lr on either."""
    other = torch.device("cuda", 1)
    for rate in (0.01, torch.tensor(0.01, device=GPU), torch.tensor(0.01, device=other)):
        twins = Twins(lr=rate)
        twins.params[1].data = twins.params[1].data.to(other)
        twins.params[2].data = twins.params[2].data.to(other)
        alone = Twins(lr=rate, device=other)
        for pair in (twins, alone):
            for _ in range(3):
                pair.new_gradients()
                pair.step()
            pair.assert_equal()
        assert torch.cuda.current_device() == 0


def test_parameters_on_the_cpu_wait_for_an_lr_on_the_gpu() -> None:
    """They need its value at once, and must not read it before the device has written it."""
    lr = torch.tensor(0.125, device=GPU)
    p = torch.ones(100, requires_grad=True)
    p.grad = torch.ones(100)
    optimizer = Lion([p], lr=lr)
    optimizer.step()
    torch.cuda.synchronize()
    hold_up_the_device()
    lr.fill_(0.25)
    optimizer.step()
    assert (p == 1 - 0.125 - 0.25).all()


def test_gradients_refilled_in_place() -> None:
    """They stay where they are, so no table changes; their values are read at the step."""
    twins = Twins()
    for number in range(3):
        for p, q in zip(twins.params, twins.cpu_params, strict=True):
            assert p.grad is not None
            assert q.grad is not None
            p.grad.fill_(number - 1)
            q.grad.fill_(number - 1)
        twins.step()
    twins.assert_equal()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_numbers_of_ranks_on_another_gpu_than_the_current_one() -> None:
    """The host waits until they have been copied, though nothing runs on the current GPU."""
    equal, numbers = torch.tensor([[1, 1], [1, 2]], device="cuda:1")
    comparison = DeferredCheck()
    comparison.compare(equal, str)  # loads the kernels, and leaves pinned memory that holds equal numbers
    comparison.check(all=True)
    with torch.cuda.device(1):
        torch.cuda._sleep(SLOW)
    comparison.compare(numbers, lambda: "step 3")
    with pytest.raises(ValueError, match=r"ranks \[1\] of the group step 3"):
        comparison.check(all=True)
