"""From flashoptim's FlashLion. Read in the sources of flashoptim 0.1.4.

Momentum: with quantize=True, int8 codes in the parameter's shape (``exp_avg::quantized``) and a float16 scale for each
group of 32 consecutive elements in memory (``exp_avg::scales``, whose bytes are shown as bfloat16 where the parameter
is). With y = code / 127 a momentum is y / (2 - abs(y)) times its scale. Otherwise ``exp_avg`` itself.

Weight: with master_weight_bits the error of the 16-bit weight (``error_bits``), as a fraction of half its unit in the
last place: int8 in 127ths (24 bits), int16 in 32767ths (32 bits). state_dicts show both in the parameter's dtype, int8
by its value and int16 by its bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ...dtensors import is_dtensor
from ...memory_order import flat, is_dense
from ...param_groups import names_of
from ...param_names import pair_groups
from .groups import StateDict, decoupled

GROUP = 32  # elements that share a scale
CODES, SCALES, ERRORS = "exp_avg::quantized", "exp_avg::scales", "error_bits"
LARGEST_CODE = 127
# Bytes of the error -> its dtype and largest value.
_ERRORS = {1: (torch.int8, 127), 2: (torch.int16, 32767)}
# Dtype of the weight -> bits of its fraction, mask and bias of its exponent.
_FORMATS = {torch.bfloat16: (7, 0xFF, 127), torch.float16: (10, 0x1F, 15)}


def from_flashoptim(
    state_dict: StateDict, optimizer: Optimizer, *, decouple_lr: bool = False
) -> tuple[StateDict, dict[str, Tensor]]:
    """Converts the state of flashoptim's ``FlashLion``, and the weights that it has in more than 16 bits.

        model.load_state_dict(...)                  # the bfloat16 weights
        optimizer = Lion(model.named_parameters(), master_weights=True, ...)
        lion_state, weights = convert.from_flashoptim(torch.load("flash.pt", weights_only=True), optimizer)
        optimizer.load_state_dict(lion_state)
        optimizer.take_master_weights(weights)

    Momenta and weights become the float32 numbers that FlashLion's next step would compute with. Those of weights are
    within 1/254 (24 bits) or 1/65534 (32 bits) of half a unit in the last place of the 16-bit weight from the ones that
    FlashLion rounded. A float32 model takes them with ``load_state_dict(weights, strict=False)``.

    Args:
        state_dict: ``FlashLion``'s state_dict, of whole parameters.
        optimizer: `Lion` or `ShardedLion` over the weights that were saved beside the state_dict, in FlashLion's
            groups. Parameters are matched as by `Lion.load_state_dict`: by name where both sides have names, else by
            position.
        decouple_lr: FlashLion's argument of this name, which its state_dict does not hold.

    Returns:
        A state_dict for ``optimizer``, with FlashLion's momenta and hyper-parameters; and float32 weights in the
        parameters' shapes, by the optimizer's names of them, for the parameters that have an error.

    Raises:
        ValueError: The state is damaged, is FSDP's, does not fit, or is another optimizer's; or there are weights, and
            the optimizer was made without names.
    """
    state: dict[int, dict[str, Tensor]] = {}
    groups: list[dict[str, Any]] = []
    weights: dict[str, Tensor] = {}
    count = 0
    pairs = pair_groups(state_dict["param_groups"], optimizer.param_groups, True)
    for number, (saved, live) in enumerate(pairs):
        ids = range(count, count + len(live["params"]))
        count += len(ids)
        decay = decoupled(saved, number) if decouple_lr else {"decoupled_weight_decay": False}
        hypers = {key: saved[key] for key in ("lr", "betas", "weight_decay")}
        groups.append({**hypers, **decay, "params": list(ids)})
        names: Sequence[str | None] = names_of(live) or [None] * len(ids)
        for i, theirs, p, name in zip(ids, saved["params"], live["params"], names, strict=True):
            entry = state_dict["state"].get(theirs)
            if not entry:
                continue
            _check_entry(theirs, entry, p)
            state[i] = {"exp_avg": _momentum(theirs, entry)}
            if ERRORS in entry:
                if name is None:
                    raise ValueError(
                        "the optimizer has no names of its parameters: make it from model.named_parameters(), so that "
                        "the weights that FlashLion has in more than 16 bits can be returned by name"
                    )
                weights[name] = _weight(theirs, p.detach(), entry[ERRORS], saved.get("master_bytewidth"))
    return {"state": state, "param_groups": groups}, weights


def _check_entry(i: Any, entry: dict[str, Any], p: Tensor) -> None:
    found = entry.keys() - {ERRORS}
    if found not in ({"exp_avg"}, {CODES, SCALES}):
        raise ValueError(
            f"parameter {i} has no state of FlashLion, but {sorted(map(str, entry))}: expected exp_avg, or {CODES} and "
            f"{SCALES}"
        )
    for key, t in entry.items():
        if not isinstance(t, Tensor) or is_dtensor(t) or not is_dense(t):
            raise ValueError(
                f"{key} of parameter {i} is a {type(t).__name__}; expected a dense tensor of the whole parameter. "
                "Under FSDP2 make FlashLion with compress_state_dict=False, and gather its state "
                "(get_optimizer_state_dict with full_state_dict=True)"
            )
        if key != SCALES and t.shape != p.shape:
            raise ValueError(f"{key} of parameter {i} has shape {tuple(t.shape)}; expected {tuple(p.shape)}")


def _momentum(i: Any, entry: dict[str, Tensor]) -> Tensor:
    if "exp_avg" in entry:
        m = entry["exp_avg"]
        if not m.is_floating_point():
            raise ValueError(f"exp_avg of parameter {i} is {m.dtype}; expected floating-point numbers")
        return m
    codes, scale = entry[CODES], entry[SCALES]
    groups = -(-codes.numel() // GROUP)
    if codes.dtype != torch.int8 or scale.dtype not in (torch.float16, torch.bfloat16) or scale.shape != (groups,):
        raise ValueError(
            f"parameter {i} has codes in {codes.dtype} and scales of shape {tuple(scale.shape)} in {scale.dtype}; "
            f"expected int8 and {groups} scales in float16, or bfloat16 of the same bytes"
        )
    scale = scale.view(torch.float16).float()
    if not ((scale >= 0) & scale.isfinite()).all():
        raise ValueError(f"{SCALES} of parameter {i} has numbers that are negative or not finite")
    y = flat(codes).float() / LARGEST_CODE
    m = torch.empty_like(codes, dtype=torch.float32)
    flat(m).copy_(y / (2 - y.abs()) * scale.repeat_interleave(GROUP)[: codes.numel()])
    return m


def _weight(i: Any, p: Tensor, errors: Tensor, bytes_of_master: Any) -> Tensor:
    """The weight with its error, float32, in the parameter's shape."""
    if p.dtype not in _FORMATS or is_dtensor(p):
        raise ValueError(
            f"parameter {i} of the optimizer is {p.dtype} ({type(p).__name__}); expected the bfloat16 or float16 "
            "weights of the whole parameter that were saved with FlashLion's state: load them into a model of that "
            "dtype first"
        )
    if bytes_of_master not in (3, 4):
        raise ValueError(f"the group of parameter {i} has master_bytewidth {bytes_of_master}; expected 3 or 4")
    error, largest = _errors(i, errors, *_ERRORS[bytes_of_master - 2])
    fraction, mask, bias = _FORMATS[p.dtype]
    # Subnormal numbers are as far apart as the smallest normal ones.
    exponent = (p.view(torch.int16).int() >> fraction & mask).clamp(min=1) - bias
    half_unit = (exponent.long() - fraction - 1 + 1023 << 52).view(torch.float64)  # a power of two, from its bits
    return p.float() + ((error / largest).double() * half_unit).float()


def _errors(i: Any, errors: Tensor, dtype: torch.dtype, largest: int) -> tuple[Tensor, int]:
    """The errors in units of ``1 / largest``, float32."""
    if errors.dtype == dtype:
        error = errors.float()
    elif errors.dtype in _FORMATS:
        error = errors.float() if dtype == torch.int8 else errors.view(torch.int16).float()
    else:
        raise ValueError(f"{ERRORS} of parameter {i} is {errors.dtype}; expected {dtype}, or the parameter's dtype")
    if not ((error.abs() <= largest) & (error == error.round())).all():
        raise ValueError(f"{ERRORS} of parameter {i} has values that are no integers from -{largest} to {largest}")
    return error, largest
