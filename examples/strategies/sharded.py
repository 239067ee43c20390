"""The common part of the strategies with ShardedLion: clipping, and the bytes of the synchronisation."""

from torch import Tensor

from lion_dist import ShardedLion
from strategies.single import Single


class Sharded(Single):
    optimizer: ShardedLion

    def clip(self, max_norm: float) -> Tensor:
        return self.optimizer.clip_grad_norm_(max_norm)

    def sync_bytes(self) -> int:
        """Bytes of what is gathered after a step: the parameters, or the update's signs, 2 bits per element."""
        sync = self.config.param_sync
        if sync == "params" or (sync == "auto" and self.config.master_weights):
            return self.parameter_bytes()
        return sum(p.numel() for p in self.model.parameters()) // 4
