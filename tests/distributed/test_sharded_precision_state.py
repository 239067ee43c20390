"""Master weights and 8-bit momenta under ShardedLion: replicas that differ, and state that is saved and loaded."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from lion_dist import Lion, ShardedLion
from lion_dist.sharding.box_tensor import BoxTensor
from lion_dist.update import codecs
from lion_dist.update.state import EXP_AVG, EXP_AVG_SCALE, REMAINDER
from tests.asserts import assert_same_bits, bits
from tests.harness import device_of, run_ranks
from tests.scenarios.modes import Mode, Modes, sizes, values

F32, BF16 = torch.float32, torch.bfloat16
BOTH: dict[str, Any] = {"master_weights": True, "momentum_dtype": "int8"}
GROUPS: list[dict[str, Any]] = [{"params": [5, 2, 4, 0], "weight_decay": 0.1}, {"params": [1, 3, 6, 7], "lr": 3e-4}]
KERNEL, LARGE = 4, 5  # channels-last; with a head and a tail


def trained(rank: int, world_size: int, steps: int) -> Modes:
    """Modes with master weights and 8-bit momenta, whose shapes do not depend on the number of ranks."""
    warnings.simplefilter("ignore")  # of decay that is rounded away
    weights = values(sizes(2), BF16, device_of(rank, world_size))
    modes = Modes(rank, world_size, weights, GROUPS, **BOTH)
    for step in range(steps):
        modes.step(step)
    return modes


def parts_of(mode: Mode) -> list[Tensor]:
    """The memory of this rank's weights and state."""
    held = [t for p in mode.params for t in mode.optimizer.state[p].values()]
    return [*mode.params, *(part for t in held for part in (t.parts if isinstance(t, BoxTensor) else [t]))]


# Replicas -------------------------------------------------------------------------------------------


def spoil(mode: Mode, i: int) -> None:
    mode.optimizer.state[mode.params[i]][REMAINDER].view(-1)[-1] ^= 1


def body_replicas(rank: int, world_size: int) -> None:
    """Whole remainders are compared and mended as weights are; in the error they have the numbers of the parameters."""
    modes = trained(rank, world_size, 3)
    signs = next(mode for mode in modes.modes if (mode.stage, mode.sync) == (2, "signs"))
    optimizer = signs.optimizer
    optimizer.check_replicas()
    if rank == 1:
        spoil(signs, 1)  # the first of the second group
    said = r"^1 tensors of the parameters' state differ in .*: remainder of parameter 4 on ranks \[1\]\. Call resync"
    with pytest.raises(RuntimeError, match=said):
        optimizer.check_replicas()
    optimizer.resync()
    optimizer.check_replicas()
    modes.check("mended", [signs])

    # The first rank is what counts, of weights and of remainders.
    if rank == 0:
        spoil(signs, LARGE)
        with torch.no_grad():
            signs.params[2].add_(1.0)
    others = str(list(range(1, world_size))).replace("[", r"\[").replace("]", r"\]")
    said = (
        rf"^1 parameters and 1 tensors of the parameters' state differ in .*: parameter 1 on ranks {others}; "
        rf"remainder of parameter 0 on ranks {others}\."
    )
    with pytest.raises(RuntimeError, match=said):
        optimizer.check_replicas()
    spoilt = bits(optimizer.state[signs.params[LARGE]][REMAINDER])
    optimizer.resync()
    optimizer.check_replicas()
    mended = bits(optimizer.state[signs.params[LARGE]][REMAINDER])
    right = bits(modes.lion.state[modes.params[LARGE]][REMAINDER])
    assert (mended != right).sum() == 1
    assert torch.equal(mended, spoilt) == (rank == 0)

    # Sharded remainders have no replicas: nothing is compared, and each owner keeps its own.
    params = next(mode for mode in modes.modes if mode.sync == "params")
    before = [part.clone() for p in params.params for part in params.optimizer.state[p][REMAINDER].parts]
    params.optimizer.check_replicas()
    params.optimizer.resync()
    after = [part for p in params.params for part in params.optimizer.state[p][REMAINDER].parts]
    for a, b in zip(after, before, strict=True):
        assert_same_bits(a, b, "remainders after resync()")


@pytest.mark.parametrize("world_size", [2, 3])
def test_replicas_of_remainders(world_size: int, tmp_path: Path) -> None:
    run_ranks(body_replicas, world_size, tmp_path)


def body_refused_loads(rank: int, world_size: int) -> None:
    """State that would make replicas differ, or that does not fit, changes nothing on any rank."""
    modes = trained(rank, world_size, 2)
    good = {mode.sync: mode.optimizer.full_state_dict() for mode in modes.modes}
    modes.step(2)
    number = 4  # of the parameter 1

    def with_entry(key: str, value: object) -> dict[str, Any]:
        state = copy.deepcopy(good["signs"])
        state["state"][number][key] = value
        return state

    entry = good["signs"]["state"][number]
    other = entry[REMAINDER].clone()
    other[3] ^= 4
    bad: list[tuple[object, str, object]] = [
        (REMAINDER, r"remainder of parameter 4 is \(126,\)", entry[REMAINDER][1:]),
        (REMAINDER, "remainder of parameter 4 .* expected .* int16", entry[REMAINDER].int()),
        (EXP_AVG_SCALE, r"exp_avg_scale of parameter 4", entry[EXP_AVG_SCALE].repeat(2)),
    ]
    for mode in modes.modes:
        before = [part.clone() for part in parts_of(mode)]
        for key, said, value in bad:
            assert isinstance(key, str)
            with pytest.raises(ValueError, match=said):
                mode.optimizer.load_state_dict(with_entry(key, value))
        if mode.sync == "signs":
            with pytest.raises(RuntimeError, match=r"remainder of parameter 4 on ranks \[1\]"):
                mode.optimizer.load_state_dict(with_entry(REMAINDER, other) if rank == 1 else good["signs"])
            own = modes.modes[0].optimizer.state[modes.modes[0].params[1]][REMAINDER]
            with pytest.raises(TypeError, match="one rank's part of a sharded tensor"):
                mode.optimizer.state[mode.params[1]][REMAINDER] = own
        # Numbers that the dtype cannot hold would be cut, to zeros here.
        whole = {EXP_AVG: torch.full((127,), 0.4), REMAINDER: other.int(), EXP_AVG_SCALE: torch.ones(1).int()}
        for key, value in whole.items():
            with pytest.raises(TypeError, match=rf"{key} is kept in torch\.\w+, got torch\.\w+: .* load_state_dict"):
                mode.optimizer.state[mode.params[1]][key] = value
        for part, b in zip(parts_of(mode), before, strict=True):
            assert_same_bits(part, b, f"{mode}: after refused loads")
        assert [group["rounding_step"] for group in mode.optimizer.param_groups] == [3, 3]
        # What is assigned is copied, into the slices of this rank or as a whole.
        mode.optimizer.state[mode.params[1]][REMAINDER] = other
        assert_same_bits(mode.whole_state()[1][REMAINDER], other, f"{mode}: assigned")
    optimizer = ShardedLion([p := torch.nn.Parameter(torch.zeros(300, device=device_of(rank, world_size)))])
    with pytest.raises(TypeError, match=r"exp_avg is kept in torch\.float32, got torch\.int8"):
        optimizer.state[p]["exp_avg"] = torch.ones(300, dtype=torch.int8)  # codes in place of numbers
    optimizer.state[p]["exp_avg"] = torch.full((300,), 0.5, dtype=torch.bfloat16)
    assert_same_bits(optimizer.full_state_dict()["state"][0]["exp_avg"], torch.full((300,), 0.5), "cast")


def test_refused_loads(tmp_path: Path) -> None:
    run_ranks(body_refused_loads, 2, tmp_path)


# Round trips ----------------------------------------------------------------------------------------


def lion_of(modes: Modes, state: dict[str, Any]) -> None:
    """Lets another `Lion`, with this state, go on in place of the one there."""
    kept = [p.detach().clone() for p in modes.params]
    modes.params = [torch.nn.Parameter(v) for v in kept]
    modes.lion = Lion(modes.grouped(modes.params), lr=0.01, **BOTH)
    modes.lion.load_state_dict(state)


def body_round_trips(rank: int, world_size: int) -> None:
    """Every way out of one optimizer, and into each kind of ShardedLion and `Lion`; then all go on alike."""
    modes = trained(rank, world_size, 4)
    loaded = []
    for source in modes.modes:
        full, own = source.optimizer.full_state_dict(), source.optimizer.state_dict()
        for t in own["state"][0].values():
            assert isinstance(t, BoxTensor) or source.sync == "signs"
        for stage, sync in ((3 - source.stage, "params"), (source.stage, "signs")):
            for state in (full, own):
                mode = modes.fresh(stage, sync, source.params)
                mode.optimizer.load_state_dict(state)
                loaded.append(mode)
    mode = modes.fresh(1, "signs", modes.params)
    mode.optimizer.load_state_dict(modes.lion.state_dict())
    lion_of(modes, modes.modes[3].optimizer.full_state_dict())
    modes.modes = [*loaded, mode]
    modes.check("loaded")
    for step in (4, 5):
        modes.step(step)
    modes.check("later")


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_round_trips(world_size: int, tmp_path: Path) -> None:
    run_ranks(body_round_trips, world_size, tmp_path)


def body_save(rank: int, world_size: int, folder: Path) -> None:
    modes = trained(rank, world_size, 4)
    for mode in modes.modes[:2]:
        dcp.save({"optim": mode.optimizer.state_dict()}, checkpoint_id=folder / mode.sync)
    if rank == 0:
        weights = [p.detach() for p in modes.params]
        torch.save({"weights": weights, "lion": modes.lion.state_dict()}, folder / "lion")


def body_load(rank: int, world_size: int, folder: Path) -> None:
    saved = torch.load(folder / "lion", map_location=device_of(rank, world_size), weights_only=True)
    modes = trained(rank, world_size, 0)
    modes.params = [torch.nn.Parameter(w) for w in saved["weights"]]
    lion_of(modes, saved["lion"])
    modes.modes = []
    for source in ("params", "signs"):
        for stage, sync in ((2, "params"), (1, "signs")):
            mode = modes.fresh(stage, sync, modes.params)
            state = {"optim": mode.optimizer.state_dict()}
            dcp.load(state, checkpoint_id=folder / source)
            mode.optimizer.load_state_dict(state["optim"])
            modes.modes.append(mode)
    modes.check("loaded")
    for step in (4, 5):
        modes.step(step)
    modes.check("later")


def test_torchs_checkpoints_on_other_numbers_of_ranks(tmp_path: Path) -> None:
    run_ranks(body_save, 2, tmp_path, (tmp_path,))
    for world_size in (1, 3):
        run_ranks(body_load, world_size, tmp_path, (tmp_path,))


# Memory ---------------------------------------------------------------------------------------------


def body_memory(rank: int, world_size: int) -> None:
    """Bytes of state for each parameter, of which whole remainders are 2 on every rank, and all else is shared."""
    n = 1 << 16
    for dtype, options, shared, whole in (
        (F32, {}, 4, 0),
        (BF16, {}, 2, 0),
        (F32, {"momentum_dtype": "int8"}, 1 + 4 / codecs.BLOCK, 0),
        (BF16, {"master_weights": True}, 2, 2),
        (BF16, BOTH, 1 + 4 / codecs.BLOCK, 2),
    ):
        for sync in ("params", "signs"):
            p = torch.nn.Parameter(torch.zeros(n, dtype=dtype, device=device_of(rank, world_size)))
            optimizer = ShardedLion([p], param_sync=sync, **options)
            held = optimizer.state[p].values()
            tensors = [part for t in held for part in (t.parts if isinstance(t, BoxTensor) else [t])]
            in_all = sum(t.untyped_storage().nbytes() for t in tensors)
            assert in_all == n * (shared / world_size + (whole if sync == "signs" else whole / world_size))


def test_bytes_of_state(tmp_path: Path) -> None:
    run_ranks(body_memory, 2, tmp_path)
