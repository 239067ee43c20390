"""ShardedLion: Lion for replicated parameters, with the momentum sharded over the ranks.

Each rank steps the slices of the parameters that it owns (sharding/layout.py), and the ranks then bring the parameters
together. Parameters stay where they are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NoReturn, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from . import sharded_access, sharded_replicas
from .grad_source import check_reduction, make_grad_source
from .hyper_reader import HyperReader
from .intake import FrozenParams, complete_new_group, describe_new, listed, make_equal, new_shards, own_rank
from .master_weights import NamedTensors
from .param_groups import complete_loaded_groups, count_step, make_defaults
from .param_sync import check_param_sync, make_param_sync
from .rounding import RoundingWarnings
from .sharded_access import REFUSED_JOIN, REFUSED_PICKLE, agreeing, begin_step, clip_optimizers, params_of
from .sharded_masters import take_on_all_ranks
from .sharded_state import load
from .sharded_statistics import sharded_statistics
from .sharding.collectives import Membership
from .sharding.replicas import DeferredCheck
from .sharding.shard import Shard, number_params
from .state_dicts import unwrap
from .state_entries import with_entries
from .state_offload import move_state
from .statistics import Groups
from .stepper import Stepper
from .uncompiled import uncompiled
from .update.lion_update import check_use_triton
from .update.state import StateColumn
from .whole_state import Gathered, consolidate, full_state_dict, shown


@uncompiled
class ShardedLion(Optimizer):
    """Lion for parameters that are replicated on every rank, with the momentum sharded (ZeRO stages 1 and 2).

    It gives the same bits as `Lion` on the same averaged gradients. Each rank holds a world_size-th of the momentum and
    steps a world_size-th of the elements. All ranks make these collective calls in the same order: the constructor,
    step, clip_grad_norm_, statistics, add_param_group, init_state, broadcast_buffers, check_replicas, resync,
    full_state_dict, consolidate_state_dict, load_state_dict, offload_state, reload_state and, while there are unused
    gradients, zero_grad. torch.compile runs all of them as they are.

    The constructor compares the arguments of the ranks and broadcasts the parameters of the group's first rank. Where a
    rank has them in another order it raises, by their names or, without names, by their values (equal values cannot be
    told apart). Buffers are not sent: see `broadcast_buffers`. Arguments that are not listed here are those of `Lion`.

    Args:
        params: as for `Lion`, dense and on one device. Frozen ones may be anything; those that are dense and on that
            device are broadcast and compared too, others once they are unfrozen.
        process_group: the ranks that hold the replicas; None is the default group. Parameters may be DTensors, as of
            FSDP2 or tensor parallelism. The ranks then hold replicas of this rank's part, and none of the others.
        stage: 1: the gradients in ``p.grad`` are averaged over the ranks before step(), as by DistributedDataParallel,
            and are None on all ranks or on none. The first two steps compare them over the ranks.
            2: the optimizer averages the gradients itself; do not wrap the model. Gradients are reduce-scattered in
            buckets during the backward and leave ``p.grad``. Every rank makes the same backward passes, which may reach
            different parameters, or none. On GPUs, if the first step has several passes outside no_sync(), every rank
            must be reached by more than one of them or by none, or that step raises on every rank; from then on, the
            host waits for the device in every step. Parameters must be unfrozen on every rank before the same step, or
            a step raises (in stage 1 only when the group times out). A parameter for which no rank has a gradient is
            not stepped. GradScaler and torch's clip_grad_norm_ are refused: use bfloat16 or stage 1, and this class's
            `clip_grad_norm_`. Optimizers that take part in one backward need process groups of their own.
        bucket_mb: MiB of gradients that stage 2 reduces together, in their order in the first rank's first backward. At
            most three exist at a time if every parameter is used and no other ShardedLion reduces over several ranks.
        reduce_dtype: how stage 2 averages. torch.bfloat16 (or its name): each rank rounds its gradients to bfloat16 and
            sends them, and their owner adds them up in float32, in the order of the ranks. That halves the bytes of
            float32 gradients, and gives bfloat16 ones float32 averages. A bucket under way then takes 4 bytes an
            element, whatever the gradients' dtype. None: in the dtype of the gradients, as the backend adds them up.
        param_sync: how each rank's slices reach the other ranks. "params": an all-gather of the parameters, in place.
            "signs": an all-gather of the update's signs, 2 bits an element, which every rank applies to its own
            replica: the same bits for a sixteenth (float32) of the bytes, but a replica that has come to differ is
            never repaired (see `check_replicas`), and every rank keeps the remainders of all master weights, 2 bytes an
            element. "auto": "signs" where there are several ranks and no group of the constructor has master weights.

    Raises:
        RuntimeError: there is no process group, or other ranks, which the error names, failed or are absent. (If one
            rank fails alone in step(), statistics() or clip_grad_norm_(), the others wait for the time-out.)
        ValueError, TypeError: parameters, hyper-parameters or ranks that do not fit.
    """

    _step_supports_amp_scaling = property(sharded_access.takes_loss_scale)

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1e-4, betas: Iterable[float] = (0.9, 0.99),
        weight_decay: float = 0.0, use_triton: bool | None = None, decoupled_weight_decay: bool = False, *,
        process_group: dist.ProcessGroup | None = None, stage: int = 2, param_sync: str = "auto",
        bucket_mb: float = 256, reduce_dtype: torch.dtype | str | None = None,
        momentum_dtype: torch.dtype | str | None = None, master_weights: bool = False, maximize: bool = False,
    ) -> None:  # fmt: skip
        self._group, self._rank = own_rank(process_group)
        self._constructed, self._averaged = False, stage == 1  # whether something else averages over the group
        params, tensors = listed(params)
        with agreeing(self, "()", tensors) as agreement:
            reduce_dtype = check_reduction(stage, bucket_mb, reduce_dtype)
            check_param_sync(param_sync)
            check_use_triton(use_triton)
            defaults = make_defaults(
                lr, betas, weight_decay, decoupled_weight_decay, momentum_dtype, master_weights, maximize
            )
            super().__init__(params, defaults)
            world_size = dist.get_world_size(self._group)
            agreement.says([f"world size {world_size}, stage {stage}, bucket_mb {bucket_mb}, param_sync {param_sync}"])
            agreement.says([f"reduce_dtype {reduce_dtype}"])
            agreement.says(describe_new(self.param_groups, 0, self._group))
        self._membership = Membership(self._group)
        self._grads = make_grad_source(stage, self._membership, bucket_mb, reduce_dtype, use_triton)
        self._deferred = DeferredCheck()
        self._sync = make_param_sync(param_sync, self._membership, self._deferred, self.param_groups)
        self._frozen = FrozenParams(self._group, self._averaged)
        self._stepper = Stepper(self._membership, self._grads, self._sync, self._deferred, self._frozen, use_triton)
        self._hypers = HyperReader()
        self._rounding = RoundingWarnings()
        self._take_in(params_of(self))
        self._constructed = True

    @property
    def process_group(self) -> dist.ProcessGroup:
        """The ranks that hold the replicas."""
        return self._group

    # Parameters ---------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; a collective call, with the same group on every rank."""
        if not self._constructed:  # by torch's constructor, within the constructor's own agreement
            return self._append_group(param_group)
        sharded_access.add_group(self, param_group)

    def _append_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        complete_new_group(self.param_groups, self.defaults, self._group, self._averaged)

    @torch.no_grad()
    def _take_in(self, params: Sequence[Tensor]) -> None:
        """Makes new parameters equal on all ranks and shards the trainable ones; a collective call."""
        self._grads.settle()
        self._frozen.add(params, make_equal(params, "param_names" in self.param_groups[-1], self._group))
        self._shard([p for p in params if p.requires_grad])

    def _shard(self, params: Sequence[Tensor], columns: Mapping[int, tuple[StateColumn, ...]] | None = None) -> None:
        """Shards more parameters; a collective call. ``columns`` as for `new_shards`."""
        new = new_shards(params, self.param_groups, columns or {}, self._group, self._sync.keeps_whole)
        self._set_shards(self._shards + new)

    @property
    def _shards(self) -> list[Shard]:
        return self._stepper.shards

    def _set_shards(self, shards: list[Shard]) -> None:
        """Shards the parameters in this way; a collective call. The parameters of no shard count as frozen."""
        number_params(shards, params_of(self))
        self._consolidated: Gathered | None = None
        self._stepper.set_shards(shards)
        self._frozen.leave_out(shards)
        self.state = with_entries(self.state, shards, self._rank)

    def _adopt(self, unfrozen: list[int], call: str = "ShardedLion.step() after unfreezing parameters") -> None:
        """Shards frozen parameters, given by their indices, that take part by now; a collective call."""
        if new := self._frozen.prepare(unfrozen, self._shards, self.param_groups, call):
            self._shard(new)

    def init_state(self) -> None:
        """Makes the state that the next step() would make; a collective call.

        That is a momentum of zeros for each parameter that was unfrozen since the optimizer or its group was made.

        Raises:
            ValueError: on every rank, where the ranks unfroze different parameters; nothing has been changed.
        """
        self._membership.check()
        self._consolidated = None  # a load or new weights may follow
        self._grads.settle()
        self._adopt(self._frozen.unfrozen(), "ShardedLion.init_state()")

    @torch.no_grad()
    def broadcast_buffers(self, buffers: Iterable[Tensor]) -> None:
        """Overwrites tensors, such as ``model.buffers()``, with those of the group's first rank; a collective call."""
        sharded_replicas.share_buffers(self, list(buffers))

    @torch.no_grad()
    def take_master_weights(self, named: NamedTensors) -> None:
        """As `Lion.take_master_weights`; a collective call, with the same weights on every rank."""
        take_on_all_ranks(self, named, self._group, self.init_state)

    # Steps --------------------------------------------------------------------------------------

    def no_sync(self) -> AbstractContextManager[None]:
        """Context manager for every backward of a step but the last, in stage 2. Raises RuntimeError in stage 1.

        Gradients add up in ``p.grad``, at full size, and are reduced with the last backward. Without it, every
        backward's gradients are reduced. Those that arrive after their bucket was launched are reduced at step(), and
        from then on the host waits for the device in every step.
        """
        return self._grads.no_sync()

    def join_hook(self, **kwargs: Any) -> NoReturn:
        """Raises RuntimeError: torch.distributed.algorithms.join.Join, which calls it, cannot be supported."""
        raise RuntimeError(REFUSED_JOIN)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Steps this rank's slices and synchronises the parameters; a collective call.

        Hyper-parameters and the max_norm of clip_grad_norm_() (in stage 1 also which gradients are None) must be the
        same on every rank. Where they are not, or where a backward reached some ranks between clip_grad_norm_() and
        step(), no parameter changes, though momenta may, and every rank raises ValueError: on CPUs in this step, on
        GPUs, where the host does not wait, in the second step after it or in a call that reads the state before that.
        A step for which no rank had any gradient changes nothing. The first such step warns, on every rank.

        Args:
            closure: re-evaluates the model and returns the loss; called with gradients enabled.

        Returns:
            The closure's loss, or None.

        Raises:
            ValueError: on every rank, where the ranks made different steps. Also in stage 1 where gradients are not
                averaged, in the first two steps and the first two after parameters were added, unfrozen or loaded.
            RuntimeError: the state is offloaded, or a framework could not save it.
        """
        begin_step(self)
        with torch.enable_grad():
            loss = None if closure is None else closure()
        hypers = self._hypers.read(self.param_groups)
        self._rounding.check(self.param_groups, hypers)
        self._stepper.step(hypers, self.param_groups, self._adopt)
        count_step(self.param_groups)
        return loss

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, process_groups: Iterable[dist.ProcessGroup] = ()) -> Tensor:
        """Clips the gradients of all parameters together to a 2-norm of at most ``max_norm``; a collective call.

        Call it just before step(), which multiplies the coefficient in: ``p.grad`` itself is not written. A second call
        before step() clips what is clipped already or, where any rank has other gradients since, all gradients anew;
        the ranks' hosts then wait for one another. In stage 1 it refuses gradients that are not averaged.

        Args:
            max_norm: > 0, the same on every rank; step() compares the coefficient.
            process_groups: groups whose ranks hold other parameters of the same model, such as those of pipeline
                parallelism, whose norm includes them; a parameter that several ranks of such a group hold counts once
                for each. Meshes of DTensors are included anyway. Several optimizers: `lion_dist.clip_grad_norm_`.

        Returns:
            The norm before clipping: float32, shape (), on the parameters' device. The host does not wait for it.
        """
        return clip_optimizers([self], max_norm, process_groups)

    @torch.no_grad()
    def statistics(self, by: str = "group", *, flips: bool = False, process_groups: Groups = ()) -> dict[str, float]:
        """Numbers that describe the next step(), over all ranks; a collective call. `Lion.statistics` explains them.

        Every rank gets the same numbers. In stage 2 it averages the gradients, which clipping and step() then do not.
        """
        return sharded_statistics(self, by, flips, process_groups)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients, and clipping that no step() has used.

        In stage 2, gradients that no step() or clip_grad_norm_() has used are dropped on every rank or on none, and
        their backward must have reached a parameter on every rank, or the next step() raises on every rank. (Where it
        reached a rank only by parameters that were unfrozen since the last step, do not call model.zero_grad().) Until
        that step(), gradients of further backwards stay in ``p.grad``, at full size.
        """
        with self._grads.zeroing(set_to_none, self._frozen.params):
            super().zero_grad(set_to_none)
        self._stepper.set_clipping(None)

    @torch.no_grad()
    def check_replicas(self) -> None:
        """Compares checksums of the parameters' bits over the ranks; a collective call, for which the host waits. With
        param_sync="signs" the remainders of master weights are replicated, and are compared too.

        Raises:
            RuntimeError: on every rank, where a replica differs; it names the parameters and the ranks.
            ValueError: on every rank, where hyper-parameters differed in one of the last steps; see `step`.
        """
        sharded_replicas.check(self)

    @torch.no_grad()
    def resync(self) -> None:
        """Gives every rank the parameters of the group's first rank; a collective call.

        With param_sync="signs" it gives them the remainders of master weights too. With "params" each owner keeps those
        of its slices: where its weight was another than the first rank's, the master weight is then that of the first
        rank to half a unit in the last place of bfloat16.

        Raises:
            ValueError: on every rank, after that, where hyper-parameters differed in one of the last steps; see `step`.
        """
        sharded_replicas.resync(self)

    # State --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """This rank's part of the state, as `BoxTensor`s: views of the shard, in the parameters' logical shapes. After
        `consolidate_state_dict`, until the next step, load or resync, that rank's is the whole state, on the CPU.

        Local and cheap. torch.distributed.checkpoint saves and loads it under any other cut, as do
        torch.distributed.checkpoint.state_dict.get_optimizer_state_dict and set_optimizer_state_dict;
        `lion_dist.checkpoint` does it all. For a state that torch.save takes, see `full_state_dict`.

        Raises:
            ValueError: on every rank, where hyper-parameters differed in one of the last steps; see `step`.
        """
        return shown(self)

    @torch.no_grad()
    def consolidate_state_dict(self, to: int = 0) -> None:
        """Gathers the whole state on one rank, whose `state_dict` returns it, as it is now, until the next step, load
        or resync; a collective call, as that of torch's ZeroRedundancyOptimizer, for code that saves on one rank.

        With ``register_state_dict_pre_hook(ShardedLion.consolidate_state_dict)`` every `state_dict` is a collective
        call that makes it.

        Args:
            to: the rank, counted in process_group, and of its copies in the meshes of DTensors the first.

        Raises:
            RuntimeError, ValueError: as for `full_state_dict`; also where the ranks do not give the same rank of it.
        """
        self._consolidated = consolidate(self, to)

    @torch.no_grad()
    def full_state_dict(self, *, rank0_only: bool = False) -> dict[str, Any]:
        """The whole state as `Lion.state_dict` would give it; a collective call.

        State is gathered and copied to the CPU one parameter at a time, as plain contiguous tensors. `Lion` and
        `ShardedLion`, of any world size, load it. Other code's entries of ``state`` are this rank's, on the CPU.

        Args:
            rank0_only: only the group's first rank, and of a mesh's the first, keeps it in memory; the others get {}.

        Raises:
            RuntimeError: some ranks did not make the call within the group's time-out; it names them.
            ValueError: on every rank, where hyper-parameters differed in one of the last steps; see `step`.
        """
        return full_state_dict(self, rank0_only)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state, keeping this rank's slices; a collective call.

        Momenta keep the dtype they were saved in, unless their group names a ``momentum_dtype``. Parameters are matched
        by name where both sides have names, and what others keep in the state is loaded, as by `Lion.load_state_dict`.
        Post hooks run once the state is loaded on every rank, and not if it is refused on any; what they write stays.

        Args:
            state_dict: a whole state, of `full_state_dict` or of `Lion`, the same on every rank; or one of
                `state_dict`, which torch.distributed.checkpoint has filled.

        Raises:
            ValueError, TypeError, RuntimeError: on every rank, if the state does not fit on any of them; nothing has
                been changed. Also on every rank, if a hook raises on one; after a post hook the state is loaded.
        """
        load(self, state_dict)

    @torch.no_grad()
    def offload_state(self) -> None:
        """Moves momenta, scales and remainders to the CPU, until `reload_state`; a collective call.

        Their memory on the device is free then, unless a `state_dict` that was taken before refers to it. The state can
        still be read, saved and assigned to; `step`, `clip_grad_norm_` and loads raise RuntimeError, on every rank, and
        so do `check_replicas` and `resync` where they need it. A second call moves only what was added since.

        Raises:
            RuntimeError, ValueError: as for `full_state_dict`; also where a rank lacks memory. Nothing has been moved.
        """
        move_state(self, offload=True)

    @torch.no_grad()
    def reload_state(self) -> None:
        """Moves the state back to the device, with the same bits; a collective call, which raises as `offload_state`
        does. Where nothing is offloaded it does nothing."""
        move_state(self, offload=False)

    def __setstate__(self, state: dict[str, Any]) -> None:
        previous = self.param_groups
        super().__setstate__(state)
        complete_loaded_groups(self.param_groups, previous, self.defaults)
        for entry in self.state.values():
            unwrap(entry)

    def __getstate__(self) -> NoReturn:
        raise TypeError(REFUSED_PICKLE)
