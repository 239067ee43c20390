"""Lion over FSDP1: every way to wrap gives the bits of Lion on the unsharded model.

A rank goes through many cases, because it takes longer to start than to train a toy.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffload, MixedPrecision, ShardingStrategy
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from lion_dist import Lion, ShardedLion
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
    make_lion,
)
from tests.scenarios.fsdp_wrapping import fsdp1_way, wrap_fsdp1

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
S = ShardingStrategy
UNTIED = {"tied": False}
FSDP1 = partial(Way, zeros=True)


def checkpointed(model: FsdpToy) -> nn.Module:
    wrapped = wrap_fsdp1(model)
    apply_activation_checkpointing(wrapped, check_fn=lambda module: isinstance(module, Unit))
    return wrapped


def one_group(model: nn.Module, **options: Any) -> Lion:
    return Lion(model.parameters(), lr=1e-2, weight_decay=0.3, **options)


def with_memory(model: nn.Module, device: torch.device) -> nn.Module:
    return wrap_fsdp1(model, device_id=device, param_init_fn=lambda m: m.to_empty(device=device, recurse=False))


def ways(world_size: int, device: torch.device) -> dict[str, Way]:
    found = {
        "SHARD_GRAD_OP": FSDP1(fsdp1_way(S.SHARD_GRAD_OP)),
        "bfloat16, momentum in float32": FSDP1(fsdp1_way(), (BF16,), partial(make_lion, momentum_dtype=F32)),
        "reduced in float32": FSDP1(fsdp1_way(mixed_precision=MixedPrecision(param_dtype=BF16, reduce_dtype=F32))),
    }
    if world_size == 4:
        mesh = init_device_mesh(device.type, (2, 2), mesh_dim_names=("replicate", "shard"))
        found["HYBRID_SHARD"] = FSDP1(fsdp1_way(S.HYBRID_SHARD, device_mesh=mesh))
    low = MixedPrecision(param_dtype=BF16, reduce_dtype=BF16, keep_low_precision_grads=True)
    found |= {
        "FULL_SHARD": FSDP1(fsdp1_way()),
        "NO_SHARD": FSDP1(fsdp1_way(S.NO_SHARD)),
        # (Of a parameter with two names torch 2.13 cannot keep them: it fails in its own backward.)
        "gradients kept in bfloat16": FSDP1(fsdp1_way(mixed_precision=low), toy=UNTIED),
        "mixed dtypes": FSDP1(fsdp1_way(), (BF16, F32, F16)),
        "accumulation": FSDP1(fsdp1_way(), micro_steps=2),
        "accumulation, SHARD_GRAD_OP": FSDP1(fsdp1_way(S.SHARD_GRAD_OP), micro_steps=2),
        "replaced gradients": FSDP1(fsdp1_way(), replaces_gradients=True),
        "activation checkpointing": FSDP1(checkpointed),
        "meta device": FSDP1(lambda model: from_meta(model, partial(with_memory, device=device)), toy=UNTIED),
        # A flat parameter is one parameter: all of it is trained, in one group.
        "use_orig_params=False": FSDP1(fsdp1_way(use_orig_params=False), make=one_group, toy={"frozen": False}),
    }
    if device.type == "cuda":  # torch pins the memory, and makes streams, of an accelerator
        found["CPU offload"] = FSDP1(fsdp1_way(cpu_offload=CPUOffload(offload_params=True)))
    return found


# On four ranks: the ways that cut parameters. What the others change shows on two ranks.
ON_FOUR = ("HYBRID_SHARD", "FULL_SHARD", "NO_SHARD", "mixed dtypes", "use_orig_params=False")


def body_ways(rank: int, world_size: int, every: bool) -> None:
    place = Place(rank, world_size, device_of(rank, world_size))
    for what, one in ways(world_size, place.device).items():
        if every or what in ON_FOUR:
            check_way(what, one, place)


@pytest.mark.parametrize(
    ("world_size", "every"), [(2, True), (4, False), pytest.param(4, True, marks=pytest.mark.exhaustive)]
)
def test_every_way_to_wrap(world_size: int, every: bool, tmp_path: Path) -> None:
    run_ranks(body_ways, world_size, tmp_path, (every,))


def cloned_data(model: nn.Module, plain: FsdpToy) -> None:
    for p in model.parameters():
        p.data = p.data.clone()


def moved(model: nn.Module, plain: FsdpToy) -> None:
    model._apply(torch.clone)  # as .to() does


def edited_whole(model: nn.Module, plain: FsdpToy) -> None:
    with FSDP.summon_full_params(model, writeback=True), torch.no_grad():
        for p in (*model.parameters(), *plain.parameters()):
            p.add_(0.5)


def clip(model: Any, max_norm: float) -> torch.Tensor:
    return model.clip_grad_norm_(max_norm)


def body_life(rank: int, world_size: int) -> None:
    place = Place(rank, world_size, device_of(rank, world_size))
    check_moves(FSDP1(fsdp1_way()), place, [cloned_data, moved, edited_whole])
    check_clipping(FSDP1(fsdp1_way()), place, clip)
    scaler = ShardedGradScaler(device=place.device.type, init_scale=2.0**8)
    check_loss_scale(FSDP1(fsdp1_way(), (F16,)), place, scaler)
    check_one_launch(FSDP1(fsdp1_way()), place)
    if world_size == 2:
        check_growth(FSDP1(fsdp1_way()), place)
        check_no_recompilation(FSDP1(fsdp1_way()), place)
        check_compiled(wrap_fsdp1, place)


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_life(world_size: int, tmp_path: Path) -> None:
    """Tensors that move, clipping, loss scaling, launches, memory, torch.compile."""
    run_ranks(body_life, world_size, tmp_path)


def body_corners(rank: int, world_size: int) -> None:
    place = Place(rank, world_size, device_of(rank, world_size))
    model, optimizer, _ = FSDP1(fsdp1_way()).start(place)
    before = [p.detach().clone() for p in model.parameters()]
    with model.no_sync():  # type: ignore[operator]
        model(0, rank, world_size).backward()
    with pytest.raises(ValueError, match=r"no_sync\(\) leaves whole gradients"):
        optimizer.step()
    assert not optimizer.state
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    optimizer.zero_grad()

    backward(FSDP1(fsdp1_way()), model, 0, place)
    optimizer.step()
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert list(map(id, optimizer.state)) == list(
        map(id, (p for g in optimizer.param_groups for p in g["params"] if p.requires_grad))
    )
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in trainable)
    buffers = {m["exp_avg"].untyped_storage().data_ptr() for m in optimizer.state.values() if m["exp_avg"].numel()}
    # One a flat parameter, of which there are five; a frozen parameter parts one, on the rank that has both its sides.
    assert len(buffers) <= 6
    held = sum(m["exp_avg"].numel() > 0 for m in optimizer.state.values())
    assert held > len(buffers) or rank > 0
    with pytest.raises(TypeError, match=r"flat parameter of FSDP1.*Use lion_dist\.Lion\(model\.parameters\(\)"):
        ShardedLion(model.parameters())
    whole = Lion(FsdpToy(device=place.device).parameters()).state_dict()
    whole["state"] = {0: {"exp_avg": torch.zeros(17, 3)}}
    with pytest.raises(ValueError, match=r"FSDP\.optim_state_dict_to_load"):
        Lion(model.parameters()).load_state_dict(whole)


def test_corners(tmp_path: Path) -> None:
    """Whole gradients are refused; state exists for what this rank has nothing of; momenta share a buffer."""
    run_ranks(body_corners, 2, tmp_path)
