"""A load, in steps. No rank begins a step before every rank has finished the one before.

compare    the checkpoint with what is here; every rank must have, with the others, all of it
make room  for state that the checkpoint holds and the optimizer lacks
plan       who reads what; each rank verifies what it will read
try out    what the user's code loads: schedulers, extra states of modules
read       tensors, into the model's and the optimizer's own
apply      parameter groups, entries of optimizer.state

Until *read* nothing is changed that cannot be put back. *read* and *apply* fail only if verified files can no longer be
read, or if a hook of the user on load_state_dict raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.optim import Optimizer

from .incoming import Incoming, check_claimed
from .ranks import Ranks, together
from .reader import Reader


class Loading:
    """One load.

    Args:
        what: the call, for messages.
        reader: reads the checkpoint.
        model, optimizer, schedulers: what to load into.
        cast: whether tensors may be converted to another dtype.
        ranks: the ranks that load.
        undo: puts back what has been changed if the load fails.
    """

    def __init__(
        self,
        what: str,
        reader: Reader,
        model: nn.Module,
        optimizer: Optimizer | None,
        schedulers: Sequence[Any],
        cast: bool,
        ranks: Ranks,
        undo: ExitStack,
    ) -> None:
        self._what, self._reader, self._ranks, self._undo = what, reader, ranks, undo
        self._planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        found: list[Incoming] = []

        def compare() -> tuple[set[str], bool]:
            found.append(Incoming(reader, model, optimizer, schedulers, cast, ranks))
            return found[0].unclaimed, found[0].hooked

        def check(of_ranks: list[tuple[set[str], bool]]) -> bool:
            check_claimed([unclaimed for unclaimed, _ in of_ranks])
            return any(hooked for _, hooked in of_ranks)

        self._hooked: bool = together(what, lambda: ranks.steps.all_reduce("compare", compare, check))
        (self._incoming,) = found

    def run(self) -> Any:
        """Loads everything, and returns the caller's ``extra``."""
        incoming, steps = self._incoming, self._ranks.steps
        with torch.no_grad():
            self._on_all_ranks("make room", lambda: incoming.make_room(self._undo))
            final: LoadPlan = together(
                self._what, lambda: steps.reduce_scatter("plan", self._plan, self._planner.create_global_plan)
            )
            self._on_all_ranks("try out", lambda: incoming.try_out(self._undo, self._hooked))
            self._on_all_ranks("read", lambda: self._change(lambda: self._read(final), "in part"))
        self._on_all_ranks("apply", lambda: self._change(incoming.apply, "all"))
        incoming.finish()
        return incoming.extra

    def _on_all_ranks(self, name: str, step: Callable[[], object]) -> None:
        together(self._what, lambda: self._ranks.steps.all_gather(name, step))

    def _plan(self) -> LoadPlan:
        self._planner.set_up_planner(self._incoming.tensors, self._reader.read_metadata(), self._ranks.rank == 0)
        return self._reader.prepare_local_plan(self._planner.create_local_plan())

    def _read(self, plan: LoadPlan) -> None:
        """Reads what the plan says. What is encoded needs other memory, which only one tensor has at a time."""
        items: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            key = item.dest_index.fqn
            items.setdefault(key if key in self._incoming.encoded else "", []).append(item)
        self._reader.read_items(items.pop("", []), self._planner)
        for key in self._incoming.encoded:
            self._planner.state_dict[key], encode = self._incoming.staged(key)
            self._reader.read_items(items.get(key, []), self._planner)
            encode()
            del self._planner.state_dict[key]

    def _change(self, step: Callable[[], object], how: str) -> None:
        """Runs a step that changes tensors. If there is no copy to put back, its error says so.

        Args:
            step: the step.
            how: how far weights and momenta are those of the checkpoint if it fails.
        """
        try:
            step()
        except Exception as error:
            if self._hooked:  # `Incoming.try_out` has made a copy
                raise
            raise (ValueError if isinstance(error, (OSError, ValueError)) else RuntimeError)(
                f"{error}. The checkpoint was whole when it was verified just before. Weights and momenta are {how} "
                "those of the checkpoint now, and all else is as it was: load a checkpoint before going on"
            ) from error
