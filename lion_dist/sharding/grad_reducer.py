"""The life of a gradient in stage 2: from autograd to the owner's shard.

Arrival: autograd has added a gradient into ``p.grad``, and a hook says so. Under `no_sync` the gradient stays there.
    Otherwise it leaves with its bucket (rounds.py), and ``p.grad`` is None from then on.
Pass: one call of backward(). Autograd gives a pass within a reentrant checkpoint a number of its own; here it counts
    as part of the pass around it.
Interval: the time between two calls of `reduce` or `settle`. Every rank makes the same passes in it.
Accumulation: the time between two zeroings of the gradients, in which they add up. See [Note: States of a gradient].
Late gradient: one that arrives after its bucket was launched. It adds up in ``p.grad`` until the interval ends.
Active parameter: one of which some rank had a gradient in this accumulation. The other ranks contribute zeros.

[Note: Collectives of an interval]
Which collectives a rank makes must not depend on what its passes reach, as other ranks may reach other parameters:

1. One round. It begins when the first gradient of the interval arrives, and the end of that pass launches the buckets
   that are left. A rank that no pass reached makes the whole round in `reduce`.
2. One exchange of flags, in `reduce` (flag_exchange.py).
3. If any rank has late gradients, one more round and one more exchange. Gradients are late in a second pass, in a pass
   after a zeroing, and of a parameter that several reentrant checkpoints use.

The rest of a round is launched at the end of the pass and not in step(), since the user may make a collective of their
own on the same group in between, which would come first on one rank and second on another. A round whose gradients are
zeroed is completed with zeros for the same reason, and the interval gets no other: a rank that the zeroed pass did not
reach could not know of it. Gradients that arrive after the zeroing are therefore late.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from .._torch_compat import current_graph_task_id, disable_dynamo
from ..upload import refuse_capture
from .bucket_average import BucketAverage
from .collectives import Membership
from .flag_exchange import UNLIKE_ZEROING, FlagExchange, fail
from .grad_hooks import BackwardEnd, GradHooks, in_reentrant_pass_end, when_outer_pass_goes_on
from .param_grads import ParamGrads
from .rounds import Rounds, RoundState
from .sentinel import Sentinel
from .shard import Shard


def _ids(shard: Shard) -> tuple[int, ...]:
    return tuple(map(id, shard.params))


class GradReducer:
    """Averages the gradients of sharded parameters over a group, each part on the rank that owns it.

    See [Note: Collectives of an interval].

    Args:
        membership: the ranks.
        average: averages the gradients of a bucket.
        bucket_bytes: bytes of gradients that are reduced together.

    Attributes:
        generation: a number that changes whenever gradients do.
        holds: whether gradients that arrive stay in ``p.grad`` until the next `reduce`, as they do in `no_sync`. It is
            set from outside, while gradients are clipped or measured that no step has used.
    """

    def __init__(self, membership: Membership, average: BucketAverage, bucket_bytes: int) -> None:
        self.generation = 0
        self.holds = False
        self._in_no_sync = False
        self._membership = membership
        self._average = average
        self._bucket_bytes = bucket_bytes
        self._passes: set[int] = set()  # autograd's numbers of this interval's passes in which gradients arrived
        self._shards: list[Shard] = []
        self._firsts: list[int] = []  # for each shard, the index of its first parameter among those of all shards
        self._local = ParamGrads([])
        self._hooks = GradHooks([], self._arrived, self._taken_over)
        self._sentinel = Sentinel(self._local, self._make_look())  # see [Note: Sentinel]
        self._rounds = Rounds([], [], self._local, membership, average, bucket_bytes)
        self._flags = FlagExchange(membership)

    # Parameters ---------------------------------------------------------------------------------

    @property
    def grads(self) -> list[Tensor]:
        """This rank's part of the averages: one flat buffer per shard, laid out as `ShardLayout.slices` says."""
        return self._rounds.grads

    def set_shards(self, shards: Sequence[Shard]) -> None:
        """Replaces the shards; a collective call.

        Averages are kept for each shard whose parameters are those of an earlier shard. A warning says if others are
        lost.
        """
        self._membership.check()
        self.settle()
        self.finish()
        self._sentinel.dismiss()
        kept = {_ids(s): g for s, g in zip(self._shards, self.grads, strict=True)}
        lost = kept.keys() - set(map(_ids, shards))
        had_averages = self._rounds.has_averages
        if had_averages and lost:
            warnings.warn("lion_dist: gradients reduced before load_state_dict() were dropped", stacklevel=9)
        self.generation += 1  # clipping was computed from other parameters
        self._flags.forget()
        self._shards = list(shards)
        self._firsts = list(accumulate((len(s.params) for s in shards), initial=0))
        local = ParamGrads([p for shard in shards for p in shard.params])
        local.carry_over(self._local, {i for ids in lost for i in ids}, self._hooks.has)
        self._hooks.remove()
        self._hooks = GradHooks(local.params, self._arrived, self._taken_over)
        self._local = local
        self._sentinel = Sentinel(local, self._make_look())
        buffers = [kept.get(_ids(s)) for s in shards]
        self._rounds = Rounds(self._shards, buffers, local, self._membership, self._average, self._bucket_bytes)
        self._rounds.has_averages = had_averages
        if had_averages:
            self._sentinel.watch()

    def _make_look(self) -> Callable[[], None]:
        """A function for the sentinel to call before autograd adds to its gradient. It does not keep this object alive,
        see [Note: Callbacks keep nothing alive]."""
        self_ref = weakref.ref(self)

        @disable_dynamo
        def look() -> None:
            reducer = self_ref()
            if reducer is not None and current_graph_task_id() not in reducer._passes:
                reducer._follow_zeroing()
                reducer._check_by_hand()

        return look

    def _taken_over(self) -> None:
        self._release()
        self._membership.leave("its parameters have been given to another ShardedLion")

    def _release(self) -> None:
        """Removes everything from the parameters that this object has put there."""
        self._hooks.remove()
        self._sentinel.dismiss()

    def __del__(self) -> None:
        self._release()

    # Arrival ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients that arrive in this context stay in ``p.grad``, at full size."""
        refuse_capture("no_sync() of ShardedLion")
        before, self._in_no_sync = self._in_no_sync, True
        try:
            yield
        finally:
            self._in_no_sync = before

    def _arrived(self, i: int) -> None:
        """Runs for each parameter in each pass: this is a hot path of the host."""
        if self._membership.failure:
            self._membership.check()
        self.generation += 1
        current = current_graph_task_id()
        local, rounds = self._local, self._rounds
        if i == local.stand_in:
            if self._sentinel.replaced:
                self._forget()
            self._sentinel.arrived()
        elif current not in self._passes:
            self._follow_zeroing()
            self._check_by_hand(arrived=i)
        local.arrived(i)
        # FSDP2 may reduce outside of a backward, as for torch's pipelines. No callback can then be registered.
        if self._in_no_sync or self.holds or current < 0:
            if rounds.state is not RoundState.IDLE:
                self._passes.add(current)
            return
        if current not in self._passes:
            refuse_capture("a backward whose gradients ShardedLion(stage=2) reduces")
            self._watch_pass(current)
        if rounds.state is RoundState.IDLE:
            rounds.begin(self._hooks.reporting())
        rounds.arrived(i)

    def _watch_pass(self, number: int) -> None:
        BackwardEnd(self._pass_ended, self._backward_raised, after_others=self._local.sharded)
        self._passes.add(number)

    def _watch_outer_pass(self) -> None:
        current = current_graph_task_id()
        if current not in self._passes:
            self._watch_pass(current)

    def _pass_ended(self) -> None:
        if in_reentrant_pass_end():
            self._flags.expects_late = True
            if any(self._local.have_left()):
                self._sentinel.watch()
            when_outer_pass_goes_on(self._watch_outer_pass)  # in which no other gradient may ever arrive
        elif self._rounds.is_open:
            self._rounds.launch_rest()
            self._sentinel.watch()

    def _backward_raised(self) -> None:
        if self._membership.group.size() > 1:
            self._membership.fail("a backward raised an exception while its gradients were being reduced")

    # Reduction ----------------------------------------------------------------------------------

    @torch.no_grad()
    def reduce(self, unfrozen: bool = False) -> bool:
        """Ends the interval: starts the reduction of every gradient of every rank into `grads`. A collective call.

        Call `finish`, and `active`, before reading `grads`. After the first interval the host waits for no device, as
        long as no rank has made several passes in an interval or used reentrant checkpoints.

        Args:
            unfrozen: whether this rank has parameters that are trainable and not sharded yet.

        Returns:
            Whether any rank has such parameters.
        """
        self._membership.check()
        if not self._shards:
            return self._membership.any_rank(unfrozen)[0]
        self._follow_zeroing()
        self._check_by_hand()
        if self._rounds.state is not RoundState.DROPPED:
            self._end_round()
        late, any_unfrozen = self._exchange(unfrozen)
        if late:
            self._end_round()
            self._exchange(unfrozen)
        self._local.release_records()
        self._end_interval()
        self._rounds.learn_order()
        self._hooks.add()
        self._sentinel.hook()
        self.generation += 1
        return any_unfrozen

    @torch.no_grad()
    def settle(self) -> None:
        """Ends the interval so that other collectives can follow on every rank, even if a pass reached some ranks only.

        If any rank has begun its round, all ranks make theirs. Late gradients stay in ``p.grad``. A collective call,
        for which the host waits.
        """
        if self._membership.failure or not self._shards:
            return
        self._follow_zeroing()
        self._check_by_hand()
        dropped = self._rounds.state is RoundState.DROPPED
        any_began, any_dropped, any_kept = self._membership.any_rank(self._rounds.is_open, dropped, not dropped)
        if any_dropped and any_kept:
            fail(self._membership, UNLIKE_ZEROING)
        if any_began:
            self._end_round()
        self._end_interval()

    def _end_round(self) -> None:
        if not self._rounds.is_open:
            self._rounds.begin(self._hooks.reporting())
        self._rounds.end()
        self._sentinel.watch()

    def _end_interval(self) -> None:
        self._rounds.end_interval()
        self._passes.clear()

    def _exchange(self, unfrozen: bool) -> tuple[bool, bool]:
        """Whether any rank has late gradients, and whether any has unfrozen parameters."""
        late = self.has_local()
        passes = len(self._passes)
        self._flags.expects_late = self._flags.expects_late or passes > 1
        return self._flags.exchange(
            self._local.have_left(),
            self.grads[0].device,
            late=late,
            unfrozen=unfrozen,
            dropped=self._rounds.state is RoundState.DROPPED,
            suspects=passes != 1 or not self._rounds.follows_arrival or self._hooks.lacks_some(),
        )

    def _check_by_hand(self, arrived: int = -1) -> None:
        """Raises RuntimeError where something other than autograd has put a gradient into ``p.grad`` of a parameter
        whose gradient has left, or has changed it. See [Note: States of a gradient].

        Args:
            arrived: index of a parameter to which autograd has just added.
        """
        state = self._rounds.state
        if state is RoundState.OPEN or (state is not RoundState.LAUNCHED and not self._rounds.has_averages):
            return  # Gradients are waiting for their buckets, or none has left.
        i = self._local.first_tampered(arrived, self._hooks.has)
        if i is not None:
            number = [n for shard in self._shards for n in shard.numbers][i]
            raise RuntimeError(
                f"the gradient of parameter {number} (shape {tuple(self._local.params[i].shape)}) was reduced, and "
                "then something other than autograd put a gradient into its p.grad, which should be None. Stage 2 "
                "reduces gradients itself: is the model wrapped in DistributedDataParallel? Unwrap it, or use stage=1. "
                "Put a gradient that you make by hand into p.grad before the backward, or after optimizer.zero_grad()"
            )

    # Outcome ------------------------------------------------------------------------------------

    def finish(self, shard: int | None = None) -> None:
        """Makes what follows on the current stream see the averages of one shard, by its index, or of all."""
        self._rounds.finish(shard)
        if shard is None:
            self._flags.finish()

    def active(self, shard: int) -> Tensor | None:
        """Which parameters of a shard are active, as of the last `reduce`. Call this before enqueuing the kernel that
        reads it.

        Returns:
            uint8, shape (at least the number of the shard's parameters,), of which only the first are meant. None if
            all are active.
        """
        return self._flags.active(self._firsts[shard], len(self._shards[shard].params))

    def none_active(self) -> bool:
        """Whether there are parameters and none is active, as of the last `reduce`. The host does not wait if this rank
        had a gradient."""
        return bool(self._shards) and self._flags.none_active()

    @property
    def is_open(self) -> bool:
        """Whether a round is going on."""
        return self._rounds.is_open

    def has_local(self) -> bool:
        """Whether there are gradients in ``p.grad``, which are not in `grads`.

        Raises:
            RuntimeError: gradients that have left were scaled or replaced; see [Note: Sentinel].
        """
        self._follow_zeroing()
        return self._local.any_gradient()

    # Zeroing ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def zeroing(self, set_to_none: bool) -> Iterator[None]:
        """Context for zeroing ``p.grad``.

        After a backward that no `reduce` has followed, every rank must zero, and the backward must have reached every
        rank. Gradients of later passes then wait in ``p.grad`` for `reduce`.

        Args:
            set_to_none: whether averages are forgotten. Otherwise they become zeros, which still count as gradients.
        """
        if self._membership.failure:
            yield
            return
        if set_to_none:
            self._forget()
            yield
            return
        if self._sentinel.zeroed:
            self._forget()  # The user has set them to None, so that none are left to become zeros.
        self._drop_round()
        self.finish()
        self._sentinel.remove()
        for grad in self.grads:
            grad.zero_()
        self.generation += 1
        yield
        self._local.record_zeroed()
        if self._rounds.has_averages:
            self._sentinel.watch()

    def _follow_zeroing(self) -> None:
        """Forgets the averages if gradients were set to None without this object, as model.zero_grad() does."""
        if self._sentinel.noticed_zeroing():
            self._forget()

    def _forget(self) -> None:
        """Ends the accumulation."""
        self._drop_round()
        self._sentinel.remove()
        self._rounds.has_averages = False
        self._local.forget()
        self._passes.clear()
        self.generation += 1

    def _drop_round(self) -> None:
        """Completes a round whose gradients have been zeroed; see [Note: Collectives of an interval]."""
        if self._rounds.is_open and not self._membership.failure:
            self._rounds.drop()
