"""States of gradients: when they change, what is taken out of p.grad, and which changes of p.grad are found."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lion_dist.sharding.param_grads import GradState, ParamGrads
from lion_dist.sharding.placeholder import Placeholder

LOCAL, REDUCED, SPLIT = GradState.LOCAL, GradState.REDUCED, GradState.SPLIT


def make(*shapes: tuple[int, ...]) -> tuple[ParamGrads, list[nn.Parameter]]:
    params = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    return ParamGrads(params), params


def backward(grads: ParamGrads, i: int, factor: float = 1.0) -> None:
    (factor * grads.params[i]).sum().backward()
    grads.arrived(i)


def tampered(grads: ParamGrads, except_for: int = -1) -> int | None:
    return grads.first_tampered(except_for, lambda i: True)


def test_from_local_to_reduced_to_split_and_back() -> None:
    grads, (p, _) = make((3,), (4,))
    backward(grads, 0)
    assert grads.states == [LOCAL, LOCAL]
    for factor in (1.0, 2.0):
        taken, nothing = grads.take([0, 1])
        assert nothing is None
        assert taken is not None
        assert taken.tolist() == [factor] * 3
        assert p.grad is None
        assert grads.states == [REDUCED, LOCAL]
        backward(grads, 0, 2.0)
        assert grads.states == [SPLIT, LOCAL]
    assert grads.have_left() == [True, False]
    assert tampered(grads) is None
    grads.forget()
    assert grads.states == [LOCAL, LOCAL]
    assert p.grad is not None


def test_nothing_to_take_leaves_the_state() -> None:
    grads, _ = make((3,))
    assert grads.take([0]) == [None]
    assert grads.states == [LOCAL]
    backward(grads, 0)
    grads.take([0])
    assert grads.take([0]) == [None]
    assert grads.states == [REDUCED]


@pytest.mark.parametrize("strides", [(1, 2), (3, 1)])
def test_gradients_are_taken_in_the_memory_order_of_the_parameter(strides: tuple[int, int]) -> None:
    values = torch.arange(6.0).view(2, 3)
    p = nn.Parameter(values.t().contiguous().t())  # columns lie one after another
    p.grad = torch.empty_strided((2, 3), strides).copy_(values)
    (taken,) = ParamGrads([p]).take([0])
    assert taken is not None
    assert taken.tolist() == [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]


def test_a_gradient_by_hand_is_found_once_another_has_left() -> None:
    grads, (p, q) = make((3,), (4,))
    q.grad = torch.ones_like(q)  # none of it has left
    backward(grads, 0)
    grads.take([0])
    assert tampered(grads) is None
    p.grad = torch.ones_like(p)
    assert tampered(grads) == 0
    assert tampered(grads, except_for=0) is None
    assert grads.first_tampered(-1, lambda i: False) is None
    assert grads.any_gradient()


def test_a_change_of_a_later_part_is_found() -> None:
    grads, (p,) = make((3,))
    backward(grads, 0)
    grads.take([0])
    backward(grads, 0)
    assert tampered(grads) is None
    assert p.grad is not None
    p.grad.mul_(1.0)
    assert tampered(grads) == 0
    grads.record_zeroed()  # as if zero_grad(set_to_none=False) had made the change
    assert tampered(grads) is None
    p.grad = None
    grads.record_zeroed()
    assert grads.states == [REDUCED]


def test_the_stand_in_is_never_left_empty() -> None:
    grads, (p,) = make((3,))
    grads.keep_filled(0)
    assert isinstance(p.grad, Placeholder)
    assert not grads.any_gradient()
    assert grads.take([0]) == [None]
    backward(grads, 0)
    (taken,) = grads.take([0])
    assert taken is not None
    assert taken.tolist() == [1.0] * 3
    assert isinstance(p.grad, Placeholder)
    assert grads.states == [REDUCED]
    assert tampered(grads) is None
    grads.stop_filling()
    assert p.grad is None


def test_records_are_released_without_their_gradients() -> None:
    grads, (p, _) = make((3,), (4,))
    for i in (0, 1):
        backward(grads, i)
    grads.take([0, 1])
    backward(grads, 0)
    p.grad = None
    grads.release_records()
    assert grads.states == [REDUCED, REDUCED]


def test_states_follow_their_parameters() -> None:
    before, (a, b, c) = make((3,), (4,), (5,))
    for i in range(3):
        backward(before, i)
    before.take([0, 1, 2])
    backward(before, 1)
    new = nn.Parameter(torch.ones(2))
    after = ParamGrads([new, c, b, a])
    after.carry_over(before, {id(a)}, lambda i: True)
    assert after.states == [LOCAL, REDUCED, SPLIT, LOCAL]
    assert tampered(after) is None
    # A parameter that had no hook: a backward may have put its gradient there.
    c.grad = torch.ones_like(c)
    for is_hooked, found in ((True, 1), (False, None)):
        after = ParamGrads([new, c, b, a])
        after.carry_over(before, {id(a)}, lambda i, is_hooked=is_hooked: is_hooked)  # type: ignore[misc]
        assert tampered(after) == found
