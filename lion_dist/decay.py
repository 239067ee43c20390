"""Parameter groups of a model: what decays, and what does not."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from .fsdp import is_flat_view
from .hyper_values import to_weight_decay


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Divides a model's parameters into two named groups, for any optimizer of torch's form.

    Parameters of two or more dimensions, such as the matrices of linear layers and embeddings, decay. Those of fewer
    dimensions, such as biases and the gains of norms, do not. Frozen parameters are in the groups too, because they may
    be unfrozen later. A parameter that several modules share is in them once, under its first name.

    The dimensions of a DTensor are those of the whole parameter, so that a model may be sharded by FSDP2 or tensor
    parallelism before. FSDP1 replaces parameters by one-dimensional views while they are sharded: make the groups
    before it wraps the model with ``use_orig_params=True``, which keeps the parameters.

    Args:
        model: the module whose ``named_parameters()`` are divided, in their order.
        weight_decay: weight decay of the first group, finite and >= 0; a number of any kind.

    Returns:
        Two groups, the first for what decays. Each has ``params`` (a list of parameters, which may be empty),
        ``param_names`` (their names, with which state is loaded by name) and ``weight_decay`` (0.0 in the second).

    Raises:
        TypeError: ``model`` is not a module, or FSDP1 manages one of its parameters.
        ValueError: a lazy parameter has no shape yet, or ``weight_decay`` is out of range.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"decay_groups needs the model, a torch.nn.Module, got a {type(model).__name__}")
    decays: dict[str, nn.Parameter] = {}
    others: dict[str, nn.Parameter] = {}
    for name, p in model.named_parameters():
        if is_flat_view(p):
            raise TypeError(
                f"parameter {name!r} is managed by FSDP1, which shows it in one dimension (shape {tuple(p.shape)}), so "
                "that matrices cannot be told from biases: call decay_groups before FSDP1 wraps the model with "
                "use_orig_params=True, or shard the model by FSDP2 (fully_shard)"
            )
        if is_lazy(p):
            raise ValueError(f"parameter {name!r} has no shape yet: run the model once before making the groups")
        (decays if p.ndim >= 2 else others)[name] = p
    return [_group(decays, to_weight_decay(weight_decay)), _group(others, 0.0)]


def _group(named: dict[str, nn.Parameter], weight_decay: float) -> dict[str, Any]:
    return {"params": list(named.values()), "param_names": list(named), "weight_decay": weight_decay}
