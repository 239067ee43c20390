"""Engines of the real DeepSpeed on the harness's ranks, and the arithmetic that they must reproduce.

The model is the toy of tests/distributed, whose averaged gradients are exact, without the shapes that DeepSpeed 0.19.8
cannot hold on any optimizer: scalars and channels-last kernels (its broadcast views parameters as bytes), parameters
without elements (stage 3 cannot gather them).
"""

from __future__ import annotations

import gc
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.cpp_extension import get_default_build_root

from tests.harness import device_of
from tests.scenarios.toy import SHAPES, Toy


def built_op() -> Path:
    """DeepSpeed's Lion for CPUs, once compiled."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    folders = [Path(root)] if root else list(Path(get_default_build_root()).glob("*"))
    return next((f / "cpu_lion/cpu_lion.so" for f in folders if (f / "cpu_lion/cpu_lion.so").exists()), Path("absent"))


needs_cpu_lion = pytest.mark.skipif(
    not built_op().exists(),
    reason="DeepSpeed's cpu_lion is not compiled (python -m benchmarks.cpu_offload does that, in some minutes)",
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def start_deepspeed(rank: int, world_size: int) -> Any:
    """The module, on this rank's process group and device. Nothing of it is imported before: it reads these."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="localhost", MASTER_PORT="0")
    if device_of(rank, world_size).type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    # It compiles a function of Muon's as it is imported, and for that imports the compiler, for a second and a half.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops import __compatible_ops__
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    __compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, for half a minute, to copy a few numbers
    # On the CPU DeepSpeed asks whether fp16 is fast there.
    type(get_accelerator()).is_fp16_supported = lambda self: True
    gc.freeze()  # it collects garbage often, and need not walk through all modules
    return deepspeed


class Model(Toy):
    """``forward(step)`` is the loss of this rank.

    Args:
        average: of the losses of all ranks instead, for one process that does the work of several.
        steady: whether "sometimes" is used in every step.
        infinite: the step in which the last rank's loss is infinite.
    """

    def __init__(
        self, rank: int, world_size: int, *, average: bool = False, steady: bool = False, infinite: int = -1
    ) -> None:
        super().__init__(0, (torch.float32,), torch.device("cpu"))
        del self.scalar, self.empty
        self.kernel.data = self.kernel.data.contiguous()
        self.rank, self.world_size, self.average, self.steady = rank, world_size, average, steady
        self.infinite = infinite

    def used(self, step: int) -> list[str]:
        names = super().used(1 if self.steady else step)  # step 1 uses it
        return [name for name in names if name not in ("scalar", "empty")]

    def forward(self, step: int) -> Tensor:  # type: ignore[override]
        if self.average:
            losses = [super(Model, self).forward(step, r, self.world_size) for r in range(self.world_size)]
            return torch.stack(losses).mean()
        loss = super().forward(step, self.rank, self.world_size)
        return loss * torch.inf if step == self.infinite and self.rank == self.world_size - 1 else loss


def make_config(stage: int, dtype: str = "fp32", offload: bool = False, **more: Any) -> dict[str, Any]:
    """A DeepSpeed config; ``more`` is merged into it one level deep."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "Lion", "params": {"lr": 1e-2, "betas": [0.9, 0.99]}},
        "zero_optimization": {"stage": stage},
    }
    if offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if dtype != "fp32":
        config[dtype] = {"enabled": True}
    for key, value in more.items():
        config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
    return config


@contextmanager
def engine_of(deepspeed: Any, model: nn.Module, config: dict[str, Any], groups: Any = None) -> Iterator[Any]:
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups or model.parameters(), config=config)
    yield engine
    engine.destroy()


def micro_steps(engine: Any, first: int, count: int) -> None:
    for i in range(first, first + count):
        engine.backward(engine(i))
        engine.step()


def weights(deepspeed: Any, engine: Any) -> dict[str, Tensor]:
    """The model's whole parameters, cloned."""
    params = dict(engine.module.named_parameters())
    if engine.zero_optimization_stage() < 3:
        return {name: p.detach().cpu().clone() for name, p in params.items()}
    with deepspeed.zero.GatheredParameters(list(params.values())):
        return {name: p.detach().cpu().clone() for name, p in params.items()}


def momentum_norm(engine: Any) -> float:
    """The norm of all momenta, which are on the ranks in DeepSpeed's order; it depends on the size of gradients."""
    squares = [entry["exp_avg"].double().square().sum().cpu() for entry in engine.basic_optimizer.state.values()]
    total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)
    if engine.zero_optimization_stage():
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, total.item())
        total = torch.tensor(sum(parts), dtype=torch.float64)
    return total.sqrt().item()


def averaged(model: Model, micro: range, last: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The gradients of one step, float32, averaged over ranks and micro-steps.

    A parameter that was not used has a gradient of zero, which is what DeepSpeed hands for it; or that of ``last``, if
    given: with offload_optimizer, and at stage 3, DeepSpeed 0.19.8 leaves it in its buffer, for any optimizer. (Worse,
    if the parameter is used in the second of two micro-steps alone, its gradient is added to what lay there, and a loss
    scale divides what lies there time and again.)
    """
    gradients = {}
    for name, p in model.named_parameters():
        parts = [model.average_gradient(name, i, model.world_size) for i in micro] if p.requires_grad else [None]
        if all(g is None for g in parts):
            gradients[name] = torch.zeros(SHAPES[name]) if last is None or name not in last else last[name]
        else:
            zero = torch.zeros(SHAPES[name])
            gradients[name] = torch.stack([zero if g is None else g.float() for g in parts]).sum(0) / len(micro)
    if last is not None:
        last.update(gradients)
    return gradients


class PlainLion:
    """The rule written out in plain torch on float32 master weights, for the model's own groups or those given."""

    def __init__(self, model: Model, dtype: torch.dtype, defaults: dict[str, Any], groups: Any = None) -> None:
        self.dtype = dtype
        self.names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
        self.groups = [
            {"weight_decay": 0.0, "maximize": False, **defaults, **group} for group in groups or model.groups()
        ]
        self.masters = {name: p.detach().to(dtype).float() for name, p in model.named_parameters()}
        self.momenta = {name: torch.zeros_like(p) for name, p in self.masters.items()}

    def step(self, gradients: dict[str, Tensor]) -> None:
        for group in self.groups:
            lr, (b1, b2), decay = group["lr"], group["betas"], 1 - group["lr"] * group["weight_decay"]
            for name in [self.names[id(p)] for p in group["params"] if id(p) in self.names]:
                g = -gradients[name] if group["maximize"] else gradients[name]
                m = self.momenta[name]
                sign = torch.sign(b1 * m + (1 - b1) * g)
                self.masters[name] = self.masters[name] * decay - lr * sign
                self.momenta[name] = b2 * m + (1 - b2) * g

    def weights(self) -> dict[str, Tensor]:
        return {name: p.to(self.dtype) for name, p in self.masters.items()}
