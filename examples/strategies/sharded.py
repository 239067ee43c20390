"""What every strategy with ShardedLion has in common: clipping on shards, and what brings the parameters together."""

from torch import Tensor

from lion_dist import ShardedLion
from strategies.single import Single


class Sharded(Single):
    optimizer: ShardedLion

    def clip(self, max_norm: float) -> Tensor:
        return self.optimizer.clip_grad_norm_(max_norm)

    def sync_bytes(self) -> int:
        """Of what brings the parameters together: themselves, or the update's signs, 2 bits an element."""
        if self.config.param_sync == "params":
            return self.parameter_bytes()
        return sum(p.numel() for p in self.model.parameters()) // 4
