"""How the tests of FSDP train: a way to wrap against the unsharded twin, and what both flavours of FSDP must stand."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from lion_dist import Lion
from lion_dist.update.backends import compiled, cpu, interpreting, triton_step
from tests.asserts import assert_same_as, assert_same_bits
from tests.scenarios.fsdp_toy import FsdpToy, Twin, groups_of

FULL = StateDictOptions(full_state_dict=True)


@dataclass(frozen=True)
class Place:
    """The place of this rank among those that share the data."""

    rank: int
    size: int
    device: torch.device


def make_lion(model: nn.Module, **options: Any) -> Lion:
    return Lion(groups_of(model), lr=1e-2, weight_decay=0.1, **options)


@dataclass(frozen=True)
class Way:
    """A way to wrap the toy and to train it.

    make: the optimizer of the wrapped model, and of its twin.
    toy: options of FsdpToy.
    micro_steps: backward passes a step, of which all but the last are not synchronised.
    zeros: whether an unused parameter of a used unit has a gradient of zeros, as in FSDP1.
    """

    wrap: Callable[[FsdpToy], nn.Module]
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    make: Callable[[nn.Module], Lion] = make_lion
    micro_steps: int = 1
    toy: dict[str, bool] = field(default_factory=dict)
    replaces_gradients: bool = False
    zeros: bool = field(default=False, kw_only=True)

    def start(self, place: Place, **options: Any) -> tuple[nn.Module, Lion, Twin]:
        model = self.wrap(FsdpToy(self.dtypes, place.device, **self.toy))
        twin = Twin(FsdpToy(self.dtypes, place.device, **self.toy), self.make, self.zeros)
        return model, self.make(model, **options), twin


def local(t: Any) -> Tensor:
    return t._local_tensor if isinstance(t, DTensor) else t


@contextmanager
def unsynchronised(model: Any) -> Iterator[None]:
    if hasattr(model, "no_sync"):
        with model.no_sync():
            yield
    else:
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)


def backward(
    way: Way, model: nn.Module, step: int, place: Place, scale: Callable[[Tensor], Tensor] | None = None
) -> list[int]:
    """Makes the backward passes of a step. Returns the numbers of its micro-steps, which use the same parameters."""
    micro_steps = [step + 30 * i for i in range(way.micro_steps)]
    for micro_step in micro_steps:
        with nullcontext() if micro_step == micro_steps[-1] else unsynchronised(model):
            loss = model(micro_step, place.rank, place.size)
            (loss if scale is None else scale(loss)).backward()
    if way.replaces_gradients:
        for p in model.parameters():
            if p.grad is not None:
                p.grad = p.grad.clone()
    return micro_steps


def train(way: Way, place: Place, steps: range, model: nn.Module, optimizer: Lion, twin: Twin) -> None:
    for step in steps:
        micro_steps = backward(way, model, step, place)
        optimizer.step()
        optimizer.zero_grad()
        twin.step(micro_steps, place.size)


def check_way(what: str, way: Way, place: Place) -> None:
    """After 5 steps, of which two use what the others do not, all is as in the twin."""
    try:
        model, optimizer, twin = way.start(place)
        train(way, place, range(5), model, optimizer, twin)
        assert_same_as(twin, model, optimizer, what)
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error


def from_meta(model: FsdpToy, shard: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A wrapped model made without memory and given it afterwards; ``shard`` leaves it with memory."""
    sharded = shard(copy.deepcopy(model).to("meta"))
    set_model_state_dict(sharded, model.state_dict(), options=FULL)
    return sharded


def check_moves(way: Way, place: Place, moves: list[Callable[[nn.Module, FsdpToy], object]]) -> None:
    """Each move puts the model's or optimizer's tensors elsewhere between two steps."""
    model, optimizer, twin = way.start(place)
    train(way, place, range(2), model, optimizer, twin)

    def load_weights(model: nn.Module, plain: FsdpToy) -> None:
        with torch.no_grad():
            for p in plain.parameters():
                p.mul_(0.5)
        set_model_state_dict(model, plain.state_dict(), options=FULL)

    def load_full_state(model: nn.Module, plain: FsdpToy) -> None:
        state = get_optimizer_state_dict(model, optimizer, options=FULL)
        set_optimizer_state_dict(model, optimizer, state, options=FULL)

    def load_local_state(model: nn.Module, plain: FsdpToy) -> None:
        optimizer.load_state_dict(optimizer.state_dict())

    for i, move in enumerate([*moves, load_weights, load_full_state, load_local_state]):
        move(model, twin.model)
        train(way, place, range(2 + i, 3 + i), model, optimizer, twin)
        assert_same_as(twin, model, optimizer, f"after {move.__name__ if hasattr(move, '__name__') else move}")


def check_clipping(way: Way, place: Place, clip: Callable[[nn.Module, float], Tensor]) -> None:
    """torch's own clipping: gradients are multiplied by one coefficient, before the step."""
    model, optimizer, twin = way.start(place)
    for step in range(4):
        micro_steps = backward(way, model, step, place)
        norm = clip(model, 10.0)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        optimizer.step()
        optimizer.zero_grad()
        coefficient = torch.clamp(10.0 / (norm.float() + 1e-6), max=1.0)
        assert coefficient < 1
        twin.step(micro_steps, place.size, coefficient)
        grads = [p.grad.flatten() / coefficient for p in twin.model.parameters() if p.grad is not None]
        torch.testing.assert_close(torch.linalg.vector_norm(torch.cat(grads)), norm.float())
    assert_same_as(twin, model, optimizer, "clipped")


def check_loss_scale(way: Way, place: Place, scaler: Any) -> None:
    """An infinity on one rank alone: every rank leaves the step out, or replicas would part for ever."""
    model, optimizer, twin = way.start(place)
    for step in range(6):
        micro_steps = backward(way, model, step, place, scaler.scale)
        if step == 2 and place.rank == place.size - 1:
            grads = [local(p.grad) for p in model.parameters() if p.grad is not None]
            next(g for g in grads if g.numel()).view(-1)[0] = torch.inf
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert (scaler.get_scale() < before) == (step == 2), f"step {step}: {before} to {scaler.get_scale()}"
        if step != 2:
            twin.step(micro_steps, place.size)
    assert_same_as(twin, model, optimizer, "scaled")


def check_one_launch(way: Way, place: Place) -> None:
    """All parameters of one dtype, whatever their groups, in one launch of the fused kernel a step."""
    if place.device.type == "cpu" and not interpreting():
        return  # there is a GPU, and tests/gpu counts launches
    launched, launch = [], triton_step.lion_step
    model, optimizer, twin = way.start(place, use_triton=True)
    ours: list[bool] = []  # while this optimizer steps, not the twin's
    optimizer.register_step_pre_hook(lambda *_: ours.append(True))
    optimizer.register_step_post_hook(lambda *_: ours.clear())

    def counted(*args: Any) -> None:
        launched.extend(ours)
        launch(*args)

    with patch.object(triton_step, "lion_step", counted):
        for step in range(4):
            train(way, place, range(step, step + 1), model, optimizer, twin)
            assert len(launched) == step + 1
    assert_same_as(twin, model, optimizer, "fused")


def check_growth(way: Way, place: Place) -> None:
    """62 steps leave no more tensors and no more memory behind than the first few."""
    model, optimizer, _ = way.start(place)

    def held() -> tuple[int, int]:
        gc.collect()
        tensors = [local(o) for o in gc.get_objects() if isinstance(o, Tensor)]
        if place.device.type == "cuda":
            return len(tensors), torch.cuda.memory_allocated(place.device)
        storages = {id(s): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
        return len(tensors), sum(storages.values())

    for step in range(62):
        if step == 11:  # as after the last one, all units have just been used
            before = held()
        backward(way, model, step, place)
        optimizer.step()
        optimizer.zero_grad()
    after = held()
    assert all(a <= b for a, b in zip(after, before, strict=True)), f"(tensors, bytes) {before} before, {after} after"


def compilations() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def check_no_recompilation(way: Way, place: Place) -> None:
    """The step of large CPU tensors compiles one graph for all lengths, one for tensors of one element, and no more,
    while the lr changes at every step and gradients come and go.

    Whether to compile again is decided before the backend is called, so a cheap one does.
    """
    model, optimizer, twin = way.start(place, use_triton=False)
    graphs = [compilations()]
    for step in range(9):
        for group in (*optimizer.param_groups, *twin.optimizer.param_groups):
            group["lr"] = 1e-3 * (step + 1)
        micro_steps = backward(way, model, step, place)
        with (
            patch.object(torch, "compile", partial(torch.compile, backend="aot_eager")),
            patch.multiple(cpu, COMPILE_FROM=1, LONG=2),
        ):
            optimizer.step()
        optimizer.zero_grad()
        twin.step(micro_steps, place.size)  # in plain torch
        graphs.append(compilations())
    if place.device.type == "cpu":  # after the second step every unit that is ever used has been
        assert graphs[0] < graphs[2] <= graphs[0] + 2, f"graphs compiled, by step: {graphs}"
        assert graphs[2] == graphs[-1], f"graphs compiled, by step: {graphs}"
        assert not compiled.step_.failed
    assert_same_as(twin, model, optimizer, "compiled")


def check_own_gradients(model: nn.Module, optimizer: Lion, train_once: Callable[[int], object], steps: int = 4) -> None:
    """Every rank's parts are stepped as plain parameters with the same gradients would be."""
    groups = [[p for p in group["params"]] for group in optimizer.param_groups]
    shadows = [[nn.Parameter(local(p.detach()).clone()) for p in group] for group in groups]
    plain = Lion([{**group, "params": own} for group, own in zip(optimizer.param_groups, shadows, strict=True)])
    pairs = [(p, q) for group, own in zip(groups, shadows, strict=True) for p, q in zip(group, own, strict=True)]
    for step in range(steps):
        train_once(step)
        for p, q in pairs:
            q.grad = None if p.grad is None else local(p.grad).clone()
        assert any(q.grad is not None and q.grad.any() for _, q in pairs)
        optimizer.step()
        optimizer.zero_grad()
        plain.step()
        for i, (p, q) in enumerate(pairs):
            assert_same_bits(local(p.detach()), q.detach(), f"parameter {i}")
            assert_same_bits(local(optimizer.state[p]["exp_avg"]), plain.state[q]["exp_avg"], f"momentum {i}")


class Dense(nn.Linear):
    """With a forward that is not torch's own, which Dynamo leaves alone."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias).sin()


def mlp(device: torch.device) -> nn.Sequential:
    torch.manual_seed(3)
    # Multiples of 16 bytes: in a flat parameter they touch.
    return nn.Sequential(Dense(8, 12), Dense(12, 4)).to(device)


def check_compiled(shard: Callable[[nn.Sequential], nn.Module], place: Place) -> None:
    """A model of compiled layers, under torch.compile itself: its optimizer was made before, its state goes by plain
    names."""
    layers = mlp(place.device)
    for layer in layers:
        layer.compile(backend="aot_eager")
    model = shard(layers)
    before = compilations()
    optimizer = Lion(model.parameters(), lr=1e-2)
    compiled: Any = torch.compile(model, backend="aot_eager")
    x = torch.randn(4, 8, device=place.device, generator=torch.Generator(place.device).manual_seed(place.rank))
    graphs = []

    def train_once(step: int) -> None:
        compiled(x).square().mean().backward()
        graphs.append(compilations() - before)

    check_own_gradients(model, optimizer, train_once, steps=4)
    assert graphs[1] == graphs[-1] > 0, f"graphs compiled, by step: {graphs}"
    state = get_optimizer_state_dict(compiled, optimizer, options=FULL)["state"]
    assert set(state) == {"0.weight", "0.bias", "1.weight", "1.bias"}
