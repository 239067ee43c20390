"""A step over FSDP on the host and the device: one launch, no waiting, whether gradients move or not. Gradients that
FSDP2 has moved to the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

from benchmarks.measure import device_activity
from benchmarks.step_alone import TwoSets, local_parts, measure_alone, params_of
from lion_dist import Lion, clip_grad_norm_
from tests.asserts import assert_same_as
from tests.harness import device_of
from tests.scenarios.fsdp_training import Place, Way, backward
from tests.scenarios.fsdp_wrapping import fsdp1_way, fsdp2_way

from .common import needs_gpu, no_host_synchronisation, run_on_gpus

pytestmark = needs_gpu

WAYS = {
    "fsdp1": Way(fsdp1_way(), zeros=True),
    "fsdp2": Way(fsdp2_way()),
    "fsdp2, replaced gradients": Way(fsdp2_way(), replaces_gradients=True),
}


def body_no_waiting(rank: int, world_size: int) -> None:
    """The third step is the first that counts: by then all units have been used, and kernels compiled and loaded."""
    place = Place(rank, world_size, device_of(rank, world_size))
    for name, way in WAYS.items():
        model, optimizer, twin = way.start(place)
        for step in range(8):
            micro_steps = backward(way, model, step, place)
            optimizer.param_groups[0]["lr"] = 1e-3 * (step + 1)
            twin.optimizer.param_groups[0]["lr"] = 1e-3 * (step + 1)
            if step < 2:
                optimizer.step()
            else:
                with no_host_synchronisation():
                    optimizer.step()
            optimizer.zero_grad()
            twin.step(micro_steps, place.size)
        assert_same_as(twin, model, optimizer, name)


def test_step_never_waits_for_the_device(tmp_path: Path) -> None:
    run_on_gpus(body_no_waiting, 2, tmp_path)


def body_one_launch(rank: int, world_size: int) -> None:
    place = Place(rank, world_size, device_of(rank, world_size))
    for name, way in WAYS.items():
        model, optimizer, _ = way.start(place)
        for step in range(6):
            backward(way, model, step, place)
            kernels, _ = device_activity(optimizer.step)
            optimizer.zero_grad()
            # The first compiles, and a first session of the profiler may miss what it is still loading for.
            assert step < 2 or (len(kernels) == 1 and "_lion_kernel" in kernels[0]), f"{name}, step {step}: {kernels}"
        params = params_of(optimizer)
        gradients = TwoSets(params, lambda number: model(number, rank, world_size).backward())  # noqa: B023
        alone = measure_alone(optimizer, gradients, repeats=3)
        assert alone.kernels == {"kept": 1, "moved": 1}, name
        assert alone.elements == sum(p.numel() for p in local_parts(params)), name
        assert min(*alone.ms.values(), *alone.host_us.values(), alone.floor_ms) > 0, name


def test_one_launch_a_step(tmp_path: Path) -> None:
    """One launch for any groups; and the benchmark of a step by itself finds the same."""
    run_on_gpus(body_one_launch, 2, tmp_path)


def body_offloaded(rank: int, world_size: int) -> None:
    """The group has no backend for tensors on the CPU, as after init_process_group("nccl")."""
    device = device_of(rank, world_size)
    group = dist.new_group(backend="nccl")
    assert group is not None
    torch.manual_seed(0)
    model, x = nn.Linear(8, 6), torch.randn(4, 8)
    model(x).sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    expected = torch.cat([g.flatten() for g in grads]).norm().item()
    model.zero_grad()
    fully_shard(model, mesh=DeviceMesh.from_group(group, "cuda"), offload_policy=CPUOffloadPolicy())
    optimizer = Lion(model.parameters())
    model(x.to(device)).sum().backward()
    torch.cuda.synchronize()
    norms = [optimizer.statistics()["l2_norm/grad/global"], clip_grad_norm_(model.parameters(), 0.5).item()]
    assert norms == pytest.approx([expected] * 2, rel=1e-5)
    assert clip_grad_norm_(model.parameters(), 0.5).item() == pytest.approx(0.5, rel=1e-5)
    assert clip_grad_norm_([], 1.0, [group]).item() == 0


def test_clipping_and_statistics_of_offloaded_gradients(tmp_path: Path) -> None:
    run_on_gpus(body_offloaded, 2, tmp_path)
