"""Master weights and 8-bit momenta under DDP, FSDP1, FSDP2, their hybrids and tensor parallelism: the bits of one
device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lion_dist import Lion
from lion_dist.update.codecs import join
from tests.asserts import assert_same_bits
from tests.harness import device_of, run_ranks
from tests.scenarios.hand_fed import Fed, Held, bare, seed_of, shape_of, ways
from tests.scenarios.precision import BF16, F32, gradient_of, rounded_half_away, weights_of

FEW = range(25, 43)  # among them a NaN and, where gradients are clipped, an infinity


def local(t: Any) -> Tensor:
    return t._local_tensor if isinstance(t, DTensor) else t


def start(wrap: Callable[[nn.Module], nn.Module], device: torch.device, **options: Any) -> Fed:
    """With the float32 weights as master weights."""
    fed = Fed(wrap(Held(BF16).to(device)), master_weights=True, **options)
    whole = {name: weights_of(shape_of(name), seed_of(name)).to(device) for name in fed.named}
    versions = [p._version for p in fed.named.values()]
    # FSDP1 knows the place of a part, the optimizer does not. DTensors cut themselves.
    fed.optimizer.take_master_weights({n: fed.part(n, w) if fed.slices else w for n, w in whole.items()})
    assert all(p._version > v for p, v in zip(fed.named.values(), versions, strict=True) if p.numel())
    return fed


def assert_rounded(fed: Fed, expected: Fed, what: str) -> None:
    """This rank's parts are those of the float32 run."""
    by_seed = {seed_of(name): p for name, p in expected.named.items()}
    for name, p in fed.named.items():
        whole = by_seed[seed_of(name)].detach()
        part = fed.part(name, whole)
        assert_same_bits(local(p.detach()), rounded_half_away(part), f"{what}: {name}")
        remainder = local(fed.optimizer.state[p]["remainder"])
        assert_same_bits(join(local(p.detach()), remainder), part, f"{what}: {name}, master weight")


def body_masters(rank: int, world_size: int, steps: range) -> None:
    device = device_of(rank, world_size)
    for momentum in (None, F32) if world_size == 2 else (None,):
        expected = Fed(Held(F32).to(device), momentum_dtype=momentum or BF16)
        for step in steps:
            expected.step(step)
        for what, wrap in ways(world_size, device.type).items():
            fed = start(wrap, device, momentum_dtype=momentum)
            for step in steps:
                fed.step(step)
            assert_rounded(fed, expected, f"{what}, momentum {momentum}")
        assert any(p.isnan().any() for p in expected.named.values())
        assert any(p.isfinite().any() for p in expected.named.values())


@pytest.mark.parametrize(
    ("world_size", "steps"),
    [(2, FEW), (4, FEW), *(pytest.param(n, range(200), marks=pytest.mark.exhaustive) for n in (2, 4))],
    ids=["2-few", "4-few", "2-200", "4-200"],
)
def test_the_weights_of_a_float32_run_rounded_half_away(world_size: int, steps: range, tmp_path: Path) -> None:
    run_ranks(body_masters, world_size, tmp_path, (steps,))


def body_codes(rank: int, world_size: int) -> None:
    device = device_of(rank, world_size)
    plain = Fed(Held(BF16).to(device), momentum_dtype="int8")
    for step in FEW:
        plain.step(step)
    for what, wrap in ways(world_size, device.type).items():
        fed = start(wrap, device, momentum_dtype="int8")
        twin = fed.local_twin(momentum_dtype="int8", master_weights=True)
        pairs = [(p, q) for p, q in zip(fed.named.values(), twin.named.values(), strict=True)]
        twin.optimizer.init_state()
        for p, q in pairs:
            twin.optimizer.state[q]["remainder"].copy_(local(fed.optimizer.state[p]["remainder"]))
        for step in FEW:
            fed.step(step)
            for p, q in pairs:
                q.grad = None if p.grad is None else local(p.grad).clone()
            twin.optimizer.step()
        for (name, p), (_, q) in zip(fed.named.items(), pairs, strict=True):
            assert_same_bits(local(p.detach()), q.detach(), f"{what}: {name}")
            for key, t in twin.optimizer.state[q].items():
                assert_same_bits(local(fed.optimizer.state[p][key]), t, f"{what}: {key} of {name}")
        without = Fed(wrap(Held(BF16).to(device)), momentum_dtype="int8")
        for step in FEW:
            without.step(step)
        check_blocks(without, plain, rank, what)


def check_blocks(fed: Fed, plain: Fed, rank: int, what: str) -> None:
    """Blocks of a part that starts the parameter are those of the whole, where the part ends with a block."""
    by_seed = {seed_of(name): p for name, p in plain.named.items()}
    checked = 0
    for name, p in fed.named.items():
        q = by_seed[seed_of(name)]
        whole, entry = plain.optimizer.state[q], fed.optimizer.state[p]
        codes = local(entry["exp_avg"]).flatten()
        starts = rank == 0 or codes.numel() == q.numel()
        row_major = not isinstance(p, DTensor) or all(not placement.is_shard(1) for placement in p.placements)
        if not (starts and row_major and (codes.numel() % 128 == 0 or codes.numel() == q.numel())):
            continue
        checked += codes.numel() > 0
        assert_same_bits(codes, whole["exp_avg"].flatten()[: codes.numel()], f"{what}: codes of {name}")
        n = entry["exp_avg_scale"].numel()
        assert_same_bits(entry["exp_avg_scale"], whole["exp_avg_scale"][:n], f"{what}: scales of {name}")
    assert checked or rank


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_blocks_of_8_bit_momenta_begin_at_the_local_shard(world_size: int, tmp_path: Path) -> None:
    run_ranks(body_codes, world_size, tmp_path)


class Layers(nn.Module):
    def __init__(self, dtype: torch.dtype, device: torch.device, width: int) -> None:
        super().__init__()
        shapes = ((10, width, True), (width, 10, False))
        for name, (i, o, bias) in zip(("one", "two"), shapes, strict=True):
            self.add_module(name, nn.Linear(i, o, bias, device=device, dtype=dtype))
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(weights_of(tuple(p.shape), i))


def body_both(rank: int, world_size: int) -> None:
    """FSDP2 over tensor parallelism, whose placements are strided: a float32 model is sharded in the same way."""
    device = device_of(rank, world_size)
    mesh = init_device_mesh(device.type, (2, 2), mesh_dim_names=("dp", "tp"))

    def sharded(dtype: torch.dtype, width: int = 6) -> nn.Module:
        model = Layers(dtype, device, width)
        parallelize_module(model, mesh["tp"], {"one": ColwiseParallel(), "two": RowwiseParallel()})
        fully_shard(model, mesh=mesh["dp"])
        return model

    model, expected = sharded(BF16), sharded(F32)
    optimizer = Lion(model.named_parameters(), lr=3e-4, weight_decay=0.1, master_weights=True)
    reference = Lion(expected.named_parameters(), lr=3e-4, weight_decay=0.1, momentum_dtype=BF16)
    optimizer.take_master_weights(expected.named_parameters())
    for step in FEW:
        for i, pair in enumerate(zip(model.parameters(), expected.parameters(), strict=True)):
            for p in pair:
                assert isinstance(p, DTensor)
                g = gradient_of(tuple(local(p).shape), i + 10 * rank, step).to(device, p.dtype)
                p.grad = DTensor.from_local(
                    g, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
                )
        optimizer.step()
        reference.step()
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        master = join(local(p.detach()), local(optimizer.state[p]["remainder"]))
        assert_same_bits(master, local(q.detach()), name)
        assert_same_bits(local(p.detach()), rounded_half_away(local(q)), name)
    # Whole weights are cut where all parts are equal; elsewhere torch is wrong about the place of some.
    before = [local(p.detach()).clone() for p in model.parameters()]
    named: list[tuple[str, Any]] = list(expected.named_parameters())
    whole = {name: q.full_tensor() for name, q in named}
    with pytest.raises(ValueError, match=r"one\.weight is whole, .* sharded twice and unevenly along dimension 0"):
        optimizer.take_master_weights(whole)
    for p, b in zip(model.parameters(), before, strict=True):
        assert_same_bits(local(p.detach()), b)
    model, expected = sharded(BF16, 8), sharded(F32, 8)
    optimizer = Lion(model.named_parameters(), master_weights=True)
    whole = {name: weights_of(tuple(q.shape), i + 7) for i, (name, q) in enumerate(expected.named_parameters())}
    optimizer.take_master_weights(whole)
    optimizer.init_state()
    for name, p in model.named_parameters():
        assert isinstance(p, DTensor)
        master = join(local(p.detach()), local(optimizer.state[p]["remainder"]))
        found = DTensor.from_local(
            master, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
        )
        assert_same_bits(found.full_tensor().cpu(), whole[name], f"{name}, from the whole")


def test_fsdp2_over_tensor_parallelism(tmp_path: Path) -> None:
    run_ranks(body_both, 4, tmp_path)


def body_refused(rank: int, world_size: int) -> None:
    device = device_of(rank, world_size)
    found = ways(world_size, device.type)
    for what in ("fsdp1", "fsdp2"):
        fed = Fed(found[what](Held(BF16).to(device)), master_weights=True)
        name = next(n for n in fed.named if bare(n) == "units.even.weight")
        before = local(fed.named[name].detach()).clone()
        other = init_device_mesh(device.type, (world_size,))
        whole = weights_of((64, 16), 0).to(device)
        bad: list[tuple[Any, str]] = [(torch.zeros(5, 3, device=device), r"has shape \(5, 3\)")]
        if what == "fsdp1":
            bad.append(
                (whole, r"has shape \(64, 16\) and this rank's part of the parameter \(512,\): give each rank its part")
            )
        else:
            replicated = DTensor.from_local(whole, other, run_check=False)
            bad.append((replicated, r"is placed as \(Replicate\(\),\).*give each rank its part"))
        for t, message in bad:
            with pytest.raises(ValueError, match=rf"weight {message}"):
                fed.optimizer.take_master_weights({name: t})
            assert not fed.optimizer.state
            assert_same_bits(local(fed.named[name].detach()), before)
    plain = Lion([("w", nn.Parameter(torch.zeros(64, 16, dtype=BF16)))], master_weights=True)
    with pytest.raises(ValueError, match="w is a DTensor and the parameter a Parameter: give each rank its part"):
        plain.take_master_weights({"w": replicated})
    model = found["fsdp1"](Held(BF16).to(device))
    mixed = [{"params": [p], "momentum_dtype": ("int8", None)[i % 2]} for i, p in enumerate(model.parameters())]
    with pytest.raises(ValueError, match=r"momentum_dtype is torch.int8 in one group and torch.bfloat16 in another"):
        Lion(mixed).init_state()


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    run_ranks(body_refused, 2, tmp_path)
