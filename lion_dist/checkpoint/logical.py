"""Tensors in the shape of the whole parameter, though this rank may hold only a part.

FSDP1 leaves a rank with a run of consecutive elements of a parameter. Such a run is shown as a `BoxTensor` of the
parameter's own shape. Parameters of FSDP2 and tensor parallelism are DTensors, which have that shape already.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._torch_compat_distributed import flat_param_slices
from ..dtensors import is_dtensor, local
from ..sharding.box_tensor import BoxTensor


class FlatSlice(NamedTuple):
    """The run of elements that this rank has of a parameter that FSDP1 has flattened.

    Attributes:
        shape, strides: of the whole parameter, which is dense.
        start: index of the run's first element in memory order; its length is that of the parameter on this rank.
    """

    shape: torch.Size
    strides: tuple[int, ...]
    start: int


def flat_slices(model: nn.Module) -> dict[int, FlatSlice]:
    """The slices of all parameters that FSDP1 has flattened, by ``id(p)``.

    Raises:
        ValueError: the model is wrapped with use_orig_params=False.
    """
    return {id(p): FlatSlice(shape, tuple(strides), start) for p, shape, strides, start in flat_param_slices(model)}


class Logical:
    """Shows a model's parameters, and tensors sharded like them, in the shapes of the whole parameters."""

    def __init__(self, model: nn.Module) -> None:
        self._flat = flat_slices(model)

    def __call__(self, p: Tensor, t: Tensor) -> Tensor:
        """Shows a tensor in the shape of the whole parameter.

        Args:
            p: a parameter of the model.
            t: p itself, or a tensor of the same shape and sharding.

        Returns:
            A view of ``t``: a BoxTensor where FSDP1 has left a part of p on this rank, else a tensor of the same kind.
        """
        if isinstance(t, BoxTensor) or id(p) not in self._flat:
            return t.detach()
        shape, strides, start = self._flat[id(p)]
        if t.numel() == shape.numel():  # this rank has all of it
            return t.detach().as_strided(shape, strides)
        runs = [(start, t.detach().reshape(-1))] if t.numel() else []
        return BoxTensor.of_runs(shape, strides, runs, t)

    def if_alike(self, p: Tensor, t: Tensor) -> Tensor | None:
        """Shows an entry of ``optimizer.state`` in the shape of the whole parameter, if it is sharded like p.

        It is if it has p's shape, or that of p's local tensor. Where ranks disagree, `union.unite` refuses the save.

        Returns:
            A view of ``t``, as from calling this object; None if ``t`` has another shape.
        """
        if isinstance(t, BoxTensor) or is_dtensor(t):
            return t.detach() if t.shape == p.shape else None
        if is_dtensor(p):
            return _as_dtensor(p, t) if t.shape == local(p).shape else None
        return self(p, t) if t.shape == p.shape else None

    def like(self, p: Tensor, t: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """A tensor of other parts.

        Args:
            p: a parameter of the model.
            t: a tensor that this object has shown in the shape of the whole of p.
            parts: parts of one dtype in place of `parts_of(t)`, of the same shapes.
        """
        return like(t if isinstance(t, BoxTensor) else p, parts)

    def shape(self, p: Tensor) -> tuple[int, ...]:
        """The shape of the whole parameter."""
        return tuple(self._flat[id(p)].shape if id(p) in self._flat else p.shape)

    def is_sharded(self, p: Tensor) -> bool:
        """Whether other ranks may hold other parts of the parameter."""
        return id(p) in self._flat or is_dtensor(p)


def parts_of(t: Any) -> list[Tensor]:
    """The plain tensors that hold this rank's elements of a tensor."""
    return list(t.parts) if isinstance(t, BoxTensor) else [local(t)]


def like(t: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """A tensor, of the kind of ``t``, of other parts: of one dtype, and of the shapes of `parts_of(t)`."""
    if isinstance(t, BoxTensor):
        return BoxTensor(t.shape, t.boxes, parts, (parts[0] if parts else t).dtype, t.device)
    return _as_dtensor(t, parts[0]) if is_dtensor(t) else parts[0]


def _as_dtensor(like: Tensor, t: Tensor) -> Tensor:
    """A DTensor whose local tensor is ``t``, placed like another one."""
    from torch.distributed.tensor import DTensor

    assert isinstance(like, DTensor)
    return DTensor.from_local(
        t.detach(), like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
