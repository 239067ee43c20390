"""Marks that tests in several folders use. conftest.py has set TRITON_INTERPRET by the time this is imported."""

from importlib.util import find_spec

import pytest

from lion_dist.update.backends import interpreting

# For tests that give use_triton=True CPU tensors.
needs_interpreter = pytest.mark.skipif(
    not interpreting(),
    reason="Triton's interpreter is off (there is a GPU, and tests/gpu runs the kernels) or triton is missing",
)


def skip_module_without(*packages: str) -> None:
    """Skips the calling test module where a package is missing, without importing it.

    A rank imports its test's module before it hides the GPUs from itself (tests/harness.py), and DeepSpeed chooses its
    device when it is imported.
    """
    for package in packages:
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed", allow_module_level=True)
