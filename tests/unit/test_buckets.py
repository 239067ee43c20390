"""Buckets cover every parameter once, in order and within the limit, whatever the sizes: integers only, no torch."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest

from lion_dist.sharding.buckets import complete_order, make_buckets


@pytest.mark.parametrize("seed", range(30))
def test_every_parameter_once_in_order_within_the_limit(seed: int) -> None:
    random = Random(seed)
    sizes = [random.choice([0, 1, 3, 4, 100, 127, 129, 1000]) for _ in range(random.randint(1, 20))]
    order = random.sample(range(len(sizes)), len(sizes))
    for limit in (1, 2, 128, 256, 1000, 10**9):
        buckets = make_buckets(sizes, order, limit)
        assert [i for bucket in buckets for i in bucket] == order
        assert all(buckets)  # an empty bucket would be a launch for nothing
        for bucket in buckets:
            # Over the limit only where one parameter alone is.
            assert sum(sizes[i] for i in bucket) <= limit or len(bucket) == 1
        for bucket, following in pairwise(buckets):
            # Greedy: as few collectives as the order allows.
            assert sum(sizes[i] for i in bucket) + sizes[following[0]] > limit


def test_oversize_parameter_is_alone() -> None:
    assert make_buckets([1, 50, 1, 1], [0, 1, 2, 3], 10) == ((0,), (1,), (2, 3))
    assert make_buckets([50, 60], [1, 0], 10) == ((1,), (0,))
    assert make_buckets([5, 5, 1], [0, 1, 2], 10) == ((0, 1), (2,))  # the limit itself fits


def test_one_bucket_where_all_fit() -> None:
    assert make_buckets([3, 2, 1], [2, 0, 1], 6) == ((2, 0, 1),)


def test_nothing_makes_one_empty_bucket() -> None:
    assert make_buckets([], [], 1) == ((),)


@pytest.mark.parametrize(
    ("sizes", "order", "limit"),
    [
        ([1, 2], [0, 1], 0),
        ([1, 2], [0, 1], -5),
        ([1, 2], [0], 10),
        ([1, 2], [0, 0], 10),
        ([1, 2], [1, 2], 10),
        ([1, 2], [0, 1, 1], 10),
        ([], [0], 10),
    ],
)
def test_bad_input_is_refused(sizes: list[int], order: list[int], limit: int) -> None:
    with pytest.raises(ValueError, match=r"got limit .* expected limit >= 1 and an order"):
        make_buckets(sizes, order, limit)


@pytest.mark.parametrize(
    ("seen", "count", "expected"),
    [
        ([], 0, []),
        ([], 4, [3, 2, 1, 0]),
        ([2, 0, 3, 1], 4, [2, 0, 3, 1]),
        ([1], 4, [1, 3, 2, 0]),
        ([1, 3, 1, 1, 3], 5, [1, 3, 4, 2, 0]),  # seen several times: the first counts
    ],
)
def test_complete_order(seen: list[int], count: int, expected: list[int]) -> None:
    assert complete_order(seen, count) == expected


@pytest.mark.parametrize("seed", range(20))
def test_complete_order_makes_an_order_for_buckets(seed: int) -> None:
    random = Random(seed)
    count = random.randint(1, 12)
    seen = [random.randrange(count) for _ in range(random.randint(0, 20))]
    order = complete_order(seen, count)
    assert sorted(order) == list(range(count))
    assert order[: len(set(seen))] == list(dict.fromkeys(seen))
    make_buckets([1] * count, order, 3)
