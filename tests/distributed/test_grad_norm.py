"""lion_dist.clip_grad_norm_: one norm over plain tensors and DTensors of several meshes, where torch's own raises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

import lion_dist
from lion_dist.update.reference import clip_coefficient, sum_of_squares
from tests.asserts import assert_same_bits
from tests.gpu.common import needs_gpu
from tests.harness import device_of, run_ranks

# Shapes that split unevenly over two and four ranks, or leave some ranks nothing.
SHAPES = {"plain": (3, 5), "rows": (7, 3), "columns": (4, 6), "both": (5, 4), "replica": (2, 9), "strided": (6, 3)}


def gradients(device: torch.device) -> dict[str, Tensor]:
    gen = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=gen).to(device) for name, shape in SHAPES.items()}


def sharded(g: Tensor, mesh: DeviceMesh, *placements: Placement) -> nn.Parameter:
    """A parameter of zeros, with this gradient."""
    p = nn.Parameter(distribute_tensor(torch.zeros_like(g), mesh, placements))
    p.grad = distribute_tensor(g, mesh, placements)
    return p


def several_meshes(rank: int, world_size: int) -> None:
    device = device_of(rank, world_size)
    two = init_device_mesh(device.type, (2, 2), mesh_dim_names=("dp", "tp"))
    one = init_device_mesh(device.type, (world_size,))
    whole = gradients(device)
    plain = nn.Parameter(torch.zeros_like(whole["plain"]))
    plain.grad = whole["plain"].clone()
    idle = nn.Parameter(torch.zeros(3, device=device))
    params = {
        "plain": plain,
        "rows": sharded(whole["rows"], one, Shard(0)),
        "columns": sharded(whole["columns"], two["tp"], Shard(1)),
        "both": sharded(whole["both"], two, Shard(0), Shard(1)),
        "replica": sharded(whole["replica"], two, Replicate(), Shard(0)),
        "strided": sharded(whole["strided"], two, Shard(0), Shard(0)),
    }
    with pytest.raises(Exception, match=r"mesh|DTensor"):  # otherwise this module could go
        nn.utils.clip_grad_norm_(list(params.values()), 1.0)
    everything = [idle, *params.values()]
    expected = torch.cat([g.double().flatten() for g in whole.values()]).norm()
    assert_same_bits(lion_dist.clip_grad_norm_(everything, float("inf")), expected.float())
    for name, p in params.items():
        assert_same_bits(full(p.grad), whole[name], f"{name} is only measured")
    norm = lion_dist.clip_grad_norm_(iter(everything), 0.5)
    assert_same_bits(norm, expected.float())
    coefficient = (0.5 / (expected + 1e-6)).float()
    for name, p in params.items():
        assert_same_bits(full(p.grad), whole[name] * coefficient, name)
    assert idle.grad is None


def full(t: Any) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def partial_sums(rank: int, world_size: int) -> None:
    """The gradient of a replicated weight may be a sum that the ranks have yet to make; it is scaled where it lies."""
    device = device_of(rank, world_size)
    mesh = init_device_mesh(device.type, (world_size,))
    p = nn.Parameter(distribute_tensor(torch.zeros(4, device=device), mesh, [Replicate()]))
    p.grad = DTensor.from_local(torch.full((4,), 1.0 + rank, device=device), mesh, [Partial()])
    total = world_size * (world_size + 1) / 2
    norm = lion_dist.clip_grad_norm_(p, total)
    assert norm.item() == 2 * total
    assert p.grad.placements == (Partial(),)
    assert torch.allclose(p.grad.full_tensor(), torch.full((4,), total / 2, device=device), rtol=1e-6, atol=0)


def other_stages(rank: int, world_size: int) -> None:
    """Each rank holds another part of the model, as the stages of a pipeline do; one rank has no gradient."""
    device = device_of(rank, world_size)
    p = nn.Parameter(torch.zeros(2, device=device))
    if rank:
        p.grad = torch.tensor([3.0, 4.0], device=device)
    group = dist.group.WORLD
    assert group is not None
    norm = lion_dist.clip_grad_norm_([p], float("inf"), [group])
    assert norm.item() == pytest.approx(5 * (world_size - 1) ** 0.5, rel=1e-6)
    nan = nn.Parameter(torch.zeros(1, device=device))
    nan.grad = torch.tensor([float("nan") if rank == 1 else 1.0], device=device)
    assert lion_dist.clip_grad_norm_([nan], 1.0, [group]).isnan()
    assert nan.grad.isnan()


def all_cases(rank: int, world_size: int) -> None:
    several_meshes(rank, world_size)
    partial_sums(rank, world_size)
    other_stages(rank, world_size)


def test_several_meshes(tmp_path: Path) -> None:
    run_ranks(all_cases, world_size=4, tmp_path=tmp_path)


def test_on_one_device() -> None:
    p, q = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    assert lion_dist.clip_grad_norm_([p, q], 1.0).item() == 0
    p.grad, q.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0, 0.0], dtype=torch.bfloat16)
    assert lion_dist.clip_grad_norm_([p, q], 2.5).item() == 5
    assert p.grad.tolist() == pytest.approx([1.5, 0], rel=1e-6)
    assert q.grad.tolist() == [0, 2, 0]
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="max_norm must be > 0, got"):
            lion_dist.clip_grad_norm_([p, q], bad)
    assert lion_dist.clip_grad_norm_([], 1.0).item() == 0


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_products_are_rounded_once(device: str) -> None:
    """In float32 or wider, in every dtype and shape. By itself a GPU rounds the coefficient to 16 bits first."""
    shapes = ((), (1,), (300, 7), (2, 3, 5))
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    given = [torch.randn(shape).to(dtype) for shape in shapes for dtype in dtypes] + [torch.randn(9, 4).bfloat16().t()]
    params = [nn.Parameter(torch.empty_like(g, device=device)) for g in given]
    for p, g in zip(params, given, strict=True):
        p.grad = g.to(device, copy=True)
    total = torch.stack([sum_of_squares(g) for g in given]).sum()
    norm, coefficient = clip_coefficient(total, 3.7)
    assert_same_bits(lion_dist.clip_grad_norm_(params, 3.7).cpu(), norm)
    for p, g in zip(params, given, strict=True):
        assert p.grad is not None
        wide = g.double() if g.dtype == torch.float64 else g.float()
        assert_same_bits(p.grad.cpu(), (wide * coefficient).to(g.dtype), f"{g.dtype} of shape {tuple(g.shape)}")
