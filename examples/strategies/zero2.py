"""ZeRO stage 2: the model is not wrapped. ShardedLion reduces the gradients into its shards during the backward."""

from contextlib import AbstractContextManager

import torch

from lion_dist import ShardedLion
from strategies.sharded import Sharded
from strategies.single import Groups


class Zero2(Sharded):
    def make_optimizer(self, groups: Groups, lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
        return ShardedLion(groups, lr=lr, betas=betas, param_sync=self.config.param_sync, **self.config.precision())

    def no_sync(self) -> AbstractContextManager[None]:
        return self.optimizer.no_sync()

    def bytes_sent_per_step(self, world_size: int, micro_steps: int) -> int:
        """A reduce-scatter of the gradients, then an all-gather of signs or parameters, each of (W - 1) / W of them."""
        return (self.parameter_bytes() + self.sync_bytes()) * (world_size - 1) // world_size
