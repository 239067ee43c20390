"""A load in one process: all of it or nothing, and what others keep beside Lion's own state."""

from __future__ import annotations

import copy
import os
import random
import shutil
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ConstantLR, LambdaLR, SequentialLR

from lion_dist import Lion, checkpoint
from lion_dist.checkpoint import Reader, files, optimizer_state
from tests.bits import assert_same_bits
from tests.unit.test_checkpoint_storage import rewrite, toy

PARAMS = ("weight", "bias")


def trained(value: float, lr: float = 0.25) -> tuple[nn.Module, Lion]:
    """Weights and momenta of one value."""
    model = nn.Linear(70, 50)
    optimizer = Lion(
        [{"params": [model.weight], "weight_decay": 0.5}, {"params": [model.bias], "lr": 2 * lr}],
        lr=lr,
        betas=(0.8, 0.9),
    )
    optimizer.init_state()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(value)
            optimizer.state[p]["exp_avg"].fill_(value)
    return model, optimizer


class Before:
    """What a model, an optimizer and schedulers are like now; calling it checks that they are so still."""

    def __init__(self, model: nn.Module, optimizer: Lion, *schedulers: Any) -> None:
        self.things = model, optimizer, schedulers
        self.tensors = self.read()
        self.state = dict(optimizer.state)
        self.groups = [dict(group) for group in optimizer.param_groups]
        self.schedulers = [copy.deepcopy(scheduler.state_dict()) for scheduler in schedulers]
        self.generators = torch.get_rng_state(), random.getstate()

    def read(self) -> dict[str, Tensor]:
        model, optimizer, _ = self.things
        found = {name: t.clone() for name, t in model.state_dict().items() if isinstance(t, Tensor)}
        for name, p in model.named_parameters():
            found[f"{name}'s momentum"] = optimizer.state[p]["exp_avg"].clone()
        return found

    def __call__(self) -> None:
        _, optimizer, schedulers = self.things
        for name, t in self.read().items():
            assert_same_bits(t, self.tensors[name], name)
        assert optimizer.state.keys() == self.state.keys()
        assert [dict(group) for group in optimizer.param_groups] == self.groups
        assert [scheduler.state_dict() for scheduler in schedulers] == self.schedulers
        assert torch.equal(torch.get_rng_state(), self.generators[0])
        assert random.getstate() == self.generators[1]


# The checkpoint goes away ---------------------------------------------------------------------------


def after_verifying(monkeypatch: pytest.MonkeyPatch, act: Callable[[], Any]) -> None:
    read_data = Reader.read_data

    def acting(self: Reader, *args: Any) -> Any:
        act()
        return read_data(self, *args)

    monkeypatch.setattr(Reader, "read_data", acting)


@pytest.mark.parametrize("few_files", [False, True], ids=["", "few may be open"])
@pytest.mark.parametrize("way", ["renamed", "removed", "replaced"])
def test_what_was_verified_is_read_though_it_goes_away(
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


def test_a_file_that_can_be_read_no_more_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


class Kept(nn.Linear):
    """A module with an extra state."""

    def __init__(self, refuses: bool = False) -> None:
        super().__init__(2, 2)
        self.kept, self.refuses = {"calls": [1]}, refuses

    def get_extra_state(self) -> Any:
        return self.kept

    def set_extra_state(self, state: Any) -> None:
        if self.refuses:
            self.kept = None
            raise RuntimeError("this extra state is of another version")
        self.kept = state


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
    def make(refuses: bool) -> tuple[nn.Module, Lion]:
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
    plain[2].get_extra_state = None  # of an object, not of its class: not one that torch would call
    checkpoint.load(tmp_path / "step-1", plain)


def test_an_extra_state_that_cannot_be_saved_is_refused_by_name(tmp_path: Path) -> None:
    model = nn.Sequential(Kept())
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


# What a manifest says of groups ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, None) for key in ("lr", "betas", "weight_decay", "decoupled_weight_decay", "init_lr",
                                  "momentum_dtype", "maximize", "params")),
        ("lr", [1]), ("lr", "x"), ("lr", 10**400), ("lr", {"$float": "nan"}), ("betas", [0.9]), ("betas", 3),
        ("weight_decay", -1), ("weight_decay", 10**400), ("momentum_dtype", "float33"), ("momentum_dtype", "bfloat16"),
        ("momentum_dtype", {"$dtype": "bfloat16"}), ("params", ["weight", "weight2"]), ("params", ["bias"]),
        ("params", [["weight"]]),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_groups_of_a_manifest_are_whole_or_refused(key: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "step-1"
    checkpoint.save(path, *trained(1.0))

    def edit(raw: dict[str, Any]) -> None:
        del raw["objects"][f"optim.param_groups.0.{key}"]
        if value is not None:
            raw["objects"][f"optim.param_groups.0.{key}"] = value

    rewrite(path, edit)
    model, optimizer = trained(-1.0)
    before = Before(model, optimizer)
    with pytest.raises((ValueError, TypeError)):
        checkpoint.load(path, model, optimizer)
    before()


def test_no_message_acts_upon_a_terminal(tmp_path: Path) -> None:
    """Whatever puts a checkpoint's strings into it: a name in one group or in two, or users' code."""
    red, lists = "\x1b[31mred", "optim.param_groups.{}.params"
    model, optimizer = trained(1.0)
    model = nn.Sequential(model, Kept())
    checkpoint.save(tmp_path / "good", model, optimizer)
    edits: list[Callable[[dict[str, Any]], Any]] = [
        lambda objects: objects[lists.format(0)].append(red),
        lambda objects: [objects[lists.format(i)].append(red) for i in (0, 1)],
        lambda objects: objects.update({"model.1._extra_state": red}),
    ]
    for i, edit in enumerate(edits):
        path = tmp_path / f"bad-{i}"
        shutil.copytree(tmp_path / "good", path)
        rewrite(path, lambda raw, edit=edit: edit(raw["objects"]))

        class Telling(Kept):
            def set_extra_state(self, state: Any) -> None:
                if state == red:
                    raise ValueError(f"no {state}")

        model, optimizer = trained(-1.0)
        with pytest.raises(ValueError, match="x1b") as caught:
            checkpoint.load(path, nn.Sequential(model, Telling()), optimizer)
        assert str(caught.value).isprintable()
        assert r"\x1b[31mred" in str(caught.value)


def test_an_optimizer_of_other_parameters_is_told_what_to_do(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    model.weight.requires_grad_(False)
    optimizers = {"all": Lion(model.parameters()), "trained": Lion([model.bias])}
    for name, optimizer in optimizers.items():
        checkpoint.save(tmp_path / name, model, optimizer)
    with pytest.raises(
        ValueError, match=r"lacks 1 parameters of .* groups: weight \(of group 0\)\. .* frozen ones too"
    ):
        checkpoint.load(tmp_path / "all", model, Lion([model.bias]))
    with pytest.raises(
        ValueError, match=r"^.*weight, of the optimizer's group 0, .*add_param_group\(\) after the load"
    ):
        checkpoint.load(tmp_path / "trained", model, Lion(model.parameters()))
    # As the messages say.
    checkpoint.load(tmp_path / "all", model, Lion(model.parameters()))
    optimizer = Lion([model.bias])
    checkpoint.load(tmp_path / "trained", model, optimizer)
    optimizer.add_param_group({"params": [model.weight.requires_grad_(True)]})
    checkpoint.save(tmp_path / "unfrozen", model, optimizer)


def test_tensors_without_elements_in_memory_are_refused_by_name(tmp_path: Path) -> None:
    for value in (torch.zeros(3, 2, device="meta"), torch.zeros(3, 2).to_sparse()):
        model = nn.Sequential(nn.Linear(2, 2))
        model[0].weight = nn.Parameter(value, requires_grad=False)
        with pytest.raises(TypeError, match=r"model\.0\.weight is o.*; a checkpoint holds dense tensors"):
            checkpoint.save(tmp_path / "step-1", model, Lion([model[0].bias]))
    assert not any(tmp_path.iterdir())


def test_groups_and_what_schedulers_keep_for_each_are_matched_by_name(tmp_path: Path) -> None:
    def make(order: list[int], lr: float) -> tuple[nn.Module, Lion, LambdaLR]:
        model = nn.Linear(3, 2)
        groups = [{"params": [model.weight], "lr": lr}, {"params": [model.bias], "lr": 3 * lr}]
        optimizer = Lion([groups[i] for i in order], lr=1.0)
        return model, optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step))

    model, optimizer, scheduler = make([0, 1], 0.5)
    optimizer.step()
    scheduler.step()
    checkpoint.save(tmp_path / "step-1", model, optimizer, schedulers=scheduler)
    model, optimizer, scheduler = make([1, 0], 0.125)
    checkpoint.load(tmp_path / "step-1", model, optimizer, schedulers=scheduler)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [1.5 / 3, 0.5 / 3]
    # One group of two that are alike there; two that would become alike here.
    model, optimizer = toy()
    names = [n for n, _ in model.named_parameters()]
    split = Lion([{"params": [p]} for p in model.parameters()], lr=0.5)
    checkpoint.save(tmp_path / "step-2", model, split)
    checkpoint.load(tmp_path / "step-2", model, optimizer)
    checkpoint.save(tmp_path / "step-3", model, optimizer)
    with pytest.raises(ValueError, match=r"group 1 .*are in groups \[0\] of \[2\] .*as are those of .* group 0"):
        checkpoint.load(tmp_path / "step-3", model, split)
    split.param_groups[1]["weight_decay"] = 0.5
    checkpoint.save(tmp_path / "step-4", model, split)
    with pytest.raises(ValueError, match="whose values of 'weight_decay' differ"):
        checkpoint.load(tmp_path / "step-4", model, optimizer)
    assert names == list(PARAMS)


# Entries of others ----------------------------------------------------------------------------------


def with_others(value: float) -> tuple[nn.Module, Lion]:
    """As timm's Lookahead, an EMA in float32 of bfloat16 weights, and counters leave an optimizer's state."""
    model, optimizer = trained(value)
    model.bfloat16()
    state: dict[Any, Any] = optimizer.state
    for i, p in enumerate(model.parameters()):
        state[p]["slow"] = p.detach().clone()
        state[p]["ema"] = torch.full_like(p, value / 3, dtype=torch.float32)
        state[p]["step"] = torch.tensor(value)
        state[p]["count"] = i + int(value)
        state[p]["rows"] = torch.arange(value, value + 4)
        state[p]["name"] = ("a", None)
    state["rounds"] = {"n": value}
    state["scale"] = torch.tensor([value, value])
    return model, optimizer


def test_entries_of_others_are_kept(tmp_path: Path) -> None:
    model, optimizer = with_others(5.0)
    checkpoint.save(tmp_path / "step-1", model, optimizer)
    expected: list[dict[str, Any]] = [optimizer.state[p] for p in model.parameters()]
    for fresh in (True, False):
        other, loaded = with_others(7.0)
        if fresh:  # before the wrapper has made its own
            loaded = Lion([{"params": [other.weight]}, {"params": [other.bias]}])
            loaded.init_state()
            with pytest.raises(ValueError, match=r"exp_avg is float32 in the checkpoint and torch.bfloat16 here"):
                checkpoint.load(tmp_path / "step-1", other, loaded)
            for p in other.parameters():
                loaded.state[p]["exp_avg"] = loaded.state[p]["exp_avg"].float()
        checkpoint.load(tmp_path / "step-1", other, loaded)
        state: dict[Any, Any] = loaded.state
        for p, entry in zip(other.parameters(), expected, strict=True):
            assert state[p].keys() == entry.keys()
            for key, value in entry.items():
                if isinstance(value, Tensor):
                    assert_same_bits(state[p][key], value, key)
                else:
                    assert state[p][key] == value
        assert state["rounds"] == {"n": 5.0}
        assert torch.equal(state["scale"], torch.tensor([5.0, 5.0]))
        # Entries that the checkpoint has not are not kept, as in torch's load_state_dict.
        for p in other.parameters():
            state[p]["late"] = 1
        checkpoint.load(tmp_path / "step-1", other, loaded)
        assert all("late" not in loaded.state[p] for p in other.parameters())


def test_a_load_takes_no_larger_entries_than_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a sparse file would fill the memory."""
    model, optimizer = trained(1.0)
    optimizer.state["large"] = torch.zeros(1 << 20)
    with monkeypatch.context() as patch:
        patch.setattr(optimizer_state, "max_entry_bytes", lambda shape: 1 << 30)
        checkpoint.save(tmp_path / "step-1", model, optimizer)
    model, optimizer = trained(-1.0)
    before = Before(model, optimizer)
    with pytest.raises(ValueError, match=r"optim\.beside\.large has 4194304 bytes; expected at most 65536"):
        checkpoint.load(tmp_path / "step-1", model, optimizer)
    before()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("x", object(), r"optim\.state\.weight\.x is a object, which a checkpoint cannot hold"),
        ("x", torch.zeros(9, 8000), r"optim\.state\.weight\.x is a Tensor of shape \(9, 8000\) .*cannot hold"),
        ("x", {"deep": torch.zeros(9000)}, r"optim\.state\.weight\.x\.deep is a Tensor"),
        (7, 1, "the state of weight has an entry 7"),
        ("\x1b[31m", 1, r"cannot be a name"),
    ],
    ids=["object", "large", "large within", "number for a key", "escape"],
)
def test_entries_that_cannot_be_saved_are_refused_by_name(key: Any, value: Any, message: str, tmp_path: Path) -> None:
    model, optimizer = trained(1.0)
    state: dict[Any, Any] = optimizer.state[model.weight]
    state[key] = value
    with pytest.raises((TypeError, ValueError), match=message) as error:
        checkpoint.save(tmp_path / "step-1", model, optimizer)
    assert "\x1b" not in str(error.value)
    assert not any(tmp_path.iterdir())


def test_too_many_entries_are_refused(tmp_path: Path) -> None:
    model, optimizer = trained(1.0)
    state: dict[Any, Any] = optimizer.state
    state[model.weight].update({str(i): i for i in range(16)})
    with pytest.raises(TypeError, match="17 entries for weight"):
        checkpoint.save(tmp_path / "step-1", model, optimizer)
    del state[model.weight]["3"]
    state.update({str(i): i for i in range(257)})
    with pytest.raises(TypeError, match="257 keys that are no parameters"):
        checkpoint.save(tmp_path / "step-1", model, optimizer)
    state[(1, 2)] = [state.pop(str(i)) for i in range(257)]
    with pytest.raises(TypeError, match=r"entry \(1, 2\)"):
        checkpoint.save(tmp_path / "step-1", model, optimizer)


@pytest.mark.parametrize("others", ["exp_avg_sq", "momentum_buffer"])
def test_states_of_other_optimizers_are_refused(others: str, tmp_path: Path) -> None:
    path = tmp_path / "step-1"
    model, optimizer = trained(1.0)
    optimizer.state[model.bias]["slow"] = torch.zeros_like(model.bias)
    checkpoint.save(path, model, optimizer)

    def adams(raw: dict[str, Any]) -> None:
        raw["tensors"][f"optim.state.bias.{others}"] = raw["tensors"].pop("optim.state.bias.slow")

    rewrite(path, adams)
    message = f"the state of bias has an entry '{others}', so it is another optimizer's"
    model, optimizer = trained(-1.0)
    before = Before(model, optimizer)
    with pytest.raises(ValueError, match=message):
        checkpoint.load(path, model, optimizer)
    before()
    optimizer.state[model.bias][others] = torch.zeros_like(model.bias)
    with pytest.raises(ValueError, match=message):  # and no checkpoint is saved that nothing would load
        checkpoint.save(tmp_path / "step-2", model, optimizer)


def test_entries_without_a_momentum_are_refused(tmp_path: Path) -> None:
    model, optimizer = trained(1.0)
    optimizer.state[model.bias]["slow"] = torch.zeros_like(model.bias)
    checkpoint.save(tmp_path / "step-1", model, optimizer)

    def forget(raw: dict[str, Any]) -> None:
        raw["tensors"]["optim.state.bias.other"] = raw["tensors"].pop("optim.state.bias.exp_avg")

    rewrite(tmp_path / "step-1", forget)
    model, optimizer = trained(-1.0)
    before = Before(model, optimizer)
    with pytest.raises(ValueError, match=r"the state of bias .* has \['other', 'slow'\], but no exp_avg"):
        checkpoint.load(tmp_path / "step-1", model, optimizer)
    before()


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
