"""Stage 2 against stage 1 and against Lion on the averaged gradient: the same bits, whatever becomes of a gradient
on its way.

A *scenario* is what every rank does in a step: backward passes over parameters (which differ from rank to rank),
synchronised or not, in an order of its own. Coefficients are world_size times small dyadic numbers, so that sums
are exact in bfloat16 too, and every rank can work out the average without communication.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from lion_dist import Lion, ShardedLion
from lion_dist.sharding import shard
from tests.asserts import assert_same_model, assert_same_momentum
from tests.harness import device_of, run_ranks
from tests.scenarios.passes import TRAINABLE, Pass, Scenario, Step, averages, backward, some, subsets
from tests.scenarios.toy import FP32, SHAPES, Toy

BF16 = (torch.bfloat16,)
STEPS, MORE_STEPS = 5, 12
# Bytes a bucket: everything in one; a few parameters; every parameter in a bucket of its own.
ONE, FEW, TINY = 64.0, 30_000 / 2**20, 1 / 2**20


def plain(step: int, rank: int) -> Step:
    return Step([Pass(TRAINABLE)])


def backwards_on_odd_ranks(step: int, rank: int) -> Step:
    return Step([Pass(TRAINABLE[::-1] if rank % 2 else TRAINABLE)])


def used_several_times(step: int, rank: int) -> Step:
    return Step([Pass(some(step, rank) + some(step, rank, 1) + some(step, rank, 2))])


def unsynced(step: int, rank: int) -> Step:
    """Parameters used in an unsynchronised micro-step only among them."""
    return Step([Pass(some(step, rank), sync=False), Pass(some(step, rank, 1), sync=False), Pass(some(step, rank, 2))])


def only_unsynced(step: int, rank: int) -> Step:
    return Step([Pass(some(step, rank), sync=False)])


def unsynced_after(step: int, rank: int) -> Step:
    return Step([Pass(some(step, rank)), Pass(some(step, rank, 1), sync=False)])


def several_backwards(step: int, rank: int) -> Step:
    return Step([Pass(some(step, rank, salt)) for salt in range(1 + step % 3)])


def checkpointed(step: int, rank: int) -> Step:
    return Step([Pass(some(step, rank), checkpointed=False)])


def reentrant(step: int, rank: int) -> Step:
    """Hooks fire once for every checkpoint that a parameter is used in."""
    uses = some(step, rank) + some(step, rank, 1) + (TRAINABLE if step % 4 == 0 else [])
    return Step([Pass(uses, checkpointed=True)])


def reentrant_later(step: int, rank: int) -> Step:
    """The ranks compare in the first step, which does not show it."""
    return reentrant(step, rank) if step > 2 else plain(step, rank)


def idle_ranks(step: int, rank: int) -> Step:
    """Some ranks without any backward, and some steps in which no rank has one."""
    return Step([Pass(some(step, rank))] if (step + rank) % 2 and step % 3 else [])


def abandoned(step: int, rank: int) -> Step:
    zeroed_by = ("optimizer", "model")[step % 2]
    return Step([Pass(some(step, rank))], [Pass(some(step, rank, 1))] if step % 3 else [], zeroed_by)


def abandoned_unsynced(step: int, rank: int) -> Step:
    return Step([Pass(some(step, rank))], [Pass(some(step, rank, 1), sync=False), Pass(some(step, rank, 2))], "model")


def zeroed_to_zeros(step: int, rank: int) -> Step:
    return Step([Pass(some(step, rank))], set_to_none=step % 3 == 0)


SCENARIOS: list[tuple[Scenario, float]] = [
    (plain, FEW), (subsets, TINY), (subsets, ONE), (backwards_on_odd_ranks, TINY), (used_several_times, FEW),
    (unsynced, FEW), (only_unsynced, FEW), (unsynced_after, TINY), (several_backwards, FEW), (checkpointed, FEW),
    (reentrant, TINY), (reentrant_later, FEW), (idle_ranks, FEW), (abandoned, TINY), (abandoned_unsynced, FEW),
    (zeroed_to_zeros, FEW),
]  # fmt: skip


DTYPES = {"fp32": FP32, "bf16": BF16}
DEFAULT = [("fp32", 1), ("fp32", 4), ("bf16", 2), ("bf16", 3)]
IN_16_BITS = [("fp32", 2)]


def body_scenarios(
    rank: int, world_size: int, dtypes: tuple[torch.dtype, ...], steps: int, reduce_dtype: torch.dtype | None
) -> None:
    for number, (scenario, bucket_mb) in enumerate(SCENARIOS):
        with pytest.MonkeyPatch.context() as patch:
            if number % 2:
                patch.setattr(shard, "SHARD_NUMEL", 2000)  # several parts, one of them a single parameter
            try:
                run_scenario(rank, world_size, dtypes, scenario, bucket_mb, steps, reduce_dtype)
            except Exception as error:
                raise AssertionError(f"scenario {scenario.__name__}, bucket_mb={bucket_mb}") from error


def run_scenario(
    rank: int,
    world_size: int,
    dtypes: tuple,
    scenario: Scenario,
    bucket_mb: float,
    steps: int,
    reduce_dtype: torch.dtype | None,
) -> None:
    device = device_of(rank, world_size)
    models = [Toy(100, dtypes, device) for _ in range(3)]
    two = ShardedLion(models[0].groups(), lr=0.01, bucket_mb=bucket_mb, reduce_dtype=reduce_dtype)
    one = ShardedLion(models[1].groups(), lr=0.01, stage=1, param_sync="params")
    lion = Lion(models[2].groups(), lr=0.01)
    optimizers: tuple[torch.optim.Optimizer, ...] = (two, one, lion)
    for step in range(steps):
        mine = scenario(step, rank)
        for number, a_pass in enumerate(mine.abandoned):
            with nullcontext() if a_pass.sync else two.no_sync():
                backward(models[0], a_pass, f"lost{number}", step, rank, world_size)
        if mine.abandoned:
            (two if mine.zeroed_by == "optimizer" else models[0]).zero_grad()
        for number, a_pass in enumerate(mine.passes):
            with nullcontext() if a_pass.sync else two.no_sync():
                backward(models[0], a_pass, f"pass{number}", step, rank, world_size)
        expected = averages(models[1], scenario, step, world_size)
        for model in models[1:]:
            for name in SHAPES:
                p = getattr(model, name)
                g = expected.get(name)
                p.grad = g if g is not None else p.grad
        for optimizer in optimizers:
            optimizer.step()
        assert_same_model(models[0], models[1])
        assert_same_model(models[0], models[2])
        for i, optimizer in enumerate(optimizers):
            zeroes = optimizer if mine.zeroed_by == "optimizer" else models[i]
            zeroes.zero_grad(set_to_none=mine.set_to_none)
    assert_same_momentum(two.full_state_dict(), lion)
    assert_same_momentum(one.full_state_dict(), lion)


@pytest.mark.parametrize(
    ("dtypes", "world_size", "steps", "reduce_dtype"),
    [
        # Each number of ranks in one dtype, and each dtype on two of them or more.
        *(pytest.param(DTYPES[name], ranks, STEPS, None, id=f"{name}-{ranks}") for name, ranks in DEFAULT),
        *(
            pytest.param(DTYPES[name], ranks, STEPS, torch.bfloat16, id=f"{name}-{ranks}-reduced-in-bf16")
            for name, ranks in IN_16_BITS
        ),
        *(
            pytest.param(
                dtypes, ranks, MORE_STEPS, reduce_dtype, marks=pytest.mark.exhaustive,
                id=f"{name}-{ranks}-more-steps{'-reduced-in-bf16' if reduce_dtype else ''}",
            )
            for name, dtypes in DTYPES.items()
            for ranks in (1, 2, 3, 4)
            for reduce_dtype in (None, torch.bfloat16)
        ),
    ],
)  # fmt: skip
def test_every_scenario(
    world_size: int, dtypes: tuple, steps: int, reduce_dtype: torch.dtype | None, tmp_path: Path
) -> None:
    run_ranks(body_scenarios, world_size, tmp_path, (dtypes, steps, reduce_dtype))
