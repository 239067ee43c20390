"""DistributedDataParallel averages the gradients; every rank holds the whole momentum and steps every parameter."""

from contextlib import AbstractContextManager

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from strategies.single import Single


class DDP(Single):
    wrapped: DistributedDataParallel

    def wrap(self, model: nn.Module) -> nn.Module:
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
        # After its first backward DDP rearranges its buckets, which changes the order in which it adds the gradients of
        # three ranks or more. Do that now: otherwise a resumed run would add those of its first step in another order.
        device = next(model.parameters()).device
        wrapped(torch.zeros(1, 1, dtype=torch.long, device=device)).sum().backward()
        wrapped.zero_grad()
        return wrapped

    def no_sync(self) -> AbstractContextManager[None]:
        return self.wrapped.no_sync()

    def bytes_sent_per_step(self, world_size: int, micro_steps: int) -> int:
        """A ring all-reduce of the gradients is a reduce-scatter and an all-gather, each of (W - 1) / W of them."""
        return 2 * self.parameter_bytes() * (world_size - 1) // world_size
