"""Clipping of gradients together: plain tensors and DTensors of any number of meshes, or several ShardedLions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from ._torch_compat import foreach_mul_, foreach_norm
from .dtensors import local, local_gradients
from .hyper_values import to_max_norm
from .meshes import Placing, device_without_tensors, groups_to_sum, reduced_over, sum_over_meshes
from .sharded_access import clip_optimizers
from .sharded_lion import ShardedLion
from .update.reference import clip_coefficient


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | ShardedLion | Iterable[Tensor] | Iterable[ShardedLion],
    max_norm: float,
    process_groups: Iterable[dist.ProcessGroup] = (),
) -> Tensor:
    """Clips the gradients of all parameters, or of several ShardedLions, together to a 2-norm of at most ``max_norm``.

    Parameters are those of a `Lion`, or of any optimizer that reads ``p.grad``, which is scaled in place. Unlike
    ``torch.nn.utils.clip_grad_norm_`` it takes DTensors of several meshes, and DTensors beside plain tensors. Each
    element counts once: a plain tensor counts as replicated, a DTensor by its placements. It is a collective call:
    every dimension of every mesh, and every process group, makes one all-reduce. All ranks must give parameters on the
    same meshes, in the same order.

    ShardedLions are given themselves, in the same order on every rank, and clipped by one coefficient as their own
    ``clip_grad_norm_`` does it. Their process groups may differ: one must have the ranks of all others. Ranks that a
    narrower group lacks are taken to hold other parameters, as with experts beside dense parameters; give
    ``process_groups`` only for parts of the model on ranks outside the widest group. Each element counts once.

    The norm is a sum of squares in float64, rounded once. Gradients are multiplied by a float32 coefficient, in float32
    or in their own dtype if that is wider, and rounded once.

    Args:
        parameters: parameters, of which those without a gradient are left out; on one device. Or one or several
            ShardedLions.
        max_norm: > 0; infinite: the gradients are only measured.
        process_groups: groups whose ranks hold other parts of the model, such as the stages of a pipeline, or FSDP1's
            parts of flat parameters. The meshes of DTensors count by themselves, and are refused here.

    Returns:
        The norm before clipping: float32, shape (), on the gradients' device, the same on every rank. The host does not
        wait for it, unless gradients are on the CPU.

    Raises:
        ValueError: ``max_norm`` is not > 0, the gradients are on several devices, ranks of ``process_groups`` would
            count twice, or no ShardedLion's process group has the ranks of all others.
        TypeError: an argument is of another type, parameters stand beside ShardedLions, there are other optimizers, a
            gradient is sparse or complex, or only one of a parameter and its gradient is a DTensor.
    """
    a_module = isinstance(parameters, nn.Module) and not isinstance(parameters, nn.ParameterList)
    if a_module or not isinstance(parameters, (Tensor, Optimizer, Iterable)):
        raise TypeError(
            f"clip_grad_norm_() takes parameters or ShardedLions, got a {type(parameters).__name__}: give parameters, "
            "such as model.parameters()"
        )
    given = [parameters] if isinstance(parameters, (Tensor, Optimizer)) else list(parameters)
    if any(isinstance(o, Optimizer) for o in given):
        return clip_optimizers(_sharded_lions(given), max_norm, process_groups)
    return _clip_parameters(given, max_norm, process_groups)


def _sharded_lions(given: Sequence[Any]) -> list[ShardedLion]:
    """Raises TypeError unless all are ShardedLions."""
    for o in given:
        if isinstance(o, Optimizer) and not isinstance(o, ShardedLion):
            raise TypeError(
                f"clip_grad_norm_() takes parameters or ShardedLions, got a {type(o).__name__}: give the parameters "
                "that it steps, such as model.parameters() or [p for group in optimizer.param_groups for p in "
                'group["params"]]'
            )
    for o in given:
        if not isinstance(o, ShardedLion):
            raise TypeError(
                f"clip_grad_norm_() takes parameters or ShardedLions, got both: a {type(o).__name__} stands beside a "
                "ShardedLion. Give the other parameters to a ShardedLion too, whose process_group is the ranks that "
                "hold replicas of them"
            )
    if len(set(map(id, given))) < len(given):
        raise ValueError("clip_grad_norm_() got a ShardedLion twice, whose gradients would count twice: give it once")
    return list(given)


def _clip_parameters(params: Sequence[Any], max_norm: float, process_groups: Iterable[dist.ProcessGroup]) -> Tensor:
    for p in params:
        if not isinstance(p, Tensor):
            raise TypeError(f"clip_grad_norm_() takes parameters or ShardedLions, got {type(p).__name__} {p!r:.80}")
        if p.grad is not None and (p.grad.layout != torch.strided or not p.grad.is_floating_point()):
            raise TypeError(
                f"a parameter of shape {tuple(p.shape)} has a gradient of {p.grad.dtype} and {p.grad.layout}; expected "
                "dense, real gradients: clip others by themselves"
            )
    max_norm = to_max_norm(max_norm)
    process_groups = groups_to_sum(process_groups, map(Placing.of, params))
    counted = local_gradients(params, [p.grad for p in params])
    devices = {g.device for g in counted if g is not None} or {local(p).device for p in params}
    devices = devices or {device_without_tensors(process_groups)}
    if len(devices) > 1:
        raise ValueError(f"gradients are on {', '.join(sorted(map(str, devices)))}; expected one device")
    total = reduced_over(process_groups, _total(params, counted, devices.pop()))
    norm, coefficient = clip_coefficient(total, max_norm)
    # The gradients themselves: those that are counted may be copies in other placements. Scaling is linear.
    _scale([local(p.grad) for p in params if p.grad is not None], coefficient)
    return norm


def _scale(grads: Sequence[Tensor], coefficient: Tensor) -> None:
    """Multiplies gradients in place by one scalar, float32, shape (), and rounds each product once.

    On GPUs torch rounds a factor of shape () to the dtype of a tensor that has dimensions. In bfloat16 the factor is
    then off by up to 0.2 %. Where both have dimensions, or neither has, torch promotes and multiplies in float32.
    """
    together: list[Tensor] = []
    of_one_dimension = coefficient.view(1)
    for g in grads:
        if g.device.type == "cpu" or g.element_size() >= coefficient.element_size():
            together.append(g)
        else:
            g.mul_(of_one_dimension if g.dim() else coefficient)
    if together:
        foreach_mul_(together, coefficient)


def _total(params: Sequence[Tensor], grads: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """The sum of squares over all meshes: float64, shape ().

    Args:
        params: the parameters.
        grads: this rank's part of each gradient, in the placements of its parameter, or None.
        device: their device.
    """
    by_placing: dict[Placing, list[Tensor]] = {Placing(): []}
    for p, g in zip(params, grads, strict=True):
        own = by_placing.setdefault(Placing.of(p), [])
        if g is not None and g.numel():
            own.append(g)
    return sum_over_meshes((placing, _sum_of_squares(own, device)) for placing, own in by_placing.items())


def _sum_of_squares(grads: Sequence[Tensor], device: torch.device) -> Tensor:
    if not grads:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(foreach_norm(grads, 2, dtype=torch.float64)).square().sum()
