"""The life of a gradient in stage 2: from autograd's hands, through its bucket, to the owner's shard.

Arrival: autograd has added a gradient into ``p.grad`` (a post-accumulate hook). Under `no_sync` it stays there.
Launch: a bucket's gradients leave ``p.grad``, which is None from then on, and their averages are under way to
    the shards of their owners.
Round: one launch of every bucket, in index order, on every rank, whatever has arrived there: what has not is
    zeros. Collectives match by the order of their calls, so a rank never launches any other way.
Period: what lies between two calls of `reduce`, in which every rank makes the same backward passes. The first
    round of a period is launched as its gradients arrive, and the rest of it by `reduce`. Gradients that arrive
    after their bucket was launched are *late*: a second backward, or a parameter in several reentrant
    checkpoints. They add up in ``p.grad``, and `reduce` makes a second round of them.
Epoch: what lies between two zeroings of the gradients. Its first round overwrites the shards, later ones add.
Active: a parameter of which some rank had a gradient in this epoch; where another had none, it counts as zeros.
"""

from __future__ import annotations

import contextlib
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
    pack (None: it has no head, or no tail)."""

    dtype: torch.dtype
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
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
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
        # Whether to look for late gradients of any rank, which the host has to wait for.
        self._looks = False

        # An epoch.
        self._rounds = 0
        self._used = bytearray()  # 1 where this rank had a gradient
        self._witness: Witness | None = None

    # Parameters ---------------------------------------------------------------------------------

    def set_shards(self, shards: Sequence[Shard]) -> None:
        """Takes other shards; a collective call. Averages of shards that stay are kept, those of others lost."""
        if self._open:
            self._end_round()
        if self._witness is not None:
            self._witness.remove()
        kept = {tuple(map(id, s.params)): (s, g) for s, g in zip(self._shards, self.grads, strict=True)}
        used = {id(p) for p, is_used in zip(self._params, self._used, strict=True) if is_used}
        self._shards = list(shards)
        self.grads, self._packs, self._params, self._places = [], [], [], []
        for shard in shards:
            layout, device, dtype = shard.layout, shard.pack.device, shard.pack.dtype
            _, grad = kept.get(tuple(map(id, shard.params)), (None, None))
            if grad is None:
                grad = torch.zeros(layout.shard_numel, dtype=dtype, device=device)
            pack = torch.zeros(layout.pack_numel, dtype=dtype, device=device)
            tails = {t.param: pack[t.pack_offset : t.pack_offset + t.length] for t in layout.tails}
            offset = 0
            for i, head in enumerate(layout.heads):
                length = head // self._world_size
                self._places.append(_Place(dtype, head, grad.narrow(0, offset, length) if head else None, tails.get(i)))
                offset += length
            self.grads.append(grad)
            self._packs.append(pack)
            self._params += shard.params
        self._used = bytearray(id(p) in used for p in self._params)
        self._witness = Witness(self._params) if self._params else None
        if self._witness is not None and self._rounds:
            self._witness.place()
        self._learned = False
        self._seen = []
        self._set_order([])
        self._set_hooks()

    def _set_order(self, seen: list[int]) -> None:
        sizes = [p.numel() * p.element_size() for p in self._params]
        self._buckets = make_buckets(sizes, complete_order(seen, len(sizes)), self._bucket_bytes)
        self._bucket_of = [0] * len(sizes)
        for number, bucket in enumerate(self._buckets):
            for i in bucket:
                self._bucket_of[i] = number

    def _set_hooks(self) -> None:
        self._remove_hooks()
        for i, p in enumerate(self._params):
            if not p.requires_grad:  # given a gradient by hand
                continue
            for hook in list((getattr(p, "_post_accumulate_grad_hooks", None) or {}).values()):
                other = hook.reducer() if isinstance(hook, _Hook) else None
                if other is not None and other is not self:
                    other._remove_hooks()
                    other._failure = "its parameters have been given to another ShardedLion"
            self._hooks.append(p.register_post_accumulate_grad_hook(_Hook(self, i)))

    def _remove_hooks(self) -> None:
        for handle in self._hooks:
            handle.remove()
        self._hooks = []

    def __del__(self) -> None:
        self._remove_hooks()

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
        if current not in self._passes and witness.gone(arriving=i == witness.index):
            self._forget()
        if i == witness.index and witness.watches:
            witness.saw()
        if self._paused:
            self._looks = self._looks or self._open  # its bucket may be on its way already
            return
        if current not in self._passes:
            self._passes.add(current)
            self._looks = self._looks or len(self._passes) > 1
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
        self._missing = [sum(self._params[i].requires_grad for i in bucket) for bucket in self._buckets]
        if self._witness is not None and not self._witness.watches:
            self._witness.place()

    def _backward_raised(self) -> None:
        if self._failure is None and self._world_size > 1:
            self._failure = (
                "a backward has raised while its gradients were being reduced; the ranks no longer fit together, and "
                "the process group has been aborted. Restart from a checkpoint"
            )
            fail_group(self._group, "its backward has raised an exception")

    def _check_usable(self) -> None:
        if self._failure is not None:
            raise RuntimeError(f"this ShardedLion can go on no more: {self._failure}")

    # Launch -------------------------------------------------------------------------------------

    def _check(self, i: int) -> None:
        p, dtype = self._params[i], self._places[i].dtype
        grad = p.grad
        if grad is not None and (grad.layout != torch.strided or grad.dtype != dtype):
            raise TypeError(
                f"gradient of parameter {i} (shape {tuple(p.shape)}) is {grad.layout}, {grad.dtype}; stage 2 needs "
                f"dense gradients (sparse=False) of the dtype that the parameter had at first, {dtype}"
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
        with explaining(self._group):
            reduction = reduce_scatter_mean(addends or outputs, inputs, self._group)
        self._under_way.append(_UnderWay(reduction, inputs, outputs if addends else [], addends))

    def _finish_oldest(self) -> None:
        # On the current stream, which is also where the memory of what is then let go will be used again.
        with explaining(self._group):
            self._under_way.popleft().wait()

    def _end_round(self, take: Callable[[int], Tensor | None] | None = None) -> None:
        if not self._open:
            self._begin_round()
        while self._launched < len(self._buckets):
            self._launch(take or self._take)
        while self._under_way:
            self._finish_oldest()
        self._open = False
        self._rounds += 1

    # Reduction ----------------------------------------------------------------------------------

    @torch.no_grad()
    def reduce(self) -> None:
        """Ends the period: every gradient of every rank is in `grads`, and `active` is up to date. A collective
        call. The host waits for nothing, except at the first call, and where there may be late gradients."""
        self._check_usable()
        if not self._params:
            return
        self._follow_zeroing()
        self._check_alone()
        self._end_round()
        if self._exchange():
            self._end_round()
            self._exchange()
        self._passes.clear()
        self._learn()
        self.generation += 1

    def _check_alone(self) -> None:
        """Raises where something put gradients into ``p.grad`` that no backward did: in one pass, a gradient
        that has left does not come back."""
        if not self._open or self._looks:
            return
        for i, p in enumerate(self._params):
            left = self._has_arrived[i] and self._bucket_of[i] < self._launched
            if left and p.grad is not None and not self._is_placeholder(i):
                raise RuntimeError(
                    f"the gradient of parameter {i} (shape {tuple(p.shape)}) was reduced, and something put another "
                    "into p.grad. Stage 2 reduces gradients itself: is the model wrapped in DistributedDataParallel? "
                    "Take it out, or use stage=1"
                )

    def _exchange(self) -> bool:
        """Makes `active`; whether any rank has late gradients. A rank that does not look is not told and need not
        be: in such a period no rank has any."""
        late = self.has_local()
        self._looks = self._looks or late
        flags = upload([*self._used, late, self._looks], torch.uint8, self.grads[0].device)
        with explaining(self._group):
            all_reduce_max(flags, self._group)
        self.active = flags
        if self._learned and not self._looks:
            return False
        any_late, any_looks = flags[-2:].tolist()
        self._looks = bool(any_looks)
        return bool(any_late)

    def has_local(self) -> bool:
        """Whether there are gradients that are not in `grads`; raises if those that are have been tampered with."""
        self._follow_zeroing()
        return any(p.grad is not None and not self._is_placeholder(i) for i, p in enumerate(self._params))

    def _is_placeholder(self, i: int) -> bool:
        return self._witness is not None and i == self._witness.index and self._witness.holds_none()

    def _follow_zeroing(self) -> None:
        """Where gradients were set to None behind this object's back (model.zero_grad()), those here go too."""
        if self._witness is not None and self._witness.gone(arriving=False):
            self._forget()

    def _learn(self) -> None:
        if self._learned:
            return
        count = len(self._params)
        order = upload(complete_order(self._seen, count), torch.int64, self.grads[0].device)
        with explaining(self._group):
            broadcast_from_first([order], self._group)
        self._set_order(order.tolist())
        self._learned = True
        self._seen = []

    @torch.no_grad()
    def zero(self, set_to_none: bool) -> None:
        """Forgets the averages, or makes them zeros that still count as gradients; ``p.grad`` is the caller's.

        After a backward that no `reduce` has followed this is a collective call: ranks may have launched
        different buckets of the round, and must end it first."""
        self._check_usable()
        if set_to_none:
            self._forget()
            return
        if self._open:
            self._end_round(take=lambda i: None)
        if self._witness is not None:
            self._witness.remove()
        for grad in self.grads:
            grad.zero_()
        self.generation += 1

    def _forget(self) -> None:
        if self._open:
            self._end_round(take=lambda i: None)
        if self._witness is not None:
            self._witness.remove()
        self._rounds = 0
        self._used = bytearray(len(self._params))
        self._passes.clear()
        self.generation += 1
