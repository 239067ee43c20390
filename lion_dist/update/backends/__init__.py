"""How the rule runs: as fused Triton kernels on GPUs, as compiled or chunked torch on CPUs, as plain torch elsewhere.

`make_batches` is the one place that chooses, and this file the only one that tries to import triton.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..segments import Segment, StepTensors
from ..state import EXP_AVG
from .batch import SIGNS, Batch, Mix
from .cpu import CpuBatch
from .cpu_codes import CodesBatch
from .plain import PlainBatch, is_linear

try:
    from .triton import TritonBatch
except ImportError:  # no triton: macOS, Windows, some CPU installations
    HAS_TRITON = False
else:
    HAS_TRITON = True


def interpreting() -> bool:
    """Whether Triton runs its kernels in its interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    if not HAS_TRITON:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def check_use_triton(use_triton: bool | None) -> None:
    """Raises TypeError or ValueError for a ``use_triton`` that is not None, True or False, or that needs a Triton which
    is not installed."""
    if use_triton is not None and not isinstance(use_triton, bool):
        raise TypeError(f"use_triton must be None, True or False, got {type(use_triton).__name__} {use_triton!r}")
    if use_triton and not HAS_TRITON:
        raise ValueError("use_triton=True, but triton cannot be imported: pip install triton, or use_triton=None")


def takes_triton(use_triton: bool | None, device: torch.device) -> bool:
    """Whether dense tensors on a device are stepped by Triton.

    Args:
        use_triton: None: if the device is a GPU and Triton is installed. True: always. False: never.
        device: the device of the tensors.

    Raises:
        ValueError: use_triton=True, and Triton cannot run on the device.
    """
    reachable = HAS_TRITON and (device.type == "cuda" or (device.type == "cpu" and interpreting()))
    if use_triton and not reachable:
        raise ValueError(f"use_triton=True needs parameters on a GPU, got {device}; use_triton=None falls back")
    # The interpreter is for tests: it is used only where it is asked for, never because an environment variable is set.
    return use_triton is True or (use_triton is None and reachable and device.type == "cuda")


def make_batches(
    tensors: StepTensors, segments: Sequence[Segment], grad_dtypes: Sequence[torch.dtype], use_triton: bool | None
) -> list[Batch]:
    """Divides segments by device, mix of columns and dtypes, and backend.

    Args:
        tensors: the tensors of which the segments are runs.
        segments: runs; empty ones are left out.
        grad_dtypes: dtype of each entry's gradient.
        use_triton: None: wherever Triton can be had on a GPU. True: everywhere. False: nowhere.
    """
    divided: dict[tuple[torch.device, Mix, bool], list[Segment]] = {}
    for s in segments:
        if s.length == 0:
            continue
        p, state = tensors.params[s.entry], tensors.state_of(s.entry)
        mix = Mix(p.dtype, grad_dtypes[s.entry], tuple(t.dtype for t in state.values()), tuple(state))
        linear = is_linear(tensors, s.entry)
        divided.setdefault((p.device, mix, linear), []).append(s)
    batches: list[Batch] = []
    for (device, mix, linear), of_mix in divided.items():
        if linear and takes_triton(use_triton, device):
            batches.append(TritonBatch(tensors, of_mix, device, mix))
        elif linear and device.type == "cpu" and mix.columns in ((EXP_AVG,), (SIGNS,)):
            batches.append(CpuBatch(tensors, of_mix, mix))
        elif linear and device.type == "cpu":
            batches.append(CodesBatch(tensors, of_mix))
        else:
            batches.append(PlainBatch(tensors, of_mix, linear))
    return batches
