"""Loading a checkpoint: what its manifest says of parameter groups."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lion_dist import Lion, checkpoint
from tests.scenarios.checkpoint_linear import PARAMS, Before, Kept, toy, trained
from tests.scenarios.tampering import rewrite


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


def test_messages_contain_no_terminal_escapes(tmp_path: Path) -> None:
    """Strings of a checkpoint reach messages as a name in one group or in two, and through users' code."""
    red, lists = "\x1b[31mred", "optim.param_groups.{}.params"
    layer, optimizer = trained(1.0)
    model = nn.Sequential(layer, Kept())
    checkpoint.save(tmp_path / "good", model, optimizer)
    edits: list[Callable[[dict[str, Any]], Any]] = [
        lambda objects: objects[lists.format(0)].append(red),
        lambda objects: [objects[lists.format(i)].append(red) for i in (0, 1)],
        lambda objects: objects.update({"model.1._extra_state": red}),
    ]

    def edit_objects(edit: Callable[[dict[str, Any]], Any], raw: dict[str, Any]) -> None:
        edit(raw["objects"])

    for i, edit in enumerate(edits):
        path = tmp_path / f"bad-{i}"
        shutil.copytree(tmp_path / "good", path)
        rewrite(path, partial(edit_objects, edit))

        class Telling(Kept):
            def set_extra_state(self, state: Any) -> None:
                if state == red:
                    raise ValueError(f"no {state}")

        layer, optimizer = trained(-1.0)
        with pytest.raises(ValueError, match="x1b") as caught:
            checkpoint.load(path, nn.Sequential(layer, Telling()), optimizer)
        assert str(caught.value).isprintable()
        assert r"\x1b[31mred" in str(caught.value)


def test_an_optimizer_of_other_parameters_is_refused_with_advice(tmp_path: Path) -> None:
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
            checkpoint.save(tmp_path / "step-1", model, Lion([model.get_parameter("0.bias")]))
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
