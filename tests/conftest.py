"""Set-up of every test. TRITON_INTERPRET must be set before anything imports triton, and pytest imports this
file first: without a GPU the kernels run in Triton's interpreter, on CPU tensors."""

import logging
import os

import pytest
import torch

from tests import interpreter

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    interpreter.speed_up()
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores already
# Empty records by the thousand, which pytest would print below a failure under torch.compile.
logging.getLogger("torch.__trace").propagate = False


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def pytest_xdist_auto_num_workers() -> int:
    """One worker more than there are cores: many tests wait for a time-out or for another rank, and leave one idle."""
    return len(os.sched_getaffinity(0)) + 1 if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1) + 1
