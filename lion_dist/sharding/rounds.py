"""Rounds of gradients: from ``p.grad``, bucket by bucket, to the shards of their owners.

Launch of a bucket: its gradients are taken out of ``p.grad``, and their averages are started (bucket_average.py).
Round: one launch of every bucket. A gradient that has not arrived by then counts as zeros.

[Note: Order of collectives]
Ranks match collectives by the order of their calls, and backwards reach parameters in different orders on different
ranks. So every rank launches the buckets of a round in index order: bucket i + 1 waits for bucket i even if its own
gradients are complete. All ranks cut their buckets by the order in which gradients arrived on the group's first rank.

[Note: Tensors under way]
A collective reads its inputs and writes its outputs beside the current stream. Both are kept in `UnderWay` until the
current stream has waited for it; freed earlier, their memory could be handed out again and overwritten. At most
IN_FLIGHT buckets are under way, so that what is kept takes bounded memory, except where a launch must not wait (next
note). Whoever reads `Rounds.grads` calls `Rounds.finish` first.

[Note: Waiting in a backward]
A launch that waits for the oldest bucket waits until the other ranks have launched it. A rank that has yet to reach a
parameter of the bucket, and whose pass never does, launches it when its pass ends, or in the step. If that rank waits
for this one before then, neither goes on. Within one optimizer this cannot happen, since all ranks launch its buckets
in one order. It can where several ShardedLions reduce gradients over several ranks: each of two ranks waits in its
backward for a bucket of another optimizer. So launches wait for nothing there, and up to all of a round's buckets are
under way. The collectives that a model makes in its backward have the same effect, but nothing shows them to this
module; docs/sharded.md says what their users can do.

[Note: Streams]
Gradients arrive on several streams. Autograd accumulates a gradient, and calls its hook, on the stream on which the
forward first used the parameter, and a branch of the model may run on a side stream. FSDP2 reduces gradients, and calls
their hooks, on a separate stream. A bucket is launched on the stream that is current when its last gradient arrives,
when the backward ends, or in the step. So every launch and every `finish` makes the current stream wait for the others
on which gradients have arrived or buckets have been launched. FSDP2's stream waits for the backward's before each
reduction anyway, so this costs no time under FSDP2. Branches of a model wait for each other at every bucket.

torch's allocator reuses freed memory on the stream on which it was allocated, without waiting for other streams. So a
tensor is recorded (`Tensor.record_stream`) on every other stream that reads it or waits for a collective that reads it.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence, Set
from dataclasses import dataclass
from enum import Enum, auto
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from .._torch_compat import foreach_copy_, foreach_zero_
from ..upload import current_stream_number, upload
from .bucket_average import BucketAverage, UnderWay
from .buckets import complete_order, make_buckets
from .collectives import Membership, broadcast_from_first
from .param_grads import ParamGrads
from .shard import Shard

# Number of buckets under way before a launch waits for the oldest. With 256 MiB each, two are enough for the gradients
# of a compiled block, which arrive all at once.
IN_FLIGHT = 2

# Those of the optimizers that reduce gradients over several ranks; see [Note: Waiting in a backward].
_memberships: weakref.WeakSet[Membership] = weakref.WeakSet()


class RoundState(Enum):
    """How far the round of the current interval (see grad_reducer.py) has got on this rank.

    - ``IDLE``: No round is going on. The next gradient to arrive opens one.
    - ``OPEN``: Buckets are launched as their gradients arrive.
    - ``LAUNCHED``: All buckets have been launched. Gradients that arrive now are late and stay in ``p.grad``.
    - ``DROPPED``: The round has ended and its gradients have been zeroed. Gradients that arrive now stay in ``p.grad``
      until the interval ends.
    """

    IDLE = auto()
    OPEN = auto()
    LAUNCHED = auto()
    DROPPED = auto()


@dataclass
class _Destination:
    """Where one parameter's gradient goes.

    Attributes:
        head: number of elements of its head (see layout.py).
        output: this rank's part of the head's average, in the shard; None if there is no head.
        tail: staging memory of the tail; None if there is no tail.
    """

    head: int
    output: Tensor | None
    tail: Tensor | None


class Rounds:
    """Launches the buckets of sharded parameters, which are numbered through all shards.

    Args:
        shards: the parameters, and which rank owns which of their elements.
        kept: for each shard its existing buffer of averages, or None.
        local: the gradients in ``p.grad``, in the order of the parameters.
        membership: the ranks.
        average: averages the gradients of a bucket.
        bucket_bytes: bytes of gradients that are reduced together.

    Attributes:
        grads: this rank's part of the averages, one flat buffer per shard in the dtype that ``average`` makes them,
            laid out as `ShardLayout.slices` says.
        state: state of the round.
        has_averages: whether `grads` hold averages since the last zeroing. A round adds to them if so, and overwrites
            `grads` otherwise.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        kept: Sequence[Tensor | None],
        local: ParamGrads,
        membership: Membership,
        average: BucketAverage,
        bucket_bytes: int,
    ) -> None:
        self.state = RoundState.IDLE
        self.has_averages = False
        self._membership = membership
        self._average = average
        self._bucket_bytes = bucket_bytes
        self._local = local
        self._shards = shards
        self._params = [t for shard in shards for t in shard.locals]  # for their shapes
        self._numbers = [n for shard in shards for n in shard.numbers]
        self._dtypes = [shard.tail_buffer.dtype for shard in shards for _ in shard.params]
        self._device = shards[0].tail_buffer.device if shards else torch.device("cpu")

        self._destinations: list[_Destination] = []
        self._tail_buffers: list[Tensor] = []  # one per shard
        self.grads: list[Tensor] = []
        world_size = dist.get_world_size(membership.group)
        for shard, grad in zip(shards, kept, strict=True):
            layout, like = shard.layout, shard.tail_buffer
            if grad is None:
                grad = like.new_zeros(layout.shard_numel, dtype=average.dtype_of(like.dtype))
            tail_buffer = like.new_zeros(layout.tail_buffer_numel)
            tails = {t.param: tail_buffer[t.offset : t.offset + t.length] for t in layout.tails}
            offset = 0
            for i, head in enumerate(layout.heads):
                length = head // world_size
                output = grad.narrow(0, offset, length) if head else None
                self._destinations.append(_Destination(head, output, tails.get(i)))
                offset += length
            self.grads.append(grad)
            self._tail_buffers.append(tail_buffer)

        self._buckets: tuple[tuple[int, ...], ...] = ()
        self._bucket_of: list[int] = []
        self._last_bucket: list[int] = []  # for each shard
        self._completed_tails: list[list[int]] = []  # for each bucket, the shards whose last tail it has
        self._seen: list[int] | None = []  # the order in which gradients arrive; None once buckets follow it

        self._has_streams = self._device.type == "cuda"
        # Those for which the next launch has to wait, by number; see [Note: Streams].
        self._streams: dict[int, torch.cuda.Stream] = {}

        self._launched = 0  # number of buckets of the current round
        self._awaited: list[set[int]] = []  # for each bucket, the parameters whose gradients have yet to arrive
        # With the index of the bucket and the stream that launched it.
        self._under_way: deque[tuple[int, torch.cuda.Stream | None, UnderWay]] = deque()
        self._in_flight = IN_FLIGHT  # how many may be under way in the current round
        if shards and world_size > 1:
            _memberships.add(membership)
        self._set_order([])

    # Buckets ------------------------------------------------------------------------------------

    def _set_order(self, seen: Sequence[int]) -> None:
        """Makes buckets for gradients that arrive in the order ``seen``, as far as it goes; not during a round."""
        self.finish()  # buckets under way are known by their old indices
        sizes = [p.numel() * p.element_size() for p in self._params]
        self._buckets = make_buckets(sizes, complete_order(seen, len(sizes)), self._bucket_bytes)
        self._bucket_of = [0] * len(sizes)
        for number, bucket in enumerate(self._buckets):
            for i in bucket:
                self._bucket_of[i] = number
        self._last_bucket, self._completed_tails, first = [], [[] for _ in self._buckets], 0
        for number, shard in enumerate(self._shards):
            of_shard = self._bucket_of[first : first + len(shard.params)]
            self._last_bucket.append(max(of_shard))
            if shard.layout.tails:
                self._completed_tails[max(of_shard[t.param] for t in shard.layout.tails)].append(number)
            first += len(shard.params)
        self._average.set_buckets([self._outputs(number) for number in range(len(self._buckets))])

    def _outputs(self, bucket: int) -> list[Tensor]:
        """Where the averages of a bucket go: those of its heads, then those of the tail buffers that it completes."""
        heads = [self._destinations[i].output for i in self._buckets[bucket]]
        shards = self._completed_tails[bucket]
        tails = [self.grads[number][self._shards[number].layout.tail_shard_offset :] for number in shards]
        return [*(head for head in heads if head is not None), *tails]

    @property
    def follows_arrival(self) -> bool:
        """Whether buckets follow the order in which gradients arrive."""
        return self._seen is None

    def learn_order(self) -> None:
        """Makes buckets follow the order in which gradients have arrived on the group's first rank, if any have. A
        collective call, for which the host waits; without effect once buckets follow that order."""
        if self._seen is None:
            return
        numbers = [len(self._seen), *complete_order(self._seen, len(self._params))]
        seen = upload(numbers, torch.int64, self.grads[0].device)
        with self._membership.collective() as group:
            broadcast_from_first([seen], group)
        count, *order = seen.tolist()
        self._set_order(order)
        self._seen = None if count else []

    # Rounds -------------------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """Whether a round is going on."""
        return self.state is RoundState.OPEN or self.state is RoundState.LAUNCHED

    def begin(self, expected: Set[int]) -> None:
        """Opens a round.

        Args:
            expected: the parameters for whose gradients their buckets wait.
        """
        self.finish()
        self.state = RoundState.OPEN
        self._launched = 0
        self._in_flight = len(self._buckets) if self._is_one_of_several() else IN_FLIGHT
        self._awaited = [set(bucket).intersection(expected) for bucket in self._buckets]

    def _is_one_of_several(self) -> bool:
        """Whether other optimizers reduce gradients over several ranks, as this one does."""
        own = self._membership
        return own in _memberships and any(m is not own and not m.failure for m in _memberships)

    def arrived(self, i: int) -> None:
        """Takes note that the gradient of a parameter lies in ``p.grad``, and launches buckets that are complete. A
        gradient whose bucket has been launched stays in ``p.grad``."""
        if self._seen is not None:
            self._seen.append(i)
        if self._has_streams and current_stream_number(self._device) not in self._streams:
            self._current_stream()
        bucket = self._bucket_of[i]
        if bucket < self._launched:
            return
        awaited = self._awaited
        awaited[bucket].discard(i)
        while self._launched < len(awaited) and not awaited[self._launched]:
            self._launch()

    def launch_rest(self) -> None:
        """Launches every bucket that has not been launched."""
        while self._launched < len(self._buckets):
            self._launch()

    def end(self) -> None:
        """Launches the rest of the round and ends it. Call `finish` before reading the averages."""
        self.launch_rest()
        self.state = RoundState.IDLE
        self.has_averages = True

    def drop(self) -> None:
        """Ends the round: launches the rest with zeros, as the other ranks count on it, and leaves ``p.grad`` alone."""
        while self._launched < len(self._buckets):
            self._launch(takes=False)
        self.state = RoundState.DROPPED
        self.has_averages = True

    def end_interval(self) -> None:
        """Lets the next gradient open a round, after one that was dropped too."""
        self.state = RoundState.IDLE

    def finish(self, shard: int | None = None) -> None:
        """Makes what follows on the current stream see the averages of one shard, by its index, or of all."""
        self._join_streams()
        while self._under_way and (shard is None or self._under_way[0][0] <= self._last_bucket[shard]):
            self._finish_oldest()

    def _current_stream(self) -> torch.cuda.Stream:
        """The current stream, for which the next launch will wait."""
        number = current_stream_number(self._device)
        if number not in self._streams:
            self._streams[number] = torch.cuda.current_stream(self._device)
        return self._streams[number]

    def _join_streams(self) -> torch.cuda.Stream | None:
        """Makes the current stream wait for the others. See [Note: Streams].

        Returns:
            The current stream, which has the work of all from now on; None on CPUs.
        """
        if not self._has_streams:
            return None
        current = self._current_stream()
        if len(self._streams) > 1:
            for stream in self._streams.values():
                if stream is not current:
                    current.wait_stream(stream)
            self._streams = {current.cuda_stream: current}
        return current

    @torch.no_grad()  # a backward with create_graph=True enables gradients
    def _launch(self, takes: bool = True) -> None:
        bucket = self._buckets[self._launched]
        if takes:
            self._check(bucket)
        with self._membership.completing("sending gradients"):
            self._send(bucket, takes)

    def _send(self, bucket: Sequence[int], takes: bool) -> None:
        number = self._launched
        stream = self._join_streams()
        self._launched += 1
        if self._launched == len(self._buckets):
            self.state = RoundState.LAUNCHED
        grads = self._local.take(bucket, stream) if takes else [None] * len(bucket)
        inputs: list[Tensor | None] = []
        tails: list[Tensor] = []
        staged: list[Tensor] = []
        missing: list[Tensor] = []
        for i, grad in zip(bucket, grads, strict=True):
            place = self._destinations[i]
            if place.output is not None:
                inputs.append(grad if grad is None or place.tail is None else grad[: place.head])
            if place.tail is not None:
                if grad is None:
                    missing.append(place.tail)
                else:
                    tails.append(grad[place.head :])
                    staged.append(place.tail)
        if missing:
            foreach_zero_(missing)
        if tails:
            foreach_copy_(staged, tails)
        inputs += [self._tail_buffers[shard] for shard in self._completed_tails[number]]
        if not inputs:
            return
        while len(self._under_way) >= self._in_flight:
            self._finish_oldest()
        self._under_way.append((number, stream, self._average.start(number, inputs, self.has_averages)))

    def _check(self, bucket: Sequence[int]) -> None:
        """Raises TypeError for gradients that cannot be reduced into their shards."""
        dtypes, device, strided = self._dtypes, self._device, torch.strided
        for i, grad in zip(bucket, map(self._local.peek, bucket), strict=True):
            if grad is not None and (grad.dtype is not dtypes[i] or grad.device != device or grad.layout != strided):
                self._refuse(i, grad.layout, grad.dtype, grad.device)

    def _refuse(self, i: int, layout: torch.layout, dtype: torch.dtype, device: torch.device) -> NoReturn:
        gradient = f"the gradient of parameter {self._numbers[i]} (shape {tuple(self._params[i].shape)})"
        if layout != torch.strided:
            raise TypeError(
                f"{gradient} has the layout {layout}, but stage 2 needs dense gradients: give the module sparse=False, "
                "or convert the gradient with .to_dense()"
            )
        p = self._params[i]
        remedy = "convert and move the model before you make the optimizer"
        if (p.dtype, p.device) == (self._dtypes[i], self._device):
            remedy = "leave its grad_dtype, and what writes p.grad, at the dtype of the parameter"
        raise TypeError(
            f"{gradient} is {dtype} on {device}, but {self._dtypes[i]} on {self._device} was expected, as the "
            f"parameter was when the optimizer was made: {remedy}"
        )

    def _finish_oldest(self) -> None:
        _, launched_on, oldest = self._under_way.popleft()
        with self._membership.completing("averaging gradients"):
            oldest.wait()
        if self._has_streams and (current := self._current_stream()) != launched_on:
            for t in oldest.kept:
                t.record_stream(current)
