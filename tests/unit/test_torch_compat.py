"""Each private name of torch that the library uses works. test_private_names.py looks for them in the sources."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lion_dist import _torch_compat as compat
from lion_dist import _torch_compat_distributed as compat_distributed


def test_dynamo() -> None:
    def breaks(t: Tensor) -> Tensor:
        return t if torch.compiler.is_compiling() else t + 1

    compiled = torch.compile(compat.disable_dynamo(breaks), backend="eager")
    assert compiled(torch.zeros(1)) == 1
    assert not compat.in_compiled_autograd()
    for decorate in (lambda f: f, compat.never_compiled):
        p, seen = torch.ones(1, requires_grad=True), list[bool]()
        p.register_post_accumulate_grad_hook(decorate(lambda p, seen=seen: seen.append(torch.compiler.is_compiling())))
        torch.compile(lambda p: p.sum().backward(), backend="eager")(p)
        assert seen == [decorate is not compat.never_compiled]


def test_compiled_autograd_is_noticed() -> None:
    seen = []
    p = torch.ones(2, requires_grad=True)
    p.register_hook(lambda _: seen.append(compat.in_compiled_autograd()))
    with torch._dynamo.config.patch(compiled_autograd=True):

        @torch.compile(backend="eager")
        def backward() -> None:
            (p * 2).sum().backward()

        backward()
    p.grad = None
    (p * 2).sum().backward()
    assert seen[-1] is False
    assert True in seen


def test_the_autograd_engine() -> None:
    seen: list[object] = []
    p = torch.ones(2, requires_grad=True)
    assert compat.post_accumulate_grad_hooks(p) == []

    def hook(_: Tensor) -> None:
        seen.append(compat.current_graph_task_id() >= 0)
        seen.append(compat.current_autograd_node() is not None)
        compat.queue_backward_callback(lambda: seen.append(("ended", compat.current_autograd_node())))

    p.register_post_accumulate_grad_hook(hook)
    assert compat.post_accumulate_grad_hooks(p) == [hook]
    assert compat.current_graph_task_id() == -1
    assert compat.current_autograd_node() is None
    (p * 2).sum().backward()
    assert seen == [True, True, ("ended", None)]
    with torch.enable_grad():
        compat.set_grad_enabled(False)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_tensors() -> None:
    t = torch.ones(3)
    assert compat.version_of(t) == 0
    compat.foreach_add_([t], [t])
    compat.foreach_div_([t], 4)
    assert t.tolist() == [0.5] * 3
    assert compat.version_of(t) == 2
    compat.foreach_copy_([t], [torch.arange(3.0)])
    assert t.tolist() == [0, 1, 2]
    compat.foreach_mul_([t], torch.tensor(2.0))
    assert t.tolist() == [0, 2, 4]
    (norm,) = compat.foreach_norm([t], 2, dtype=torch.float64)
    assert norm.item() == 20**0.5
    compat.foreach_zero_([t])
    assert t.tolist() == [0, 0, 0]


def test_tensors_alike() -> None:
    """It compares everything but addresses and values, and keeps no tensor."""
    p, g = nn.Parameter(torch.zeros(3, 3)), torch.zeros(4)
    alike = compat.tensors_alike([p, g])
    with torch.no_grad():
        assert alike(nn.Parameter(torch.ones(3, 3)), torch.ones(4))
    for other in (
        None, torch.zeros(5), torch.zeros(8)[::2], torch.zeros(2, 2), torch.zeros(4, dtype=torch.bfloat16),
        torch.zeros(4, device="meta"), torch.zeros(4).to_sparse(), nn.Parameter(g),
    ):  # fmt: skip
        assert not alike(p, other)
    assert not alike(p.detach(), g)
    assert not compat.tensors_alike([g, g])(g, g)
    kept, freed = compat.tensors_alike([t := torch.zeros(4)]), weakref.ref(t)
    del t
    assert freed() is None
    assert kept(torch.ones(4))


def test_operators_that_reach_a_tensor_subclass() -> None:
    seen = []

    class Watched(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append("amp" if func is compat.amp_unscale_ else "data" if func == compat.data_getter else "other")
            with compat.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))

    watched = torch.ones(1).as_subclass(Watched)
    assert watched.data == 1
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    p = nn.Parameter(torch.ones(1))
    optimizer = SGD([p])
    scaler.scale(p.sum()).backward()
    p.grad = torch.ones(1).as_subclass(Watched)
    scaler.unscale_(optimizer)
    assert seen[0] == "data"
    assert "amp" in seen


def test_wrapper_subclass() -> None:
    class Wrapper(Tensor):
        seen: ClassVar[list[object]] = []

        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
            cls.seen.append(func)
            return torch.zeros(2)

    wrapper = compat.make_wrapper_subclass(Wrapper, (5,), dtype=torch.bfloat16, device="cpu")
    assert (wrapper.shape, wrapper.dtype) == ((5,), torch.bfloat16)
    wrapper.to(torch.float32)
    assert Wrapper.seen == [compat.ATEN_TO_COPY]
    assert not compat.is_traceable_wrapper_subclass(wrapper)  # it has no __tensor_flatten__


class WithExtraState(nn.Linear):
    def get_extra_state(self) -> str:
        return "extra"


class Box:
    def __init__(self, inside: Any) -> None:
        self.inside = inside


def test_pytree() -> None:
    from torch.utils._pytree import tree_map

    compat.register_pytree_node(Box, lambda box: ([box.inside], None), lambda values, _: Box(*values))
    assert tree_map(str, {"a": Box((1, 2))})["a"].inside == ("1", "2")


def test_modules() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    module = WithExtraState(2, 2)
    module.register_buffer("fleeting", torch.zeros(1), persistent=False)
    module.register_buffer("lasting", torch.zeros(1))
    assert compat.non_persistent_buffers(module) == {"fleeting"}
    assert compat.EXTRA_STATE in module.state_dict()

    wrapped: Any = torch.compile(nn.Sequential(checkpoint_wrapper(module)))
    for name, _ in wrapped.named_parameters():
        assert next(part for part in name.split(".") if part not in compat.WRAPPER_PREFIXES) == "0"
        assert compat.WRAPPER_PREFIXES & set(name.split("."))
        assert compat_distributed.unwrapped_names(wrapped, name) == {f"0.{name.rsplit('.', 1)[-1]}"}
    assert compat_distributed.unwrapped_names(module, compat.EXTRA_STATE) == {compat.EXTRA_STATE}


def test_who_watches_a_step() -> None:
    opt = SGD([torch.zeros(1)])

    def hook(*_: Any) -> None: ...

    assert not compat.step_is_watched(opt)
    for register in (
        opt.register_step_pre_hook, opt.register_step_post_hook, register_optimizer_step_pre_hook,
        register_optimizer_step_post_hook,
    ):  # fmt: skip
        handle = register(hook)
        assert compat.step_is_watched(opt)
        handle.remove()
        assert not compat.step_is_watched(opt)
    with torch.autograd.profiler.profile():
        assert compat.profiler_enabled()
        assert compat.step_is_watched(opt)


def test_optimizers() -> None:
    p = nn.Parameter(torch.ones(1))
    optimizer = SGD([p], lr=0.5)
    pre, post = (lambda *_: None), (lambda *_: None)
    assert not compat.load_state_dict_pre_hooks(optimizer)
    assert not compat.load_state_dict_post_hooks(optimizer)
    optimizer.register_load_state_dict_pre_hook(pre)
    optimizer.register_load_state_dict_post_hook(post)
    assert list(compat.load_state_dict_pre_hooks(optimizer).values()) == [pre]
    assert list(compat.load_state_dict_post_hooks(optimizer).values()) == [post]
    assert not compat.state_dict_pre_hooks(optimizer)
    optimizer.register_state_dict_pre_hook(pre)
    assert list(compat.state_dict_pre_hooks(optimizer).values()) == [pre]

    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    assert scheduler.state_dict()[compat.LAST_LR] == [0.5]

    groups = copy.deepcopy(optimizer.state_dict()["param_groups"])
    moved = compat.value_like_param(p, torch.ones(1, dtype=torch.float64), 0, groups, "momentum_buffer")
    assert moved.dtype == torch.float32


@pytest.fixture
def group(tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    """The process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1,
                            timeout=timedelta(seconds=67))  # fmt: skip
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    if dist.is_initialized():
        dist.destroy_process_group()


def test_process_groups(group: dist.ProcessGroup) -> None:
    assert compat_distributed.backend_name(group, torch.device("cpu")) == "gloo"
    assert "cpu" in {torch.device(d).type for d in compat_distributed.group_devices(group)}
    assert timedelta(seconds=67) in compat_distributed.backend_timeouts(group)
    assert compat_distributed.is_known_group(group)
    store = compat_distributed.process_group_store(group)
    store.set("key", "value")
    assert store.get("key") == b"value"

    whole, part = torch.zeros(3), torch.arange(3.0)
    options = compat_distributed.AllgatherOptions()
    options.asyncOp = True
    compat_distributed.all_gather_coalesced(group, [whole], [part], options).wait()
    assert whole.equal(part)
    compat_distributed.all_gather_single(whole.zero_(), part, group=group, async_op=True).wait()
    assert whole.equal(part)
    reduce = dist.ReduceScatterOptions()
    reduce.asyncOp = True
    compat_distributed.reduce_scatter_coalesced(group, [whole.zero_()], [part], reduce).wait()
    assert whole.equal(part)

    steps = compat_distributed.rank_steps(group)
    assert steps.all_gather("step", lambda: 7) == [7]
    assert compat_distributed.rank_steps(None).get_world_size() == 1
    dist.destroy_process_group()
    assert not compat_distributed.is_known_group(group)


def test_dtensors(group: dist.ProcessGroup) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    t = distribute_tensor(torch.arange(6.0).view(3, 2), init_device_mesh("cpu", (1,)), [Shard(0)])
    assert compat.is_traceable_wrapper_subclass(t)
    assert getattr(t, compat.LOCAL_TENSOR).equal(torch.arange(6.0).view(3, 2))
    spec = getattr(t, compat.SPEC)
    assert (spec.mesh, spec.placements) == (t.device_mesh, t.placements)
    assert compat_distributed.dtensor_offset(t) == (0, 0)


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1(group: dist.ProcessGroup, use_orig_params: bool) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FullyShardedDataParallel(
            nn.Linear(3, 2),
            use_orig_params=use_orig_params,
            device_id=torch.device("cpu"),
            sharding_strategy=ShardingStrategy.FULL_SHARD,
        )
    compat_distributed.drop_gathered_flat_param(model)  # before the first forward there is nothing to drop
    assert all(getattr(p, compat.FSDP_FLATTENED) for p in model.parameters())
    if not use_orig_params:
        with pytest.raises(ValueError, match="use_orig_params=True"):
            list(compat_distributed.flat_param_slices(model))
        return
    assert any(compat.WRAPPER_PREFIXES & set(name.split(".")) for name, _ in model.named_parameters())
    slices = list(compat_distributed.flat_param_slices(model))
    assert [
        (p is q, tuple(shape), start) for (p, shape, _, start), q in zip(slices, model.parameters(), strict=True)
    ] == [
        (True, (2, 3), 0),
        (True, (2,), 0),
    ]
    with torch.no_grad():
        model(torch.ones(1, 3))
    compat_distributed.drop_gathered_flat_param(model)
