"""The rule through torch.compile, on 1-D CPU tensors: one graph for all lengths and hyper-parameters."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from .. import reference
from ..reference import Scalars

# The scalars are one tensor, not seven: fewer guards to check in a call, and fewer addresses to keep in registers.


def _step(p: Tensor, g: Tensor, m: Tensor, scalars: Tensor) -> None:
    reference.lion_step_(p, g, m, Scalars(*scalars.unbind()))


def _sign_step(g: Tensor, m: Tensor, packed: Tensor, scalars: Tensor) -> None:
    reference.sign_step_(g, m, packed, Scalars(*scalars.unbind()))


def _apply_signs(p: Tensor, packed: Tensor, scalars: Tensor) -> None:
    reference.apply_signs_(p, packed, Scalars(*scalars.unbind()))


class Compiled:
    """A function compiled at its first call, for each mix of dtypes anew.

    Args:
        function: writes into 1-D tensors; its last argument is the rule's scalars, float32, stacked. Functions must not
            share their code, whose recompilations torch counts and limits.
    """

    warned = False  # of any function

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function
        self._compiled: Callable[..., None] | None = None
        self.failed: set[tuple[torch.dtype, ...]] = set()  # mixes of dtypes that cannot be compiled

    def __call__(self, *tensors: Tensor) -> bool:
        """Calls the function, compiled.

        Args:
            tensors: its arguments.

        Returns:
            False if it cannot be compiled (often for want of a C++ compiler); then nothing has been written, and the
            first time a warning says so.
        """
        mix = tuple([t.dtype for t in tensors])
        if mix in self.failed:
            return False
        if self._compiled is None:
            self._compiled = torch.compile(self._function, dynamic=True, fullgraph=True)
        try:
            self._compiled(*tensors)
        except Exception as error:  # compilation precedes every write
            self.failed.add(mix)
            if not Compiled.warned:
                Compiled.warned = True
                reason = (str(error).strip().splitlines() or [""])[0]
                warnings.warn(
                    "lion_dist: torch.compile failed, so steps on the CPU run as plain torch, two to three times "
                    f"slower. Usually a C++ compiler such as g++ is missing. {type(error).__name__}: {reason}",
                    stacklevel=2,
                )
            return False
        return True


step_ = Compiled(_step)
sign_step_ = Compiled(_sign_step)
apply_signs_ = Compiled(_apply_signs)
