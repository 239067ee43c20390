"""The options of Lion in a DeepSpeed config, and their checks."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from .hyper_values import to_dtype, to_flag

# Keys of the config's ``optimizer.params`` that are arguments of Lion.
ARGUMENTS = ("lr", "betas", "weight_decay", "decoupled_weight_decay", "use_triton", "momentum_dtype", "maximize")
# Keys that configs for Adam and for DeepSpeed's own Lion contain, and that have no effect on Lion: they choose an
# implementation, or belong to Adam's rule. A warning names them.
WITHOUT_EFFECT = ("eps", "torch_adam", "fused", "foreach", "bias_correction", "set_grad_none")
# Keys that change the result of the optimizer that the config was written for -> the one value that describes Lion, and
# why. Any other value is refused.
ONLY = {
    "adam_w_mode": (True, "Lion's weight decay is decoupled from the gradient"),
    "amsgrad": (False, "Lion has no second moment"),
    "fp32_optimizer_states": (True, 'set "momentum_dtype": "bfloat16" for a momentum in 16 bits'),
}
ADAMS_BETAS = (0.9, 0.999)


def check_precision(group: dict[str, Any]) -> None:
    """Raises ValueError for master weights and for a momentum in 8 bits, which DeepSpeed does not allow for.

    Args:
        group: a parameter group, or arguments of Lion. It may lack either key.
    """
    if to_flag(group.get("master_weights", False), "master_weights"):
        raise ValueError(
            '"master_weights": true is not possible under DeepSpeed, which keeps float32 master weights of its own for '
            'bfloat16 and float16 models, and gives the optimizer those: leave it out, and "bf16_master_weights_and_'
            'grads", which turns them off, too'
        )
    if to_dtype(group.get("momentum_dtype")) == torch.int8:
        raise ValueError(
            '"momentum_dtype": "int8" is not possible under DeepSpeed: its universal and elastic checkpoints and '
            "safe_get_full_optimizer_state take from the state what has the shape of the parameters, and would read "
            "the codes of a momentum as numbers, without the scales of their blocks. Set "
            '"momentum_dtype": "bfloat16" for a momentum in 16 bits'
        )


def arguments(params: dict[str, Any]) -> dict[str, Any]:
    """Converts a config's ``optimizer.params`` to keyword arguments of Lion.

    Arguments that the config leaves out have Lion's defaults: lr 1e-4, betas (0.9, 0.99), weight_decay 0. (DeepSpeed's
    own Lion has lr 1e-3 and betas (0.9, 0.999).)

    Raises:
        ValueError: Lion does not have a parameter, or does not support its value. The error names it.
    """
    given = dict(params)
    if "max_grad_norm" in given:
        raise ValueError(
            'optimizer.params has "max_grad_norm", but optimizers do not clip gradients: remove it, and set '
            '"gradient_clipping" at the top level of the config'
        )
    for name, value in given.items():
        if value == "auto":
            raise ValueError(
                f'"{name}": "auto" is for Hugging Face\'s Trainer or Accelerate to replace by a value, and neither has '
                f"done so: give a value, or leave {name} out"
            )
    for name, (value, reason) in ONLY.items():
        if given.pop(name, value) != value:
            raise ValueError(
                f'"{name}": {str(not value).lower()} is not possible: {reason}. Leave it out, or set it to '
                f"{str(value).lower()}"
            )
    ignored = [name for name in WITHOUT_EFFECT if given.pop(name, None) is not None]
    if ignored:
        warnings.warn(f"lion_dist: optimizer parameters without meaning for Lion: {', '.join(ignored)}", stacklevel=2)
    unknown = sorted(given.keys() - {*ARGUMENTS, "master_weights"})
    if unknown:
        raise ValueError(f'"Lion" has no parameter {", ".join(unknown)}; expected one of {", ".join(ARGUMENTS)}')
    if tuple(given.get("betas", ())) == ADAMS_BETAS:
        warnings.warn(
            f"lion_dist: betas {ADAMS_BETAS} are Adam's. Lion's are (0.9, 0.99), or (0.95, 0.98) for language models: "
            "set them in the DeepSpeed config and, for the Hugging Face Trainer, as adam_beta1 and adam_beta2",
            stacklevel=2,
        )
    try:
        check_precision(given)
    except TypeError as error:
        raise ValueError(str(error)) from error
    given.pop("master_weights", None)
    return given


def check_modes(engine: Any) -> None:
    """Raises ValueError if the config turns on a mode in which DeepSpeed would step with an Adam of its own."""
    modes = {
        "zero_optimization.zenflow": engine.zenflow_config() is not None,
        "zero_optimization.offload_optimizer.super_offload": engine.super_offload(),
        "zero_optimization.offload_optimizer.ratio < 1": engine.zero_partial_offload() < 1,
    }
    for mode, is_on in modes.items():
        if is_on:
            raise ValueError(
                f'{mode}: in this mode DeepSpeed steps with its own Adam, whichever "optimizer" the config names. '
                "Leave it out to train with Lion; ordinary offload_optimizer and offload_param work"
            )
