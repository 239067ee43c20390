"""DTensors, the parameters of FSDP2 and tensor parallelism, as this rank holds them.

A DTensor's *local* tensor is what this rank holds of it: a plain tensor, which may be empty, and which Lion steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, is_
from typing import Any

from torch import Tensor

from ._torch_compat import LOCAL_TENSOR, SPEC, is_traceable_wrapper_subclass, version_of


def is_dtensor(t: Tensor) -> bool:
    """Whether t is a DTensor."""
    if not is_traceable_wrapper_subclass(t):
        return False
    from torch.distributed.tensor import DTensor  # takes half a second if no DTensor has been made yet

    return isinstance(t, DTensor)


def local(t: Any) -> Any:
    """The local tensor of a DTensor; anything else as it is. (`to_local` costs 20 us, because autograd records it.)"""
    return getattr(t, LOCAL_TENSOR, t)


def changes_of(t: Any) -> int:
    """A number that rises when a tensor is changed in place. Of a DTensor, FSDP2 changes the local tensor and user code
    the DTensor; each has a version of its own, and a placeholder counts further changes (sharding/placeholder.py)."""
    part = getattr(t, LOCAL_TENSOR, t)
    return version_of(t) if part is t else version_of(t) + version_of(part) + getattr(t, "changes", 0)


# For loops in C, because they run over every tensor in every step; in most models all parameters are DTensors, or none.
_LOCAL, _SPEC = attrgetter(LOCAL_TENSOR), attrgetter(SPEC)


def locals_of(tensors: Sequence[Any]) -> list[Any]:
    """`local` for each tensor."""
    try:
        return list(map(_LOCAL, tensors))
    except AttributeError:  # some are plain tensors, or None
        return list(map(local, tensors))


def local_gradients(params: Sequence[Any], grads: Sequence[Any]) -> list[Any]:
    """This rank's part of each gradient, sharded as its parameter is.

    Tensor parallelism may leave a gradient in other placements, such as partial sums for the weight of a norm under
    sequence parallelism. A collective then brings it into its parameter's placements, on every rank alike, as DTensor
    does in the steps of torch's optimizers and FSDP2 in its own backward.

    Args:
        params: the parameters.
        grads: their gradients, or None.

    Returns:
        Plain tensors; None where there is no gradient.

    Raises:
        TypeError: only one of a parameter and its gradient is a DTensor.
    """
    try:
        # FSDP2 gives a parameter and its gradient the same spec object, so this comparison is usually enough.
        alike = all(map(is_, map(_SPEC, params), map(_SPEC, grads)))
    except AttributeError:
        alike = False
    parts = list(map(_LOCAL, grads)) if alike else list(map(_local_gradient, params, grads))
    if set(map(type, parts)) <= _PLAIN:
        return parts
    # A collective may not have delivered some of them yet.
    return [part.wait() if hasattr(part, "wait") else part for part in parts]


_PLAIN = {Tensor, type(None)}


def _local_gradient(p: Any, g: Any) -> Any:
    if g is None:
        return None
    wanted, got = getattr(p, SPEC, None), getattr(g, SPEC, None)
    if wanted is got:
        return local(g)
    if wanted is None or got is None:
        raise TypeError(
            f"a {type(g).__name__} is the gradient of a {type(p).__name__} (shape {tuple(p.shape)}); expected both "
            "to be DTensors, or neither: was the model sharded after its backward?"
        )
    if wanted.placements != got.placements or wanted.mesh != got.mesh:
        g = g.redistribute(wanted.mesh, wanted.placements)
    return local(g)


def place_gradient(p: Any) -> None:
    """Brings ``p.grad`` of a DTensor into the placements of p; see `local_gradients`. A collective call if it has
    others. Within a backward all ranks of a mesh make these calls in one order, that of autograd."""
    grad = p.grad
    wanted, got = getattr(p, SPEC, None), getattr(grad, SPEC, None)
    if got is not None and wanted is not None and wanted is not got and wanted.placements != got.placements:
        p.grad = grad.redistribute(wanted.mesh, wanted.placements)


def placed_like(t: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor, as a DTensor placed like another one; itself if ``like`` is no DTensor."""
    if not is_dtensor(like):
        return t
    from torch.distributed.tensor import DTensor

    assert isinstance(like, DTensor)
    return DTensor.from_local(
        t.detach(), like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
