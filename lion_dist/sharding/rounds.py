"""Rounds of gradients: through their buckets, to the shards of their owners.

Launch: a bucket's gradients are taken, and their averages are under way to the shards.
Round: one launch of every bucket, in index order, on every rank, whatever has arrived there: what has not is
    zeros. Collectives match by the order of their calls, so a rank never launches any other way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .._torch_compat import foreach_add_, foreach_copy_, foreach_zero_
from .buckets import complete_order, make_buckets
from .collectives import Membership, Reduction, reduce_scatter_mean
from .shard import Shard

# Buckets under way before the backward waits for the oldest: bounds the memory of gradients that are being sent.
# At 256 MiB each enough for the gradients of a compiled block, which arrive all at once.
IN_FLIGHT = 2

# Gives up the gradient of a parameter, by number: 1-D, in the parameter's memory order, or None.
Take = Callable[[int], Tensor | None]


@dataclass
class _Destination:
    """Where one parameter's gradient goes: its head's average to ``output``, its tail through ``tail`` of the
    pack of its shard (None: it has no head, or no tail)."""

    head: int
    output: Tensor | None
    tail: Tensor | None


@dataclass
class _UnderWay:
    """A launched bucket: what must outlive its reduction, and what is to be added where when it is done."""

    bucket: int
    reduction: Reduction
    kept: list[Tensor]
    sums: list[Tensor]
    addends: list[Tensor]

    def wait(self) -> None:
        self.reduction.wait()
        if self.sums:
            foreach_add_(self.sums, self.addends)


class Rounds:
    """Launches of the buckets of sharded parameters, which are numbered through all shards.

    Args:
        shards: the parameters, and who owns what of them.
        kept: of each shard the buffer of averages that it has already, or None.
        membership: the ranks.
        bucket_bytes: of gradients that are reduced together.

    Attributes:
        grads: this rank's part of the averages, one flat buffer a shard, in the dtype of its parameters;
            laid out as the momentum is.
        is_open: whether a round is going on.
    """

    def __init__(
        self, shards: Sequence[Shard], kept: Sequence[Tensor | None], membership: Membership, bucket_bytes: int
    ) -> None:
        self._membership = membership
        self._bucket_bytes = bucket_bytes
        self._shards = shards
        self._params = [p for shard in shards for p in shard.params]
        self._numbers = [n for shard in shards for n in shard.numbers]
        self._dtypes = [shard.tail_buffer.dtype for shard in shards for _ in shard.params]
        self._device = shards[0].tail_buffer.device if shards else None
        self._places: list[_Destination] = []
        self._packs: list[Tensor] = []
        self.grads: list[Tensor] = []
        world_size = dist.get_world_size(membership.group)
        for shard, grad in zip(shards, kept, strict=True):
            layout, like = shard.layout, shard.tail_buffer
            grad = like.new_zeros(layout.shard_numel) if grad is None else grad
            pack = like.new_zeros(layout.tail_buffer_numel)
            tails = {t.param: pack[t.offset : t.offset + t.length] for t in layout.tails}
            offset = 0
            for i, head in enumerate(layout.heads):
                length = head // world_size
                output = grad.narrow(0, offset, length) if head else None
                self._places.append(_Destination(head, output, tails.get(i)))
                offset += length
            self.grads.append(grad)
            self._packs.append(pack)

        self._buckets: tuple[tuple[int, ...], ...] = ()
        self._bucket_of: list[int] = []
        self._last_bucket: list[int] = []  # of each shard
        self._packs_of: list[list[int]] = []  # of each bucket: shards whose tails are complete with it

        self.is_open = False
        self._adds = False
        self._launched = 0
        self._missing: list[int] = []  # of each bucket, how many gradients have yet to arrive
        self._has_arrived = bytearray()
        self._under_way: deque[_UnderWay] = deque()
        self.set_order([])

    def set_order(self, seen: Sequence[int]) -> None:
        """Buckets for gradients that arrive in the order ``seen``, as far as it goes. Not in a round."""
        self.finish()  # what is under way goes by the old buckets' numbers
        sizes = [p.numel() * p.element_size() for p in self._params]
        self._buckets = make_buckets(sizes, complete_order(seen, len(sizes)), self._bucket_bytes)
        self._bucket_of = [0] * len(sizes)
        for number, bucket in enumerate(self._buckets):
            for i in bucket:
                self._bucket_of[i] = number
        self._last_bucket, self._packs_of, first = [], [[] for _ in self._buckets], 0
        for number, shard in enumerate(self._shards):
            of_shard = self._bucket_of[first : first + len(shard.params)]
            self._last_bucket.append(max(of_shard))
            if shard.layout.tails:
                self._packs_of[max(of_shard[t.param] for t in shard.layout.tails)].append(number)
            first += len(shard.params)

    def begin(self, expected: Callable[[int], bool], adds: bool) -> None:
        """Opens a round.

        Args:
            expected: of a parameter, whether its bucket waits for its gradient.
            adds: to the averages that are there, instead of overwriting them.
        """
        self.finish()
        self.is_open = True
        self._adds = adds
        self._launched = 0
        self._has_arrived = bytearray(len(self._params))
        self._missing = [sum(map(expected, bucket)) for bucket in self._buckets]

    def arrived(self, i: int, take: Take) -> bool:
        """Takes note that a gradient is there, and launches what is complete.

        Returns:
            Whether it came in time: its bucket had not been launched.
        """
        bucket = self._bucket_of[i]
        if bucket < self._launched:
            return False
        if self._has_arrived[i]:
            return True
        self._has_arrived[i] = 1
        self._missing[bucket] -= 1
        while self._launched < len(self._buckets) and not self._missing[self._launched]:
            self._launch(take)
        return True

    @property
    def is_complete(self) -> bool:
        """Whether every bucket of the round has been launched."""
        return self._launched == len(self._buckets)

    def launch_rest(self, take: Take) -> None:
        while self._launched < len(self._buckets):
            self._launch(take)

    def end(self, take: Take) -> None:
        """Launches the rest of the round; see `finish`."""
        self.launch_rest(take)
        self.is_open = False

    def finish(self, shard: int | None = None) -> None:
        """Has what follows on the current stream see the averages: of one shard, by its number, or all."""
        while self._under_way and (shard is None or self._under_way[0].bucket <= self._last_bucket[shard]):
            self._finish_oldest()

    @torch.no_grad()  # a backward with create_graph=True enables them
    def _launch(self, take: Take) -> None:
        number = self._launched
        bucket = self._buckets[number]
        for i in bucket:
            self._check(i)
        self._launched += 1
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []
        tails: list[Tensor] = []
        packed: list[Tensor] = []
        unused: list[Tensor] = []
        for i in bucket:
            place, grad = self._places[i], take(i)
            if place.output is not None:
                if grad is None:
                    inputs.append(self._params[i].new_zeros(place.head))
                else:
                    inputs.append(grad if place.tail is None else grad[: place.head])
                outputs.append(place.output)
            if place.tail is not None:
                if grad is None:
                    unused.append(place.tail)
                else:
                    tails.append(grad[place.head :])
                    packed.append(place.tail)
        if unused:
            foreach_zero_(unused)
        if tails:
            foreach_copy_(packed, tails)
        for shard in self._packs_of[number]:
            inputs.append(self._packs[shard])
            outputs.append(self.grads[shard][self._shards[shard].layout.tail_shard_offset :])
        if not inputs:
            return
        while len(self._under_way) >= IN_FLIGHT:
            self._finish_oldest()
        addends = [torch.empty_like(output) for output in outputs] if self._adds else []
        with self._membership.collective() as group:
            reduction = reduce_scatter_mean(addends or outputs, inputs, group)
        self._under_way.append(_UnderWay(number, reduction, inputs, outputs if addends else [], addends))

    def _check(self, i: int) -> None:
        """Raises for a gradient that cannot be reduced into the shard made for it."""
        p = self._params[i]
        grad = p.grad
        if grad is None:
            return
        who = f"gradient of parameter {self._numbers[i]} (shape {tuple(p.shape)})"
        if grad.layout != torch.strided:
            raise TypeError(f"{who} is {grad.layout}; stage 2 needs dense gradients (sparse=False, or .to_dense())")
        if grad.dtype != self._dtypes[i] or grad.device != self._device:
            raise TypeError(
                f"{who} is {grad.dtype} on {grad.device}; expected {self._dtypes[i]} on {self._device}, as the "
                "parameter was when the optimizer was made: convert and move the model before that"
            )

    def _finish_oldest(self) -> None:
        # On the current stream, which is also where the memory of what is then let go will be used again.
        with self._membership.collective():
            self._under_way.popleft().wait()
