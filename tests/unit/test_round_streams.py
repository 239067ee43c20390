"""Which streams of a GPU wait for which, and on which the memory of gradients is recorded. The streams are fakes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lion_dist import ShardedLion
from lion_dist.sharding import rounds

USUAL, SIDE, OTHER = range(3)


@dataclass
class FakeStreams:
    """Streams that note what is asked of them.

    Attributes:
        current: number of the current stream.
        waits: pairs of numbers: the stream that waited, and the one it waited for.
        recorded: numbers of elements of tensors, with the stream on which each was recorded.
    """

    current: int = USUAL
    waits: list[tuple[int, int]] = field(default_factory=list)
    recorded: set[tuple[int, int]] = field(default_factory=set)

    def stream(self) -> FakeStream:
        return FakeStream(self, self.current)


@dataclass
class FakeStream:
    streams: FakeStreams
    cuda_stream: int

    def wait_stream(self, other: FakeStream) -> None:
        self.streams.waits.append((self.cuda_stream, other.cuda_stream))


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeStreams]:
    """In a group of one rank."""
    found = FakeStreams()
    monkeypatch.setattr(rounds, "current_stream_number", lambda device: found.current)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: found.stream())
    monkeypatch.setattr(Tensor, "record_stream", lambda t, on: found.recorded.add((t.numel(), on.cuda_stream)))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield found
    dist.destroy_process_group()


class On(torch.autograd.Function):
    """Makes a stream current in the backward, as autograd does before it accumulates a gradient."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, streams: FakeStreams, number: int) -> Tensor:
        ctx.found = streams, number
        return p.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        streams, number = ctx.found
        streams.current = number
        return g.clone(), None, None


def make(*sizes: int, **options: Any) -> tuple[list[nn.Parameter], ShardedLion]:
    params = [nn.Parameter(torch.zeros(size)) for size in sizes]
    optimizer = ShardedLion(params, lr=0.5, **options)
    source: Any = optimizer._stepper._grads
    source._reducer._rounds._has_streams = True
    return params, optimizer


def step(streams: FakeStreams, params: list[nn.Parameter], arrive_on: list[int], optimizer: ShardedLion) -> None:
    """Gradients arrive in the parameters' order: autograd begins with what the forward has made last."""
    branches = [On.apply(p, streams, number) for p, number in reversed([*zip(params, arrive_on, strict=True)])]
    torch.cat(branches).sum().backward()
    streams.current = USUAL
    optimizer.step()
    optimizer.zero_grad()


in_16_bits_too = pytest.mark.parametrize("reduce_dtype", [None, torch.bfloat16])


@in_16_bits_too
def test_a_bucket_waits_for_every_stream_that_has_its_gradients(
    streams: FakeStreams, reduce_dtype: torch.dtype | None
) -> None:
    """A parameter of 5 elements is copied by the launch and dropped; 128 are sent in its place."""
    params, optimizer = make(256, 5, 384, reduce_dtype=reduce_dtype)
    step(streams, params, [SIDE, OTHER, SIDE], optimizer)
    # The step waits once, for the stream of the launch, which has waited for the other one.
    assert streams.waits == [(SIDE, OTHER), (USUAL, SIDE)]
    kept = {256, 384, 128} if reduce_dtype is None else {256 + 384 + 128}
    assert streams.recorded == {(256, SIDE), (5, SIDE), (384, SIDE), *((numel, USUAL) for numel in kept)}
    for p in params:
        assert (p == -0.5).all()


@in_16_bits_too
def test_buckets_that_are_launched_on_several_streams(streams: FakeStreams, reduce_dtype: torch.dtype | None) -> None:
    params, optimizer = make(256, 384, 512, bucket_mb=1e-4, reduce_dtype=reduce_dtype)
    step(streams, params, [SIDE, OTHER, SIDE], optimizer)
    streams.waits.clear()
    streams.recorded.clear()
    step(streams, params, [SIDE, OTHER, SIDE], optimizer)
    assert streams.waits == [(SIDE, USUAL), (OTHER, SIDE), (SIDE, OTHER), (USUAL, SIDE)]
    # Two buckets are under way. The launch of the third finishes the first, on the stream that launched it.
    assert streams.recorded == {(256, SIDE), (384, OTHER), (512, SIDE), (384, USUAL), (512, USUAL)}


def test_one_stream_waits_for_nothing(streams: FakeStreams) -> None:
    params, optimizer = make(256, 5)
    for _ in range(3):
        step(streams, params, [USUAL, USUAL], optimizer)
    assert not streams.waits
    assert {number for _, number in streams.recorded} == {USUAL}
