"""Flat ranges as boxes: every range of small shapes, in every order of dimensions, against torch's own indexing."""

from __future__ import annotations

import random
import time
from itertools import pairwise, permutations
from math import prod

import pytest
import torch

from lion_dist.sharding.boxes import Box, check_cover, cut, memory_order

SHAPES = [(), (1,), (7,), (3, 4), (1, 5), (5, 1), (2, 3, 4), (3, 1, 2), (2, 3, 1, 2), (2, 2, 2, 2), (0,), (3, 0, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_range_in_every_order(shape: tuple[int, ...]) -> None:
    numel = prod(shape)
    for order in permutations(range(len(shape))):
        # A dense tensor with its dimensions in that order, whose elements are their own numbers in memory.
        back = sorted(range(len(shape)), key=lambda i: order[i])
        whole = torch.arange(numel).view([shape[d] for d in order]).permute(back)
        assert whole.shape == shape
        for start in range(numel + 1):
            for stop in range(start, numel + 1):
                boxes = cut(shape, start, stop, order)
                assert len(boxes) <= max(1, 2 * len(shape) - 1)
                at = start
                for box in boxes:
                    got = whole[box.slices()]
                    assert got.numel() == box.numel > 0
                    # A run of elements, in order: what lets a shard's memory be viewed as the box.
                    run = torch.arange(at, at + box.numel).view([box.sizes[d] for d in order]).permute(back)
                    assert torch.equal(got, run), (order, start, stop, box)
                    at += box.numel
                assert at == stop
        assert cut(shape, 0, numel, order) == ([Box((0,) * len(shape), shape)] if numel else [])
        if len(shape) > 1 and 1 not in shape and numel:
            assert memory_order(whole.stride()) == order
    assert cut(shape, 0, numel) == cut(shape, 0, numel, range(len(shape)))


def test_the_most_boxes_do_occur() -> None:
    assert len(cut((4, 4, 4), 5, 59)) == 5


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 13)])
def test_ranges_outside_are_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="expected 0 <= start"):
        cut((3, 4), start, stop)


def test_a_wrong_order_is_refused() -> None:
    with pytest.raises(ValueError, match="each dimension"):
        cut((3, 4), 0, 5, (0, 0))


@pytest.mark.parametrize("shape", [(), (6,), (3, 4), (2, 3, 4), (0, 3)], ids=str)
def test_cover_takes_cuts_and_refuses_less_and_more(shape: tuple[int, ...]) -> None:
    numel = prod(shape)
    for first in range(numel + 1):
        for second in range(first, numel + 1):
            boxes = cut(shape, 0, first) + cut(shape, first, second) + cut(shape, second, numel)
            check_cover(shape, boxes[::-1])
            for i, box in enumerate(boxes):
                with pytest.raises(ValueError, match="elements of"):
                    check_cover(shape, boxes[:i] + boxes[i + 1 :])
                with pytest.raises(ValueError, match="elements of"):
                    check_cover(shape, [*boxes, box])


def random_boxes(draw: random.Random, shape: tuple[int, ...], offsets: tuple[int, ...]) -> list[Box]:
    """A box of this shape, parted at random again and again."""
    d = draw.randrange(len(shape))
    if shape[d] < 2 or draw.random() < 0.2:
        return [Box(offsets, shape)]
    at = draw.randrange(1, shape[d])
    rest = (*offsets[:d], offsets[d] + at, *offsets[d + 1 :])
    return [
        *random_boxes(draw, (*shape[:d], at, *shape[d + 1 :]), offsets),
        *random_boxes(draw, (*shape[:d], shape[d] - at, *shape[d + 1 :]), rest),
    ]


def test_cover_is_what_counting_says() -> None:
    draw, refused = random.Random(0), 0
    for _ in range(400):
        shape = tuple(draw.randrange(1, 6) for _ in range(draw.randrange(1, 5)))
        boxes = random_boxes(draw, shape, (0,) * len(shape))
        check_cover(shape, boxes)
        for _ in range(draw.randrange(3)):  # of the same sizes elsewhere, so that the volume stays right
            i = draw.randrange(len(boxes))
            offsets = tuple(draw.randrange(n - size + 1) for n, size in zip(shape, boxes[i].sizes, strict=True))
            boxes[i] = Box(offsets, boxes[i].sizes)
        counts = torch.zeros(shape, dtype=torch.int64)
        for box in boxes:
            counts[box.slices()] += 1
        if (counts == 1).all():
            check_cover(shape, boxes)
        else:
            refused += 1
            with pytest.raises(ValueError, match=r"overlap: some elements of shape .* are in several"):
                check_cover(shape, boxes)
    assert 100 < refused < 300


def test_cover_of_many_ranks_takes_no_time() -> None:
    """1024 ranks, each with a part of every kind; and boxes that a sweep along any dimension would compare in pairs."""
    shape, n = (4096, 11008), 4000
    cuts = [prod(shape) * r // 1024 + r % 7 for r in range(1024)] + [prod(shape)]
    ranks = [box for start, stop in pairwise([0, *cuts[1:]]) for box in cut(shape, start, stop)]
    stairs = [b for i in range(n) for b in (Box((0, i), (i + 1, 1)), Box((i + 1, i), (2 * n - i - 1, 1)))]
    begin = time.monotonic()
    check_cover(shape, ranks)
    check_cover((2 * n, n), stairs)
    assert time.monotonic() - begin < 5  # 0.1 s
    stairs[-1] = Box((0, n - 1), stairs[-1].sizes)
    with pytest.raises(ValueError, match="overlap"):
        check_cover((2 * n, n), stairs)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([Box((0, 0), (2, 4)), Box((1, 0), (1, 4))], "overlap"),  # the right volume
        ([Box((0, 0), (3, 3)), Box((0, 2), (3, 1))], "overlap"),
        ([Box((0, 0), (3, 5))], "is not within"),
        ([Box((-1, 0), (3, 4))], "is not within"),
        ([Box((0, 0), (-3, -4))], "is not within"),
        ([Box((0,), (12,))], "dimensions"),
        ([], "0 elements of 12"),
    ],
)
def test_boxes_that_do_not_cover(boxes: list[Box], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_cover((3, 4), boxes)


def test_overlap_and_hull() -> None:
    a, b = Box((1, 0), (2, 3)), Box((0, 2), (2, 5))
    assert a.overlap(b) == b.overlap(a) == Box((1, 2), (1, 1))
    assert a.overlap(Box((3, 0), (1, 3))) is None
    assert Box((), ()).overlap(Box((), ())) == Box((), ())
    assert Box((1, 2), (2, 2)).hull((4, 5)) == (7, 14)
    assert Box((), ()).hull(()) == (0, 1)
    assert Box((1, 2), (0, 2)).hull((4, 5)) == (0, 0)
