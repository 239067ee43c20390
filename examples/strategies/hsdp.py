"""FSDP2 over a 2-D mesh (HSDP): parameters are sharded over the ranks of a node, and replicated over the nodes.
`--replicas` says how many parts of the ranks take the place of nodes. On a single node with four ranks or more two
halves do, without it."""

import os

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from strategies.fsdp2 import FSDP2


class HSDP(FSDP2):
    replicas: int

    def mesh(self, device_type: str) -> DeviceMesh:
        ranks = dist.get_world_size()
        self.replicas = self.config.replicas or ranks // int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
        if not self.config.replicas and self.replicas == 1 and ranks >= 4 and ranks % 2 == 0:
            self.replicas = 2
        names = ("replicate", "shard")
        return init_device_mesh(device_type, (self.replicas, ranks // self.replicas), mesh_dim_names=names)

    def bytes_sent_per_step(self, world_size: int, micro_steps: int) -> int:
        """FSDP2's bytes within a node, and an all-reduce of this rank's shard of the gradients between the nodes."""
        ranks = world_size // self.replicas
        part = self.whole_bytes // ranks
        return super().bytes_sent_per_step(ranks, micro_steps) + 2 * part * (self.replicas - 1) // self.replicas
