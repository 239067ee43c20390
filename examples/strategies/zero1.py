"""ZeRO stage 1: DDP averages the gradients; each rank keeps and steps its share of the momentum."""

from typing import Any

import torch
from torch import Tensor

from lion_dist import ShardedLion
from strategies.ddp import DDP
from strategies.single import Groups


class Zero1(DDP):
    optimizer: ShardedLion

    def make_optimizer(self, groups: Groups, lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
        return ShardedLion(groups, lr=lr, betas=betas, stage=1)

    def clip(self, max_norm: float) -> Tensor:
        return self.optimizer.clip_grad_norm_(max_norm)

    def optimizer_state(self) -> dict[str, Any]:
        return self.optimizer.full_state_dict(rank0_only=True)

    def bytes_sent_per_step(self, world_size: int) -> int:
        """DDP's all-reduce, then an all-gather of the stepped parameters: (W - 1) / W of them."""
        return super().bytes_sent_per_step(world_size) + self.parameter_bytes() * (world_size - 1) // world_size
