"""Every private name of torch that lion_dist uses, except those of torch.distributed (_torch_compat_distributed.py).

No other file of the library names one, so this is the file to read when a new version of torch breaks something. Each
name says what it is for and what breaks without it. tests/unit/test_torch_compat.py calls each of them, and
test_private_names.py checks that the rest of the library uses no private name of torch. Names are plain aliases
wherever that is possible: some are called for every parameter of every step, where one more Python frame would be
measurable.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
from torch._C._dynamo.guards import TensorGuards
from torch._compile import _disable_dynamo
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils import _pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = [
    "ATEN_TO_COPY", "EXTRA_STATE", "FSDP_FLATTENED", "LAST_LR", "LOCAL_TENSOR", "SPEC", "WRAPPER_PREFIXES",
    "DisableTorchFunctionSubclass", "amp_unscale_", "current_autograd_node", "current_graph_task_id",
    "current_raw_stream", "data_getter", "disable_dynamo", "foreach_add_", "foreach_copy_", "foreach_div_",
    "foreach_mul_", "foreach_norm", "foreach_zero_", "in_compiled_autograd",
    "is_traceable_wrapper_subclass", "load_state_dict_post_hooks", "load_state_dict_pre_hooks", "make_wrapper_subclass",
    "never_compiled", "non_persistent_buffers", "post_accumulate_grad_hooks", "profiler_enabled",
    "queue_backward_callback", "recompile_limit", "register_pytree_node", "set_grad_enabled", "state_dict_pre_hooks",
    "step_is_watched", "tensors_alike", "value_like_param", "version_of",
]  # fmt: skip

_Function = TypeVar("_Function", bound=Callable[..., Any])

# torch.compile --------------------------------------------------------------------------------------

# Decorator: torch.compile runs the function as it is and compiles around it. torch.compiler.disable does the same, but
# importing lion_dist would then import all of Dynamo, which takes more than a second.
disable_dynamo = _disable_dynamo


def never_compiled(function: _Function) -> _Function:
    """Decorator: torch.compile leaves calls of the function alone, and what it calls.

    `disable_dynamo` does the same with two Python frames more, which take 4 us for each parameter in every backward of
    stage 2. This one marks the function's code, so it has no effect where Dynamo traces the caller and inlines the
    function: use it for functions that C++ calls.
    """
    set_code_exec_strategy(function.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))
    return function


def recompile_limit(limit: int) -> AbstractContextManager[None]:
    """Context manager that sets how many graphs torch.compile makes of one function.

    Without it the CPU step falls back to plain torch at its ninth graph: each mix of dtypes and number of threads has
    one. There is no public setting.
    """
    return torch._dynamo.config.patch(recompile_limit=limit)  # type: ignore[no-any-return]


def in_compiled_autograd() -> bool:
    """Whether a backward runs under compiled autograd, which never calls the callbacks that stage 2 depends on.

    Without it stage 2 would silently reduce nothing there, instead of raising.
    """
    compiled_autograd = sys.modules.get("torch._dynamo.compiled_autograd")  # importing it would import Dynamo
    return compiled_autograd is not None and bool(compiled_autograd.in_compiled_autograd_region)


# The autograd engine --------------------------------------------------------------------------------

# Calls a function without arguments when the running backward ends. DDP and FSDP use it too. Stage 2 launches the
# remaining reductions there.
queue_backward_callback: Callable[[Callable[[], None]], None] = torch.autograd.Variable._execution_engine.queue_callback

# Number of the running backward, -1 outside of any. It tells nested and consecutive backwards apart.
current_graph_task_id: Callable[[], int] = torch._C._current_graph_task_id

# The autograd node that is being executed, or None. It tells whether a backward runs inside another one (reentrant
# activation checkpointing).
current_autograd_node: Callable[[], Any] = torch._C._current_autograd_node

# Turns gradients on or off for this thread. torch.no_grad() makes three objects to the same end, which takes 5 us of a
# step.
set_grad_enabled: Callable[[bool], None] = torch._C._set_grad_enabled

# How often a tensor has been changed in place. Stage 2 and clipping notice by it that a gradient has been changed.
version_of: Callable[[Tensor], int] = attrgetter("_version")


def post_accumulate_grad_hooks(p: Tensor) -> list[Callable[[Tensor], None]]:
    """The hooks that register_post_accumulate_grad_hook has put on a parameter.

    A second ShardedLion over the same parameters finds the first one's hooks by it, and takes the parameters over.
    """
    return list((getattr(p, "_post_accumulate_grad_hooks", None) or {}).values())


# Tensors --------------------------------------------------------------------------------------------

# In-place operations on lists of tensors: one kernel where a loop would launch one for each tensor.
foreach_add_: Callable[..., None] = torch._foreach_add_
foreach_copy_: Callable[..., None] = torch._foreach_copy_
foreach_div_: Callable[..., None] = torch._foreach_div_
foreach_mul_: Callable[..., None] = torch._foreach_mul_
foreach_norm: Callable[..., tuple[Tensor, ...]] = torch._foreach_norm
foreach_zero_: Callable[..., None] = torch._foreach_zero_


def tensors_alike(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """A function that tells whether as many tensors are like these, in this order, in one call that runs in C++.

    It compares type, dispatch keys, dtype, device, requires_grad, shape and strides, and keeps no reference to the
    tensors. It is False for a None, for a tensor without strides, and where two of the tensors are one object.
    torch.compile guards its graphs by it. In Python three loops would take nearly three times as long in each step.
    """
    return TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check


# The current stream of a GPU, by the GPU's index, as a number. torch.cuda.current_stream() makes an object of it, which
# takes 5 us in every step. A build of torch for CPUs has no such function.
current_raw_stream: Callable[[int | None], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)

# The function that GradScaler.unscale_ calls. The placeholder for gradients that have been reduced raises an error when
# it is passed to this function, which would not reach the reduced gradients.
amp_unscale_: Callable[..., None] = torch._amp_foreach_non_finite_check_and_unscale_

# The function that __torch_function__ receives when code reads ``t.data``. Compare with ==: each access makes a new
# object.
data_getter: Callable[..., Tensor] = Tensor.data.__get__  # type: ignore[attr-defined]

# Context manager under which a tensor subclass's __torch_function__ is not called: it calls the function itself.
DisableTorchFunctionSubclass: Callable[[], AbstractContextManager[None]] = torch._C.DisableTorchFunctionSubclass

# Makes a tensor subclass that has a shape, a dtype and a device but no memory of its own. BoxTensor is one.
make_wrapper_subclass: Callable[..., Any] = Tensor._make_wrapper_subclass

# The operator behind ``t.to(...)``, which BoxTensor implements for its parts.
ATEN_TO_COPY: Any = torch.ops.aten._to_copy.default

# Names of two attributes of a DTensor: this rank's plain tensor, and mesh, placements, shape and dtype as one object.
# The optimizer reads them in each step. The public `to_local()` takes 20 us a tensor, since it is an autograd function.
LOCAL_TENSOR, SPEC = "_local_tensor", "_spec"

# Makes tree_map and the like walk a kind of container: (type, flatten, unflatten). Without it they would pass by the
# entries of ShardedLion's state in silence. There is no public module of these functions.
register_pytree_node: Callable[..., None] = _pytree.register_pytree_node

# Name of the attribute by which FSDP1 marks flat parameters and the views that stand for the original parameters.
FSDP_FLATTENED = "_fsdp_flattened"

# Modules and optimizers -----------------------------------------------------------------------------

# Names of the buffers of a module that its state_dict leaves out; a checkpoint leaves them out too.
non_persistent_buffers: Callable[[nn.Module], set[str]] = attrgetter("_non_persistent_buffers_set")

# Last part of the key under which a module's state_dict holds what get_extra_state() returned.
EXTRA_STATE = "_extra_state"

# Names of the attributes in which torch.compile, FSDP1 and activation checkpointing keep the module that they wrap.
# A parameter's name contains them if it was taken from the wrapped model.
WRAPPER_PREFIXES = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})

# The entry of a scheduler's state_dict that holds the current lr of each parameter group.
LAST_LR = "_last_lr"

# The hooks that run before state_dict, which may make it whole.
state_dict_pre_hooks: Callable[[Optimizer], dict[int, Callable[..., Any]]] = attrgetter(
    "_optimizer_state_dict_pre_hooks"
)

# The hooks that run before and after load_state_dict, by handle number. ShardedLion runs the post hooks itself, since
# torch would run them before the momenta are loaded; a load of a checkpoint asks whether there are any.
load_state_dict_pre_hooks: Callable[[Optimizer], dict[int, Callable[..., Any]]] = attrgetter(
    "_optimizer_load_state_dict_pre_hooks"
)
load_state_dict_post_hooks: Callable[[Optimizer], dict[int, Callable[..., Any]]] = attrgetter(
    "_optimizer_load_state_dict_post_hooks"
)

# Whether a profiler records.
profiler_enabled: Callable[[], bool] = torch._C._autograd._profiler_enabled


def step_is_watched(optimizer: Optimizer) -> bool:
    """Whether somebody would notice that step() skips the wrapper which torch puts around it: a profiler, which the
    wrapper gives a label for the step, or hooks.

    The wrapper takes 10 to 20 us in each step, most of it for the label.
    """
    return bool(
        profiler_enabled()
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
    )


# Moves a loaded entry of the state to the device and dtype that torch's load_state_dict would give it:
# (parameter, value, parameter's index, groups, key) -> value. Without it, entries that users keep in the state would be
# loaded differently than by torch's optimizers.
value_like_param: Callable[..., Any] = Optimizer._process_value_according_to_param_policy
