"""Hugging Face's Accelerate and Trainer: what they need beyond `ShardedLion`, at both of its stages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from .frameworks import settled, unwrapped
from .sharded_access import clip_optimizers, params_of
from .sharded_lion import ShardedLion
from .sharded_replicas import share_unheld

try:
    from accelerate import Accelerator
except ModuleNotFoundError as error:
    if error.name != "accelerate":
        raise
    raise ModuleNotFoundError("lion_dist.huggingface needs Accelerate: pip install accelerate") from error


class ShardedLionAccelerator(Accelerator):  # type: ignore[misc, unused-ignore]
    """Accelerate's Accelerator, for models that `ShardedLion` trains. Its arguments are those of Accelerator.

    At stage 1 ``prepare`` wraps the model in DistributedDataParallel, as it always does. At stage 2 it leaves the model
    as it is, ``clip_grad_norm_`` is that of the optimizer, and ``accumulate`` and ``no_sync`` enter the optimizer's
    ``no_sync``. Move the model to ``accelerator.device`` before the optimizer is made, and give both to one call of
    ``prepare``, which gives buffers, and parameters that the optimizer does not hold, the values of rank 0. Buffers are
    each rank's own from then on. ``save_state`` saves the whole optimizer state, which any number of ranks loads, at
    either stage and with `Lion`.

    Raises:
        ValueError: on every rank, by ``prepare`` where ``save_on_each_node`` is set. At stage 2 also by ``prepare``
            where the mixed precision is fp16 or another optimizer is given with it; by ``clip_grad_norm_`` where the
            norm is not the 2-norm, or the parameters are not all of the optimizer's; by ``clip_grad_value_``.
    """

    _optimizers: list[Any]  # of Accelerator: what it has prepared
    _leaves_models = False  # a class attribute, since `ShardedLionTrainerMixin` makes none by the constructor

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        """As Accelerator's."""
        stage_2 = _sharded(args, stage_2=True)
        if stage_2 and self.scaler is not None:
            raise ValueError(
                "ShardedLion(stage=2) does not support mixed_precision='fp16', whose GradScaler checks p.grad: use "
                "'bf16', or stage=1"
            )
        others = [o for o in args if isinstance(o, Optimizer) and not _sharded([o], stage_2=True)] if stage_2 else []
        if others:
            raise ValueError(
                f"prepare() got ShardedLion(stage=2) and {type(others[0]).__name__}, for which nothing would average "
                "gradients, since stage 2 leaves all models of the call unwrapped: give the other optimizer and its "
                "model to a call of their own"
            )
        self._leaves_models = bool(stage_2)
        try:
            prepared = super().prepare(*args, **kwargs)
        finally:
            self._leaves_models = False
        if stage_2:
            share_unheld(stage_2, [module for module in args if isinstance(module, nn.Module)])
        return prepared

    def prepare_optimizer(self, optimizer: Optimizer, device_placement: bool | None = None) -> Any:
        """As Accelerator's."""
        if sharded := _sharded([optimizer]):
            _refuse_saves_on_each_node(self.project_configuration)
        prepared = super().prepare_optimizer(optimizer, device_placement)
        settled.update(sharded)
        return prepared

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module:
        """As Accelerator's, which wraps no model that is only evaluated."""
        prepared: nn.Module = super().prepare_model(model, device_placement, evaluation_mode or self._leaves_models)
        return prepared

    @contextmanager
    def no_sync(self, model: nn.Module) -> Iterator[None]:
        """As Accelerator's; at stage 2 gradients add up in ``p.grad`` until a backward outside it."""
        with ExitStack() as stack:
            stack.enter_context(super().no_sync(model))
            for optimizer in _sharded(self._optimizers, stage_2=True):
                stack.enter_context(optimizer.no_sync())
            yield

    def clip_grad_norm_(self, parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2) -> Any:
        """As Accelerator's; at stage 2 a collective call, as `ShardedLion.clip_grad_norm_`."""
        parameters = list(parameters)
        optimizers = self._stage_2_of(parameters)
        if not optimizers:
            return super().clip_grad_norm_(parameters, max_norm, norm_type)
        held = {id(p) for optimizer in optimizers for p in params_of(optimizer) if p.requires_grad}
        if norm_type != 2 or held != {id(p) for p in parameters if p.requires_grad}:
            raise ValueError(
                "clip_grad_norm_ with ShardedLion(stage=2) needs norm_type=2 and all trainable parameters of the "
                f"optimizer and no others, got norm_type={norm_type} and {len(parameters)} parameters, where the "
                f"optimizer has {len(held)} trainable ones: give model.parameters(), or use stage=1"
            )
        return clip_optimizers(optimizers, max_norm, ())

    def clip_grad_value_(self, parameters: Any, clip_value: float) -> None:
        """As Accelerator's; refused at stage 2."""
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        if self._stage_2_of(parameters):
            raise ValueError(
                "clip_grad_value_ needs whole gradients, which ShardedLion(stage=2) does not keep: use "
                "clip_grad_norm_, or stage=1"
            )
        super().clip_grad_value_(parameters, clip_value)

    def save_state(self, *args: Any, **kwargs: Any) -> Any:
        """As Accelerator's; a collective call."""
        self.consolidate_optimizers()
        return super().save_state(*args, **kwargs)

    def consolidate_optimizers(self) -> None:
        """Calls `ShardedLion.consolidate_state_dict` of every optimizer; a collective call."""
        for optimizer in _sharded(self._optimizers):
            optimizer.consolidate_state_dict()

    def _stage_2_of(self, parameters: Iterable[Tensor]) -> list[ShardedLion]:
        """The optimizers of stage 2 that hold any of the parameters."""
        given = set(map(id, parameters))
        optimizers = _sharded(self._optimizers, stage_2=True)
        return [o for o in optimizers if not given.isdisjoint(map(id, params_of(o)))]


def _sharded(prepared: Iterable[Any], stage_2: bool = False) -> list[ShardedLion]:
    """The ShardedLions among these, which Accelerate may have wrapped; only those of stage 2 if ``stage_2``."""
    inner = [unwrapped(o) for o in prepared if isinstance(o, Optimizer)]
    return [o for o in inner if isinstance(o, ShardedLion) and not (stage_2 and o._averaged)]


def _refuse_saves_on_each_node(options: Any) -> None:
    """Raises ValueError where Accelerate's ProjectConfiguration, or TrainingArguments, ask for such saves."""
    if options.save_on_each_node:
        raise ValueError(
            "save_on_each_node=True is not supported with ShardedLion, whose whole state is gathered on the first rank "
            "alone: leave it out, and give all nodes one output directory that they share"
        )


class ShardedLionTrainerMixin:
    """Makes transformers' Trainer, or a subclass, one that trains with `ShardedLion`, at stage 1 or 2.

    ::

        class ShardedLionTrainer(ShardedLionTrainerMixin, Trainer): ...

        trainer = ShardedLionTrainer(..., optimizer_cls_and_kwargs=(ShardedLion, {"lr": 1e-4, "stage": 2}))

    Its ``accelerator`` is a `ShardedLionAccelerator`, which behaves and raises as described there. Checkpoints hold the
    whole optimizer state, as those of `Lion` do.

    Raises:
        ValueError: when the Trainer is made, where ``save_on_each_node`` is set.
        RuntimeError: when the Trainer is made, where this version of transformers saves in another way.
    """

    accelerator: Any
    args: Any

    def create_accelerator_and_postprocess(self) -> None:
        """As the Trainer's."""
        base: Any = super()
        if not hasattr(base, "_save_optimizer_and_scheduler"):
            raise RuntimeError(
                "this version of transformers has no Trainer._save_optimizer_and_scheduler, before which "
                "ShardedLionTrainerMixin makes the state whole: use transformers 5.23, with which it was tested"
            )
        _refuse_saves_on_each_node(self.args)
        base.create_accelerator_and_postprocess()
        self.accelerator.__class__ = ShardedLionAccelerator  # the Trainer calls the constructor itself

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self.accelerator.consolidate_optimizers()  # on every rank: what follows saves on the first alone
        base: Any = super()
        base._save_optimizer_and_scheduler(output_dir)
