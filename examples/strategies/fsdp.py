"""What FSDP1 and FSDP2 have in common: `lion_dist.Lion` over a model whose every tensor is sharded."""

from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from strategies.single import Groups, Single


class FSDP(Single):
    """
    Attributes:
        names: of the parameters of each group.
        whole_bytes: of all parameters, unsharded.
        gathered: how the model's state is to come: whole, and from a GPU to rank 0's CPU memory.
    """

    def __init__(
        self, model: nn.Module, groups: Groups, lr: float, betas: tuple[float, float], config: Any = None
    ) -> None:
        name_of = {id(p): name for name, p in model.named_parameters()}
        self.names = [[name_of[id(p)] for p in group["params"]] for group in groups]
        self.whole_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        # On CPUs it is whole on every rank: there torch crashes as it takes a whole model of FSDP1 off the device.
        on_gpu = next(model.parameters()).is_cuda
        self.gathered = StateDictOptions(full_state_dict=True, cpu_offload=on_gpu)
        super().__init__(model, groups, lr, betas, config)
        self.model = self.wrapped  # what the plain module computes with is only there within a forward

    def model_state(self) -> dict[str, Tensor]:
        return cast(dict[str, Tensor], get_model_state_dict(self.wrapped, options=self.gathered))

    def bytes_sent_per_step(self, world_size: int, micro_steps: int) -> int:
        """All-gathers of the parameters, for every forward and again for its backward; a reduce-scatter of the
        gradients, once: (W - 1) / W of them each."""
        return (2 * micro_steps + 1) * self.whole_bytes * (world_size - 1) // world_size
