"""A step in two halves, with signs between them.

The owner of a run of elements makes signs of its gradients and momenta; every holder of the parameter applies them.
Packed signs are uint8, PER_BYTE elements a byte (reference.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..memory_order import flat
from . import dispatch, reference
from .dispatch import CHUNK, LionUpdate
from .reference import PER_BYTE, HyperParameters
from .segments import Segment, SegmentTable, StepTensors
from .state import EXP_AVG


class SignUpdate:
    """The two halves of a step for parameters of one dtype.

    Args:
        update: prepares the tensors of the first half; its ``use_triton`` holds for both halves.
        segments: runs that `apply` updates; ``state_start`` is the index into ``signs`` of a run's first byte.
        signs: uint8, 1-D: the packed signs of all runs. Each run begins at a whole byte.
    """

    def __init__(self, update: LionUpdate, segments: Sequence[Segment], signs: Tensor) -> None:
        self._update = update
        self._segments = segments
        self._signs = signs
        self._key: tuple[list[int], list[int]] | None = None
        self._table: SegmentTable | None = None
        self._hypers: Tensor | None = None  # those of `pack`
        self._views: list[tuple[int, Tensor, Tensor]] = []  # entry, the parameter's run, its packed signs

    def pack(
        self, columns: StepTensors, hypers: list[HyperParameters], grad_scale: Tensor | None, salt: int,
        signs: Tensor, checksum: Tensor,
    ) -> None:  # fmt: skip
        """The owner's half: writes the new momenta, their packed signs and a checksum. Parameters are not touched.

        Args:
            columns, hypers, grad_scale: as for `LionUpdate.step`; ``columns.segments`` is what this rank owns, and the
                momenta of all entries are one flat buffer.
            salt: what else the ranks must have in common, in [2**31, 2**63).
            signs: uint8, shape (elements of that buffer / PER_BYTE,): the packed signs, in its order.
            checksum: int64, shape (): `reference.checksum` of what the ranks must agree on.
        """
        update = self._update
        update.prepare_once(columns)
        table = self._hypers = update.hyper_table(hypers, signs.device)
        exp_avg = columns.state[EXP_AVG][0]
        if update.fused:
            for mix, segments in update.fused:
                dispatch.triton_signs.pack_signs(
                    segments, mix.grad, table, grad_scale, columns.active, exp_avg, signs, checksum, salt
                )
        else:
            checksum.copy_(reference.checksum(table, salt, grad_scale))
        update.silence_plain(columns)
        for plain in update.plain:
            for s, m in zip(plain.segments, plain.exp_avgs, strict=True):
                g = update.grads[s.entry]
                if g is None:
                    continue
                scalars = reference.scalars(table[columns.groups[s.entry]], grad_scale)
                packed = signs.narrow(0, s.state_start // PER_BYTE, -(-s.length // PER_BYTE))
                runs = zip(
                    flat(g, s.grad_start, s.length).split(CHUNK), m.split(CHUNK), packed.split(CHUNK // PER_BYTE),
                    strict=True,
                )  # fmt: skip
                for run in runs:
                    reference.sign_step_(*run, scalars)
        update.forget_gradients()

    def apply(self, columns: StepTensors, agree: Tensor) -> None:
        """The other half: updates every run by its signs, with the hyper-parameters of `pack`.

        Args:
            columns: as for `pack`. Where a gradient is None, active must say so too.
            agree: bool, shape (): False leaves every parameter untouched.
        """
        if not self._segments:
            return
        params = columns.params
        key = ([p.data_ptr() for p in params], columns.groups)
        if key != self._key:
            self._key = (key[0], list(columns.groups))
            self._build(columns)
        hypers = self._hypers
        assert hypers is not None
        if self._table is not None:
            dispatch.triton_signs.apply_signs(
                self._table, params[0].dtype, hypers, columns.active, agree.view(torch.uint8)
            )
        elif agree:
            active = columns.active.tolist() if columns.active is not None else None
            scalars = [reference.scalars(row) for row in hypers]
            for entry, run, packed in self._views:
                if active is not None and not active[entry]:
                    continue
                for p, bytes_ in zip(run.split(CHUNK), packed.split(CHUNK // PER_BYTE), strict=True):
                    reference.apply_signs_(p, bytes_, scalars[columns.groups[entry]])
        # Autograd does not see writes by address, and a graph that saved a weight must not use it changed.
        moved = [p for p, g in zip(params, columns.grads, strict=True) if g is not None]
        torch.autograd.graph.increment_version(moved)

    def _build(self, columns: StepTensors) -> None:
        params = columns.params
        self._table, self._views = None, []
        if self._update.takes_triton(self._signs.device):
            # To the table, the packed signs are a momentum of bytes.
            packed = StepTensors(params, [None] * len(params), {EXP_AVG: [self._signs] * len(params)}, columns.groups)
            self._table = SegmentTable(packed, self._segments, self._signs.device)
            self._table.set_gradients(packed.grads)
        else:
            for s in self._segments:
                signs = self._signs.narrow(0, s.state_start, -(-s.length // PER_BYTE))
                self._views.append((s.entry, flat(params[s.entry], s.param_start, s.length), signs))
