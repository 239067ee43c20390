"""Lion.statistics() on a GPU, where the fused kernel makes the step that it describes."""

from __future__ import annotations

import pytest

from tests.scenarios.watched import CASES, check_steps

from .common import GPU, needs_gpu

pytestmark = [needs_gpu, pytest.mark.filterwarnings("ignore:lion_dist")]


@pytest.mark.parametrize("case", CASES)
def test_they_are_those_of_the_step(case: str) -> None:
    check_steps(case, "parameter", GPU)
