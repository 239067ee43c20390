"""Lion: the local optimizer. Its step communicates nothing, and is one launch for all its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from ._torch_compat import disable_dynamo, set_grad_enabled, step_is_watched
from .capture import check_capturable
from .dtensors import is_dtensor
from .frozen import takes_part
from .fsdp import is_flat_view
from .hyper_reader import HyperReader
from .lion_state import as_shown, copy_columns
from .master_weights import NamedTensors, find, put
from .members import Members, find_members
from .param_groups import (
    check_params,
    complete_group,
    complete_loaded_groups,
    count_step,
    make_defaults,
    normalize_group,
    state_columns,
    warn_of_unknown_keys,
)
from .rounding import RoundingWarnings
from .state_dicts import (
    IN_ORDER_OF_NAMES,
    check_and_wrap_state,
    check_is_dict,
    unwrap,
    with_named_dtypes,
)
from .statistics import Groups, KeptSigns, check_arguments, local_statistics
from .update.backends.batch import Prepared
from .update.lion_update import LionUpdate, check_use_triton
from .update.state import REMAINDER
from .upload import is_capturing


@dataclass
class _Kept:
    """The objects that are kept between the steps of one set of parameters.

    Attributes:
        update: steps them.
        members: those of the last step, which hold the parameters; None after `init_state` and `statistics`.
    """

    update: LionUpdate
    members: Members | None = None


class Lion(Optimizer):
    """Lion (EvoLved Sign Momentum), a drop-in for ``lion_pytorch.Lion``.

    The rule is elementwise, so it is correct wherever each rank steps the elements it holds: on one device, and under
    DDP, FSDP1, FSDP2 and tensor parallelism. (If DTensor leaves a gradient in other placements than its parameter's,
    the step redistributes it, which is a collective.) lion_dist/update/reference.py defines the rule.

    State: each parameter has an ``exp_avg`` in its own shape and sharding. The first step makes it for every parameter
    that requires a gradient, even if this rank holds no element of it. Entries that wrappers add to ``state``, also
    under keys that are not parameters, are kept, saved and loaded.

    ``torch.compile`` of a function that calls step() breaks the graph there; ``fullgraph=True`` raises, as it does for
    torch's own optimizers. Nothing is lost: a step is one kernel launch, and on the CPU it compiles itself.

    Under FSDP1 with use_orig_params=False a wrapped module is one parameter, which groups cannot split, so its gains
    and biases decay like its matrices.

    Args:
        params: parameters, named parameters or groups; strided float32, bfloat16 or float16. Frozen parameters without
            a gradient may have any layout and dtype (a quantised base under adapters), until they are unfrozen.
        lr: learning rate >= 0, smaller than AdamW's (`from_adamw`); a number or one-element tensor, read on its device.
        betas: two numbers in [0, 1), as any iterable. (0.95, 0.98) for language models or unstable training.
        weight_decay: decoupled from the gradient and multiplied by lr; larger than AdamW's (`from_adamw`).
        use_triton: None: on GPUs where triton is installed. True: always, or an error. False: never.
            The results are the same bits.
        decoupled_weight_decay: divides weight_decay by the constructor's lr, in every group, as lion-pytorch does:
            at that lr the decay does not depend on it. Groups keep that lr as ``init_lr``, and a load takes the one of
            the state_dict.
        momentum_dtype: dtype of exp_avg, or its name ("bfloat16"); None: the parameter's (float32 for float16
            parameters). Under FSDP1 the same in all groups. int8: 8-bit codes and a float32 ``exp_avg_scale`` for each
            128 elements, rounded stochastically (lion_dist/update/codecs.py).
        master_weights: keeps an int16 ``remainder`` for each bfloat16 parameter. Both together are a float32 weight,
            which the rule runs on; the parameter is that weight rounded to nearest, halves away from zero. float32
            parameters need none.
        maximize: ascend instead of descend.

    Raises:
        ValueError, TypeError: a hyper-parameter or parameter cannot be used. step() raises them if a gradient cannot be
            used, before it changes anything.

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
        master_weights: bool = False,
        maximize: bool = False,
    ) -> None:
        self._start(use_triton)
        defaults = make_defaults(
            lr, betas, weight_decay, decoupled_weight_decay, momentum_dtype, master_weights, maximize
        )
        super().__init__(params, defaults)

    # Hooks for subclasses (deepspeed.py), which may override these two: part of Lion's interface for those, and not for
    # its users. Lion's other names with an underscore are internal.

    # Whether ``param_groups`` holds other parameters from step to step, in turn. Then tables are kept for each set of
    # parameters, with the parameters themselves, until the next load; otherwise only for the last set.
    _swaps_params = False

    def _adopt_state(self) -> None:
        """Hook for subclasses, called before groups and state are read for a step, for `init_state` or for a
        state_dict that needs it. An override may convert entries that other code has put there to the form that Lion
        steps. `Lion` does nothing here."""

    def _start(self, use_triton: bool | None) -> None:
        """Makes everything that is not state: in the constructor, and anew by unpickling, deepcopy and load."""
        check_use_triton(use_triton)
        self._use_triton = use_triton
        # By ids of all parameters with ``_swaps_params``, else under (). Only sets whose members were found are here,
        # and these hold the parameters, so that no other objects get their ids.
        self._kept: dict[tuple[int, ...], _Kept] = {}
        self._hypers = HyperReader()
        self._rounding = RoundingWarnings()
        self._kept_signs = KeptSigns()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            complete_group(group, self.defaults)
            normalize_group(group)
            check_params(group["params"], [p for g in self.param_groups[:-1] for p in g["params"]])
            for p in group["params"]:
                state_columns(p, group)
            warn_of_unknown_keys(group, self.param_groups[:-1])
        except Exception:
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of every parameter whose ``grad`` is not None.

        Args:
            closure: re-evaluates the model and returns the loss; called with gradients enabled.

        Returns:
            The closure's loss, or None.
        """
        if torch.compiler.is_compiling() or step_is_watched(self):
            return self._watched_step(closure)
        return self._closure_and_step(closure)

    step.hooked = True  # type: ignore[attr-defined]  # torch would wrap it otherwise

    def _closure_and_step(self, closure: Callable[[], float] | None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        enabled = torch.is_grad_enabled()
        set_grad_enabled(False)
        try:
            self._step()
        finally:
            set_grad_enabled(enabled)
        return loss

    _watched_step = Optimizer.profile_hook_step(_closure_and_step)  # what torch's wrapper makes of it

    @disable_dynamo
    def _step(self) -> None:
        hypers = self._hypers.read(self.param_groups)
        capturing = is_capturing()
        if capturing:
            self._check_capturable()
        kept, members, prepared = self._prepare()
        if not capturing:  # the host waits for weights and lr tensors
            self._rounding.check(self.param_groups, hypers)
        if members.params:
            kept.update.step(prepared, hypers)
        count_step(self.param_groups)
        if members.dtensors:
            # The local tensors' versions have risen; autograd saves the DTensors'.
            params = members.params
            if not prepared.complete:
                params = [p for p, g in zip(params, prepared.grads, strict=True) if g is not None]
            torch.autograd.graph.increment_version(params)

    def _ids(self) -> tuple[int, ...]:
        """The key in ``_kept`` of the present parameters."""
        return tuple(id(p) for group in self.param_groups for p in group["params"]) if self._swaps_params else ()

    def _check_capturable(self) -> None:
        """Raises RuntimeError or ValueError where a CUDA graph cannot capture this step. Nothing has been changed."""
        kept = self._kept.get(self._ids())
        if kept is None or kept.members is None or not kept.members.hold(self.param_groups, self.state):
            check_capturable(None, self.param_groups, [])
        else:
            check_capturable(kept.members, self.param_groups, kept.update.absent)

    def _prepare(self) -> tuple[_Kept, Members, Prepared]:
        """Prepares the tensors of this step. Makes state that is missing, once nothing is found that cannot be
        stepped."""
        self._adopt_state()
        ids = self._ids()
        kept = self._kept.get(ids) or _Kept(LionUpdate(self._use_triton))
        members, new = self._current_members(kept.members)
        try:
            prepared = kept.update.prepare(members.tensors())
        except KeyError:  # other code took a tensor out of the state
            members, new = find_members(self.param_groups, self.state)
            prepared = kept.update.prepare(members.tensors())
        except (RuntimeError, TypeError, ValueError):
            if all(map(takes_part, members.params)):
                raise
            # A parameter that was frozen after its first steps may have become anything. It keeps its state.
            members, new = find_members(self.param_groups, self.state, only_taking_part=True)
            prepared = kept.update.prepare(members.tensors())
        if new:
            for p, made in new.items():
                self.state.setdefault(p, {}).update(made)
            members.states = [self.state[p] for p in members.params]
            members.entries = list(self.state.values())
        kept.members = members
        self._kept[ids] = kept
        return kept, members, prepared

    def init_state(self) -> None:
        """Makes the state that the first step() would make: zeros for every parameter that requires a gradient."""
        self._prepare()[0].members = None  # those of the last step, as `_check_capturable` relies on

    @disable_dynamo
    @torch.inference_mode(False)  # tensors that are made in it could never be stepped outside
    @torch.no_grad()
    def statistics(self, by: str = "group", *, flips: bool = False, process_groups: Groups = ()) -> dict[str, float]:
        """Numbers that describe the next step(). It changes nothing; the host waits.

        Call it just before step(), when the gradients are complete and clipped. For each name, and ``global`` for all:

        - ``l2_norm/param/<name>``, ``l2_norm/moment/<name>``: weights (master weights, if kept) and momenta, before.
        - ``l2_norm/grad/<name>``: gradients as step() uses them, after clipping.
        - ``l2_norm/update/<name>``: what step() adds to the weights, with decay and rounding.
        - ``sign/zero/<name>``: fraction of elements whose update has the sign 0.
        - ``sign/agree/<name>``: fraction of elements that move against their gradient (with it under ``maximize``).
        - ``sign/flipped/<name>``: fraction of elements with the opposite sign of the last call, both with ``flips``.

        A parameter without a gradient is not stepped: its gradient, update and signs count as 0. Frozen ones that were
        never stepped are left out. Each element counts once: DTensors are summed over their meshes by collective calls,
        plain tensors count as they are here. Norms are of sums in float64, without units.

        Args:
            by: "group", by ``name`` where each group has one of its own, else ``group0``, ``group1``, ...; or
                "parameter", by its name, or its number if the optimizer has no names. A name "global" counts as none.
            flips: keeps the signs, 2 bits an element, until a call without it. For adjacent steps, call it before both.
            process_groups: as for `lion_dist.clip_grad_norm_`; the ranks must give the same names.

        Raises:
            ValueError, TypeError: an argument or gradient cannot be used, or names differ within ``process_groups``.
            RuntimeError: a CUDA graph is being captured.
        """
        check_arguments(by, flips)
        groups, hypers = self.param_groups, self._hypers.read(self.param_groups)
        kept, members, prepared = self._prepare()
        kept.members = None  # as in `init_state`
        return local_statistics(members, prepared, groups, hypers, self._kept_signs, by, flips, process_groups)

    def _current_members(self, members: Members | None) -> tuple[Members, dict[Tensor, dict[str, Tensor]]]:
        if members is not None and members.hold(self.param_groups, self.state):
            return members, {}
        return find_members(self.param_groups, self.state)

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
        self._rounding = warnings or self._rounding  # each warning once for an optimizer, even if it loads again

    def state_dict(self) -> dict[str, Any]:
        """Returns the state_dict that every torch optimizer has. A group's ``momentum_dtype`` is its name ("float32").

        Of parameters that FSDP or tensor parallelism shards, 8-bit momenta and remainders are shown as float32, which
        torch can gather and reshard, and such a momentum has one ``exp_avg_scale`` of 1.

        For parameters that FSDP or tensor parallelism shards, it first makes missing state (see `init_state`), because
        torch's checkpoints load only the entries that the optimizer's state_dict already shows. It does the same for
        parameters for which a wrapper keeps entries, because `load_state_dict` refuses those without an ``exp_avg``.

        Under FSDP1 the state_dict has one more key, ``params_in_order_of_names``. It is missing from state_dicts that
        torch's own functions have converted, in which names may be in the order of another optimizer. Without the key
        `load_state_dict` matches parameters under FSDP1 by position.
        """
        if any(self._shows_state(p, group) for group in self.param_groups for p in group["params"]):
            self.init_state()
        state_dict = as_shown(with_named_dtypes(super().state_dict()), self.param_groups)
        if any(is_flat_view(p) for group in self.param_groups for p in group["params"]):
            state_dict[IN_ORDER_OF_NAMES] = True
        return state_dict

    def _shows_state(self, p: Tensor, group: dict[str, Any]) -> bool:
        """Whether a state_dict needs state of p that is still missing."""
        entry = self.state.get(p)
        if not entry:
            return is_flat_view(p) or is_dtensor(p)
        return takes_part(p) and any(column.name not in entry for column in state_columns(p, group))

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state_dict of `Lion`, of ``lion_pytorch.Lion`` or of
        ``ShardedLion.full_state_dict()``, copying its tensors.

        Parameters are matched by name if both sides have names (``model.named_parameters()``), whatever the order of
        layers and groups. Parts of a name that wrappers such as DistributedDataParallel add are ignored. If either side
        has no names, parameters are matched by position, as in every torch optimizer. (``param_names`` count as none
        unless they are as many strings as there are parameters.) State_dicts that torch's own functions have converted
        are matched by position too, since those functions have put the parameters in order. A state_dict whose
        ``param_names`` are damaged is refused if this optimizer has names.

        Each momentum keeps the dtype it was saved in, unless its group has a ``momentum_dtype``. Where either the saved
        group or this optimizer's has 8-bit momenta, and not both, this optimizer's ``momentum_dtype`` stays, and
        momenta are converted. ``master_weights`` stays, too: missing remainders are zeros. Momenta of sharded
        parameters must be sharded like these, as torch's own functions return them (``set_optimizer_state_dict``,
        ``FSDP.optim_state_dict_to_load``). Groups take the saved hyper-parameters, as in every torch optimizer. Other
        entries of the state are loaded as torch's optimizers load them: tensors of a floating-point parameter in its
        dtype. A momentum that does not fit a frozen parameter, which may have changed, is kept unchanged.

        Raises:
            ValueError, TypeError: the state_dict does not fit this optimizer; nothing has been changed.
        """

        # As the last of the pre-hooks it sees what the others made of the state_dict.
        def take(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            checked = check_and_wrap_state(given, self.param_groups, self.defaults, self.state)
            copy_columns(checked, self.param_groups, self.state)
            return checked

        check_is_dict(state_dict)
        handle = self.register_load_state_dict_pre_hook(take)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    @torch.no_grad()
    def take_master_weights(self, named: NamedTensors) -> None:
        """Sets parameters, and the remainders of those that have master weights, to float32 weights.

        So a model that was converted to bfloat16 goes on with all bits of the float32 weights::

            weights = {name: p.detach().clone() for name, p in model.named_parameters()}
            model.bfloat16()
            optimizer = Lion(model.named_parameters(), master_weights=True)
            optimizer.take_master_weights(weights)

        Args:
            named: names and float32 tensors, as pairs or a mapping. Names are those of the optimizer's parameters,
                which must have been given with names; what wrappers such as DDP add to a name is ignored. Tensors have
                the shapes of the parameters and, where these are sharded, their sharding; a plain tensor for a DTensor
                is cut. Parameters that are not listed stay as they are. A frozen parameter that was never stepped
                has no remainder: it is rounded.

        Raises:
            ValueError, TypeError: the optimizer has no names, or a name, shape, sharding or dtype does not fit; nothing
                has been changed.
        """
        found = find(self.param_groups, self.state, named)
        self.init_state()
        put(found, lambda p: self.state[p][REMAINDER])
