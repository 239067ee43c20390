"""FullyShardedDataParallel: the parameters of a block are one flat parameter, sharded over the ranks. Lion steps each
rank's shards in one launch."""

from contextlib import AbstractContextManager

from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from lion_dist import Lion
from model import Block
from strategies.fsdp import FSDP


class FSDP1(FSDP):
    wrapped: FullyShardedDataParallel

    def wrap(self, model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(
            model,
            auto_wrap_policy=ModuleWrapPolicy({Block}),
            device_id=next(model.parameters()).device,
            use_orig_params=True,  # so that the parameter groups that were made before stay valid
        )

    def no_sync(self) -> AbstractContextManager[None]:
        return self.wrapped.no_sync()

    def statistics(self) -> dict[str, float]:
        assert isinstance(self.optimizer, Lion)
        assert self.wrapped.process_group is not None
        return self.optimizer.statistics(process_groups=[self.wrapped.process_group])

    def clip(self, max_norm: float) -> Tensor:
        return self.wrapped.clip_grad_norm_(max_norm)
