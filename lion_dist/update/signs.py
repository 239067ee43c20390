"""A step in two halves, with signs between them: the owner of a slice makes signs of its gradient and momentum, and
every rank that holds the parameter applies them.

Mail: what one rank sends, uint8: the packed signs of its momentum shard, PER_BYTE elements a byte in the shard's
    order, and behind them, in FOOTER bytes, the checksum of what the ranks must agree on (int64).
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

FOOTER = 128  # bytes, so that every rank's mail begins at a multiple of what the vectorised copies of NCCL need

REFUSED = -1  # the checksum of a rank that does not make the step


class SignUpdate:
    """The two halves for parameters of one dtype, whose momenta lie in one flat buffer on each rank.

    Args:
        update: makes ready the tensors of the first half; its ``use_triton`` counts for both.
        numel: of that buffer, a multiple of 128.
        rank: this rank.
        slices: of every rank, what it owns: (entry of the columns, start in the parameter, start in the rank's
            momentum buffer, length).
        device: of all tensors.

    Attributes:
        mail: uint8, shape (world_size, numel / PER_BYTE + FOOTER): this rank's row is written by `pack`, the
            others by whoever carries them, and all of them are read by `apply`.
        checksums: int64, shape (world_size,), those in the mail.
    """

    def __init__(
        self, update: LionUpdate, numel: int, rank: int, slices: Sequence[Sequence[tuple[int, int, int, int]]],
        device: torch.device,
    ) -> None:  # fmt: skip
        self._update = update
        signs = numel // PER_BYTE
        self.mail = torch.zeros(len(slices), signs + FOOTER, dtype=torch.uint8, device=device)
        self.checksums = self.mail.view(torch.int64)[:, signs // 8]
        self._packed = self.mail[rank, :signs]
        self._checksum = self.checksums[rank]
        row = self.mail.shape[1]
        # To the table, the mail is a momentum of bytes.
        self._segments = [
            Segment(entry, start, 0, r * row + shard_start // PER_BYTE, length)
            for r, owned in enumerate(slices)
            for entry, start, shard_start, length in owned
        ]
        self._key: tuple[list[int], list[int]] | None = None
        self._table: SegmentTable | None = None
        self._hypers: Tensor | None = None  # those of `pack`
        self._views: list[tuple[int, Tensor, Tensor]] = []  # entry, the parameter's run, its packed signs

    def pack(self, columns: StepTensors, hypers: list[HyperParameters], grad_scale: Tensor | None, salt: int) -> None:
        """The owner's half: new momenta, and this rank's row of the mail. Parameters are not touched.

        Args:
            columns, hypers, grad_scale: as for `LionUpdate.step`; ``columns.segments`` is what this rank owns.
            salt: what else the ranks must have in common, in [2**31, 2**63).
        """
        update = self._update
        update.prepare_once(columns)
        table = self._hypers = update.hyper_table(hypers, self.mail.device)
        exp_avg = columns.exp_avgs[0]
        if update.fused:
            for mix, segments in update.fused:
                dispatch.triton_signs.pack_signs(
                    segments, mix.grad, table, grad_scale, columns.active, exp_avg, self._packed, self._checksum, salt
                )
        else:
            self._checksum.copy_(reference.checksum(table, salt, grad_scale))
        update.silence_plain(columns)
        for plain in update.plain:
            for s, m in zip(plain.segments, plain.exp_avgs, strict=True):
                g = update.grads[s.entry]
                if g is None:
                    continue
                scalars = reference.scalars(table[columns.groups[s.entry]], grad_scale)
                packed = self._packed.narrow(0, s.exp_avg_start // PER_BYTE, -(-s.length // PER_BYTE))
                runs = zip(
                    flat(g, s.grad_start, s.length).split(CHUNK), m.split(CHUNK), packed.split(CHUNK // PER_BYTE),
                    strict=True,
                )  # fmt: skip
                for run in runs:
                    reference.sign_step_(*run, scalars)
        update.forget_gradients()

    def refuse(self) -> None:
        """Instead of `pack`: a row of the mail with which no rank's parameters change. `apply` must not follow."""
        self._checksum.fill_(REFUSED)

    def apply(self, columns: StepTensors, agree: Tensor) -> None:
        """The other half: every slice of every rank, by the signs in the mail and the hyper-parameters of `pack`.

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
        mail = self.mail.flatten()
        params = columns.params
        self._table, self._views = None, []
        if self._update.takes_triton(mail.device):
            packed = StepTensors(params, [None] * len(params), [mail] * len(params), columns.groups)
            self._table = SegmentTable(packed, self._segments, mail.device)
            self._table.set_gradients(packed.grads)
        else:
            for s in self._segments:
                signs = mail.narrow(0, s.exp_avg_start, -(-s.length // PER_BYTE))
                self._views.append((s.entry, flat(params[s.entry], s.param_start, s.length), signs))
