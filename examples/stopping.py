"""SIGTERM, by which schedulers and torchrun announce that a job is about to end: save, and end well.

The ranks must save in the same step, but the signal may find each in another one, or only some of them. So every rank
notes it and goes on, and every few steps, or every second if steps are long, they ask each other.
"""

import signal
from types import FrameType

import torch
import torch.distributed as dist

GRACE_S = 20  # torchrun kills what is left after 30
ASK_EVERY_S = 1.0  # at most so many seconds of training pass between two questions, but for longer steps


class Stopping:
    """Notes SIGTERM from when it is made.

    Args:
        steps: the ranks ask each other at least every so many.
    """

    def __init__(self, steps: int) -> None:
        self._asked = False
        self._steps = steps
        self._next = 0
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        signal.alarm(GRACE_S)  # ends the process: this rank may be waiting for one that is gone

    def agreed(self, step: int, seconds_a_step: float, device: torch.device) -> bool:
        """Whether any rank has been asked to stop, by what is known in this step. Every rank must call it in every
        step; in those in which they ask each other, the host waits for its device."""
        if step < self._next:
            return False
        said = torch.tensor([float(self._asked), seconds_a_step], device=device)
        if dist.is_initialized():
            dist.all_reduce(said, op=dist.ReduceOp.MAX)
        asked, seconds = said.tolist()
        self._next = step + max(1, min(self._steps, int(ASK_EVERY_S / max(seconds, 1e-9))))
        if asked:
            self.finish()  # all are still here, and a save takes as long as it takes
        return bool(asked)

    def finish(self) -> None:
        """Nothing is to be cut short any more."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.alarm(0)
