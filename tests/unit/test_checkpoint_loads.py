"""A load in one process: all of it or nothing, and what others keep beside Lion's own state."""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, LambdaLR, SequentialLR

from lion_dist import Lion, checkpoint
from lion_dist.checkpoint import Reader, files
from tests.scenarios.checkpoint_linear import Before, Kept, trained

# The checkpoint goes away ---------------------------------------------------------------------------


def after_verifying(monkeypatch: pytest.MonkeyPatch, act: Callable[[], Any]) -> None:
    read_items = Reader.read_items

    def acting(self: Reader, *args: Any) -> Any:
        act()
        return read_items(self, *args)

    monkeypatch.setattr(Reader, "read_items", acting)


@pytest.mark.parametrize("few_files", [False, True], ids=["", "few may be open"])
@pytest.mark.parametrize("way", ["renamed", "removed", "replaced"])
def test_a_verified_checkpoint_is_read_though_it_is_removed(
    way: str, few_files: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "step-1"
    checkpoint.save(path, *trained(1.0))
    if few_files:
        monkeypatch.setattr(files, "max_open_files", lambda: 0)

    def go() -> None:
        path.rename(tmp_path / "gone")
        if way == "removed":
            shutil.rmtree(tmp_path / "gone")
        elif way == "replaced":
            shutil.copytree(tmp_path / "gone", path)
            (path / "data-00000.bin").write_bytes(b"")

    after_verifying(monkeypatch, go)
    model, optimizer = trained(-1.0)
    if few_files and way == "removed":  # found through the folder, which has nothing any more
        with pytest.raises(ValueError, match=r"cannot be read.*in part those of the checkpoint.*all else is as it was"):
            checkpoint.load(path, model, optimizer)
        return
    checkpoint.load(path, model, optimizer)
    for p in model.parameters():
        assert (p == 1).all()
        assert (optimizer.state[p]["exp_avg"] == 1).all()


def test_without_the_resource_module_few_files_are_kept_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "resource", None)
    assert files.max_open_files() == 64


def test_files_are_closed_again(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "step-1", *trained(1.0))
    other = nn.Linear(3, 3)
    before = len(os.listdir("/proc/self/fd"))
    checkpoint.load(tmp_path / "step-1", *trained(2.0))
    with pytest.raises(ValueError, match="has shape"):
        checkpoint.load(tmp_path / "step-1", other)
    Reader(tmp_path / "step-1").fetch("model.bias")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_becomes_unreadable_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "step-1"
    model, optimizer = trained(1.0, lr=0.5)
    checkpoint.save(path, model, optimizer, schedulers=ConstantLR(optimizer))
    model, optimizer = trained(-1.0)
    scheduler = ConstantLR(optimizer, 0.5)
    before = Before(model, optimizer, scheduler)
    after_verifying(monkeypatch, lambda: os.truncate(path / "data-00000.bin", 200))
    with pytest.raises(
        ValueError, match=r"shorter than it should be.*in part those of the checkpoint now, and all else"
    ):
        checkpoint.load(path, model, optimizer, schedulers=scheduler)
    before.tensors = before.read()
    before()


# Users' code fails ----------------------------------------------------------------------------------


class Curve:
    """A schedule with a state of its own, which LambdaLR saves."""

    def __init__(self) -> None:
        self.seen = [0]

    def __call__(self, step: int) -> float:
        self.seen.append(step)
        return 1 / (1 + len(self.seen))


class Picky(ConstantLR):
    """Takes half of a state, and then refuses it."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_epoch = 77
        self.base_lrs[0] = 77.0
        self.optimizer.param_groups[0]["lr"] = 77.0
        raise KeyError("the schedule's length differs")


def schedules(optimizer: Lion, last: type[ConstantLR] = ConstantLR) -> list[Any]:
    def chain() -> SequentialLR:
        return SequentialLR(optimizer, [LambdaLR(optimizer, [Curve(), Curve()]), ConstantLR(optimizer)], [3])

    return [chain(), last(optimizer)]


def test_a_scheduler_that_refuses_its_state_changes_nothing(tmp_path: Path) -> None:
    model, optimizer = trained(1.0)
    schedulers = schedules(optimizer)
    for _ in range(2):
        optimizer.step()
        schedulers[0].step()
    checkpoint.save(tmp_path / "step-1", model, optimizer, schedulers=schedulers)
    model, optimizer = trained(-1.0)
    schedulers = schedules(optimizer, Picky)
    before = Before(model, optimizer, *schedulers)
    curve = schedulers[0]._schedulers[0].lr_lambdas[0]
    seen = list(curve.seen)
    with pytest.raises(
        ValueError, match=r"scheduler 1, a Picky, does not take what was saved: KeyError.*length differs"
    ):
        checkpoint.load(tmp_path / "step-1", model, optimizer, schedulers=schedulers)
    before()
    assert curve.seen == seen
    schedulers = schedules(optimizer)
    checkpoint.load(tmp_path / "step-1", model, optimizer, schedulers=schedulers)
    assert schedulers[0]._schedulers[0].lr_lambdas[0].seen != seen


class Meter:
    def __init__(self, value: float) -> None:
        self.total = value


class Window:
    """A scheduler whose state lies in containers and objects of many kinds."""

    def __init__(self, value: float) -> None:
        self.meter, self.last, self.seen = Meter(value), deque([value]), {value}
        self.large = torch.full((5000,), value)

    def state_dict(self) -> dict[str, Any]:
        values = {"total": self.meter.total, "last": list(self.last), "seen": sorted(self.seen)}
        return {**values, "large": self.large[0].item()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.meter.total = state["total"]
        self.last.clear()
        self.last.extend(state["last"])
        self.seen.clear()
        self.seen.update(state["seen"])
        self.large.fill_(state["large"])


class Temperature(nn.Module):
    """A scheduler that is a module."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.register_buffer("degrees", torch.full((2,), value))


def test_schedulers_of_any_kind_are_as_they_were(tmp_path: Path) -> None:
    """Those that took their state before another one refused its own."""

    def make(value: float, last: type[ConstantLR]) -> tuple[nn.Module, Lion, list[Any]]:
        model, optimizer = trained(value)
        return model, optimizer, [Window(value), Temperature(value), last(optimizer)]

    model, optimizer, schedulers = make(1.0, ConstantLR)
    checkpoint.save(tmp_path / "step-1", model, optimizer, schedulers=schedulers)
    model, optimizer, schedulers = make(-1.0, Picky)
    before = Before(model, optimizer, schedulers[0], schedulers[2])
    objects = dict(vars(schedulers[0]))
    with pytest.raises(ValueError, match=r"scheduler 2, a Picky, does not take what was saved"):
        checkpoint.load(tmp_path / "step-1", model, optimizer, schedulers=schedulers)
    before()
    assert all(vars(schedulers[0])[key] is value for key, value in objects.items())
    assert (schedulers[1].degrees == -1).all()


def test_a_scheduler_whose_state_cannot_be_copied_is_loaded(tmp_path: Path) -> None:
    model, optimizer = trained(1.0)
    checkpoint.save(tmp_path / "step-1", model, optimizer, schedulers=LambdaLR(optimizer, lambda step: 0.5))
    model, optimizer = trained(-1.0)
    checkpoint.load(tmp_path / "step-1", model, optimizer, schedulers=LambdaLR(optimizer, float))
    assert optimizer.param_groups[0]["lr"] == 0.125


def test_a_module_that_refuses_its_extra_state_changes_nothing(tmp_path: Path) -> None:
    def make(refuses: bool) -> tuple[Any, Lion]:
        model = nn.Sequential(Kept(), nn.Sequential(Kept(refuses)))
        return model, Lion(model.parameters())

    model, optimizer = make(False)
    model[0].kept, model[1][0].kept = {"calls": [2, 3]}, torch.arange(5)
    checkpoint.save(tmp_path / "step-1", model, optimizer)
    model, optimizer = make(False)
    checkpoint.load(tmp_path / "step-1", model, optimizer)
    assert model[0].kept == {"calls": [2, 3]}
    assert torch.equal(model[1][0].kept, torch.arange(5))
    model, optimizer = make(True)
    optimizer.init_state()
    model[1][0].kept = {"calls": [5]}
    before = Before(model, optimizer)
    with pytest.raises(ValueError, match=r"model\.1\.0\._extra_state, of a Kept, .*RuntimeError: .* another version"):
        checkpoint.load(tmp_path / "step-1", model, optimizer)
    before()
    assert (model[0].kept, model[1][0].kept) == ({"calls": [1]}, {"calls": [5]})
    # Of the weights alone, too; and a module that has one more or less.
    with pytest.raises(ValueError, match="another version"):
        checkpoint.load(tmp_path / "step-1", model)
    before()
    plain = nn.Sequential(nn.Linear(2, 2), nn.Sequential(Kept()))
    with pytest.raises(ValueError, match=r"the checkpoint has 1 tensors .* has not: model\.0\._extra_state"):
        checkpoint.load(tmp_path / "step-1", plain)
    plain = nn.Sequential(Kept(), nn.Sequential(Kept()), nn.Identity())
    vars(plain[2])["get_extra_state"] = None  # of an object, not of its class: not one that torch would call
    checkpoint.load(tmp_path / "step-1", plain)


def test_an_extra_state_that_cannot_be_saved_is_refused_by_name(tmp_path: Path) -> None:
    model: Any = nn.Sequential(Kept())
    for state in ({"calls": object()}, torch.zeros(3 << 20)):
        model[0].kept = state
        with pytest.raises(TypeError, match=r"model\.0\._extra_state"):
            checkpoint.save(tmp_path / "step-1", model)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["pre", "post"])
def test_a_hook_that_raises_changes_nothing(kind: str, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "step-1", *trained(1.0, lr=0.5))
    model, optimizer = trained(-1.0)
    before, seen = Before(model, optimizer), []

    def hook(*args: Any) -> None:
        seen.append(optimizer.state[model.weight]["exp_avg"][0, 0].item())
        raise OSError("a hook that fails")

    handle = getattr(optimizer, f"register_load_state_dict_{kind}_hook")(hook)
    with pytest.raises(OSError, match="a hook that fails"):
        checkpoint.load(tmp_path / "step-1", model, optimizer)
    before()
    assert seen == [1.0]  # hooks find the momenta that were loaded
    handle.remove()
    checkpoint.load(tmp_path / "step-1", model, optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.5

    # What a hook writes stays.
    def write(*args: Any) -> None:
        optimizer.state[model.weight]["exp_avg"].fill_(3.0)

    getattr(optimizer, f"register_load_state_dict_{kind}_hook")(write)
    checkpoint.load(tmp_path / "step-1", model, optimizer)
    assert (optimizer.state[model.weight]["exp_avg"] == 3).all()


# Wrappers -------------------------------------------------------------------------------------------


def test_accelerates_wrapper_is_unwrapped(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    bare, inner = trained(1.0)
    model, optimizer, scheduler = accelerator.prepare(bare, inner, ConstantLR(inner))
    assert optimizer is not inner
    checkpoint.save(tmp_path / "step-1", model, optimizer, schedulers=scheduler)
    checkpoint.async_save(tmp_path / "step-2", model, optimizer, schedulers=scheduler).result()
    for step in (1, 2):
        other, plain = trained(-1.0, lr=0.125)
        checkpoint.load(tmp_path / f"step-{step}", other, plain, schedulers=ConstantLR(plain))
        assert (plain.state[other.weight]["exp_avg"] == 1).all()
    with torch.no_grad():
        bare.weight.zero_()
    checkpoint.load(tmp_path / "step-1", model, optimizer, schedulers=scheduler)
    assert (bare.weight == 1).all()
    sgd = accelerator.prepare(torch.optim.SGD(bare.parameters()))
    with pytest.raises(TypeError, match="expected lion_dist's Lion or ShardedLion, got SGD"):
        checkpoint.save(tmp_path / "step-3", model, sgd)
