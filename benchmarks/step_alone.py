"""`optimizer.step()` by itself, on one rank's part of a sharded model, with the gradients of that rank's own backward.

Floor: the bytes that any step of these parameters must move (p and m read and written, g read; of DTensors the local
    tensors, under FSDP1 the local views) over the copy bandwidth measured in the same process.
Kept / moved: gradients have the same addresses in every step / are those of two backward passes in turn.
Device time, host time, kernels: see measure.py.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .measure import copy_bandwidth, cycles_a_ms, device_activity, device_ms, freed, host_us, step_bytes

HEADER = ["mode", "elements", "floor ms", "ms, gradients kept / moved", "of the floor", "host us", "kernels", "copies"]


@dataclass
class StepAlone:
    """Medians by case, "kept" and "moved". ``elements``: number of this rank's elements."""

    elements: int
    floor_ms: float
    ms: dict[str, float]
    host_us: dict[str, float]
    kernels: dict[str, int]
    copies: dict[str, int]

    def cells(self) -> list[str]:
        def both(values: dict[str, Any], show: Callable[[Any], str]) -> str:
            return " / ".join(show(values[case]) for case in ("kept", "moved"))

        return [
            f"{self.elements:,}", f"{self.floor_ms:.3f}", both(self.ms, lambda ms: f"{ms:.3f}"),
            both(self.ms, lambda ms: f"{self.floor_ms / ms:.3f}"), both(self.host_us, lambda us: f"{us:.0f}"),
            both(self.kernels, str), both(self.copies, str),
        ]  # fmt: skip


class TwoSets:
    """The gradients of two backward passes, all kept alive.

    Args:
        params: the parameters that the optimizer steps.
        backward: called with the number of the pass, 0 or 1; leaves gradients in ``p.grad``.
    """

    def __init__(self, params: Sequence[Tensor], backward: Callable[[int], object]) -> None:
        self._params = params
        self._sets: list[list[Tensor | None]] = []
        for number in range(2):
            for p in params:
                p.grad = None
            backward(number)
            self._sets.append([p.grad for p in params])
        self._set = 1

    def exchange(self) -> None:
        """Gives every parameter its gradient of the other pass, which has another address."""
        self._set = 1 - self._set
        for p, g in zip(self._params, self._sets[self._set], strict=True):
            p.grad = g


def params_of(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def local_parts(params: Sequence[Any]) -> list[Tensor]:
    return [getattr(p, "_local_tensor", p) for p in params]


def measure_alone(optimizer: Any, gradients: TwoSets, repeats: int) -> StepAlone:
    """Measures an optimizer whose step does not communicate, after its warm-up, on this rank alone."""
    with freed():
        bandwidth = statistics.median(copy_bandwidth(repeats))
    cycles = cycles_a_ms()
    shard = local_parts(params_of(optimizer))
    alone = StepAlone(sum(p.numel() for p in shard), step_bytes(shard) / bandwidth * 1e3, {}, {}, {}, {})
    for case, before in (("kept", lambda: None), ("moved", gradients.exchange)):
        for _ in range(3):  # compile, autotune, and warm the profiler up
            before()
            device_activity(optimizer.step)
        alone.host_us[case] = statistics.median(host_us(optimizer.step, before, repeats))
        (readings,) = device_ms([optimizer.step], before, [alone.host_us[case]], repeats, cycles)
        alone.ms[case] = statistics.median(readings)
        before()
        kernels, alone.copies[case] = device_activity(optimizer.step)
        alone.kernels[case] = len(kernels)
    return alone
