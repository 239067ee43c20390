"""ShardedLion, stage 1, against Lion on the averaged gradient: the same bits, for world sizes 1 to 4."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lion_dist import Lion, ShardedLion
from lion_dist.update import reference
from lion_dist.update.hypers import hyper_table
from tests.asserts import assert_same_bits, assert_same_model, assert_same_momentum, momentum_parts
from tests.harness import device_of, run_ranks
from tests.scenarios.toy import FP32, MAX_NORM, MIXED, SHAPES, Toy, expect, train, warm_up, wrapped

STEPS = 20


def body_equals_lion(
    rank: int, world_size: int, dtypes: tuple, clip: bool, use_triton: bool | None, steps: int = STEPS
) -> None:
    device = device_of(rank, world_size)
    model = Toy(100 + rank, dtypes, device)  # other weights on every rank: the first rank's must win
    optimizer = ShardedLion(model.groups(), lr=0.01, stage=1, use_triton=use_triton)
    expected = Toy(100, dtypes, device)
    assert_same_model(model, expected)
    lion = Lion(expected.groups(), lr=0.01)
    norms = train(model, wrapped(model, device), optimizer, warm_up(optimizer), range(steps), clip)
    expected_norms = expect(expected, lion, warm_up(lion), range(steps), world_size, clip)
    assert_same_model(model, expected)
    assert_same_momentum(optimizer.full_state_dict(), lion)
    for got, want in zip(norms, expected_norms, strict=True):
        assert_same_bits(got.cpu(), want.cpu(), "norm")
    if clip:
        assert min(n.item() for n in norms) > MAX_NORM  # the test clips indeed


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize(("dtypes", "clip"), [(FP32, True), (MIXED, False)], ids=["fp32-clipped", "mixed"])
def test_equals_lion(world_size: int, dtypes: tuple, clip: bool, tmp_path: Path) -> None:
    run_ranks(body_equals_lion, world_size, tmp_path, (dtypes, clip, None))


@pytest.mark.parametrize("steps", [3, pytest.param(STEPS, marks=pytest.mark.exhaustive)])
def test_equals_lion_through_triton(steps: int, tmp_path: Path) -> None:
    run_ranks(body_equals_lion, 2, tmp_path, ((torch.float32, torch.float16), False, True, steps), share_gpus=True)


def body_clip_mixed(rank: int, world_size: int) -> None:
    """In 16 bits the coefficient is multiplied in at float32, within the step: against the rule itself."""
    device = device_of(rank, world_size)
    model = Toy(1, MIXED, device)
    optimizer = ShardedLion(model.parameters(), lr=0.01, weight_decay=0.1, stage=1)
    expected = Toy(1, MIXED, device)
    momenta = {
        n: torch.zeros_like(p, dtype=torch.float32 if p.dtype == torch.float16 else p.dtype)
        for n, p in expected.named_parameters()
    }
    row = hyper_table([reference.HyperParameters(0.01, 0.1, 0.9, 0.99, False)], device)[0]

    def gradients(step: int) -> dict[str, torch.Tensor]:
        averages = {n: expected.average_gradient(n, step, world_size) for n in SHAPES}
        grads = {n: g for n, g in averages.items() if g is not None}
        for n in SHAPES:
            getattr(model, n).grad = grads.get(n)
        return grads

    def step_both(grads: dict[str, torch.Tensor], coefficient: torch.Tensor | None) -> None:
        optimizer.step()
        with torch.no_grad():
            for n, g in grads.items():
                reference.lion_step_(getattr(expected, n), g, momenta[n], reference.scalars(row, coefficient))
        assert_same_model(model, expected)

    for step in range(5):
        grads = gradients(step)
        norm = optimizer.clip_grad_norm_(MAX_NORM)
        total = torch.stack([reference.sum_of_squares(g) for g in grads.values()]).sum()
        expected_norm, coefficient = reference.clip_coefficient(total, MAX_NORM)
        assert_same_bits(norm, expected_norm, "norm")
        # A second call sees the gradient as it would be stepped: within the bound, so nothing changes much.
        assert optimizer.clip_grad_norm_(1e6).item() == pytest.approx(MAX_NORM, rel=1e-5)
        step_both(grads, coefficient)
    # Clipping that no step used is dropped with the gradients.
    optimizer.clip_grad_norm_(1e-3)
    optimizer.zero_grad()
    step_both(gradients(5), None)
    state = optimizer.full_state_dict()["state"]
    for i, (n, p) in enumerate(model.named_parameters()):
        if p.requires_grad:
            assert_same_bits(state[i]["exp_avg"], momenta[n].cpu(), f"momentum of {n}")


def test_clip_mixed_dtypes(tmp_path: Path) -> None:
    run_ranks(body_clip_mixed, 3, tmp_path)


def body_subgroup(rank: int, world_size: int) -> None:
    device = device_of(rank, world_size)
    members = [0, 2]
    group = dist.new_group(members)
    if rank not in members:
        with pytest.raises(ValueError, match="not in process_group"):
            ShardedLion([nn.Parameter(torch.zeros(3, device=device))], stage=1, process_group=group)
        return
    model, expected = Toy(rank, FP32, device), Toy(0, FP32, device)
    optimizer = ShardedLion(model.groups(), lr=0.01, stage=1, process_group=group)
    lion = Lion(expected.groups(), lr=0.01)
    for step in range(4):
        for name in SHAPES:
            for m in (model, expected):
                getattr(m, name).grad = m.average_gradient(name, step, 2)
        optimizer.step()
        lion.step()
    assert_same_model(model, expected)
    assert_same_momentum(optimizer.full_state_dict(), lion)


def test_process_group_that_is_not_world(tmp_path: Path) -> None:
    run_ranks(body_subgroup, 3, tmp_path)


def body_grows(rank: int, world_size: int) -> None:
    """A group added and a parameter unfrozen in mid-run, parameters that move, weights loaded in place."""
    device = device_of(rank, world_size)
    model, expected = Toy(5 + rank, FP32, device), Toy(5, FP32, device)
    late = nn.Parameter(torch.full((500,), 1.0 + rank, device=device))
    late_expected = nn.Parameter(torch.full((500,), 1.0, device=device))
    optimizer, lion = ShardedLion(model.groups(), lr=0.01, stage=1), Lion(expected.groups(), lr=0.01)
    for step in range(8):
        if step == 2:
            optimizer.add_param_group({"params": [late], "lr": 0.002})
            lion.add_param_group({"params": [late_expected], "lr": 0.002})
            assert_same_bits(late, late_expected, "broadcast")
        if step == 4:
            model.frozen.requires_grad_()
            expected.frozen.requires_grad_()
        if step == 5:
            model.square.data = model.square.data.clone()
            model.kernel.data = model.kernel.data.clone(memory_format=torch.preserve_format)
            assert model.kernel.is_contiguous(memory_format=torch.channels_last)
        if step == 6:
            halves = {name: p.detach() / 2 for name, p in expected.named_parameters()}
            model.load_state_dict(halves)
            expected.load_state_dict(halves)
        for m, extra in ((model, late), (expected, late_expected)):
            for name in SHAPES:
                getattr(m, name).grad = m.average_gradient(name, step, world_size)
            if step >= 2:
                extra.grad = torch.full_like(extra, 0.5 - step)
            if step >= 4:
                m.frozen.grad = torch.full_like(m.frozen, step - 5.0)
        optimizer.step()
        lion.step()
        assert_same_model(model, expected)
        if step >= 2:
            assert_same_bits(late, late_expected, "late")
    assert_same_momentum(optimizer.full_state_dict(), lion)
    # Each rank holds its part of the momentum and no more.
    trainable = sum(p.numel() for p in model.parameters()) + 500
    padding = world_size * 128 * (len(SHAPES) + 1)
    storages = {s.data_ptr(): s.nbytes() for s in (part.untyped_storage() for part in momentum_parts(optimizer))}
    assert sum(storages.values()) <= 4 * (trainable + padding) / world_size


@pytest.mark.parametrize("world_size", [2, 3])
def test_grows_and_moves(world_size: int, tmp_path: Path) -> None:
    run_ranks(body_grows, world_size, tmp_path)


def body_closure_and_versions(rank: int, world_size: int) -> float:
    device = device_of(rank, world_size)
    p = nn.Parameter(torch.ones(1000, device=device))
    optimizer = ShardedLion([p], lr=0.5, stage=1)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    loss: Any = optimizer.step(closure)
    assert loss.item() == 1000
    assert p[0].item() == 0.5
    loss = (p * p).sum()  # saves p
    p.grad = torch.ones_like(p)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    p.grad = None
    before = p.detach().clone()
    optimizer.step()
    assert_same_bits(p, before, "no gradient, no step")
    return p[0].item()


def test_closure_and_autograd_versions(tmp_path: Path) -> None:
    assert run_ranks(body_closure_and_versions, 2, tmp_path) == [0.0, 0.0]


def body_no_gradient(rank: int, world_size: int) -> None:
    """The model's parameters have been replaced, so that no gradient reaches the optimizer's: one warning on every
    rank. An empty step now and then is as legal as with any optimizer."""
    device = device_of(rank, world_size)
    for stage in (1, 2):
        model = nn.Sequential(nn.Linear(20, 33), nn.Linear(33, 5)).to(device)
        optimizer = ShardedLion(model.named_parameters(), lr=0.25, stage=stage)
        kept = list(model.parameters())

        def train(model: nn.Module = model, optimizer: ShardedLion = optimizer, clip: bool = False) -> int:
            """The number of warnings of a step."""
            model(torch.ones(2, 20, device=device)).sum().backward()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                if clip:
                    optimizer.clip_grad_norm_(1.0)
                optimizer.step()
                optimizer.zero_grad()
            return sum("no rank had a gradient" in str(w.message) for w in caught)

        assert [train(), train(clip=True)] == [0, 0]
        before = [p.detach().clone() for p in kept]
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
        assert [train(clip=stage == 1), train(clip=True), train()] == [1, 0, 0]
        for p, b in zip(kept, before, strict=True):
            assert_same_bits(p, b, "not stepped")
    # A rank without a gradient where another has one; then none has, in the optimizer's second accumulation.
    p, q = (nn.Parameter(torch.ones(300, device=device)) for _ in range(2))
    optimizer = ShardedLion([p, q], lr=0.25)
    for _ in range(3):
        if rank == 1:
            q.sum().backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step()
            optimizer.zero_grad()
    with pytest.warns(UserWarning, match=r"no rank had a gradient.*load_state_dict\(assign=True\)"):
        optimizer.step()
    assert (p == 1).all()
    assert (q != 1).all()


def test_steps_without_any_gradient(tmp_path: Path) -> None:
    run_ranks(body_no_gradient, 2, tmp_path)


def body_grad_scaler(rank: int, world_size: int) -> None:
    """Averaged gradients are equal on all ranks, so all of them skip the same steps."""
    device = device_of(rank, world_size)
    p = nn.Parameter(torch.ones(1000, device=device))
    expected = nn.Parameter(p.detach().clone())
    optimizer, lion = ShardedLion([p], lr=0.25, stage=1), Lion([expected], lr=0.25)
    scalers = [torch.amp.GradScaler(device.type, init_scale=4.0, growth_interval=3) for _ in range(2)]
    for step in range(6):
        for weight, o, scaler in ((p, optimizer, scalers[0]), (expected, lion, scalers[1])):
            scaler.scale((weight * (float("inf") if step == 2 else 1.0 - step)).sum()).backward()
            scaler.step(o)
            scaler.update()
            o.zero_grad()
        assert_same_bits(p, expected, f"step {step}")
    assert scalers[0].get_scale() == scalers[1].get_scale() == 4.0
    assert p.isfinite().all()


def test_grad_scaler(tmp_path: Path) -> None:
    run_ranks(body_grad_scaler, 2, tmp_path)


def body_stale_clipping(rank: int, world_size: int) -> None:
    """Clipping belongs to the gradients it was computed from: a step that was skipped must not leave it behind."""
    device = device_of(rank, world_size)
    p = nn.Parameter(torch.ones(1000, device=device))
    optimizer = ShardedLion([p], lr=0.25, stage=1)
    for bad in (float("inf"), float("nan")):
        p.grad = torch.full_like(p, bad)
        optimizer.clip_grad_norm_(1.0)
        p.grad = torch.full_like(p, 2.0)  # without step() or the optimizer's zero_grad()
        with pytest.raises(ValueError, match="changed since clip_grad_norm_"):
            optimizer.step()
        assert optimizer.clip_grad_norm_(1.0).item() == pytest.approx(2 * 1000**0.5)
        p.grad.mul_(3)
        assert optimizer.clip_grad_norm_(1.0).item() == pytest.approx(6 * 1000**0.5)
        before = p.detach().clone()
        optimizer.step()
        assert_same_bits(p, before - 0.25, "a step of finite gradients")


def test_clipping_does_not_outlive_its_gradients(tmp_path: Path) -> None:
    run_ranks(body_stale_clipping, 2, tmp_path)


def body_edited_groups(rank: int, world_size: int) -> None:
    device = device_of(rank, world_size)
    a, b, c = (nn.Parameter(torch.ones(300, device=device)) for _ in range(3))
    optimizer = ShardedLion([a, b], stage=1)
    optimizer.param_groups[0]["params"].append(c)
    optimizer.clip_grad_norm_(1.0)  # is refused with the step that follows, which alone every rank may refuse
    for call in (optimizer.step, optimizer.full_state_dict):
        with pytest.raises(ValueError, match="add_param_group"):
            call()
    del optimizer.param_groups[0]["params"][1:]
    with pytest.raises(ValueError, match="removed from param_groups"):
        optimizer.step()
    # A frozen parameter that is given a gradient is stepped, as Lion steps it.
    frozen = nn.Parameter(torch.ones(300, device=device), requires_grad=False)
    optimizer = ShardedLion([a, frozen], lr=0.25, stage=1)
    frozen.grad = torch.ones_like(frozen)
    optimizer.step()
    assert_same_bits(frozen, torch.full_like(frozen, 0.75), "frozen, with a gradient")


def test_edited_groups_are_noticed(tmp_path: Path) -> None:
    run_ranks(body_edited_groups, 2, tmp_path)
