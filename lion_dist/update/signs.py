"""A step in two halves, with signs between them.

`SignUpdate.pack` computes signs from gradients and momenta, `SignUpdate.apply` updates parameters by signs. They need
not cover the same elements. Packed signs are uint8, PER_BYTE elements a byte (reference.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from .backends import make_batches
from .backends.batch import SIGNS, Batch, Prepared, mark_changed
from .lion_update import LionUpdate
from .reference import PER_BYTE, HyperParameters
from .segments import Segment, StepTensors


class SignUpdate:
    """The two halves of a step for parameters of one dtype.

    Args:
        update: prepares the tensors of the first half; its ``use_triton`` holds for both halves.
        segments: runs that `apply` updates. Their ``state_start`` is PER_BYTE times the index into ``signs`` of a
            run's first byte.
        signs: uint8, 1-D: the packed signs of all runs. Each run begins at a whole byte.
        state: for each column of state that `apply` reads and writes too, by its name, the tensors of all parameters,
            each in the shape and memory order of its parameter.
    """

    def __init__(
        self,
        update: LionUpdate,
        segments: Sequence[Segment],
        signs: Tensor,
        state: Mapping[str, Sequence[Tensor]] | None = None,
    ) -> None:
        self._update = update
        self._segments = segments
        self._signs = signs
        self._state = dict(state or {})
        self._key: tuple[list[list[int]], list[int]] | None = None  # of the batches
        self._batches: list[Batch] = []
        self._table: Tensor | None = None  # the hyper-parameters of `pack`

    def pack(
        self, prepared: Prepared, hypers: list[HyperParameters], grad_scale: Tensor | None, salt: int,
        signs: Tensor, checksum: Tensor,
    ) -> None:  # fmt: skip
        """The first half: writes the new momenta, their packed signs and a checksum. Parameters are not touched.

        Args:
            prepared: as returned by `LionUpdate.prepare`. Its ``segments`` are the runs whose signs are computed, and
                the momenta of all entries are one flat buffer.
            hypers, grad_scale: as for `LionUpdate.step`.
            salt: integer in [2**31, 2**63), which is added to the checksum.
            signs: uint8, shape (elements of the momentum buffer / PER_BYTE,): the packed signs, in its order.
            checksum: int64, shape (): `reference.hyper_checksum` of the hyper-parameters, scale and salt.
        """
        self._table = self._update.pack_signs(prepared, hypers, grad_scale, salt, signs, checksum)

    def apply(self, tensors: StepTensors, agree: Tensor) -> None:
        """The second half: updates every run by its signs, with the hyper-parameters of `pack`.

        Args:
            tensors: those of `pack`. Where a gradient is None, ``active`` must say so too.
            agree: bool, shape (): False leaves every parameter untouched.
        """
        if not self._segments:
            return
        key = [list(map(Tensor.data_ptr, ts)) for ts in (tensors.params, *self._state.values())], tensors.groups
        if key != self._key:
            self._build(tensors)
            self._key = (key[0], list(tensors.groups))
        assert self._table is not None, "apply() before pack()"
        for batch in self._batches:
            batch.apply_signs(tensors.active, self._table, agree)
        mark_changed([p for p, g in zip(tensors.params, tensors.grads, strict=True) if g is not None])

    def forget(self) -> None:
        """Drops what the second half keeps between steps, as `LionUpdate.forget` does."""
        self._key, self._batches = None, []

    def _build(self, tensors: StepTensors) -> None:
        """Makes the batches, in which the packed signs are the first state of the runs."""
        params = tensors.params
        grads: list[Tensor | None] = [None] * len(params)
        state = {SIGNS: [self._signs] * len(params), **self._state}
        signed = StepTensors(
            params, grads, state, tensors.groups, self._segments, blocks={SIGNS: PER_BYTE}, whole=frozenset(self._state)
        )
        self._batches = make_batches(signed, self._segments, [p.dtype for p in params], self._update.use_triton)
        for batch in self._batches:
            batch.set_gradients([0] * len(params))
