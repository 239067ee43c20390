"""The state that Lion keeps for a parameter, as data.

Everything that stores, moves, checks or saves state iterates over columns, so that another kind of state is another
`StateColumn`, its arithmetic in reference.py and the kernels, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

EXP_AVG = "exp_avg"  # the momentum
EXP_AVG_SCALE = "exp_avg_scale"  # scales of an 8-bit momentum (codecs.py)
REMAINDER = "remainder"  # of master weights (codecs.py)


@dataclass(frozen=True)
class StateColumn:
    """One kind of state, kept for every element, or for every block of elements, of a parameter.

    Attributes:
        name: key of the state's tensor in ``optimizer.state[p]`` and in checkpoints.
        dtype: storage dtype.
        block: number of consecutive elements of the parameter, in memory order, that share one element of the state.
        saved_dtypes: dtypes in which a state_dict or a checkpoint may hold the state; empty: only ``dtype``.
        of_param: whether the half of the rule that writes the parameter reads and writes the state too, so that it is
            needed wherever that half is done.
        keeps_saved: whether loaded state stays in the dtype in which it was saved; otherwise it is cast to ``dtype``.
    """

    name: str
    dtype: torch.dtype
    block: int = 1
    of_param: bool = False
    # How state is loaded does not make two columns differ.
    saved_dtypes: tuple[torch.dtype, ...] = field(default=(), compare=False)
    keeps_saved: bool = field(default=False, compare=False)

    @property
    def loadable(self) -> tuple[torch.dtype, ...]:
        """The dtypes in which a state_dict or a checkpoint may hold the state."""
        return self.saved_dtypes or (self.dtype,)

    def loaded_dtype(self, saved: torch.dtype) -> torch.dtype:
        """The dtype of the state once it is loaded, where it was saved in another."""
        return saved if self.keeps_saved else self.dtype

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
