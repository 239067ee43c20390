"""What every test needs. TRITON_INTERPRET must be set before anything imports triton, and pytest imports this
file first: without a GPU the kernels run in Triton's interpreter, on CPU tensors."""

import logging
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores already
# Empty records by the thousand, which pytest would print below a failure under torch.compile.
logging.getLogger("torch.__trace").propagate = False


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
