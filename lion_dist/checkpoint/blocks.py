"""Tensors to and from bytes, one block at a time, so that only a few blocks are in memory at once.

The bytes of a tensor are those of its elements in row-major order, whatever its strides and device.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..sharding.boxes import Box, cut
from .codes import PIECE, PIECE_ON_GPU
from .computed import ComputedPart

THREADS = 4  # threads of a rank; copies, checksums and file accesses all release the interpreter's lock

T = TypeVar("T")


def in_threads(work: Callable[[T], None], items: Iterable[T]) -> None:
    """Calls ``work`` for every item, in this thread and a few others.

    Raises the first error, once every call that has begun is finished. (A ThreadPoolExecutor would not do: none can be
    used once the interpreter has begun to end, and the interpreter's end waits for its threads, even if they hang.)
    """
    remaining, lock, errors = list(items)[::-1], threading.Lock(), list[BaseException]()

    def run() -> None:
        try:
            while not errors:
                with lock:
                    if not remaining:
                        return
                    item = remaining.pop()
                work(item)
        except BaseException as error:
            errors.append(error)

    count = min(THREADS, len(remaining)) - 1
    helpers = [threading.Thread(target=run, name="lion_dist.checkpoint", daemon=True) for _ in range(count)]
    started = []
    for helper in helpers:
        with contextlib.suppress(RuntimeError):  # the interpreter is ending: this thread does all the work
            helper.start()
            started.append(helper)
    run()
    for helper in started:
        helper.join()
    if errors:
        error = errors[0]
        errors.clear()  # `run` and the error refer to each other: nothing would be freed before a garbage collection
        try:
            raise error
        finally:
            del error


def synchronize(tensors: Sequence[Tensor | ComputedPart]) -> None:
    """Waits for the devices of these tensors. Call it before and after other threads access them."""
    for device in {t.device for t in tensors if t.is_cuda}:
        torch.cuda.synchronize(device)


class Buffers:
    """One block of memory for each thread."""

    def __init__(self, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._of_thread = threading.local()

    def get(self, nbytes: int) -> memoryview:
        """The first ``nbytes`` bytes of this thread's block."""
        if not hasattr(self._of_thread, "buffer"):
            # mmap instead of the heap, which would keep a block for every thread that ever existed.
            self._of_thread.buffer = mmap.mmap(-1, self._block_bytes)
        return memoryview(self._of_thread.buffer)[:nbytes]


def as_tensor(buffer: memoryview, dtype: torch.dtype) -> Tensor:
    """The buffer's memory as a 1-D tensor."""
    return torch.frombuffer(buffer, dtype=torch.uint8).view(dtype)


def copy_out(source: Tensor | ComputedPart, start: int, buffer: memoryview) -> None:
    """Fills the buffer with elements of a tensor, in row-major order.

    Args:
        source: as for `copy_elements`.
        start: index of the first element, in row-major order.
        buffer: memory for a whole number of elements.
    """
    copy_elements(source, start, as_tensor(buffer, source.dtype))


def copy_elements(source: Tensor | ComputedPart, start: int, out: Tensor) -> None:
    """Copies elements of a tensor in row-major order.

    Args:
        source: tensor of any strides, on any device; or one that is computed here, piece by piece.
        start: index of the first element, in row-major order.
        out: where they are copied to, on the CPU, 1-D, of the same dtype.
    """
    if isinstance(source, Tensor) and source.is_contiguous():
        out.copy_(source.reshape(-1)[start : start + out.numel()])
        return
    size = out.numel() if isinstance(source, Tensor) else PIECE_ON_GPU if source.is_cuda else PIECE
    at = 0
    while at < out.numel():
        stop = min(at + size, out.numel())
        for box in cut(source.shape, start + at, start + stop):
            out[at : at + box.numel].view(box.sizes).copy_(source[box.slices()])
            at += box.numel


def copy_in(target: Tensor, wanted: Box, sizes: tuple[int, ...], start: int, block: Tensor) -> None:
    """Copies the elements of a box that lie in a block of a chunk.

    Args:
        target: tensor for the box's elements, of shape ``wanted.sizes``.
        wanted: the box, relative to the chunk.
        sizes: shape of the chunk.
        start: index of the block's first element in the chunk, in row-major order.
        block: the block's elements, 1-D.
    """
    at = 0
    for box in cut(sizes, start, start + block.numel()):
        both = box.overlap(wanted)
        if both:
            found = block[at : at + box.numel].view(box.sizes)
            target[both.slices(wanted.offsets)].copy_(found[both.slices(box.offsets)])
        at += box.numel
