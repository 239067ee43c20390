"""The life of a gradient in stage 2: from autograd's hands to the owner's shard.

Arrival: autograd has added a gradient into ``p.grad`` (a hook tells). Under `no_sync` it stays there; else it
    leaves with its bucket (rounds.py), and ``p.grad`` is None from then on.
Pass: a backward. One in a reentrant checkpoint is part of the one around it, but autograd numbers it anew.
Period: what lies between two calls of `reduce` or `settle`, in which every rank makes the same passes. Each rank
    makes one round in it, whatever its passes reach: the round is launched as the gradients of the first pass arrive,
    the rest of it when that pass ends (or by `reduce`, on a rank that no pass reached). Gradients that arrive after
    their bucket was launched are *late*: those of a second pass, of a pass after zeroing, or of a parameter in several
    reentrant checkpoints. They add up in ``p.grad``. The ranks then exchange what they had, and where any rank has
    late gradients, all make a second round.
Epoch: what lies between two zeroings of the gradients. Its first round overwrites the shards, later ones add.
Active: a parameter of which some rank had a gradient in this epoch; where another had none, it counts as zeros.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from .._torch_compat import current_graph_task_id, disable_dynamo, version_of
from ..memory_order import flat, laid_out_like
from ..upload import upload
from .buckets import complete_order
from .collectives import Membership, broadcast_from_first, start_all_reduce_max
from .grad_hooks import BackwardEnd, GradHooks, in_reentrant_pass_end, when_outer_pass_goes_on
from .rounds import Rounds
from .sentinel import Sentinel
from .shard import Shard

# Devices whose collectives the host waits for in any case, so that it may as well read what comes of them.
WAITING_DEVICES = {"cpu"}

_UNLIKE_PASSES = (
    "gradients arrived after their bucket had been reduced on some ranks, while others made a single backward pass "
    "since the last step(). Did a rank leave out a step()? Where a pass does not reach every rank, put "
    "optimizer.no_sync() around all passes of a step but the last; where the ranks' models differ, checkpoint with "
    "use_reentrant=False"
)
_UNLIKE_ZEROING = (
    "gradients that no step() had used were zeroed, but not those of every rank: either not every rank zeroed them, or "
    "the backward before did not reach every rank. A pass whose gradients are dropped must reach a parameter on every "
    "rank, other than those unfrozen since the last step() (put optimizer.no_sync() around passes that may be dropped)"
)

_UNLIKE_UNFREEZING = (
    "parameters were unfrozen, or have a gradient though they were frozen from the start, on some ranks and not on "
    "others: unfreeze the same ones on every rank before the same step"
)


class GradReducer:
    """Averages the gradients of sharded parameters over a group, each part on the rank that owns it.

    Which collectives a rank makes does not depend on what its backwards reach: a period is one round, one exchange,
    and, if the exchange says so, one more of each.

    Args:
        membership: the ranks.
        bucket_bytes: of gradients that are reduced together.

    Attributes:
        generation: changes whenever gradients do.
        holds: whether gradients that arrive stay in ``p.grad`` until the next `reduce`.
    """

    def __init__(self, membership: Membership, bucket_bytes: int) -> None:
        self._hooks: GradHooks | None = None
        self._sentinel: Sentinel | None = None
        self._membership = membership
        self._world_size = dist.get_world_size(membership.group)
        self._bucket_bytes = bucket_bytes
        self._paused = False  # no_sync()
        self.generation = 0
        self.holds = False

        self._shards: list[Shard] = []
        self._params: list[Tensor] = []
        self._rounds = self._make_rounds({})
        # Of the last `reduce`: uint8, one a parameter, 1 where some rank had a gradient, and three of the ranks'.
        self._flags: Tensor | None = None
        self._flags_under_way: Any = None

        self._learned = False  # the order in which gradients arrive
        self._seen: list[int] = []  # that order, until it is learned
        # Whether any rank has been seen to make several passes in a period, or to use reentrant checkpoints.
        self._expects_late = False

        # A period.
        self._passes: set[int] = set()  # autograd's numbers of those in which gradients arrived
        self._dropped = False  # its round has been made, and what the round brought was zeroed

        # An epoch.
        self._ended_rounds = 0
        self._used = bytearray()  # 1 where a gradient of this rank has left
        # Gradients in p.grad that no round has taken, as autograd left them, with their versions.
        self._late: dict[int, tuple[Tensor, int]] = {}

    # Parameters ---------------------------------------------------------------------------------

    @property
    def grads(self) -> list[Tensor]:
        """This rank's part of the averages, one flat buffer a shard; laid out as the momentum is."""
        return self._rounds.grads

    def _make_rounds(self, kept: dict[tuple[int, ...], Tensor]) -> Rounds:
        grads = [kept.get(tuple(map(id, s.params))) for s in self._shards]
        return Rounds(self._shards, grads, self._membership, self._bucket_bytes)

    def set_shards(self, shards: Sequence[Shard]) -> None:
        """Takes other shards; a collective call. Averages of shards whose parameters stay together are kept; if
        others are lost, a warning says so."""
        self._membership.check()
        self.settle()
        self.finish()
        if self._sentinel is not None:
            self._sentinel.dismiss()
        kept = {tuple(map(id, s.params)): g for s, g in zip(self._shards, self.grads, strict=True)}
        lost = kept.keys() - {tuple(map(id, s.params)) for s in shards}
        if self._ended_rounds and lost:
            warnings.warn("lion_dist: gradients reduced before load_state_dict() were dropped", stacklevel=4)
        gone = {i for ids in lost for i in ids}
        used = {id(p) for p, is_used in zip(self._params, self._used, strict=True) if is_used} - gone
        late = {id(self._params[i]): entry for i, entry in self._late.items()}
        hooked = {id(p) for i, p in enumerate(self._params) if self._hooks is not None and self._hooks.has(i)}
        self.generation += 1  # clipping was computed from other parameters
        self._flags = None
        self._shards = list(shards)
        self._params = [p for shard in shards for p in shard.params]
        self._rounds = self._make_rounds(kept)
        self._used = bytearray(id(p) in used for p in self._params)
        self._late = {i: late[id(p)] for i, p in enumerate(self._params) if id(p) in late}
        for i, p in enumerate(self._params):
            if p.grad is not None and id(p) not in hooked:  # a backward may have reached it
                self._late[i] = p.grad, version_of(p.grad)
        if self._hooks is not None:
            self._hooks.remove()
        self._hooks = GradHooks(self._params, self._arrived, self._taken_over)
        self._sentinel = Sentinel(self._params, self._sentinel_look()) if self._params else None
        if self._sentinel is not None and self._ended_rounds:
            self._sentinel.watch(self._used)
        self._learned = False
        self._seen = []

    def _sentinel_look(self) -> Callable[[], None]:
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
        """Leaves the parameters as if it had never been."""
        if self._hooks is not None:
            self._hooks.remove()
        if self._sentinel is not None:
            self._sentinel.dismiss()

    def __del__(self) -> None:
        self._release()

    # Arrival ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients that arrive within stay in ``p.grad``, at full size."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def _arrived(self, i: int) -> None:
        self._membership.check()
        self.generation += 1
        current = current_graph_task_id()
        sentinel = self._sentinel
        assert sentinel is not None
        if i == sentinel.index and sentinel.watches:
            if sentinel.replaced:
                self._forget()
            else:
                sentinel.saw()  # after `look`
        elif current not in self._passes:
            self._follow_zeroing()
            self._check_by_hand(arrived=i)
        round_begun = self._rounds.is_open or self._dropped
        if self._paused or self.holds:
            if round_begun:
                self._passes.add(current)
            late = bool(round_begun or self._used[i])
        else:
            self._watch_pass()
            if not round_begun:
                self._begin_round()
            if not self._learned:
                self._seen.append(i)
            late = self._dropped or not self._rounds.arrived(i, self._take)
        grad = self._params[i].grad
        if late and grad is not None:
            self._late[i] = grad, version_of(grad)

    def _watch_pass(self) -> None:
        current = current_graph_task_id()
        if current not in self._passes:
            BackwardEnd(self._pass_ended, self._backward_raised)
            self._passes.add(current)

    def _pass_ended(self) -> None:
        if in_reentrant_pass_end():
            self._expects_late = True
            if 1 in self._used:
                self._watch()
            when_outer_pass_goes_on(self._watch_pass)  # no gradient may ever arrive in it
        elif self._rounds.is_open:
            # Now, and not in step(): a collective of the user's own may come between, on the same group.
            self._rounds.launch_rest(self._take)
            self._watch()

    def _watch(self) -> None:
        if self._sentinel is not None:
            self._sentinel.watch(self._used)

    def _backward_raised(self) -> None:
        if self._world_size > 1:
            self._membership.fail("a backward raised an exception while its gradients were being reduced")

    def _begin_round(self) -> None:
        assert self._hooks is not None
        self._rounds.begin(self._hooks.reports, adds=self._ended_rounds > 0)

    def _take(self, i: int) -> Tensor | None:
        """A parameter's gradient, 1-D in the parameter's memory order, which leaves ``p.grad``; or None."""
        p = self._params[i]
        grad = p.grad
        if grad is None or self._is_placeholder(i):
            return None
        self._used[i] = 1
        self._late.pop(i, None)
        p.grad = None
        if self._sentinel is not None and i == self._sentinel.index and self._sentinel.watches:
            self._sentinel.place()
        if grad.is_contiguous() and p.is_contiguous() and grad.shape == p.shape:
            return grad.view(-1)  # the usual case, in a third of the time
        return flat(laid_out_like(grad, p))

    def _end_round(self) -> None:
        if not self._rounds.is_open:
            self._begin_round()
        self._rounds.end(self._take)
        self._ended_rounds += 1
        self._watch()

    # Reduction ----------------------------------------------------------------------------------

    @torch.no_grad()
    def reduce(self, unfrozen: bool = False) -> bool:
        """Ends the period: every gradient of every rank is on its way to `grads`; see `finish`, `active`. A collective
        call. After the first period the host waits for no device, as long as no rank has made several passes in a
        period or used reentrant checkpoints.

        Args:
            unfrozen: whether this rank has parameters to shard that are not sharded yet.

        Returns:
            Whether any rank has.
        """
        self._membership.check()
        if not self._params or self._hooks is None:
            return self._membership.any_rank(unfrozen)[0]
        self._follow_zeroing()
        self._check_by_hand()
        if not self._dropped:
            self._end_round()
        late, any_unfrozen = self._exchange(unfrozen)
        if late:
            self._dropped = False
            self._end_round()
            self._exchange(unfrozen)
        self._dropped = False
        self._late.clear()
        self._passes.clear()
        if not self._learned:
            self._learn()
        self._hooks.add()
        if self._sentinel is not None:
            self._sentinel.hook()
        self.generation += 1
        return any_unfrozen

    @torch.no_grad()
    def settle(self) -> None:
        """Ends the period so that other collectives may follow on every rank, also where a pass reached some ranks
        only: if any rank has made its round, those that have not make theirs. A collective call, for which the host
        waits. Late gradients stay in ``p.grad``."""
        if self._membership.failure or not self._params:
            return
        self._follow_zeroing()
        self._check_by_hand()
        began, dropped, kept = self._membership.any_rank(self._rounds.is_open, self._dropped, not self._dropped)
        if dropped and kept:
            self._fail(_UNLIKE_ZEROING)
        if began:
            self._end_round()
        self._dropped = False
        self._passes.clear()

    def _fail(self, reason: str) -> NoReturn:
        self._membership.fail(reason)
        self._membership.check()
        raise AssertionError("unreachable")

    def _check_by_hand(self, arrived: int = -1) -> None:
        """Raises where a parameter whose gradient has left has another in ``p.grad`` that no backward put there, or
        that was changed since.

        Args:
            arrived: a parameter whose gradient autograd has just put there.
        """
        if not (self._rounds.is_complete if self._rounds.is_open else self._ended_rounds):
            return
        assert self._hooks is not None
        for i, p in enumerate(self._params):
            grad = p.grad
            if grad is None or i == arrived or not self._used[i] or self._is_placeholder(i):
                continue
            left, version = self._late.get(i, (None, 0))
            if (grad is not left or version_of(grad) != version) and self._hooks.has(i):
                number = [n for shard in self._shards for n in shard.numbers][i]
                raise RuntimeError(
                    f"the gradient of parameter {number} (shape {tuple(p.shape)}) was reduced, and something put "
                    "another into p.grad. Stage 2 reduces gradients itself: is the model wrapped in "
                    "DistributedDataParallel? Take it out, or use stage=1. A gradient made by hand belongs in p.grad "
                    "before the backward, or after optimizer.zero_grad()"
                )

    def _exchange(self, unfrozen: bool) -> tuple[bool, bool]:
        """Has the ranks tell each other what they had gradients of; whether any has late ones, and whether any has
        unfrozen parameters.

        A rank for which the host would have to wait for the device reads the outcome only where it has reason to
        expect either: it has some, or other than one pass, or several passes were made before. Any other rank is
        blind to what others alone have, in which case those fail.
        """
        assert self._hooks is not None
        device = self.grads[0].device
        late = self.has_local()
        self._expects_late = self._expects_late or len(self._passes) > 1
        reads = (
            device.type in WAITING_DEVICES
            or late
            or unfrozen
            or self._dropped
            or self._expects_late
            or len(self._passes) != 1
            or not self._learned
            or self._hooks.lacks_some()
        )
        facts = [late, unfrozen, self._expects_late, self._dropped, not self._dropped, not reads]
        flags = upload([*self._used, *facts], torch.uint8, device)
        with self._membership.collective() as group:
            self._flags, self._flags_under_way = flags, start_all_reduce_max(flags, group)
        if not reads:
            return False, False
        self._finish_flags()
        any_late, any_unfrozen, any_expects, any_dropped, any_kept, any_blind = flags[-len(facts) :].tolist()
        self._expects_late = bool(any_expects)
        if any_dropped and any_kept:
            self._fail(_UNLIKE_ZEROING)
        if any_late and any_blind:
            self._fail(_UNLIKE_PASSES)
        if any_unfrozen and any_blind:
            self._fail(_UNLIKE_UNFREEZING)
        return bool(any_late), bool(any_unfrozen)

    def finish(self, shard: int | None = None) -> None:
        """Has what follows on the current stream see the averages: of one shard, by its number, or all."""
        self._rounds.finish(shard)
        if shard is None:
            self._finish_flags()

    def active(self, shard: int) -> Tensor | None:
        """Which parameters of a shard any rank had a gradient of, as of the last `reduce`: uint8, one a parameter
        (and others behind); None: all. To be asked for before what reads it is enqueued."""
        first = sum(len(s.params) for s in self._shards[:shard])
        if all(self._used[first : first + len(self._shards[shard].params)]):
            return None  # known without waiting for the others
        self._finish_flags()
        return None if self._flags is None else self._flags[first:]

    def none_active(self) -> bool:
        """Whether no rank had a gradient of any parameter, as of the last `reduce`. On a rank that had one the host
        does not wait."""
        if not self._params or 1 in self._used:
            return False
        self._finish_flags()
        return self._flags is None or not self._flags[: len(self._params)].any()

    def _finish_flags(self) -> None:
        if self._flags_under_way is not None:
            with self._membership.collective():
                self._flags_under_way.wait()
            self._flags_under_way = None

    @property
    def is_open(self) -> bool:
        """Whether a round is going on."""
        return self._rounds.is_open

    def has_local(self) -> bool:
        """Whether there are gradients that are not in `grads`; raises if those that are have been tampered with."""
        self._follow_zeroing()
        return any(p.grad is not None and not self._is_placeholder(i) for i, p in enumerate(self._params))

    def _is_placeholder(self, i: int) -> bool:
        return self._sentinel is not None and i == self._sentinel.index and self._sentinel.holds_none()

    def _learn(self) -> None:
        """Takes the order that the group's first rank has seen, if it has seen any."""
        seen = upload(
            [len(self._seen), *complete_order(self._seen, len(self._params))], torch.int64, self.grads[0].device
        )
        with self._membership.collective() as group:
            broadcast_from_first([seen], group)
        count, *order = seen.tolist()
        self._rounds.set_order(order)
        self._learned = count > 0
        self._seen = []

    # Zeroing ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def zeroing(self, set_to_none: bool) -> Iterator[None]:
        """Around the zeroing of ``p.grad``: forgets the averages, or makes them zeros that still count as gradients.

        After a backward that no `reduce` has followed, every rank must do so, and the backward must have reached every
        rank. Gradients of later passes then wait in ``p.grad`` for `reduce`."""
        if self._membership.failure:
            yield
            return
        if set_to_none:
            self._forget()
            yield
            return
        if self._sentinel is not None and self._sentinel.zeroed:
            self._forget()  # there is nothing to make zeros of
        self._drop_round()
        self.finish()
        if self._sentinel is not None:
            self._sentinel.remove()
        for grad in self.grads:
            grad.zero_()
        self.generation += 1
        yield
        still = [(i, self._params[i].grad) for i in self._late]
        self._late = {i: (grad, version_of(grad)) for i, grad in still if grad is not None}
        if self._ended_rounds:
            self._watch()

    def _follow_zeroing(self) -> None:
        """Where gradients were set to None behind this object's back (model.zero_grad()), those here go too."""
        if self._sentinel is not None and self._sentinel.gone():
            self._forget()

    def _forget(self) -> None:
        self._drop_round()
        if self._sentinel is not None:
            self._sentinel.remove()
        self._ended_rounds = 0
        self._used = bytearray(len(self._params))
        self._late.clear()
        self._passes.clear()
        self.generation += 1

    def _drop_round(self) -> None:
        """Makes what is left of a round whose gradients are not wanted. The period goes on without another: a rank
        that was not reached by the pass could not know of it."""
        if self._rounds.is_open and not self._membership.failure:
            self._rounds.end(take=lambda i: None)
            self._ended_rounds += 1
            self._dropped = True
