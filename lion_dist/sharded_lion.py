"""ShardedLion: Lion for replicated parameters, with the momentum sharded over the ranks.

Each rank steps the slices of the parameters that it owns (sharding/layout.py) and the ranks then bring
the parameters together. Nothing is re-homed: parameters stay where they are. Allocated are the shard of the
momentum, in stage 2 that of the gradients, small packs of tails, and with signs those of all ranks: a quarter
of a byte a parameter.
"""

from __future__ import annotations

import logging
import math
import warnings
import zlib
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, NoReturn, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from ._torch_compat import load_state_dict_post_hooks
from .clipping import Clipping, same_gradients
from .frozen import is_plain, takes_part
from .fsdp import refuse_sharded
from .mismatch import mismatch
from .param_groups import (
    check_params,
    complete_group,
    complete_loaded_groups,
    describe_groups,
    hyper_parameters,
    make_defaults,
    momentum_dtype,
    normalize_group,
    warn_of_unknown_keys,
)
from .rounding import RoundingWarnings
from .sharded_state import IncomingState, ordered, put_entries, whole, whole_momenta
from .sharding.averaged import AveragedGradients
from .sharding.collectives import (
    Agreement,
    Membership,
    all_reduce_sum,
    broadcast_from_first,
    check_device,
)
from .sharding.exchange import REFUSED, ExchangeBuffer
from .sharding.grad_reducer import GradReducer
from .sharding.replicas import DeferredCheck, broadcast, comparable, differing, gathered, refuse_permuted
from .sharding.shard import Shard, check_shardable, make_shards
from .state_dicts import check_is_dict, unwrap, with_named_dtypes
from .uncompiled import uncompiled
from .update.backends import check_use_triton
from .update.lion_update import LionUpdate
from .update.reference import PER_BYTE, HyperParameters, clip_coefficient, hyper_checksum
from .update.segments import Segment, StepTensors, check_no_shared_memory
from .update.signs import SignUpdate
from .update.state import EXP_AVG
from .upload import upload

logger = logging.getLogger("lion_dist")


@dataclass
class _Part:
    """A shard and what steps it.

    segments: what this rank owns of it.
    signs, exchange: where parameters are synchronised by signs.
    present: in stage 1: of which parameters the gradient is not None, a byte each; and the same as a tensor, or None
        if it is all.
    """

    shard: Shard
    segments: list[Segment]
    update: LionUpdate
    signs: SignUpdate | None
    exchange: ExchangeBuffer | None
    present: tuple[bytes, Tensor | None] = (b"", None)


def _lr_if(agree: Tensor, lr: float | Tensor) -> Tensor:
    """lr, exactly, where the ranks agree, else 0, with which a step writes no parameter; on the device of ``agree``."""
    if isinstance(lr, Tensor) and lr.device == agree.device:
        return torch.where(agree, lr, 0.0)
    return agree.double() * float(lr)


@uncompiled
class ShardedLion(Optimizer):
    """Lion for parameters replicated on every rank, its momentum sharded over them (ZeRO stages 1 and 2).

    Gives the same bits as `Lion` on the same averaged gradients, with a world_size-th of the momentum
    and of the step's work on each rank. Every rank makes the same calls in the same order: the constructor,
    step, clip_grad_norm_, add_param_group, init_state, broadcast_buffers, check_replicas, resync, full_state_dict,
    load_state_dict and, of gradients that nothing has used, zero_grad are collective. The constructor
    compares what the ranks were given and broadcasts the parameters of the group's first rank; shards are
    allocated there too. Where a rank has the first rank's parameters in another order, the constructor raises:
    by their names, or, without names, by their values where these differ: equal ones, such as biases of zeros, cannot
    be told apart without names. Buffers, such as BatchNorm's running statistics, are each
    rank's own: `broadcast_buffers` makes them equal once.

    torch.compile runs these calls as they are, also within a training step that is compiled as a whole.

    Args:
        params, lr, betas, weight_decay, use_triton, decoupled_weight_decay, momentum_dtype, maximize:
            as for `Lion`, the same on every rank. Parameters are dense and on one device. Frozen ones may be anything,
            as for `Lion`. The constructor broadcasts those that are dense and on that device too, and check_replicas()
            and resync() reach them; others are each rank's own until they are unfrozen.
        process_group: the ranks that hold the replicas; None is the default group.
        stage: 2: the optimizer averages the gradients itself, and the model is not wrapped: as they arrive in the
            backward they are reduce-scattered to the ranks that own them, in buckets, and leave ``p.grad``.
            Every rank makes the same backward passes; which parameters they reach may differ. A rank where a pass
            reaches none may make further passes, clip or step next. On GPUs, in the first step of several passes
            outside no_sync(), every rank must be reached by more than one of them or by none; else that step raises on
            every rank. After it the host waits for the device in every step. Parameters are unfrozen on every rank
            before the same step; a step raises where they are not (in stage 1 only at the group's time-out). A
            parameter that no rank has a gradient of is not stepped. GradScaler and torch's clip_grad_norm_ are refused:
            use bfloat16 or stage 1, and `clip_grad_norm_` here. Collectives of several optimizers that take part in one
            backward need process groups of their own.
            1: ``p.grad`` is already averaged over the ranks at step(), as DistributedDataParallel leaves it, and
            is None on all ranks or on none. The first two steps compare the gradients over the ranks.
        bucket_mb: MiB of gradients that stage 2 reduces together, in the order in which they arrived on the first
            rank in its first backward. Up to three buckets exist at a time, if every parameter is used.
        param_sync: how each rank's slices get to the others. "params": an all-gather of the parameters, in place.
            "signs": an all-gather of the update's signs, 2 bits an element, which every rank applies to its own
            replica: the same bits, for a sixteenth (float32) of the bytes. A replica that went astray stays so
            (see `check_replicas`). "auto": "signs" where there are several ranks.

    Raises:
        RuntimeError: no process group; or, naming the ranks, another rank failed or is absent. (In step()
            and clip_grad_norm_(), which take no time to compare notes, a rank that fails alone leaves the
            others to the collective's own time-out, or to its end as a process.)
        ValueError, TypeError: parameters, hyper-parameters or ranks that do not fit.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: Iterable[float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        use_triton: bool | None = None,
        decoupled_weight_decay: bool = False,
        *,
        process_group: dist.ProcessGroup | None = None,
        stage: int = 2,
        param_sync: str = "auto",
        bucket_mb: float = 256,
        momentum_dtype: torch.dtype | str | None = None,
        maximize: bool = False,
    ) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "ShardedLion needs an initialised process group: call torch.distributed.init_process_group() first "
                "(under torchrun), or use lion_dist.Lion on one process"
            )
        group = dist.group.WORLD if process_group is None else process_group
        assert group is not None  # the default group exists once initialised
        self._group = group
        self._rank = dist.get_rank(self._group)
        if self._rank < 0:
            raise ValueError("this rank is not in process_group; make the optimizer on the group's ranks only")
        self._constructed = False
        with Agreement(self._group, "ShardedLion()") as agreement:
            if stage not in (1, 2):
                raise ValueError(f"stage must be 1 or 2, got {stage!r}")
            if not 0 < bucket_mb < math.inf:
                raise ValueError(f"bucket_mb must be > 0 and finite, got {bucket_mb!r}")
            if param_sync not in ("auto", "params", "signs"):
                raise ValueError(f'param_sync must be "auto", "params" or "signs", got {param_sync!r}')
            defaults = make_defaults(lr, betas, weight_decay, decoupled_weight_decay, momentum_dtype, maximize)
            check_use_triton(use_triton)
            super().__init__(params, defaults)
            world_size = dist.get_world_size(self._group)
            agreement.says([f"world size {world_size}, stage {stage}, bucket_mb {bucket_mb}, param_sync {param_sync}"])
            agreement.says(describe_groups(self.param_groups))
            agreement.says(self._describe_reach(0))
        self._membership = Membership(self._group)
        self._reducer = GradReducer(self._membership, math.ceil(bucket_mb * 2**20)) if stage == 2 else None
        # GradScaler then leaves its scale here when it calls step(), where it is refused by name.
        self._step_supports_amp_scaling = stage == 2
        # In stage 1 nothing else would notice that nobody averages the gradients.
        self._averaged = AveragedGradients(self._group) if stage == 1 and world_size > 1 else None
        self._rounding = RoundingWarnings()
        self._warned_of_no_gradient = False
        self._clipping: Clipping | None = None
        self._use_triton = use_triton
        self._signs = param_sync == "signs" or (param_sync == "auto" and world_size > 1)
        if param_sync == "auto":
            logger.debug(
                "param_sync: %s", "signs, exact as every replica holds whole weights" if self._signs else
                "params, as there is one rank and nothing to send",
            )  # fmt: skip
        self._deferred = DeferredCheck()
        self._parts: list[_Part] = []
        self._frozen: list[Tensor] = []
        self._never_equal: set[int] = set()  # ids of frozen parameters that could not be broadcast
        self._ids: list[list[int]] = []
        self._groups: list[list[int]] = []  # the group numbers of each part's parameters; for the groups of _ids
        self._take_in([p for group in self.param_groups for p in group["params"]])
        self._constructed = True

    @property
    def process_group(self) -> dist.ProcessGroup:
        """The ranks that hold the replicas."""
        return self._group

    # Parameters ---------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; a collective call, with the same group on every rank."""
        if not self._constructed:  # by torch's constructor, within the constructor's own agreement
            self._append_group(param_group)
            return
        before = len(self.param_groups)
        try:
            with Agreement(self._group, "ShardedLion.add_param_group()") as agreement:
                self._append_group(param_group)
                agreement.says(describe_groups(self.param_groups, before))
                agreement.says(self._describe_reach(before))
            self._take_in(self.param_groups[-1]["params"])
        except Exception:
            del self.param_groups[before:]
            raise

    def _describe_reach(self, first: int) -> list[str]:
        """Which frozen parameters, of groups from number ``first``, are broadcast and compared: the same on every rank,
        or collectives would not match."""
        params = [p for group in self.param_groups[first:] for p in group["params"]]
        reached = set(comparable(params, self._group))
        return [
            f"frozen parameter {i} of the new ones is "
            + ("broadcast" if i in reached else "not broadcast, since it is on another device than the trainable ones")
            for i, p in enumerate(params)
            if not takes_part(p) and is_plain(p)
        ]

    def _append_group(self, param_group: dict[str, Any]) -> None:
        before = [p for group in self.param_groups for p in group["params"]]
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            complete_group(group, self.defaults)
            normalize_group(group)
            self._check_params(group["params"], before)
            warn_of_unknown_keys(group, self.param_groups[:-1])
        except Exception:
            self.param_groups.pop()
            raise

    def _check_params(self, params: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        """Raises for parameters that cannot be sharded, beside others. Frozen ones may be anything."""
        refuse_sharded(params)
        check_params(params, others)
        check_shardable(params, others, self._group)
        check_no_shared_memory([p for p in (*others, *params) if takes_part(p)])

    @torch.no_grad()
    def _take_in(self, params: Sequence[Tensor]) -> None:
        """Makes new parameters equal on all ranks, but for frozen ones whose bytes cannot be sent, and shards the
        trainable ones."""
        self._settle()
        if "param_names" not in self.param_groups[-1]:  # of all groups or of none
            refuse_permuted(params, self._group)
        sent = broadcast(params, self._group)
        self._frozen += [p for p in params if not p.requires_grad]
        self._never_equal |= {id(p) for i, p in enumerate(params) if i not in sent}
        self._set_shards(self._shards + self._make_shards([p for p in params if p.requires_grad], {}))

    def _shard_frozen(self, params: Sequence[Tensor], dtypes: dict[int, torch.dtype]) -> None:
        """Makes momenta of parameters that are still frozen; a collective call, with the same ones on every rank.
        ``dtypes``: of the momenta, by id of the parameter."""
        taken = set(map(id, params))
        self._set_shards(self._shards + self._make_shards(params, dtypes))
        self._frozen = [p for p in self._frozen if id(p) not in taken]

    def _take_back(self, shards: Sequence[Shard], frozen: list[Tensor]) -> None:
        """Undoes `_shard_frozen`."""
        self._set_shards(list(shards))
        self._frozen = frozen

    def _settle(self) -> None:
        """Has collectives of other calls come after those of a backward, on ranks too that the backward missed."""
        if self._reducer is not None:
            self._reducer.settle()

    @property
    def _shards(self) -> list[Shard]:
        return [part.shard for part in self._parts]

    def _make_shards(self, params: Sequence[Tensor], dtypes: dict[int, torch.dtype]) -> list[Shard]:
        """Shards of zeros; ``dtypes``: of momenta, by id of the parameter, where not the group's."""
        group_of = {id(p): group for group in self.param_groups for p in group["params"]}
        dtype_of = [dtypes.get(id(p)) or momentum_dtype(p, group_of[id(p)]) for p in params]
        return make_shards(params, dtype_of, dist.get_world_size(self._group))

    def _set_shards(self, shards: list[Shard]) -> None:
        number_of = {id(p): i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
        for shard in shards:
            shard.numbers = [number_of[id(p)] for p in shard.params]
        if self._reducer is not None:
            self._reducer.set_shards(shards)
        kept = {id(part.shard): part for part in self._parts}
        self._parts = [kept.get(id(shard)) or self._make_part(shard) for shard in shards]
        if self._averaged is not None:
            self._averaged.again()
        self._ids = []
        put_entries(self.state, shards, self._rank)

    def _make_part(self, shard: Shard) -> _Part:
        layout, update = shard.layout, LionUpdate(self._use_triton)
        segments = []
        for s in layout.slices(self._rank):
            grad_start = s.start if self._reducer is None else s.shard_offset
            segments.append(Segment(s.param, s.start, grad_start, s.shard_offset, s.length))
        signs = exchange = None
        if self._signs:
            exchange = ExchangeBuffer(
                layout.shard_numel // PER_BYTE, self._rank, layout.world_size, shard.exp_avg.device
            )
            everywhere = [
                Segment(s.param, s.start, 0, PER_BYTE * exchange.position(r, s.shard_offset // PER_BYTE), s.length)
                for r in range(layout.world_size)
                for s in layout.slices(r)
            ]
            signs = SignUpdate(update, everywhere, exchange.bytes)
        return _Part(shard, segments, update, signs, exchange)

    def _unfrozen(self) -> list[int]:
        """Indices into ``_frozen`` of parameters that no longer are."""
        return [i for i, p in enumerate(self._frozen) if takes_part(p)]

    def _reduce(self) -> None:
        """In stage 2: has every gradient of every rank on its way to its owner. In both: shards parameters that were
        frozen when they were given and no longer are."""
        unfrozen = self._unfrozen()
        if self._reducer is None:
            if unfrozen:
                self._adopt(unfrozen, "ShardedLion.step() after unfreezing parameters")
        elif self._reducer.reduce(unfrozen=bool(unfrozen)):
            # A pass may have reached a parameter on some ranks only, and it may be frozen again.
            anywhere = self._membership.any_rank(*map(takes_part, self._frozen))
            unfrozen = [i for i, on_any in enumerate(anywhere) if on_any]
            self._adopt(unfrozen, "ShardedLion.step() after unfreezing parameters")
            self._reducer.reduce()

    def _adopt(self, unfrozen: list[int], call: str) -> None:
        new = [self._frozen[i] for i in unfrozen]
        with Agreement(self._group, call) as agreement:
            self._check_params(new, [p for shard in self._shards for p in shard.params])
            agreement.says(
                [
                    f"unfrozen parameter {i}, shape {tuple(p.shape)}, {p.dtype}, {p.layout}, {p.device.type}, "
                    f"requires_grad={p.requires_grad}"
                    for i, p in zip(unfrozen, new, strict=True)
                ]
            )
        if unfrozen:
            broadcast([p for p in new if id(p) in self._never_equal], self._group)
            self._set_shards(self._shards + self._make_shards(new, {}))
            self._frozen = [p for i, p in enumerate(self._frozen) if i not in unfrozen]

    def init_state(self) -> None:
        """Makes the state that the next step() would make; a collective call.

        That is a momentum of zeros for every parameter that was unfrozen since the optimizer or its group was made.
        All other trainable parameters have theirs already.

        Raises:
            ValueError: on every rank, where the ranks unfroze different parameters; nothing has been changed.
        """
        self._membership.check()
        self._settle()
        self._adopt(self._unfrozen(), "ShardedLion.init_state()")

    @torch.no_grad()
    def broadcast_buffers(self, buffers: Iterable[Tensor]) -> None:
        """Overwrites tensors that are no parameters (``model.buffers()``) with those of the group's first rank,
        once; a collective call. The optimizer never synchronises them by itself."""
        given = list(buffers)
        with Agreement(self._group, "ShardedLion.broadcast_buffers()") as agreement:
            for b in given:
                check_device(b.device, self._group)
            agreement.says([f"buffer {i}: shape {tuple(b.shape)}, {b.dtype}" for i, b in enumerate(given)])
        self._settle()
        for b in given:
            sent = b.contiguous()  # itself, or a copy where a buffer has gaps
            broadcast_from_first([sent], self._group)
            if sent is not b:
                b.copy_(sent)

    # Steps --------------------------------------------------------------------------------------

    def no_sync(self) -> AbstractContextManager[None]:
        """Around every backward of a step but the last, in stage 2: gradients add up in ``p.grad``, at full size,
        and are reduced with the last. (Without it each backward's are reduced or, where they come too late for
        the bucket they belong to, at step(), for which the host waits for the device, and does in all steps that
        follow.) In stage 1 it is the wrapper's to do."""
        if self._reducer is None:
            raise RuntimeError("with stage=1 use the no_sync() of DistributedDataParallel, which reduces the gradients")
        return self._reducer.no_sync()

    def join_hook(self, **kwargs: Any) -> NoReturn:
        """Refuses torch.distributed.algorithms.join.Join, which calls it.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "ShardedLion does not work under torch.distributed.algorithms.join.Join: every rank must make the same "
            "number of steps, since each owns a part of the momentum. Give all ranks the same number of batches "
            "(DistributedSampler(drop_last=True)), or stop all of them when the first has none left"
        )

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Steps this rank's slices and synchronises the parameters; a collective call.

        Hyper-parameters and the max_norm of clip_grad_norm_() (in stage 1 also which gradients are None) must be the
        same on every rank. Where they are not, no parameter changes, and every rank raises ValueError: on CPUs in this
        step, on GPUs in the second after it (or in full_state_dict, check_replicas or resync before that), since the
        host does not wait; it runs two steps ahead of the device at most. Momenta may have changed. The same where a
        backward reached some ranks between clip_grad_norm_() and step(); those raise at once.

        A step for which no rank had any gradient changes nothing. The first such step warns, on every rank.

        Args:
            closure: re-evaluates the model and returns the loss; called with gradients enabled.

        Returns:
            The closure's loss, or None.

        Raises:
            ValueError: on every rank: the ranks made different steps; or, in stage 1, gradients are not averaged over
                the ranks, for which the first two steps look (and two after parameters were added, unfrozen or
                loaded); nothing has been changed then.
        """
        if "grad_scale" in self.__dict__:
            del self.__dict__["grad_scale"], self.__dict__["found_inf"]  # the scaler would, had step() returned
            raise RuntimeError(
                "ShardedLion with stage=2 does not support GradScaler, which checks p.grad: train in bfloat16 without "
                "it, or use stage=1 with DistributedDataParallel"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        hypers = [hyper_parameters(group) for group in self.param_groups]
        self._rounding.check(self.param_groups, hypers)
        self._membership.check()
        if self._clipping is None:
            self._reduce()
        elif self._changed_since_clipping():
            self._refuse()
            raise ValueError(
                "the gradients have changed since clip_grad_norm_() was called: call it just before step(), or "
                "zero_grad() if they are new and not to be clipped"
            )
        self._step_and_sync(hypers)
        self._set_clipping(None)
        self._warn_of_no_gradient()
        return loss

    def _refuse(self) -> None:
        """Takes part in the collectives of a step that this rank cannot make, and changes nothing. Ranks that make it
        leave their parameters as they are, and raise as `DeferredCheck` does; if all refuse it, they agree."""
        if dist.get_world_size(self._group) == 1 or not self._parts:
            return
        message = mismatch([], None)
        if self._signs:
            for part in reversed(self._parts):
                assert part.exchange is not None
                part.exchange.refuse()
                with self._membership.collective():
                    part.exchange.start_gather(self._group).wait()
                if part is self._parts[-1]:
                    self._deferred.compare(part.exchange.numbers, message)
        else:
            with self._membership.collective() as group:
                own = torch.full((), REFUSED, dtype=torch.int64, device=self._parts[0].shard.exp_avg.device)
                self._deferred.compare(gathered(own, group), message)
                for part in reversed(self._parts) if self._deferred.under_way else ():
                    gather = part.shard.start_gather(group)
                    if gather is not None:
                        gather.wait()
                    part.shard.finish_gather()
        with suppress(ValueError):  # the caller's says more
            self._deferred.check()

    def _warn_of_no_gradient(self) -> None:
        if self._warned_of_no_gradient or not self._parts:
            return
        if self._reducer is None:
            none = not any(1 in part.present[0] for part in self._parts)
        else:
            none = self._reducer.none_active()
        if none:
            self._warned_of_no_gradient = True
            warnings.warn(
                "lion_dist: step() changed nothing, because no rank had a gradient of any parameter of this "
                "ShardedLion. If a backward preceded it, the model's parameters are no longer those that the optimizer "
                "was made with (load_state_dict(assign=True), resized embeddings and FSDP replace them): make the "
                "optimizer after that. Further steps of this kind are not reported",
                stacklevel=7,
            )

    def _step_and_sync(self, hypers: list[HyperParameters]) -> None:
        """Part by part, the last parameters first, as their gradients are the first to be there: one is stepped
        while the gradients of the next are on their way, and its outcome travels while the next is stepped."""
        columns = self._columns()
        scale = None if self._clipping is None else self._clipping.scale
        salt = 1 << 62 | zlib.crc32(b"".join(part.present[0] for part in self._parts))
        message = mismatch(hypers, self._clipping)
        # Raises for bad gradients before anything is changed.
        prepared = [part.update.prepare(own) for part, own in zip(self._parts, columns, strict=True)]
        if self._clipping is None:  # else clip_grad_norm_() has looked
            self._check_averaged(columns)
        if not self._signs:
            hypers = self._agreed(hypers, scale, salt, message)
        under_way = []
        for number in reversed(range(len(self._parts))):
            part, own = self._parts[number], columns[number]
            if self._reducer is not None:
                self._reducer.finish(number)
                own.active = self._reducer.active(number)
            if part.signs is None or part.exchange is None:
                part.update.step(prepared[number], hypers, scale)
            else:
                part.signs.pack(prepared[number], hypers, scale, salt, part.exchange.own, part.exchange.own_number)
            with self._membership.collective():
                if part.exchange is None:
                    gather = part.shard.start_gather(self._group)
                else:
                    gather = part.exchange.start_gather(self._group)
            under_way.append((part, own, gather))
        if self._reducer is not None:
            self._reducer.finish()
        agree = None
        for part, own, gather in under_way:
            if gather is not None:
                with self._membership.collective():
                    gather.wait()
            if part.signs is None or part.exchange is None:
                part.shard.finish_gather()
                continue
            if agree is None:
                agree = self._deferred.compare(part.exchange.numbers, message)
            part.signs.apply(own, agree)
        self._deferred.check()  # once nothing is under way any more

    def _agreed(
        self, hypers: list[HyperParameters], scale: Tensor | None, salt: int, message: Callable[[], str]
    ) -> list[HyperParameters]:
        """With parameters gathered: compares checksums of the step before it is made, of 8 bytes a rank.

        Returns:
            The hyper-parameters to step with. On a GPU their lr, on the device, is 0 if the ranks do not agree.

        Raises:
            ValueError: on every rank, on the CPU, where they do not.
        """
        if not self._parts or dist.get_world_size(self._group) == 1:
            return hypers
        part = self._parts[0]
        table = part.update.hyper_table(hypers, part.shard.exp_avg.device)
        with self._membership.collective() as group:
            numbers = gathered(hyper_checksum(table, salt, scale), group)
        agree = self._deferred.compare(numbers, message)
        if self._deferred.under_way:
            return [h._replace(lr=_lr_if(agree, h.lr)) for h in hypers]
        self._deferred.check()
        return hypers

    def _check_averaged(self, columns: Sequence[StepTensors]) -> None:
        """In stage 1: raises, in the first steps, where gradients are not the same on all ranks."""
        if self._averaged is None or not self._averaged.left:
            return
        params = [p for own in columns for p in own.params]
        grads = [g for own in columns for g in own.grads]
        with self._membership.collective():
            self._averaged.check(params, grads, [n for part in self._parts for n in part.shard.numbers])

    def _group_numbers(self) -> list[list[int]]:
        """For each part, the group of each of its parameters; raises if the groups hold others than were given."""
        ids = [list(map(id, group["params"])) for group in self.param_groups]
        if ids != self._ids:
            group_of = {i: number for number, of_group in enumerate(ids) for i in of_group}
            given = {id(p) for part in self._parts for p in part.shard.params} | {id(p) for p in self._frozen}
            if group_of.keys() != given:
                raise ValueError(
                    "parameters were added to or removed from param_groups: use add_param_group() on every rank, or "
                    "make a new ShardedLion"
                )
            self._groups = [[group_of[id(p)] for p in part.shard.params] for part in self._parts]
            self._ids = ids
        return self._groups

    def _columns(self) -> list[StepTensors]:
        """One for each part."""
        reducer, columns = self._reducer, []
        for number, (part, groups) in enumerate(zip(self._parts, self._group_numbers(), strict=True)):
            shard = part.shard
            shard.refresh()
            params = shard.params
            grads: list[Tensor | None]
            if reducer is None:
                grads = [p.grad for p in params]
                present = self._present(part, grads)
                active = present if self._signs else None  # without signs gradients that are None say the same
            else:
                grads = [reducer.grads[number]] * len(params)
                active = None  # it may still be on its way
            state = {EXP_AVG: [shard.exp_avg] * len(params)}
            columns.append(StepTensors(params, grads, state, groups, part.segments, active, shard.numbers))
        return columns

    @staticmethod
    def _present(part: _Part, grads: Sequence[Tensor | None]) -> Tensor | None:
        """In stage 1 a gradient may be None, in which case it is so on every rank, or no parameter will move."""
        present = bytes(g is not None for g in grads)
        if present != part.present[0]:
            device = part.shard.exp_avg.device
            part.present = present, upload(list(present), torch.uint8, device) if 0 in present else None
        return part.present[1]

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, process_groups: Sequence[dist.ProcessGroup] = ()) -> Tensor:
        """Clips the gradients of all parameters together to a 2-norm of at most ``max_norm``; a
        collective call, for just before step().

        Called once more before step() it clips what is clipped already or, where any rank has other gradients since,
        all gradients anew; the ranks' hosts then wait for one another.

        The coefficient is multiplied in by the fused step, so ``p.grad`` itself is not written. The
        norm is a float64 sum of squares over the shards, rounded once. In stage 1 it looks, as step() does, for
        gradients that are not averaged.

        Args:
            max_norm: > 0, the same on every rank; step() compares the coefficient.
            process_groups: groups whose ranks hold other parameters of the same model, such as those of
                tensor or pipeline parallelism: the norm is over theirs too. (A parameter that several ranks
                of such a group hold counts once for each.)

        Returns:
            The norm before clipping: float32, shape (), on the parameters' device, not waited for.
        """
        if not max_norm > 0:
            raise ValueError(f"max_norm must be > 0, got {max_norm}")
        self._membership.check()
        before = None
        if self._clipping is not None and not any(self._membership.any_rank(self._changed_since_clipping())):
            before = self._clipping.scale  # what counts is the gradient as it would be stepped
        if before is None:
            self._reduce()
        columns = self._columns()
        if self._reducer is not None:
            self._reducer.finish()
            for number, own in enumerate(columns):
                own.active = self._reducer.active(number)
        sums = [
            part.update.sum_of_squares(part.update.prepare(own)) for part, own in zip(self._parts, columns, strict=True)
        ]
        if before is None:
            self._check_averaged(columns)
        present = [total for total in sums if total is not None]
        if present:
            total = torch.stack(present).sum()
        else:
            device = next((p.device for group in self.param_groups for p in group["params"]), "cpu")
            total = torch.zeros((), dtype=torch.float64, device=device)
        with self._membership.collective():
            for group in (self._group, *process_groups) if self._parts else process_groups:
                all_reduce_sum(total, group)
            if process_groups and self._parts:
                # Other groups may add in other orders, and ranks whose coefficients differ by a bit make no step.
                broadcast_from_first([total], self._group)
        if before is not None:
            total = total * before.double().square()
        norm, coefficient = clip_coefficient(total, max_norm)
        scale = coefficient if before is None else before * coefficient
        self._set_clipping(Clipping(max_norm, scale, self._same_gradients()))
        return norm

    def _set_clipping(self, clipping: Clipping | None) -> None:
        """The same on every rank. Gradients that arrive in stage 2 after clipping stay in ``p.grad``: ranks that their
        pass misses could not know of a collective, and make the step."""
        self._clipping = clipping
        if self._reducer is not None:
            self._reducer.holds = clipping is not None

    def _changed_since_clipping(self) -> bool:
        """Whether the clipping is not that of the gradients that this rank has."""
        return self._clipping is not None and (not self._clipping.fits() or bool(self._unfrozen()))

    def _same_gradients(self) -> Callable[[], bool]:
        """Tells, whenever it is called, whether the gradients are what they are now."""
        reducer = self._reducer
        if reducer is None:
            parts = self._parts  # another list once there are other parameters
            same = same_gradients([p for part in parts for p in part.shard.params])
            return lambda: self._parts is parts and same()
        generation = reducer.generation
        return lambda: not reducer.has_local() and reducer.generation == generation

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients, and clipping that no step() has used.

        In stage 2, gradients that no step() or clip_grad_norm_() has used are dropped on every rank or on none, and
        their backward must have reached a parameter on every rank; else the next step() raises on every rank. (Where it
        reached a rank by parameters that are unfrozen since the last step alone, call this, not model.zero_grad().)
        Until that step(), gradients of further backwards stay in ``p.grad``, at full size.
        """
        # A pass may have reached ranks by unfrozen parameters alone, of which the reducer does not know yet.
        unfrozen = self._clipping is None and any(p.requires_grad for p in self._frozen)
        if self._reducer is not None and unfrozen:
            grads = any(p.grad is not None for p in self._frozen)
            if grads or self._reducer.is_open or self._reducer.has_local():
                self._settle()
        with nullcontext() if self._reducer is None else self._reducer.zeroing(set_to_none):
            super().zero_grad(set_to_none)
        self._set_clipping(None)

    # Replicas -----------------------------------------------------------------------------------

    @torch.no_grad()
    def check_replicas(self) -> None:
        """Compares checksums of the parameters' bits over the ranks; a collective call, which the host waits for.

        Raises:
            RuntimeError: on every rank, where a replica differs: the parameters, and the ranks.
            ValueError: on every rank, where hyper-parameters differed in one of the last steps; see `step`.
        """
        self._deferred.check(all=True)
        self._check_bits()

    def _check_bits(self) -> None:
        self._settle()
        unlike = differing([p for group in self.param_groups for p in group["params"]], self._group)
        if unlike:
            some = "; ".join(f"parameter {i} on ranks {ranks}" for i, ranks in unlike[:5])
            raise RuntimeError(
                f"{len(unlike)} parameters have not the bits that they have on the group's first rank: {some}. Call "
                "resync() on every rank to give all ranks those of the first"
            )

    @torch.no_grad()
    def resync(self) -> None:
        """Gives every rank the parameters of the group's first rank; a collective call. Raises ValueError, once it
        has, where hyper-parameters differed in one of the last steps; see `step`."""
        with Agreement(self._group, "ShardedLion.resync()"):
            pass
        self._settle()
        broadcast([p for group in self.param_groups for p in group["params"]], self._group)
        self._deferred.check(all=True)

    # State --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """This rank's part of the state, as `BoxTensor`s: views of the shard, in the parameters' logical shapes.

        Local and cheap. torch.distributed.checkpoint saves and loads it under any other cut, as do
        torch.distributed.checkpoint.state_dict.get_optimizer_state_dict and set_optimizer_state_dict;
        `lion_dist.checkpoint` does it all. For a state that torch.save takes, see `full_state_dict`.

        Raises:
            ValueError: on every rank, where hyper-parameters differed in one of the last steps; see `step`.
        """
        self._deferred.check(all=True)
        self._group_numbers()
        packed = with_named_dtypes(super().state_dict())
        return {**packed, "state": ordered(packed["state"])}

    @torch.no_grad()
    def full_state_dict(self, *, rank0_only: bool = False) -> dict[str, Any]:
        """The whole state as `Lion.state_dict` would give it; a collective call.

        Momenta are gathered and copied to the CPU one parameter at a time, as plain contiguous tensors
        in the parameters' shapes. `Lion` and `ShardedLion`, of any world size, load it. What others keep in ``state``
        is each rank's own, its tensors copied to the CPU.

        Args:
            rank0_only: only the group's first rank keeps it in memory; the others get {}.

        Raises:
            RuntimeError: ranks that did not make the call within the group's time-out, by number.
            ValueError: on every rank, where hyper-parameters differed in one of the last steps; see `step`.
        """
        with Agreement(self._group, "ShardedLion.full_state_dict()") as agreement:
            self._deferred.check(all=True)
            self._group_numbers()
            agreement.says([f"rank0_only={rank0_only}"])
        self._settle()
        keep = not rank0_only or self._rank == 0
        gathered = whole_momenta(self._shards, self._group, keep)
        if not keep:
            return {}
        packed = with_named_dtypes(super().state_dict())
        return {**packed, "state": whole(packed["state"], self.param_groups, gathered)}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state, keeping this rank's slices; a collective call. Either a whole one, of `full_state_dict` or
        of `Lion`, the same on every rank; or one of `state_dict`, which torch.distributed.checkpoint has filled.

        Momenta keep the dtype they were saved in, unless their group names a ``momentum_dtype``. Parameters are matched
        by name where both sides have names, and what others keep in the state is loaded, as by `Lion.load_state_dict`.
        Post hooks (``register_load_state_dict_post_hook``) run once the state is loaded on every rank, momenta and all,
        and not if it is refused on any; what they write stays.

        Raises:
            ValueError, TypeError, RuntimeError: on every rank, if it fits this optimizer badly on any of them;
                nothing has been changed. On every rank too, if a hook raises on one: after a post hook the state is
                loaded.
        """
        incoming = IncomingState(self.param_groups, self.defaults, self.state)
        previous = self.param_groups, self.state
        handle = self.register_load_state_dict_pre_hook(incoming.take)
        try:
            with Agreement(self._group, "ShardedLion.load_state_dict()") as agreement:
                check_is_dict(state_dict)
                super().load_state_dict(state_dict)
                self._check_can_be_sharded(incoming.momenta.keys())
                incoming.check_cut(self.param_groups, self._shards, self._rank)
                agreement.says(describe_groups(self.param_groups))
                agreement.says(incoming.describe())
            if self._signs:
                self._check_bits()
        except Exception:
            self.param_groups, self.state = previous
            raise
        finally:
            handle.remove()
            incoming.give_back_post_hooks(self)

        if incoming.fits(self._shards):
            self._set_shards(self._shards)
        else:
            params = [p for group in self.param_groups for p in group["params"]]
            sharded = {id(p) for shard in self._shards for p in shard.params} | incoming.momenta.keys()
            self._frozen = [p for p in self._frozen if id(p) not in sharded]
            self._set_shards(self._make_shards([p for p in params if id(p) in sharded], incoming.dtypes))
        for shard in self._shards:
            shard.take_exp_avgs(incoming.momenta, self._rank)
        self._set_clipping(None)
        self._deferred = DeferredCheck()  # what the last steps did is gone
        with Agreement(self._group, "the post hooks of ShardedLion.load_state_dict()"):
            for hook in list(load_state_dict_post_hooks(self).values()):
                hook(self)

    def _check_can_be_sharded(self, wanted: Collection[int]) -> None:
        """Raises ValueError where one of the parameters with these ids is frozen and cannot be sharded as it is."""
        params = [p for group in self.param_groups for p in group["params"]]
        able = comparable(params, self._group)
        for i, p in enumerate(params):
            if id(p) in wanted and i not in able:
                raise ValueError(
                    f"the state_dict has a momentum for parameter {i} (shape {tuple(p.shape)}), which is frozen here, "
                    f"and not dense or on another device (strides {p.stride()}, {p.device}), so ShardedLion cannot "
                    "shard it: make it contiguous, or leave its entry out of the state_dict"
                )

    def __setstate__(self, state: dict[str, Any]) -> None:
        previous = self.param_groups
        super().__setstate__(state)
        complete_loaded_groups(self.param_groups, previous, self.defaults)
        for entry in self.state.values():
            unwrap(entry)

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            "ShardedLion cannot be pickled or deep-copied: it holds a process group and one rank's shard. Use "
            "full_state_dict()"
        )
