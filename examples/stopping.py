"""SIGTERM, by which schedulers and torchrun announce that a job is about to end: save, and end well.

The ranks must save in the same step, but the signal may find each in another one, or only some of them. So every rank
notes it and goes on, and every few steps they ask each other.
"""

import signal
from types import FrameType

import torch
import torch.distributed as dist

GRACE_S = 20  # torchrun kills what is left after 30


class Stopping:
    """Notes SIGTERM from when it is made."""

    def __init__(self) -> None:
        self._asked = False
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        signal.alarm(GRACE_S)  # ends the process: this rank may be waiting for one that is gone

    def agreed(self, device: torch.device) -> bool:
        """Whether any rank has been asked to stop. Every rank must call it; the host waits for its device."""
        asked = torch.tensor(int(self._asked), device=device)
        if dist.is_initialized():
            dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        if asked.item():
            signal.alarm(0)  # all are still here, and a save takes as long as it takes
        return bool(asked.item())
