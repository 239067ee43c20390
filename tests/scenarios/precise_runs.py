"""Tensors with master weights and with 8-bit momenta, which an update steps, and copies, which reference.py steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lion_dist.update import reference
from lion_dist.update.backends import make_batches
from lion_dist.update.backends.batch import SIGNS
from lion_dist.update.codecs import BLOCK, seed_of
from lion_dist.update.hypers import hyper_table
from lion_dist.update.lion_update import LionUpdate
from lion_dist.update.reference import PER_BYTE, STORAGE_DTYPES, EightBits, HyperParameters
from lion_dist.update.segments import Segment, StepTensors
from lion_dist.update.state import EXP_AVG, EXP_AVG_SCALE, REMAINDER
from tests.asserts import assert_same_bits
from tests.scenarios.mixes import awkward

CPU = torch.device("cpu")
F32, BF16, F16, I8 = torch.float32, torch.bfloat16, torch.float16, torch.int8
SALT = 1 << 62 | 12345


class Kind(NamedTuple):
    """Storage dtypes of parameter, gradient and momentum, and whether there are master weights."""

    param: torch.dtype
    grad: torch.dtype
    momentum: torch.dtype
    master: bool

    def __str__(self) -> str:
        names = {F32: "fp32", BF16: "bf16", F16: "fp16", I8: "int8"}
        return "-".join(names[d] for d in self[:3]) + ("-master" if self.master else "")


KINDS = [
    Kind(p, g, m, master)
    for p in STORAGE_DTYPES
    for master in ((False, True) if p == BF16 else (False,))
    for g in STORAGE_DTYPES
    for m in (*STORAGE_DTYPES, I8)
    if master or m == I8
]
# Those whose bits the interpreter has too: it does not round to bfloat16, but split() does not round by conversion.
INTERPRETED = [kind for kind in KINDS if kind.momentum != BF16 and (kind.master or kind.param != BF16)]

# As in scenarios/mixes.py, with seeds; the first maximizes, and one has lr = 0.
HYPERS = [
    HyperParameters(1e-2, 0.0, 0.95, 0.98, True, seed_of(7)),
    HyperParameters(0.25, 0.1, 0.9, 0.99, False, seed_of(0)),
    HyperParameters(0.0, 1.0, 0.9, 0.99, False, seed_of(2)),
    HyperParameters(1.0, 0.5, 0.0, 0.5, False, seed_of(1 << 40)),
    HyperParameters(torch.tensor(0.3), 0.7, 0.5, 0.0, True, seed_of(3)),
]


def scales(n: int, generator: torch.Generator) -> Tensor:
    """Scales of n blocks: none, the smallest, one that suits gradients near 1, and others between 1e-30 and 1e30."""
    draws = 10 ** (torch.rand(n, generator=generator) * 60 - 30)
    draws = (draws.view(torch.int32) & -256).view(torch.float32)
    chosen = torch.randint(0, 8, (n,), generator=generator)
    return torch.where(chosen == 0, 0.0, torch.where(chosen == 1, 2.0**-126, torch.where(chosen < 6, 2.0**-5, draws)))


def gradients(n: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Awkward ones. The largest numbers are in every third block alone: all others beside them get the code 0."""
    g = awkward((n,), dtype, generator)
    large = (g.abs() > 100) & g.isfinite() & (torch.arange(n) // BLOCK % 3 < 2)
    return torch.where(large, torch.randn(n, generator=generator).to(dtype), g)


def codes(n: int, generator: torch.Generator) -> Tensor:
    return torch.randint(-128, 128, (n,), generator=generator).to(I8)


def remainders(n: int, generator: torch.Generator) -> Tensor:
    """Any, and among them the smallest and the largest."""
    r = torch.randint(-(1 << 15), 1 << 15, (n,), generator=generator)
    chosen = torch.randint(0, 16, (n,), generator=generator)
    return torch.where(chosen == 0, -(1 << 15), torch.where(chosen == 1, (1 << 15) - 1, r)).to(torch.int16)


def state_of(kind: Kind, n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The state columns of a parameter of n elements, in the order in which Lion has them."""
    if kind.momentum == I8:
        state = {EXP_AVG: codes(n, generator), EXP_AVG_SCALE: scales(-(-n // BLOCK), generator)}
    else:
        state = {EXP_AVG: awkward((n,), kind.momentum, generator)}
    return {**state, REMAINDER: remainders(n, generator)} if kind.master else state


class Part:
    """1-D tensors that are stepped together, on the CPU, and the reference's step of them."""

    def __init__(self, kind: Kind, n: int, group: int, generator: torch.Generator) -> None:
        self.group = group
        self.param = awkward((n,), kind.param, generator)
        self.state = state_of(kind, n, generator)

    def step(self, g: Tensor, hypers: Sequence[HyperParameters], grad_scale: Tensor | None, first: int = 0) -> None:
        s = reference.scalars(hyper_table(hypers, CPU)[self.group], grad_scale)
        eight = None
        if EXP_AVG_SCALE in self.state:
            eight = EightBits(self.state[EXP_AVG_SCALE], torch.tensor(hypers[self.group].seed), first)
        reference.lion_step_(self.param, g, self.state[EXP_AVG], s, eight, self.state.get(REMAINDER))

    def check(self, param: Tensor, state: dict[str, Tensor], what: str) -> None:
        assert_same_bits(param.cpu(), self.param, f"{what}: parameter")
        assert list(state) == list(self.state), what
        for name, t in self.state.items():
            assert_same_bits(state[name].cpu(), t, f"{what}: {name}")


def shifted(t: Tensor, shift: int, device: torch.device) -> Tensor:
    """A copy that begins ``shift`` elements into a buffer."""
    buffer = torch.zeros(shift + t.numel(), dtype=t.dtype, device=device)
    buffer[shift:] = t
    return buffer[shift:]


class Whole:
    """Whole parameters, under an update and under the reference.

    Args:
        kinds: of the parameters, in turn.
        lengths: of all parameters.
        update: steps those on the device.
        shifts: elements by which parameter, gradient, momentum and remainder miss their alignment, in turn.
    """

    def __init__(
        self, kinds: Sequence[Kind], lengths: Sequence[int], update: LionUpdate, device: torch.device = CPU,
        shifts: Sequence[tuple[int, int, int, int]] = ((0, 0, 0, 0),),
    ) -> None:  # fmt: skip
        self.generator = torch.Generator().manual_seed(0)
        self._update, self._device = update, device
        n = len(lengths)
        self.kinds = [kinds[i % len(kinds)] for i in range(n)]
        self.shifts = [shifts[i % len(shifts)] for i in range(n)]
        groups = [i % len(HYPERS) for i in range(n)]
        self.parts = [Part(*of, self.generator) for of in zip(self.kinds, lengths, groups, strict=True)]
        params = [shifted(part.param, s[0], device) for part, s in zip(self.parts, self.shifts, strict=True)]
        places = {EXP_AVG: 2, REMAINDER: 3}
        state: dict[str, list[Tensor | None]] = {name: [] for name in (EXP_AVG, EXP_AVG_SCALE, REMAINDER)}
        for name, column in state.items():
            for part, s in zip(self.parts, self.shifts, strict=True):
                t = part.state.get(name)
                column.append(None if t is None else shifted(t, s[places[name]] if name in places else 0, device))
        self.tensors = StepTensors(params, [], state, groups, blocks={EXP_AVG_SCALE: BLOCK})

    def step(
        self, hypers: list[HyperParameters], grad_scale: float | None = None, inactive: Sequence[int] = ()
    ) -> None:  # fmt: skip
        """One step. Inactive parameters have a gradient and a flag; the one before each has no gradient."""
        device, scale = self._device, None if grad_scale is None else torch.tensor(grad_scale)
        self.tensors.active = None
        if inactive:
            flags = [i not in inactive for i in range(len(self.parts))]
            self.tensors.active = torch.tensor(flags).to(torch.uint8).to(device)
        grads: list[Tensor | None] = []
        for i, (kind, part, s) in enumerate(zip(self.kinds, self.parts, self.shifts, strict=True)):
            g = gradients(part.param.numel(), kind.grad, self.generator)
            grads.append(None if i + 1 in inactive else shifted(g, s[1], device))
            if i not in inactive and i + 1 not in inactive:
                part.step(g, hypers, scale)
        self.tensors.grads = grads
        prepared = self._update.prepare(self.tensors)
        self._update.step(prepared, hypers, None if scale is None else scale.to(device))

    def check(self, what: str) -> None:
        for i, part in enumerate(self.parts):
            about = f"{what}, entry {i}, {self.kinds[i]}, {part.param.numel()} elements, shifts {self.shifts[i]}"
            part.check(self.tensors.params[i], self.tensors.state_of(i), about)


class Runs:
    """One run of each of several parameters of one kind, whose state but the remainder lies in flat buffers; stepped in
    two halves, with signs between them."""

    def __init__(self, kind: Kind, firsts: Sequence[int], lengths: Sequence[int], device: torch.device = CPU) -> None:
        self.kind, self._device = kind, device
        self.generator = torch.Generator().manual_seed(0)
        groups = [i % len(HYPERS) for i in range(len(firsts))]
        self.parts = [Part(kind, n, group, self.generator) for n, group in zip(lengths, groups, strict=True)]
        self.segments: list[Segment] = []
        at = BLOCK  # something lies before the first
        for i, (first, n) in enumerate(zip(firsts, lengths, strict=True)):
            self.segments.append(Segment(i, first, 3 * i, at, n))
            at += -(-n // BLOCK) * BLOCK
        self.numel = at
        whole = [torch.zeros(s.param_start + s.length + 5, dtype=kind.param, device=device) for s in self.segments]
        self.tensors = StepTensors(whole, [], {}, groups, self.segments, blocks={EXP_AVG_SCALE: BLOCK})
        self.flat = {EXP_AVG: torch.zeros(at, dtype=kind.momentum, device=device)}
        if kind.momentum == I8:
            self.flat[EXP_AVG_SCALE] = torch.zeros(at // BLOCK, device=device)
        self.remainders = [torch.zeros(p.shape, dtype=torch.int16, device=device) for p in whole] if kind.master else []
        for i, part in enumerate(self.parts):
            self.param(i).copy_(part.param)
            for name, t in self.state(i).items():
                t.copy_(part.state[name])
        self.tensors.state = {name: [buffer] * len(whole) for name, buffer in self.flat.items()}
        self.signs = torch.full((at // PER_BYTE,), 0xAA, dtype=torch.uint8, device=device)
        self.checksum = torch.zeros((), dtype=torch.int64, device=device)

    def param(self, i: int) -> Tensor:
        """The run's elements of the parameter."""
        s = self.segments[i]
        return self.tensors.params[i][s.param_start : s.param_start + s.length]

    def state(self, i: int) -> dict[str, Tensor]:
        """The run's elements of the state."""
        s, found = self.segments[i], {}
        for name, buffer in self.flat.items():
            block = BLOCK if name == EXP_AVG_SCALE else 1
            found[name] = buffer[s.state_start // block :][: -(-s.length // block)]
        if self.remainders:
            found[REMAINDER] = self.remainders[i][s.param_start :][: s.length]
        return found

    def step(
        self, update: LionUpdate, use_triton: bool | None, hypers: list[HyperParameters], agree: bool = True
    ) -> None:
        """Both halves. Those of the second know nothing of the momentum."""
        device, grads = self._device, list[Tensor | None]()
        for s, part in zip(self.segments, self.parts, strict=True):
            g = gradients(s.length, self.kind.grad, self.generator)
            before = part.param.clone(), {name: t.clone() for name, t in part.state.items()}
            part.step(g, hypers, None, s.param_start)
            if not agree:
                part.param = before[0]
                part.state |= {name: t for name, t in before[1].items() if name == REMAINDER}
            grads.append(shifted(g, s.grad_start, device))
        # A gradient is a flat buffer, of which the segment is a run.
        self.tensors.grads = [g._base if g is not None and g._base is not None else g for g in grads]
        table = update.pack_signs(update.prepare(self.tensors), hypers, None, SALT, self.signs, self.checksum)
        state: dict[str, list[Tensor | None]] = {SIGNS: [self.signs] * len(grads)}
        if self.remainders:
            state[REMAINDER] = list(self.remainders)
        signed = StepTensors(
            self.tensors.params, [None] * len(grads), state, self.tensors.groups, self.segments,
            blocks={SIGNS: PER_BYTE}, whole=frozenset({REMAINDER}),
        )  # fmt: skip
        dtypes = [self.kind.param] * len(grads)
        for batch in make_batches(signed, self.segments, dtypes, use_triton):
            batch.set_gradients([0] * len(grads))
            batch.apply_signs(None, table, torch.tensor(agree, device=device))

    def check(self, what: str) -> None:
        for i, part in enumerate(self.parts):
            part.check(self.param(i), self.state(i), f"{what}, run {i} of {self.kind}, {part.param.numel()} elements")
        outside = torch.ones(self.numel, dtype=torch.bool)
        for s, p in zip(self.segments, self.tensors.params, strict=True):
            outside[s.state_start : s.state_start + s.length] = False
            assert not p[: s.param_start].any(), f"{what}: written before a run"
            assert not p[s.param_start + s.length :].any(), f"{what}: written behind a run"
        assert not self.flat[EXP_AVG].cpu()[outside].any(), f"{what}: written between the runs of a momentum"
