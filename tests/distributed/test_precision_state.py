"""8-bit momenta and master weights through torch's own doors: the run goes on with the same bits in the same cut, and
in another one with the same weights and the momenta rounded to codes once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import StateDictType
from torch.distributed.tensor import DTensor

from lion_dist.momentum_codes import encoded
from lion_dist.update.codecs import join
from tests.asserts import assert_same_bits
from tests.harness import device_of, run_ranks
from tests.scenarios.hand_fed import Fed, Held, bare, seed_of, shape_of, ways
from tests.scenarios.precision import BF16, F32, I8, weights_of

BOTH: dict[str, Any] = {"momentum_dtype": "int8", "master_weights": True}
OPTIONS: dict[str, dict[str, Any]] = {"both": BOTH, "masters": {"master_weights": True}, "int8": {"momentum_dtype": I8}}
FIRST = range(36, 42)  # among them one with a NaN and one with an infinity
FULL = StateDictOptions(full_state_dict=True)
DOORS = {
    "nested": StateDictOptions(),
    "flattened": StateDictOptions(flatten_optimizer_state_dict=True),
    "offloaded": StateDictOptions(cpu_offload=True),
    "whole": FULL,
}
Door = Callable[[Fed, Fed], None]
MOMENTUM_KEYS = {"exp_avg", "exp_avg_scale", "remainder"}


def local(t: Any) -> Tensor:
    return t._local_tensor if isinstance(t, DTensor) else t


def by(options: StateDictOptions) -> Door:
    def door(source: Fed, target: Fed) -> None:
        state = get_optimizer_state_dict(source.model, source.optimizer, options=options)
        set_optimizer_state_dict(target.model, target.optimizer, state, options=options)

    return door


def by_broadcast(source: Fed, target: Fed) -> None:
    state: Any = get_optimizer_state_dict(source.model, source.optimizer, options=FULL)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(target.model, target.optimizer, {} if dist.get_rank() else state, options=options)


def by_itself(source: Fed, target: Fed) -> None:
    target.optimizer.load_state_dict(source.optimizer.state_dict())


def by_fsdp1(source: Fed, target: Fed) -> None:
    for fed in (source, target):
        FSDP.set_state_dict_type(fed.model, StateDictType.SHARDED_STATE_DICT)
    state = FSDP.optim_state_dict(source.model, source.optimizer)
    loaded = FSDP.optim_state_dict_to_load(target.model, target.optimizer, state)
    target.optimizer.load_state_dict(loaded)


def saved_and_loaded(folder: Path, options: StateDictOptions) -> Door:
    def door(source: Fed, target: Fed) -> None:
        saved = get_optimizer_state_dict(source.model, source.optimizer, options=options)
        dcp.save({"optimizer": saved}, checkpoint_id=folder)
        load_sharded(target, folder, options)

    return door


def load_sharded(fed: Fed, folder: Path, options: StateDictOptions, partial: bool = False) -> None:
    state = get_optimizer_state_dict(fed.model, fed.optimizer, options=options)
    dcp.load({"optimizer": state}, checkpoint_id=folder, planner=DefaultLoadPlanner(allow_partial_load=partial))
    set_optimizer_state_dict(fed.model, fed.optimizer, state, options=options)


def made(way: Any, device: torch.device, options: dict[str, Any], steps: range = range(0)) -> Fed:
    fed = Fed(way(Held(BF16).to(device)), **options)
    if steps and "master_weights" in options:
        whole = {name: weights_of(shape_of(name), seed_of(name)).to(device) for name in fed.named}
        fed.optimizer.take_master_weights({n: fed.part(n, w) if fed.slices else w for n, w in whole.items()})
    for step in steps:
        fed.step(step)
    return fed


def copy_weights(source: Fed, target: Fed) -> None:
    with torch.no_grad():
        for p, q in zip(source.named.values(), target.named.values(), strict=True):
            local(q).copy_(local(p))


def assert_same_run(got: Fed, expected: Fed, what: str) -> None:
    for (name, p), q in zip(got.named.items(), expected.named.values(), strict=True):
        assert_same_bits(local(p.detach()), local(q.detach()), f"{what}: {name}")
        own, other = got.optimizer.state[p], expected.optimizer.state[q]
        assert own.keys() == other.keys()
        assert own.keys() <= MOMENTUM_KEYS
        for key, t in other.items():
            assert isinstance(own[key], DTensor) == (isinstance(p, DTensor) and key != "exp_avg_scale")
            assert_same_bits(local(own[key]), local(t), f"{what}: {key} of {name}")
    steps = [group["rounding_step"] for group in got.optimizer.param_groups]
    assert steps == [group["rounding_step"] for group in expected.optimizer.param_groups], what


def body_resume(rank: int, world_size: int, folder: Path, all_doors: bool) -> None:
    device = device_of(rank, world_size)
    for what, way in ways(world_size, device.type).items():
        doors: dict[str, Door] = {name: by(options) for name, options in DOORS.items()}
        doors["its own"] = by_itself
        if what == "tensor parallelism":  # torch cannot load whole state into it
            doors = {name: door for name, door in doors.items() if not name.startswith("whole")}
        elif what != "ddp":  # torch cannot broadcast int16
            doors["broadcast"] = by_broadcast
        if what.startswith("fsdp1"):
            doors["fsdp1"] = by_fsdp1
        if what in ("fsdp1", "fsdp2", "ddp"):
            doors["file"] = saved_and_loaded(folder / f"{what}.nested", DOORS["nested"])
            doors["file, flattened"] = saved_and_loaded(folder / f"{what}.flat", DOORS["flattened"])
        if what == "fsdp1, SHARD_GRAD_OP" and not all_doors:  # they are FULL_SHARD's
            doors = {name: door for name, door in doors.items() if name in ("nested", "its own", "fsdp1")}
        for kind, options in OPTIONS.items():
            if kind != "both":
                doors = {name: door for name, door in doors.items() if name in ("nested", "its own")}
            source = made(way, device, options, FIRST)
            found: dict[str, Fed] = {}
            for name, door in doors.items():
                target = found[f"{what}, {kind}, {name}"] = made(way, device, options)
                try:
                    door(source, target)
                except Exception as error:
                    raise AssertionError(f"{what}, {kind}, {name}") from error
                copy_weights(source, target)
            for step in (None, 60):
                for fed in (source, *found.values()) if step else ():
                    fed.step(step or 0)
                for name, target in found.items():
                    assert_same_run(target, source, name)


@pytest.mark.parametrize("all_doors", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_the_same_cut_resumes_with_the_same_bits(all_doors: bool, tmp_path: Path) -> None:
    run_ranks(body_resume, 2, tmp_path, (tmp_path, all_doors))


# Another cut ------------------------------------------------------------------------------------------


def masters_of(fed: Fed) -> dict[str, Tensor]:
    return {
        bare(name): join(local(p.detach()), local(fed.optimizer.state[p]["remainder"])) for name, p in fed.named.items()
    }


def body_save(rank: int, world_size: int, folder: Path) -> None:
    device = device_of(rank, world_size)
    for what in ("fsdp1", "fsdp2", "ddp"):
        fed = made(ways(world_size, device.type)[what], device, BOTH, FIRST)
        state = get_optimizer_state_dict(fed.model, fed.optimizer, options=StateDictOptions())
        dcp.save({"optimizer": state}, checkpoint_id=folder / what)
        whole = get_optimizer_state_dict(fed.model, fed.optimizer, options=FULL)
        if rank == 0:
            torch.save(whole, folder / f"{what}.pt")

    fed = made(ways(world_size, device.type)["fsdp2"], device, {"momentum_dtype": F32}, FIRST)
    state = get_optimizer_state_dict(fed.model, fed.optimizer, options=StateDictOptions())
    dcp.save({"optimizer": state}, checkpoint_id=folder / "numbers")


def whole_momenta(folder: Path, what: str) -> dict[str, Tensor]:
    state = torch.load(folder / f"{what}.pt", weights_only=True, map_location="cpu")["state"]
    return {bare(name): entry["exp_avg"] for name, entry in state.items()}


def load_whole(fed: Fed, folder: Path, what: str) -> None:
    state = torch.load(folder / f"{what}.pt", weights_only=True, map_location="cpu")
    set_optimizer_state_dict(fed.model, fed.optimizer, state, options=FULL)


def assert_loaded(fed: Fed, momenta: dict[str, Tensor], remainders: dict[str, Tensor], what: str) -> None:
    """The momentum of each part, rounded to codes in its own blocks, and the remainders as they were."""
    for name, p in fed.named.items():
        entry = fed.optimizer.state[p]
        m = fed.part(name, momenta[bare(name)].to(local(p).device))
        codes, scale = encoded(m, local(p.detach()))
        assert_same_bits(local(entry["exp_avg"]), codes, f"{what}: codes of {name}")
        assert_same_bits(entry["exp_avg_scale"], scale, f"{what}: scales of {name}")
        r = fed.part(name, remainders[bare(name)].to(local(p).device)).to(torch.int16)
        assert_same_bits(local(entry["remainder"]), r, f"{what}: remainder of {name}")
    assert [group["rounding_step"] for group in fed.optimizer.param_groups] == [len(FIRST)] * 2, what


def remainders_in(folder: Path, what: str) -> dict[str, Tensor]:
    state = torch.load(folder / f"{what}.pt", weights_only=True, map_location="cpu")["state"]
    return {bare(name): entry["remainder"] for name, entry in state.items()}


def body_load(rank: int, world_size: int, folder: Path) -> None:
    device = device_of(rank, world_size)
    found = ways(world_size, device.type)
    for there in ("fsdp1", "fsdp2"):
        momenta, remainders = whole_momenta(folder, there), remainders_in(folder, there)
        assert all(r.any() for name, r in remainders.items() if "bias" not in name)
        for here in ("fsdp1", "fsdp2"):
            fed = made(found[here], device, BOTH)
            load_sharded(fed, folder / there, StateDictOptions())
            assert_loaded(fed, momenta, remainders, f"{there} into {here} on {world_size}")
        fed = made(found["fsdp2"], device, BOTH)
        load_whole(fed, folder, there)
        assert_loaded(fed, momenta, remainders, f"whole {there} into fsdp2 on {world_size}")
        alone = Fed(Held(BF16).to(device), **BOTH)
        load_whole(alone, folder, there)
        assert_loaded(alone, momenta, remainders, f"whole {there} into one device")
        numbers = made(found["fsdp2"], device, {"momentum_dtype": F32})
        load_sharded(numbers, folder / there, StateDictOptions())
        for name, p in numbers.named.items():
            entry = numbers.optimizer.state[p]
            assert entry.keys() == {"exp_avg"}
            assert_same_bits(local(entry["exp_avg"]), numbers.part(name, momenta[bare(name)].to(device)), name)
    for here in ("fsdp1", "fsdp2"):
        eight = made(found[here], device, BOTH)
        load_sharded(eight, folder / "numbers", StateDictOptions(), partial=True)
        for name, p in eight.named.items():
            assert local(eight.optimizer.state[p]["exp_avg"]).dtype == I8
            assert local(eight.optimizer.state[p]["exp_avg"]).any() or not local(p).numel(), name
            assert not local(eight.optimizer.state[p]["remainder"]).any()
    with pytest.raises(CheckpointException, match="Size mismatch"):  # codes of a replica are no codes of a part
        load_sharded(made(found["fsdp2"], device, BOTH), folder / "ddp", StateDictOptions())


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_another_cut(world_size: int, tmp_path: Path) -> None:
    run_ranks(body_save, 2, tmp_path, (tmp_path,))
    run_ranks(body_load, world_size, tmp_path, (tmp_path,))


def body_first(rank: int, world_size: int) -> None:
    device = device_of(rank, world_size)
    for what, way in ways(world_size, device.type).items():
        fed = made(way, device, BOTH)
        weights = {name: local(p.detach()).clone() for name, p in fed.named.items()}
        shown: Any = get_optimizer_state_dict(fed.model, fed.optimizer, options=StateDictOptions())
        assert all(entry.keys() >= MOMENTUM_KEYS for entry in shown["state"].values()), what
        for name, p in fed.named.items():
            assert_same_bits(local(p.detach()), weights[name], f"{what}: {name}")
            assert not local(fed.optimizer.state[p]["remainder"]).any(), what
        taken = made(way, device, BOTH, range(1))
        before = masters_of(taken)
        get_optimizer_state_dict(taken.model, taken.optimizer, options=StateDictOptions())
        for name, master in masters_of(taken).items():
            assert_same_bits(master, before[name], f"{what}: {name}")

        # Of a run without master weights: remainders of zeros.
        without = made(way, device, {"momentum_dtype": F32}, range(3))
        by_itself(without, taken)
        copy_weights(without, taken)
        for t in (taken, without):
            t.step(7)
        for (name, p), q in zip(taken.named.items(), without.named.values(), strict=True):
            assert local(taken.optimizer.state[p]["exp_avg"]).dtype == I8, what
            assert local(taken.optimizer.state[p]["remainder"]).any() or local(p).numel() < 40, name
            assert not local(q.detach()).isnan().any()


def test_before_the_first_step_and_without_remainders(tmp_path: Path) -> None:
    run_ranks(body_first, 2, tmp_path)
