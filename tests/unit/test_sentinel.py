"""The sentinel notices whoever zeroes or scales gradients that are no longer in p.grad, and nothing else."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lion_dist
from lion_dist.sharding.param_grads import GradState, ParamGrads
from lion_dist.sharding.sentinel import Sentinel


class Watched(Sentinel):
    """A sentinel, with the gradients that it stands for."""

    def __init__(self, params: list[nn.Parameter], look: Callable[[], object] = lambda: None) -> None:
        self.grads = ParamGrads(params)
        super().__init__(self.grads, look)  # type: ignore[arg-type]

    def watch_after(self, *left: int) -> None:
        """Begins to watch after the gradients of these parameters have left, whatever p.grad holds now."""
        for i in left:
            p = self.grads.params[i]
            if self.grads.states[i] is GradState.LOCAL:
                held, p.grad = p.grad, torch.ones_like(p)
                self.grads.take([i])
                p.grad = held
        self.watch()

    def arrived(self) -> None:
        """Autograd has added to the sentinel's gradient."""
        self.grads.arrived(self.index)

    def has_gradient(self) -> bool:
        """Whether the sentinel's p.grad holds more than the placeholder."""
        return self.grads.any_gradient()


def make(*numels: int) -> tuple[Watched, list[nn.Parameter]]:
    params = [nn.Parameter(torch.ones(n)) for n in numels]
    return Watched(params), params


def watching(params: list[nn.Parameter], look: Callable[[], object] = lambda: None) -> Watched:
    """A sentinel of the smallest parameter."""
    sentinel = Watched(params, look)
    sentinel.watch_after(*range(len(params)))
    return sentinel


def test_is_the_first_of_the_smallest() -> None:
    for numels, left, index in [
        ((5, 3, 4, 3), [0, 1, 2, 3], 1), ((5,), [0], 0), ((5, 0, 1), [0, 1, 2], 1),
        # Of those whose gradients have left, if any has.
        ((5, 3, 4, 3), [0, 2, 3], 3), ((5, 3, 4, 3), [0], 0), ((5, 3, 4, 3), [], 1),
    ]:  # fmt: skip
        sentinel, params = make(*numels)
        sentinel.watch_after(*left)
        assert sentinel.index == index
        assert [p.grad is not None for p in params] == [i == index for i in range(len(numels))]


def test_stays_until_removed() -> None:
    sentinel, params = make(5, 3, 4)
    sentinel.watch_after(0)
    sentinel.watch_after(0, 1, 2)
    assert sentinel.index == 0
    sentinel.remove()
    assert [p.grad for p in params] == [None] * 3
    sentinel.watch_after(0, 1, 2)
    assert sentinel.index == 1
    assert [len(p._backward_hooks or {}) for p in params] == [0, 1, 0]
    sentinel.dismiss()
    assert [len(p._backward_hooks or {}) for p in params] == [0, 0, 0]
    sentinel.watch_after(1)  # the same one once more
    assert [len(p._backward_hooks or {}) for p in params] == [0, 1, 0]


def test_knows_nothing_until_it_watches() -> None:
    sentinel, (_, p) = make(5, 3)
    assert not sentinel.watches
    assert not sentinel.noticed_zeroing()
    p.grad = torch.ones_like(p)
    assert not sentinel.noticed_zeroing()
    sentinel.remove()
    assert p.grad is not None  # it is not the sentinel's


def test_placeholder_is_no_gradient() -> None:
    sentinel, (other, p) = make(5, 3)
    sentinel.watch_after(0, 1)
    assert sentinel.watches
    assert other.grad is None
    assert p.grad is not None
    assert not p.grad.any()
    assert not p.grad.requires_grad
    assert not sentinel.has_gradient()
    assert not sentinel.noticed_zeroing()
    sentinel.remove()
    assert p.grad is None
    assert not sentinel.watches


def test_keeps_a_gradient_that_is_there() -> None:
    sentinel, (_, p) = make(5, 3)
    p.grad = grad = torch.full_like(p, 2.0)
    sentinel.watch_after(0, 1)
    assert p.grad is grad
    assert sentinel.has_gradient()
    assert not sentinel.noticed_zeroing()
    sentinel.remove()
    assert p.grad is grad


def replaced(p: nn.Parameter) -> None:
    p.grad = torch.zeros_like(p)


def scaled(p: nn.Parameter) -> None:
    assert p.grad is not None
    p.grad.mul_(1.0)


def zeroed_in_place(p: nn.Parameter) -> None:
    nn.ParameterList([p]).zero_grad(set_to_none=False)


def clipped_by_norm(p: nn.Parameter) -> None:
    torch.nn.utils.clip_grad_norm_([p], 1e9)


def clipped_by_norm_one_by_one(p: nn.Parameter) -> None:
    torch.nn.utils.clip_grad_norm_([p], 1e9, foreach=False)


def clipped_by_norm_as_a_parameter_of_lion(p: nn.Parameter) -> None:
    lion_dist.clip_grad_norm_([p], 1e9)


def clipped_by_value(p: nn.Parameter) -> None:
    torch.nn.utils.clip_grad_value_([p], 1e9)


def clipped_by_value_one_by_one(p: nn.Parameter) -> None:
    torch.nn.utils.clip_grad_value_([p], 1e9, foreach=False)


@pytest.mark.parametrize(
    "change",
    [
        replaced, scaled, zeroed_in_place, clipped_by_norm, clipped_by_norm_one_by_one,
        clipped_by_norm_as_a_parameter_of_lion, clipped_by_value, clipped_by_value_one_by_one,
    ],
)  # fmt: skip
@pytest.mark.parametrize("numel", [0, 1, 3])  # a parameter without elements may be the smallest
@pytest.mark.parametrize("with_gradient", [False, True])
def test_change_is_an_error(change: Callable[[nn.Parameter], None], numel: int, with_gradient: bool) -> None:
    sentinel, (_, p) = make(5, numel)
    if with_gradient:
        p.grad = torch.ones_like(p)
    sentinel.watch_after(0, 1)
    change(p)
    for _ in range(2):  # asking does not make it forget
        with pytest.raises(RuntimeError, match=r"changed after gradients had been reduced.*ShardedLion's own"):
            sentinel.noticed_zeroing()
    sentinel.remove()
    assert not sentinel.noticed_zeroing()


@pytest.mark.parametrize("with_gradient", [False, True])
def test_gradients_set_to_none(with_gradient: bool) -> None:
    sentinel, (_, p) = make(5, 3)
    if with_gradient:
        p.grad = torch.ones_like(p)
    sentinel.watch_after(0, 1)
    p.grad = None
    assert sentinel.noticed_zeroing()
    sentinel.remove()
    assert not sentinel.noticed_zeroing()
    assert p.grad is None


def test_autograd_adds_to_the_placeholder() -> None:
    sentinel, (_, p) = make(5, 3)
    sentinel.watch_after(0, 1)
    for expected in (2.0, 4.0):
        (2 * p).sum().backward()
        sentinel.arrived()
        assert not sentinel.noticed_zeroing()
        assert sentinel.has_gradient()  # a gradient now, even if it were of zeros
        assert p.grad is not None
        assert torch.equal(p.grad, torch.full_like(p, expected))
    sentinel.remove()
    assert p.grad is not None


def test_zeros_that_autograd_added_are_a_gradient() -> None:
    sentinel, (_, p) = make(5, 3)
    sentinel.watch_after(0, 1)
    (0 * p).sum().backward()
    assert sentinel.has_gradient()


def test_looks_before_autograd_adds() -> None:
    """After it, zeros that somebody scaled, or a gradient that was None, could not be told from what autograd left."""
    for change, outcome in ((None, False), (scaled, "changed"), (zeroed_to_none, True)):
        p = nn.Parameter(torch.ones(3))
        seen: list[bool | str] = []

        def look(seen: list[bool | str] = seen) -> None:
            try:
                seen.append(sentinel.noticed_zeroing())  # noqa: B023  (made below, and called within this iteration)
            except RuntimeError:
                seen.append("changed")

        sentinel = watching([p], look)
        if change is not None:
            change(p)
        for _ in range(2):
            p.sum().backward()
            sentinel.arrived()
        assert seen == [outcome, False]
        sentinel.dismiss()
        p.sum().backward()
        assert len(seen) == 2


def zeroed_to_none(p: nn.Parameter) -> None:
    p.grad = None


def test_frozen_parameters_come_last() -> None:
    """Autograd never adds to them, and zeroing may leave them out."""
    params = [nn.Parameter(torch.ones(n), requires_grad=n > 2) for n in (5, 1, 3, 2)]
    assert watching(params).index == 2
    for p in params:
        p.requires_grad_(False)
        p.grad = None
    assert watching(params).index == 1


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_recorded_additions_are_no_change() -> None:
    """With create_graph=True autograd adds out of place, so that the tensor is another one."""
    p = nn.Parameter(torch.ones(3))
    seen: list[bool] = []
    sentinel = watching([p], lambda: seen.append(sentinel.noticed_zeroing()))
    for _ in range(2):
        before = p.grad
        (p * p).sum().backward(create_graph=True)
        assert p.grad is not before
        sentinel.arrived()
    assert seen == [False, False]
    assert not sentinel.noticed_zeroing()
    p.grad = None  # breaks the cycle of which torch warns


@pytest.mark.parametrize("with_late_gradient", [False, True])
def test_placeholder_refuses_to_be_unscaled(with_late_gradient: bool) -> None:
    """torch's operator does it without a trace: not even the version of the tensor changes."""
    sentinel, params = make(5, 3)
    sentinel.watch_after(0, 1)
    if with_late_gradient:
        params[1].sum().backward()
        sentinel.arrived()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(params[0].sum()).backward()
    with pytest.raises(RuntimeError, match=r"GradScaler.unscale_\(\) .* use stage=1"):
        scaler.unscale_(torch.optim.SGD(params))
    assert not sentinel.noticed_zeroing()


def test_placeholder_refuses_data() -> None:
    """A write to it leaves no trace."""
    _, p = watching_one()
    assert p.grad is not None
    for change in (lambda g: g.data.clamp_(-1, 1), lambda g: g.data.mul_(0.5)):
        with pytest.raises(RuntimeError, match=r"p\.grad\.data .*ShardedLion's own"):
            change(p.grad)


def test_placeholder_is_copied_and_saved_as_a_plain_tensor() -> None:
    _, p = watching_one()
    file = io.BytesIO()
    torch.save({"grad": p.grad}, file)
    file.seek(0)
    for saved in (torch.load(file)["grad"], copy.deepcopy(p.grad)):
        assert type(saved) is Tensor
        assert saved.tolist() == [0.0, 0.0, 0.0]


def watching_one() -> tuple[Watched, nn.Parameter]:
    p = nn.Parameter(torch.ones(3))
    return watching([p]), p


def test_placeholder_is_a_tensor_like_others() -> None:
    """In the hands of torch.compile, Module.to(), copy.deepcopy() and arithmetic."""
    model = nn.Linear(3, 1)
    sentinel = Watched(list(model.parameters()))
    sentinel.watch_after(0, 1)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(torch.ones(2, 3)).sum().backward()
    sentinel.arrived()
    assert model.bias.grad is not None
    assert model.bias.grad.tolist() == [2.0]
    assert type(model.bias.grad + 1) is Tensor
    assert not sentinel.noticed_zeroing()
    model.to(torch.float64)
    assert model.bias.grad.dtype == torch.float64
    assert copy.deepcopy(model).bias.dtype == torch.float64
