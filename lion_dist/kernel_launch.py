"""Launches compiled Triton kernels without the Python that Triton runs in each launch to find the compiled kernel. That
takes 45 us on a slow host, of the 60 that a launch takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_compiled: dict[tuple[Any, ...], Any] = {}


def _kind(argument: Tensor | int | None) -> Any:
    """The properties of an argument that Triton specialises a kernel for."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    return type(argument)


def launch(
    kernel: Any,
    programs: int,
    arguments: Sequence[Any],
    constants: Sequence[Any],
    num_warps: int,
    max_registers: int | None = None,
) -> None:
    """Launches a kernel on the device of its first argument, a tensor, and on that device's current stream.

    Args:
        kernel: made by `triton.jit`; its constexpr parameters come last, and its integers are not specialised.
        programs: number of programs.
        arguments: values of the other parameters, in order: tensors, integers and None, which counts as a constexpr.
        constants: values of the constexpr parameters, in order.
        num_warps: number of warps of a program.
        max_registers: number of registers that a thread may use; None leaves it to the compiler.
    """
    device = arguments[0].get_device()  # -1: the CPU
    if device >= 0 and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, programs, arguments, constants, num_warps, max_registers)
        return
    key = (id(kernel), device, num_warps, max_registers, *map(_kind, arguments), *constants)
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[(programs, 1, 1)](*arguments, *constants)
        return
    # No fused multiply-add: every product and sum is rounded on its own.
    options = {} if max_registers is None or torch.version.hip else {"maxnreg": max_registers}  # an option of NVIDIA's
    compiled = kernel[(programs,)](*arguments, *constants, num_warps=num_warps, enable_fp_fusion=False, **options)
    if compiled is not None:  # the interpreter compiles nothing
        _compiled[key] = compiled
