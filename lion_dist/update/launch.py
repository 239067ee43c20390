"""Launches of compiled Triton kernels, without the Python that Triton runs at each to find out which one is meant:
45 us on a slow host, of the 60 that a launch takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_compiled: dict[tuple[Any, ...], Any] = {}


def _kind(argument: Tensor | int | None) -> Any:
    """What Triton specialises a kernel for."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    return type(argument)


def launch(
    kernel: Any, programs: int, arguments: Sequence[Tensor | int | None], constants: Sequence[Any], num_warps: int
) -> None:
    """Launches a kernel on the device of its first argument, a tensor, which must be the current device.

    Args:
        kernel: of `triton.jit`, whose constexpr parameters come last, and whose integers are not specialised.
        arguments: the others, in order. None is a constexpr of its own.
        constants: of the constexpr parameters, in order.
        num_warps: a program.
    """
    key = (id(kernel), torch.cuda.current_device() if torch.cuda.is_initialized() else None, num_warps)
    key += (*map(_kind, arguments), *constants)
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[(programs, 1, 1)](*arguments, *constants)
        return
    # No fused multiply-add: every product and sum is rounded on its own, as in reference.py.
    compiled = kernel[(programs,)](*arguments, *constants, num_warps=num_warps, enable_fp_fusion=False)
    if compiled is not None:  # the interpreter compiles nothing
        _compiled[key] = compiled
