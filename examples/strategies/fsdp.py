"""The common part of FSDP1 and FSDP2: `lion_dist.Lion` over a model whose tensors are all sharded."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from strategies.single import Groups, Single

if TYPE_CHECKING:
    from config import Config


class FSDP(Single):
    """
    Attributes:
        whole_bytes: size of all parameters together, unsharded.
        gathered: options for the model's whole state, which goes to rank 0's CPU memory where it is on GPUs.
    """

    replicated = False

    def __init__(self, model: nn.Module, groups: Groups, config: Config) -> None:
        self.whole_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        # On CPUs the state is whole on every rank: torch crashes there when it offloads a whole FSDP1 model.
        on_gpu = next(model.parameters()).is_cuda
        self.gathered = StateDictOptions(full_state_dict=True, cpu_offload=on_gpu)
        super().__init__(model, groups, config)
        self.model = self.wrapped  # the plain module's weights exist only within a forward

    def model_state(self) -> dict[str, Tensor]:
        return cast(dict[str, Tensor], get_model_state_dict(self.wrapped, options=self.gathered))

    def bytes_sent_per_step(self, world_size: int, micro_steps: int) -> int:
        """All-gathers of the parameters, for every forward and for its backward, and one reduce-scatter of the
        gradients, each of (W - 1) / W of them."""
        return (2 * micro_steps + 1) * self.whole_bytes * (world_size - 1) // world_size
