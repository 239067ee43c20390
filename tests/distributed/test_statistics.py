"""statistics() over several ranks: the numbers of Lion's step on one process, and no trace in the step."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lion_dist import Lion, ShardedLion
from tests.asserts import assert_same_bits
from tests.harness import device_of, run_ranks
from tests.marks import needs_interpreter
from tests.scenarios.hybrid import BF16, F32, Case, Twins, mesh_of
from tests.scenarios.modes import MODES, Modes, sizes, values
from tests.scenarios.pair import ALL, Pair, add_group, gradient, model_of
from tests.scenarios.watched import Watcher, assert_same_numbers

MASTER, EIGHT, KERNELS = {"master_weights": True}, {"momentum_dtype": "int8"}, {"use_triton": True}


class WatchedModes(Modes):
    """Modes that are measured before each step. `Lion`, which is not, gives the numbers that are expected."""

    def __init__(self, *args: Any, by: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        count = len(self.params)
        numbers = [i for group in self._groups for i in group["params"]]  # in the optimizer's order
        self.watcher = Watcher(self.lion, list(map(str, range(count))))
        self.by, self.places = (
            by,
            {f"group{k}": [str(numbers.index(i)) for i in group["params"]] for k, group in enumerate(self._groups)},
        )
        self.got: list[dict[str, float]] = []

    def make_step(self, optimizer: Any) -> None:
        if isinstance(optimizer, Lion):
            self.watcher.begin()
            optimizer.step()
            expected = self.watcher.end()
            self.expected = expected if self.by == "parameter" else self.watcher.numbers(self.places)
            return
        self.got.append(optimizer.statistics(self.by, flips=True))
        mode = next(mode for mode in self.modes if mode.optimizer is optimizer)
        assert_same_numbers(self.got[-1], self.expected, str(mode))
        optimizer.step()


def body_modes(
    rank: int, world_size: int, dtype: torch.dtype, kwargs: dict[str, Any], clips: bool, steps: dict[str, int]
) -> list[Any]:
    warnings.simplefilter("ignore")  # of decay that is rounded away
    device, found = device_of(rank, world_size), []
    for by, number_of_steps in steps.items():
        weights = values(sizes(world_size), dtype, device)
        groups = [
            {"params": list(range(0, len(weights), 2)), "weight_decay": 0.1},
            {"params": list(range(1, len(weights), 2)), "lr": 3e-4, "betas": (0.95, 0.98), "maximize": True},
        ]
        modes = WatchedModes(rank, world_size, weights, groups, by=by, **kwargs)
        for step in range(number_of_steps):
            modes.step(step, max_norm=0.5 if clips and step == 1 else None, hostile=step == 2)
            if "of_lion" not in kwargs:  # of which the weights are float32
                modes.check(f"step {step}")
        found += modes.got
    return found


STEPS = {"parameter": 3, "group": 3}  # by what is measured before each


@pytest.mark.parametrize(
    ("dtype", "kwargs", "clips", "steps"),
    [
        (F32, {}, True, STEPS),
        (BF16, {"of_lion": {"momentum_dtype": BF16}, **MASTER}, True, STEPS),
        (BF16, {**MASTER, **EIGHT}, False, STEPS),
        pytest.param(F32, KERNELS, False, {"group": 1}, marks=needs_interpreter),
        pytest.param(F32, KERNELS, True, STEPS, marks=[needs_interpreter, pytest.mark.exhaustive]),
        pytest.param(
            BF16, {**MASTER, **EIGHT, **KERNELS}, False, STEPS, marks=[needs_interpreter, pytest.mark.exhaustive]
        ),
    ],
    ids=["fp32", "masters", "masters-8-bits", "one-step-kernels", "fp32-kernels", "masters-8-bits-kernels"],
)  # fmt: skip
def test_every_mode(
    dtype: torch.dtype, kwargs: dict[str, Any], clips: bool, steps: dict[str, int], tmp_path: Path
) -> None:
    of_ranks = run_ranks(body_modes, 2, tmp_path, (dtype, kwargs, clips, steps))
    assert all(repr(found) == repr(of_ranks[0]) for found in of_ranks)


class WatchedTwins(Twins):
    """The optimizers over several ranks are measured; that of one process gives the numbers."""

    got: list[dict[str, float]]
    watcher: Watcher | None = None

    def make_step(self, optimizer: Any) -> None:
        if optimizer is not self.single_lion:
            self.got.append(optimizer.statistics("parameter", flips=True))
            optimizer.step()
            return
        if self.watcher is None:
            self.watcher = Watcher(self.single_lion, [n for g in optimizer.param_groups for n in g["param_names"]])
        self.watcher.begin()
        optimizer.step()
        self.expected = self.watcher.end()


def body_meshes(rank: int, world_size: int) -> list[Any]:
    found = []
    for case in (
        Case(clip=5.0, accumulate="optimizer"),
        Case(stage=1, sync="params", dtypes=(BF16,), options=MASTER),
    ):
        twins = WatchedTwins(case, mesh_of(2, 2))
        for step in range(3):
            if step == 2:
                twins.unfreeze()
            twins.got = []
            twins.step(step)
            twins.check(f"step {step}")
            assert len(twins.got) == 2
            for which, got in zip(("ShardedLion over FSDP2", "Lion over HSDP"), twins.got, strict=True):
                assert_same_numbers(got, twins.expected, f"{which}, {case}, step {step}")
            found += twins.got
        twins.check_state("in the end")
    return found


def test_over_meshes(tmp_path: Path) -> None:
    of_ranks = run_ranks(body_meshes, 4, tmp_path)
    assert all(repr(found) == repr(of_ranks[0]) for found in of_ranks)


# No trace in the step ---------------------------------------------------------------------------------


@contextmanager
def counted(grads: Any) -> Iterator[list[int]]:
    """Counts the reductions of stage 2."""
    calls: list[int] = []
    if hasattr(grads, "_reducer"):
        reduce = grads._reducer.reduce
        grads._reducer.reduce = lambda **kwargs: [calls.append(1), reduce(**kwargs)][1]
    yield calls
    if hasattr(grads, "_reducer"):
        del grads._reducer.reduce


def body_same_bits(rank: int, world_size: int) -> None:
    """Gradients of any numbers: one more reduction, of zeros, would turn -0.0 into 0.0."""
    device = device_of(rank, world_size)
    for stage, sync in MODES:
        for reduce_dtype in (None, BF16) if stage == 2 else (None,):
            made = []
            for _ in range(2):
                torch.manual_seed(1)
                net = nn.Sequential(nn.Linear(129, 31), nn.ReLU(), nn.Linear(31, 5)).to(device)
                options: dict[str, Any] = {
                    "stage": stage,
                    "param_sync": sync,
                    "reduce_dtype": reduce_dtype,
                    "bucket_mb": 0.01,
                }
                made.append((net, ShardedLion(net.parameters(), lr=0.01, weight_decay=0.1, **options)))
            for step in range(6):
                generator = torch.Generator().manual_seed(10 * step + (0 if stage == 1 else rank))
                x = torch.randn(4, 129, generator=generator).to(device)
                for number, (net, optimizer) in enumerate(made):
                    net(x).square().sum().backward()
                    with counted(optimizer._grads) as reduced:
                        asked = [] if number else [optimizer.statistics()]
                        if step % 3:
                            optimizer.clip_grad_norm_(0.1 * step)
                            asked += [] if number else [optimizer.statistics()]
                        optimizer.step()
                    assert len(reduced) == stage - 1
                    optimizer.zero_grad(set_to_none=step % 2 == 0)
                    if len(asked) == 2:
                        assert asked[1]["l2_norm/grad/global"] == pytest.approx(0.1 * step, rel=1e-4)
                        assert asked[0]["l2_norm/grad/global"] > 0.2 * step
                for p, q in zip(made[0][0].parameters(), made[1][0].parameters(), strict=True):
                    assert_same_bits(p.detach(), q.detach(), f"stage {stage}, {sync}, step {step}")
            one, other = (optimizer.full_state_dict()["state"] for _, optimizer in made)
            for i in one:
                assert_same_bits(one[i]["exp_avg"], other[i]["exp_avg"], f"stage {stage}, {sync}: momentum {i}")


def body_life(rank: int, world_size: int) -> None:
    """Whatever follows a call, the step is that of Lion."""
    pair = Pair(rank, world_size)

    def measured(step: int) -> None:
        pair.backward(step)
        pair.expect(step)
        with torch.inference_mode():  # as an evaluation may call it; no step could use tensors that are made in it
            pair.sharded.statistics()

    measured(0)
    pair.step("at once")
    measured(1)
    pair.backward(31)
    pair.expect(31)
    pair.step("after another backward")
    measured(2)
    if rank == 0:  # buckets are tiny, so that this backward would wait for the other ranks if it reduced them
        pair.backward(32, ALL)
    for i, p in enumerate(pair.copies):
        assert p.grad is not None
        p.grad += gradient(i, p, 32, 0, world_size) / world_size
    pair.step("after a backward that did not reach all ranks")
    for zero_grad in (pair.sharded.zero_grad, model_of(pair).zero_grad):
        measured(3)
        zero_grad()
        pair.lion.zero_grad()
        if rank == 0:
            pair.backward(33, ALL)
        for i, p in enumerate(pair.copies):
            p.grad = gradient(i, p, 33, 0, world_size) / world_size
        pair.step("after a zeroing")
        measured(4)
        zero_grad()
        pair.lion.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pair.step("without gradients")
    pair.backward(5)
    pair.sharded.clip_grad_norm_(0.01)
    pair.backward(35)
    pair.sharded.statistics()
    with pytest.raises(ValueError, match="changed since clip_grad_norm_"):
        pair.sharded.step()
    pair.sharded.zero_grad()
    measured(6)
    add_group(pair, (500,), requires_grad=False)
    for params in (pair.params, pair.copies):
        params[-1].requires_grad_(True)
    pair.sharded.statistics()
    pair.step("after unfreezing")
    measured(7)
    pair.step("with all of them")
    measured(8)
    pair.sharded.load_state_dict(pair.lion.state_dict())
    pair.sharded.zero_grad()
    pair.lion.zero_grad()
    measured(9)
    pair.step("after a load")
    pair.finish()


def everyone() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def body_arguments(rank: int, world_size: int) -> None:
    """What one rank asks for differently, or cannot do, raises on every rank; and the next call works."""
    for stage in (1, 2):
        pair = Pair(rank, world_size, stage=stage)
        if stage == 2:
            pair.backward(0)
        with pytest.raises(ValueError, match="flips=True"):
            pair.sharded.statistics(flips=rank == 1)
        with pytest.raises((ValueError, RuntimeError), match="by must be"):
            pair.sharded.statistics("layer" if rank == 1 else "group")
        with pytest.raises(ValueError, match="which the norm includes by itself"):
            pair.sharded.statistics(process_groups=[everyone()])
        pair.sharded.offload_state()
        with pytest.raises(RuntimeError, match="after offload_state"):
            pair.sharded.statistics()
        pair.sharded.reload_state()
        assert pair.sharded.statistics()["l2_norm/param/global"] > 0
    # Stages of a pipeline, each with a Lion of its own.
    p = nn.Parameter(torch.full((rank + 1,), 2.0))
    optimizer = Lion([(f"layer{rank}", p)], lr=0.1)
    expected = sum(4 * (r + 1) for r in range(world_size)) ** 0.5
    numbers = optimizer.statistics(process_groups=[everyone()])
    assert numbers["l2_norm/param/group0"] == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match='by="group"'):
        optimizer.statistics("parameter", process_groups=[everyone()])


def bodies(rank: int, world_size: int) -> None:
    for body in (body_same_bits, body_life, body_arguments):
        try:
            body(rank, world_size)
        except Exception as error:
            raise AssertionError(f"{body.__name__}: {error}") from error


def test_no_trace_in_the_step(tmp_path: Path) -> None:
    run_ranks(bodies, 2, tmp_path)
