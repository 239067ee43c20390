"""Lion: the local optimizer. It never communicates, and steps every tensor it is given in one launch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from .fsdp import is_dtensor, is_flat_view, local, local_gradients, locals_of, new_momenta
from .param_groups import (
    DecayWarning,
    KeptAsIs,
    check_and_wrap_state,
    check_group,
    check_params,
    complete_group,
    complete_loaded_groups,
    hyper_parameters,
    make_defaults,
    momentum_dtype,
    with_named_dtypes,
)
from .update.dispatch import LionUpdate
from .update.segments import Columns


@dataclass
class Members:
    """What a walk through the groups found, kept for the next step if nothing has changed since.

    ids: of all parameters, by group. params, entries, groups: those that are stepped, their state and
    the number of their group. idle: frozen ones without state. dtensors: whether any of params is one.
    entry_ids: of all state entries.
    """

    ids: list[list[int]]
    params: list[Tensor]
    entries: list[dict[str, Tensor]]
    groups: list[int]
    idle: list[Tensor]
    dtensors: bool
    entry_ids: list[int]

    def columns(self) -> Columns:
        """Of this step; of DTensors, this rank's part."""
        params: list[Tensor] = self.params
        grads: list[Tensor | None] = [p.grad for p in params]
        exp_avgs = [entry["exp_avg"] for entry in self.entries]
        if self.dtensors:
            grads = local_gradients(params, grads)
            params, exp_avgs = locals_of(params), locals_of(exp_avgs)
        return Columns(params, grads, exp_avgs, self.groups)


class Lion(Optimizer):
    """Lion (EvoLved Sign Momentum), a drop-in for ``lion_pytorch.Lion``.

    Elementwise, so it is right wherever each rank steps the elements it holds: one device, DDP, FSDP1, FSDP2,
    tensor parallelism (where DTensor leaves a gradient in other placements than its parameter, the step brings it into
    these by a collective). State: ``exp_avg`` a parameter, in the parameter's shape and sharding, made at the
    first step for every parameter that requires a gradient, whether this rank holds any of it or not. The
    rule is in lion_dist/update/reference.py.

    Under FSDP1 with use_orig_params=False a wrapped module is one parameter, which groups cannot split: its
    gains and biases decay with its matrices.

    Args:
        params: parameters, named parameters or groups; strided float32, bfloat16 or float16.
        lr: learning rate >= 0, 3 to 10 times smaller than AdamW's; a number or a one-element tensor,
            which is read on its device.
        betas: two numbers in [0, 1). (0.95, 0.98) for language models or unstable training.
        weight_decay: decoupled from the gradient and multiplied by lr; 3 to 10 times AdamW's.
        use_triton: None: on GPUs where triton is installed. True: always, or an error. False: never.
            The results are the same bits.
        decoupled_weight_decay: divides weight_decay by the group's initial lr, so that the decay at
            that lr does not depend on it.
        momentum_dtype: dtype of exp_avg; None: the parameter's (float32 for float16 parameters). Under FSDP1
            the same in all groups.
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
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        use_triton: bool | None = None,
        decoupled_weight_decay: bool = False,
        *,
        momentum_dtype: torch.dtype | None = None,
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
        self._decay_warning = DecayWarning()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            complete_group(group, self.defaults)
            check_group(group)
            check_params(group["params"], [p for g in self.param_groups[:-1] for p in g["params"]])
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
        hypers = [hyper_parameters(group) for group in self.param_groups]
        for i, (group, hyper) in enumerate(zip(self.param_groups, hypers, strict=True)):
            self._decay_warning.check(i, group, hyper)
        columns = self._columns()
        if columns.params:
            self._update.step(columns, hypers)
        if self._members is not None and self._members.dtensors:
            # The local tensors' versions have risen; autograd saves the DTensors'.
            stepped = zip(self._members.params, columns.grads, strict=True)
            torch.autograd.graph.increment_version([p for p, g in stepped if g is not None])
        return loss

    def _columns(self) -> Columns:
        ids = [list(map(id, group["params"])) for group in self.param_groups]
        members = self._members
        new: dict[Tensor, dict[str, Tensor]] = {}
        if (
            members is None
            or ids != members.ids
            or list(map(id, self.state.values())) != members.entry_ids
            or not all(members.entries)
            or any(p.requires_grad or p.grad is not None for p in members.idle)
        ):
            members, new = self._find_members(ids)
        columns = members.columns()
        if new:
            self._update.prepare(columns)  # raises for a bad gradient before there is any new state
            self.state.update(new)
            members.entry_ids = [id(entry) for entry in self.state.values()]
        self._members = members
        return columns

    def init_state(self) -> None:
        """Makes the state that the first step() would make: zeros for every parameter that requires a gradient."""
        self._columns()

    def _find_members(self, ids: list[list[int]]) -> tuple[Members, dict[Tensor, dict[str, Tensor]]]:
        """Goes through the groups, and makes the state that is missing; the caller puts it in its place."""
        params, groups, idle = [], [], []
        stateless, dtypes = [], []
        for i, group in enumerate(self.param_groups):
            for p in group["params"]:
                if not self.state.get(p):
                    if not p.requires_grad and p.grad is None:
                        idle.append(p)
                        continue
                    stateless.append(p)
                    dtypes.append(momentum_dtype(p, group))
                params.append(p)
                groups.append(i)
        new = {p: {"exp_avg": m} for p, m in zip(stateless, new_momenta(stateless, dtypes), strict=True)}
        entries = [new[p] if p in new else self.state[p] for p in params]
        dtensors = any(map(is_dtensor, params))
        return Members(ids, params, entries, groups, idle, dtensors, [id(e) for e in self.state.values()]), new

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_use_triton": self._use_triton}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Called by unpickling and deepcopy on an empty object, and by load_state_dict on this one.
        previous = self.__dict__.get("param_groups", [])
        own = {p: entry.get("exp_avg") for p, entry in self.__dict__.get("state", {}).items()}
        super().__setstate__(state)
        warning = self.__dict__.get("_decay_warning")
        complete_loaded_groups(self.param_groups, previous, self.defaults)
        loaded, tensors, dtypes = [], [], []
        for group in self.param_groups:
            for p in group["params"]:
                saved = self.state.get(p, {}).get("exp_avg")
                if isinstance(saved, KeptAsIs):
                    dtype, m = group["momentum_dtype"] or saved.tensor.dtype, saved.tensor
                    if m is own.get(p) and m.dtype == dtype and local(m).device == local(p).device:
                        self.state[p]["exp_avg"] = m  # loaded in place, as lion_dist.checkpoint does
                        continue
                    loaded.append(p)
                    tensors.append(m)
                    dtypes.append(dtype)
                elif self.state and not self.state.get(p) and p.requires_grad and is_flat_view(p) and not p.numel():
                    # FSDP1 hands over nothing for what this rank has nothing of; other ranks have, and so state.
                    loaded.append(p)
                    tensors.append(p.detach())
                    dtypes.append(momentum_dtype(p, group))
        for p, m, tensor in zip(loaded, new_momenta(loaded, dtypes), tensors, strict=True):
            local(m).copy_(local(tensor))
            self.state[p]["exp_avg"] = m
        self._start(self._use_triton)
        self._decay_warning = warning or self._decay_warning  # once an optimizer, however often it loads

    def state_dict(self) -> dict[str, Any]:
        """As of every torch optimizer; ``momentum_dtype`` of a group is written as its name ("float32").

        Of parameters that FSDP or tensor parallelism shards it makes the state that is missing (see `init_state`):
        what is shown of a new optimizer is what torch's checkpoints then load, and no more.
        """
        params = [p for group in self.param_groups for p in group["params"]]
        if any((is_flat_view(p) or is_dtensor(p)) and not self.state.get(p) for p in params):
            self.init_state()
        return with_named_dtypes(super().state_dict())

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state_dict of `Lion`, of ``lion_pytorch.Lion`` or of
        ``ShardedLion.full_state_dict()``, copying its tensors.

        Each momentum keeps the dtype it was saved in, unless the group it lands in names a
        ``momentum_dtype``. Of sharded parameters the momenta are those that torch's own doors hand over
        (``set_optimizer_state_dict``, ``FSDP.optim_state_dict_to_load``), sharded alike. Groups take the saved
        hyper-parameters, as in every torch optimizer.

        Raises:
            ValueError: the state_dict does not fit this optimizer; nothing has been changed.
        """

        # As the last of the pre-hooks it sees what the others made of the state_dict.
        def wrap(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            return check_and_wrap_state(given, self.param_groups)

        handle = self.register_load_state_dict_pre_hook(wrap)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
