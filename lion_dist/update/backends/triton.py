"""The rule as Triton launches, one for all segments of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...upload import upload_integers
from ..hypers import StepHypers
from ..reference import PER_BYTE
from ..segments import TILE, Segment, SegmentTable, StepTensors
from ..state import EXP_AVG, EXP_AVG_SCALE, REMAINDER
from ..sums import Key, Signs
from . import triton_norm, triton_signs, triton_step, triton_sums
from .batch import SIGNS, Mix, Prepared, key_of


class TritonBatch:
    """Steps the segments of a table.

    Args:
        tensors: the tensors of which the segments are runs.
        segments: runs of 1-D memory.
        device: the device of their tensors.
        mix: the dtypes of their tensors.
    """

    def __init__(self, tensors: StepTensors, segments: Sequence[Segment], device: torch.device, mix: Mix) -> None:
        # Kernels know the columns by their places in a row.
        assert mix.columns[0] in (EXP_AVG, SIGNS), f"the first state column must be {EXP_AVG}, got {mix.columns}"
        assert (mix.state[0] == torch.int8) == (EXP_AVG_SCALE in mix.columns), f"8 bits, or a scale, alone: {mix}"
        assert mix.param == torch.bfloat16 or REMAINDER not in mix.columns, f"a remainder of {mix.param}"
        self._table = SegmentTable(tensors, segments, device, mix.grad)
        self._mix = mix
        self._segments = segments

    def set_gradients(self, addresses: Sequence[int]) -> None:
        self._table.set_gradients(addresses)

    def step(self, prepared: Prepared, hypers: StepHypers) -> None:
        device = self._table.device
        triton_step.lion_step(
            self._table, self._mix, hypers.table(device), hypers.grad_scale(device), prepared.tensors.active
        )

    def pack_signs(self, prepared: Prepared, hypers: StepHypers, signs: Tensor, checksum: Tensor, salt: int) -> None:
        device, tensors = self._table.device, prepared.tensors
        triton_signs.pack_signs(
            self._table, self._mix, hypers.table(device), hypers.grad_scale(device), tensors.active,
            tensors.state_of(0)[EXP_AVG], signs, checksum, salt,
        )  # fmt: skip

    def apply_signs(self, active: Tensor | None, table: Tensor, agree: Tensor) -> None:
        triton_signs.apply_signs(self._table, self._mix, table, active, agree.view(torch.uint8))

    def sum_of_squares(self, prepared: Prepared) -> Tensor:
        return triton_norm.sum_of_squares(self._table, self._mix.grad, prepared.tensors.active)

    def add_up(
        self, prepared: Prepared, hypers: StepHypers, last: Mapping[Key, Tensor], kept: Signs | None
    ) -> tuple[list[int], Tensor]:
        table, device, tensors = self._table, self._table.device, prepared.tensors
        addresses = packed = None
        if kept is not None:
            grads, at = prepared.present(), 0
            packed = torch.empty(table.tiles * (TILE // PER_BYTE), dtype=torch.uint8, device=device)
            keys = [key_of(tensors, s) for s in self._segments]
            addresses = upload_integers([last[key].data_ptr() if key in last else 0 for key in keys], device)
            for key, s in zip(keys, self._segments, strict=True):
                if grads[s.entry] is not None:
                    kept[key] = packed[at : at + -(-s.length // PER_BYTE)]
                at += -(-s.length // TILE) * (TILE // PER_BYTE)
        of_segments = triton_sums.add_up(
            table, self._mix, hypers.table(device), hypers.grad_scale(device), tensors.active, addresses, packed
        )
        return [s.entry for s in self._segments], of_segments
