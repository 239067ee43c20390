"""The models that benchmarks.step measures the step on, and all readings of one contestant on one of them."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lion_dist import Lion

from .measure import DEVICE, Step, device_activity, device_ms, extra_memory, host_us, step_bytes
from .peer_steps import BETAS, DECAY, LR, Group

MODES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Shape(NamedTuple):
    size: tuple[int, ...]
    decays: bool


def llama_shapes(vocab: int = 128256, hidden: int = 2048, kv: int = 512, inner: int = 8192, layers: int = 16) -> list:
    """Shapes of the tied embedding, of nine tensors for each layer, and of the last norm."""
    matrices = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
    matrices += [(inner, hidden), (inner, hidden), (hidden, inner)]
    layer = [Shape(size, True) for size in matrices] + [Shape((hidden,), False)] * 2
    return [Shape((vocab, hidden), True), *layer * layers, Shape((hidden,), False)]


class Model:
    """Parameters in two groups, and two sets of gradients for them.

    Args:
        decays: for each parameter, whether its weight decays.
    """

    def __init__(self, params: Sequence[Tensor], grads: Sequence[Sequence[Tensor]], decays: Sequence[bool]) -> None:
        self.params, self.grads = list(params), grads
        decaying = [p for p, d in zip(params, decays, strict=True) if d]
        others = [p for p, d in zip(params, decays, strict=True) if not d]
        self._groups = [(decaying, DECAY), (others, 0.0)]
        self._set = 0
        self.move_gradients()

    @classmethod
    def random(cls, shapes: Sequence[Shape], dtype: torch.dtype) -> Model:
        def new(std: float) -> list[Tensor]:
            return [torch.empty(s.size, dtype=dtype, device=DEVICE).normal_(std=std) for s in shapes]

        params = [p.requires_grad_() for p in new(0.02)]
        return cls(params, [new(1e-3), new(1e-3)], [s.decays for s in shapes])

    def groups(self) -> list[Group]:
        return [{"params": list(params), "weight_decay": decay} for params, decay in self._groups if params]

    def move_gradients(self) -> None:
        """Gives every parameter its gradient of the other set, which has another address."""
        self._set = 1 - self._set
        for p, g in zip(self.params, self.grads[self._set], strict=True):
            p.grad = g

    @property
    def step_bytes(self) -> int:
        return step_bytes(self.params)


def make_ours(groups: list[Group]) -> Step:
    return Lion(groups, lr=LR, betas=BETAS).step


@dataclass
class Reading:
    """Readings of one contestant on one model, by case ("kept", "moved"): lists have a value for each step."""

    device_ms: dict[str, list[float]] = field(default_factory=dict)
    host_us: dict[str, list[float]] = field(default_factory=dict)
    kernels: dict[str, dict[str, int]] = field(default_factory=dict)  # number of launches by kernel name
    copies: dict[str, int] = field(default_factory=dict)
    extra_bytes: dict[str, int] = field(default_factory=dict)
    ours_device_ms: dict[str, list[float]] = field(default_factory=dict)  # of ours, in turn with this contestant


def measure(step: Step, model: Model, ours: Step | None, repeats: int, cycles: float) -> Reading:
    """All readings of one step. Where ``ours`` is given, its device times are taken in turn with the step's."""
    reading = Reading()
    for _ in range(3):  # compile, autotune and make the state
        model.move_gradients()
        step()
        if ours is not None:
            ours()
    for case, before in (("kept", lambda: None), ("moved", model.move_gradients)):
        reading.host_us[case] = host_us(step, before, repeats)
        steps, leads = [step], [statistics.median(reading.host_us[case])]
        if ours is not None:
            steps.append(ours)
            leads.append(statistics.median(host_us(ours, before, 5)))
        reading.device_ms[case], *rest = device_ms(steps, before, leads, repeats, cycles)
        if rest:
            reading.ours_device_ms[case] = rest[0]
        before()
        kernels, reading.copies[case] = device_activity(step)
        reading.kernels[case] = dict(Counter(kernels))
        before()
        reading.extra_bytes[case] = extra_memory(step)
    return reading
