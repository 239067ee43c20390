"""Handles SIGTERM, by which schedulers and torchrun announce that a job is about to end: the run saves and ends.

The ranks must save in the same step, but the signal may reach them in different steps, or only some of them. So every
rank records the signal and goes on. Every few steps, or every second if steps are long, the ranks tell each other
whether any of them has received it.
"""

import signal
from types import FrameType

import torch
import torch.distributed as dist

GRACE_S = 20  # torchrun kills the processes after 30
ASK_EVERY_S = 1.0  # the ranks exchange at least this often, unless a single step takes longer


class Stopping:
    """Records SIGTERM from the moment at which it is made.

    Args:
        steps: the largest number of steps between two exchanges.
    """

    def __init__(self, steps: int) -> None:
        self._asked = False
        self._steps = steps
        self._next = 0
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        signal.alarm(GRACE_S)  # ends the process, since this rank may be waiting for one that has ended

    def agreed(self, step: int, seconds_a_step: float, device: torch.device) -> bool:
        """Whether any rank is known to have been asked to stop. Every rank must call it in every step. In steps in
        which the ranks exchange, the host waits for its device."""
        if step < self._next:
            return False
        said = torch.tensor([float(self._asked), seconds_a_step], device=device)
        if dist.is_initialized():
            dist.all_reduce(said, op=dist.ReduceOp.MAX)
        asked, seconds = said.tolist()
        self._next = step + max(1, min(self._steps, int(ASK_EVERY_S / max(seconds, 1e-9))))
        if asked:
            self.finish()  # all ranks are known to be running, so the save may take as long as it needs
        return bool(asked)

    def finish(self) -> None:
        """From now on ignores SIGTERM, so that nothing is interrupted."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.alarm(0)
