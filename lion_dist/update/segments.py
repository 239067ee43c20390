"""Many tensors described once, so that one launch can step them all.

StepTensors: parameters, gradients and momenta of one step as parallel lists, one entry a parameter.
Segment: a run of elements, contiguous in memory, of one entry of the columns.
SegmentTable: the segments of one device and one mix of dtypes, as tensors that a kernel reads.
Tile: TILE consecutive elements of one segment (the last one of a segment may hold fewer). The
table maps tiles to segments; at 4 bytes a tile it takes 0.02 % of the parameters' memory.
Starts and lengths count elements in memory order (memory_order.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..memory_order import is_dense
from ..upload import upload
from .reference import STORAGE_DTYPES
from .state import EXP_AVG

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
    """The tensors of one step, one entry a parameter, and the parameter group of each.

    grads: None where the parameter takes no part in the step.
    state: for each state column, by its name, the tensors of all entries.
    segments: the runs to step. None: every entry whole, the three tensors of one shape, with any
        strides that do not overlap. Given: params are dense, and state and grads may also be flat
        buffers, 1-D and contiguous, in which the segments' starts count.
    active: uint8, one an entry (a longer tensor's first), on the tensors' device: entries with 0 take no part
        either. For what other ranks decide too: a kernel reads it, the host need not wait to know it.
    numbers: of the entries, as the user counts them, for messages; None: as they lie here.
    """

    params: list[Tensor]
    grads: list[Tensor | None]
    state: dict[str, list[Tensor]]
    groups: list[int]
    segments: Sequence[Segment] | None = None
    active: Tensor | None = None
    numbers: Sequence[int] | None = None

    def check_gradient(self, entry: int, g: Tensor) -> None:
        """Raises where the rule cannot take g as the gradient of an entry."""
        p = self.params[entry]
        number = entry if self.numbers is None else self.numbers[entry]
        who = f"gradient of parameter {number} (shape {tuple(p.shape)})"
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


def check_no_shared_memory(params: Sequence[Tensor]) -> None:
    """Raises where two of the parameters, all on one device, hold the same memory: a fused step
    would write it twice in no order."""
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


class SegmentTable:
    """Segments as a kernel reads them. Rows change when a parameter or momentum moves; gradient
    addresses are a column of their own, so that a new gradient costs one small copy. No tensor is
    ever overwritten: a launch that is still waiting on the GPU keeps what it was given.

    Attributes:
        rows: int64, shape (n, 6): address of p, address of m, length, group, index of the first tile, entry.
        tile_segments: int32, shape (tiles,): the segment that a tile belongs to.
        grad_addresses: int64, shape (n,); 0 marks an inactive segment, which no kernel touches.
    """

    ROW = 6

    def __init__(self, columns: StepTensors, segments: Sequence[Segment], device: torch.device) -> None:
        self.device = device
        rows, lengths, first_tile = [], [], 0
        for s in segments:
            p, m = columns.params[s.entry], columns.state[EXP_AVG][s.entry]
            p_address = p.data_ptr() + s.param_start * p.element_size()
            m_address = m.data_ptr() + s.state_start * m.element_size()
            rows.append((p_address, m_address, s.length, columns.groups[s.entry], first_tile, s.entry))
            lengths.append(s.length)
            first_tile += -(-s.length // TILE)
        self.tiles = first_tile
        self.rows = upload(rows, torch.int64, device)
        tile_counts = torch.tensor([-(-n // TILE) for n in lengths], dtype=torch.int64)
        tile_segments = torch.repeat_interleave(torch.arange(len(rows), dtype=torch.int32), tile_counts)
        if device.type == "cuda":
            tile_segments = tile_segments.pin_memory()
        self.tile_segments = tile_segments.to(device, non_blocking=True)
        self._grad_offsets = [(s.entry, s.grad_start) for s in segments]
        self.grad_addresses: Tensor

    def keep_for_launch(self, *others: Tensor | None) -> None:
        """Called before a launch that reads the table and ``others``: if it is on another stream than the
        one they were made on, their memory must not be given away before it has run, though they may be
        replaced long before that."""
        if self.device.type == "cuda":
            stream = torch.cuda.current_stream(self.device)
            for t in (self.rows, self.tile_segments, self.grad_addresses, *others):
                if t is not None:
                    t.record_stream(stream)

    def set_gradients(self, grads: Sequence[Tensor | None]) -> None:
        """Takes the addresses of this step's gradients (the columns' list, in its order)."""
        addresses = []
        for index, start in self._grad_offsets:
            g = grads[index]
            addresses.append(0 if g is None else g.data_ptr() + start * g.element_size())
        self.grad_addresses = upload(addresses, torch.int64, self.device)
