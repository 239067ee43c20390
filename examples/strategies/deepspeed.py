"""DeepSpeed's engine, any ZeRO stage, with `"type": "Lion"` built as lion_dist's.

The config file chooses the ZeRO stage and the precision. The command line's lr, betas, weight decay, clipping, batch
size, accumulation and momentum replace those of the file, and `--dtype bf16` turns its `bf16` on. DeepSpeed keeps its
own float32 master weights then, and refuses `--master-weights`. It clips to a norm of 1.0 if the file says nothing.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

import lion_dist
from strategies.single import Groups, Single


class DeepSpeed(Single):
    replicated = False  # at stage 3

    def wrap(self, model: nn.Module) -> nn.Module:
        return model  # make_optimizer wraps it, because the engine needs the parameter groups

    def make_optimizer(self, groups: Groups, lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
        on_cpu = next(self.model.parameters()).device.type == "cpu"
        if on_cpu:
            os.environ["DS_ACCELERATOR"] = "cpu"  # read when DeepSpeed is imported
        import deepspeed

        if on_cpu:
            # This op makes collectives on one machine faster, but would first be compiled for half a minute.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        lion_dist.deepspeed.register()
        assert self.config.deepspeed_config is not None
        options = json.loads(self.config.deepspeed_config.read_text()) | {
            "optimizer": {"type": "Lion", "params": {"lr": lr, "betas": list(betas), **self.config.precision()}},
            "gradient_clipping": self.config.clip,
            "train_micro_batch_size_per_gpu": self.config.batch_size,
            "gradient_accumulation_steps": self.config.accumulation,
        }
        if self.config.dtype == "bf16":
            options["bf16"] = {**options.get("bf16", {}), "enabled": True}
        # lion_dist.checkpoint recognises the run's earlier checkpoints by its model: give it one without tensors.
        self.rest = nn.Module()
        self.engine, *_ = deepspeed.initialize(model=self.model, model_parameters=groups, config=options)
        self.wrapped = self.engine
        basic: torch.optim.Optimizer = self.engine.basic_optimizer
        return basic  # for schedulers: its groups are those that the engine's wrapper steps

    def zero_grad(self) -> None:
        """Does nothing: the engine zeroes gradients when it steps."""

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)
        if not last:
            self.engine.step()  # counts micro-steps

    def step(self, max_norm: float) -> None:
        self.engine.step()

    def model_state(self) -> dict[str, Tensor]:
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.model.parameters())):
            return {name: t.detach().float().cpu() for name, t in self.model.state_dict().items()}

    def save(self, path: Path, scheduler: LRScheduler, extra: dict[str, Any], keep_last: int) -> None:
        """Saves DeepSpeed's own files, one per rank, which are never removed, and the rest of the run where the other
        strategies keep it."""
        self.engine.save_checkpoint(str(path.parent / "deepspeed"), tag=path.name)
        own = {**extra, "scheduler": scheduler.state_dict(), "deepspeed": self.cut()}
        lion_dist.checkpoint.save(path, self.rest, extra=own, keep_last=keep_last)

    def load(self, path: Path, scheduler: LRScheduler) -> None:
        extra = lion_dist.checkpoint.read_extra(path)
        theirs, ours = extra.get("deepspeed"), self.cut()
        if theirs is None:
            raise ValueError(
                f"{path} was not written by --strategy deepspeed, which has its own format: resume with one of the "
                "other strategies"
            )
        if theirs != ours:
            raise ValueError(
                f"{path} was written with {theirs}, and this run has {ours}. DeepSpeed's files can be loaded only with "
                "the values that they were written with: use these, or convert them with DeepSpeed's ds_to_universal.py"
            )
        folder = path.parent / "deepspeed"
        if not (folder / path.name).is_dir():
            raise ValueError(f"{path} needs DeepSpeed's files in {folder / path.name}, which is missing: restore it")
        lion_dist.checkpoint.load(path, self.rest)
        self.engine.load_checkpoint(str(folder), tag=path.name)
        scheduler.load_state_dict(extra["scheduler"])

    def cut(self) -> dict[str, int]:
        """How the model is sharded; a run that resumes must have the same."""
        return {"ZeRO stage": self.engine.zero_optimization_stage(), "ranks": self.engine.world_size}

    def bytes_sent_per_step(self, world_size: int, micro_steps: int) -> int:
        """A reduction of the gradients and a gather of the parameters, each of (W - 1) / W of them; at stage 3 another
        gather for the backward."""
        passes = 3 if self.engine.zero_optimization_stage() == 3 else 2
        return passes * self.parameter_bytes() * (world_size - 1) // world_size

    def parameter_bytes(self) -> int:
        return sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in self.model.parameters())
