"""FSDP2 within each node, and ShardedLion between the nodes. Parameters are sharded over the ranks of a node, and each
shard is to ShardedLion a parameter that the nodes hold replicas of. So gradients are averaged and momenta sharded over
the nodes too, and what comes back over the slow links after a step is signs."""

from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from lion_dist import ShardedLion
from strategies.hsdp import HSDP
from strategies.sharded import Sharded
from strategies.single import Groups


class Hybrid(Sharded, HSDP):
    between: dist.ProcessGroup

    def mesh(self, device_type: str) -> DeviceMesh:
        mesh = super().mesh(device_type)
        self.between = mesh["replicate"].get_group()
        return mesh["shard"]

    def make_optimizer(self, groups: Groups, lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
        sync, precision = self.config.param_sync, self.config.precision()
        sharded = self.after_sharding(groups)
        return ShardedLion(sharded, lr=lr, betas=betas, process_group=self.between, param_sync=sync, **precision)

    def no_sync(self) -> AbstractContextManager[None]:
        """Gradients are still reduced within the node, where FSDP2 adds them up in its shards."""
        return self.optimizer.no_sync()

    def bytes_sent_per_step(self, world_size: int, micro_steps: int) -> int:
        """Within a node two all-gathers of the parameters and a reduce-scatter of the gradients in every micro-step;
        between the nodes a reduce-scatter of this rank's shard of the gradients, and a gather of its signs or
        parameters."""
        ranks = world_size // self.replicas
        within = 3 * micro_steps * self.whole_bytes * (ranks - 1) // ranks
        return within + (self.whole_bytes + self.sync_bytes()) // ranks * (self.replicas - 1) // self.replicas
