"""Random training programs on ShardedLion, and the same on `Lion` in each process with the averaged gradients: after
every step all weights and all their state have the same bits.

A failure shows the program, with its seed. To run one again: SEEDS = range(17, 18).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lion_dist import Lion, ShardedLion
from lion_dist.memory_order import laid_out_like
from lion_dist.sharding import shard
from lion_dist.sharding.box_tensor import BoxTensor
from lion_dist.update import reference
from tests.asserts import assert_same_bits
from tests.distributed.programs import Group, Param, Program, write_program
from tests.harness import device_of, run_ranks

SEEDS = range(30)


def kept_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Its groups, with what no load changes."""
    keys = ("params", "momentum_dtype", "master_weights")
    return [{key: group[key] for key in keys} for group in optimizer.param_groups]


def gradient(p: Tensor, i: int, number: int, rank: int, world_size: int) -> Tensor:
    """world_size * k/4 with k in [-1, 1], of parameter i: sums over ranks and passes, and sums of their squares in
    float64, are exact in every order."""
    generator = torch.Generator().manual_seed(1_000_003 * number + 1009 * i + rank)
    k = torch.randint(-1, 2, p.shape, generator=generator)
    return (world_size * k / 4).to(p.device, p.dtype)


class Run:
    """One program on one rank."""

    def __init__(self, program: Program, rank: int, device: torch.device) -> None:
        self.program, self.rank, self.device = program, rank, device
        self.world_size = program.world_size
        self.params: list[nn.Parameter] = []  # of ShardedLion
        self.copies: list[nn.Parameter] = []  # of Lion
        self.sums: dict[int, Tensor] = {}  # averaged gradients since the last zeroing, by parameter; unclipped
        self.scale: Tensor | None = None
        self.ids: list[list[int]] = []
        momentum_dtype = None if program.momentum_dtype is None else getattr(torch, program.momentum_dtype)
        groups = [self.make_group(group) for group in program.groups]
        self.make_sharded = lambda groups: ShardedLion(
            groups, lr=0.1, stage=program.stage, param_sync=program.param_sync, bucket_mb=program.bucket_mb,
            momentum_dtype=momentum_dtype, reduce_dtype=program.reduce_dtype,
        )  # fmt: skip
        self.make_lion = lambda groups: Lion(groups, lr=0.1, momentum_dtype=momentum_dtype)
        self.sharded = self.make_sharded([mine for mine, _ in groups])
        self.lion = self.make_lion([copy for _, copy in groups])

    def make_group(self, group: Group) -> tuple[dict[str, Any], dict[str, Any]]:
        """For ShardedLion and for Lion."""
        new = [self.make_params(p) for p in group.params]
        self.params += [mine for mine, _ in new]
        self.copies += [copy for _, copy in new]
        return {**group.options, "params": [m for m, _ in new]}, {**group.options, "params": [c for _, c in new]}

    def make_params(self, param: Param) -> tuple[nn.Parameter, nn.Parameter]:
        generator = torch.Generator().manual_seed(len(self.params) * 31 + self.program.seed)
        value = torch.randn(param.shape, generator=generator).to(self.device, getattr(torch, param.dtype))
        if value.dim() == 4:
            value = value.contiguous(memory_format=torch.channels_last)
        mine, copy = (nn.Parameter(value.clone(), requires_grad=param.trainable) for _ in range(2))
        return mine, copy

    def run(self) -> None:
        for number, (name, *args) in enumerate(self.program.ops):
            try:
                getattr(self, f"do_{name}")(*args)
            except Exception as error:
                raise AssertionError(f"operation {number}, {(name, *args)}, of\n{self.program}") from error
        self.sharded.check_replicas()
        self.check_full_state()

    # Gradients ----------------------------------------------------------------------------------

    def add(self, number: int, uses: Sequence[Sequence[int]]) -> None:
        """Adds the averages of a pass to the sums."""
        for i in sorted({i for of_rank in uses for i in of_rank}):
            p = self.params[i]
            terms = [gradient(p, i, number, r, self.world_size) for r, of_rank in enumerate(uses) if i in of_rank]
            total = torch.stack(terms).float().sum(0) / self.world_size
            self.sums[i] = (self.sums[i].float() + total if i in self.sums else total).to(p.dtype)

    def backward(self, number: int, how: str, uses: Sequence[Sequence[int]]) -> None:
        """This rank's part of a pass. In stage 1 the step puts what DistributedDataParallel would into p.grad."""
        if self.program.stage == 1 or not uses[self.rank]:
            return
        anchor = torch.zeros((), device=self.device, requires_grad=True)
        terms = []
        for i in uses[self.rank]:
            p = self.params[i]
            g = gradient(p, i, number, self.rank, self.world_size)

            def term(x: Tensor, p: Tensor = p, g: Tensor = g) -> Tensor:
                return x + (p * g).float().sum()

            plain = how == "plain"
            terms.append(term(anchor) if plain else checkpoint(term, anchor, use_reentrant=how == "reentrant"))
        torch.stack(terms).sum().backward()

    def do_pass(self, number: int, how: str, sync: bool, uses: list[list[int]]) -> None:
        with contextlib.nullcontext() if sync else self.sharded.no_sync():
            self.backward(number, how, uses)
        self.add(number, uses)

    def do_hand(self, number: int, i: int) -> None:
        self.params[i].grad = gradient(self.params[i], i, number, self.rank, self.world_size)
        self.add(number, [[i]] * self.world_size)

    def do_zero(self, how: str) -> None:
        if how == "optimizer":
            self.sharded.zero_grad()
        elif how == "zeros":
            self.sharded.zero_grad(set_to_none=False)
        elif how == "model":
            nn.ParameterList(self.params).zero_grad()
        elif how == "p.grad = None":
            for p in self.params:
                p.grad = None
        if how == "zeros":
            self.sums = {i: torch.zeros_like(g) for i, g in self.sums.items()}
        elif how != "nothing":
            self.sums = {}
        if how != "nothing":
            self.scale = None

    def do_freeze(self, i: int) -> None:
        for params in (self.params, self.copies):
            params[i].requires_grad_(False)

    def do_unfreeze(self, i: int) -> None:
        for params in (self.params, self.copies):
            params[i].requires_grad_(True)

    # Steps --------------------------------------------------------------------------------------

    def hand_over(self) -> None:
        """Gradients to Lion, and to ShardedLion in stage 1."""
        for i, (p, copy) in enumerate(zip(self.params, self.copies, strict=True)):
            copy.grad = laid_out_like(self.sums[i].clone(), copy) if i in self.sums else None
            if self.program.stage == 1:
                p.grad = None if copy.grad is None else copy.grad.clone()

    def do_clip(self, factor: float) -> None:
        self.hand_over()
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        total = torch.stack([zero, *map(reference.sum_of_squares, self.sums.values())]).sum()
        max_norm = factor * (total.sqrt().item() + 1e-6)
        norm, self.scale = reference.clip_coefficient(total, max_norm)
        assert_same_bits(self.sharded.clip_grad_norm_(max_norm), norm, "norm")

    def do_step(self) -> None:
        if self.scale is None:
            self.hand_over()
        else:  # ShardedLion in stage 1 has its gradients since the clipping
            for copy in self.copies:
                if copy.grad is not None:
                    copy.grad.mul_(self.scale)
        for optimizer in (self.sharded, self.lion):
            optimizer.step()
        self.scale = None
        self.check()

    def check(self) -> None:
        for i, (p, copy) in enumerate(zip(self.params, self.copies, strict=True)):
            assert_same_bits(p, copy, f"parameter {i}")
        for i, (p, copy) in enumerate(zip(self.params, self.copies, strict=True)):
            if p not in self.sharded.state:
                assert not any(t.any() for t in self.lion.state.get(copy, {}).values())
                continue
            for name, held in self.sharded.state[p].items():
                whole = self.lion.state[copy][name] if copy in self.lion.state else torch.zeros_like(held)
                if not isinstance(held, BoxTensor):
                    assert_same_bits(held, whole, f"{name} of parameter {i}")
                    continue
                for box, part in zip(held.boxes, held.parts, strict=True):
                    if isinstance(whole, BoxTensor):
                        assert not part.any()
                    else:
                        assert_same_bits(part, whole[box.slices()], f"{name} of parameter {i}")

    def check_full_state(self) -> dict[str, Any]:
        state, of_lion = self.sharded.full_state_dict(), self.lion.state_dict()["state"]
        for i in range(len(self.copies)):
            expected, got = of_lion.get(i, {}), state["state"].get(i, {})
            if not (got and expected):  # one of them makes state of zeros later than the other; their scales are 1
                assert not any(t.any() for name, t in (*got.items(), *expected.items()) if name != "exp_avg_scale")
                continue
            assert got.keys() == expected.keys()
            for name, t in expected.items():
                assert_same_bits(got[name], t.cpu(), f"{name} of parameter {i}, gathered")
        return state

    def do_lr(self, group: int, lr: float) -> None:
        for optimizer in (self.sharded, self.lion):
            optimizer.param_groups[group]["lr"] = lr

    # Other calls --------------------------------------------------------------------------------

    def do_add(self, group: Group) -> None:
        mine, copy = self.make_group(group)
        self.sharded.add_param_group(mine)
        self.lion.add_param_group(copy)

    def do_reload(self, how: str) -> None:
        if how == "itself, sharded":
            self.sharded.load_state_dict(self.sharded.state_dict())
            return
        state = self.lion.state_dict() if how.endswith("Lion") else self.check_full_state()
        if how.startswith("new"):
            self.sharded, self.lion = self.make_sharded(kept_of(self.sharded)), self.make_lion(kept_of(self.lion))
            self.lion.load_state_dict(state)
        self.sharded.load_state_dict(state)

    def do_check(self) -> None:
        self.sharded.check_replicas()

    def do_error(self, kind: str, number: int, uses: list[list[int]]) -> None:
        before = [p.detach().clone() for p in self.params]

        def passes() -> None:
            self.backward(number, "plain", uses)
            if self.program.stage == 1:
                for p in self.params:
                    p.grad = torch.zeros_like(p)

        passes()
        call: Callable[[], object] = self.sharded.step
        error: type[Exception] = RuntimeError
        if kind == "clip to 0":
            error, call = ValueError, lambda: self.sharded.clip_grad_norm_(0.0)
        elif kind == "pass after clip":
            error = ValueError
            self.sharded.clip_grad_norm_(1.0)
            passes()
        elif kind == "hand":
            p = self.params[uses[self.rank][-1]]
            p.grad = torch.ones_like(p)
        elif kind == "model to zeros":
            nn.ParameterList(self.params).zero_grad(set_to_none=False)
        elif kind == "torch clip":
            torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        with pytest.raises(error, match=r"max_norm|clip_grad_norm_|reduced"):
            call()
        for p, value in zip(self.params, before, strict=True):
            assert_same_bits(p, value, "refused")
        self.do_zero("optimizer")


def body_programs(rank: int, world_size: int, seeds: Sequence[int]) -> None:
    warnings.simplefilter("ignore")  # of decay that is rounded away
    device = device_of(rank, world_size)
    for seed in seeds:
        program = write_program(seed, world_size)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shard, "SHARD_NUMEL", program.shard_numel)
            Run(program, rank, device).run()


@pytest.mark.parametrize("world_size", [2, 3])
def test_random_programs(world_size: int, tmp_path: Path) -> None:
    run_ranks(body_programs, world_size, tmp_path, ([*SEEDS, 1356],), on_cpu=True)  # 1356: a sentinel unfrozen


@pytest.mark.exhaustive
@pytest.mark.parametrize("first", range(0, 1500, 250))
@pytest.mark.parametrize("world_size", [2, 3])
def test_many_random_programs(world_size: int, first: int, tmp_path: Path) -> None:
    run_ranks(body_programs, world_size, tmp_path, (range(first, first + 250),), deadline=1800, on_cpu=True)
