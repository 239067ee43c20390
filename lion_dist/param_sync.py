"""How the ranks' steps become every rank's parameters: one class for each ``param_sync``.

`GatherParams` steps this rank's slices of the parameters and gathers the parameters. `GatherSigns` gathers the signs of
the update, 2 bits an element, which every rank applies to its own replica. Both begin a collective for one part of the
parameters, so that the next part can be stepped while it is under way. `ShardedLion` never asks which one it has.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from .param_groups import Group
from .sharding.collectives import Membership
from .sharding.exchange import REFUSED, ExchangeBuffer
from .sharding.replicas import DeferredCheck, gathered, refuse_differing
from .sharding.shard import Shard
from .update.lion_update import LionUpdate, Prepared
from .update.reference import PER_BYTE, HyperParameters, hyper_checksum
from .update.segments import Segment
from .update.signs import SignUpdate
from .upload import upload

logger = logging.getLogger("lion_dist")


@dataclass(frozen=True)
class Part:
    """A shard, and the object that steps it.

    Attributes:
        shard: the shard.
        segments: the runs of the shard that this rank owns.
        update: steps them, with tables that it keeps between steps.
    """

    shard: Shard
    segments: list[Segment]
    update: LionUpdate


@dataclass
class Step:
    """One step of all parts. Its attributes must be the same on every rank.

    Attributes:
        hypers: one for each parameter group.
        scale: float32, shape (): multiplied into every gradient; None is 1.
        salt: a number in [2**31, 2**63) that stands for everything else that must be the same.
        message: says how this rank's step differs, to follow the numbers of ranks.
        agreed: bool, shape (): whether all ranks make this step; None until that has been compared.
    """

    hypers: list[HyperParameters]
    scale: Tensor | None
    salt: int
    message: Callable[[], str]
    agreed: Tensor | None = None


class ParamSync(Protocol):
    """Steps the parts of the parameters and synchronises them. Parts are counted as in the last `set_parts`.

    Attributes:
        keeps_whole: whether every rank writes whole parameters, and needs the whole state that is read and written with
            them (`StateColumn.of_param`).
    """

    keeps_whole: bool

    def set_parts(self, parts: Sequence[Part]) -> None:
        """Takes other parts; the buffers of parts that stay are kept."""

    def forget_tables(self) -> None:
        """Drops what is kept between steps and may refer to the present memory of the state."""

    def agree(self, step: Step) -> None:
        """Compares the step over the ranks before it changes anything, if that is not done later; a collective call.

        Raises:
            ValueError: on every rank, where the outcome is known at once and the ranks' steps differ.
        """

    def start(self, part: int, prepared: Prepared, step: Step) -> Callable[[], None]:
        """Steps this rank's slices of a part and begins the collective that brings the result to the other ranks.

        Returns:
            Completes the part. The functions must be called in the order in which the parts were started.
        """

    def refuse(self, message: Callable[[], str]) -> None:
        """Takes part in the collectives of a step that this rank cannot make, and changes nothing.

        Ranks that make the step leave their parameters as they are and raise as `DeferredCheck` does. If all ranks
        refuse it, they agree.
        """

    def check_load(self, params: Sequence[Tensor], state: Sequence[tuple[str, Tensor]]) -> None:
        """Raises RuntimeError, on every rank, where the next steps would not make replicas equal; a collective call.

        Args:
            params: the parameters.
            state: whole tensors that are loaded into columns ``of_param``, each with its name.
        """


class GatherParams:
    """An all-gather of the parameters, in place. It needs no memory but for the tails of the parameters.

    The ranks compare their steps before they make them, by 8 bytes a rank.
    """

    keeps_whole = False

    def __init__(self, membership: Membership, deferred: DeferredCheck) -> None:
        self._membership = membership
        self._deferred = deferred
        self._parts: Sequence[Part] = ()
        self._several = dist.get_world_size(membership.group) > 1

    def set_parts(self, parts: Sequence[Part]) -> None:
        self._parts = parts

    def forget_tables(self) -> None:
        pass  # there is nothing beside the parts

    def agree(self, step: Step) -> None:
        if not (self._parts and self._several):
            return
        first = self._parts[0]
        table = first.update.hyper_table(step.hypers, first.shard.device)
        step.agreed = self._compare(hyper_checksum(table, step.salt, step.scale), step.message)
        if self._deferred.under_way:
            agreed = step.agreed
            step.hypers = [h._replace(lr=_lr_if(agreed, h.lr)) for h in step.hypers]
        else:
            self._deferred.check()

    def _compare(self, number: Tensor, message: Callable[[], str]) -> Tensor:
        with self._membership.collective() as group:
            numbers = gathered(number, group)
        return self._deferred.compare(numbers, message)

    def start(self, part: int, prepared: Prepared, step: Step) -> Callable[[], None]:
        own = self._parts[part]
        own.update.step(prepared, step.hypers, step.scale)
        return self._gather(own.shard)

    def _gather(self, shard: Shard) -> Callable[[], None]:
        with self._membership.collective() as group:
            work = shard.start_gather(group)

        def finish() -> None:
            if work is not None:
                with self._membership.collective():
                    work.wait()
            shard.finish_gather()

        return finish

    def refuse(self, message: Callable[[], str]) -> None:
        if not (self._parts and self._several):
            return
        number = torch.full((), REFUSED, dtype=torch.int64, device=self._parts[0].shard.device)
        self._compare(number, message)
        if self._deferred.under_way:  # else the others have raised by now
            for part in reversed(self._parts):
                self._gather(part.shard)()
        with suppress(ValueError):  # the caller raises an error that says more
            self._deferred.check()

    def check_load(self, params: Sequence[Tensor], state: Sequence[tuple[str, Tensor]]) -> None:
        pass  # the next step brings the owners' parameters to every rank


def _lr_if(agreed: Tensor, lr: float | Tensor) -> Tensor:
    """lr on the device of ``agreed``: exact where the ranks agree, else 0, with which a step writes no parameter."""
    if isinstance(lr, Tensor) and lr.device == agreed.device:
        return torch.where(agreed, lr, 0.0)
    return agreed.double() * float(lr)


class GatherSigns:
    """An all-gather of signs, and an update of every replica by all of them.

    The buffer of the signs costs a quarter of a byte for each element of the parameters. A number of each rank's step
    travels with its signs; where the numbers differ, no signs are applied.
    """

    keeps_whole = True

    def __init__(self, membership: Membership, deferred: DeferredCheck) -> None:
        self._membership = membership
        self._deferred = deferred
        self._parts: list[_SignsOfPart] = []
        self._several = dist.get_world_size(membership.group) > 1

    def set_parts(self, parts: Sequence[Part]) -> None:
        kept = {id(own.part): own for own in self._parts}
        rank = dist.get_rank(self._membership.group)
        self._parts = [kept.get(id(part)) or _SignsOfPart(part, rank) for part in parts]

    def forget_tables(self) -> None:
        for own in self._parts:
            own.signs.forget()

    def agree(self, step: Step) -> None:
        pass  # the numbers travel with the signs

    def start(self, part: int, prepared: Prepared, step: Step) -> Callable[[], None]:
        own, tensors = self._parts[part], prepared.tensors
        if tensors.active is None:
            tensors.active = own.present(tensors.grads)
        exchange = own.exchange
        own.signs.pack(prepared, step.hypers, step.scale, step.salt, exchange.own, exchange.own_number)
        with self._membership.collective() as group:
            work = exchange.start_gather(group)

        def finish() -> None:
            with self._membership.collective():
                work.wait()
            if step.agreed is None:
                step.agreed = self._deferred.compare(exchange.numbers, step.message)
            own.signs.apply(tensors, step.agreed)

        return finish

    def refuse(self, message: Callable[[], str]) -> None:
        if not (self._parts and self._several):
            return
        for own in reversed(self._parts):
            own.exchange.refuse()
            with self._membership.collective() as group:
                own.exchange.start_gather(group).wait()
        self._deferred.compare(self._parts[-1].exchange.numbers, message)  # of the part that a step starts first
        with suppress(ValueError):  # the caller raises an error that says more
            self._deferred.check()

    def check_load(self, params: Sequence[Tensor], state: Sequence[tuple[str, Tensor]]) -> None:
        refuse_differing(params, self._membership.group, state)  # signs would never bring replicas together again


class _SignsOfPart:
    """The signs of one part, of all ranks."""

    def __init__(self, part: Part, rank: int) -> None:
        self.part = part
        layout, device = part.shard.layout, part.shard.device
        self.exchange = exchange = ExchangeBuffer(layout.shard_numel // PER_BYTE, rank, layout.world_size, device)
        everywhere = [
            Segment(s.param, s.start, 0, PER_BYTE * exchange.position(r, s.offset // PER_BYTE), s.length)
            for r in range(layout.world_size)
            for s in layout.slices(r)
        ]
        self.signs = SignUpdate(part.update, everywhere, exchange.bytes, part.shard.whole)
        self._present: tuple[bytes, Tensor | None] = (b"", None)

    def present(self, grads: Sequence[Tensor | None]) -> Tensor | None:
        """Which gradients are not None, for other ranks' slices: uint8, shape (parameters,); None if all are there."""
        if not _lacks_some(grads):
            return None
        present = bytes(g is not None for g in grads)
        if present != self._present[0]:
            self._present = present, upload(list(present), torch.uint8, self.part.shard.device)
        return self._present[1]


def _lacks_some(grads: Sequence[Tensor | None]) -> bool:
    return type(None) in map(type, grads)  # a loop in C: it runs over every parameter in each step


# A new way to synchronise parameters is a class and an entry here. A class that changes what it gathers must itself
# leave the parameters alone where the ranks do not agree: `GatherParams` relies on a gather of unchanged parameters.
_SYNCS: dict[str, Callable[[Membership, DeferredCheck], ParamSync]] = {"params": GatherParams, "signs": GatherSigns}


def check_param_sync(param_sync: str) -> None:
    """Raises ValueError for an argument that no `ParamSync` can be made from."""
    if param_sync not in ("auto", *_SYNCS):
        known = " or ".join(f'"{name}"' for name in _SYNCS)
        raise ValueError(f'param_sync must be "auto", {known}, got {param_sync!r}')


def make_param_sync(
    param_sync: str, membership: Membership, deferred: DeferredCheck, groups: Sequence[Group]
) -> ParamSync:
    """The synchronisation for an argument ``param_sync``.

    Args:
        deferred: takes the comparisons of steps.
        groups: the optimizer's parameter groups.
    """
    if param_sync == "auto":
        if dist.get_world_size(membership.group) == 1:
            param_sync, reason = "params", "as there is one rank and nothing to send"
        elif any(group["master_weights"] for group in groups):
            param_sync, reason = "params", 'as "signs" would keep the remainders of master weights whole on every rank'
        else:
            param_sync, reason = "signs", "exact as every replica holds whole weights"
        logger.debug("param_sync: %s, %s", param_sync, reason)
    return _SYNCS[param_sync](membership, deferred)
