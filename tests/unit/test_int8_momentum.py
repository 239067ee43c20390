"""An 8-bit momentum in `Lion`: it is alive at every scale of the gradients, and follows them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lion_dist import Lion
from lion_dist.update.codecs import BLOCK, LARGEST_LEVEL, decode
from tests.asserts import assert_same_bits


def optimizer_of(
    count: int, numel: int, dtype: torch.dtype | None = torch.int8, betas: tuple[float, float] = (0.9, 0.99)
) -> tuple[list[nn.Parameter], Lion]:
    """Weights of 0 and a learning rate of 1, so that the weights count the steps."""
    params = [nn.Parameter(torch.zeros(numel)) for _ in range(count)]
    return params, Lion(params, lr=1.0, betas=betas, momentum_dtype=dtype)


def step(optimizer: Lion, grads: list[Tensor]) -> None:
    for p, g in zip(optimizer.param_groups[0]["params"], grads, strict=True):
        p.grad = g
    optimizer.step()


def momentum(optimizer: Lion, p: Tensor) -> Tensor:
    return decode(optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_scale"])


def spread(numel: int) -> Tensor:
    """Magnitudes of 1/1000 to 1 of the largest of their block."""
    g = 10 ** (-3 * torch.rand(numel, generator=torch.Generator().manual_seed(1)))
    g[::BLOCK] = 1.0
    return g


def test_gradients_of_every_scale_give_the_same_signs() -> None:
    """And the same codes, since every product of the rule is exact in powers of two."""
    powers = range(-60, 41, 10)
    params, optimizer = optimizer_of(len(powers), 300)
    sizes, generator = spread(300), torch.Generator().manual_seed(2)
    for number in range(30):
        g = sizes * torch.randn(300, generator=generator)
        step(optimizer, [g * 2.0**power for power in powers])
        for p, power in zip(params, powers, strict=True):
            assert_same_bits(p.detach(), params[6].detach(), f"step {number}, 2**{power}")
    state = optimizer.state[params[6]]
    assert powers[6] == 0
    assert (params[6].abs() < 30).any(), "signs should change"
    for p, power in zip(params, powers, strict=True):
        assert_same_bits(optimizer.state[p]["exp_avg"], state["exp_avg"], f"codes at 2**{power}")
        assert_same_bits(optimizer.state[p]["exp_avg_scale"], state["exp_avg_scale"] * 2.0**power, f"at 2**{power}")


def test_momenta_follow_gradients_that_change_their_sign() -> None:
    """Beside the largest of their block, which keeps its sign. Under rounding to nearest most would stay for ever."""
    (p,), optimizer = optimizer_of(1, 2048)
    scale = torch.ones(2048)
    scale[1024:] = 1e-7
    before = spread(2048) * scale
    after = -before
    after[::BLOCK] *= -1
    for _ in range(800):
        step(optimizer, [before])
    assert (momentum(optimizer, p) > 0).all()
    for _ in range(800):
        step(optimizer, [after])
    follow = (momentum(optimizer, p) < 0)[after < 0].float()
    assert follow.mean() >= 0.98
    assert follow[len(follow) // 2 :].mean() >= 0.98, "of small gradients too"


def wrong_way_steps(dtype: torch.dtype, sizes: Tensor, steps: int = 40) -> Tensor:
    """Of each element: steps against the mean of the gradients +g, +g, +g, -g/2."""
    (p,), optimizer = optimizer_of(1, len(sizes), dtype)
    wrong, before = torch.zeros(len(sizes)), torch.zeros(len(sizes))
    for number in range(steps):
        step(optimizer, [-sizes / 2 if number % 4 == 3 else sizes])
        wrong += p.detach() > before
        before = p.detach().clone()
    return wrong


def test_wrong_way_steps_are_those_of_a_float32_momentum() -> None:
    """A momentum that is 0 makes ten of them."""
    sizes = torch.cat([torch.full((2 * BLOCK,), 10.0**exponent) for exponent in range(-10, 1)])[:-100]
    expected = wrong_way_steps(torch.float32, sizes)
    assert expected.unique().tolist() == [2.0]
    assert torch.equal(wrong_way_steps(torch.int8, sizes), expected)


def test_a_constant_gradient_moves_the_momentum_to_it() -> None:
    """At any scale, and without a bias but that of the largest of a block: each step cuts it by less than 2**-15."""
    (p,), optimizer = optimizer_of(1, 4096, betas=(0.9, 0.9))
    scale = 2.0 ** torch.tensor([-100.0, -60.0, -1.0, 100.0]).repeat_interleave(1024)
    g = spread(4096) * torch.randn(4096, generator=torch.Generator().manual_seed(3)).sign()
    for _ in range(120):
        step(optimizer, [g * scale])
    away = ((momentum(optimizer, p) / scale - g) * g.sign()).view(4, 1024)
    gap = ((g.abs() * LARGEST_LEVEL + 1) / LARGEST_LEVEL / 16).view(4, 1024)  # of levels there, or a little more
    assert (away.abs() <= 2 * gap).all(), (away.abs() / gap).amax(1)
    assert ((away / gap).mean(1).abs() < 0.1).all(), (away / gap).mean(1)
    assert ((away[:, ::BLOCK] > -(2.0**-15) / (1 - 0.9)) & (away[:, ::BLOCK] <= 0)).all()


def test_it_dies_at_no_number_of_steps() -> None:
    """Without gradients a momentum decays to 0 in expectation, and the smallest scale ends it."""
    (p,), optimizer = optimizer_of(1, 300, betas=(0.0, 0.5))
    step(optimizer, [torch.full((300,), 2.0**-100)])
    for _ in range(60):
        step(optimizer, [torch.zeros(300)])
    assert not momentum(optimizer, p).any()
    step(optimizer, [torch.full((300,), -1e-20)])
    assert (momentum(optimizer, p) == momentum(optimizer, p)[0]).all()
    assert math.isclose(float(momentum(optimizer, p)[0]), -0.5e-20, rel_tol=2.0**-14)


def test_torchs_functions_that_make_state_count_no_step() -> None:
    """get_optimizer_state_dict makes a step with an lr of 0 if there is no state. One rank alone may call it, and all
    must round alike afterwards."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    def trained(looked_at: bool) -> tuple[nn.Linear, Lion]:
        torch.manual_seed(0)
        model = nn.Linear(40, 40)
        opt = Lion(model.named_parameters(), lr=0.01, momentum_dtype="int8")
        if looked_at:
            get_optimizer_state_dict(model, opt)
        for _ in range(20):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            opt.step()
        return model, opt

    (model, opt), (other, twin) = trained(True), trained(False)
    assert opt.param_groups[0]["rounding_step"] == twin.param_groups[0]["rounding_step"] == 20
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert_same_bits(p.detach(), q.detach())
        assert torch.equal(opt.state[p]["exp_avg"], twin.state[q]["exp_avg"])


def test_the_count_of_steps_is_a_number() -> None:
    """A tensor would be counted in place, in state_dicts too."""
    p = nn.Parameter(torch.zeros(3))
    opt = Lion([p], lr=0.01, momentum_dtype="int8")
    opt.param_groups[0]["rounding_step"] = counter = torch.tensor(7)
    p.grad = torch.ones(3)
    opt.step()
    assert opt.param_groups[0]["rounding_step"] == 8
    assert counter == 7
