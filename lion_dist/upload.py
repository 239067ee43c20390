"""Tensors on a device from numbers of the host, without waiting for the device; also inside of CUDA graphs."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._torch_compat import current_raw_stream

CAPTURES = 16


def is_capturing() -> bool:
    """Whether the work that is enqueued now is captured in a CUDA graph. It never initialises CUDA."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def current_stream_number(device: torch.device) -> int:
    """The number of the current stream on a GPU; 0 on other devices."""
    return current_raw_stream(device.index) if device.type == "cuda" and current_raw_stream is not None else 0


def upload(numbers: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A new tensor from Python numbers, or nested sequences of them, without a host synchronisation.

    torch's host allocator does not reuse the pinned staging memory before the copy has run.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=dtype, device=device)
    refuse_in_capture()
    return torch.tensor(numbers, dtype=dtype, device="cpu", pin_memory=True).to(device, non_blocking=True)


def upload_integers(numbers: Sequence[int], device: torch.device) -> Tensor:
    """`upload` of at least one int64, in half the time. Call it outside of captures."""
    return _sent(_integers(numbers), device)


def upload_bytes(data: bytes, device: torch.device) -> Tensor:
    """`upload` of at least one uint8, in half the time. Call it outside of captures."""
    return _sent(torch.frombuffer(bytearray(data), dtype=torch.uint8), device)


def _sent(t: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return t.to(device)
    pinned = torch.empty(t.shape, dtype=t.dtype, device="cpu", pin_memory=True)
    return pinned.copy_(t).to(device, non_blocking=True)


def _integers(numbers: Sequence[int]) -> Tensor:
    return torch.frombuffer(array("q", numbers), dtype=torch.int64)


def refuse_capture(what: str) -> None:
    """Raises RuntimeError if a CUDA graph is being captured, which would contain ``what``, a part of ShardedLion."""
    if is_capturing():
        raise RuntimeError(
            f"{what} cannot be captured in a CUDA graph, since its ranks agree through the host in each step, and "
            "replays run nothing there: leave it out of the capture, or use lion_dist.Lion, whose step can be captured"
        )


def refuse_in_capture() -> None:
    """Raises RuntimeError while a CUDA graph is being captured: replays would read staging memory again."""
    if is_capturing():
        raise RuntimeError(
            "a CUDA graph is being captured, and something that step() keeps on the GPU has changed since the last "
            "step (parameters or state that moved, the dtypes of gradients, or a hyper-parameter other than lr): make "
            "one step as it is now, and then capture"
        )


class CapturedUploads:
    """Uploads of int64 numbers that CUDA graphs may capture: replays copy them again.

    The pinned memory of a captured upload is written once, and kept as long as this object. It is made beforehand,
    because a capture forbids to make it.

    Args:
        count: how many numbers an upload has.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._free: list[Tensor] = []
        self._captured: list[Tensor] = []

    def prepare(self) -> None:
        """Makes memory for CAPTURES captures, if there is none. Call it outside of captures."""
        if not self._free:
            pinned = torch.empty(CAPTURES, self._count, dtype=torch.int64, device="cpu", pin_memory=True)
            self._free = list(pinned)

    def upload(self, numbers: Sequence[int], device: torch.device) -> Tensor:
        """A new tensor on a device.

        Raises:
            RuntimeError: all memory that was made beforehand has been used.
        """
        if not self._free:
            raise RuntimeError(
                f"step() was captured in {CAPTURES} CUDA graphs without a step outside of a capture in between: make "
                "one, and then capture more"
            )
        pinned = self._free.pop()
        self._captured.append(pinned)
        pinned.copy_(_integers(numbers))
        return pinned.to(device, non_blocking=True)
