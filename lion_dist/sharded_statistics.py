"""`ShardedLion.statistics`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .dtensors import local
from .meshes import Placing, device_without_tensors, groups_to_sum
from .param_groups import hyper_parameters
from .sharded_access import agreeing, check_last_steps, params_of, refuse_offloaded
from .statistics import Groups, Rows, check_arguments, check_same_names, name_numbers

if TYPE_CHECKING:
    from .sharded_lion import ShardedLion


@torch.inference_mode(False)  # tensors that are made in it could never be stepped outside
@torch.no_grad()
def sharded_statistics(optimizer: ShardedLion, by: str, flips: bool, process_groups: Groups) -> dict[str, float]:
    """Measures what the next step of a ShardedLion would do, over all ranks; see `ShardedLion.statistics`."""
    groups, stepper = optimizer.param_groups, optimizer._stepper
    # The argument is in the name of the call, since the ranks of meshes must have the same too.
    with agreeing(optimizer, f".statistics(by={by!r})") as agreement:
        check_arguments(by, flips)
        check_last_steps(optimizer)
        refuse_offloaded(optimizer, "statistics()")
        hypers = [hyper_parameters(group) for group in groups]
        placings = [shard.placing for shard in stepper.shards]
        process_groups = groups_to_sum(process_groups, placings, [stepper.group])
        agreement.says([f"flips={flips}, {len(process_groups)} process_groups"])
    prepared, scale = stepper.look(groups, optimizer._adopt)
    measured = [(shard.params, own) for shard, own in zip(stepper.shards, prepared, strict=True)]
    rows = Rows.find(groups, [p for params, _ in measured for p in params], by)
    sums = stepper.kept_signs.add_up(measured, groups, hypers, scale, rows, flips) or {Placing(): rows.zeros()}
    params = measured[0][0] if measured else params_of(optimizer)
    device = local(params[0]).device if params else device_without_tensors([stepper.group, *process_groups])
    check_same_names(rows.names, process_groups, device)
    total = stepper.total({placing: of_placing.to(device) for placing, of_placing in sums.items()}, stepper.group)
    assert total is not None  # there is a placing
    stepper.agree_on(total, process_groups)
    return name_numbers(rows.names, total.cpu())
