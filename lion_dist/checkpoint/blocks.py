"""Tensors to and from the bytes of a file, a block at a time, so that no more than a few blocks are ever in memory.

The bytes of a tensor are those of its elements in row-major order, whatever its strides and device.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import zlib
from collections.abc import Callable, Iterable
from threading import Lock, local
from typing import TypeVar

import torch
from torch import Tensor
from torch.futures import Future

from ..sharding.boxes import Box, cut

THREADS = 4  # a rank; copies, checksums and file accesses all let go of the interpreter's lock

T = TypeVar("T")


def in_threads(work: Callable[[T], None], items: Iterable[T]) -> None:
    """Does the work for every item, in this thread and some others; raises the first error, once what has begun is
    finished. (No ThreadPoolExecutor: none may be used once the interpreter has begun to end, and its end waits for
    theirs, however long they hang.)"""
    left, taking, errors = list(items)[::-1], Lock(), list[BaseException]()

    def run() -> None:
        try:
            while not errors:
                with taking:
                    if not left:
                        return
                    item = left.pop()
                work(item)
        except BaseException as error:
            errors.append(error)

    helpers = [threading.Thread(target=run, name="lion_dist.checkpoint", daemon=True) for _ in range(THREADS - 1)]
    started = []
    for helper in helpers:
        with contextlib.suppress(RuntimeError):  # at the interpreter's end: then there are no helpers
            helper.start()
            started.append(helper)
    run()
    for helper in started:
        helper.join()
    if errors:
        error = errors[0]
        errors.clear()  # `run` refers to them, and they to it: nothing would be freed before a garbage collection
        try:
            raise error
        finally:
            del error


def synchronize(tensors: list[Tensor]) -> None:
    """Waits for the devices, so that other threads may read and write these tensors, or have."""
    for device in {t.device for t in tensors if t.is_cuda}:
        torch.cuda.synchronize(device)


def finished(value: T) -> Future[T]:
    """Of work that is done when it is asked for."""
    future: Future[T] = Future()
    future.set_result(value)
    return future


class Buffers:
    """A block of memory for each thread, as bytes and as a tensor of any dtype, without NumPy."""

    def __init__(self, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._own = local()

    def get(self, nbytes: int) -> memoryview:
        if not hasattr(self._own, "buffer"):
            # Not from the heap, which would keep a block for every thread that there has ever been.
            self._own.buffer = mmap.mmap(-1, self._block_bytes)
        return memoryview(self._own.buffer)[:nbytes]


def as_tensor(buffer: memoryview, dtype: torch.dtype) -> Tensor:
    """The same memory, 1-D."""
    return torch.frombuffer(buffer, dtype=torch.uint8).view(dtype)


def checksum(buffer: memoryview) -> int:
    return zlib.crc32(buffer)


def write_block(fd: int, position: int, buffer: memoryview) -> None:
    while buffer:
        written = os.pwrite(fd, buffer, position)
        position, buffer = position + written, buffer[written:]


def read_block(fd: int, position: int, buffer: memoryview) -> None:
    """Fills the buffer; raises ValueError at the end of the file."""
    while buffer:
        got = os.preadv(fd, [buffer], position)
        if not got:
            raise ValueError("the file is shorter than it should be")
        position, buffer = position + got, buffer[got:]


def copy_out(source: Tensor, start: int, buffer: memoryview) -> None:
    """Fills the buffer with elements of a tensor from number ``start``."""
    out = as_tensor(buffer, source.dtype)
    stop = start + out.numel()
    if source.is_contiguous():
        out.copy_(source.reshape(-1)[start:stop])
        return
    at = 0
    for box in cut(source.shape, start, stop):
        out[at : at + box.numel].view(box.sizes).copy_(source[box.slices()])
        at += box.numel


def copy_in(target: Tensor, wanted: Box, sizes: tuple[int, ...], start: int, block: Tensor) -> None:
    """Copies what a block has of a box.

    Args:
        target: the box's elements, in its shape.
        wanted: the box, of a chunk.
        sizes: of the chunk.
        start: number of the block's first element in the chunk.
        block: 1-D.
    """
    at = 0
    for run in cut(sizes, start, start + block.numel()):
        both = run.overlap(wanted)
        if both:
            found = block[at : at + run.numel].view(run.sizes)
            target[both.slices(wanted.offsets)].copy_(found[both.slices(run.offsets)])
        at += run.numel
