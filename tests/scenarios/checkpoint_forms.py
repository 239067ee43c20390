"""Small models whose weights and momenta are kept in any of the forms that Lion knows, and checkpoints of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from lion_dist import Lion, checkpoint
from lion_dist.checkpoint.json_values import from_json
from lion_dist.memory_order import flat
from lion_dist.update import codecs
from tests.scenarios.toy import hash_of

# dtype of the weights, and master_weights
WEIGHTS = {"fp32": (torch.float32, False), "master": (torch.bfloat16, True), "bf16": (torch.bfloat16, False)}
MOMENTA = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
SHAPES = {"matrix": (37, 29), "turned": (11, 4, 5, 3), "short": (129,), "scalar": (), "empty": (0, 3)}


class Forms(nn.Module):
    """Parameters of shapes that blocks of 128 fit badly; one is not row-major."""

    def __init__(self, weights: str, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in SHAPES.items():
            value = torch.randn(shape, generator=generator).to(WEIGHTS[weights][0])
            if name == "turned":
                value = value.contiguous(memory_format=torch.channels_last)
            self.register_parameter(name, nn.Parameter(value))


class Trained:
    """A model and its optimizer.

    Args:
        weights, momentum: keys of WEIGHTS and MOMENTA; "" for the dtype that Lion chooses.
        seed: of the weights.
        steps: steps to make.
    """

    def __init__(self, weights: str, momentum: str, seed: int, steps: Sequence[int] = ()) -> None:
        self.model = Forms(weights, seed)
        self.optimizer = Lion(
            self.model.named_parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1,
            momentum_dtype=MOMENTA.get(momentum), master_weights=WEIGHTS[weights][1],
        )  # fmt: skip
        self.train(steps)

    def train(self, steps: Sequence[int]) -> Trained:
        """Gradients are exact in bfloat16, so that they are the same for weights of every dtype. One is NaN."""
        for step in steps:
            for name, p in self.model.named_parameters():
                generator = torch.Generator().manual_seed(hash_of(name) + 7919 * step)
                g = torch.randint(-99, 100, p.shape, generator=generator) * 2.0 ** torch.randint(
                    -20, 1, p.shape, generator=generator
                )
                if p.numel() > 8:
                    g.view(-1)[8] = math.nan
                p.grad = g.to(p.dtype).as_strided(p.shape, p.stride()) if p.dim() == 4 else g.to(p.dtype)
            self.optimizer.step()
        return self

    def weights(self) -> dict[str, Tensor]:
        """Weights in float32, as exactly as they are kept."""
        return {name: self.weight(p) for name, p in self.model.named_parameters()}

    def weight(self, p: Tensor) -> Tensor:
        remainder = self.optimizer.state[p].get("remainder")
        return p.detach().float() if remainder is None else codecs.join(p.detach(), remainder)

    def momenta(self) -> dict[str, Tensor]:
        """Momenta in float32."""
        return {name: self.momentum(p) for name, p in self.model.named_parameters()}

    def momentum(self, p: Tensor) -> Tensor:
        m, scale = (self.optimizer.state[p].get(entry) for entry in ("exp_avg", "exp_avg_scale"))
        if scale is None:
            return m.float()
        return codecs.decode(flat(m), scale).as_strided(m.shape, m.stride())

    def everything(self) -> dict[str, Tensor]:
        """Copies of all tensors."""
        found = {f"weight of {name}": p.detach().clone() for name, p in self.model.named_parameters()}
        for name, p in self.model.named_parameters():
            found.update({f"{entry} of {name}": t.clone() for entry, t in self.optimizer.state[p].items()})
        return found

    def groups(self) -> list[dict[str, Any]]:
        return [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]

    def load(self, path: Path, cast: bool = False) -> Trained:
        checkpoint.load(path, self.model, self.optimizer, cast=cast)
        return self


def contents(path: Path) -> dict[str, Any]:
    """Tensors and values of a checkpoint by key."""
    reader = checkpoint.Reader(path)
    tensors: dict[str, Any] = {key: reader.fetch(key) for key in reader.manifest.tensors}
    return tensors | {key: from_json(value) for key, value in reader.manifest.objects.items()}


def write(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint of any contents."""
    dcp.save(state, storage_writer=checkpoint.Writer(path), no_dist=True)
