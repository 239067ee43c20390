"""Lion over FSDP2 and tensor parallelism: DTensors are stepped on their local shards, with the bits of Lion on the
unsharded model. A rank goes through many cases, because it takes longer to start than to train a toy."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor

from lion_dist import Lion, ShardedLion
from tests.asserts import assert_same_bits
from tests.harness import device_of, run_ranks
from tests.scenarios.fsdp_toy import FsdpToy, Unit
from tests.scenarios.fsdp_training import (
    Place,
    Way,
    backward,
    check_clipping,
    check_compiled,
    check_growth,
    check_loss_scale,
    check_moves,
    check_no_recompilation,
    check_one_launch,
    check_way,
    from_meta,
    local,
    make_lion,
)
from tests.scenarios.fsdp_wrapping import all_ranks, fsdp2_way, shard_fsdp2

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
UNTIED = {"tied": False}  # torch loads no whole weight with two names into DTensors


def checkpointed(model: FsdpToy) -> nn.Module:
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Unit))
    return shard_fsdp2(model)


def some_plain(model: FsdpToy) -> nn.Module:
    """The root is not sharded: what it holds itself is replicated, and its gradients averaged by hand."""
    mesh = all_ranks()
    for module in model.units.values():
        fully_shard(module, mesh=mesh)
    for p in (model.embedding, model.scale):
        p.register_post_accumulate_grad_hook(
            lambda p: torch.distributed.all_reduce(p.grad, torch.distributed.ReduceOp.AVG)
        )
    return model


def tensor_parallel(model: FsdpToy, mesh: DeviceMesh) -> nn.Module:
    """Over "tp": matrices by rows or columns, the rest replicated; then FSDP over "dp"."""
    placements = {"first": Shard(0), "second": Shard(1), "idle": Replicate(), "sometimes": Shard(0)}

    def cut(name: str, module: nn.Module, tp: DeviceMesh) -> None:
        for key, p in list(module.named_parameters(recurse=False)):
            placement = placements[name] if p.dim() == 2 else Replicate()
            sharded = nn.Parameter(distribute_tensor(p.detach(), tp, [placement]), requires_grad=p.requires_grad)
            module.register_parameter(key, sharded)

    for name, unit in model.units.items():
        distribute_module(unit, mesh["tp"], partial(lambda name, _, module, tp: cut(name, module, tp), name))
    return shard_fsdp2(model, mesh=mesh["dp"])


def ways(world_size: int, device: torch.device) -> dict[str, Way]:
    found = {
        "as it comes": Way(fsdp2_way()),
        "bfloat16, momentum in float32": Way(fsdp2_way(), (BF16,), partial(make_lion, momentum_dtype=F32)),
    }
    if world_size == 4:
        mesh = init_device_mesh(device.type, (2, 2), mesh_dim_names=("replicate", "shard"))
        found["HSDP"] = Way(fsdp2_way(mesh=mesh))
    reduced = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=F32)
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda")

    def on_meta(model: FsdpToy) -> nn.Module:
        return from_meta(model, lambda m: shard_fsdp2(m).to_empty(device=device))

    return found | {
        "reshard_after_forward=False": Way(fsdp2_way(reshard_after_forward=False)),
        "MixedPrecisionPolicy": Way(fsdp2_way(mp_policy=reduced)),
        "CPUOffloadPolicy": Way(lambda model: shard_fsdp2(model.cpu(), offload_policy=offload)),
        "mixed dtypes": Way(fsdp2_way(), (BF16, F32, F16)),
        "accumulation": Way(fsdp2_way(), micro_steps=2),
        "replaced gradients": Way(fsdp2_way(), replaces_gradients=True),
        "activation checkpointing": Way(checkpointed),
        "meta device": Way(
            lambda model: from_meta(model, lambda m: shard_fsdp2(m).to_empty(device=device)), toy=UNTIED
        ),
        "plain parameters too": Way(some_plain),
    }


# On four ranks: the ways that cut parameters. What the others change shows on two ranks.
ON_FOUR = ("HSDP", "as it comes", "mixed dtypes", "meta device", "plain parameters too")


def body_ways(rank: int, world_size: int, every: bool) -> None:
    device = device_of(rank, world_size)
    for what, one in ways(world_size, device).items():
        if every or what in ON_FOUR:
            check_way(what, one, Place(rank, world_size, device))
    if world_size == 4:
        mesh = init_device_mesh(device.type, (2, 2), mesh_dim_names=("dp", "tp"))
        one = Way(lambda model: tensor_parallel(model, mesh), toy=UNTIED)
        check_way("tensor parallelism", one, Place(mesh.get_local_rank("dp"), 2, device))


@pytest.mark.parametrize(
    ("world_size", "every"), [(2, True), (4, False), pytest.param(4, True, marks=pytest.mark.exhaustive)]
)
def test_every_way_to_shard(world_size: int, every: bool, tmp_path: Path) -> None:
    run_ranks(body_ways, world_size, tmp_path, (every,))


def cloned_data(model: nn.Module, plain: FsdpToy) -> None:
    for p in model.parameters():
        p.data = p.data.clone()


def moved(model: nn.Module, plain: FsdpToy) -> None:
    model._apply(torch.clone)  # as .to() does


def edited_whole(model: Any, plain: FsdpToy) -> None:
    with torch.no_grad():
        for p in (*model.parameters(), *plain.parameters()):
            p.add_(0.5)


def clip(model: nn.Module, max_norm: float) -> Tensor:
    return nn.utils.clip_grad_norm_(model.parameters(), max_norm)


def body_life(rank: int, world_size: int) -> None:
    place = Place(rank, world_size, device_of(rank, world_size))
    check_moves(Way(fsdp2_way(), toy=UNTIED), place, [cloned_data, moved, edited_whole])
    check_clipping(Way(fsdp2_way()), place, clip)
    in_half = Way(fsdp2_way(mp_policy=MixedPrecisionPolicy(param_dtype=F16, reduce_dtype=F32)))
    for scaler in (torch.amp.GradScaler, ShardedGradScaler):
        check_loss_scale(in_half, place, scaler(place.device.type, init_scale=2.0**8))
    check_one_launch(Way(fsdp2_way()), place)
    check_one_launch(Way(some_plain), place)
    if world_size == 2:
        check_growth(Way(fsdp2_way()), place)
        check_no_recompilation(Way(fsdp2_way()), place)
        check_compiled(shard_fsdp2, place)


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_life(world_size: int, tmp_path: Path) -> None:
    """Tensors that move, clipping, loss scaling, launches, memory, torch.compile."""
    run_ranks(body_life, world_size, tmp_path)


def body_corners(rank: int, world_size: int) -> None:
    place = Place(rank, world_size, device_of(rank, world_size))
    model, optimizer, _ = Way(fsdp2_way()).start(place)
    backward(Way(fsdp2_way()), model, 0, place)
    versions = [p._version for p in model.parameters()]
    optimizer.step()
    for p, version in zip(model.parameters(), versions, strict=True):
        assert (p._version > version) == (p.grad is not None)  # a graph that saved it is to know
        if not p.requires_grad:
            assert p not in optimizer.state
            continue
        m = optimizer.state[p]["exp_avg"]
        assert isinstance(m, DTensor)
        assert isinstance(p, DTensor)
        assert (m.shape, m.stride(), m.placements, m.device_mesh) == (p.shape, p.stride(), p.placements, p.device_mesh)
        assert local(m).shape == local(p).shape
    with pytest.raises(ValueError, match=r"(?s)must hold replicas of one part.*use lion_dist\.Lion"):
        ShardedLion(model.parameters())
    # What torch's doors would have sharded.
    state = optimizer.state_dict()
    state["state"] = {i: {"exp_avg": entry["exp_avg"].full_tensor()} for i, entry in state["state"].items()}
    with pytest.raises(ValueError, match="set_optimizer_state_dict"):
        optimizer.load_state_dict(state)
    replicated = {
        i: {"exp_avg": distribute_tensor(e["exp_avg"], m.device_mesh, [Replicate()])} for i, e in state["state"].items()
    }
    with pytest.raises(ValueError, match="is placed as"):
        optimizer.load_state_dict({**state, "state": replicated})
    plain = Lion(FsdpToy(device=place.device).parameters())
    with pytest.raises(ValueError, match="and the parameter a Parameter"):
        plain.load_state_dict({**plain.state_dict(), "state": optimizer.state_dict()["state"]})


def body_partial_gradients(rank: int, world_size: int) -> None:
    """The gradient that tensor parallelism leaves for a replicated gain is a sum to be added up; DTensor's own
    optimizers do so."""
    device = device_of(rank, world_size)
    mesh = init_device_mesh(device.type, (world_size,))
    value = torch.arange(5.0, device=device)
    p, q = nn.Parameter(distribute_tensor(value, mesh, [Replicate()])), nn.Parameter(value.clone())
    sharded, plain = Lion([p], lr=0.25), Lion([q], lr=0.25)
    for step in range(3):
        parts = [
            torch.tensor([3.0, -1.0, 2.0, 0.0, -5.0], device=device) * (-1 if r else 1) + r + step
            for r in range(world_size)
        ]
        p.grad = DTensor.from_local(parts[rank], mesh, [Partial()], run_check=False)
        q.grad = sum(parts[1:], parts[0])
        sharded.step()
        plain.step()
        assert_same_bits(local(p.detach()), q.detach())
        assert_same_bits(local(sharded.state[p]["exp_avg"]), plain.state[q]["exp_avg"])


def body_all_corners(rank: int, world_size: int) -> None:
    body_corners(rank, world_size)
    body_partial_gradients(rank, world_size)


def test_corners(tmp_path: Path) -> None:
    """State is sharded as parameters are, empty parts too; what does not fit is refused; gradients left as sums."""
    run_ranks(body_all_corners, 2, tmp_path)
