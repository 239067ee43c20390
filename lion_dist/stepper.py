"""The step of a ShardedLion: gradients from a `GradSource`, through the update, to every rank by a `ParamSync`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from .clipping import Clipping
from .dtensors import local
from .grad_source import GradSource
from .intake import FrozenParams
from .meshes import Placing, device_without_tensors, groups_to_sum, reduced_over, sum_over_meshes
from .mismatch import mismatch, refusal
from .param_groups import Group, kept_form, state_columns, warn
from .param_sync import ParamSync, Part, Step
from .sharding.collectives import Membership, all_reduce_sum, broadcast_from_first
from .sharding.replicas import DeferredCheck
from .sharding.shard import Shard
from .statistics import KeptSigns
from .update.lion_update import LionUpdate, Prepared
from .update.reference import HyperParameters, clip_coefficient
from .update.segments import Segment, StepTensors

# Shards frozen parameters, given by their indices, that take part by now; a collective call. It is an argument of each
# call, since an optimizer whose bound method is kept would live until the garbage collector finds the cycle.
Adopt = Callable[[list[int]], None]


@dataclass(frozen=True)
class Measured:
    """The gradients of an optimizer, measured to be clipped.

    Attributes:
        sums: by the placing of the parameters the sum of squares of this rank's part of the gradients, as they would be
            stepped with: float64, shape ().
        scale: float32, shape (): the factor by which they are clipped already; None is 1.
    """

    sums: dict[Placing, Tensor]
    scale: Tensor | None


class Stepper:
    """Steps the shards of a ShardedLion and clips their gradients. All methods but `check_groups` and
    `forget_tables` are collective.

    Args:
        membership: the ranks.
        grads: the source of gradients.
        sync: brings the outcome of a step to every rank.
        deferred: the comparisons of steps that ``sync`` makes.
        frozen: the parameters that are not sharded yet.
        use_triton: as for `ShardedLion`.

    Attributes:
        shards: the shards that are stepped.
        kept_signs: those of the last ``statistics(flips=True)``.
    """

    def __init__(
        self,
        membership: Membership,
        grads: GradSource,
        sync: ParamSync,
        deferred: DeferredCheck,
        frozen: FrozenParams,
        use_triton: bool | None,
    ) -> None:
        self._membership, self._grads, self._sync, self._deferred = membership, grads, sync, deferred
        self._frozen = frozen
        self._use_triton = use_triton
        self._rank = dist.get_rank(membership.group)
        self.shards: list[Shard] = []
        self._parts: list[Part] = []
        self._clipping: Clipping | None = None
        self.kept_signs = KeptSigns()
        self._warned_of_no_gradient = False
        self._ids: list[list[int]] = []  # ids of the parameters, by group, when _groups was made
        self._forms: list[tuple[bool, bool]] = []  # `kept_form` of each group then
        self._groups: list[list[int]] = []

    def set_shards(self, shards: list[Shard]) -> None:
        """Takes other shards. Shards that stay keep the objects that are kept between their steps."""
        self._grads.set_shards(shards)
        kept = {id(part.shard): part for part in self._parts}
        self.shards, self._parts = shards, [kept.get(id(shard)) or self._part(shard) for shard in shards]
        self._sync.set_parts(self._parts)
        self._ids = []

    def _part(self, shard: Shard) -> Part:
        segments = [
            Segment(run.param, run.start, self._grads.start_of(run), run.offset, run.length)
            for run in shard.layout.slices(self._rank)
        ]
        return Part(shard, segments, LionUpdate(self._use_triton))

    def forget_tables(self) -> None:
        """Drops what is kept between steps and may refer to the present memory of the state."""
        for part in self._parts:
            part.update.forget()
        self._sync.forget_tables()

    def check_groups(self, groups: Sequence[Group]) -> list[list[int]]:
        """Finds the parameter group of each parameter, for each shard.

        Raises:
            ValueError: the groups hold other parameters than those that the optimizer was given, or ask for other kinds
                of state.
        """
        ids, forms = [list(map(id, group["params"])) for group in groups], list(map(kept_form, groups))
        if ids != self._ids or forms != self._forms:
            group_of = {i: number for number, members in enumerate(ids) for i in members}
            given = {id(p) for shard in self.shards for p in shard.params} | set(map(id, self._frozen.params))
            if group_of.keys() != given:
                raise ValueError(
                    "parameters were added to or removed from param_groups: use add_param_group() on every rank, or "
                    "make a new ShardedLion"
                )
            self._groups = [[group_of[id(p)] for p in shard.params] for shard in self.shards]
            for shard, numbers in zip(self.shards, self._groups, strict=True):
                _check_columns(shard, [groups[number] for number in numbers])
            self._ids, self._forms = ids, forms
        return self._groups

    def _tensors(self, groups: Sequence[Group]) -> tuple[list[StepTensors], Exception | None]:
        """The tensors of each part; ``active`` is set once the gradients are ready.

        Also the error of `check_groups`, if any, after which the numbers of groups in the tensors mean nothing. The
        groups of this rank alone may have been changed, so it must not be raised before the other ranks have learnt it.
        """
        fault: Exception | None = None
        try:
            numbers = self.check_groups(groups)
        except (TypeError, ValueError) as error:
            fault, numbers = error, [[0] * len(shard.params) for shard in self.shards]
        tensors = []
        for i, (part, group_numbers) in enumerate(zip(self._parts, numbers, strict=True)):
            shard = part.shard
            shard.refresh()
            params = shard.locals
            state = {name: [buffer] * len(params) for name, buffer in shard.buffers.items()}
            grads = self._grads.grads_of(i)
            blocks = {column.name: column.block for column in shard.columns}
            tensors.append(StepTensors(params, grads, state, group_numbers, part.segments, None, shard.numbers, blocks))
        return tensors, fault

    # Steps --------------------------------------------------------------------------------------

    def step(self, hypers: list[HyperParameters], groups: Sequence[Group], adopt: Adopt) -> None:
        """Steps every shard; see `ShardedLion.step`.

        Args:
            hypers: one for each parameter group.
            groups: the parameter groups.
            adopt: called for parameters that were unfrozen; calls `set_shards`.
        """
        self._membership.check()
        clipping = self._clipping
        if clipping is None:
            self._reduce(adopt)
        elif self._changed_since(clipping):
            self._sync.refuse(refusal)
            raise ValueError(
                "the gradients have changed since clip_grad_norm_() was called: call it just before step(), or "
                "zero_grad() if they are new and not to be clipped"
            )
        tensors, fault = self._tensors(groups)
        if fault is not None:
            self._refuse_after(fault, tensors)
        scale = None if clipping is None else clipping.scale
        step = Step(hypers, scale, 1 << 62 | self._grads.fingerprint(), mismatch(hypers, clipping))
        # Raises for bad gradients before anything is changed.
        prepared = [part.update.prepare(own) for part, own in zip(self._parts, tensors, strict=True)]
        if clipping is None:  # otherwise clip() has checked them
            self._grads.check(tensors)
        self._sync.agree(step)
        # The last part first, since its gradients are the first to arrive. A part is stepped while the gradients of the
        # next are under way, and its outcome travels while the next is stepped.
        under_way = []
        for i in reversed(range(len(tensors))):
            tensors[i].active = self._grads.ready(i)
            under_way.append(self._sync.start(i, prepared[i], step))
        self._grads.finish()
        for finish in under_way:
            finish()
        if stepped := [p for shard in self.shards if shard.placing.mesh is not None for p in shard.params]:
            torch.autograd.graph.increment_version(stepped)  # only the versions of their local tensors have risen
        self._deferred.check()  # it may raise, so not before everything has ended
        self.set_clipping(None)
        self._warn_of_no_gradient()

    def _refuse_after(self, fault: Exception, tensors: Sequence[StepTensors]) -> NoReturn:
        """Raises the fault of this rank, after the collectives of a step that other ranks may make."""
        if self._clipping is None:
            self._grads.check(tensors)
        self._grads.finish()
        self._sync.refuse(refusal)
        raise fault

    def _reduce(self, adopt: Adopt) -> None:
        """Starts bringing every gradient to its owner, once every parameter that takes part is sharded."""
        while unfrozen := self._grads.reduce(self._frozen.params):
            adopt(unfrozen)

    def _reduce_unless_clipped(self, adopt: Adopt) -> Clipping | None:
        """Starts bringing every gradient to its owner, unless these were clipped and no rank has others since.

        Returns:
            The clipping of these gradients.
        """
        clipping = self._clipping
        if clipping is not None and not any(self._membership.any_rank(self._changed_since(clipping))):
            return clipping
        self._reduce(adopt)
        return None

    def look(self, groups: Sequence[Group], adopt: Adopt) -> tuple[list[Prepared], Tensor | None]:
        """What `step` would step, and changes nothing of it; see there for the arguments.

        Returns:
            The prepared step of each shard, with all of its state; and the factor of every gradient: float32, shape (),
            None is 1.
        """
        self._membership.check()
        clipping = self._reduce_unless_clipped(adopt)
        tensors, _ = self._tensors(groups)
        seen = []
        for i, (part, own) in enumerate(zip(self._parts, tensors, strict=True)):
            own.active = self._grads.ready(i)
            update = part.update
            if whole := part.shard.whole:  # which the first half of the step does not read
                own = replace(own, state={**own.state, **whole}, whole=frozenset(whole))
                update = LionUpdate(self._use_triton)
            seen.append(update.prepare(own))
        self._grads.finish()
        self._grads.hold(True)
        return seen, None if clipping is None else clipping.scale

    def _warn_of_no_gradient(self) -> None:
        if self._warned_of_no_gradient or not self._parts or not self._grads.none_active():
            return
        self._warned_of_no_gradient = True
        warn(
            "step() changed nothing, because no rank had a gradient of any parameter of this ShardedLion. If a "
            "backward preceded it, the model's parameters are no longer those that the optimizer was made with "
            "(load_state_dict(assign=True), resized embeddings and FSDP replace them): make the optimizer after that. "
            "Further steps of this kind are not reported"
        )

    # Clipping -----------------------------------------------------------------------------------

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks that hold the replicas."""
        return self._membership.group

    def measure(self, groups: Sequence[Group], adopt: Adopt) -> Measured:
        """Brings the gradients to their owners and measures them; see `step` for the arguments."""
        self._membership.check()
        before = self._reduce_unless_clipped(adopt)
        tensors, _ = self._tensors(groups)  # the norm is not a matter of groups; step() refuses them, on every rank
        sums = self._sums_of_squares(tensors)
        if before is None:
            self._grads.check(tensors)
        else:  # what counts is the gradient as it would be stepped
            sums = {placing: total * before.scale.double().square() for placing, total in sums.items()}
        return Measured(sums, None if before is None else before.scale)

    def _sums_of_squares(self, tensors: Sequence[StepTensors]) -> dict[Placing, Tensor]:
        """The sum of squares of this rank's part of the gradients, by the placing of the parameters: float64, shape
        ()."""
        sums: dict[Placing, list[Tensor]] = {}
        for i, (part, own) in enumerate(zip(self._parts, tensors, strict=True)):
            own.active = self._grads.ready(i)
            total = part.update.sum_of_squares(part.update.prepare(own))
            if total is None:
                total = torch.zeros((), dtype=torch.float64, device=part.shard.device)
            sums.setdefault(part.shard.placing, []).append(total)
        self._grads.finish()
        return {placing: torch.stack(of_placing).sum() for placing, of_placing in sums.items()}

    def total(self, sums: Mapping[Placing, Tensor], widest: dist.ProcessGroup) -> Tensor | None:
        """The sum over all ranks, of the parameters' meshes too: float64, shape (). None if there are no shards."""
        if not sums:
            return None
        own = self.group
        by_group: dict[dist.ProcessGroup, list[Placing]] = {}
        for placing in sums:
            by_group.setdefault(widest if placing.is_part_of(widest, own) else own, []).append(placing)
        summed: list[tuple[Placing, Tensor]] = []
        with self._membership.collective():
            for group, placings in by_group.items():
                of_placings = torch.stack([sums[placing] for placing in placings])
                all_reduce_sum(of_placings, group)
                summed += zip(placings, of_placings.unbind(), strict=True)
            return sum_over_meshes(summed)

    def agree_on(self, total: Tensor, process_groups: Sequence[dist.ProcessGroup]) -> None:
        """Sums over further groups, in place, and gives every rank the same bits."""
        with self._membership.collective() as own:
            total.copy_(reduced_over(process_groups, total))
            # Groups may add in other orders, and ranks whose coefficients differ by a bit make no step.
            broadcast_from_first([total], own)

    def clip(self, max_norm: float, measured: Measured, coefficient: Tensor) -> None:
        """Takes a coefficient, float32, shape (), for the gradients that were measured."""
        scale = coefficient if measured.scale is None else measured.scale * coefficient
        self.set_clipping(Clipping(max_norm, scale, self._grads.snapshot()))

    def set_clipping(self, clipping: Clipping | None) -> None:
        """Takes clipping, on every rank, or drops it."""
        self._clipping = clipping
        self._grads.hold(clipping is not None)

    def _changed_since(self, clipping: Clipping) -> bool:
        """Whether this rank has other gradients than those that were clipped."""
        return not clipping.fits() or bool(self._frozen.unfrozen())


def clip_together(
    clipped: Sequence[tuple[Stepper, Sequence[Group], Adopt]],
    max_norm: float,
    process_groups: Iterable[dist.ProcessGroup],
) -> Tensor:
    """Clips all gradients of one or several optimizers together; a collective call for the ranks of all of them.

    Each optimizer adds up over its own ranks. Ranks that another one's group has beyond those hold other parameters,
    and it then adds up over that group instead, so that every element counts once.

    Args:
        clipped: each optimizer's stepper, with the arguments of `Stepper.step`; in the same order on every rank.
        max_norm, process_groups: as for `ShardedLion.clip_grad_norm_`.

    Returns:
        The norm before clipping: float32, shape ().

    Raises:
        ValueError: the ranks of the widest process group do not include those of all others, or one of
            ``process_groups`` has ranks of a mesh.
    """
    widest = _widest([stepper for stepper, _, _ in clipped])
    placings = [shard.placing for stepper, _, _ in clipped for shard in stepper.shards]
    process_groups = groups_to_sum(process_groups, placings, [stepper.group for stepper, _, _ in clipped])
    # All of them before any sum: a sum goes over the widest group, on which a rank may have a round yet to begin.
    measured = [stepper.measure(groups, adopt) for stepper, groups, adopt in clipped]
    sums = [stepper.total(m.sums, widest.group) for (stepper, _, _), m in zip(clipped, measured, strict=True)]
    if totals := [own for own in sums if own is not None]:
        total = torch.stack(totals).sum()
    else:
        devices = [local(p).device for _, groups, _ in clipped for group in groups for p in group["params"]]
        device = devices[0] if devices else device_without_tensors([widest.group, *process_groups])
        total = torch.zeros((), dtype=torch.float64, device=device)
    sharded = [shard for stepper, _, _ in clipped for shard in stepper.shards if shard.placing.mesh is not None]
    if process_groups or (totals and (len(clipped) > 1 or sharded)):
        widest.agree_on(total, process_groups)
    norm, coefficient = clip_coefficient(total, max_norm)
    for (stepper, _, _), m in zip(clipped, measured, strict=True):
        stepper.clip(max_norm, m, coefficient)
    return norm


def _widest(steppers: Sequence[Stepper]) -> Stepper:
    """The one whose group has the ranks of all others.

    Raises:
        ValueError: there is none.
    """
    widest = max(steppers, key=lambda stepper: dist.get_world_size(stepper.group))
    ranks = dist.get_process_group_ranks(widest.group)
    for stepper in steppers:
        own = dist.get_process_group_ranks(stepper.group)
        if stepper is not widest and not set(ranks).issuperset(own):
            raise ValueError(
                f"optimizers whose process groups have ranks {ranks} and {own} cannot be clipped together: expected "
                "one group to have the ranks of all others, as that of the dense parameters has those of each expert"
            )
    return widest


def _check_columns(shard: Shard, groups: Sequence[Group]) -> None:
    """Raises ValueError where the parameters of a shard, in these groups, would have other kinds of state."""
    kept = [column.name for column in shard.columns]
    for p, group in zip(shard.params, groups, strict=True):
        wanted = [column.name for column in state_columns(p, group)]
        if sorted(wanted) != sorted(kept):
            raise ValueError(
                f"momentum_dtype or master_weights of a parameter group was changed after ShardedLion was made: a "
                f"parameter of shape {tuple(p.shape)} has {', '.join(kept)} and would have {', '.join(wanted)}. Set "
                "them back; to change them, load the full_state_dict() taken then into a new optimizer made with them, "
                "which converts momenta"
            )
