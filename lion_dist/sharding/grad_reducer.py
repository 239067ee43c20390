"""The life of a gradient in stage 2: from autograd's hands, through its bucket, to the owner's shard.

Arrival: autograd has added a gradient into ``p.grad`` (a post-accumulate hook). Under `no_sync` it stays there.
Launch: a bucket's gradients leave ``p.grad``, which is None from then on, and their averages are under way to
    the shards of their owners.
Round: one launch of every bucket, in index order, on every rank, whatever has arrived there: what has not is
    zeros. Collectives match by the order of their calls, so a rank never launches any other way.
Pass: a backward. One in a reentrant checkpoint is part of the one around it, but autograd numbers it anew.
Period: what lies between two calls of `reduce`, in which every rank makes the same passes. Its first round is
    launched as the gradients of its first pass arrive, the rest of it when that pass ends (or by `reduce`, on a
    rank that no pass reached). Gradients that arrive after their bucket was launched are *late*: of a second
    pass, or of a parameter in several reentrant checkpoints. They add up in ``p.grad``, and `reduce` makes a
    second round of them.
Epoch: what lies between two zeroings of the gradients. Its first round overwrites the shards, later ones add.
Active: a parameter of which some rank had a gradient in this epoch; where another had none, it counts as zeros.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..memory_order import flat, laid_out_like
from ..upload import upload
from .buckets import complete_order, make_buckets
from .collectives import Reduction, all_reduce_max, broadcast_from_first, explaining, fail_group, reduce_scatter_mean
from .shard import Shard
from .witness import Witness

# Buckets under way before the backward waits for the oldest: bounds the memory of gradients that are being sent.
IN_FLIGHT = 2


@dataclass
class _Place:
    """Where one parameter's gradient goes: its head's average to ``output``, its tail through ``tail`` of the
    pack of shard number ``shard`` (None: it has no head, or no tail)."""

    shard: int
    head: int
    output: Tensor | None
    tail: Tensor | None


@dataclass
class _UnderWay:
    """A launched bucket: what must outlive its reduction, and what is to be added where when it is done."""

    reduction: Reduction
    kept: list[Tensor]
    sums: list[Tensor]
    addends: list[Tensor]

    def wait(self) -> None:
        self.reduction.wait()
        if self.sums:
            torch._foreach_add_(self.sums, self.addends)


class _Hook:
    """A parameter's post-accumulate hook. It must not keep its reducer alive: parameters outlive optimizers."""

    def __init__(self, reducer: GradReducer, index: int) -> None:
        self.reducer = weakref.ref(reducer)
        self._index = index

    def __call__(self, _: Tensor) -> None:
        if torch.compiler.is_compiling():
            raise RuntimeError("ShardedLion with stage=2 does not work under compiled autograd; use stage=1")
        reducer = self.reducer()
        if reducer is not None:
            reducer._arrived(self._index)


class _Backward:
    """Given to autograd to call when a backward has ended; autograd drops it uncalled if one raises."""

    def __init__(self, reducer: GradReducer) -> None:
        self._reducer = weakref.ref(reducer)
        self._ended = False

    def __call__(self) -> None:
        self._ended = True
        reducer = self._reducer()
        if reducer is not None:
            reducer._pass_ended()

    def __del__(self) -> None:
        reducer = self._reducer()
        if not self._ended and reducer is not None:
            reducer._backward_raised()


class GradReducer:
    """Averages the gradients of sharded parameters over a group, each part on the rank that owns it.

    Args:
        group: the ranks.
        bucket_bytes: of gradients that are reduced together.

    Attributes:
        grads: this rank's part of the averages, one flat buffer a shard, in the dtype of its parameters;
            laid out as the momentum is.
        active: uint8 on the shards' device, one a parameter (and a few more behind); as of the last `reduce`.
        generation: changes whenever gradients do.
    """

    def __init__(self, group: dist.ProcessGroup, bucket_bytes: int) -> None:
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._witness: Witness | None = None
        self._group = group
        self._world_size = dist.get_world_size(group)
        self._bucket_bytes = bucket_bytes
        self._failure: str | None = None
        self._paused = False  # no_sync()
        self.generation = 0

        self._shards: list[Shard] = []
        self.grads: list[Tensor] = []
        self._packs: list[Tensor] = []
        self._params: list[Tensor] = []
        self._places: list[_Place] = []
        self._hooked = bytearray()
        self.active: Tensor | None = None

        self._buckets: tuple[tuple[int, ...], ...] = ()
        self._bucket_of: list[int] = []
        self._learned = False  # the order
        self._seen: list[int] = []  # the order in which gradients arrived, until it is learned

        # A period.
        self._open = False  # its first round
        self._launched = 0
        self._missing: list[int] = []  # of each bucket, how many gradients have yet to arrive
        self._has_arrived = bytearray()
        self._passes: set[int] = set()  # autograd's numbers of the passes in which gradients arrived
        self._under_way: deque[_UnderWay] = deque()

        self._reentrant = False  # whether any rank has ever been seen to use reentrant checkpoints

        # An epoch.
        self._rounds = 0
        self._used = bytearray()  # 1 where this rank had a gradient

    # Parameters ---------------------------------------------------------------------------------

    def set_shards(self, shards: Sequence[Shard]) -> None:
        """Takes other shards; a collective call. Averages of shards whose parameters stay together are kept; if
        others are lost, a warning says so."""
        self._check_usable()
        self._follow_zeroing()
        if self._open:
            self._end_round()
        if self._witness is not None:
            self._witness.dismiss()
        kept = {tuple(map(id, s.params)): g for s, g in zip(self._shards, self.grads, strict=True)}
        lost = kept.keys() - {tuple(map(id, s.params)) for s in shards}
        if self._rounds and lost:
            warnings.warn("lion_dist: gradients reduced before load_state_dict() were dropped", stacklevel=4)
        gone = {i for ids in lost for i in ids}
        used = {id(p) for p, is_used in zip(self._params, self._used, strict=True) if is_used} - gone
        self._shards = list(shards)
        self.grads, self._packs, self._params, self._places = [], [], [], []
        for number, shard in enumerate(shards):
            layout, device, dtype = shard.layout, shard.pack.device, shard.pack.dtype
            grad = kept.get(tuple(map(id, shard.params)))
            if grad is None:
                grad = torch.zeros(layout.shard_numel, dtype=dtype, device=device)
            pack = torch.zeros(layout.pack_numel, dtype=dtype, device=device)
            tails = {t.param: pack[t.pack_offset : t.pack_offset + t.length] for t in layout.tails}
            offset = 0
            for i, head in enumerate(layout.heads):
                length = head // self._world_size
                self._places.append(
                    _Place(number, head, grad.narrow(0, offset, length) if head else None, tails.get(i))
                )
                offset += length
            self.grads.append(grad)
            self._packs.append(pack)
            self._params += shard.params
        self._used = bytearray(id(p) in used for p in self._params)
        self._set_hooks()
        self._witness = Witness(self._params, self._witness_look()) if self._params else None
        if self._witness is not None and self._rounds:
            self._witness.place()
        self._learned = False
        self._seen = []
        self._set_order([])

    def _set_order(self, seen: list[int]) -> None:
        sizes = [p.numel() * p.element_size() for p in self._params]
        self._buckets = make_buckets(sizes, complete_order(seen, len(sizes)), self._bucket_bytes)
        self._bucket_of = [0] * len(sizes)
        for number, bucket in enumerate(self._buckets):
            for i in bucket:
                self._bucket_of[i] = number

    def _set_hooks(self) -> None:
        self._remove_hooks()
        self._hooked = bytearray(len(self._params))
        self._hook_trainable()

    def _hook_trainable(self) -> None:
        """Hooks the parameters that have none yet, but for frozen ones, which take none."""
        for i, p in enumerate(self._params):
            if self._hooked[i] or not p.requires_grad:
                continue
            for hook in list((getattr(p, "_post_accumulate_grad_hooks", None) or {}).values()):
                other = hook.reducer() if isinstance(hook, _Hook) else None
                if other is not None and other is not self:
                    other._release()
                    other._failure = "its parameters have been given to another ShardedLion"
            self._hooks.append(p.register_post_accumulate_grad_hook(_Hook(self, i)))
            self._hooked[i] = 1

    def _witness_look(self) -> Callable[[], None]:
        self_ref = weakref.ref(self)

        def look() -> None:
            reducer = self_ref()
            if reducer is not None and torch._C._current_graph_task_id() not in reducer._passes:
                reducer._follow_zeroing()

        return look

    def _remove_hooks(self) -> None:
        for handle in self._hooks:
            handle.remove()
        self._hooks = []

    def _release(self) -> None:
        """Leaves the parameters as if it had never been."""
        self._remove_hooks()
        if self._witness is not None:
            self._witness.dismiss()

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
        self._check_usable()
        self.generation += 1
        current = torch._C._current_graph_task_id()
        witness = self._witness
        assert witness is not None
        if i == witness.index:
            if witness.watches:
                witness.saw()  # after `look`
        elif current not in self._passes:
            self._follow_zeroing()
        if self._paused:
            if self._open:  # its bucket may be on its way already
                self._passes.add(current)
            return
        if current not in self._passes:
            self._passes.add(current)
            torch.autograd.Variable._execution_engine.queue_callback(_Backward(self))
        if not self._open:
            self._begin_round()
        if not self._learned:
            self._seen.append(i)
        bucket = self._bucket_of[i]
        if self._has_arrived[i] or bucket < self._launched:
            return
        self._has_arrived[i] = 1
        self._missing[bucket] -= 1
        while self._launched < len(self._buckets) and not self._missing[self._launched]:
            self._launch(self._take)

    def _begin_round(self) -> None:
        self._open = True
        self._launched = 0
        self._has_arrived = bytearray(len(self._params))
        self._missing = [
            sum(self._hooked[i] and self._params[i].requires_grad for i in bucket) for bucket in self._buckets
        ]
        if self._witness is not None and not self._witness.watches:
            self._witness.place()

    def _pass_ended(self) -> None:
        if torch._C._current_autograd_node() is not None:  # a reentrant checkpoint's: the pass around it goes on
            self._reentrant = True
        elif self._open:
            # Now, and not in step(): a collective of the user's own may come between, on the same group.
            self._launch_rest(self._take)

    # Failure ------------------------------------------------------------------------------------

    def _backward_raised(self) -> None:
        if self._world_size > 1:
            self._fail("a backward raised an exception while its gradients were being reduced")

    def _fail(self, reason: str) -> None:
        """The ranks no longer fit together: leaves word for the others, and lets nothing go on here."""
        if self._failure is None:
            self._failure = f"{reason}. Its process group has been aborted; restart from a checkpoint"
            fail_group(self._group, reason)

    @contextlib.contextmanager
    def _collective(self) -> Iterator[None]:
        try:
            with explaining(self._group):
                yield
        except RuntimeError as error:
            self._failure = self._failure or str(error)
            raise

    def _check_usable(self) -> None:
        if self._failure is not None:
            raise RuntimeError(f"this ShardedLion can go on no more: {self._failure}")

    # Launch -------------------------------------------------------------------------------------

    def _check(self, i: int) -> None:
        """Raises for a gradient that cannot be reduced into the shard made for it."""
        p, pack = self._params[i], self._packs[self._places[i].shard]
        grad = p.grad
        if grad is None:
            return
        who = f"gradient of parameter {i} (shape {tuple(p.shape)})"
        if grad.layout != torch.strided:
            raise TypeError(f"{who} is {grad.layout}; stage 2 needs dense gradients (sparse=False, or .to_dense())")
        if grad.dtype != pack.dtype or grad.device != pack.device:
            raise TypeError(
                f"{who} is {grad.dtype} on {grad.device}; expected {pack.dtype} on {pack.device}, as the parameter was "
                "when the optimizer was made: convert and move the model before that"
            )

    def _take(self, i: int) -> Tensor | None:
        """A parameter's gradient, 1-D in the parameter's memory order, which leaves ``p.grad``; or None."""
        p = self._params[i]
        grad = p.grad
        if grad is None or self._is_placeholder(i):
            return None
        self._used[i] = 1
        p.grad = None
        if self._witness is not None and i == self._witness.index:
            self._witness.place()
        return flat(laid_out_like(grad, p))

    @torch.no_grad()  # a backward with create_graph=True enables them
    def _launch(self, take: Callable[[int], Tensor | None]) -> None:
        """Launches the next bucket of the round."""
        bucket = self._buckets[self._launched]
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
                head = self._params[i].new_zeros(place.head) if grad is None else grad[: place.head]
                inputs.append(head)
                outputs.append(place.output)
            if place.tail is not None:
                if grad is None:
                    unused.append(place.tail)
                else:
                    tails.append(grad[place.head :])
                    packed.append(place.tail)
        if unused:
            torch._foreach_zero_(unused)
        if tails:
            torch._foreach_copy_(packed, tails)
        if self._launched == len(self._buckets):  # the last one takes the packs along
            for shard, grad, pack in zip(self._shards, self.grads, self._packs, strict=True):
                if pack.numel():
                    inputs.append(pack)
                    outputs.append(grad[shard.layout.pack_shard_offset :])
        if not inputs:
            return
        while len(self._under_way) >= IN_FLIGHT:
            self._finish_oldest()
        addends = [torch.empty_like(output) for output in outputs] if self._rounds else []
        with self._collective():
            reduction = reduce_scatter_mean(addends or outputs, inputs, self._group)
        self._under_way.append(_UnderWay(reduction, inputs, outputs if addends else [], addends))

    def _finish_oldest(self) -> None:
        # On the current stream, which is also where the memory of what is then let go will be used again.
        with self._collective():
            self._under_way.popleft().wait()

    def _launch_rest(self, take: Callable[[int], Tensor | None]) -> None:
        while self._launched < len(self._buckets):
            self._launch(take)

    def _end_round(self, take: Callable[[int], Tensor | None] | None = None) -> None:
        if not self._open:
            self._begin_round()
        self._launch_rest(take or self._take)
        while self._under_way:
            self._finish_oldest()
        self._open = False
        self._rounds += 1

    # Reduction ----------------------------------------------------------------------------------

    @torch.no_grad()
    def reduce(self) -> None:
        """Ends the period: every gradient of every rank is in `grads`, and `active` is up to date. A collective
        call. The host waits for nothing in a period of one pass, without reentrant checkpoints, after the first."""
        self._check_usable()
        if not self._params:
            return
        self._check_alone()
        self._follow_zeroing()
        self._end_round()
        if self._exchange():
            self._end_round()
            self._exchange()
        self._passes.clear()
        if not self._learned:
            self._learn()
        if not all(self._hooked):
            self._hook_trainable()
        self.generation += 1

    def _check_alone(self) -> None:
        """Raises where something put gradients into ``p.grad`` that no backward did: in one pass, a gradient
        that has left does not come back."""
        if not self._open or self._reentrant or len(self._passes) > 1:
            return
        for i, p in enumerate(self._params):
            left = self._has_arrived[i] and self._bucket_of[i] < self._launched
            if left and p.grad is not None and not self._is_witness(i):
                raise RuntimeError(
                    f"the gradient of parameter {i} (shape {tuple(p.shape)}) was reduced, and something put another "
                    "into p.grad. Stage 2 reduces gradients itself: is the model wrapped in DistributedDataParallel? "
                    "Take it out, or use stage=1"
                )

    def _exchange(self) -> bool:
        """Makes `active`; whether any rank has late gradients.

        In a period of a single pass there are none, and a rank of which that is true does not look (it is blind
        to those of others), because the host would have to wait for the device.
        """
        late = self.has_local()
        looks = late or self._reentrant or not self._learned or len(self._passes) != 1
        flags = upload([*self._used, late, self._reentrant, not looks], torch.uint8, self.grads[0].device)
        with self._collective():
            all_reduce_max(flags, self._group)
        self.active = flags
        if not looks:
            return False
        any_late, any_reentrant, any_blind = flags[-3:].tolist()
        self._reentrant = bool(any_reentrant)
        if any_late and any_blind:
            self._fail(
                "gradients arrived after their bucket had been reduced on some ranks, while others made a single "
                "backward pass. Every rank must make the same passes between steps; where the ranks' models differ, "
                "checkpoint with use_reentrant=False"
            )
            self._check_usable()
        return bool(any_late)

    def has_local(self) -> bool:
        """Whether there are gradients that are not in `grads`; raises if those that are have been tampered with."""
        self._follow_zeroing()
        return any(p.grad is not None and not self._is_placeholder(i) for i, p in enumerate(self._params))

    def _is_witness(self, i: int) -> bool:
        return self._witness is not None and i == self._witness.index

    def _is_placeholder(self, i: int) -> bool:
        return self._witness is not None and i == self._witness.index and self._witness.holds_none()

    def _follow_zeroing(self) -> None:
        """Where gradients were set to None behind this object's back (model.zero_grad()), those here go too."""
        if self._witness is not None and self._witness.gone():
            self._forget()

    def _learn(self) -> None:
        """Takes the order that the group's first rank has seen, if it has seen any."""
        seen = upload(
            [len(self._seen), *complete_order(self._seen, len(self._params))], torch.int64, self.grads[0].device
        )
        with self._collective():
            broadcast_from_first([seen], self._group)
        count, *order = seen.tolist()
        self._set_order(order)
        self._learned = count > 0
        self._seen = []

    @contextlib.contextmanager
    def zeroing(self, set_to_none: bool) -> Iterator[None]:
        """Around the zeroing of ``p.grad``: forgets the averages, or makes them zeros that still count as gradients.

        After a backward that no `reduce` has followed this is a collective call: ranks may have launched
        different buckets of the round, and must end it first."""
        if set_to_none:
            self._forget()
            yield
            return
        self._end_unwanted_round()
        if self._witness is not None:
            self._witness.remove()
        for grad in self.grads:
            grad.zero_()
        self.generation += 1
        yield
        if self._witness is not None and self._rounds:
            self._witness.place()

    def _forget(self) -> None:
        self._end_unwanted_round()
        if self._witness is not None:
            self._witness.remove()
        self._rounds = 0
        self._used = bytearray(len(self._params))
        self._passes.clear()
        self.generation += 1

    def _end_unwanted_round(self) -> None:
        if self._open and self._failure is None:
            self._end_round(take=lambda i: None)
