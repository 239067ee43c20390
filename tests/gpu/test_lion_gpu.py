"""Lion on a GPU as torch.optim, GradScaler and users expect an optimizer to be."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from lion_dist import Lion
from tests.asserts import assert_same_bits

from .common import BF16, F16, F32, GPU, Twins, needs_gpu

pytestmark = needs_gpu


@pytest.mark.parametrize("through", ["memory", "a file, mapped to the CPU", "a file"])
@pytest.mark.parametrize("momentum_dtype", [None, F32])
def test_state_dict_round_trip(through: str, momentum_dtype: torch.dtype | None) -> None:
    """Momenta keep their dtype and come to the parameters' device; the steps that follow have the same bits."""
    twins = Twins(dtype=BF16, lr=0.02, momentum_dtype=momentum_dtype)
    twins.step()
    state = twins.gpu.state_dict()
    if through != "memory":
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file, map_location="cpu" if "CPU" in through else None)
    loaded = Lion(Twins._groups(twins.params), lr=1.0)
    loaded.load_state_dict(state)
    old = [twins.gpu.state[p]["exp_avg"] for p in twins.params]
    for p, m in zip(twins.params, old, strict=True):
        got = loaded.state[p]["exp_avg"]
        assert got.device == p.device
        assert got.dtype == (momentum_dtype or BF16)
        assert got.data_ptr() != m.data_ptr()
        assert_same_bits(got, m)
    twins.gpu = loaded
    for _ in range(3):
        twins.new_gradients()
        twins.step()
    twins.assert_equal()


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_step_alike(how: str) -> None:
    """The optimizer is copied with its parameters and an lr tensor; cached tables are not."""
    twins = Twins(lr=torch.tensor(0.02, device=GPU))
    twins.step()
    both = (twins.params, twins.gpu)
    params, optimizer = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    grads = [p.grad for p in twins.params]
    twins.step()
    for p, q, g in zip(params, twins.params, grads, strict=True):
        assert p.data_ptr() != q.data_ptr()
        p.grad = g
    optimizer.step()
    for p, q in zip(params, twins.params, strict=True):
        assert_same_bits(p, q)
        assert_same_bits(optimizer.state[p]["exp_avg"], twins.gpu.state[q]["exp_avg"])
    twins.assert_equal()


def test_closure_parameter_groups_and_lr_zero() -> None:
    twins = Twins()
    seen: list[bool] = []

    def closure() -> float:
        seen.append(torch.is_grad_enabled())
        return 3.0

    assert twins.gpu.step(closure) == 3.0
    assert seen == [True]
    twins.step_cpu()
    extra = torch.ones(77, device=GPU, requires_grad=True)
    extra_cpu = torch.ones(77, requires_grad=True)
    twins.gpu.add_param_group({"params": [extra], "lr": 0.5, "maximize": True})
    twins.cpu.add_param_group({"params": [extra_cpu], "lr": 0.5, "maximize": True})
    twins.params.append(extra)
    twins.cpu_params.append(extra_cpu)
    twins.new_gradients()
    twins.step()
    twins.assert_equal()
    before = [p.detach().clone() for p in twins.params]
    for group in twins.gpu.param_groups:
        group["lr"] = 0.0
    twins.step()
    twins.assert_equal()
    for p, old in zip(twins.params, before, strict=True):
        assert_same_bits(p.detach(), old)


def test_state_is_made_for_every_parameter_at_the_first_step() -> None:
    params = [torch.ones(n, device=GPU, requires_grad=True) for n in (5, 0, 7)]
    params[0].grad = torch.ones_like(params[0])
    optimizer = Lion(params, lr=0.5)
    optimizer.step()
    for p in params:
        assert optimizer.state[p]["exp_avg"].shape == p.shape
        assert optimizer.state[p]["exp_avg"].device == p.device
    assert [p.sum().item() for p in params] == [2.5, 0.0, 7.0]


def test_a_schedule_of_lr_and_betas() -> None:
    """OneCycleLR, which writes both."""
    twins = Twins()
    scheduler = torch.optim.lr_scheduler.OneCycleLR(twins.gpu, max_lr=0.1, total_steps=8)
    for _ in range(7):
        for mine, theirs in zip(twins.cpu.param_groups, twins.gpu.param_groups, strict=True):
            mine["betas"] = theirs["betas"]
        twins.new_gradients()
        twins.step()
        scheduler.step()
    assert twins.gpu.param_groups[0]["betas"] != (0.9, 0.99)
    twins.assert_equal()


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_autograd_end_to_end(dtype: torch.dtype) -> None:
    """A real backward hands over real gradients; here it is only asked that the loss falls and that the graph
    of one step is not disturbed by the next."""
    torch.manual_seed(9)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 1)).to(GPU, dtype)
    optimizer = Lion(model.parameters(), lr=3e-3 if dtype != F32 else 1e-3, betas=(0.9, 0.9))
    x = torch.randn(256, 64, device=GPU, dtype=dtype)
    y = x[:, :1] * 2
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(x) - y).float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("lr", ["number", "tensor"])
def test_grad_scaler(lr: str) -> None:
    """Steps with the unscaled gradients (the scale is a power of two, so they are exact); a step whose gradients
    overflowed changes nothing."""
    twins = Twins(lr=torch.tensor(0.01, device=GPU) if lr == "tensor" else 0.01)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0, growth_interval=1000)
    for overflow in (False, True, False):
        drawn = [twins.draw(tuple(p.shape), F32) for p in twins.params]
        for p, q, g in zip(twins.params, twins.cpu_params, drawn, strict=True):
            p.grad, q.grad = None, g
        if overflow:
            drawn[0].view(-1)[3] = float("inf")
        loss = torch.stack([(p * g.to(GPU)).sum() for p, g in zip(twins.params, drawn, strict=True)]).sum()
        scaler.scale(loss).backward()
        scaler.step(twins.gpu)
        scaler.update()
        if not overflow:
            twins.step_cpu()
        twins.assert_equal()
    assert scaler.get_scale() == 512.0


def test_a_model_moved_after_its_first_step() -> None:
    """Momenta stay on the CPU: an error that says so and changes nothing; loading the state again is the remedy."""
    model, expected = (torch.nn.Linear(8, 8) for _ in range(2))
    expected.load_state_dict(model.state_dict())
    optimizers = [Lion(m.parameters(), lr=0.01, weight_decay=0.1) for m in (model, expected)]

    def set_gradients() -> None:
        for p, q in zip(model.parameters(), expected.parameters(), strict=True):
            q.grad = torch.randn(q.shape)
            p.grad = q.grad.to(p.device)

    set_gradients()
    for optimizer in optimizers:
        optimizer.step()
    model.to(GPU)
    set_gradients()
    before = [p.detach().clone() for p in model.parameters()]
    momenta = [optimizers[0].state[p]["exp_avg"].clone() for p in model.parameters()]
    for _ in range(2):  # the second finds no half-made tables
        with pytest.raises(ValueError, match=r"parameter 0 is on cuda:0 and its exp_avg on cpu.*load"):
            optimizers[0].step()
    for p, old, m in zip(model.parameters(), before, momenta, strict=True):
        assert_same_bits(p.detach(), old)
        assert_same_bits(optimizers[0].state[p]["exp_avg"], m)
    optimizers[0].load_state_dict(optimizers[0].state_dict())
    for optimizer in optimizers:
        optimizer.step()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert_same_bits(p.detach().cpu(), q.detach())


def test_a_model_moved_before_its_first_step() -> None:
    model = torch.nn.Linear(8, 8)
    optimizer = Lion(model.parameters(), lr=0.5)
    model.to(GPU)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
            p.grad = torch.ones_like(p)
    optimizer.step()
    assert all((p == 0.5).all() for p in model.parameters())
    assert all(state["exp_avg"].device == GPU for state in optimizer.state.values())


@pytest.mark.parametrize("tied", [False, True], ids=["shared memory", "one Parameter"])
def test_shared_memory(tied: bool) -> None:
    p = torch.ones(10, device=GPU, requires_grad=True)
    q = p if tied else torch.nn.Parameter(p.detach()[5:])
    for t in (p, q):
        t.grad = torch.ones_like(t)
    if tied:
        with pytest.raises(ValueError, match="given twice"):
            Lion([p, q], lr=0.5)
        return
    optimizer = Lion([p, q], lr=0.5)
    with pytest.raises(ValueError, match="share memory"):
        optimizer.step()
    assert (p == 1.0).all()
    assert not optimizer.state


def test_use_triton_true_needs_a_gpu() -> None:
    """The kernels are compiled for the GPU here, so a CPU tensor is refused, and nothing has changed."""
    p = torch.ones(10, requires_grad=True)
    p.grad = torch.ones(10)
    optimizer = Lion([p], lr=0.5, use_triton=True)
    with pytest.raises(ValueError, match="use_triton=True"):
        optimizer.step()
    assert (p == 1.0).all()
