"""The optimizer's state under FSDP through torch's own doors: saved on two ranks, loaded on four, on one, and without
FSDP; training then goes on with the bits of a run that was never interrupted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import ShardingStrategy, StateDictType

from lion_dist import Lion, checkpoint
from tests.asserts import assert_same_as, assert_same_bits
from tests.harness import device_of, run_ranks
from tests.scenarios.fsdp_toy import FsdpToy, Twin
from tests.scenarios.fsdp_training import FULL, Place, Way, local, make_lion, train
from tests.scenarios.fsdp_wrapping import fsdp1_way, shard_fsdp2, wrap_fsdp1

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
UNTIED = {"tied": False}
SAVED_AT = 3  # one step of these uses what the others do not, and so does one of the two that follow


def fp32_momentum(model: nn.Module) -> Lion:
    return make_lion(model, momentum_dtype=F32)


def ways(place: Place) -> dict[str, Way]:
    mesh = init_device_mesh(place.device.type, (place.size,))  # FSDP1's sharded state is DTensors then

    def fsdp1(model: FsdpToy) -> nn.Module:
        return wrap_fsdp1(model, device_mesh=mesh)

    mixed = (BF16, F32, F16)  # the momentum of float16 is float32 by itself
    return {
        "fsdp1": Way(fsdp1, mixed, toy=UNTIED, zeros=True),
        "fsdp1, momentum in float32": Way(fsdp1, (BF16,), fp32_momentum, toy=UNTIED, zeros=True),
        "fsdp2": Way(shard_fsdp2, mixed, toy=UNTIED),
        "fsdp2, momentum in float32": Way(shard_fsdp2, (BF16,), fp32_momentum, toy=UNTIED),
    }


def body_save(rank: int, world_size: int, folder: Path) -> None:
    place = Place(rank, world_size, device_of(rank, world_size))
    for name, way in ways(place).items():
        model, optimizer, twin = way.start(place)
        train(way, place, range(SAVED_AT), model, optimizer, twin)
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder / name / "sharded")
        flat = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
        dcp.save({"optimizer": flat}, checkpoint_id=folder / name / "flattened")
        whole = {
            "model": get_model_state_dict(model, options=FULL),
            "optimizer": get_optimizer_state_dict(model, optimizer, options=FULL),
        }
        if rank == 0:
            torch.save(whole, folder / name / "whole.pt")


def load_sharded(model: nn.Module, optimizer: Lion, folder: Path) -> None:
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder / "sharded")
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)


def load_flattened(model: nn.Module, optimizer: Lion, folder: Path) -> None:
    load_sharded(model, Lion(model.parameters()), folder)  # the weights; another optimizer's state is dropped
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    dcp.load({"optimizer": state}, checkpoint_id=folder / "flattened")
    set_optimizer_state_dict(model, optimizer, state, options=options)


def load_whole(model: nn.Module, optimizer: Lion, folder: Path) -> None:
    whole = torch.load(folder / "whole.pt", weights_only=True, map_location="cpu")
    set_model_state_dict(model, whole["model"], options=FULL)
    set_optimizer_state_dict(model, optimizer, whole["optimizer"], options=FULL)


def load_broadcast(model: nn.Module, optimizer: Lion, folder: Path) -> None:
    """Only the first rank has read the file."""
    whole: dict[str, Any] = {"model": {}, "optimizer": {}}
    if dist.get_rank() == 0:
        whole = torch.load(folder / "whole.pt", weights_only=True, map_location="cpu")
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, whole["model"], options=options)
    set_optimizer_state_dict(model, optimizer, whole["optimizer"], options=options)


LOADS: list[Callable[[nn.Module, Lion, Path], None]] = [load_sharded, load_flattened, load_whole, load_broadcast]


def body_resume(rank: int, world_size: int, folder: Path, every: bool) -> None:
    """Without ``every`` each way's loads are shared out: half of them on one rank, the others on several."""
    place = Place(rank, world_size, device_of(rank, world_size))
    for number, (name, way) in enumerate(ways(place).items()):
        loads = LOADS if len(way.dtypes) > 1 else LOADS[:2]
        for load in loads if every else loads[(number // 2 + (world_size == 1)) % 2 :: 2]:
            what = f"{name}, {load.__name__} on {world_size}"
            try:
                check_resume(what, way, place, folder / name, load)
            except Exception as error:
                raise AssertionError(what) from error
        if world_size == 1:
            unwrapped = Way(lambda model: model, way.dtypes, way.make, toy=way.toy, zeros=way.zeros)
            check_resume(f"{name} without FSDP", unwrapped, place, folder / name, load_whole)


def check_resume(
    what: str, way: Way, place: Place, folder: Path, load: Callable[[nn.Module, Lion, Path], None]
) -> None:
    model, optimizer, twin = way.start(place)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()  # all that is right afterwards has been loaded
    for step in range(SAVED_AT):
        twin.step([step], 2)
    load(model, optimizer, folder)
    assert_same_as(twin, model, optimizer, f"{what}: loaded")
    assert tuple(optimizer.param_groups[2]["betas"]) == (0.95, 0.98)  # torch's gathering makes lists of tuples
    assert [g["momentum_dtype"] for g in optimizer.param_groups] == [
        g["momentum_dtype"] for g in twin.optimizer.param_groups
    ]
    twin.zeros = isinstance(model, FSDP)
    train(way, place, range(SAVED_AT, SAVED_AT + 2), model, optimizer, twin)
    assert_same_as(twin, model, optimizer, what)


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_save_on_two_ranks_load_on_four_and_one(every: bool, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    run_ranks(body_save, 2, tmp_path, (folder,))
    for world_size in (4, 1):
        run_ranks(body_resume, world_size, tmp_path, (folder, every))


def body_doors(rank: int, world_size: int) -> None:
    place = Place(rank, world_size, device_of(rank, world_size))
    for name, way in ways(place).items():
        for lr in (1e-2, torch.tensor(1e-2, device=place.device)):
            model = way.wrap(FsdpToy(way.dtypes, place.device, **way.toy))
            optimizer = Lion(model.parameters(), lr=lr, weight_decay=0.5)
            before = [local(p.detach()).clone() for p in model.parameters()]
            get_optimizer_state_dict(model, optimizer)  # makes a step with lr 0 and gradients of zeros
            for p, was in zip(model.parameters(), before, strict=True):
                assert_same_bits(local(p.detach()), was, name)
            trainable = [p for p in model.parameters() if p.requires_grad]
            assert list(map(id, optimizer.state)) == list(map(id, trainable)), name
    # FSDP1's own doors.
    way = ways(place)["fsdp1, momentum in float32"]
    model, optimizer, twin = way.start(place)
    mixed = Lion([{"params": [p], "momentum_dtype": (F32, BF16)[i % 2]} for i, p in enumerate(model.parameters())])
    with pytest.raises(ValueError, match=r"float32 in one group and torch.bfloat16 in another; FSDP1"):
        mixed.init_state()
    with FSDP.state_dict_type(model, StateDictType.SHARDED_STATE_DICT):  # what a load of torch's goes by
        shown = FSDP.optim_state_dict(model, way.make(model))["state"]
    assert len(shown) == sum(p.requires_grad for p in model.parameters())
    train(way, place, range(3), model, optimizer, twin)
    state = FSDP.optim_state_dict(model, optimizer)
    other = way.make(model)
    other.load_state_dict(FSDP.optim_state_dict_to_load(model, other, state))
    for owner, entry in optimizer.state.items():
        assert_same_bits(other.state[owner]["exp_avg"], entry["exp_avg"])
    buffers = [{m["exp_avg"].untyped_storage().data_ptr() for m in o.state.values()} for o in (optimizer, other)]
    assert len(buffers[0]) == len(buffers[1])  # adopted into flat buffers again
    train(way, place, range(3, 5), model, other, twin)
    assert_same_as(twin, model, other, "FSDP.optim_state_dict_to_load")


def body_evaluated(rank: int, world_size: int, folder: Path) -> None:
    place = Place(rank, world_size, device_of(rank, world_size))
    grad_op = fsdp1_way(ShardingStrategy.SHARD_GRAD_OP)
    found = {**ways(place), "fsdp1, SHARD_GRAD_OP": Way(grad_op, toy=UNTIED, zeros=True)}
    for name, way in found.items():
        model, optimizer, twin = way.start(place)

        def evaluated(model: nn.Module = model) -> torch.Tensor:
            with torch.no_grad():
                return cast(torch.Tensor, model(1, rank, world_size))

        train(way, place, range(2), model, optimizer, twin)
        expected = evaluated()
        checkpoint.save(folder / name, model, optimizer)
        train(way, place, range(2, 3), model, optimizer, Twin(twin.model, way.make, way.zeros))
        assert not torch.equal(evaluated(), expected), name
        checkpoint.load(folder / name, model, optimizer)
        assert_same_bits(evaluated(), expected, name)


def test_checkpoints_of_a_model_that_has_just_been_evaluated(tmp_path: Path) -> None:
    """A forward without a backward leaves whole parameters behind: they are neither saved nor computed with later."""
    run_ranks(body_evaluated, 2, tmp_path, (tmp_path,))


def test_state_dict_functions_of_fsdp(tmp_path: Path) -> None:
    """Asking for a state before there is one changes no weight; FSDP1's own functions."""
    run_ranks(body_doors, 2, tmp_path)
