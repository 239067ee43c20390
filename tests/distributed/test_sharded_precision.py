"""ShardedLion with master weights and with 8-bit momenta: the same bits as one process, in every mode, on any number of
ranks."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lion_dist import ShardedLion
from lion_dist.sharding.box_tensor import BoxTensor
from lion_dist.update import codecs
from lion_dist.update.state import EXP_AVG, EXP_AVG_SCALE, REMAINDER
from tests.asserts import assert_same_bits
from tests.harness import device_of, run_ranks
from tests.marks import needs_interpreter
from tests.scenarios.modes import Modes, sizes, values

F32, BF16, INT8 = torch.float32, torch.bfloat16, torch.int8
MASTERS: dict[str, Any] = {"master_weights": True}
EIGHT: dict[str, Any] = {"momentum_dtype": "int8"}


def two_groups(count: int) -> list[dict[str, Any]]:
    return [
        {"params": list(range(0, count, 2)), "weight_decay": 0.1},
        {"params": list(range(1, count, 2)), "lr": 3e-4, "weight_decay": 1.0, "betas": (0.95, 0.98), "maximize": True},
    ]


# Master weights -------------------------------------------------------------------------------------


def check_against_twins(modes: Modes, what: str) -> None:
    """Weights are the float32 twins' rounded, halves away from zero, and with their remainders they are the twins."""
    for mode in modes.modes:
        state = mode.whole_state()
        for i, (p, twin) in enumerate(zip(mode.params, modes.params, strict=True)):
            who = f"{what}, {mode}: parameter {i}"
            high, low = codecs.split(twin.detach())
            remainder = state[i][REMAINDER].to(p.device)
            assert_same_bits(p.detach(), high, who)
            assert_same_bits(remainder, low, f"{who}, remainder")
            assert_same_bits(codecs.join(p.detach(), remainder), twin.detach(), f"{who}, joined")
            unlike_torchs = p.detach() != twin.detach().bfloat16()  # which rounds ties to even
            assert (unlike_torchs <= ((low == -(2**15)) | twin.isnan())).all()
            assert_same_bits(state[i][EXP_AVG], modes.lion.state[twin][EXP_AVG].cpu(), f"{who}, momentum")


def body_masters(rank: int, world_size: int, steps: int) -> None:
    warnings.simplefilter("ignore")  # of decay that is rounded away
    weights = values(sizes(world_size), BF16, device_of(rank, world_size))
    modes = Modes(rank, world_size, weights, two_groups(len(weights)), {"momentum_dtype": BF16}, **MASTERS)
    for step in range(steps):
        modes.step(step, max_norm=0.5 if step % 3 == 1 else None, hostile=step % 9 == 0)
        if step % 20 == 0:
            check_against_twins(modes, f"step {step}")
    check_against_twins(modes, "at the end")
    for mode in modes.modes:
        mode.optimizer.check_replicas()
        big = mode.params[-1].detach()
        assert 0 < big.isnan().float().mean() < 0.5
        assert (mode.whole_state()[-1][REMAINDER] != 0).float().mean() > 0.5


@pytest.mark.parametrize(
    ("world_size", "steps"),
    [(2, 10), (3, 10), *(pytest.param(n, 200, marks=pytest.mark.exhaustive) for n in (2, 3, 4))],
)
def test_master_weights_are_those_of_float32(world_size: int, steps: int, tmp_path: Path) -> None:
    run_ranks(body_masters, world_size, tmp_path, (steps,))


# 8-bit momenta --------------------------------------------------------------------------------------


def body_eight_bits(rank: int, world_size: int) -> None:
    warnings.simplefilter("ignore")
    for dtype, options in ((F32, EIGHT), (BF16, EIGHT), (BF16, {**EIGHT, **MASTERS})):
        weights = values(sizes(world_size), dtype, device_of(rank, world_size))
        modes = Modes(rank, world_size, weights, two_groups(len(weights)), **options)
        for step in range(5):
            modes.step(step, hostile=step == 3)
        modes.check(f"{dtype}, {options}")
        for mode in modes.modes:
            state = mode.optimizer.state[mode.params[-1]]
            assert (state[EXP_AVG].dtype, state[EXP_AVG_SCALE].shape) == (INT8, (11,))
            mode.optimizer.check_replicas()


@pytest.mark.parametrize("world_size", [1, 2, 3, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_eight_bits_do_not_depend_on_the_ranks(world_size: int, tmp_path: Path) -> None:
    run_ranks(body_eight_bits, world_size, tmp_path)


def body_kernels(rank: int, world_size: int) -> None:
    warnings.simplefilter("ignore")
    shapes: list[tuple[int, ...]] = [(1,), (389,), (2, 9, 5, 3), (0, 3)]
    # Triton's interpreter does not round to bfloat16 as hardware does; master weights are split as integers.
    with_float32 = {**MASTERS, "momentum_dtype": F32}
    for dtype, options in ((F32, EIGHT), (BF16, with_float32), (BF16, {**EIGHT, **MASTERS})):
        weights = values(shapes, dtype, device_of(rank, world_size))
        modes = Modes(rank, world_size, weights, two_groups(len(weights)), use_triton=False, **options)
        modes.modes = [modes.fresh(2, sync, weights, use_triton=True) for sync in ("params", "signs")]
        for step in range(2):
            modes.step(step, hostile=step == 1)
        modes.check(f"kernels, {options}")


@needs_interpreter
def test_kernels(tmp_path: Path) -> None:
    run_ranks(body_kernels, 2, tmp_path)


def digest_body(rank: int, world_size: int) -> list[Tensor]:
    """Weights and state after steps by one and the same gradient on any number of ranks; at two steps it is clipped,
    and once it has a NaN."""
    found = []
    for dtype, options in ((F32, EIGHT), (BF16, {**EIGHT, **MASTERS})):
        (weight,) = values([(4 * 3 * 128 * 2 + 300,)], dtype, device_of(rank, world_size))
        p = nn.Parameter(weight)
        optimizer = ShardedLion([p], lr=0.01, param_sync="signs", **options)
        for step in range(5):
            generator = torch.Generator().manual_seed(step)
            # A rank's part of the sum, such that the sum is exact: 12 times these over the number of ranks.
            k = torch.randint(-8, 9, p.shape, generator=generator).to(p.device, dtype) * 12.0
            if step == 2 and rank == 0:
                k[1500] = torch.nan
            (p * k).sum().backward()
            if step in (1, 4):
                assert optimizer.clip_grad_norm_(0.7) > 0.7
            optimizer.step()
            optimizer.zero_grad()
        found += [p.detach().cpu(), *optimizer.full_state_dict()["state"][0].values()]
    return found


def test_runs_on_one_to_four_ranks_have_the_same_codes(tmp_path: Path) -> None:
    first, *others = [run_ranks(digest_body, world_size, tmp_path)[0] for world_size in (1, 2, 3, 4)]
    weight, codes, _, rounded, codes_of_rounded, _, remainder = first
    for p, m in ((weight, codes), (rounded, codes_of_rounded)):
        assert p.isnan().nonzero().tolist() == (m == -128).nonzero().tolist() == [[1500]]
        assert m.unique().numel() > 20
    assert (remainder != 0).float().mean() > 0.5
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert_same_bits(b, a)


# Groups that differ, and that change -----------------------------------------------------------------


def body_mixed(rank: int, world_size: int) -> None:
    """A group with both, one with neither in float32; a parameter is unfrozen, a group added."""
    warnings.simplefilter("ignore")
    device = device_of(rank, world_size)
    shapes = [(world_size * 128 + 5,), (3, 9, 5, 7), (40, 33), (3, 7), (300,)]
    weights = [v.to(F32 if i == 2 else BF16) for i, v in enumerate(values(shapes, F32, device))]
    groups = [{"params": [0, 1], **MASTERS, **EIGHT, "weight_decay": 0.1}, {"params": [2]}]
    modes = Modes(rank, world_size, weights, groups)
    # Parameter 3 is frozen when a group with master weights alone is added, and 4 is without them.
    for late in (3, 4):
        for params in (modes.params, *(mode.params for mode in modes.modes)):
            params[late].requires_grad_(False)
    for step in range(9):
        if step in (2, 3):
            options = MASTERS if step == 2 else EIGHT
            modes.lion.add_param_group({"params": [modes.params[step + 1]], **options})
            for mode in modes.modes:
                mode.optimizer.add_param_group({"params": [mode.params[step + 1]], **options})
        if step in (4, 5):
            for params in (modes.params, *(mode.params for mode in modes.modes)):
                params[step - 1].requires_grad_(True)
            if step == 5:
                modes.lion.init_state()
                for mode in modes.modes:
                    mode.optimizer.init_state()
        modes.step(step)
        modes.check(f"step {step}")
    for mode in modes.modes:
        names = [list(mode.optimizer.state[p]) for p in mode.params]
        eight = [EXP_AVG, EXP_AVG_SCALE]
        assert names == [[*eight, REMAINDER], [*eight, REMAINDER], [EXP_AVG], [EXP_AVG, REMAINDER], eight]
        held = mode.optimizer.state[mode.params[3]][REMAINDER]
        assert isinstance(held, BoxTensor) == (mode.sync == "params")
        if mode.sync == "signs":
            kernel = mode.params[1]
            assert not kernel.is_contiguous()
            assert (type(held), held.shape, held.stride()) == (Tensor, (3, 7), (7, 1))
            assert mode.optimizer.state[kernel][REMAINDER].stride() == kernel.stride()


def test_groups_that_differ(tmp_path: Path) -> None:
    run_ranks(body_mixed, 2, tmp_path)


def body_choices(rank: int, world_size: int, log: Path) -> None:
    """What "auto" chooses, with its reason, and which parameters cannot have master weights."""
    device = device_of(rank, world_size)
    logger = logging.getLogger("lion_dist")
    handler = logging.FileHandler(log / str(rank))
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    plain, master = (nn.Parameter(torch.ones(300, dtype=BF16, device=device)) for _ in range(2))
    optimizer = ShardedLion([{"params": [plain]}, {"params": [master], **MASTERS}])
    assert isinstance(optimizer.state[master][REMAINDER], BoxTensor)
    expected = 'param_sync: params, as "signs" would keep the remainders of master weights whole on every rank'
    assert (log / str(rank)).read_text().splitlines() == [expected]
    ShardedLion([plain])
    assert "param_sync: signs" in (log / str(rank)).read_text()
    logger.removeHandler(handler)

    with_gaps = torch.full((5, 2), float(rank), dtype=torch.float16, device=device)[:, 0]
    frozen = nn.Parameter(with_gaps, requires_grad=False)  # so it is not made equal until it is unfrozen
    optimizer = ShardedLion([plain, frozen], **MASTERS)
    frozen.data = with_gaps.contiguous()
    frozen.requires_grad_(True)
    with pytest.raises(TypeError, match=r"shape \(5,\) is torch.float16; expected bfloat16"):
        optimizer.init_state()
    assert list(optimizer.state) == [plain]
    assert (frozen == rank).all()  # nothing has been changed
    with pytest.raises(TypeError, match="float16; expected bfloat16"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3, dtype=torch.float16, device=device))]})
    frozen.requires_grad_(False)
    plain.grad = None
    (plain.float() * 2).sum().backward()
    optimizer.step()
    assert len(optimizer.param_groups) == 1
    moved = plain.detach().clone()
    (group,) = optimizer.param_groups
    for key, value in (("momentum_dtype", "int8"), ("master_weights", False)):
        before, group[key] = group[key], value
        (plain.float() * 2).sum().backward()
        with pytest.raises(ValueError, match=r"momentum_dtype or master_weights .* was changed .* exp_avg, remainder"):
            optimizer.step()
        group[key] = before
        optimizer.zero_grad()
    assert_same_bits(plain.detach(), moved)
    optimizer.step()  # without gradients, and with the groups as they were
    assert (plain.detach() == codecs.split(torch.full_like(plain, 1 - 1e-4, dtype=F32))[0]).all()


def test_choices_and_refusals(tmp_path: Path) -> None:
    run_ranks(body_choices, 2, tmp_path, (tmp_path,))
