"""Checkpoints of models whose parameters are frozen and unfrozen."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lion_dist import Lion, ShardedLion, checkpoint
from tests.asserts import assert_same_bits
from tests.harness import run_ranks


def body_frozen(rank: int, world_size: int, folder: Path) -> None:
    alone = [dist.new_group([r]) for r in range(world_size)][rank]

    def build(kind: type, frozen: bool, seed: int = 0) -> tuple[Any, Any, dist.ProcessGroup | None]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 4))
        model[0].requires_grad_(not frozen)
        sharded = {"stage": 1} if kind is ShardedLion else {}
        return model, kind(model.named_parameters(), **sharded), None if kind is ShardedLion else alone

    def step(model: nn.Module, optimizer: Any, count: int = 1) -> None:
        for i in range(count):
            for p in model.parameters():
                p.grad = torch.full_like(p, 1.0 + i) if p.requires_grad else None
            optimizer.step()
        optimizer.zero_grad()

    def momenta(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
        full = optimizer.full_state_dict() if isinstance(optimizer, ShardedLion) else optimizer.state_dict()
        names = [n for n, _ in model.named_parameters()]
        return {names[i]: entry["exp_avg"].clone() for i, entry in full["state"].items()}

    def save(name: str, model: nn.Module, optimizer: Any, group: Any) -> None:
        if rank == 0 or group is None:
            checkpoint.save(folder / f"{name}-{type(optimizer).__name__}", model, optimizer, process_group=group)
        dist.barrier()

    for kind in (Lion, ShardedLion):
        model, optimizer, group = build(kind, frozen=True)
        step(model, optimizer)
        save("frozen", model, optimizer, group)
        model[0].requires_grad_(True)
        save("unfrozen", model, optimizer, group)  # before the next step
        step(model, optimizer, 2)
        trained = momenta(model, optimizer)
        assert all(m.any() for m in trained.values())
        model[0].requires_grad_(False)
        save("trained", model, optimizer, group)

    for source in (Lion, ShardedLion):
        for kind in (Lion, ShardedLion):
            what = f"{source.__name__} -> {kind.__name__}"
            # Trained, frozen and resumed: the momentum is kept, and goes on from there once it is unfrozen again.
            model, optimizer, group = build(kind, frozen=True, seed=1)
            checkpoint.load(folder / f"trained-{source.__name__}", model, optimizer, process_group=group)
            for name, m in momenta(model, optimizer).items():
                assert_same_bits(m, trained[name], f"{what}: {name}")
            before = {n: p.detach().clone() for n, p in model.named_parameters()}
            step(model, optimizer)
            assert_same_bits(model[0].weight.detach(), before["0.weight"], what)
            assert not torch.equal(model[1].weight, before["1.weight"])
            model[0].requires_grad_(True)
            step(model, optimizer)
            assert not torch.equal(model[0].weight, before["0.weight"])
            expected = trained["0.weight"] * optimizer.param_groups[0]["betas"][1]
            assert (momenta(model, optimizer)["0.weight"] > expected).all()
            # And it is saved again, though it is frozen.
            model[0].requires_grad_(False)
            if rank == 0 or group is None:
                checkpoint.save(folder / f"again-{what}", model, optimizer, process_group=group)
            dist.barrier()
            # Unfrozen and saved before the next step: there is a momentum, zeros.
            model, optimizer, group = build(kind, frozen=False, seed=1)
            step(model, optimizer)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                checkpoint.load(folder / f"unfrozen-{source.__name__}", model, optimizer, process_group=group)
            assert not momenta(model, optimizer)["0.weight"].any()
            assert momenta(model, optimizer)["1.weight"].any()
            # Frozen when it was saved, and trained here: zeros, and a warning that says so.
            model, optimizer, group = build(kind, frozen=False, seed=1)
            step(model, optimizer)
            with pytest.warns(
                UserWarning, match=r"2 parameters .* were frozen .* \(0\.weight, 0\.bias\).*starts at zero"
            ):
                checkpoint.load(folder / f"frozen-{source.__name__}", model, optimizer, process_group=group)
            optimizer.init_state()
            assert not momenta(model, optimizer)["0.weight"].any()
            assert momenta(model, optimizer)["1.weight"].any()
            step(model, optimizer)
            # The same by state_dicts, which both classes take.
            for frozen in (True, False):
                model, optimizer, group = build(kind, frozen=frozen, seed=1)
                step(model, optimizer)
                whole = {"state": {i: {"exp_avg": trained[n]} for i, (n, _) in enumerate(model.named_parameters())}}
                groups = optimizer.state_dict()["param_groups"]
                optimizer.load_state_dict({**whole, "param_groups": groups})
                assert momenta(model, optimizer).keys() == trained.keys()
                assert_same_bits(momenta(model, optimizer)["0.weight"], trained["0.weight"], what)
                del whole["state"][0]
                optimizer.load_state_dict({**whole, "param_groups": groups})
                model[0].requires_grad_(True)
                optimizer.init_state()
                assert not momenta(model, optimizer)["0.weight"].any()
            # Frozen in both: as it was.
            model, optimizer, group = build(kind, frozen=True, seed=1)
            checkpoint.load(folder / f"frozen-{source.__name__}", model, optimizer, process_group=group)
            assert momenta(model, optimizer).keys() == {"1.weight", "1.bias"}
            # A load that fails on one rank leaves no momentum of a frozen parameter behind.
            scheduler = Picky(optimizer, fails=rank == 1 or group is not None)
            if rank == 0 or group is None:
                other = LambdaLR(build(Lion, False)[1], lambda step: 1.0)
                model_there, optimizer_there, _ = build(kind, frozen=False)
                checkpoint.save(
                    folder / f"picky-{what}", model_there, optimizer_there, schedulers=other, process_group=group
                )
            dist.barrier()
            with pytest.raises(ValueError, match="of another length"):
                checkpoint.load(folder / f"picky-{what}", model, optimizer, schedulers=scheduler, process_group=group)
            assert momenta(model, optimizer).keys() == {"1.weight", "1.bias"}, what
            assert scheduler.last_epoch == 0
            step(model, optimizer)


class Picky(LambdaLR):
    def __init__(self, optimizer: Any, *, fails: bool) -> None:
        super().__init__(optimizer, lambda step: 1.0)
        self.fails = fails

    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().state_dict().items() if key != "fails"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_epoch = -7
        if self.fails:
            raise ValueError("the schedule is of another length")


def test_frozen_and_unfrozen_parameters(tmp_path: Path) -> None:
    run_ranks(body_frozen, 2, tmp_path, (tmp_path,), on_cpu=True)
