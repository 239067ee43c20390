"""Many tensors described once, so that one launch can step them all.

StepTensors: parameters, gradients and state of one step as parallel lists, with one entry for each parameter.
Segment: a run of elements, contiguous in memory, of one entry.
SegmentTable: the segments of one device and one mix of columns and dtypes, as tensors that a kernel reads.
Tile: TILE consecutive elements of one segment (the last tile of a segment may hold fewer). The table maps tiles to
    segments; at 4 bytes a tile it takes 0.02 % of the parameters' memory.

Starts and lengths count elements of the parameter in memory order (memory_order.py).
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..memory_order import is_dense
from ..upload import CapturedUploads, current_stream_number, is_capturing, upload, upload_integers
from .reference import STORAGE_DTYPES
from .state import EXP_AVG, EXP_AVG_SCALE, REMAINDER

# Kernels read these columns as of these dtypes, whatever is there.
_DTYPES: dict[str, tuple[torch.dtype, ...]] = {EXP_AVG_SCALE: (torch.float32,), REMAINDER: (torch.int16,)}

TILE = 8192  # elements; a multiple of every block size


class Segment(NamedTuple):
    """``length`` elements of entry number ``entry`` of the step's tensors.

    The starts count elements of the parameter, in memory order: where the run begins in the parameter, in its gradient
    and in its state.
    """

    entry: int
    param_start: int
    grad_start: int
    state_start: int
    length: int


@dataclass
class StepTensors:
    """The tensors of one step, as parallel lists with one entry for each parameter.

    Attributes:
        params: the parameters.
        grads: their gradients; None where the parameter takes no part in the step.
        state: for each state column, by its name, the tensors of all entries; None where an entry lacks the column.
        groups: number of each entry's parameter group.
        segments: the runs to step. With None every entry is stepped whole, and its tensors have one shape, with any
            strides that do not overlap. Otherwise params are dense, and state and grads may also be flat buffers, 1-D
            and contiguous, which the segments' starts index.
        active: uint8, on the tensors' device, shape (at least the number of entries,). Flag i belongs to entry i; flags
            behind the last entry are not read. An entry whose flag is 0 takes no part in the step either. On a GPU the
            kernels read the flags, so the host does not wait for them. May be set after `LionUpdate.prepare`.
        numbers: parameter indices for error messages; default: position in the list.
        blocks: for each state column whose elements are shared, by its name: the number of the parameter's elements
            that share one (`StateColumn.block`). Columns that are not listed have one element for each.
        whole: columns whose tensors lie as the parameters do, even where segments are given.
    """

    params: list[Tensor]
    grads: list[Tensor | None]
    state: Mapping[str, Sequence[Tensor | None]]
    groups: list[int]
    segments: Sequence[Segment] | None = None
    active: Tensor | None = None
    numbers: Sequence[int] | None = None
    blocks: Mapping[str, int] = field(default_factory=dict)
    whole: frozenset[str] = frozenset()

    def number(self, entry: int) -> int:
        """Index of an entry's parameter for error messages."""
        return entry if self.numbers is None else self.numbers[entry]

    def state_of(self, entry: int) -> dict[str, Tensor]:
        """An entry's tensors of the columns that it has, by name."""
        return {name: t for name, of_entry in self.state.items() if (t := of_entry[entry]) is not None}

    def start_in(self, name: str, segment: Segment) -> int:
        """Index of a segment's first element in the state of the column of this name."""
        start = segment.param_start if name in self.whole else segment.state_start
        return start // self.blocks.get(name, 1)

    def check_gradient(self, entry: int, g: Tensor) -> None:
        """Raises TypeError or ValueError if the rule cannot take g as the gradient of an entry."""
        p = self.params[entry]
        who = f"gradient of parameter {self.number(entry)} (shape {tuple(p.shape)})"
        if g.layout != torch.strided:
            raise TypeError(f"{who} is {g.layout}; Lion needs dense gradients (sparse=False, or .to_dense())")
        if g.dtype not in STORAGE_DTYPES:
            raise TypeError(f"{who} has dtype {g.dtype}; expected float32, bfloat16 or float16")
        is_flat = self.segments is not None and g.dim() == 1 and g.is_contiguous()
        if g.shape != p.shape and not is_flat:
            raise ValueError(
                f"{who} has shape {tuple(g.shape)}; expected the parameter's own. Under FSDP a backward inside "
                "no_sync() leaves whole gradients: the last one before step() belongs outside of it"
            )
        if g.device != p.device:
            raise ValueError(f"{who} is on {g.device}; expected {p.device}, where the parameter is")
        if g.numel() and g.data_ptr() == 0:  # the CPU would read it; kernels take the address for that of no gradient
            raise TypeError(
                f"{who} has no memory: its storage was freed, so it cannot be read; make the gradient anew, or set "
                "p.grad to None"
            )

    def check_state(self, entry: int, name: str, t: Tensor) -> None:
        """Raises ValueError if t cannot be the state of an entry in the column of this name."""
        p, block = self.params[entry], self.blocks.get(name, 1)
        who = f"parameter {self.number(entry)}"
        if t.device != p.device:
            raise ValueError(
                f"{who} is on {p.device} and its {name} on {t.device}: move the model before making the optimizer, or "
                "load the optimizer's state_dict again after moving it"
            )
        dtypes = _DTYPES.get(name, (t.dtype,))
        if name == EXP_AVG:  # 8 bits and scales belong together
            dtypes = (torch.int8,) if EXP_AVG_SCALE in self.state_of(entry) else STORAGE_DTYPES
        if t.dtype not in dtypes:
            raise ValueError(
                f"{who} has {name} in {t.dtype}; expected {' or '.join(map(str, dtypes))}: other code has replaced the "
                "state; load the optimizer's state_dict again"
            )
        expected = tuple(p.shape) if block == 1 else (-(-p.numel() // block),)
        if (self.segments is None or name in self.whole) and t.shape != expected:
            raise ValueError(
                f"{who} has shape {tuple(p.shape)} and its {name} {tuple(t.shape)}; expected {expected}: the parameter "
                "was replaced by another; make a new optimizer"
            )


def check_no_shared_memory(params: Sequence[Tensor]) -> None:
    """Raises ValueError if two of the parameters, all on one device, hold the same memory: a fused step would write
    it twice in no order."""
    # Strided parameters with gaps may interleave without sharing an element: only dense ones are certain.
    spans = sorted(
        (p.data_ptr(), p.data_ptr() + p.numel() * p.element_size(), index)
        for index, p in enumerate(params)
        if p.numel() and is_dense(p)
    )
    for (_, end, a), (start, _, b) in itertools.pairwise(spans):
        if start < end:
            raise ValueError(
                f"parameters {a} and {b} share memory; tie weights by using one Parameter object in both places"
            )


# Columns of a table's row, all int64. PARAM is the address of the run in the parameter, TILE_0 the number of the run's
# first tile, FIRST the index in the parameter of the run's first element. From STATE on there is one column for each
# state column: the address of the run in that state.
PARAM, LENGTH, GROUP, TILE_0, ENTRY, FIRST, STATE = range(7)


class SegmentTable:
    """Segments as a kernel reads them.

    Rows change when a parameter or its state moves. Gradient addresses are a tensor of their own, so that a new
    gradient costs one small copy. No tensor is ever overwritten: a launch that the GPU has yet to run keeps those that
    it was given.

    Args:
        tensors: the tensors of which the segments are runs.
        segments: at least one run, of one device and one mix of columns and dtypes.
        device: the device of all tensors.
        grad_dtype: dtype of the gradients.

    Attributes:
        rows: int64, shape (segments, row_width); see PARAM and the constants beside it.
        row_width: number of columns of a row.
        tiles: number of tiles of all segments.
        tile_segments: int32, shape (tiles,): the segment that a tile belongs to.
        grad_addresses: int64, shape (segments,); 0 marks an inactive segment, which no kernel touches.
        grads_odd: whether one of these addresses is no multiple of 16.
    """

    def __init__(
        self, tensors: StepTensors, segments: Sequence[Segment], device: torch.device, grad_dtype: torch.dtype
    ) -> None:
        self.device = device
        columns = list(tensors.state_of(segments[0].entry))
        self.row_width = STATE + len(columns)
        rows, lengths, tile_0 = [], [], 0
        for s in segments:
            row = [0] * self.row_width
            row[PARAM] = _address(tensors.params[s.entry], s.param_start)
            row[LENGTH], row[GROUP], row[TILE_0] = s.length, tensors.groups[s.entry], tile_0
            row[ENTRY], row[FIRST] = s.entry, s.param_start
            state = tensors.state_of(s.entry)
            row[STATE:] = [_address(state[name], tensors.start_in(name, s)) for name in columns]
            rows.append(row)
            lengths.append(s.length)
            tile_0 += -(-s.length // TILE)
        self.tiles = tile_0
        self.rows = upload(rows, torch.int64, device)
        tile_counts = torch.tensor([-(-n // TILE) for n in lengths], dtype=torch.int64, device="cpu")
        numbers = torch.arange(len(rows), dtype=torch.int32, device="cpu")
        tile_segments = torch.repeat_interleave(numbers, tile_counts)
        if device.type == "cuda":
            tile_segments = tile_segments.pin_memory()
        self.tile_segments = tile_segments.to(device, non_blocking=True)
        self._entries = [s.entry for s in segments]
        offsets = [s.grad_start * grad_dtype.itemsize for s in segments]
        self._grad_offsets = offsets if any(offsets) else None  # in bytes
        self.grad_addresses: Tensor
        self.grads_odd = False
        self._for_captures = CapturedUploads(len(rows))
        self._captured: list[Tensor] = []
        self._made_on = self._grads_made_on = current_stream_number(device)

    def keep_for_launch(self, *others: Tensor | None) -> None:
        """Call this before a launch that reads the table and ``others``. If the launch is on another stream than the
        one they were made on, their memory must not be reused before it has run, although they may be replaced long
        before that. If it is captured, it may run at any time: see [Note: Captured memory] (capture.py)."""
        if self.device.type != "cuda":
            return
        on, capturing = current_stream_number(self.device), is_capturing()
        read = [t for t in others if t is not None]
        if capturing or not on == self._made_on == self._grads_made_on:
            read += self.rows, self.tile_segments, self.grad_addresses
        if capturing:
            self._captured += read
        elif read:
            stream = torch.cuda.current_stream(self.device)
            for t in read:
                t.record_stream(stream)

    def set_gradients(self, addresses: Sequence[int]) -> None:
        """Takes the addresses of this step's gradients: one for each entry of the tensors, 0 where there is none."""
        of_segments = list(map(addresses.__getitem__, self._entries))
        if self._grad_offsets is not None:
            of_segments = [a and a + offset for a, offset in zip(of_segments, self._grad_offsets, strict=True)]
        self.grads_odd = functools.reduce(operator.or_, of_segments) % 16 != 0
        self._grads_made_on = current_stream_number(self.device)
        if is_capturing():
            self.grad_addresses = self._for_captures.upload(of_segments, self.device)
            return
        self.grad_addresses = upload_integers(of_segments, self.device)
        if self.device.type == "cuda":
            self._for_captures.prepare()


def _address(t: Tensor, start: int) -> int:
    return t.data_ptr() + start * t.element_size()
