"""Marks that tests in several folders use. conftest.py has set TRITON_INTERPRET by the time this is imported."""

import pytest

from lion_dist.update import dispatch

# For tests that give use_triton=True CPU tensors.
needs_interpreter = pytest.mark.skipif(
    not dispatch.interpreting(),
    reason="Triton's interpreter is off (there is a GPU, and tests/gpu runs the kernels) or triton is missing",
)
