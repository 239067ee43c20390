"""State columns of any dtype and block in a shard: what is taken in whole comes out whole, and in boxes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lion_dist.memory_order import same_layout
from lion_dist.sharding.boxes import check_cover
from lion_dist.sharding.shard import make_shards
from lion_dist.update.state import StateColumn
from tests.asserts import assert_same_bits
from tests.harness import device_of, run_ranks

COLUMNS = (
    StateColumn("average", torch.bfloat16),
    StateColumn("scale", torch.float32, 128),
    StateColumn("steps", torch.int32),
    StateColumn("pairs", torch.int64, 2),
)


def parameters(device: torch.device) -> list[nn.Parameter]:
    """Heads and tails, none of either, an odd number of elements, no elements, no dimensions, and another order."""
    shapes: list[tuple[int, ...]] = [(3, 257), (128 * 6,), (), (0, 4), (1001,), (7,), (2, 130, 3)]
    params = [nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes]
    last = torch.zeros(2, 5, 9, 7, device=device).to(memory_format=torch.channels_last)
    return [*params, nn.Parameter(last), nn.Parameter(torch.zeros(40, 30, device=device).t())]


def drawn(shape: Sequence[int], column: StateColumn, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-100, 100, tuple(shape), generator=generator).to(device, column.dtype)


def body_columns(rank: int, world_size: int) -> None:
    device = device_of(rank, world_size)
    group = dist.group.WORLD
    assert group is not None
    params = parameters(device)
    (shard,) = make_shards(params, [COLUMNS] * len(params), world_size)
    assert {name: buffer.dtype for name, buffer in shard.buffers.items()} == {c.name: c.dtype for c in COLUMNS}
    state = {
        id(p): {c.name: drawn(c.shape(p.shape), c, device, 10 * i + j) for j, c in enumerate(COLUMNS)}
        for i, p in enumerate(params)
    }
    shard.take_state(state, group)
    for keep in (True, rank == 0):
        for p, found in zip(params, shard.gather_state(group, keep), strict=True):
            assert found.keys() == (state[id(p)].keys() if keep else set())
            for name, t in found.items():
                assert t.device.type == "cpu"
                assert same_layout(t, p if t.shape == p.shape else t.contiguous())
                assert_same_bits(t, state[id(p)][name].cpu(), name)
    for i, p in enumerate(params):
        for column in COLUMNS:
            own = shard.boxes(i, column, rank)
            whole = state[id(p)][column.name]
            assert (own.shape, own.dtype) == (whole.shape, whole.dtype)
            for box, part in zip(own.boxes, own.parts, strict=True):
                assert_same_bits(part, whole[box.slices()], f"{column.name} of parameter {i}, {box}")
            check_cover(whole.shape, [box for r in range(world_size) for box in shard.boxes(i, column, r).boxes])

    # A second shard takes the boxes of the first, and what is not given becomes zeros.
    (other,) = make_shards(params, [COLUMNS] * len(params), world_size)
    other.take_state(state, group)
    boxes = {id(p): {"scale": shard.boxes(i, COLUMNS[1], rank)} for i, p in enumerate(params)}
    other.take_state(boxes, group)
    for name, buffer in other.buffers.items():
        expected = shard.buffers[name] if name == "scale" else torch.zeros_like(buffer)
        assert_same_bits(buffer, expected, name)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_columns_are_taken_gathered_and_cut(world_size: int, tmp_path: Path) -> None:
    run_ranks(body_columns, world_size, tmp_path)


def test_parameters_with_other_columns_are_in_other_shards() -> None:
    params = [torch.zeros(300) for _ in range(4)]
    one, two = COLUMNS[:1], COLUMNS[:2]
    shards = make_shards(params, [one, two, one, (StateColumn("average", torch.float32),)], 2)
    number_of = {id(p): i for i, p in enumerate(params)}
    assert [[number_of[id(p)] for p in shard.params] for shard in shards] == [[0, 2], [1], [3]]
    assert [list(shard.buffers) for shard in shards] == [["average"], ["average", "scale"], ["average"]]


def test_a_block_that_slices_could_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="block of scale must divide 128, got 96"):
        make_shards([torch.zeros(300)], [(StateColumn("scale", torch.float32, 96),)], 2)
