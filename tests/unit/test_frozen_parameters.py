"""Frozen parameters may be anything; they are judged when they are unfrozen."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lion_dist import Lion
from lion_dist.deepspeed import DeepSpeedLion
from lion_dist.sharding.box_tensor import BoxTensor
from tests.asserts import assert_same_bits


def sparse() -> Tensor:
    return torch.sparse_coo_tensor(torch.tensor([[1]]), torch.tensor([1.0]), (3,))


def sharing() -> Iterator[Tensor]:
    buffer = torch.zeros(100)
    return iter((buffer[:60], buffer[30:]))


STRANGE: dict[str, Callable[[], Tensor]] = {
    "uint8": lambda: torch.zeros(8, 1, dtype=torch.uint8),
    "int64": lambda: torch.zeros(3, dtype=torch.int64),
    "bool": lambda: torch.zeros(3, dtype=torch.bool),
    "float64": lambda: torch.zeros(3, dtype=torch.float64),
    "complex": lambda: torch.zeros(3, dtype=torch.complex128),
    "fp8": lambda: torch.zeros(3).to(torch.float8_e4m3fn),
    "sparse": sparse,
    "meta": lambda: torch.zeros(3, device="meta"),
    "expanded": lambda: torch.zeros(1).expand(5),
    "gaps": lambda: torch.zeros(10, 10)[:, :5],
    "a subclass": lambda: BoxTensor((3,), (), (), torch.float32, "cpu"),
    "empty": lambda: torch.zeros(0, dtype=torch.uint8),
}


def frozen_of_every_kind() -> list[Tensor]:
    strange = [make() for make in STRANGE.values()] + list(sharing())
    frozen = [nn.Parameter(t, requires_grad=False) for t in strange]
    freed = nn.Parameter(torch.zeros(5), requires_grad=False)
    freed.untyped_storage().resize_(0)
    return [*frozen, freed, nn.parameter.UninitializedParameter(requires_grad=False)]


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("kind", [Lion, DeepSpeedLion])
def test_frozen_parameters_may_be_anything(kind: type[Lion]) -> None:
    frozen = frozen_of_every_kind()
    p = nn.Parameter(torch.zeros(4))
    opt = kind([*frozen, p], lr=0.25, weight_decay=0.5)
    opt.add_param_group({"params": frozen_of_every_kind()})
    for _ in range(2):
        p.grad = torch.ones(4)
        opt.step()
    assert list(opt.state) == [p]
    assert p.tolist() == [-0.25 * (1 - 0.125) - 0.25] * 4
    saved = opt.state_dict()
    opt.load_state_dict(saved)
    opt.init_state()
    opt.step()
    assert list(opt.state) == [p]
    with pytest.raises(ValueError, match="given twice"):
        opt.add_param_group({"params": [q := torch.zeros(2, dtype=torch.uint8), q]})


def test_a_frozen_parameter_is_judged_when_it_is_unfrozen() -> None:
    """With a clear error, before anything is changed; and no more once it is frozen again."""
    p = nn.Parameter(torch.zeros(4))
    double = nn.Parameter(torch.zeros(3, dtype=torch.float64), requires_grad=False)
    expanded = nn.Parameter(torch.zeros(1).expand(5), requires_grad=False)
    good = nn.Parameter(torch.zeros(2), requires_grad=False)
    opt = Lion([{"params": [double, p]}, {"params": [expanded, good]}], lr=0.25)
    p.grad = torch.ones(4)
    opt.step()
    for strange, error, message in [
        (double, TypeError, r"parameter 0 \(shape \(3,\)\) is torch.strided torch.float64"),
        (expanded, ValueError, r"parameter 2 .* share memory"),
    ]:
        for unfreeze in (True, False):  # unfrozen, or frozen with a gradient
            strange.requires_grad_(unfreeze)
            strange.grad = None if unfreeze else torch.ones_like(strange)
            before = p.detach().clone()
            with pytest.raises(error, match=message):
                opt.step()
            with pytest.raises(error, match=message):
                opt.init_state()
            assert_same_bits(p.detach(), before)
            assert list(opt.state) == [p]
            strange.requires_grad_(False)
            strange.grad = None
            opt.step()
    good.requires_grad_(True)
    good.grad = torch.ones(2)
    opt.step()
    assert good.tolist() == [-0.25] * 2


@pytest.mark.parametrize("use_triton", [False, None])
def test_a_parameter_that_is_frozen_after_its_steps_may_become_anything(use_triton: bool | None) -> None:
    """Quantised, moved away or freed; it keeps its momentum, with which it goes on once it is what it was."""
    p, q = (nn.Parameter(torch.zeros(4)) for _ in range(2))
    opt = Lion([p, q], lr=0.25, use_triton=use_triton)
    p.grad = q.grad = torch.ones(4)
    opt.step()
    momentum = opt.state[p]["exp_avg"].clone()
    p.requires_grad_(False)
    p.grad = None
    trained = p.data
    for strange in (
        torch.zeros(2, 1, dtype=torch.uint8),
        q.data,
        torch.zeros(2).double(),
    ):
        p.data = strange
        moved = q.detach().clone()
        opt.step()
        assert_same_bits(q.detach(), moved - 0.25)
        assert_same_bits(opt.state[p]["exp_avg"], momentum)
    p.data = trained
    p.requires_grad_(True)
    p.grad = torch.ones(4)
    opt.step()
    assert p.tolist() == [-0.5] * 4


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "double": Tensor.double,
    "uint8": lambda t: t.to(torch.uint8),
    "flat": Tensor.flatten,
    "expanded": lambda t: t[:1].expand(2, 3),
    "empty": lambda t: t[:0, :0],
    "meta": lambda t: t.to("meta"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_parameter_frozen_and_changed_keeps_its_momentum(change: Callable[[Tensor], Tensor]) -> None:
    """load_state_dict() accepts all that step() and state_dict() accept, into a new optimizer as well."""
    trained, frozen = (nn.Parameter(torch.zeros(2, 3)) for _ in range(2))
    opt = Lion([trained, frozen], lr=0.25)
    for p in (trained, frozen):
        p.grad = torch.ones(2, 3)
    opt.step()
    momentum = opt.state[frozen]["exp_avg"].clone()
    changed = nn.Parameter(change(frozen.detach()), requires_grad=False)
    frozen.requires_grad_(False)
    frozen.grad = None
    try:
        frozen.data = change(frozen.detach())
    except RuntimeError:  # of meta tensors
        assert changed.is_meta
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    opt.load_state_dict(saved)
    opt.load_state_dict(opt.state_dict())
    other = Lion([trained, changed], lr=0.25)
    other.load_state_dict(saved)
    for loaded, p in ((opt, frozen), (other, changed)):
        assert_same_bits(loaded.state[p]["exp_avg"], momentum)
        assert loaded.state[p]["exp_avg"] is not saved["state"][1]["exp_avg"]
        loaded.step()
    # It has to be a tensor with memory all the same, and one that fits is loaded as ever.
    for bad in (None, torch.zeros(2, 3, device="meta")):
        with pytest.raises((TypeError, ValueError), match="parameter 1"):
            other.load_state_dict({**saved, "state": {1: {"exp_avg": bad}}})
    assert_same_bits(other.state[changed]["exp_avg"], momentum)
    ordinary = nn.Parameter(torch.zeros(2, 3), requires_grad=False)
    other = Lion([trained, ordinary])
    other.load_state_dict({**saved, "param_groups": [{**saved["param_groups"][0], "momentum_dtype": "bfloat16"}]})
    assert other.state[ordinary]["exp_avg"].dtype == torch.bfloat16


def test_a_momentum_for_what_cannot_have_one_is_refused() -> None:
    """The run that was saved trained what is stepped here in another shape."""
    p = nn.Parameter(torch.zeros(4))
    opt = Lion([p])
    p.grad = torch.ones(4)
    opt.step()
    other = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    new = Lion([other])
    other.data = torch.zeros(4, dtype=torch.float64)
    other.requires_grad_(True)
    with pytest.raises(TypeError, match=r"has state for parameter 0, which .*float64"):
        new.load_state_dict(opt.state_dict())
    assert math.isclose(float(opt.state[p]["exp_avg"][0]), 0.01, rel_tol=1e-6)


@pytest.mark.parametrize("use_triton", ["no", "false", 1, 0], ids=repr)
def test_use_triton_is_a_bool_or_none(use_triton: Any) -> None:
    with pytest.raises(TypeError, match="use_triton must be None, True or False"):
        Lion([nn.Parameter(torch.zeros(3))], use_triton=use_triton)
