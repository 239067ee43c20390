"""A further column of state, as data: state_dicts and checkpoints take it along without a change of their own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lion_dist import Lion, checkpoint
from lion_dist.checkpoint import Reader
from lion_dist.update.state import EXP_AVG, StateColumn
from tests.marks import needs_interpreter
from tests.scenarios.columns import COUNT, add_column, add_count

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every parameter's state has a column of int32, in the shape of the parameter."""
    add_count(monkeypatch)


def trained(value: int) -> tuple[nn.Linear, Lion]:
    model = nn.Linear(3, 2)
    opt = Lion(model.parameters(), lr=0.5)
    for p in model.parameters():
        opt.state[p] = {EXP_AVG: torch.full_like(p, value / 2), COUNT: torch.full(p.shape, value, dtype=torch.int32)}
    return model, opt


def assert_state(opt: Lion, value: int) -> None:
    for p in opt.param_groups[0]["params"]:
        assert (opt.state[p][EXP_AVG] == value / 2).all()
        assert opt.state[p][COUNT].dtype == torch.int32
        assert (opt.state[p][COUNT] == value).all()


@pytest.mark.usefixtures("counted")
def test_a_checkpoint_holds_every_column(tmp_path: Path) -> None:
    model, opt = trained(7)
    checkpoint.save(tmp_path / "step-1", model, opt)
    assert Reader(tmp_path / "step-1").manifest.tensors[f"optim.state.weight.{COUNT}"].dtype == "int32"
    model, opt = trained(3)
    checkpoint.load(tmp_path / "step-1", model, opt)
    assert_state(opt, 7)


@pytest.mark.usefixtures("counted")
def test_a_frozen_parameter_gets_every_column_of_the_checkpoint(tmp_path: Path) -> None:
    model, opt = trained(7)
    checkpoint.save(tmp_path / "step-1", model, opt)
    model = nn.Linear(3, 2).requires_grad_(False)
    opt = Lion(model.parameters(), lr=0.5)
    checkpoint.load(tmp_path / "step-1", model, opt)
    assert_state(opt, 7)


@pytest.mark.usefixtures("counted")
def test_a_state_dict_holds_every_column() -> None:
    _, saved = trained(7)
    _, opt = trained(3)
    opt.load_state_dict(saved.state_dict())
    assert_state(opt, 7)
    for p, other in zip(opt.state, saved.state, strict=True):
        assert opt.state[p][COUNT] is not saved.state[other][COUNT]


@pytest.mark.usefixtures("counted")
def test_a_column_of_another_dtype_or_shape_is_refused(tmp_path: Path) -> None:
    model, saved = trained(7)
    saved.state[model.weight][COUNT] = torch.zeros(2, 3)
    _, opt = trained(3)
    with pytest.raises(ValueError, match=r"count of parameter 0 is \(2, 3\) torch\.float32 .*in int32"):
        opt.load_state_dict(saved.state_dict())
    checkpoint.save(tmp_path / "step-1", model, saved)
    with pytest.raises(ValueError, match=r"weight\.count is float32 in the checkpoint and torch\.int32 here"):
        checkpoint.load(tmp_path / "step-1", *trained(3))


def test_a_column_that_is_missing_is_named(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The run that was saved did not keep it."""
    model, saved = trained(7)
    for entry in saved.state.values():
        del entry[COUNT]
    checkpoint.save(tmp_path / "step-1", model, saved)
    state_dict = saved.state_dict()
    request.getfixturevalue("counted")
    with pytest.raises(ValueError, match=r"the state of (weight|bias) .* has \['exp_avg'\], but no count"):
        checkpoint.load(tmp_path / "step-1", *trained(3))
    with pytest.raises(ValueError, match="Lion's has 'exp_avg' and 'count'"):
        trained(3)[1].load_state_dict(state_dict)


def halves(p: Tensor, group: dict[str, Any]) -> StateColumn:
    """One element for every two of the parameter."""
    return StateColumn("scale", torch.float32, 2)


def stepped(*groups: dict[str, Any]) -> tuple[nn.Sequential, Lion]:
    """Two layers, with 6 and 3 elements and no others, after one step; each is a parameter group."""
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(1, 3, bias=False))
    params = [{"params": [layer.weight], **group} for layer, group in zip(model, groups or ({}, {}), strict=True)]
    opt = Lion(params, lr=0.5)
    step(opt)
    return model, opt


def step(opt: Lion) -> None:
    for group in opt.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    opt.step()


def test_elements_of_a_parameter_may_share_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    add_column(monkeypatch, halves)
    model, opt = stepped()
    scales = [entry["scale"] for entry in opt.state.values()]
    assert [tuple(t.shape) for t in scales] == [(3,), (2,)]
    for t in scales:
        t.copy_(torch.arange(1.0, 1 + len(t)))
    checkpoint.save(tmp_path / "step-1", model, opt)
    assert Reader(tmp_path / "step-1").manifest.tensors["optim.state.0.weight.scale"].shape == (3,)

    _, loaded = stepped()
    loaded.load_state_dict(opt.state_dict())
    other, restored = stepped()
    checkpoint.load(tmp_path / "step-1", other, restored)
    fresh_model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(1, 3, bias=False))
    fresh = Lion([{"params": [layer.weight]} for layer in fresh_model], lr=0.5)
    checkpoint.load(tmp_path / "step-1", fresh_model, fresh)
    for copied in (copy.deepcopy(opt), loaded, restored, fresh):
        step(copied)
        for entry, t in zip(copied.state.values(), scales, strict=True):
            assert entry["scale"] is not t
            assert torch.equal(entry["scale"], t)


def test_shared_state_of_another_shape_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    add_column(monkeypatch, halves)
    _, opt = stepped()
    opt.state[opt.param_groups[0]["params"][0]]["scale"] = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"shape \(2, 3\) and its scale \(2, 3\); expected \(3,\): the parameter"):
        step(opt)


def test_a_column_has_one_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    add_column(monkeypatch, lambda p, group: StateColumn("scale", torch.float32, group["_block"]))
    with pytest.raises(ValueError, match="scale has blocks of 2 elements in one parameter group and of 4 in another"):
        stepped({"_block": 2}, {"_block": 4})


@pytest.mark.parametrize("counted_group", [0, 1])
@pytest.mark.parametrize("use_triton", [False, pytest.param(True, marks=needs_interpreter)])
def test_groups_may_have_different_columns(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, counted_group: int, use_triton: bool
) -> None:
    add_column(monkeypatch, lambda p, group: StateColumn(COUNT, torch.int32) if "_count" in group else None)

    def counting(seed: int) -> tuple[nn.Sequential, Lion, Tensor]:
        """Optimizer and model before the first step, and the parameter that has a counter."""
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(1, 3, bias=False))
        groups: list[dict[str, Any]] = [{"params": [layer.weight]} for layer in model]
        groups[counted_group]["_count"] = True
        return model, Lion(groups, lr=0.5, use_triton=use_triton), groups[counted_group]["params"][0]

    torch.manual_seed(0)
    expected_model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(1, 3, bias=False))
    expected = Lion(expected_model.parameters(), lr=0.5, use_triton=use_triton)
    model, opt, p = counting(0)
    for _ in range(2):
        step(opt)
        step(expected)
        opt.state[p][COUNT].fill_(7)
    step(opt)
    step(expected)
    for own, other in zip(model.parameters(), expected_model.parameters(), strict=True):
        assert torch.equal(own, other)
        assert torch.equal(opt.state[own][EXP_AVG], expected.state[other][EXP_AVG])
    assert [COUNT in opt.state[q] for q in model.parameters()] == [counted_group == 0, counted_group == 1]

    checkpoint.save(tmp_path / "step-1", model, opt)
    _, loaded, loaded_p = counting(1)
    loaded.load_state_dict(opt.state_dict())
    other_model, restored, restored_p = counting(1)
    checkpoint.load(tmp_path / "step-1", other_model, restored)
    for copied, q in ((opt, p), (loaded, loaded_p), (restored, restored_p)):
        step(copied)
        assert copied.state[q][COUNT].dtype == torch.int32
        assert (copied.state[q][COUNT] == 7).all()
        assert sum(COUNT in entry for entry in copied.state.values()) == 1
