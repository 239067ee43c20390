"""Segments and memory order. Lengths sit around TILE (8192) and around 2^31; shapes have every order of
strides, dimensions of 1 and 0, and gaps. Predicates are compared with an enumeration of addresses."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lion_dist.memory_order import flat, is_dense, laid_out_like, may_overlap, same_layout
from lion_dist.update.hypers import hyper_table
from lion_dist.update.lion_update import LionUpdate
from lion_dist.update.reference import HyperParameters, lion_step_, scalars
from lion_dist.update.segments import (
    ENTRY,
    GROUP,
    LENGTH,
    PARAM,
    STATE,
    TILE,
    TILE_0,
    Segment,
    SegmentTable,
    StepTensors,
    check_no_shared_memory,
)
from lion_dist.update.state import EXP_AVG
from tests.asserts import assert_same_bits
from tests.marks import needs_interpreter
from tests.scenarios.mixes import step_by

CPU = torch.device("cpu")


def offsets(shape: tuple[int, ...], strides: tuple[int, ...]) -> list[int]:
    """The address of every index, in elements."""
    return [sum(i * s for i, s in zip(index, strides, strict=True)) for index in itertools.product(*map(range, shape))]


def strided(shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    return torch.arange(4096.0).as_strided(shape, strides, 5)


ALL_STRIDED = [
    (shape, strides)
    for shape in [(), (0,), (1,), (2,), (5,), (0, 3), (1, 1), (1, 3), (2, 3), (3, 2), (2, 1, 3), (2, 2, 2)]
    for strides in itertools.product([0, 1, 2, 3, 4, 6, 8], repeat=len(shape))
]


def test_is_dense_says_what_enumeration_says() -> None:
    for shape, strides in ALL_STRIDED:
        addresses = sorted(offsets(shape, strides))
        expected = addresses == list(range(len(addresses)))
        assert is_dense(strided(shape, strides)) == expected, (shape, strides)


def test_may_overlap_never_misses_an_overlap() -> None:
    missed: list[Any] = []
    refused: Counter[Any] = Counter()
    for shape, strides in ALL_STRIDED:
        addresses = offsets(shape, strides)
        overlaps = len(set(addresses)) < len(addresses)
        says = may_overlap(strided(shape, strides))
        if overlaps and not says:
            missed.append((shape, strides))
        refused[says, overlaps] += 1
    assert not missed
    # Some interleavings are refused though they share nothing, but no dense or gapped view is.
    assert refused[True, True] > 0
    assert refused[False, False] > refused[True, False]


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: torch.zeros(4, 5),
    "transposed": lambda: torch.zeros(4, 5).t(),
    "permuted": lambda: torch.zeros(2, 3, 4).permute(2, 0, 1),
    "channels last": lambda: torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "zero-dim": lambda: torch.zeros(()),
    "empty": lambda: torch.zeros(3, 0, 2),
    "an odd view": lambda: torch.zeros(20)[3:16],
    "size 1 with an odd stride": lambda: torch.zeros(40).as_strided((1, 4), (7, 1)),
}


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_dense_layouts(make: Callable[[], Tensor]) -> None:
    t = make()
    assert is_dense(t)
    assert not may_overlap(t)
    t.copy_(torch.arange(t.numel(), dtype=t.dtype).view(t.shape))
    run = flat(t)
    assert run.shape == (t.numel(),)
    assert run.stride() == (1,)
    assert not run.requires_grad
    if t.numel():
        assert run.data_ptr() == t.data_ptr()
    # Element k of the run is the one at address k.
    at = offsets(tuple(t.shape), t.stride())
    for value, address in zip(t.reshape(-1).tolist(), at, strict=True):
        assert run[address] == value


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(4, 8)[:, :5],
        lambda: torch.zeros(10)[::2],
        lambda: torch.zeros(3, 4, 5)[:, 1],
    ],
    ids=["columns", "every other", "a middle dimension"],
)
def test_gaps_are_neither_dense_nor_overlapping(make: Callable[[], Tensor]) -> None:
    assert not is_dense(make())
    assert not may_overlap(make())


@pytest.mark.parametrize(
    "t",
    [torch.zeros(1).expand(5), torch.zeros(4, 1).expand(4, 3), torch.zeros(9).unfold(0, 3, 1)],
    ids=["expanded", "expanded columns", "unfolded"],
)
def test_overlaps_are_seen(t: Tensor) -> None:
    assert may_overlap(t)
    assert not is_dense(t)


def test_same_layout_ignores_the_strides_of_dimensions_of_one() -> None:
    a = torch.zeros(40).as_strided((1, 4), (7, 1))
    assert same_layout(a, torch.zeros(1, 4))
    assert same_layout(torch.zeros(3, 1, 2), torch.zeros(2, 3, 1).permute(1, 2, 0).contiguous())
    assert not same_layout(torch.zeros(4, 4), torch.zeros(4, 4).t())
    # One channel: channels-last and contiguous are the same memory.
    assert same_layout(torch.zeros(2, 1, 4, 5), torch.zeros(2, 1, 4, 5).to(memory_format=torch.channels_last))


def test_laid_out_like() -> None:
    t, like = torch.randn(4, 6), torch.zeros(6, 4, dtype=torch.bfloat16).t()
    copy = laid_out_like(t, like)
    assert copy.stride() == like.stride()
    assert copy.dtype == t.dtype
    assert_same_bits(copy, t)
    assert laid_out_like(t, torch.zeros(4, 6)) is t
    gaps = laid_out_like(t, torch.zeros(4, 9)[:, :6])
    assert gaps.stride() == (9, 1)
    assert_same_bits(gaps, t)


# -- SegmentTable


def tiles_of(table: SegmentTable) -> list[tuple[int, int, int]]:
    """(segment, start, end) of every tile, as the kernels compute them from the table."""
    rows, found = table.rows.tolist(), []
    for tile, segment in enumerate(table.tile_segments.tolist()):
        length = rows[segment][LENGTH]
        start = (tile - rows[segment][TILE_0]) * TILE
        found.append((segment, start, min(start + TILE, length)))
    return found


def assert_covers_once(table: SegmentTable, lengths: list[int]) -> None:
    assert len(table.tile_segments) == table.tiles
    reached = [0] * len(lengths)
    for segment, start, end in tiles_of(table):
        assert start == reached[segment]
        assert end > start
        reached[segment] = end
    assert reached == lengths


def columns_of(params: list[Tensor], exp_avgs: list[Tensor], groups: list[int]) -> StepTensors:
    return StepTensors(params, [None] * len(params), {EXP_AVG: exp_avgs}, groups)


@pytest.mark.parametrize(
    "lengths",
    [
        [1],
        [TILE - 1],
        [TILE],
        [TILE + 1],
        [1, TILE, 1, 2 * TILE + 1, 3, 5 * TILE],
        [127, 128, 129, 2047, 2048, 2049, 8191, 8192, 8193, 20000],
    ],
    ids=str,
)
def test_tiles_cover_every_element_once(lengths: list[int]) -> None:
    params = [torch.zeros(n) for n in lengths]
    exp_avgs = [torch.zeros(n, dtype=torch.bfloat16) for n in lengths]
    groups = [i % 3 for i in range(len(lengths))]
    segments = [Segment(i, 0, 0, 0, n) for i, n in enumerate(lengths)]
    table = SegmentTable(columns_of(params, exp_avgs, groups), segments, CPU, torch.float32)
    assert_covers_once(table, lengths)
    assert table.rows[:, [PARAM, STATE, LENGTH, GROUP]].tolist() == [
        [p.data_ptr(), m.data_ptr(), n, group] for p, m, n, group in zip(params, exp_avgs, lengths, groups, strict=True)
    ]


def test_starts_become_addresses() -> None:
    p, m, g = torch.zeros(1000), torch.zeros(500, dtype=torch.float16), torch.zeros(1000, dtype=torch.bfloat16)
    segments = [Segment(0, 131, 140, 7, 100), Segment(0, 300, 0, 200, 1), Segment(1, 0, 1, 2, 3)]
    table = SegmentTable(StepTensors([p, p], [g, None], {EXP_AVG: [m, m]}, [1, 0]), segments, CPU, torch.bfloat16)
    assert table.rows[:, [PARAM, STATE, LENGTH, GROUP, TILE_0, ENTRY]].tolist() == [
        [p.data_ptr() + 4 * 131, m.data_ptr() + 2 * 7, 100, 1, 0, 0],
        [p.data_ptr() + 4 * 300, m.data_ptr() + 2 * 200, 1, 1, 1, 0],
        [p.data_ptr(), m.data_ptr() + 2 * 2, 3, 0, 2, 1],
    ]
    table.set_gradients([g.data_ptr(), 0])
    assert table.grad_addresses.tolist() == [g.data_ptr() + 2 * 140, g.data_ptr(), 0]


def test_rows_hold_every_state_column() -> None:
    """Also one of whose elements 128 of the parameter's share one."""
    p, m, scale = torch.zeros(1024), torch.zeros(1024, dtype=torch.int8), torch.zeros(8)
    tensors = StepTensors([p], [None], {EXP_AVG: [m], "scale": [scale]}, [0], blocks={"scale": 128})
    table = SegmentTable(tensors, [Segment(0, 0, 0, 256, 128), Segment(0, 512, 0, 640, 300)], CPU, torch.float32)
    assert table.rows.shape == (2, table.row_width)
    assert table.rows[:, STATE:].tolist() == [
        [m.data_ptr() + 256, scale.data_ptr() + 4 * 2],
        [m.data_ptr() + 640, scale.data_ptr() + 4 * 5],
    ]


def test_a_new_gradient_overwrites_no_tensor_of_an_earlier_launch() -> None:
    p, m = torch.zeros(10), torch.zeros(10)
    table = SegmentTable(columns_of([p], [m], [0]), [Segment(0, 0, 0, 0, 10)], CPU, torch.float32)
    first, second = torch.zeros(10), torch.zeros(10)
    table.set_gradients([first.data_ptr()])
    launched = table.grad_addresses
    table.set_gradients([second.data_ptr()])
    assert launched.tolist() == [first.data_ptr()]
    assert table.grad_addresses.tolist() == [second.data_ptr()]


def test_lengths_and_starts_beyond_32_bits() -> None:
    """On the meta device: numbers without memory, and every address counted from 0."""
    n = 2**32 + TILE + 3
    p = torch.empty(n + 50, device="meta", dtype=torch.bfloat16)
    m = torch.empty(n + 70, device="meta")
    segments = [Segment(0, 0, 0, 0, 5), Segment(0, 50, 0, 70, n), Segment(0, 2**31 + 9, 0, 2**31 + 11, 10)]
    table = SegmentTable(columns_of([p], [m], [0]), segments, CPU, torch.float32)
    tiles = -(-n // TILE)
    assert table.tiles == tiles + 2
    assert table.rows[:, [PARAM, STATE, LENGTH, GROUP, TILE_0, ENTRY]].tolist() == [
        [0, 0, 5, 0, 0, 0],
        [2 * 50, 4 * 70, n, 0, 1, 0],
        [2 * (2**31 + 9), 4 * (2**31 + 11), 10, 0, 1 + tiles, 0],
    ]
    counts = torch.bincount(table.tile_segments.long()).tolist()
    assert counts == [1, tiles, 1]
    assert bool((table.tile_segments.diff() >= 0).all())  # so tile - first_tile numbers a segment's tiles 0, 1, ...


@pytest.mark.parametrize("use_triton", [False, pytest.param(True, marks=needs_interpreter)])
def test_segments_step_their_own_elements_and_no_others(use_triton: bool) -> None:
    """A sharded optimizer steps so: pieces of parameters against a flat momentum and a flat gradient, at odd starts."""
    p, g, m = torch.randn(9000), torch.randn(9100), torch.randn(700)
    expected_p, expected_m = p.clone(), m.clone()
    segments = [Segment(0, 1, 3, 5, 129), Segment(0, 8871, 8900, 134, 128), Segment(0, 200, 1, 300, 0)]
    hyper = HyperParameters(0.01, 0.1, 0.9, 0.99, False)
    row = hyper_table([hyper], CPU)[0]
    for _, p0, g0, m0, n in segments:
        lion_step_(expected_p[p0 : p0 + n], g[g0 : g0 + n], expected_m[m0 : m0 + n], scalars(row))
    # The gradient has the parameter's shape in the columns' check: one flat run that both starts index.
    whole_p, whole_g = torch.zeros(9100), g.clone()
    whole_p[:9000] = p
    step_by(LionUpdate(use_triton), StepTensors([whole_p], [whole_g], {EXP_AVG: [m]}, [0], segments), [hyper])
    assert_same_bits(whole_p[:9000], expected_p)
    assert_same_bits(m, expected_m)
    assert_same_bits(whole_g, g)


# -- Checks


def test_shared_memory_is_refused() -> None:
    base = torch.zeros(100)
    for a, b in [
        (base[:50], base[49:]),
        (base, base[10:11]),
        (base[3:13], base[3:13]),
        (base.view(10, 10), base.view(10, 10).t()),
    ]:
        with pytest.raises(ValueError, match=r"parameters (0 and 2|2 and 0) share memory"):
            check_no_shared_memory([a, torch.zeros(5), b])


def test_neighbours_empties_and_interleaved_gaps_share_nothing() -> None:
    base = torch.zeros(10, 10)
    check_no_shared_memory(
        [base.view(-1)[:50], base.view(-1)[50:], base.view(-1)[20:20], torch.zeros(0), torch.zeros(0)]
    )
    check_no_shared_memory([base[:, :5], base[:, 5:]])


def test_shared_memory_is_counted_in_bytes() -> None:
    base = torch.zeros(100, dtype=torch.uint8)
    a, b = base[:40].view(torch.float32), base[40:60].view(torch.bfloat16)
    check_no_shared_memory([a, b])
    with pytest.raises(ValueError, match="share memory"):
        check_no_shared_memory([a, base[38:60].view(torch.bfloat16)])


P = nn.Parameter(torch.zeros(4, 3))


@pytest.mark.parametrize(
    ("g", "error", "message"),
    [
        (torch.zeros(4, 3).to_sparse(), TypeError, "dense gradients"),
        (torch.zeros(4, 3, dtype=torch.complex64), TypeError, "complex64"),
        (torch.zeros(4, 3, dtype=torch.float64), TypeError, "float64"),
        (torch.zeros(4, 3, dtype=torch.int32), TypeError, "int32"),
        (torch.zeros(3, 4), ValueError, r"shape \(3, 4\)"),
        (torch.zeros(12), ValueError, r"shape \(12,\)"),
        (torch.zeros(4, 3, device="meta"), ValueError, "on meta; expected cpu"),
    ],
    ids=["sparse", "complex", "float64", "int32", "transposed shape", "flattened", "device"],
)
def test_bad_gradients_are_refused(g: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"gradient of parameter 7 .*{message}"):
        StepTensors([P, P], [None, g], {EXP_AVG: [P, P]}, [0, 0], numbers=[0, 7]).check_gradient(1, g)
