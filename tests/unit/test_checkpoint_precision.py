"""Weights and momenta in every form that Lion keeps, saved and loaded into every other in one process."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lion_dist import Lion, checkpoint
from lion_dist.memory_order import flat
from lion_dist.update import codecs
from tests.asserts import assert_same_bits, assert_same_tensors
from tests.scenarios.checkpoint_forms import MOMENTA, SHAPES, WEIGHTS, Trained, contents, write

pytestmark = [
    pytest.mark.filterwarnings("ignore:lion_dist. lr:UserWarning"),  # bfloat16 weights that stand still
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]
FIRST, MORE = range(4), range(4, 7)


def needs_cast(saved: tuple[str, str], here: tuple[str, str]) -> bool:
    """Whether a load of these weights and momenta into those is refused without cast=True."""
    (weights, momentum), (weights_here, momentum_here) = saved, here
    if (weights_here == "bf16") != (weights == "bf16") and weights_here != "master":
        return True
    return momentum != momentum_here and "int8" not in (momentum, momentum_here)


def canonical(t: Tensor) -> Tensor:
    """The numbers with NaN in the form in which Lion stores it."""
    return t.masked_fill(t.isnan(), math.nan)


def expected_weight(saved: Trained, weights: str, p: Tensor, weights_here: str) -> Tensor:
    """In float32."""
    if weights_here != "bf16":
        return saved.weight(p)
    return canonical(p.detach().bfloat16().float())  # of master weights: the bfloat16 weights that were saved


def expected_momentum(m: Tensor, momentum_here: str) -> Tensor:
    """In float32, for a momentum whose memory order is the parameter's."""
    if momentum_here != "int8":
        return canonical(m.to(MOMENTA[momentum_here]).float())
    codes, scale = codecs.encode(flat(m))
    return codecs.decode(codes, scale).as_strided(m.shape, m.stride())


@pytest.mark.parametrize("saved", list(product(WEIGHTS, MOMENTA)), ids=" ".join)
def test_every_pairing(saved: tuple[str, str], tmp_path: Path) -> None:
    before = Trained(*saved, seed=1, steps=FIRST)
    checkpoint.save(tmp_path / "step-4", before.model, before.optimizer)
    params = dict(before.model.named_parameters())
    runs = {here: Trained(*here, seed=2, steps=range(20, 21)) for here in product(WEIGHTS, MOMENTA)}
    for here, run in runs.items():
        what, cast = f"{saved} -> {here}", needs_cast(saved, here)
        if cast:
            there, groups = run.everything(), run.groups()
            with pytest.raises(ValueError, match="cast=True"):
                run.load(tmp_path / "step-4")
            assert_same_tensors(run.everything(), there, f"{what}, refused")
            assert run.groups() == groups
        run.load(tmp_path / "step-4", cast)
        weights, momenta = run.weights(), run.momenta()
        for name, p in params.items():
            expected = expected_weight(before, saved[0], p, here[0])
            assert_same_bits(weights[name], expected, f"{what}: {name}")
            m = before.momentum(p)
            assert_same_bits(momenta[name], expected_momentum(m, here[1]), f"{what}: momentum of {name}")
        (group,) = run.groups()
        assert group["rounding_step"] == before.groups()[0]["rounding_step"]
        assert group["master_weights"] == (here[0] == "master")
        assert group["momentum_dtype"] == MOMENTA[here[1]]
    # Where nothing is lost, the run goes on with the same bits.
    later = before.train(MORE)
    for here, run in runs.items():
        if here[1] == saved[1] and (here[0] == saved[0] or "bf16" not in (here[0], saved[0])):
            run.train(MORE)
            assert_same_tensors(run.weights(), later.weights(), f"{saved} -> {here}, later")
            assert_same_tensors(run.momenta(), later.momenta(), f"{saved} -> {here}, later")


def test_what_is_stored(tmp_path: Path) -> None:
    """One float32 tensor for a weight and its remainder; codes as they are, except where p is not row-major."""
    run = Trained("master", "int8", 1, FIRST)
    checkpoint.save(tmp_path / "step-1", run.model, run.optimizer)
    checkpoint.async_save(tmp_path / "step-2", run.model, run.optimizer).result()
    for step in (1, 2):
        found = contents(tmp_path / f"step-{step}")
        expected: dict[str, Tensor] = {}
        for name, p in run.model.named_parameters():
            state = run.optimizer.state[p]
            expected[f"model.{name}"] = run.weight(p)
            if name == "turned":
                expected[f"optim.state.{name}.exp_avg"] = run.momentum(p)
            else:
                expected[f"optim.state.{name}.exp_avg"] = state["exp_avg"]
                expected[f"optim.state.{name}.exp_avg_scale"] = state["exp_avg_scale"]
        stored = {key: t for key, t in found.items() if isinstance(t, Tensor) and not key.startswith("rng.")}
        assert_same_tensors(stored, expected, f"step-{step}")
        assert {key for key in found if key.startswith("master.")} == {f"master.{name}" for name in SHAPES}


def test_the_dtype_that_lion_chooses(tmp_path: Path) -> None:
    """A run with master weights and a momentum in bfloat16 goes on in float32 without cast=True: nothing is lost."""
    run = Trained("master", "", 1, FIRST)
    checkpoint.save(tmp_path / "step-1", run.model, run.optimizer)
    for weights in ("master", "fp32"):
        other = Trained(weights, "", 2, FIRST).load(tmp_path / "step-1")
        assert_same_tensors(other.weights(), run.weights(), weights)
        assert_same_tensors(other.momenta(), run.momenta(), weights)
    checkpoint.save(tmp_path / "step-2", other.model, other.optimizer)
    with pytest.raises(
        ValueError, match=r"exp_avg is float32 in the checkpoint and torch.bfloat16 here.*momentum_dtype"
    ):
        Trained("master", "", 3, FIRST).load(tmp_path / "step-2")
    wide = Trained("master", "fp32", 3, FIRST).load(tmp_path / "step-2")  # as the message says
    assert_same_tensors(wide.momenta(), run.momenta(), "momentum_dtype")


@pytest.mark.parametrize("weights", ["master", "bf16"])
def test_a_momentum_that_becomes_float32_needs_no_cast(weights: str, tmp_path: Path) -> None:
    """Whatever its weight is: nothing is lost."""
    run = Trained(weights, "", 1, FIRST)
    checkpoint.save(tmp_path / "step-1", run.model, run.optimizer)
    wide = Trained(weights, "fp32", 2, FIRST).load(tmp_path / "step-1")
    assert_same_tensors(wide.weights(), run.weights(), weights)
    assert_same_tensors(wide.momenta(), run.momenta(), weights)
    assert all(wide.optimizer.state[p]["exp_avg"].dtype == torch.float32 for p in wide.model.parameters())


def test_the_model_alone(tmp_path: Path) -> None:
    run = Trained("master", "int8", 1, FIRST)
    checkpoint.save(tmp_path / "step-1", run.model, run.optimizer)
    model = Trained("fp32", "fp32", 2).model
    checkpoint.load(tmp_path / "step-1", model)
    assert_same_tensors(dict(model.named_parameters()), run.weights(), "float32")
    model = Trained("bf16", "bf16", 2).model
    with pytest.raises(
        ValueError, match=r"model\.matrix holds master weights .*master_weights=True, or pass cast=True"
    ):
        checkpoint.load(tmp_path / "step-1", model)
    checkpoint.load(tmp_path / "step-1", model, cast=True)
    assert_same_tensors(dict(model.named_parameters()), dict(run.model.named_parameters()), "bfloat16")
    checkpoint.save(tmp_path / "step-2", run.model)  # the weights alone have no remainders
    assert contents(tmp_path / "step-2")["model.matrix"].dtype == torch.bfloat16


def test_a_parameter_that_is_not_the_optimizers(tmp_path: Path) -> None:
    """The message does not ask for an option that the optimizer has."""
    run = Trained("master", "int8", 1, FIRST)
    checkpoint.save(tmp_path / "step-1", run.model, run.optimizer)
    other = Trained("master", "int8", 2)
    some = [(name, p) for name, p in other.model.named_parameters() if name != "matrix"]
    other.optimizer = Lion(some, lr=1e-3, master_weights=True, momentum_dtype="int8")
    with pytest.raises(ValueError, match=r"model\.matrix holds .* not among the optimizer's parameters") as error:
        other.load(tmp_path / "step-1")
    assert "=True" not in str(error.value)
    with pytest.raises(ValueError, match=r"the optimizer lacks 1 parameters|the checkpoint has .* tensors that"):
        other.load(tmp_path / "step-1", cast=True)
    plain = Trained("bf16", "int8", 2)
    with pytest.raises(ValueError, match=r"model\.matrix holds .*without master weights: make .*master_weights=True"):
        plain.load(tmp_path / "step-1")


def test_parameters_that_are_frozen(tmp_path: Path) -> None:
    """Here or when they were saved: master weights stay whole wherever a remainder is kept."""
    run = Trained("master", "int8", 1, FIRST)
    run.model.requires_grad_(False)
    checkpoint.save(tmp_path / "step-1", run.model, run.optimizer)
    other = Trained("master", "int8", 2)
    other.model.requires_grad_(False)
    assert not other.optimizer.state
    other.load(tmp_path / "step-1")
    assert_same_tensors(other.everything(), run.everything(), "frozen here, and never stepped")
    float32 = Trained("fp32", "fp32", 3)
    float32.model.requires_grad_(False)
    checkpoint.save(tmp_path / "step-2", float32.model, float32.optimizer)
    other = Trained("master", "int8", 2, FIRST)
    with pytest.warns(UserWarning, match="were frozen when the checkpoint was saved"):
        other.load(tmp_path / "step-2")
    other.optimizer.init_state()
    assert_same_tensors(other.weights(), float32.weights(), "frozen when it was saved")
    assert not any(m.any() for m in other.momenta().values())
    never = Trained("master", "int8", 4)
    never.model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"model\.matrix is float32 in the checkpoint and torch.bfloat16 here"):
        never.load(tmp_path / "step-2")


@pytest.mark.parametrize("saved", [("bf16", "bf16"), ("master", "int8"), ("fp32", "fp32")], ids=" ".join)
def test_a_hook_that_raises_changes_nothing(saved: tuple[str, str], tmp_path: Path) -> None:
    """Not the remainders and scales either, which are no tensors that are read into."""
    run = Trained(*saved, seed=1, steps=FIRST)
    checkpoint.save(tmp_path / "step-1", run.model, run.optimizer)
    other = Trained("master", "int8", 2, FIRST)
    before, groups = other.everything(), other.groups()

    def hook(_: object) -> None:
        assert_same_tensors(other.weights(), run.weights(), "loaded already")
        raise OSError("a hook that fails")

    handle = other.optimizer.register_load_state_dict_post_hook(hook)
    with pytest.raises(OSError, match="a hook that fails"):
        other.load(tmp_path / "step-1")
    assert_same_tensors(other.everything(), before, "put back")
    assert other.groups() == groups
    handle.remove()
    other.load(tmp_path / "step-1")
    assert_same_tensors(other.weights(), run.weights(), "loaded")


def test_a_checkpoint_of_a_version_without_these_forms(tmp_path: Path) -> None:
    """Its groups lack their keys."""
    run = Trained("fp32", "fp32", 1, FIRST)
    checkpoint.save(tmp_path / "step-1", run.model, run.optimizer)
    state = contents(tmp_path / "step-1")
    for key in ("master_weights", "rounding_step"):
        del state[f"optim.param_groups.0.{key}"]
    write(tmp_path / "step-2", state)
    for weights, momentum in (("fp32", "fp32"), ("master", "int8")):
        other = Trained(weights, momentum, 2, FIRST).load(tmp_path / "step-2")
        assert_same_tensors(other.weights(), run.weights(), weights)
        assert other.groups()[0]["rounding_step"] == (len(FIRST) if momentum == "int8" else 0)
