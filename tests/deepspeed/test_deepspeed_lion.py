"""DeepSpeedLion: the parameters of a config, and the optimizer's state."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from lion_dist import Lion
from lion_dist.deepspeed import DeepSpeedLion
from lion_dist.deepspeed_config import arguments
from lion_dist.update import prepare
from lion_dist.update.backends import make_batches
from tests.asserts import assert_same_bits
from tests.marks import needs_interpreter

BF16 = torch.bfloat16


# Parameters of a config ------------------------------------------------------------------------------------


def test_arguments_of_a_config() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        given = {"lr": 3e-4, "betas": [0.95, 0.98], "weight_decay": 0.1, "maximize": False, "use_triton": None}
        assert arguments(given) == given
        assert arguments({"momentum_dtype": "bfloat16"}) == {"momentum_dtype": "bfloat16"}
        assert arguments({"master_weights": False}) == {}
        assert arguments({"adam_w_mode": True, "amsgrad": False, "fp32_optimizer_states": True}) == {}
    optimizer = DeepSpeedLion([torch.nn.Parameter(torch.ones(3))], **arguments({}))
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-4, (0.9, 0.99), 0.0)


@pytest.mark.parametrize("name", ["eps", "torch_adam", "fused", "foreach", "bias_correction", "set_grad_none"])
def test_ignored_arguments_are_named(name: str) -> None:
    with pytest.warns(UserWarning, match=f"without meaning for Lion: {name}"):
        assert arguments({name: 1, "lr": 0.1}) == {"lr": 0.1}


def test_adams_betas_are_named() -> None:
    """Hugging Face fills them in for "auto", before anybody else sees the config."""
    with pytest.warns(UserWarning, match=r"betas \(0.9, 0.999\) are Adam's"):
        assert arguments({"betas": [0.9, 0.999]}) == {"betas": [0.9, 0.999]}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"betas": "auto"}, '"betas": "auto" is for Hugging Face'),
        ({"lr": "auto"}, '"lr": "auto" is for Hugging Face'),
        ({"eps": "auto"}, '"eps": "auto" is for Hugging Face'),
        ({"max_grad_norm": 1.0}, 'remove it, and set "gradient_clipping"'),
        ({"adam_w_mode": False}, '"adam_w_mode": false is not possible: Lion\'s weight decay is decoupled'),
        ({"amsgrad": True}, '"amsgrad": true is not possible: Lion has no second moment'),
        ({"fp32_optimizer_states": False}, "momentum_dtype"),
        ({"momentum": 0.9, "lr": 0.1}, '"Lion" has no parameter momentum; expected one of lr, betas'),
        ({"momentum_dtype": "int16"}, "momentum_dtype must be None, float32, bfloat16, float16 or int8, got 'int16'"),
        ({"momentum_dtype": "int8"}, '"momentum_dtype": "int8" is not possible under DeepSpeed: its universal and el'),
        ({"master_weights": True}, '"master_weights": true is not possible under DeepSpeed, which keeps float32 maste'),
        ({"master_weights": "yes"}, "master_weights must be True or False, got 'yes'"),
    ],
)
def test_unsupported_arguments_are_refused_by_name(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        arguments(params)


@pytest.mark.parametrize(
    ("option", "message"),
    [({"master_weights": True}, "which keeps float32 master weights"), ({"momentum_dtype": torch.int8}, "scales")],
    ids=["master weights", "8 bits"],
)
def test_precision_that_deepspeed_does_not_allow_for(option: dict[str, Any], message: str) -> None:
    """Of the optimizer, of a group in the constructor and of one that is added, and in a group that is edited."""

    def p() -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.ones(5, dtype=BF16))

    with pytest.raises(ValueError, match=message):
        DeepSpeedLion([p()], **option)
    with pytest.raises(ValueError, match=message):
        DeepSpeedLion([{"params": [p()]}, {"params": [p()], **option}])
    optimizer = DeepSpeedLion([q := p()], lr=0.1)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [p()], **option})
    assert len(optimizer.param_groups) == 1
    optimizer.param_groups[0].update(option)
    q.grad = torch.ones_like(q)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert (q == 1).all()
    assert not optimizer.state


# The optimizer's states ------------------------------------------------------------------------------------


def stepped(kind: type[Lion]) -> Lion:
    p = torch.nn.Parameter(torch.arange(5.0))
    optimizer = kind([p], lr=0.1)
    p.grad = torch.tensor([1.0, -2.0, 0.0, 3.0, 0.5])
    optimizer.step()
    return optimizer


def test_state_dicts_look_like_adams_and_take_no_memory() -> None:
    optimizer = stepped(DeepSpeedLion)
    (entry,) = optimizer.state_dict()["state"].values()
    assert list(entry) == ["step", "exp_avg", "exp_avg_sq"]
    assert entry["exp_avg_sq"].shape == entry["exp_avg"].shape
    assert entry["exp_avg_sq"].untyped_storage().nbytes() == 4
    assert [list(e) for e in optimizer.state.values()] == [["exp_avg"]]


@pytest.mark.parametrize("extra", [{}, {"step": 7}, {"step": 7, "exp_avg_sq": torch.zeros(5)}])
def test_states_of_deepspeeds_own_lions_are_loaded(extra: dict[str, Any]) -> None:
    saved = stepped(Lion).state_dict()
    saved["state"][0].update(extra)
    fresh = DeepSpeedLion([torch.nn.Parameter(torch.zeros(5))], lr=0.3)
    fresh.load_state_dict(saved)
    (entry,) = fresh.state.values()
    assert list(entry) == ["exp_avg"]
    assert_same_bits(entry["exp_avg"], saved["state"][0]["exp_avg"])
    again = DeepSpeedLion([torch.nn.Parameter(torch.zeros(5))])
    again.load_state_dict(fresh.state_dict())
    assert_same_bits(next(iter(again.state.values()))["exp_avg"], entry["exp_avg"])


def test_entries_of_other_code_are_kept() -> None:
    """They stand beside the entries that look like Adam's; some have keys that are no parameters."""
    optimizer = stepped(DeepSpeedLion)
    (entry,) = optimizer.state.values()
    entry["slow"] = torch.arange(5.0)
    state: Any = optimizer.state
    state["count"] = 3
    saved = optimizer.state_dict()
    assert list(saved["state"][0]) == ["step", "exp_avg", "exp_avg_sq", "slow"]
    fresh = DeepSpeedLion([torch.nn.Parameter(torch.zeros(5))], lr=0.3)
    fresh.load_state_dict(saved)
    fresh.step()
    loaded = fresh.state[fresh.param_groups[0]["params"][0]]
    assert list(loaded) == ["exp_avg", "slow"]
    assert_same_bits(loaded["slow"], torch.arange(5.0))
    state = fresh.state
    assert state["count"] == 3


def test_adams_states_are_refused_unchanged() -> None:
    p = torch.nn.Parameter(torch.ones(5))
    adam = torch.optim.Adam([p])
    p.grad = torch.ones(5)
    adam.step()
    optimizer = stepped(DeepSpeedLion)
    before = next(iter(optimizer.state.values()))["exp_avg"].clone()
    with pytest.raises(ValueError, match="exp_avg_sq that is not zero, so it is Adam's"):
        optimizer.load_state_dict(adam.state_dict())
    with pytest.raises(ValueError, match="expected an optimizer state_dict"):
        optimizer.load_state_dict({})
    assert_same_bits(next(iter(optimizer.state.values()))["exp_avg"], before)


def test_partitions_in_turn_are_each_prepared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO steps one group after another, with ``param_groups`` swapped or with the other groups' params left out."""
    built: list[Tensor] = []  # the parameter of each set of batches
    monkeypatch.setattr(
        prepare, "make_batches", lambda tensors, *a: (built.append(tensors.params[0]), make_batches(tensors, *a))[1]
    )
    params = [torch.nn.Parameter(torch.ones(n)) for n in (5, 3)]
    ours = DeepSpeedLion([{"params": [p]} for p in params], lr=0.1, weight_decay=0.5)
    theirs = [Lion([torch.nn.Parameter(p.detach().clone())], lr=0.1, weight_decay=0.5) for p in params]
    groups = ours.param_groups
    for step in range(4):
        for i, p in enumerate(params):
            p.grad = torch.full_like(p, 1.0 - step)
            theirs[i].param_groups[0]["params"][0].grad = p.grad.clone()
            others_empty = [{**g, "params": g["params"] if g is groups[i] else []} for g in groups]
            ours.param_groups = [groups[i]] if step < 2 else others_empty
            ours.step()
            theirs[i].step()
    # The second's group has another number in the second half.
    assert [sum(p is q for q in built) for p in params] == [1, 2]
    ours.param_groups = groups
    for p, single in zip(params, theirs, strict=True):
        q = single.param_groups[0]["params"][0]
        assert_same_bits(p.detach(), q.detach())
        assert_same_bits(ours.state[p]["exp_avg"], single.state[q]["exp_avg"])


@needs_interpreter
def test_momenta_that_are_replaced_between_steps_are_freed() -> None:
    """offload_states() replaces them so, to free their memory."""
    optimizer = DeepSpeedLion([torch.nn.Parameter(torch.ones(5))], lr=0.1, use_triton=True)
    optimizer.param_groups[0]["params"][0].grad = torch.linspace(-1, 1, 5)
    optimizer.step()
    (entry,) = optimizer.state.values()
    old = weakref.ref(entry["exp_avg"])
    entry["exp_avg"] = entry["exp_avg"].clone()
    gc.collect()
    assert old() is None
    optimizer.step()


def test_a_loaded_second_moment_goes_before_the_step() -> None:
    """A universal checkpoint puts it into the state itself."""
    optimizer, plain = stepped(DeepSpeedLion), stepped(Lion)
    (entry,) = optimizer.state.values()
    entry.update(step=3, exp_avg_sq=torch.zeros(5))
    optimizer.step()
    plain.step()
    assert list(entry) == ["exp_avg"]
    assert_same_bits(optimizer.param_groups[0]["params"][0].detach(), plain.param_groups[0]["params"][0].detach())


def test_a_loaded_momentum_takes_the_dtype_of_its_group() -> None:
    """DeepSpeed makes one of float32 for a universal checkpoint."""
    optimizers = [DeepSpeedLion([torch.nn.Parameter(torch.ones(5))], lr=0.1, momentum_dtype=BF16) for _ in range(2)]
    for optimizer in optimizers:
        optimizer.param_groups[0]["params"][0].grad = torch.linspace(-1, 1, 5)
        optimizer.step()
    (entry,) = optimizers[0].state.values()
    entry.update(step=3, exp_avg=entry["exp_avg"].float(), exp_avg_sq=torch.zeros(5))
    for optimizer in optimizers:
        optimizer.step()
    (other,) = optimizers[1].state.values()
    assert entry["exp_avg"].dtype == BF16
    assert_same_bits(entry["exp_avg"], other["exp_avg"])
