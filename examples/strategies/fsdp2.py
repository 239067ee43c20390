"""fully_shard: every parameter is a DTensor, sharded over the ranks by rows. Lion steps each rank's shards in one
launch."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from model import Block
from strategies.fsdp import FSDP
from strategies.single import Groups


class FSDP2(FSDP):
    def mesh(self, device_type: str) -> DeviceMesh:
        """A mesh of all ranks, over which parameters are sharded. (fully_shard's own uses GPUs if there are any.)"""
        return init_device_mesh(device_type, (dist.get_world_size(),))

    def wrap(self, model: nn.Module) -> nn.Module:
        mesh = self.mesh(next(model.parameters()).device.type)
        for block in [module for module in model.modules() if isinstance(module, Block)]:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)  # in place
        return model

    def make_optimizer(self, groups: Groups, lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
        return super().make_optimizer(self.after_sharding(groups), lr, betas)

    def after_sharding(self, groups: Groups) -> Groups:
        """The groups with the parameters by which fully_shard has replaced those that the groups were made from."""
        parameters = dict(self.model.named_parameters())
        return [{**group, "params": [parameters[name] for name in group["param_names"]]} for group in groups]

    @contextmanager
    def _no_sync(self) -> Iterator[None]:
        assert isinstance(self.wrapped, FSDPModule)
        self.wrapped.set_requires_gradient_sync(False)
        yield
        self.wrapped.set_requires_gradient_sync(True)

    def no_sync(self) -> AbstractContextManager[None]:
        return self._no_sync()
