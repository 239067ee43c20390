"""A step in two halves gives the bits of the step in one: the 2-bit code, the rule's halves, and `SignUpdate` on
several simulated ranks, with plain torch and in Triton's interpreter.

Under the interpreter a fused `LionUpdate` is what is compared with: both halves store bfloat16 by the same
truncation (facts.md), so bfloat16 parameters and momenta can be compared here too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lion_dist.memory_order import flat
from lion_dist.sharding.exchange import FOOTER
from lion_dist.sharding.layout import ShardLayout
from lion_dist.update import reference
from lion_dist.update.backends import cpu
from lion_dist.update.hypers import hyper_table
from lion_dist.update.lion_update import LionUpdate
from lion_dist.update.reference import HyperParameters, pack_signs
from lion_dist.update.segments import Segment, StepTensors
from lion_dist.update.state import EXP_AVG
from tests.asserts import assert_canonical_nan, assert_same_bits, bits
from tests.scenarios.exchanged_signs import ExchangedSigns
from tests.scenarios.mixes import HYPERS, MIXES, Mix, awkward, both, name, on_triton, squares_by, step_by

# NumPy, under the interpreter, warns of inf - inf, inf * 0 and what float16 cannot hold: all of it on purpose here.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")

CPU = torch.device("cpu")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NAN, INF = math.nan, math.inf
SALT = 1 << 62 | 12345
FEW_MIXES: list[Mix] = [(F32, F32, F32), (BF16, BF16, BF16), (F16, F16, F32), (F32, BF16, F16), (BF16, F32, F32)]


class Ranks:
    """Replicas of parameters, on each simulated rank its shard of the momentum and a SignUpdate; and the whole
    parameters and momenta that a LionUpdate steps, which they must equal."""

    def __init__(self, mix: Mix, sizes: Sequence[int], world_size: int, use_triton: bool, stage: int = 2) -> None:
        self.mix, self.stage, self.world_size = mix, stage, world_size
        self.generator = torch.Generator().manual_seed(0)
        self.layout = layout = ShardLayout.make(sizes, world_size)
        self.groups = [i % len(HYPERS) for i in range(len(sizes))]
        self.whole, self.whole_exp_avgs = ([self.draw(n, dtype) for n in sizes] for dtype in (mix[0], mix[2]))
        self.lion = LionUpdate(use_triton)
        self.replicas = [[p.clone() for p in self.whole] for _ in range(world_size)]
        # Padding that nothing may write.
        self.shards = [torch.full((layout.shard_numel,), 77.0, dtype=mix[2]) for _ in range(world_size)]
        slices = [[(s.param, s.start, s.offset, s.length) for s in layout.slices(r)] for r in range(world_size)]
        for r, shard in enumerate(self.shards):
            self.cut(self.whole_exp_avgs, r, shard)
        self.updates = [
            ExchangedSigns(LionUpdate(use_triton), layout.shard_numel, r, slices, CPU) for r in range(world_size)
        ]

    def draw(self, n: int, dtype: torch.dtype) -> Tensor:
        return awkward((n,), dtype, self.generator)

    def cut(self, whole: Sequence[Tensor], rank: int, into: Tensor) -> Tensor:
        for s in self.layout.slices(rank):
            into[s.offset : s.offset + s.length] = whole[s.param][s.start : s.start + s.length]
        return into

    def columns(self, rank: int, grads: Sequence[Tensor | None], active: Tensor | None) -> StepTensors:
        params, shard = self.replicas[rank], self.shards[rank]
        mine: list[Tensor | None] = list(grads)
        if self.stage == 2:  # a flat buffer of averages, laid out as the momentum, and garbage for who is not active
            absent = [torch.full_like(p, NAN).to(self.mix[1]) for p in params]
            present = [a if g is None else g for a, g in zip(absent, grads, strict=True)]
            mine = [self.cut(present, rank, torch.full((len(shard),), NAN, dtype=self.mix[1]))] * len(params)
        segments = [
            Segment(s.param, s.start, s.offset if self.stage == 2 else s.start, s.offset, s.length)
            for s in self.layout.slices(rank)
        ]
        return StepTensors(params, mine, {EXP_AVG: [shard] * len(params)}, self.groups, segments, active)

    def step(
        self, hypers: list[HyperParameters], inactive: Sequence[int] = (), scale: float | None = None,
        agree: bool = True,
    ) -> None:  # fmt: skip
        """Both halves on every rank, with what each may not touch compared in between."""
        grads = [None if i in inactive else self.draw(len(p), self.mix[1]) for i, p in enumerate(self.whole)]
        grad_scale = None if scale is None else torch.tensor(scale)
        active = None
        if inactive:  # and a few bytes behind, as of stage 2's flags
            active = torch.tensor([g is not None for g in grads] + [True] * 3).to(torch.uint8)
        columns = [self.columns(r, grads, active) for r in range(self.world_size)]
        before = [[bits(p) for p in replica] for replica in self.replicas]
        for r, update in enumerate(self.updates):
            others = [q for q in range(self.world_size) if q != r]
            update.rows[others] = 0xAA
            update.pack(columns[r], hypers, grad_scale, SALT)
            assert (update.rows[others] == 0xAA).all(), "pack wrote another rank's row"
            assert not update.rows[r, -FOOTER + 8 :].any(), "pack wrote behind the checksum"
        for replica, old in zip(self.replicas, before, strict=True):
            for p, b in zip(replica, old, strict=True):
                assert torch.equal(bits(p), b), "pack wrote a parameter"
        for source, target in itertools.permutations(range(self.world_size), 2):
            self.updates[target].rows[source] = self.updates[source].rows[source]
        sums = {int(c) for update in self.updates for c in update.numbers}
        assert sums == {int(reference.hyper_checksum(hyper_table(hypers, CPU), SALT, grad_scale))}
        if agree:
            step_by(
                self.lion,
                StepTensors(self.whole, list(grads), {EXP_AVG: self.whole_exp_avgs}, self.groups),
                hypers,
                grad_scale,
            )
        for r, update in enumerate(self.updates):
            update.apply(columns[r], torch.tensor(agree))
            if not agree:
                for p, b in zip(self.replicas[r], before[r], strict=True):
                    assert torch.equal(bits(p), b), "applied, though the ranks do not agree"

    def check(self, what: str) -> None:
        for r, (replica, shard) in enumerate(zip(self.replicas, self.shards, strict=True)):
            for i, (p, want) in enumerate(zip(replica, self.whole, strict=True)):
                assert_same_bits(p, want, f"{what}, rank {r}, parameter {i} of {len(p)}")
            expected = self.cut(self.whole_exp_avgs, r, torch.full_like(shard, 77.0))
            assert_same_bits(shard, expected, f"{what}, rank {r}, momentum and padding")


# Around four to a byte, an alignment of 128 elements, a block of 1024, a tile of 8192; for 1 to 4 ranks: heads
# without tails (3072) and tails without heads, of which some end up in two ranks' parts of the tail buffer.
SIZES = (0, 1, 3072, 127, 129, 2, 1023, 3, 4100, 700)
# The interpreter takes a second for what torch does in milliseconds.
FEW_SIZES = (0, 3072, 127, 1030, 3)


def equal_the_step_in_one(mix: Mix, sizes: Sequence[int], world_size: int, use_triton: bool, stage: int) -> None:
    """Some parameters are not active in some steps, and the first that is not empty in the last step alone is."""
    ranks = Ranks(mix, sizes, world_size, use_triton, stage)
    first = next(i for i, n in enumerate(sizes) if n)
    for number, inactive in enumerate([(), range(2, len(sizes), 2), [i for i in range(len(sizes)) if i != first]]):
        hypers = [h._replace(lr=h.lr * (1 + number)) for h in HYPERS]
        ranks.step(hypers, inactive, scale=(None, 0.37, -1e30)[number])
        ranks.check(f"stage {stage}, step {number}")


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("mix", FEW_MIXES, ids=name)
def test_ranks_equal_the_step_in_one(mix: Mix, world_size: int) -> None:
    for stage in (1, 2):
        equal_the_step_in_one(mix, SIZES, world_size, False, stage)


@pytest.mark.parametrize("use_triton", [on_triton])
@pytest.mark.parametrize(
    ("mix", "world_size", "stage"),
    [
        (FEW_MIXES[0], 3, 1),
        (FEW_MIXES[1], 2, 2),
        (FEW_MIXES[2], 4, 2),
        (FEW_MIXES[3], 2, 1),
        (FEW_MIXES[4], 1, 2),
    ],
    ids=lambda x: name(x) if isinstance(x, tuple) else str(x),
)
def test_ranks_equal_the_step_in_one_interpreted(mix: Mix, world_size: int, stage: int, use_triton: bool) -> None:
    equal_the_step_in_one(mix, FEW_SIZES, world_size, use_triton, stage)


@pytest.mark.parametrize("mix", MIXES, ids=name)
def test_every_mix_on_plain_torch(mix: Mix, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than the chunks of the CPU, and not by a whole one."""
    monkeypatch.setattr(cpu, "CHUNK", 1 << 13)
    ranks = Ranks(mix, [2 * (1 << 13) * torch.get_num_threads() + 129, 4100, 3], 2, use_triton=False)
    for number, inactive in enumerate([(), (1,)]):
        ranks.step(HYPERS, inactive)
        ranks.check(f"step {number}")


@both
def test_tiles_and_blocks_of_a_long_slice(use_triton: bool) -> None:
    """Slices of several tiles, of a tile and an element, and tails that end in a block's middle."""
    ranks = Ranks((F32, F16, F32), [2 * 8192, 1025, 2 * (8192 + 128) + 1], 2, use_triton)
    ranks.step(HYPERS)
    ranks.check("a step")


@both
def test_parameters_that_move_and_groups_that_change(use_triton: bool) -> None:
    ranks = Ranks((F32, F32, F32), [2 * 128 + 3, 127, 300], 2, use_triton)
    hypers = HYPERS
    for number in range(5):
        if number == 1:  # one replica moves, and what it leaves behind is poisoned
            for p in ranks.replicas[1]:
                left = p.data
                p.data = p.data.clone()
                left.fill_(NAN)
        if number == 2:
            ranks.groups.reverse()  # in place, as a list that the optimizer keeps
        if number == 3:
            ranks.groups = [0] * 3
            hypers = hypers[:1]  # fewer groups, so a shorter table
        if number == 4:
            hypers, ranks.groups = [HYPERS[3], HYPERS[0], HYPERS[1]], [2, 1, 0]
        ranks.step(hypers)
        ranks.check(f"step {number}")


@both
def test_nothing_is_applied_without_agreement(use_triton: bool) -> None:
    """Momenta have moved; the next step that the ranks agree on starts from there."""
    ranks = Ranks((F32, F32, F32), FEW_SIZES, 2, use_triton)
    ranks.step(HYPERS)
    momenta = [m.clone() for m in ranks.shards]
    ranks.step(HYPERS, agree=False)
    assert all((bits(m) != bits(old)).any() for m, old in zip(ranks.shards, momenta, strict=True))
    for i, whole in enumerate(ranks.whole_exp_avgs):
        for r, shard in enumerate(ranks.shards):
            for s in ranks.layout.slices(r):
                if s.param == i:
                    whole[s.start : s.start + s.length] = shard[s.offset : s.offset + s.length]
    ranks.step(HYPERS)
    ranks.check("after it")


@both
@pytest.mark.parametrize("lr", [0.0, 1e-50, torch.tensor(0.0)], ids=["zero", "zero-in-float32", "tensor"])
def test_lr_of_zero_writes_no_parameter(use_triton: bool, lr: float | Tensor) -> None:
    """It is so even where the sign is NaN, and for NaNs of every form."""
    ranks = Ranks((F32, F32, F32), [1025, 700], 2, use_triton)
    for replica in ranks.replicas:
        replica[0].view(torch.int32)[::3] = 0x7FC00123
    before = [[bits(p) for p in replica] for replica in ranks.replicas]
    momenta = [m.clone() for m in ranks.shards]
    hypers = [h._replace(lr=lr, weight_decay=0.5) for h in HYPERS]
    ranks.step(hypers)
    for replica, old, m, old_m in zip(ranks.replicas, before, ranks.shards, momenta, strict=True):
        assert all(torch.equal(bits(p), b) for p, b in zip(replica, old, strict=True))
        assert (bits(m) != bits(old_m)).any()


@both
def test_signs_are_those_of_the_definition(use_triton: bool) -> None:
    """The bytes of the buffer count, not only the step that follows: another machine may read them."""
    ranks = Ranks((F32, F32, F32), [1030, 129], 2, use_triton)
    momenta = [m.clone() for m in ranks.shards]
    drawn = ranks.generator.get_state()
    ranks.step(HYPERS)
    again = torch.Generator()
    again.set_state(drawn)
    grads = [awkward((len(p),), F32, again) for p in ranks.whole]
    table = hyper_table(HYPERS, CPU)
    for r in range(2):
        for s in ranks.layout.slices(r):
            at = slice(s.offset, s.offset + s.length)
            scalars = reference.scalars(table[ranks.groups[s.param]])
            g = grads[s.param][s.start : s.start + s.length]
            sign, _ = reference.momentum_rule(g, momenta[r][at], scalars)
            got = ranks.updates[1 - r].rows[r, s.offset // 4 :][: -(-s.length // 4)]
            assert got.tolist() == pack_signs(sign).tolist()


@both
def test_values_that_are_not_finite_are_sent_as_nan(use_triton: bool) -> None:
    """Code 11 wherever the parameter must become NaN: for the momentum's sake too, which only its owner sees."""
    g = torch.tensor([INF, -INF, 0.0, 1.0, NAN, 6.6e6, -6.6e6, 6.5e6, 3e38, -1.0])  # a hundredth is added
    m = torch.tensor([0.0, 0.0, INF, -INF, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0], dtype=F16)
    codes = [3, 3, 3, 3, 3, 3, 3, 1, 3, 1]
    exp_avg = torch.zeros(128, dtype=F16)
    exp_avg[:10] = m
    segments = [Segment(0, 0, 0, 0, 10)]
    update = ExchangedSigns(LionUpdate(use_triton), 128, 0, [[(0, 0, 0, 10)]], CPU)
    columns = StepTensors([torch.ones(10)], [g], {EXP_AVG: [exp_avg]}, [0], segments)
    update.pack(columns, ONE, None, SALT)
    packed = [byte >> shift & 3 for byte in update.rows[0, :3].tolist() for shift in (0, 2, 4, 6)]
    assert packed == [*codes, 0, 0]
    update.apply(columns, torch.tensor(True))
    nan = torch.tensor(codes) == 3
    assert_canonical_nan(columns.params[0], nan)
    assert_canonical_nan(exp_avg[:10], nan)


class OnADevice(Tensor):
    """A tensor whose values the host may not ask for, as it would wait for a device."""

    READS = (
        Tensor.tolist, Tensor.item, Tensor.cpu, Tensor.numpy, Tensor.__bool__, Tensor.__int__, Tensor.__float__,
        Tensor.__index__, Tensor.__iter__, Tensor.nonzero,
    )  # fmt: skip

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        assert func not in cls.READS, f"the host reads a value: {func.__name__}"
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("use_triton", [on_triton])
def test_flags_of_what_is_fused_are_read_by_kernels_alone(use_triton: bool) -> None:
    """In both halves, in the step in one and in the norm, though an entry is not active."""

    def on_device(t: Tensor) -> Tensor:
        return t.as_subclass(OnADevice)

    with pytest.raises(AssertionError, match="the host reads"):
        on_device(torch.ones(3)).tolist()
    params = [torch.ones(300) for _ in range(3)]
    exp_avg, g = torch.zeros(3 * 384), torch.ones(3 * 384)
    slices = [(i, 0, 384 * i, 300) for i in range(3)]
    segments = [Segment(i, 0, 384 * i, 384 * i, 300) for i in range(3)]
    active = on_device(torch.tensor([1, 0, 1, 1], dtype=torch.uint8))
    hypers, scale = [ONE[0]._replace(lr=0.25, weight_decay=0.0)], on_device(torch.tensor(1.0))
    update = ExchangedSigns(LionUpdate(use_triton), 3 * 384, 0, [slices], CPU)
    columns = StepTensors(params, [g] * 3, {EXP_AVG: [exp_avg] * 3}, [0] * 3, segments, active)
    update.pack(columns, hypers, scale, SALT)
    update.apply(columns, on_device(torch.tensor(True)))
    assert [p[299].item() for p in params] == [0.75, 1.0, 0.75]
    one = LionUpdate(use_triton)
    assert squares_by(one, columns) == 600
    step_by(one, columns, hypers, scale)
    assert [p[299].item() for p in params] == [0.5, 1.0, 0.5]


@both
def test_other_memory_orders_and_odd_addresses(use_triton: bool) -> None:
    """A transposed parameter with a gradient in another order, and one at an odd address: stage 1's. One rank."""
    generator = torch.Generator().manual_seed(1)
    buffer = awkward((2000,), F32, generator)
    params = [awkward((33, 40), F32, generator).t(), buffer[3:1004]]
    grads: list[Tensor | None] = [awkward((40, 33), F32, generator), awkward((1003,), F32, generator)[2:]]
    around = torch.cat([buffer[:3], buffer[1004:]])
    whole = [p.clone(memory_format=torch.preserve_format) for p in params]
    momenta = [torch.zeros_like(p) for p in whole]
    layout = ShardLayout.make([p.numel() for p in params], 1)
    slices = [(s.param, s.start, s.offset, s.length) for s in layout.slices(0)]
    segments = [Segment(param, start, start, at, length) for param, start, at, length in slices]
    exp_avg = torch.zeros(layout.shard_numel)
    update = ExchangedSigns(LionUpdate(use_triton), layout.shard_numel, 0, [slices], CPU)
    columns = StepTensors(params, grads, {EXP_AVG: [exp_avg] * 2}, [0, 1], segments)
    update.pack(columns, HYPERS, None, SALT)
    update.apply(columns, torch.tensor(True))
    step_by(LionUpdate(use_triton), StepTensors(whole, grads, {EXP_AVG: momenta}, [0, 1]), HYPERS)
    for i, (p, want) in enumerate(zip(params, whole, strict=True)):
        assert_same_bits(flat(p), flat(want), f"parameter {i}")
    assert_same_bits(torch.cat([buffer[:3], buffer[1004:]]), around, "beside a parameter")


@both
def test_tensors_without_elements(use_triton: bool) -> None:
    """A rank may own nothing, and all ranks may."""
    ranks = Ranks((F32, F32, F32), [0, 0], 2, use_triton)
    ranks.step(HYPERS)
    ranks.check("of nothing")
    ranks = Ranks((F32, F32, F32), [3], 4, use_triton)  # three ranks that own nothing
    ranks.step(HYPERS)
    ranks.check("of three elements")


@both
def test_autograd_notices(use_triton: bool) -> None:
    """Kernels write by address; a graph that saved a weight must not use it changed."""
    w = torch.ones(300, requires_grad=True)
    segments = [Segment(0, 0, 0, 0, 300)]
    update = ExchangedSigns(LionUpdate(use_triton), 384, 0, [[(0, 0, 0, 300)]], CPU)
    loss = (w * w).sum()
    columns = StepTensors([w], [torch.ones(300)], {EXP_AVG: [torch.zeros(384)]}, [0], segments)
    with torch.no_grad():
        update.pack(columns, HYPERS, None, SALT)
        update.apply(columns, torch.tensor(True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


ONE = [HyperParameters(1e-3, 0.1, 0.9, 0.99, False)]
