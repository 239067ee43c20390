"""Checkpoints whose scales, codes, remainders or master weights are none: refused by name, and nothing is changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lion_dist import checkpoint
from tests.asserts import assert_same_bits, assert_same_tensors
from tests.scenarios.checkpoint_forms import Trained, contents, write

M, SCALE = "optim.state.short.exp_avg", "optim.state.short.exp_avg_scale"
REMAINDER = "optim.state.short.remainder"
State = dict[str, Any]

pytestmark = [
    pytest.mark.filterwarnings("ignore:lion_dist. lr:UserWarning"),  # bfloat16 weights that stand still
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]


def put(**values: Any) -> Callable[[State], Any]:
    """Replaces tensors and values; the keys have "__" for a dot."""
    return lambda state: state.update({key.replace("__", "."): value for key, value in values.items()})


def scale_of(*values: float) -> Callable[[State], Any]:
    return put(**{SCALE: torch.tensor(values)})


def weight_in_bfloat16(state: State) -> None:
    state["model.short"] = state["model.short"].bfloat16()


def with_remainder(remainder: Tensor) -> Callable[[State], Any]:
    """As torch's own functions save it, through Writer."""

    def edit(state: State) -> None:
        del state["master.short"]
        state.update({"model.short": state["model.short"].bfloat16(), REMAINDER: remainder})

    return edit


ATTACKS: dict[str, tuple[Callable[[State], Any], str]] = {
    "negative scale": (scale_of(1.0, -1e-9), r"exp_avg_scale has -9.9\d*e-10 at position 1 .*must be finite"),
    "NaN scale": (scale_of(float("nan"), 1.0), r"optim\.state\.short\.exp_avg_scale has nan at position 0"),
    "infinite scale": (scale_of(1.0, float("inf")), r"exp_avg_scale has inf at position 1"),
    "scale too few": (scale_of(1.0), r"exp_avg_scale is float32 of shape \(1,\).*expected float32 of shape \(2,\)"),
    "scales too many": (scale_of(1.0, 1.0, 1.0), r"expected float32 of shape \(2,\), for a momentum in int8"),
    "scales in another shape": (put(**{SCALE: torch.ones(2, 1)}), r"exp_avg_scale is float32 of shape \(2, 1\)"),
    "scales in float64": (put(**{SCALE: torch.ones(2).double()}), "exp_avg_scale is float64 of shape"),
    "scales as a value": (put(**{SCALE: [1.0, 1.0]}), "exp_avg_scale is not a tensor in the checkpoint; expected"),
    "no scale": (lambda state: state.pop(SCALE), r"short\.exp_avg is int8 .* no exp_avg_scale .* of shape \(2,\)"),
    "no codes": (lambda state: state.pop(M), "the state of short .* but no exp_avg|has exp_avg_scale, but no exp_avg"),
    "codes in uint8": (put(**{M: torch.ones(129, dtype=torch.uint8)}), "exp_avg is uint8 .*a float dtype, or int8"),
    "codes in int16": (put(**{M: torch.ones(129, dtype=torch.int16)}), "exp_avg is int16 .*a float dtype, or int8"),
    "codes of another shape": (put(**{M: torch.ones(128, dtype=torch.int8)}), r"exp_avg has shape \(128,\)"),
    "codes as a value": (put(**{M: [1]}), "exp_avg is not a tensor"),
    "scales beside numbers": (put(**{M: torch.ones(129)}), r"exp_avg_scale is float32 of shape \(2,\).* of shape \(\)"),
    "one bad scale beside numbers": (put(**{M: torch.ones(129), SCALE: torch.tensor(-1.0)}), "exp_avg_scale has -1.0"),
    "master weights of nothing": (put(master__stranger=True), r"master\.stranger says .* there is no such tensor"),
    "master weights in bfloat16": (weight_in_bfloat16, r"master\.short says .* it is bfloat16.* expected float32"),
    "master weights, false": (put(master__short=False), r"master\.short says .* marked by False"),
    "master weights, a list": (put(master__short=["short"]), r"master\.short says .* marked by \['short'\]"),
    "master weights of momentum": (put(**{"master.": True}), r"master\. says that model\. "),
    "remainder in int32": (with_remainder(torch.ones(129).int()), r"short\.remainder is int32 .*; expected int16"),
    "remainder with fractions": (with_remainder(torch.full((129,), 0.5)), r"short\.remainder has 0.5 in the check"),
    "remainder out of range": (with_remainder(torch.full((129,), 2.0**15)), r"short\.remainder has 32768.0 in"),
    "remainder of NaN": (with_remainder(torch.full((129,), float("nan"))), r"short\.remainder has nan in the che"),
    "remainder of another shape": (with_remainder(torch.ones(3).short()), r"short\.remainder has shape \(3,\)"),
}  # fmt: skip


@pytest.mark.parametrize("here", [("master", "int8"), ("bf16", "fp32")], ids=" ".join)
def test_bad_checkpoints_change_nothing(here: tuple[str, str], tmp_path: Path) -> None:
    saved = Trained("master", "int8", 1, range(2))
    checkpoint.save(tmp_path / "step-1", saved.model, saved.optimizer)
    good = contents(tmp_path / "step-1")
    write(tmp_path / "as it was", dict(good))
    run = Trained(*here, 2, range(1)).load(tmp_path / "as it was", cast=True)
    before, groups = run.train(range(1)).everything(), run.groups()
    for number, (attack, (edit, message)) in enumerate(ATTACKS.items()):
        state = dict(good)
        edit(state)
        write(tmp_path / f"bad{number}", state)
        for cast in (True, False):
            with pytest.raises(ValueError, match=message if cast or here[0] == "master" else "."):
                run.load(tmp_path / f"bad{number}", cast)
            assert_same_tensors(run.everything(), before, attack)
            assert run.groups() == groups, attack


@pytest.mark.parametrize("dtype", [torch.int16, torch.float32], ids=["int16", "float32"])
def test_remainders_that_nobody_keeps_are_not_dropped_silently(dtype: torch.dtype, tmp_path: Path) -> None:
    """What torch's own functions save, through Writer: weights in bfloat16, and remainders beside them."""
    saved = Trained("master", "fp32", 1, range(2))
    checkpoint.save(tmp_path / "step-1", saved.model, saved.optimizer)
    state = contents(tmp_path / "step-1")
    for name, p in saved.model.named_parameters():
        del state[f"master.{name}"]
        state[f"model.{name}"] = p.detach()
        state[f"optim.state.{name}.remainder"] = saved.optimizer.state[p]["remainder"].to(dtype)
    write(tmp_path / "step-2", state)
    run = Trained("master", "fp32", 2, range(1)).load(tmp_path / "step-2")
    assert_same_tensors(run.everything(), saved.everything(), "with master weights")
    run = Trained("bf16", "fp32", 2, range(1))
    with pytest.raises(
        ValueError, match=r"remainder belongs to master weights.*master_weights=True.*or pass cast=True"
    ):
        run.load(tmp_path / "step-2")
    run.load(tmp_path / "step-2", cast=True)
    for name, p in run.model.named_parameters():
        assert_same_bits(p.detach(), saved.model.get_parameter(name).detach(), name)
        assert "remainder" not in run.optimizer.state[p]
    # Into float32 both halves go, with an optimizer and without, and no cast is needed.
    for cast in (False, True):
        run = Trained("fp32", "fp32", 2, range(1)).load(tmp_path / "step-2", cast)
        assert_same_tensors(run.weights(), saved.weights(), "float32")
        assert all("remainder" not in run.optimizer.state[p] for p in run.model.parameters())
        model = Trained("fp32", "fp32", 2).model
        checkpoint.load(tmp_path / "step-2", model, cast=cast)
        assert_same_tensors(dict(model.named_parameters()), saved.weights(), "float32, the model alone")
    if dtype == torch.float32:
        state["optim.state.matrix.remainder"][0, 0] = 0.5
        write(tmp_path / "step-3", state)
        with pytest.raises(ValueError, match=r"matrix\.remainder has 0\.5 in the checkpoint; expected integers"):
            checkpoint.load(tmp_path / "step-3", model)


def test_one_scale_for_all_numbers(tmp_path: Path) -> None:
    """As state_dict() of a run under FSDP shows an 8-bit momentum."""
    saved = Trained("fp32", "fp32", 1, range(2))
    checkpoint.save(tmp_path / "step-1", saved.model, saved.optimizer)
    state = contents(tmp_path / "step-1")
    for name in ("matrix", "short"):
        state[f"optim.state.{name}.exp_avg_scale"] = torch.tensor(0.5)
    write(tmp_path / "step-2", state)
    for momentum in ("fp32", "int8"):
        run = Trained("fp32", momentum, 2, range(1)).load(tmp_path / "step-2")
        halved = {n: m * 0.5 if n in ("matrix", "short") else m for n, m in saved.momenta().items()}
        if momentum == "fp32":
            assert_same_tensors(run.momenta(), halved, momentum)
        other = Trained("fp32", "fp32", 3, range(1))
        for name, p in other.model.named_parameters():
            other.optimizer.state[p]["exp_avg"].copy_(halved[name])
        checkpoint.save(tmp_path / f"halved for {momentum}", other.model, other.optimizer)
        again = Trained("fp32", momentum, 2, range(1)).load(tmp_path / f"halved for {momentum}")
        assert_same_tensors(run.momenta(), again.momenta(), momentum)
