"""What every strategy with ShardedLion has in common: clipping on shards."""

from torch import Tensor

from lion_dist import ShardedLion
from strategies.single import Single


class Sharded(Single):
    optimizer: ShardedLion

    def clip(self, max_norm: float) -> Tensor:
        return self.optimizer.clip_grad_norm_(max_norm)

    def sign_bytes(self) -> int:
        """Of the update's signs, 2 bits an element."""
        return sum(p.numel() for p in self.model.parameters()) // 4
