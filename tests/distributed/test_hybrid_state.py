"""ShardedLion over FSDP2: its state as others see it, replicas gone astray, groups that come later, checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import distribute_tensor

from lion_dist import Lion, ShardedLion, checkpoint
from tests.asserts import assert_same_bits, bits
from tests.harness import device_of, run_ranks
from tests.scenarios.checkpoint_matrix import body_matrix
from tests.scenarios.checkpoint_toy import HYBRIDS, OVER_TWO_DIMENSIONS, STRATEGIES
from tests.scenarios.hybrid import (
    BF16,
    F32,
    Case,
    HybridToy,
    Twins,
    check_whole,
    groups_of,
    local,
    make_hybrid,
    mesh_of,
    part_of,
    whole,
)
from tests.scenarios.toy import coefficient

MASTER, EIGHT = {"master_weights": True}, {"momentum_dtype": "int8"}
# By name: weights' dtype, and options.
FORMS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "plain": (F32, {}),
    "int8": (F32, EIGHT),
    "master": (BF16, MASTER),
    "both": (BF16, MASTER | EIGHT),
}


@torch.no_grad()
def flip(t: torch.Tensor) -> None:
    """The last bit of one element, unseen by autograd."""
    t.data.view(-1).view(bits(t).dtype)[-1] ^= 1


def body_astray(rank: int, world_size: int) -> None:
    """A replica differs on rank 3 alone: on the second shard of the second replica."""
    for dtype, options in ((F32, {}), (BF16, MASTER)):
        twins = Twins(Case(dtypes=(dtype,), options=options), mesh_of(2, 2))
        twins.step(0)
        twins.optimizer.check_replicas()
        whole_of_param = [twins.model.get_parameter("units.first.weight")]
        if options:  # with signs, remainders are replicated too
            whole_of_param.append(twins.optimizer.state[whole_of_param[0]]["remainder"])
        for t in whole_of_param:
            if rank == 3:
                flip(local(t))
            if rank % 2:
                with pytest.raises(RuntimeError, match=r"on ranks \[1\]\. Call resync"):
                    twins.optimizer.check_replicas()
            else:
                twins.optimizer.check_replicas()
            twins.optimizer.resync()
            twins.optimizer.check_replicas()
            twins.check("healed")
        twins.step(1)
        twins.check("goes on")
        twins.check_state("goes on")


def body_added(rank: int, world_size: int) -> None:
    """A group that comes later, and one that is refused on every rank."""
    for sync in ("signs", "params"):
        mesh = mesh_of(2, 2)
        twins = Twins(Case(sync=sync), mesh)
        twins.step(0)
        device = device_of(rank, world_size)
        value = torch.arange(131.0 * 3, device=device).view(131, 3)
        wrong = nn.Parameter(distribute_tensor(value, mesh["replicate"]))
        before = [bits(local(p)) for p in twins.model.parameters()]
        with pytest.raises(ValueError, match=r"ranks \[(0, 2|1, 3)\].*must hold replicas"):
            twins.optimizer.add_param_group({"params": [("late", wrong)]})
        assert all(torch.equal(bits(local(p)), b) for p, b in zip(twins.model.parameters(), before, strict=True))
        assert len(twins.optimizer.param_groups) == 3
        twins.step(1)
        twins.check("after a refusal")
        late = nn.Parameter(distribute_tensor(value, mesh["shard"]))
        copy = nn.Parameter(value.clone())
        twins.optimizer.add_param_group({"params": [("late", late)], "lr": 0.5})
        twins.single_lion.add_param_group({"params": [("late", copy)], "lr": 0.5})
        twins.hsdp = twins.hsdp_lion = None
        for step in range(2, 4):
            grads = [coefficient("late", copy, step, r, 2) for r in range(2)]
            # Its gradients are those of the replicas: nothing else averages them.
            loss: Any = (late * distribute_tensor(grads[rank // 2], mesh["shard"])).sum()
            loss.full_tensor().backward()
            copy.grad = (grads[0] + grads[1]) / 2
            twins.step(step)
            twins.check("with another group")
            assert_same_bits(local(late), part_of(copy, late), f"step {step}: the new parameter")
        twins.optimizer.check_replicas()


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            local(p).copy_(part_of(weights[name], p))


def train_alone(model: nn.Module, optimizer: ShardedLion, step: int) -> None:
    model(step, dist.get_rank(), dist.get_world_size()).backward()
    optimizer.step()
    optimizer.zero_grad()


def assert_same_state(got: dict[str, Any], expected: dict[str, Any], what: str) -> None:
    assert got["param_groups"] == expected["param_groups"], what
    assert got["state"].keys() == expected["state"].keys(), what
    for i, entry in expected["state"].items():
        assert got["state"][i].keys() == entry.keys()
        for key, t in entry.items():
            assert_same_bits(got["state"][i][key], t, f"{what}: {key} of parameter {i}")


def assert_close_momenta(got: dict[str, Any], expected: dict[str, Any], what: str) -> None:
    for i, entry in expected["state"].items():
        m = entry["exp_avg"]
        atol = 0.02 * m.abs().max().item() if m.numel() else 0.0
        torch.testing.assert_close(got["state"][i]["exp_avg"], m, rtol=0.05, atol=atol, msg=lambda m: f"{what}: {m}")


def body_whole(rank: int, world_size: int, folder: Path) -> None:
    """full_state_dict(), on the first rank alone too, loaded into the same mesh and others; and torch's own doors
    between the meshes."""
    for form, (dtype, options) in FORMS.items():
        case = Case(dtypes=(dtype,), options=options)
        twins = Twins(case, mesh_of(2, 2))
        for step in range(3):
            twins.step(step)
        twins.check_state(form)
        state, alone = (twins.optimizer.full_state_dict(rank0_only=only) for only in (False, True))
        if rank:
            assert alone == {}
        else:
            assert_same_state(alone, state, f"{form}, on rank 0 alone")
        if "momentum_dtype" not in options:
            lion = Lion(groups_of(case.made(device_of(rank, world_size), 1)), **case.kwargs())
            lion.load_state_dict(state)
            check_whole(twins.optimizer, lion, twins.single, f"{form} in Lion")
        assert twins.hsdp is not None
        weights = {name: whole(p).detach().clone() for name, p in twins.hsdp.named_parameters()}
        dcp.save({"optim": get_optimizer_state_dict(twins.model, twins.optimizer)}, checkpoint_id=folder / form)
        checkpoint.save(folder / f"own-{form}", twins.model, twins.optimizer)
        twins.step(3)
        for shape, sync in (((2, 2), "params"), ((4, 1), "signs"), ((1, 4), "params")):
            # Blocks of another shard: momenta are encoded anew.
            anew = "momentum_dtype" in options and shape != (2, 2)
            for through in ("own",) if anew else ("whole", "dcp", "own"):
                what = f"{form}, 2 x 2 -> {shape}, {sync}, {through}"
                model, optimizer = make_hybrid(replace(case, sync=sync), mesh_of(*shape), seed=9)
                train_alone(model, optimizer, 7)  # what is there must be replaced
                load_weights(model, weights)
                if through == "own":
                    checkpoint.load(folder / f"own-{form}", model, optimizer)
                elif through == "whole":
                    optimizer.load_state_dict(state)
                else:
                    loaded = {"optim": get_optimizer_state_dict(model, optimizer)}
                    dcp.load(loaded, checkpoint_id=folder / form)
                    set_optimizer_state_dict(model, optimizer, loaded["optim"])
                if anew:
                    assert_close_momenta(optimizer.full_state_dict(), state, what)
                    continue
                assert_same_state(optimizer.full_state_dict(), state, what)
                train_alone(model, optimizer, 3)
                for name, p in model.named_parameters():
                    expected = whole(twins.hsdp.get_parameter(name))
                    assert_same_bits(local(p), part_of(expected, p), f"{what}, a step later: {name}")


def body_master_weights(rank: int, world_size: int) -> None:
    """Those that a float32 model gives, as HSDP's Lion takes them."""
    for sync in ("signs", "params"):
        twins = Twins(Case(sync=sync, dtypes=(BF16,), options=MASTER), mesh_of(2, 2))
        exact = HybridToy(device_of(rank, world_size), seed=5)
        twins.optimizer.take_master_weights(exact.named_parameters())
        assert twins.hsdp_lion is not None
        for lion in (twins.hsdp_lion, twins.single_lion):
            lion.take_master_weights(exact.named_parameters())
        twins.check(f"{sync}, taken")
        twins.check_state(f"{sync}, taken")
        twins.step(0)
        twins.check(f"{sync}, a step later")


def test_take_master_weights(tmp_path: Path) -> None:
    run_ranks(body_master_weights, 4, tmp_path)


def test_replicas_astray(tmp_path: Path) -> None:
    run_ranks(body_astray, 4, tmp_path)


def test_add_param_group(tmp_path: Path) -> None:
    run_ranks(body_added, 4, tmp_path)


def test_state(tmp_path: Path) -> None:
    run_ranks(body_whole, 4, tmp_path, (tmp_path,))


def test_checkpoints_of_other_strategies(tmp_path: Path) -> None:
    """One process with ShardedLion, and FSDP2 with Lion, to and from the meshes."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    run_ranks(body_matrix, 1, tmp_path, (folder, ("signs",), ()))
    table = run_ranks(body_matrix, 4, tmp_path, (folder, ("fsdp2", *HYBRIDS), ("hybrid2x2", "fsdp2")))[0]
    table += run_ranks(body_matrix, 1, tmp_path, (folder, (), ("signs",)))[0]
    assert len(table) == 5 * 3


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_checkpoints_of_all_strategies(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    many = (*STRATEGIES[1:], *OVER_TWO_DIMENSIONS, *HYBRIDS)
    for ranks in (1, 2):
        run_ranks(body_matrix, ranks, tmp_path, (folder, STRATEGIES[1:], ()))
    table = run_ranks(body_matrix, 4, tmp_path, (folder, many, many), deadline=1500)[0]
    assert len(table) == (2 * len(STRATEGIES[1:]) + len(many)) * len(many)
