"""From bitsandbytes' Lion, with state in 32 or in 8 bits.

In 8 bits ``state1`` holds a code for each element, an index into the 256 levels of ``qmap1`` ("dynamic" map: from -0.99
to 1), and ``absmax1`` the largest absolute value of each block of consecutive elements in memory. A momentum is its
level times the largest value of its block. Read in the sources of bitsandbytes 0.50.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .groups import StateDict, lion_groups

BLOCKS = (256, 2048)  # elements that share a scale: now, and in earlier versions
LEVELS = 256


def from_bitsandbytes(state_dict: StateDict) -> StateDict:
    """Converts the state of bitsandbytes' Lion, with 32-bit or 8-bit state (``Lion8bit``, ``PagedLion8bit``).

    Momenta in 8 bits become float32 numbers: those that bitsandbytes' next step would compute with. A Lion with
    ``momentum_dtype=torch.int8`` rounds them to its own 8 bits when it loads them.

    Args:
        state_dict: The state_dict as bitsandbytes saves it.

    Returns:
        A state_dict with the same momenta and hyper-parameters.

    Raises:
        ValueError: The state is damaged, is one of FSDP's shards, or is another optimizer's.
    """
    state = {}
    for i, entry in state_dict["state"].items():
        values = {**entry, **entry.get("__bnb_optimizer_quant_state__", {})}
        m = values.get("state1")
        if not isinstance(m, Tensor) or "state2" in values:
            raise ValueError(
                f"parameter {i} has no state of bitsandbytes' Lion, but {sorted(map(str, values))}: expected state1 "
                "alone"
            )
        if not m.is_contiguous():
            raise ValueError(
                f"state1 of parameter {i} has strides {m.stride()}; expected a contiguous tensor: bitsandbytes steps "
                "memory, and which element of the parameter an element of state1 belongs to depends on its version"
            )
        state[i] = {"exp_avg": m if m.is_floating_point() else _dequantized(i, m, values)}
    return {"state": state, "param_groups": lion_groups(state_dict)}


def _dequantized(i: Any, codes: Tensor, values: dict[str, Any]) -> Tensor:
    """The momentum of a parameter, float32, in the shape of its codes."""
    if codes.dtype != torch.uint8:
        raise ValueError(f"state1 of parameter {i} is {codes.dtype}; expected float32 or, in 8 bits, uint8")
    if "max1" in values:
        raise ValueError(
            f"the state of parameter {i} has one scale for the whole parameter (block_wise=False); expected blocks: "
            "load it into bitsandbytes' optimizer, and start from the weights and from zero momenta here"
        )
    levels, largest = _numbers(i, values, "qmap1"), _numbers(i, values, "absmax1")
    if levels.numel() != LEVELS or (levels.abs() > 1).any():
        raise ValueError(f"qmap1 of parameter {i} is no map of {LEVELS} levels between -1 and 1")
    if (largest < 0).any():
        raise ValueError(f"absmax1 of parameter {i} has negative scales")
    n = codes.numel()
    counts = [-(-n // block) for block in BLOCKS]
    if largest.numel() not in counts:
        raise ValueError(
            f"absmax1 of parameter {i} has {largest.numel()} scales for {n} elements; expected {counts[0]}, one for "
            f"each {BLOCKS[0]} elements (or {counts[1]}, as in earlier versions)"
        )
    block = BLOCKS[counts.index(largest.numel())]
    level = levels.index_select(0, codes.reshape(-1).int())
    return (level * largest.repeat_interleave(block)[:n]).view(codes.shape)


def _numbers(i: Any, values: dict[str, Any], name: str) -> Tensor:
    t = values.get(name)
    if not isinstance(t, Tensor) or t.dtype != torch.float32 or t.dim() != 1:
        got = f"{tuple(t.shape)} {t.dtype}" if isinstance(t, Tensor) else f"a {type(t).__name__}"
        raise ValueError(f"{name} of parameter {i} is {got}; expected one dimension of float32")
    if not t.isfinite().all():
        raise ValueError(f"{name} of parameter {i} has numbers that are not finite")
    return t
