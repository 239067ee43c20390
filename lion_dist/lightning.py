"""Lightning: a strategy for `ShardedLion` of stage 2. Stage 1 needs none: it works under Lightning's DDPStrategy."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from .sharded_lion import ShardedLion
from .sharded_replicas import share_unheld

try:
    from lightning.pytorch.core.optimizer import LightningOptimizer  # type: ignore[import-not-found, unused-ignore]
    from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy  # type: ignore[import-not-found, unused-ignore]
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "lightning":
        raise
    raise ModuleNotFoundError("lion_dist.lightning needs Lightning: pip install lightning") from error


class ShardedLionStrategy(DDPStrategy):  # type: ignore[misc, unused-ignore]
    """Lightning's strategy for `ShardedLion` at stage 2: ``Trainer(strategy=ShardedLionStrategy())``.

    The model is not wrapped in DistributedDataParallel, since the optimizer averages the gradients. Clipping by
    ``gradient_clip_val`` is the optimizer's own `clip_grad_norm_`, and the batches of ``accumulate_grad_batches`` but
    the last run under its `no_sync`. When training starts, buffers, and parameters that no optimizer holds, become
    those of rank 0. Buffers are each rank's own from then on. Checkpoints hold the whole state, which any number of
    ranks loads, also at stage 1 and with `Lion` under DDPStrategy.

    Args:
        kwargs: ``parallel_devices``, ``cluster_environment``, ``checkpoint_io``, ``process_group_backend``, ``timeout``
            and ``start_method``, as those of Lightning's DDPStrategy.

    Raises:
        TypeError: an argument is for DistributedDataParallel.
        ValueError: when training starts, on every rank, where an optimizer is not a `ShardedLion` of stage 2 or where
            the precision is "16-mixed"; when gradients are clipped, where ``gradient_clip_algorithm`` is not "norm".
    """

    def __init__(self, **kwargs: Any) -> None:
        allowed = {*inspect.signature(ParallelStrategy).parameters, "process_group_backend", "timeout", "start_method"}
        if refused := sorted(kwargs.keys() - allowed):
            raise TypeError(
                f"ShardedLionStrategy does not take {', '.join(refused)}: these are for DistributedDataParallel, in "
                "which it does not wrap the model. Leave them out, or use DDPStrategy and ShardedLion(stage=1)"
            )
        super().__init__(**kwargs)

    def configure_ddp(self) -> None:
        """Leaves the model as it is."""

    def setup_optimizers(self, trainer: Any) -> None:
        """Makes the optimizers, checks them, and makes equal on all ranks what they have not."""
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            if not isinstance(optimizer, ShardedLion) or optimizer._averaged:
                got = type(optimizer).__name__ + ("(stage=1)" if isinstance(optimizer, ShardedLion) else "")
                raise ValueError(
                    f"ShardedLionStrategy is for ShardedLion(stage=2), which averages the gradients, but "
                    f"configure_optimizers returned {got}: use ShardedLion(stage=2), or strategy='ddp'"
                )
        if getattr(self.precision_plugin, "scaler", None) is not None:
            raise ValueError(
                "ShardedLionStrategy does not support precision='16-mixed', whose GradScaler checks p.grad: use "
                "precision='bf16-mixed', or DDPStrategy and ShardedLion(stage=1)"
            )
        # Each plugin's refuses optimizers that GradScaler must not unscale, or reads p.grad.
        self.precision_plugin.clip_gradients = _clip_gradients
        share_unheld(self.optimizers, [self.lightning_module])

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Context manager in which gradients accumulate in ``p.grad``."""
        with ExitStack() as stack:
            for optimizer in self.optimizers:
                stack.enter_context(optimizer.no_sync())
            yield


def _clip_gradients(optimizer: Any, clip_val: float = 0.0, gradient_clip_algorithm: str = "norm") -> None:
    """Takes the place of the precision plugin's ``clip_gradients``."""
    if clip_val <= 0:
        return
    if gradient_clip_algorithm != "norm":
        raise ValueError(
            "gradient_clip_algorithm='value' needs whole gradients, which ShardedLion(stage=2) does not keep: use "
            "'norm', or DDPStrategy and ShardedLion(stage=1)"
        )
    inner = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
    inner.clip_grad_norm_(clip_val)
