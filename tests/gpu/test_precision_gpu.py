"""Master weights and 8-bit momenta on a GPU: the bits of reference.py on the CPU, in one launch and in two halves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lion_dist import Lion
from lion_dist.update.lion_update import LionUpdate
from lion_dist.update.segments import TILE
from tests.asserts import assert_same_bits
from tests.scenarios.precise_runs import BF16, F32, HYPERS, I8, KINDS, Kind, Runs, Whole

from .common import GPU, needs_gpu

pytestmark = needs_gpu

# Around a block that shares a scale, around what a program steps, and around a tile; several tiles.
LENGTHS = (1, 2, 127, 128, 129, 1023, 1024, 1025, TILE - 1, TILE, TILE + 1, 3 * TILE + 5)
SHIFTS = (
    (0, 0, 0, 0),
    (1, 0, 0, 0),
    (0, 0, 0, 0),
    (0, 3, 0, 0),
    (0, 0, 0, 0),
    (0, 0, 5, 0),
    (0, 0, 0, 1),
    (8, 8, 16, 8),
)
BOTH = Kind(BF16, BF16, I8, True)


@pytest.mark.parametrize("odd", [True, False], ids=["odd gradients", "even gradients"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_mix_gives_the_references_bits(kind: Kind, odd: bool) -> None:
    """Each length meets the aligned path and an unaligned one. One gradient at an odd address is enough for another
    kernel to step all of them."""
    shifts = SHIFTS if odd else [(p, 0, m, r) for p, _, m, r in SHIFTS]
    whole = Whole([kind], [n for n in LENGTHS for _ in range(2)], LionUpdate(None), GPU, shifts)
    for number, (scale, inactive) in enumerate([(None, ()), (0.37, (3, 8)), (1e-38, ()), (-1e30, (1,)), (1.0, ())]):
        whole.step([h._replace(seed=h.seed ^ number) for h in HYPERS], scale, inactive)
        whole.check(f"step {number}")


def test_groups_with_other_columns() -> None:
    kinds = [BOTH, Kind(F32, F32, F32, False), Kind(BF16, F32, BF16, True), Kind(F32, BF16, I8, False)]
    whole = Whole(kinds, LENGTHS, LionUpdate(None), GPU)
    for number in range(3):
        whole.step(HYPERS, inactive=(4,) if number == 1 else ())
        whole.check(f"step {number}")


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_two_halves_give_the_references_bits(kind: Kind) -> None:
    firsts = [128 * (i % 5) for i in range(len(LENGTHS))]
    runs = Runs(kind, firsts, LENGTHS, GPU)
    update = LionUpdate(None)
    for number, agree in enumerate((True, False, True)):
        runs.step(update, None, [h._replace(seed=h.seed ^ number) for h in HYPERS], agree)
        runs.check(f"step {number}")


def test_every_scale_is_that_of_the_cpu() -> None:
    """A scale of each 16-bit significand, many exponents, infinities. The kernel corrects its quotients itself. On a
    GPU torch does not divide by a Python number, but multiplies by its reciprocal."""
    blocks = 1 << 17
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0x7F900000, (blocks,), generator=generator, dtype=torch.int32)
    bits[: 1 << 16] = 0x3F800000 + torch.arange(1 << 16, dtype=torch.int32) * 128
    largest = bits.view(F32)
    g = torch.rand(blocks, 128, generator=generator) * largest[:, None]
    g[:, 5] = largest
    options: dict[str, Any] = {"lr": 1e-3, "betas": (0.0, 0.0), "momentum_dtype": "int8"}
    cpu, *gpu = (torch.zeros_like(g, device=device).requires_grad_() for device in ("cpu", GPU, GPU))
    theirs, *ours = Lion([cpu], **options), Lion([gpu[0]], **options), Lion([gpu[1]], use_triton=False, **options)
    for p in (cpu, *gpu):
        p.grad = g.to(p.device)
    for _ in range(2):  # the second step decodes what the first has left
        for optimizer in (theirs, *ours):
            optimizer.step()
            optimizer.param_groups[0]["betas"] = (0.9, 0.99)
        for p, optimizer, what in zip(gpu, ours, ("Triton", "torch"), strict=True):
            for name, expected in theirs.state[cpu].items():
                assert_same_bits(optimizer.state[p][name].cpu(), expected, f"{what}: {name}")
            assert_same_bits(p.detach().cpu(), cpu.detach(), f"{what}: p")


@pytest.mark.filterwarnings("ignore:lion_dist. lr . weight_decay")
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("master", [False, True])
def test_lion_on_a_gpu_equals_lion_on_the_cpu(dtype: torch.dtype, master: bool) -> None:
    """Whole optimizers, whose steps count for the rounding; some gradients are missing in some steps."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(300, 7), (1,), (TILE + 3,), (129,)]
    cpu = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    gpu = [p.detach().to(GPU, copy=True).requires_grad_() for p in cpu]
    options: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1, "momentum_dtype": "int8", "master_weights": master}
    ours, theirs = Lion(gpu, **options), Lion(cpu, **options)
    for number in range(10):
        for i, (p, q) in enumerate(zip(gpu, cpu, strict=True)):
            g = torch.randn(q.shape, generator=generator).to(dtype)
            q.grad = None if i == number % 5 else g
            p.grad = None if i == number % 5 else g.to(GPU)
        ours.step()
        theirs.step()
    for i, (p, q) in enumerate(zip(gpu, cpu, strict=True)):
        assert_same_bits(p.detach().cpu(), q.detach(), f"parameter {i}")
        assert list(ours.state[p]) == list(theirs.state[q])
        for name, t in theirs.state[q].items():
            assert_same_bits(ours.state[p][name].cpu(), t, f"{name} {i}")
