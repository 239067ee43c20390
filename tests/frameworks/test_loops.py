"""Loops that are the user's own, in ignite and in Lightning's Fabric, with the real packages, on two ranks."""

from __future__ import annotations

import os
import signal
import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from lion_dist import Lion, ShardedLion
from tests.harness import run_ranks, spawn_only

WIDTH, EPOCHS, STEPS_AN_EPOCH = 33, 3, 2  # 33: no even share for two ranks
KINDS = {"ignite": ("lion", "stage1", "stage2"), "fabric": ("lion", "stage1")}
PACKAGES = {"ignite": "ignite", "fabric": "lightning"}


class Net(nn.Module):
    """``forward(x)`` is a loss, which it keeps. Each rank begins with weights of its own."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        torch.manual_seed(rank)
        self.net = nn.Sequential(nn.Linear(WIDTH, 30), nn.Tanh(), nn.Linear(30, 5))
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        loss = self.net(x).square().mean()
        self.losses.append(loss.item())
        return loss


def optimizer_of(kind: str, model: nn.Module) -> Lion | ShardedLion:
    named = model.named_parameters()
    return Lion(named, lr=0.01) if kind == "lion" else ShardedLion(named, lr=0.01, stage=int(kind[-1]))


def batches(rank: int, world_size: int) -> DataLoader[Tensor]:
    data: Any = torch.randn(world_size * 4 * STEPS_AN_EPOCH, WIDTH, generator=torch.Generator().manual_seed(0))
    return DataLoader(data, batch_size=4, sampler=DistributedSampler(data, world_size, rank, shuffle=False))


def die() -> None:
    dist.barrier()
    os.kill(os.getpid(), signal.SIGKILL)


def by_ignite(rank: int, world_size: int, kind: str, folder: Path, resume: bool = False, dies: bool = False) -> Net:
    """A checkpoint after every epoch; from the first one's if ``resume``, and to the second's end if ``dies``."""
    handlers, engine = import_module("ignite.handlers"), import_module("ignite.engine")
    net = Net(rank)
    optimizer = optimizer_of(kind, net)
    model = net if kind == "stage2" else DistributedDataParallel(net)
    if isinstance(optimizer, ShardedLion):
        optimizer.register_state_dict_pre_hook(ShardedLion.consolidate_state_dict)  # type: ignore[arg-type]

    def step(_: Any, x: Tensor) -> float:
        optimizer.zero_grad()
        loss = model(x)
        loss.backward()
        if isinstance(optimizer, ShardedLion):
            optimizer.clip_grad_norm_(0.05)
        else:
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        return loss.item()

    trainer = engine.Engine(step)
    saved = {"model": net, "optimizer": optimizer, "trainer": trainer}
    checkpoints = handlers.Checkpoint(saved, handlers.DiskSaver(str(folder), require_empty=False), n_saved=None)
    trainer.add_event_handler(engine.Events.EPOCH_COMPLETED, checkpoints)
    if dies:
        trainer.add_event_handler(engine.Events.ITERATION_COMPLETED(once=STEPS_AN_EPOCH + 1), die)
    if resume:
        handlers.Checkpoint.load_objects(saved, torch.load(folder / f"checkpoint_{STEPS_AN_EPOCH}.pt"))
    trainer.run(batches(rank, world_size), max_epochs=EPOCHS)
    return net


def by_fabric(rank: int, world_size: int, kind: str, folder: Path, resume: bool = False, dies: bool = False) -> Net:
    """As `by_ignite`."""
    environment = import_module("lightning.fabric.plugins.environments").LightningEnvironment()
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0")  # as its own launcher leaves them
    fabric: Any = import_module("lightning.fabric").Fabric(
        accelerator="cpu", devices=2, strategy="ddp", plugins=[environment]
    )
    fabric.launch()
    net = Net(rank)
    model, optimizer = fabric.setup(net, optimizer_of(kind, net))
    state = {"model": model, "optimizer": optimizer, "epoch": 0}
    path = folder / "fabric.ckpt"
    if resume:
        fabric.load(path, state)
    for epoch in range(state["epoch"], EPOCHS):
        for number, x in enumerate(batches(rank, world_size)):
            loss = model(x)
            fabric.backward(loss)
            fabric.clip_gradients(model, optimizer, max_norm=0.05)
            optimizer.step()
            optimizer.zero_grad()
            if dies and (epoch, number) == (1, 0):
                die()
        state["epoch"] = epoch + 1
        if epoch == 0 and not resume:
            fabric.save(path, state)
    return net


LOOPS = {"ignite": by_ignite, "fabric": by_fabric}


def body_killed(rank: int, world_size: int, loop: str, kind: str, folder: Path) -> None:
    LOOPS[loop](rank, world_size, kind, folder, dies=True)


def body_resumed(rank: int, world_size: int, loop: str, folder: Path) -> None:
    """Under each optimizer, whichever of them saved."""
    undisturbed = LOOPS[loop](rank, world_size, "lion", folder / "undisturbed").losses
    assert len(undisturbed) == EPOCHS * STEPS_AN_EPOCH
    assert undisturbed[-1] < undisturbed[0]
    for kind in KINDS[loop]:
        assert LOOPS[loop](rank, world_size, kind, folder / kind).losses == undisturbed, kind
        rest = LOOPS[loop](rank, world_size, kind, folder / "killed", resume=True).losses
        assert rest == undisturbed[STEPS_AN_EPOCH:], kind


@spawn_only
@pytest.mark.parametrize(("loop", "kind"), [("ignite", "stage2"), ("fabric", "stage1")])
def test_killed_and_resumed(loop: str, kind: str, tmp_path: Path) -> None:
    """The losses are those of Lion under DistributedDataParallel, digit for digit; kill -9 after a checkpoint: new
    processes go on with the losses of a run that nobody disturbed."""
    if find_spec(PACKAGES[loop]) is None:
        pytest.skip(f"{PACKAGES[loop]} is not installed")
    for folder in ("killed", "undisturbed", *KINDS[loop]):
        (tmp_path / folder).mkdir()
    with pytest.raises(pytest.fail.Exception, match="exit code -9"):
        run_ranks(body_killed, 2, tmp_path, (loop, kind, tmp_path / "killed"), on_cpu=True)
    run_ranks(body_resumed, 2, tmp_path, (loop, tmp_path), on_cpu=True)


def body_warned(rank: int, world_size: int) -> None:
    engine = import_module("ignite.engine")
    for hooked in (False, True):
        net = Net(rank)
        optimizer = ShardedLion(net.named_parameters(), lr=0.01)
        if hooked:
            optimizer.register_state_dict_pre_hook(ShardedLion.consolidate_state_dict)  # type: ignore[arg-type]

        def step(_: Any, x: Tensor, net: Net = net, optimizer: ShardedLion = optimizer) -> None:
            net(x).backward()
            optimizer.step()

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            engine.Engine(step).run([torch.ones(2, WIDTH)] * 2)
        found = [str(warning.message) for warning in caught if "Checkpoint fails with" in str(warning.message)]
        assert len(found) == (not hooked)


def test_ignite_saves_that_would_fail_are_warned_of(tmp_path: Path) -> None:
    """In the first step, where the first save may be hours away."""
    if find_spec("ignite") is None:
        pytest.skip("ignite is not installed")
    run_ranks(body_warned, 2, tmp_path, on_cpu=True)
