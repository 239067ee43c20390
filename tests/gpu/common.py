"""Shared parts of the GPU tests: awkward values, tensors between guards, and a Lion with a twin on the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lion_dist import Lion
from lion_dist.update import reference
from lion_dist.update.hypers import hyper_table
from lion_dist.update.reference import NAN_BITS, HyperParameters
from lion_dist.update.segments import TILE
from tests.asserts import assert_same_bits, bits
from tests.harness import run_ranks

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# Ranks share a GPU where there are fewer.
run_on_gpus = partial(run_ranks, share_gpus=True)

GPU = torch.device("cuda", 0)
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

# A whole tile, one off it, one off an alignment of 128 elements, and too few for one 16-byte access.
LENGTHS = (1, 2, 127, 128, 129, TILE - 1, TILE, TILE + 1, 3 * TILE + 5)

# Elements by which p, g and m miss their alignment: only where all three are aligned is the fast path taken.
SHIFTS = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (8, 16, 32), (3, 5, 7), (2, 2, 2))

GUARD = 64  # elements
GUARD_BITS = 0x5A5A


def awkward(n: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Normal draws on the CPU, shape (n,); every fourth or so is something special: NaNs of several
    forms, infinities, zeros of both signs, the largest and smallest finite numbers, denormals."""
    integer, nan = NAN_BITS[dtype]
    exponent = {F32: 0x7F800000, BF16: 0x7F80, F16: 0x7C00}[dtype]
    patterns = [0, 0, 1, 3, exponent - 1, exponent, nan, exponent + 1]  # 1 and 3: denormals; exponent + 1: a NaN
    width = torch.iinfo(integer).bits
    special = torch.tensor([*patterns, *(b - (1 << (width - 1)) for b in patterns)], dtype=integer)
    chosen = special[torch.randint(len(special), (n,), generator=generator)]
    x = torch.randn(n, generator=generator).to(dtype).view(integer)
    return torch.where(torch.rand(n, generator=generator) < 0.25, chosen, x).view(dtype)


class Guarded:
    """A 1-D tensor ``at`` ``shift`` elements off its alignment, with guards before and after it."""

    def __init__(self, values: Tensor, shift: int) -> None:
        self.buffer = torch.empty(2 * GUARD + shift + len(values), dtype=values.dtype, device=GPU)
        self.buffer.view(NAN_BITS[values.dtype][0]).fill_(GUARD_BITS)
        self._start = GUARD + shift
        self.at = self.buffer[self._start : self._start + len(values)]
        self.at.copy_(values)

    def assert_guards_hold(self) -> None:
        outside = bits(torch.cat([self.buffer[: self._start], self.buffer[self._start + len(self.at) :]]))
        assert (outside == GUARD_BITS).all(), "something was written outside the tensor"


def reference_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    groups: Sequence[int],
    hypers: Sequence[HyperParameters],
    grad_scale: float | None = None,
) -> None:
    """The rule in plain torch, tensor by tensor, wherever they are."""
    for p, g, m, group in zip(params, grads, exp_avgs, groups, strict=True):
        if g is None:
            continue
        h = hypers[group]
        row = hyper_table([h], p.device)[0]
        scale = None if grad_scale is None else torch.tensor(grad_scale, device=p.device)
        reference.lion_step_(p, g, m, reference.scalars(row, scale))


class Twins:
    """One model under a Lion on the GPU and, with equal values, under a plain-torch Lion on the CPU.

    Two groups, of the even and the odd tensors. Gradients are made by `new_gradients` and never die
    within a step. ``step_cpu`` takes the hyper-parameters that the GPU's groups hold when it is called.
    """

    def __init__(
        self,
        sizes: Sequence[tuple[int, ...]] = ((300, 7), (1,), (TILE + 3,), (129,)),
        dtype: torch.dtype = F32,
        lr: Any = 1e-3,
        device: torch.device | None = None,
        **options: Any,
    ) -> None:
        self.generator = torch.Generator().manual_seed(2)
        self.cpu_params = [self.draw(size, dtype).requires_grad_() for size in sizes]
        self.params = [p.detach().to(device or GPU, copy=True).requires_grad_() for p in self.cpu_params]
        self.gpu = Lion(self._groups(self.params), lr=lr, **options)
        self.cpu = Lion(self._groups(self.cpu_params), lr=float(lr), use_triton=False, **options)
        self.new_gradients()

    @staticmethod
    def _groups(params: list[Tensor]) -> list[dict[str, Any]]:
        return [{"params": params[::2], "weight_decay": 0.5}, {"params": params[1::2], "weight_decay": 0.0}]

    def draw(self, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(size, generator=self.generator).to(dtype)

    def new_gradients(self, kept: list[Tensor] | None = None) -> None:
        """New values at new addresses. ``kept`` collects the old gradients, which would otherwise be
        freed, and their addresses taken again."""
        if kept is not None:
            kept += [p.grad for p in self.params if p.grad is not None]
        for p, q in zip(self.params, self.cpu_params, strict=True):
            q.grad = self.draw(tuple(q.shape), q.dtype)
            p.grad = q.grad.to(p.device)

    def step_cpu(self) -> None:
        for mine, theirs in zip(self.cpu.param_groups, self.gpu.param_groups, strict=True):
            mine["lr"] = float(theirs["lr"])
        self.cpu.step()

    def step(self) -> None:
        self.gpu.step()
        self.step_cpu()

    def assert_equal(self) -> None:
        for i, (p, q) in enumerate(zip(self.params, self.cpu_params, strict=True)):
            assert_same_bits(p.detach().cpu(), q.detach(), f"parameter {i}")
            assert_same_bits(self.gpu.state[p]["exp_avg"].cpu(), self.cpu.state[q]["exp_avg"], f"momentum {i}")


@contextmanager
def no_host_synchronisation() -> Iterator[None]:
    """Within, an operation that makes the host wait for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def reuse_freed_memory() -> list[Tensor]:
    """Takes device and pinned host memory of the sizes that a step uses, and writes zeros there. (Not
    garbage: read as addresses that would end the process's CUDA context, and zeros are as wrong.)"""
    sizes = [64] * 200 + [4096] * 20  # elements: tables; gradients
    on_device = [torch.zeros(n, dtype=torch.int64, device=GPU) for n in sizes]
    return on_device + [torch.zeros(n, dtype=torch.int64, pin_memory=True) for n in sizes]
