"""Parameters, buffers and extra states of a model on this rank, by key."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .._torch_compat import EXTRA_STATE, non_persistent_buffers
from .._torch_compat_distributed import unwrapped_names
from .keys import MODEL
from .logical import Logical
from .names import Names


@dataclass(frozen=True)
class ModelState:
    """Parameters, buffers and extra states of a model on this rank, by key.

    Attributes:
        params: parameters, in the shapes of the whole parameters.
        buffers: persistent buffers; every rank has its own.
        extra: modules that have an extra state.
    """

    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    extra: dict[str, nn.Module]

    @staticmethod
    def read(model: nn.Module, names: Names, logical: Logical) -> ModelState:
        """Reads a model.

        Args:
            model: the model.
            names: its names.
            logical: shows its parameters in their whole shapes.

        Raises:
            TypeError: a parameter or buffer is not dense or has no values.
        """
        params = {}
        for p in dict.fromkeys(p for _, p in model.named_parameters(remove_duplicate=False)):
            key = MODEL + names.of(p)
            params[key] = logical(p, _check_dense(key, p))
        non_persistent = {
            id(b)
            for module in model.modules()
            for name, b in module.named_buffers(recurse=False)
            if name in non_persistent_buffers(module)
        }
        buffers, extra = {}, {}
        for wrapped, b in model.named_buffers():
            if id(b) not in non_persistent:
                (name,) = unwrapped_names(model, wrapped)
                buffers[MODEL + name] = _check_dense(MODEL + name, b).detach()
        for wrapped, module in model.named_modules():
            if type(module).get_extra_state is not nn.Module.get_extra_state:
                (name,) = unwrapped_names(model, f"{wrapped}.{EXTRA_STATE}" if wrapped else EXTRA_STATE)
                extra[MODEL + name] = module
        return ModelState(params, buffers, extra)


def _check_dense(key: str, t: Tensor) -> Tensor:
    if t.is_meta or t.layout != torch.strided:
        kind = "on the meta device" if t.is_meta else f"of layout {t.layout}"
        raise TypeError(
            f"{key} is {kind}; a checkpoint holds dense tensors with values: materialize it (to_empty(), to_dense()), "
            "or take it out of the model"
        )
    return t
