"""The state that Lion keeps for a parameter, as data.

Everything that stores, moves, checks or saves state iterates over columns, so that another kind of state is another
`StateColumn`, its arithmetic in reference.py and the kernels, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

EXP_AVG = "exp_avg"  # the momentum


@dataclass(frozen=True)
class StateColumn:
    """One kind of state, kept for every element, or for every block of elements, of a parameter.

    Attributes:
        name: key of the state's tensor in ``optimizer.state[p]`` and in checkpoints.
        dtype: storage dtype.
        block: number of consecutive elements of the parameter, in memory order, that share one element of the state.
    """

    name: str
    dtype: torch.dtype
    block: int = 1

    def numel(self, length: int) -> int:
        """Number of elements kept for ``length`` elements of a parameter."""
        return -(-length // self.block)

    def shape(self, of: Sequence[int]) -> tuple[int, ...]:
        """Shape of the state's tensor for a parameter of shape ``of``: the same, or 1-D where elements share one."""
        if self.block == 1:
            return tuple(of)
        length = 1
        for size in of:
            length *= size
        return (self.numel(length),)
