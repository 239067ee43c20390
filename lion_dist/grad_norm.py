"""Clipping of gradients that `Lion` steps: plain tensors and DTensors of any number of meshes, in one call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ._torch_compat import foreach_mul_, foreach_norm
from .fsdp import is_dtensor, local, local_gradients
from .update.reference import clip_coefficient


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor], max_norm: float, process_groups: Sequence[dist.ProcessGroup] = ()
) -> Tensor:
    """Clips the gradients of all parameters together to a 2-norm of at most ``max_norm``, in place.

    Unlike ``torch.nn.utils.clip_grad_norm_`` it takes DTensors of several meshes, and DTensors beside plain tensors.
    Each element counts once: a plain tensor counts as replicated, a DTensor by its placements. It is a collective call:
    every dimension of every mesh, and every process group, makes one all-reduce. All ranks must give parameters on the
    same meshes, in the same order.

    The norm is a sum of squares in float64, rounded once. `ShardedLion` has its own ``clip_grad_norm_``.

    Args:
        parameters: parameters, of which those without a gradient are left out; on one device.
        max_norm: > 0; infinite: the gradients are only measured.
        process_groups: groups whose ranks hold other parts of the model, such as the stages of a pipeline, or FSDP1's
            parts of flat parameters.

    Returns:
        The norm before clipping: float32, shape (), on the gradients' device, the same on every rank. The host does not
        wait for it.

    Raises:
        ValueError: ``max_norm`` is not > 0, or the gradients are on several devices.
        TypeError: only one of a parameter and its gradient is a DTensor.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm must be > 0, got {max_norm}")
    params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    counted = local_gradients(params, [p.grad for p in params])
    devices = {g.device for g in counted if g is not None} or {local(p).device for p in params} or {torch.device("cpu")}
    if len(devices) > 1:
        raise ValueError(f"gradients are on {', '.join(sorted(map(str, devices)))}; expected one device")
    total = _total(params, counted, devices.pop())
    for group in process_groups:
        dist.all_reduce(total, group=group)
    norm, coefficient = clip_coefficient(total, max_norm)
    # The gradients themselves: those that are counted may be copies in other placements. Scaling is linear.
    if grads := [local(p.grad) for p in params if p.grad is not None]:
        foreach_mul_(grads, coefficient)
    return norm


def _total(params: Sequence[Tensor], grads: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """The sum of squares over all meshes: float64, shape ().

    Args:
        params: the parameters.
        grads: this rank's part of each gradient, in the placements of its parameter, or None.
        device: their device.
    """
    by_mesh: dict[object, list[Tensor]] = {None: []}  # None: plain tensors
    for p, g in zip(params, grads, strict=True):
        mesh = p.device_mesh if is_dtensor(p) else None  # type: ignore[attr-defined]
        own = by_mesh.setdefault(mesh, [])
        if g is not None and g.numel() and (mesh is None or _counts_here(p)):
            own.append(g)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for mesh, own in by_mesh.items():
        of_mesh = torch.zeros_like(total)
        if own:
            of_mesh += torch.stack(foreach_norm(own, 2, dtype=torch.float64)).square().sum()
        if mesh is not None:
            for dimension in range(mesh.ndim):  # type: ignore[attr-defined]
                dist.all_reduce(of_mesh, group=mesh.get_group(dimension))  # type: ignore[attr-defined]
        total += of_mesh
    return total


def _counts_here(p: Tensor) -> bool:
    """Whether this rank counts its part of a DTensor: of replicas, the first counts."""
    coordinate = p.device_mesh.get_coordinate()  # type: ignore[attr-defined]
    placements = p.placements  # type: ignore[attr-defined]
    return all(not placement.is_replicate() or at == 0 for placement, at in zip(placements, coordinate, strict=True))
