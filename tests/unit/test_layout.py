"""ShardLayout in integers. The lengths sit around the edges of ALIGN (128) and of world_size * ALIGN, and the
world sizes include ones that do not divide them: that is where a slice could be lost, doubled or misaligned."""

from __future__ import annotations

import dataclasses
import random

import pytest

from lion_dist.sharding.layout import ALIGN, ShardLayout

WORLD_SIZES = [1, 2, 3, 4, 7, 8]
AWKWARD = [0, 1, 2, 127, 128, 129, 255, 256, 257, 383, 384, 385, 895, 896, 897, 1000, 1023, 1024, 1025, 4095, 4096,
           4097, 100003]  # fmt: skip


def random_numels(seed: int) -> list[int]:
    rng = random.Random(seed)
    scale = rng.choice([3, 130, 1100, 5000, 40000])
    return [rng.randrange(scale) for _ in range(rng.randrange(1, 40))]


NUMELS = {
    "none": [],
    "one empty": [0],
    "all empty": [0, 0, 0],
    "one element": [1],
    "awkward": AWKWARD,
    "awkward backwards": AWKWARD[::-1],
    "many small": [1] * 70,
    "heads only": [w * ALIGN * 3 for w in WORLD_SIZES],
    **{f"random {seed}": random_numels(seed) for seed in range(20)},
}
cases = pytest.mark.parametrize("numels", NUMELS.values(), ids=NUMELS.keys())
worlds = pytest.mark.parametrize("world_size", WORLD_SIZES)


@worlds
@cases
def test_every_element_is_owned_once(numels: list[int], world_size: int) -> None:
    layout = ShardLayout.make(numels, world_size)
    owned: dict[int, list[tuple[int, int]]] = {i: [] for i in range(len(numels))}
    for rank in range(world_size):
        for s in layout.slices(rank):
            assert s.length > 0
            owned[s.param].append((s.start, s.start + s.length))
    for param, numel in enumerate(numels):
        reached = 0
        for start, end in sorted(owned[param]):
            assert start == reached, f"parameter {param}: a gap or an overlap at {reached}"
            reached = end
        assert reached == numel


@worlds
@cases
def test_slices_lie_in_the_shard(numels: list[int], world_size: int) -> None:
    layout = ShardLayout.make(numels, world_size)
    assert layout.shard_numel % ALIGN == 0
    assert layout.tail_buffer_numel % (world_size * ALIGN) == 0
    assert layout.tail_shard_offset + layout.tail_buffer_numel // world_size == layout.shard_numel
    for rank in range(world_size):
        reached = 0
        for s in layout.slices(rank):
            assert s.offset % ALIGN == 0
            assert s.start % ALIGN == 0
            assert s.offset >= reached, "slices overlap in the shard"
            reached = s.offset + s.length
        assert reached <= layout.shard_numel


@worlds
@cases
def test_heads_are_cut_alike_on_every_rank(numels: list[int], world_size: int) -> None:
    """A gather in place needs rank r's head slice to be the r-th of equal parts, at one shard offset on all ranks."""
    layout = ShardLayout.make(numels, world_size)
    unit = world_size * ALIGN
    for numel, head in zip(numels, layout.heads, strict=True):
        assert head % unit == 0
        assert 0 <= numel - head < unit
    heads = [[s for s in layout.slices(r) if s.start < layout.heads[s.param]] for r in range(world_size)]
    for rank, of_rank in enumerate(heads):
        assert [(s.param, s.length, s.offset) for s in of_rank] == [(s.param, s.length, s.offset) for s in heads[0]]
        assert all(s.start == rank * s.length and s.length * world_size == layout.heads[s.param] for s in of_rank)
        assert all(s.offset + s.length <= layout.tail_shard_offset for s in of_rank)


@worlds
@cases
def test_tails_lie_in_their_buffer(numels: list[int], world_size: int) -> None:
    layout = ShardLayout.make(numels, world_size)
    reached = 0
    for tail in layout.tails:
        assert tail.start == layout.heads[tail.param]
        assert tail.start + tail.length == numels[tail.param]
        assert 0 < tail.length < world_size * ALIGN
        assert tail.offset % ALIGN == 0
        assert tail.offset >= reached
        reached = tail.offset + tail.length
    assert {t.param for t in layout.tails} == {i for i, n in enumerate(numels) if n % (world_size * ALIGN)}
    assert reached <= layout.tail_buffer_numel < reached + ALIGN + world_size * ALIGN
    # A rank's part of the tail buffer lies in its shard in the same order.
    per_rank = layout.tail_buffer_numel // world_size
    for rank in range(world_size):
        for s in layout.slices(rank):
            if s.start >= layout.heads[s.param]:
                (tail,) = (t for t in layout.tails if t.param == s.param)
                in_buffer = tail.offset + s.start - tail.start
                assert in_buffer == rank * per_rank + s.offset - layout.tail_shard_offset
                assert in_buffer + s.length <= (rank + 1) * per_rank


def test_one_rank_owns_everything_in_place() -> None:
    (only,) = ShardLayout.make([1000], 1).slices(0)[:1]
    assert (only.start, only.length, only.offset) == (0, 896, 0)
    assert ShardLayout.make([1000], 1).shard_numel == 1024


def test_padding_is_small() -> None:
    """Less than ALIGN a tail, and less than world_size * ALIGN in all."""
    for world_size in WORLD_SIZES:
        layout = ShardLayout.make(AWKWARD, world_size)
        padding = layout.shard_numel * world_size - sum(AWKWARD)
        assert 0 <= padding < ALIGN * len(layout.tails) + ALIGN * world_size


def test_beyond_32_bits() -> None:
    layout = ShardLayout.make([2**40 + 5, 3], 8)
    assert sum(s.length for r in range(8) for s in layout.slices(r)) == 2**40 + 8


def test_layouts_compare_by_value() -> None:
    """Ranks compare hashes of what the layout says: equal inputs must give equal and immutable plans."""
    layout = ShardLayout.make(AWKWARD, 3)
    assert layout == ShardLayout.make(tuple(AWKWARD), 3)
    assert layout != ShardLayout.make(AWKWARD, 4)
    assert layout != ShardLayout.make(AWKWARD[::-1], 3)
    assert hash(layout) == hash(ShardLayout.make(tuple(AWKWARD), 3))
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.world_size = 4  # type: ignore[misc]


@pytest.mark.parametrize(("numels", "world_size"), [([1], 0), ([1], -1), ([-1], 2), ([5, -3, 2], 1)])
def test_bad_cuts_are_refused(numels: list[int], world_size: int) -> None:
    with pytest.raises(ValueError, match="world_size >= 1 and numels >= 0"):
        ShardLayout.make(numels, world_size)


@pytest.mark.parametrize("rank", [-1, 3, 100])
def test_bad_ranks_are_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=r"rank in \[0, 3\)"):
        ShardLayout.make([1000], 3).slices(rank)
