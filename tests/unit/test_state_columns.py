"""A further column of state, as data: state_dicts and checkpoints take it along without a change of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lion_dist import Lion, checkpoint
from lion_dist.checkpoint import Reader
from lion_dist.update.state import EXP_AVG
from tests.scenarios.columns import COUNT, add_count

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
    request.getfixturevalue("counted")
    with pytest.raises(ValueError, match=r"the state of (weight|bias) .* has \['exp_avg'\], but no count"):
        checkpoint.load(tmp_path / "step-1", *trained(3))
    with pytest.raises(ValueError, match="Lion's has 'exp_avg' and 'count'"):
        trained(3)[1].load_state_dict(saved.state_dict())
