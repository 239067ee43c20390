"""The gradients of sharded parameters where they lie on this rank: in ``p.grad``.

In stage 2 `ParamGrads` alone reads, takes and sets ``p.grad`` of sharded parameters, and keeps the state of each
gradient.

[Note: States of a gradient]
The gradient of a parameter accumulates from one zeroing to the next. Each part of it goes through the same stations::

    autograd adds to p.grad  ->  launch of its bucket: p.grad is taken  ->  reduce-scatter  ->  the owner's shard

and `GradState` says which stations hold parts of it::

    LOCAL  --launch-->  REDUCED  --autograd adds-->  SPLIT
                           ^------------launch---------|         (zeroing: back to LOCAL)

Whether a gradient has left must be known for three reasons. A parameter whose gradient has left is active in the step,
even though its ``p.grad`` is None. A later part is added to the shard and does not replace it. And nothing but autograd
may put a gradient into ``p.grad`` from then on: a gradient that DistributedDataParallel or the user writes there would
be a second copy of one that has already been counted. So what autograd leaves in ``p.grad`` is recorded, as tensor and
version, and any difference from the record is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from enum import Enum, auto
from operator import attrgetter

import torch
from torch import Tensor

from ..dtensors import changes_of, is_dtensor, local, local_gradients, place_gradient
from ..memory_order import flat, laid_out_like
from .placeholder import placeholder_of

_GRAD = attrgetter("grad")  # for loops in C, because they run over every parameter in every step


class GradState(Enum):
    """Where the gradient of one parameter lies on this rank, and who may change ``p.grad``.

    - ``LOCAL``: All of it lies in ``p.grad``, which may be None. Autograd and the user may change ``p.grad``. The next
      launch of the parameter's bucket takes what is there.
    - ``REDUCED``: All of it has left for the shards. ``p.grad`` is None, or holds the placeholder (see sentinel.py).
      Only autograd may put a gradient there.
    - ``SPLIT``: A part has left for the shards, and a later part lies in ``p.grad``, as autograd left it. Only autograd
      may change it. The next launch of the parameter's bucket takes it.
    """

    LOCAL = auto()
    REDUCED = auto()
    SPLIT = auto()


class ParamGrads:
    """The gradients of some parameters in ``p.grad``, with their states. See [Note: States of a gradient].

    Methods take indices of parameters.

    Args:
        params: the parameters.

    Attributes:
        states: state of each parameter's gradient.
        sharded: whether any of the parameters is a DTensor.
        stand_in: index of the parameter whose ``p.grad`` is kept filled for the sentinel (see `keep_filled`), or -1.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = params
        self.states = [GradState.LOCAL] * len(params)
        self.stand_in = -1
        self.sharded = any(map(is_dtensor, params))
        self._placeholder: Tensor | None = None
        # p.grad as autograd last left it, and its version then: for each SPLIT parameter and for the stand-in.
        self._records: dict[int, tuple[Tensor, int]] = {}

    # Contents of p.grad -------------------------------------------------------------------------

    def peek(self, i: int) -> Tensor | None:
        """Returns ``p.grad``: a gradient, the placeholder or None."""
        return self.params[i].grad

    def _is_placeholder(self, grad: Tensor) -> bool:
        """Whether a tensor is the placeholder, to which nothing has been added."""
        return grad is self._placeholder and changes_of(grad) == 0

    def _present(self) -> list[tuple[int, Tensor]]:
        """Every ``p.grad`` that is not None and not the placeholder, with its index: few, once gradients have left."""
        found = [(i, grad) for i, grad in enumerate(map(_GRAD, self.params)) if grad is not None]
        return [(i, grad) for i, grad in found if not self._is_placeholder(grad)]

    def any_gradient(self) -> bool:
        """Whether any ``p.grad`` holds a gradient."""
        return bool(self._present())

    def have_left(self) -> list[bool]:
        """For each parameter, whether its gradient, or a part of it, has left ``p.grad``."""
        local = GradState.LOCAL
        return [state is not local for state in self.states]

    # From autograd to the launch ----------------------------------------------------------------

    def arrived(self, i: int) -> None:
        """Takes note that autograd has added to ``p.grad``."""
        if self.sharded:
            place_gradient(self.params[i])
        state = self.states[i]
        if state is GradState.LOCAL and i != self.stand_in:
            return
        grad = self.params[i].grad
        if grad is None:
            return
        self._records[i] = grad, changes_of(grad)
        if state is GradState.REDUCED:
            self.states[i] = GradState.SPLIT

    def take(self, indices: Iterable[int], stream: torch.cuda.Stream | None = None) -> list[Tensor | None]:
        """Takes gradients out of ``p.grad``, whose states become ``REDUCED``.

        Args:
            indices: of the parameters.
            stream: the current one, on which the caller will read them: their memory may belong to another. None on
                CPUs.

        Returns:
            For each parameter its gradient, of a DTensor what this rank holds, 1-D in the parameter's memory order, or
            None if there is none. The caller owns these tensors; no ``p.grad`` refers to them any more.
        """
        taken: list[Tensor | None] = []
        for i in indices:
            p = self.params[i]
            grad = p.grad
            if grad is None or (grad is self._placeholder and changes_of(grad) == 0):
                taken.append(None)
                continue
            self.states[i] = GradState.REDUCED
            if i == self.stand_in:
                self._put_placeholder(i)
            else:
                p.grad = None
                self._records.pop(i, None)
            if grad.requires_grad:  # after create_graph=True; whoever keeps the gradient shall not keep its graph
                grad = grad.detach()
            if stream is not None:
                (local(grad) if self.sharded else grad).record_stream(stream)
            if self.sharded:
                (grad,), p = local_gradients([p], [grad]), local(p)
            if grad.is_contiguous() and p.is_contiguous() and grad.shape == p.shape:
                taken.append(grad.view(-1))  # the usual case, in a third of the time
            else:
                taken.append(flat(laid_out_like(grad, p)))
        return taken

    # Changes that autograd has not made ---------------------------------------------------------

    def first_tampered(self, except_for: int, is_hooked: Callable[[int], bool]) -> int | None:
        """The first parameter whose gradient has left and whose ``p.grad`` holds what autograd has not left there, or
        None.

        Args:
            except_for: index of a parameter to which autograd has just added, or -1.
            is_hooked: whether `arrived` is called for a parameter; others are not compared.
        """
        local, split = GradState.LOCAL, GradState.SPLIT
        for i, _ in self._present():
            if i == except_for or self.states[i] is local:
                continue
            if not (self.states[i] is split and self.is_as_recorded(i)) and is_hooked(i):
                return i
        return None

    def is_recorded_tensor(self, i: int) -> bool:
        """Whether ``p.grad`` is the tensor that autograd last left there, though its values may have changed."""
        return i in self._records and self.params[i].grad is self._records[i][0]

    def is_as_recorded(self, i: int) -> bool:
        """Whether ``p.grad`` is as autograd last left it."""
        return self.is_recorded_tensor(i) and changes_of(self._records[i][0]) == self._records[i][1]

    def changes(self, i: int) -> int:
        """How often ``p.grad`` has been changed since it was recorded; 0 if it is another tensor."""
        return changes_of(self._records[i][0]) - self._records[i][1] if self.is_recorded_tensor(i) else 0

    # The stand-in -------------------------------------------------------------------------------

    def keep_filled(self, i: int) -> None:
        """Makes a parameter the stand-in: where its ``p.grad`` would be None, now and after each launch, it holds a
        placeholder of zeros. See [Note: Sentinel]."""
        self.stand_in = i
        grad = self.params[i].grad
        if grad is None:
            self._put_placeholder(i)
        else:
            self._records.setdefault(i, (grad, changes_of(grad)))

    def accept(self, i: int) -> None:
        """Records a ``p.grad`` of the stand-in that other code has set, as if autograd had set it."""
        grad = self.params[i].grad
        assert grad is not None
        self._records[i] = grad, changes_of(grad)

    def stop_filling(self) -> None:
        """Makes no parameter the stand-in, and removes the placeholder."""
        i = self.stand_in
        if i < 0:
            return
        grad = self.params[i].grad
        if grad is not None and self._is_placeholder(grad):
            self.params[i].grad = None
        self._placeholder = None
        self.stand_in = -1
        if self.states[i] is not GradState.SPLIT:
            self._records.pop(i, None)

    def _put_placeholder(self, i: int) -> None:
        self._placeholder = self.params[i].grad = placeholder_of(self.params[i])
        self._records[i] = self._placeholder, 0

    # Zeroing, and other parameters. There is no stand-in meanwhile --------------------------------

    def forget(self) -> None:
        """Follows a zeroing: gradients accumulate anew, from what lies in ``p.grad`` now."""
        self.states = [GradState.LOCAL] * len(self.params)
        self._records.clear()

    def record_zeroed(self) -> None:
        """Follows a zeroing in place, which keeps states: records every ``p.grad`` that it has changed."""
        for i in list(self._records):
            grad = self.params[i].grad
            if grad is None:
                self.states[i] = GradState.REDUCED
                del self._records[i]
            else:
                self._records[i] = grad, changes_of(grad)

    def carry_over(self, previous: ParamGrads, lost: Collection[int], is_hooked: Callable[[int], bool]) -> None:
        """Takes over states from an object that had some of the parameters.

        Args:
            previous: that object.
            lost: ids of parameters whose gradients have left for shards that no longer exist.
            is_hooked: whether `arrived` was called for a parameter, by its index in ``previous``.
        """
        index_of = {id(p): i for i, p in enumerate(previous.params)}
        for i, p in enumerate(self.params):
            before = index_of.get(id(p))
            if before is None or id(p) in lost:
                continue
            self.states[i] = previous.states[before]
            if before in previous._records:
                self._records[i] = previous._records[before]
            if self.states[i] is not GradState.LOCAL and p.grad is not None and not is_hooked(before):
                self._records[i] = p.grad, changes_of(p.grad)  # a backward may have reached it, unseen
                self.states[i] = GradState.SPLIT

    # Between intervals --------------------------------------------------------------------------

    def release_records(self) -> None:
        """Drops records of gradients that are no longer in ``p.grad``, with the tensors that they refer to."""
        for i in [i for i in self._records if i != self.stand_in]:
            del self._records[i]
            self.states[i] = GradState.REDUCED
