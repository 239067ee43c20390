"""Check that plain parameters beside DTensors have the same gradients on all ranks of the DTensors' meshes.

Under tensor parallelism a parameter that is not parallelized is a plain tensor, and its gradients are alike on all
ranks of the mesh, which work on the same data. Under FSDP2 the ranks work on different data. Nothing averages the
gradients of a parameter in fully_shard's ignored_params over the mesh, so its replicas would differ without an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .memory_order import flat, laid_out_like
from .meshes import mesh_groups
from .sharding.averaged import compare
from .sharding.collectives import Membership
from .sharding.shard import Shard
from .update.segments import StepTensors

STEPS = 2  # as in `AveragedGradients`


class PlainGradients:
    """Compares the gradients of plain parameters over the meshes of others, in the first steps that have gradients.

    Args:
        membership: the ranks that hold replicas.
    """

    def __init__(self, membership: Membership) -> None:
        self._membership = membership
        self._left = 0

    def set_shards(self, shards: Sequence[Shard]) -> None:
        """Takes other shards. Compares again, if there are both kinds."""
        self._plain = [i for i, shard in enumerate(shards) if shard.placing.mesh is None]
        self._groups = mesh_groups(shard.params[0] for shard in shards)
        self._left = STEPS if self._plain and self._groups else 0

    def check(self, tensors: Sequence[StepTensors], wait: Callable[[], None] = lambda: None) -> None:
        """Compares if there are comparisons left; a collective call of the meshes' groups and the replicas' then.

        Args:
            tensors: those of all shards.
            wait: called first in that case; makes the current stream wait for the gradients.

        Raises:
            ValueError: on every rank, where a gradient differs.
        """
        if not self._left:
            return
        wait()
        grads: list[Tensor | None] = []
        numbers = []
        for i in self._plain:
            of_shard = tensors[i]
            for segment in of_shard.segments or ():
                g, p = of_shard.grads[segment.entry], of_shard.params[segment.entry]
                if g is not None:
                    g = flat(g if g.shape != p.shape else laid_out_like(g, p), segment.grad_start, segment.length)
                grads.append(g)
                numbers.append(of_shard.number(segment.entry))
        device = tensors[self._plain[0]].params[0].device
        # A rank that owns no element of them takes part with a zero.
        compared = grads or [torch.zeros(1, dtype=torch.float32, device=device)]
        found, evidence = set(), False
        for group in self._groups:
            unlike, proof = compare(compared, device, group)
            found |= {i for i, _, _ in unlike}
            evidence = evidence or proof
        differs, evident = self._membership.any_rank(bool(found), evidence)
        if differs:
            some = f"parameter {numbers[min(found)]}" if found else "a parameter"
            raise ValueError(
                f"{some} is a plain tensor beside DTensors, and its gradients differ between the ranks of their mesh, "
                "so its replicas would differ too. Nothing was changed. Under FSDP2 let fully_shard shard it (the "
                "parameters that ignored_params names are averaged by nobody), or average its gradient over the mesh "
                "before step() and give it to an optimizer of its own"
            )
        self._left -= evident
