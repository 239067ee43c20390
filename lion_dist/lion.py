"""Lion: the local optimizer. It never communicates, and steps every tensor it is given in one launch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from ._torch_compat import disable_dynamo
from .frozen import takes_part
from .fsdp import is_dtensor, is_flat_view, local, local_gradients, locals_of, new_state
from .param_groups import (
    check_params,
    check_steppable,
    complete_group,
    complete_loaded_groups,
    hyper_parameters,
    make_defaults,
    momentum_dtype,
    normalize_group,
    warn_of_unknown_keys,
)
from .rounding import RoundingWarnings
from .state_dicts import (
    IN_ORDER_OF_NAMES,
    KeptAsIs,
    Misfit,
    check_and_wrap_state,
    check_is_dict,
    unwrap,
    with_named_dtypes,
)
from .update.dispatch import LionUpdate
from .update.segments import StepTensors
from .update.state import EXP_AVG


@dataclass
class Members:
    """What a walk through the groups found, kept for the next step if nothing has changed since.

    ids: of all parameters, by group. params, entries, groups: those that are stepped, their state and
    the number of their group. idle: frozen ones that are not. dtensors: whether any of params is one.
    entry_ids: of all state entries.
    """

    ids: list[list[int]]
    params: list[Tensor]
    entries: list[dict[str, Any]]
    groups: list[int]
    idle: list[Tensor]
    dtensors: bool
    entry_ids: list[int]

    def columns(self) -> StepTensors:
        """Of this step; of DTensors, this rank's part."""
        params: list[Tensor] = self.params
        grads: list[Tensor | None] = [p.grad for p in params]
        exp_avgs = [entry["exp_avg"] for entry in self.entries]
        if self.dtensors:
            grads = local_gradients(params, grads)
            params, exp_avgs = locals_of(params), locals_of(exp_avgs)
        return StepTensors(params, grads, {EXP_AVG: exp_avgs}, self.groups)


class Lion(Optimizer):
    """Lion (EvoLved Sign Momentum), a drop-in for ``lion_pytorch.Lion``.

    Elementwise, so it is right wherever each rank steps the elements it holds: one device, DDP, FSDP1, FSDP2,
    tensor parallelism (where DTensor leaves a gradient in other placements than its parameter, the step brings it into
    these by a collective). State: ``exp_avg`` a parameter, in the parameter's shape and sharding, made at the
    first step for every parameter that requires a gradient, whether this rank holds any of it or not. What a wrapper
    keeps beside it in ``state``, or under keys that are no parameters, stays there, and is saved and loaded. The
    rule is in lion_dist/update/reference.py.

    ``torch.compile`` of a function that calls step() breaks the graph there; ``fullgraph=True`` raises, as it does for
    torch's own optimizers. There is nothing to compile: a step is one kernel launch, or compiles itself on the CPU.

    Under FSDP1 with use_orig_params=False a wrapped module is one parameter, which groups cannot split: its
    gains and biases decay with its matrices.

    Args:
        params: parameters, named parameters or groups; strided float32, bfloat16 or float16. Frozen ones without a
            gradient may be anything, such as a quantised base under adapters; they are judged once they are unfrozen.
        lr: learning rate >= 0, 3 to 10 times smaller than AdamW's; a number or a one-element tensor,
            which is read on its device.
        betas: two numbers in [0, 1), in whatever holds two. (0.95, 0.98) for language models or unstable training.
        weight_decay: decoupled from the gradient and multiplied by lr; 3 to 10 times AdamW's.
        use_triton: None: on GPUs where triton is installed. True: always, or an error. False: never.
            The results are the same bits.
        decoupled_weight_decay: divides weight_decay by the constructor's lr, in every group, as lion-pytorch does:
            at that lr the decay does not depend on it. Groups keep that lr as ``init_lr``; a state_dict brings along
            the one that it was saved with.
        momentum_dtype: dtype of exp_avg, or its name ("bfloat16"); None: the parameter's (float32 for float16
            parameters). Under FSDP1 the same in all groups.
        maximize: ascend instead of descend.

    Raises:
        ValueError, TypeError: for hyper-parameters or parameters that cannot be used; from step(),
            for gradients that cannot, before anything is changed.

    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675.
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
        momentum_dtype: torch.dtype | str | None = None,
        maximize: bool = False,
    ) -> None:
        self._start(use_triton)
        defaults = make_defaults(lr, betas, weight_decay, decoupled_weight_decay, momentum_dtype, maximize)
        super().__init__(params, defaults)

    def _start(self, use_triton: bool | None) -> None:
        """What is not state: made anew by the constructor, unpickling, deepcopy and load."""
        self._use_triton = use_triton
        self._update = LionUpdate(use_triton)
        self._members: Members | None = None
        self._rounding = RoundingWarnings()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            complete_group(group, self.defaults)
            normalize_group(group)
            check_params(group["params"], [p for g in self.param_groups[:-1] for p in g["params"]])
            warn_of_unknown_keys(group, self.param_groups[:-1])
        except Exception:
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of every parameter whose ``grad`` is not None.

        Args:
            closure: re-evaluates the model and returns the loss; called with gradients enabled.

        Returns:
            The closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    @disable_dynamo
    def _step(self) -> None:
        hypers = [hyper_parameters(group) for group in self.param_groups]
        columns = self._columns()
        self._rounding.check(self.param_groups, hypers)
        if columns.params:
            self._update.step(columns, hypers)
        if self._members is not None and self._members.dtensors:
            # The local tensors' versions have risen; autograd saves the DTensors'.
            stepped = zip(self._members.params, columns.grads, strict=True)
            torch.autograd.graph.increment_version([p for p, g in stepped if g is not None])

    def _columns(self) -> StepTensors:
        """This step's columns, prepared. Makes the state that is missing, once nothing is found that cannot be
        stepped."""
        members, new = self._current_members()
        try:
            columns = self._prepare(members)
        except KeyError:  # somebody took a momentum out of the state
            members, new = self._find_members()
            columns = self._prepare(members)
        except (RuntimeError, TypeError, ValueError):
            if all(map(takes_part, members.params)):
                raise
            # A parameter that was frozen after its first steps may have become anything. It keeps its momentum.
            members, new = self._find_members(only_taking_part=True)
            columns = self._prepare(members)
        if new:
            for p, momentum in new.items():
                self.state.setdefault(p, {})["exp_avg"] = momentum
            members.entries = [self.state[p] for p in members.params]
            members.entry_ids = [id(entry) for entry in self.state.values()]
        self._members = members
        return columns

    def _prepare(self, members: Members) -> StepTensors:
        columns = members.columns()
        self._update.prepare(columns)
        return columns

    def init_state(self) -> None:
        """Makes the state that the first step() would make: zeros for every parameter that requires a gradient."""
        self._columns()
        self._update.forget_gradients()

    def _current_members(self) -> tuple[Members, dict[Tensor, Tensor]]:
        members = self._members
        if (
            members is not None
            and members.ids == [list(map(id, group["params"])) for group in self.param_groups]
            and members.entry_ids == list(map(id, self.state.values()))
            and not any(map(takes_part, members.idle))
        ):
            return members, {}
        return self._find_members()

    def _find_members(self, only_taking_part: bool = False) -> tuple[Members, dict[Tensor, Tensor]]:
        """Goes through the groups, and makes the momenta that are missing; the caller puts them in their place.

        Args:
            only_taking_part: leaves out frozen parameters that have a momentum, too.

        Raises:
            TypeError, ValueError: Lion cannot step a parameter that takes part for the first time.
        """
        ids = [list(map(id, group["params"])) for group in self.param_groups]
        params: list[Tensor] = []
        entries, groups, idle = [], [], []
        stateless, dtypes = [], []
        for i, group in enumerate(self.param_groups):
            for p in group["params"]:
                entry = self.state.get(p) or {}
                if not takes_part(p) and (only_taking_part or "exp_avg" not in entry):
                    idle.append(p)
                    continue
                if "exp_avg" not in entry:
                    check_steppable(p, f"parameter {len(params) + len(idle)}")
                    stateless.append(p)
                    dtypes.append(momentum_dtype(p, group))
                params.append(p)
                entries.append(entry)
                groups.append(i)
        new = dict(zip(stateless, new_state(stateless, dtypes), strict=True))
        entries = [{"exp_avg": new[p]} if p in new else entry for p, entry in zip(params, entries, strict=True)]
        dtensors = any(map(is_dtensor, params))
        return Members(ids, params, entries, groups, idle, dtensors, [id(e) for e in self.state.values()]), new

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_use_triton": self._use_triton}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Called by unpickling and deepcopy on an empty object, and by load_state_dict on this one.
        previous = self.__dict__.get("param_groups", [])
        super().__setstate__(state)
        warnings = self.__dict__.get("_rounding")
        complete_loaded_groups(self.param_groups, previous, self.defaults)
        for entry in self.state.values():
            unwrap(entry)
        self._start(self._use_triton)
        self._rounding = warnings or self._rounding  # once an optimizer, however often it loads

    def state_dict(self) -> dict[str, Any]:
        """As of every torch optimizer; ``momentum_dtype`` of a group is written as its name ("float32").

        Of parameters that FSDP or tensor parallelism shards it makes the state that is missing (see `init_state`):
        what is shown of a new optimizer is what torch's checkpoints then load, and no more. So it does for parameters
        of which a wrapper keeps something: `load_state_dict` takes none of those without its ``exp_avg``.

        Under FSDP1 the state_dict has one more key, ``params_in_order_of_names``, by which `load_state_dict` tells it
        from one that has come through torch's own doors, where names may be in the order of another optimizer. Without
        it parameters under FSDP1 are matched by position.
        """
        for p in (p for group in self.param_groups for p in group["params"]):
            entry = self.state.get(p) or {}
            without = bool(entry) and "exp_avg" not in entry and takes_part(p)
            if without or (not entry and (is_flat_view(p) or is_dtensor(p))):
                self.init_state()
                break
        state_dict = with_named_dtypes(super().state_dict())
        if any(is_flat_view(p) for group in self.param_groups for p in group["params"]):
            state_dict[IN_ORDER_OF_NAMES] = True
        return state_dict

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state_dict of `Lion`, of ``lion_pytorch.Lion`` or of
        ``ShardedLion.full_state_dict()``, copying its tensors.

        Parameters are matched by name where both sides have names (``model.named_parameters()``), in whatever order
        layers and groups come; what wrappers such as DistributedDataParallel put into names does not count. Where
        either side has no names (``param_names`` that are not as many strings as parameters are none) they are matched
        by position, as in every torch optimizer, and so are those that torch's own doors hand over, which have put
        them in order. A state_dict whose ``param_names`` are damaged is refused where this optimizer has names.

        Each momentum keeps the dtype it was saved in, unless the group it lands in names a
        ``momentum_dtype``. Of sharded parameters the momenta are those that torch's own doors hand over
        (``set_optimizer_state_dict``, ``FSDP.optim_state_dict_to_load``), sharded alike. Groups take the saved
        hyper-parameters, as in every torch optimizer. Whatever else is in the state is loaded as torch's optimizers
        load it: floating-point parameters' tensors in the dtype of the parameter. A frozen parameter may have become
        anything since its last step; a momentum that does not fit it is kept as it is.

        Raises:
            ValueError, TypeError: the state_dict does not fit this optimizer; nothing has been changed.
        """

        # As the last of the pre-hooks it sees what the others made of the state_dict.
        def take(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            checked = check_and_wrap_state(given, self.param_groups, self.defaults, self.state)
            self._copy_momenta(checked)
            return checked

        check_is_dict(state_dict)
        handle = self.register_load_state_dict_pre_hook(take)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def _copy_momenta(self, checked: dict[str, Any]) -> None:
        """Puts copies in place of a checked state_dict's momenta, as they will lie in the state."""
        entries: list[dict[str, Any]] = []
        params, sources, dtypes = [], [], []
        for group, live in zip(checked["param_groups"], self.param_groups, strict=True):
            for i, p in zip(group["params"], live["params"], strict=True):
                entry = checked["state"].get(i, {})
                if isinstance(entry.get("exp_avg"), Misfit):
                    continue
                if "exp_avg" in entry:
                    m = entry["exp_avg"].value
                    dtype = group["momentum_dtype"] or m.dtype
                    own = self.state.get(p, {}).get("exp_avg")
                    if m is own and m.dtype == dtype and local(m).device == local(p).device:
                        continue  # loaded in place, as lion_dist.checkpoint does
                elif checked["state"] and p.requires_grad and is_flat_view(p) and not p.numel():
                    # FSDP1 hands over nothing for what this rank has nothing of; other ranks have, and so state.
                    m, dtype = p.detach(), momentum_dtype(p, group)
                else:
                    continue
                entries.append(checked["state"].setdefault(i, entry))
                params.append(p)
                sources.append(m)
                dtypes.append(dtype)
        for entry, momentum, m in zip(entries, new_state(params, dtypes), sources, strict=True):
            local(momentum).copy_(local(m))
            entry["exp_avg"] = KeptAsIs(momentum)
