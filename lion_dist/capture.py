"""Steps inside of CUDA graphs: what can be captured, and errors for what cannot.

A graph repeats the kernels that were captured, with the addresses and numbers that they were given then. So a captured
step reads its lr from a tensor on the GPU, and everything else must stay as it was: which parameters have a gradient,
the addresses of parameters, gradients and state, and the other hyper-parameters.

[Note: Captured memory] What a graph reads must stay where it is, unchanged, for as long as the graph. So tables are
made before the capture, and those that a capture has read are kept until the optimizer loads a state, which replaces
the momenta that the graph writes. Only the addresses of gradients may be new, since a backward in the same graph makes
the gradients: replays copy them from pinned memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .dtensors import local
from .members import Members
from .param_groups import Group, kept_form


def check_capturable(members: Members | None, groups: Sequence[Group], absent: Sequence[bool]) -> None:
    """Checks that a step can be captured in a CUDA graph whose replays do what steps do.

    Args:
        members: those of the last step; None if there was none, or others now.
        groups: the optimizer's groups.
        absent: for each of the members, whether it had no gradient in the last step; empty if all had one.

    Raises:
        RuntimeError, ValueError: the step cannot be captured; the message says why.
    """
    if members is None:
        raise RuntimeError(
            "Lion.step() in a CUDA graph's capture needs state, tables and compiled kernels, which the first step "
            "with these parameters makes: make a step before the capture, as part of the warm-up"
        )
    for i in sorted(set(members.groups)):
        _check_group(i, groups[i], [p for p, group in zip(members.params, members.groups, strict=True) if group == i])
    for i, p in enumerate(members.params):
        if p.grad is None and not (absent and absent[i]):
            raise ValueError(
                f"parameter {i} (shape {tuple(p.shape)}) had a gradient in the last step and has none in this capture "
                "of a CUDA graph, whose replays would never step it: capture the backward before step(), or keep the "
                "gradients with zero_grad(set_to_none=False)"
            )
    for i, p in enumerate(members.params):
        device = local(p).device
        if device.type != "cuda" or device.index != torch.cuda.current_device():
            raise ValueError(f"parameter {i} is on {device}; a CUDA graph can only step those on the current GPU")


def _check_group(index: int, group: Group, params: Sequence[Tensor]) -> None:
    lr = group["lr"]
    device = local(params[0]).device
    if not isinstance(lr, Tensor) or lr.device != device:
        found = f"a tensor on {lr.device}" if isinstance(lr, Tensor) else f"the number {lr}"
        raise ValueError(
            f"lr of parameter group {index} is {found}, which a CUDA graph would keep in all replays; expected a "
            f"tensor on {device}, which schedulers fill in place: "
            f'group["lr"] = torch.tensor(lr, dtype=torch.float64, device="{device}")'
        )
    if kept_form(group)[0]:
        raise ValueError(
            f"parameter group {index} has an 8-bit momentum, which is rounded by numbers that the host draws for each "
            "step: replays of a CUDA graph would round alike, and the momentum would drift. Use another momentum_dtype"
        )
