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
        # After its first backward DDP lays its buckets out anew, and with that changes the order in which it adds the
        # gradients of three ranks or more. Let that be now: else a resumed run would add its first step differently.
        device = next(model.parameters()).device
        wrapped(torch.zeros(1, 1, dtype=torch.long, device=device)).sum().backward()
        wrapped.zero_grad()
        return wrapped

    def no_sync(self) -> AbstractContextManager[None]:
        return self.wrapped.no_sync()

    def bytes_sent_per_step(self, world_size: int, micro_steps: int) -> int:
        """A ring all-reduce of the gradients: a reduce-scatter and an all-gather of (W - 1) / W of them each."""
        return 2 * self.parameter_bytes() * (world_size - 1) // world_size
