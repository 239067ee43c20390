"""ZeRO stage 1: DDP averages the gradients; each rank keeps and steps its share of the momentum."""

import torch

from lion_dist import ShardedLion
from strategies.ddp import DDP
from strategies.sharded import Sharded
from strategies.single import Groups


class Zero1(Sharded, DDP):
    def make_optimizer(self, groups: Groups, lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
        sync, precision = self.config.param_sync, self.config.precision()
        return ShardedLion(groups, lr=lr, betas=betas, stage=1, param_sync=sync, **precision)

    def bytes_sent_per_step(self, world_size: int, micro_steps: int) -> int:
        """DDP's all-reduce, then an all-gather of (W - 1) / W of the signs or parameters."""
        return super().bytes_sent_per_step(world_size, micro_steps) + self.sync_bytes() * (world_size - 1) // world_size
