"""Master weights from float32 tensors, for `ShardedLion`: the same on every rank."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch.optim.optimizer import Optimizer

from .master_weights import NamedTensors, describe, find, put
from .sharding.agreement import Agreement
from .sharding.replicas import bits_checksum
from .update.state import REMAINDER


def take_on_all_ranks(
    optimizer: Optimizer, named: NamedTensors, group: dist.ProcessGroup, init_state: Callable[[], None]
) -> None:
    """Checks on every rank that the weights fit and that all ranks have the same, and then writes them.

    A collective call. Each rank writes the whole of the parameters, and of remainders what it keeps.

    Args:
        optimizer: the optimizer, whose ``state`` has a remainder for each parameter that ``named`` gives one.
        named: as for `Lion.take_master_weights`.
        group: the optimizer's ranks.
        init_state: makes state that is missing; a collective call.

    Raises:
        ValueError, TypeError, RuntimeError: on every rank, if the weights do not fit on any of them or differ; nothing
            has been changed.
    """
    with Agreement(group, "ShardedLion.take_master_weights()") as agreement:
        found = find(optimizer.param_groups, optimizer.state, named)
        agreement.says(describe(found, bits_checksum))
    init_state()
    put(found, lambda p: optimizer.state[p][REMAINDER])
