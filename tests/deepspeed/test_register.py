"""register() and unregister(), and what a config may say of the optimizer."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lion_dist
from lion_dist import Lion
from lion_dist.deepspeed import DeepSpeedLion, arguments, register, registered, unregister
from lion_dist.update.dispatch import LionUpdate
from tests.bits import assert_same_bits
from tests.harness import run_ranks
from tests.marks import needs_interpreter, skip_module_without

from .common import Model, engine_of, make_config, start_deepspeed, weights

skip_module_without("deepspeed")

BF16 = torch.bfloat16

REPLACED = ("_configure_basic_optimizer", "_configure_fp16_optimizer")


def insides() -> tuple[Any, ...]:
    """What register() changes."""
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    return (*(vars(DeepSpeedEngine)[name] for name in REPLACED), tuple(ZERO_SUPPORTED_OPTIMIZERS))


@pytest.fixture
def stock() -> Iterator[tuple[Any, ...]]:
    before = insides()
    yield before
    unregister()
    assert insides() == before


def test_importing_lion_dist_imports_no_deepspeed() -> None:
    code = "import sys, lion_dist.deepspeed; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_register_is_idempotent_and_reversible(stock: tuple[Any, ...]) -> None:
    unregister()
    assert insides() == stock
    register()
    ours = insides()
    assert [a is b for a, b in zip(ours[:2], stock[:2], strict=True)] == [False, False]
    assert ours[2] == (*stock[2], DeepSpeedLion)
    register()
    assert insides() == ours
    unregister()
    assert insides() == stock
    unregister()
    assert insides() == stock


def test_registered_leaves_things_as_they_were(stock: tuple[Any, ...]) -> None:
    with registered():
        assert insides() != stock
        with registered():
            pass
        assert insides() != stock
    assert insides() == stock
    register()
    with registered():
        pass
    assert insides() != stock

    @registered()
    def training() -> bool:
        return insides() != stock

    unregister()
    assert training()
    assert insides() == stock
    with pytest.raises(ZeroDivisionError), registered():
        1 / 0  # noqa: B018
    assert insides() == stock


def test_registered_in_two_threads_holds_until_the_last_leaves(stock: tuple[Any, ...]) -> None:
    inside, left = threading.Event(), threading.Event()

    def second() -> bool:
        with registered():
            inside.set()
            assert left.wait(60)
            return insides() != stock

    with ThreadPoolExecutor(1) as thread:
        with registered():
            found = thread.submit(second)
            assert inside.wait(60)
        unregister()  # of a register that was not called
        left.set()
        assert found.result()
    assert insides() == stock


def test_register_from_many_threads_changes_things_once(stock: tuple[Any, ...]) -> None:
    start = threading.Barrier(8)

    def one_of(i: int) -> None:
        start.wait()
        for _ in range(200):
            (register if i % 2 else unregister)()

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(one_of, range(8)))
    register()
    assert insides()[2] == (*stock[2], DeepSpeedLion)
    unregister()
    assert insides() == stock


def test_two_threads_that_register_at_once(stock: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The second waits while the first, having looked and found nothing done, is about to do it."""
    looks, go_on = threading.Semaphore(0), threading.Event()
    internals = lion_dist.deepspeed._internals

    def held() -> tuple[type, list[type]]:
        looks.release()
        assert go_on.wait(60)
        return internals()

    monkeypatch.setattr(lion_dist.deepspeed, "_internals", held)
    with ThreadPoolExecutor(2) as threads:
        calls = [threads.submit(register) for _ in range(2)]
        assert looks.acquire(timeout=60)
        looks.acquire(timeout=0.2)  # the other gets so far only if nothing holds it
        go_on.set()
        for call in calls:
            call.result()
    assert insides()[2] == (*stock[2], DeepSpeedLion)
    unregister()
    assert insides() == stock


def changed(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    from deepspeed.runtime import engine
    from deepspeed.runtime.zero import utils

    if what == "signature":
        monkeypatch.setattr(engine.DeepSpeedEngine, "_configure_basic_optimizer", lambda self, params, names: None)
    elif what == "method":
        monkeypatch.delattr(engine.DeepSpeedEngine, "super_offload")
    elif what == "list":
        monkeypatch.setattr(utils, "ZERO_SUPPORTED_OPTIMIZERS", ())
    elif what == "engine":
        monkeypatch.delattr(engine, "DeepSpeedEngine")
    else:
        monkeypatch.setattr(engine, "LION_OPTIMIZER", "lion2")


@pytest.mark.parametrize("what", ["signature", "method", "list", "engine", "name"])
def test_a_deepspeed_that_is_built_otherwise_is_refused_unchanged(what: str) -> None:
    before = insides()
    with pytest.MonkeyPatch.context() as patch:
        changed(patch, what)
        with pytest.raises(RuntimeError, match=r"does not know the inside of DeepSpeed .* has changed nothing"):
            register()
    assert insides() == before
    assert lion_dist.deepspeed._registration is None


def test_unregister_under_somebody_elses_patch_changes_nothing(
    stock: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine

    register()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeepSpeedEngine, REPLACED[1], lambda self, optimizer, low_precision_dtype: None)
        with pytest.raises(RuntimeError, match="_configure_fp16_optimizer has been replaced since"):
            unregister()
        assert insides()[2] == (*stock[2], DeepSpeedLion)


def test_other_optimizers_are_built_as_ever(stock: tuple[Any, ...]) -> None:
    register()
    from deepspeed.runtime.engine import DeepSpeedEngine

    engine = SimpleNamespace(optimizer_name=lambda: "SGD", optimizer_params=lambda: {"lr": 0.5})
    built = DeepSpeedEngine._configure_basic_optimizer(engine, [torch.nn.Parameter(torch.ones(3))])
    assert type(built) is torch.optim.SGD


# Parameters of a config ------------------------------------------------------------------------------------


def test_arguments_of_a_config() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        given = {"lr": 3e-4, "betas": [0.95, 0.98], "weight_decay": 0.1, "maximize": False, "use_triton": None}
        assert arguments(given) == given
        assert arguments({"momentum_dtype": "bfloat16"}) == {"momentum_dtype": "bfloat16"}
        assert arguments({"adam_w_mode": True, "amsgrad": False, "fp32_optimizer_states": True}) == {}
    optimizer = DeepSpeedLion([torch.nn.Parameter(torch.ones(3))], **arguments({}))
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-4, (0.9, 0.99), 0.0)


@pytest.mark.parametrize("name", ["eps", "torch_adam", "fused", "foreach", "bias_correction", "set_grad_none"])
def test_what_means_nothing_to_lion_is_named(name: str) -> None:
    with pytest.warns(UserWarning, match=f"without meaning for Lion: {name}"):
        assert arguments({name: 1, "lr": 0.1}) == {"lr": 0.1}


def test_adams_betas_are_named() -> None:
    """Hugging Face fills them in for "auto", before anybody else sees the config."""
    with pytest.warns(UserWarning, match=r"betas \(0.9, 0.999\) are Adam's"):
        assert arguments({"betas": [0.9, 0.999]}) == {"betas": [0.9, 0.999]}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"betas": "auto"}, '"betas": "auto" is for Hugging Face'),
        ({"lr": "auto"}, '"lr": "auto" is for Hugging Face'),
        ({"eps": "auto"}, '"eps": "auto" is for Hugging Face'),
        ({"max_grad_norm": 1.0}, 'set "gradient_clipping"'),
        ({"adam_w_mode": False}, '"adam_w_mode": false is not possible: Lion\'s weight decay is decoupled'),
        ({"amsgrad": True}, '"amsgrad": true is not possible: Lion has no second moment'),
        ({"fp32_optimizer_states": False}, "momentum_dtype"),
        ({"momentum": 0.9, "lr": 0.1}, '"Lion" has no parameter momentum; it has lr, betas'),
        ({"momentum_dtype": "int8"}, "momentum_dtype must be None, float32, bfloat16 or float16, got 'int8'"),
    ],
)
def test_what_lion_cannot_do_is_refused_by_name(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        arguments(params)


# The optimizer's states ------------------------------------------------------------------------------------


def stepped(kind: type[Lion]) -> Lion:
    p = torch.nn.Parameter(torch.arange(5.0))
    optimizer = kind([p], lr=0.1)
    p.grad = torch.tensor([1.0, -2.0, 0.0, 3.0, 0.5])
    optimizer.step()
    return optimizer


def test_state_dicts_look_like_adams_and_take_no_memory() -> None:
    optimizer = stepped(DeepSpeedLion)
    (entry,) = optimizer.state_dict()["state"].values()
    assert list(entry) == ["step", "exp_avg", "exp_avg_sq"]
    assert entry["exp_avg_sq"].shape == entry["exp_avg"].shape
    assert entry["exp_avg_sq"].untyped_storage().nbytes() == 4
    assert [list(e) for e in optimizer.state.values()] == [["exp_avg"]]


@pytest.mark.parametrize("extra", [{}, {"step": 7}, {"step": 7, "exp_avg_sq": torch.zeros(5)}])
def test_states_of_deepspeeds_own_lions_are_taken(extra: dict[str, Any]) -> None:
    saved = stepped(Lion).state_dict()
    saved["state"][0].update(extra)
    fresh = DeepSpeedLion([torch.nn.Parameter(torch.zeros(5))], lr=0.3)
    fresh.load_state_dict(saved)
    (entry,) = fresh.state.values()
    assert list(entry) == ["exp_avg"]
    assert_same_bits(entry["exp_avg"], saved["state"][0]["exp_avg"])
    again = DeepSpeedLion([torch.nn.Parameter(torch.zeros(5))])
    again.load_state_dict(fresh.state_dict())
    assert_same_bits(next(iter(again.state.values()))["exp_avg"], entry["exp_avg"])


def test_what_others_keep_in_the_state_is_kept() -> None:
    """Beside the entries that look like Adam's; and keys that are no parameters."""
    optimizer = stepped(DeepSpeedLion)
    (entry,) = optimizer.state.values()
    entry["slow"] = torch.arange(5.0)
    optimizer.state["count"] = 3
    saved = optimizer.state_dict()
    assert list(saved["state"][0]) == ["step", "exp_avg", "exp_avg_sq", "slow"]
    fresh = DeepSpeedLion([torch.nn.Parameter(torch.zeros(5))], lr=0.3)
    fresh.load_state_dict(saved)
    fresh.step()
    loaded = fresh.state[fresh.param_groups[0]["params"][0]]
    assert list(loaded) == ["exp_avg", "slow"]
    assert_same_bits(loaded["slow"], torch.arange(5.0))
    assert fresh.state["count"] == 3


def test_adams_states_are_refused_unchanged() -> None:
    p = torch.nn.Parameter(torch.ones(5))
    adam = torch.optim.Adam([p])
    p.grad = torch.ones(5)
    adam.step()
    optimizer = stepped(DeepSpeedLion)
    before = next(iter(optimizer.state.values()))["exp_avg"].clone()
    with pytest.raises(ValueError, match="exp_avg_sq that is not zero, so it is Adam's"):
        optimizer.load_state_dict(adam.state_dict())
    with pytest.raises(ValueError, match="expected an optimizer state_dict"):
        optimizer.load_state_dict({})
    assert_same_bits(next(iter(optimizer.state.values()))["exp_avg"], before)


def test_partitions_in_turn_are_each_prepared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO steps one group after another, with ``param_groups`` swapped or with the other groups' params left out."""
    built: list[LionUpdate] = []
    build = LionUpdate._build
    monkeypatch.setattr(LionUpdate, "_build", lambda self, columns: (built.append(self), build(self, columns))[1])
    params = [torch.nn.Parameter(torch.ones(n)) for n in (5, 3)]
    ours = DeepSpeedLion([{"params": [p]} for p in params], lr=0.1, weight_decay=0.5)
    theirs = [Lion([torch.nn.Parameter(p.detach().clone())], lr=0.1, weight_decay=0.5) for p in params]
    groups = ours.param_groups
    for step in range(4):
        for i, p in enumerate(params):
            p.grad = torch.full_like(p, 1.0 - step)
            theirs[i].param_groups[0]["params"][0].grad = p.grad.clone()
            others_empty = [{**g, "params": g["params"] if g is groups[i] else []} for g in groups]
            ours.param_groups = [groups[i]] if step < 2 else others_empty
            ours.step()
            theirs[i].step()
    own = {id(update) for update, _ in ours._prepared.values()}
    assert len(own) == len(params)
    # The second's group has another number in the second half.
    assert sum(id(update) in own for update in built) == len(params) + 1
    ours.param_groups = groups
    for p, single in zip(params, theirs, strict=True):
        q = single.param_groups[0]["params"][0]
        assert_same_bits(p.detach(), q.detach())
        assert_same_bits(ours.state[p]["exp_avg"], single.state[q]["exp_avg"])


@needs_interpreter
def test_momenta_that_are_replaced_between_steps_are_freed() -> None:
    """As offload_states() does, to have their memory."""
    optimizer = DeepSpeedLion([torch.nn.Parameter(torch.ones(5))], lr=0.1, use_triton=True)
    optimizer.param_groups[0]["params"][0].grad = torch.linspace(-1, 1, 5)
    optimizer.step()
    (entry,) = optimizer.state.values()
    old = weakref.ref(entry["exp_avg"])
    entry["exp_avg"] = entry["exp_avg"].clone()
    gc.collect()
    assert old() is None
    optimizer.step()


def test_a_loaded_second_moment_goes_before_the_step() -> None:
    """As a universal checkpoint leaves it: put into the state itself."""
    optimizer, plain = stepped(DeepSpeedLion), stepped(Lion)
    (entry,) = optimizer.state.values()
    entry.update(step=3, exp_avg_sq=torch.zeros(5))
    optimizer.step()
    plain.step()
    assert list(entry) == ["exp_avg"]
    assert_same_bits(optimizer.param_groups[0]["params"][0].detach(), plain.param_groups[0]["params"][0].detach())


def test_a_loaded_momentum_takes_the_dtype_of_its_group() -> None:
    """DeepSpeed makes one of float32 for a universal checkpoint."""
    optimizers = [DeepSpeedLion([torch.nn.Parameter(torch.ones(5))], lr=0.1, momentum_dtype=BF16) for _ in range(2)]
    for optimizer in optimizers:
        optimizer.param_groups[0]["params"][0].grad = torch.linspace(-1, 1, 5)
        optimizer.step()
    (entry,) = optimizers[0].state.values()
    entry.update(step=3, exp_avg=entry["exp_avg"].float(), exp_avg_sq=torch.zeros(5))
    for optimizer in optimizers:
        optimizer.step()
    (other,) = optimizers[1].state.values()
    assert entry["exp_avg"].dtype == BF16
    assert_same_bits(entry["exp_avg"], other["exp_avg"])


# Engines ---------------------------------------------------------------------------------------------------

OFFLOAD = {"device": "cpu"}
REFUSED = {
    "zenflow": {"stage": 2, "offload_optimizer": OFFLOAD, "zenflow": {"select_strategy": "step", "select_interval": 1}},
    "super_offload": {"stage": 3, "offload_optimizer": {**OFFLOAD, "super_offload": True}},
    "ratio": {"stage": 3, "offload_optimizer": {**OFFLOAD, "ratio": 0.5}},
}


def body_engines(rank: int, world_size: int) -> None:
    """One engine after another on one rank: deepspeed.initialize bound before register()."""
    initialize = start_deepspeed(rank, world_size).initialize
    register()
    deepspeed = SimpleNamespace(initialize=initialize)
    for mode, zero in REFUSED.items():
        with pytest.raises(ValueError, match=rf"{mode}.*steps with its own Adam"):
            initialize(model=Model(rank, world_size), config=make_config(2, zero_optimization=zero))
    bad = make_config(2, optimizer={"type": "Lion", "params": {"momentum": 0.9}})
    with pytest.raises(ValueError, match='"Lion" has no parameter momentum'):
        initialize(model=Model(rank, world_size), config=bad)

    # The step of zero gradients that the wrapper's constructor makes.
    decay = {"optimizer": {"type": "Lion", "params": {"lr": 0.1, "weight_decay": 0.5}}}
    for dtype in ("bf16", "fp16"):
        model = Model(rank, world_size)
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        with engine_of(deepspeed, model, make_config(0, dtype, **decay)) as engine:
            assert type(engine.optimizer).__name__ == "FP16_UnfusedOptimizer"
            now = weights(deepspeed, engine)
            for name, p in start.items():
                assert_same_bits(now[name], p.to(now[name].dtype), f"{dtype}: {name}")
            masters = [p.detach() for group in engine.optimizer.fp32_groups for p in group]
            trained = [p.to(now[name].dtype).float() for name, p in start.items() if name != "frozen"]
            for master, p in zip(masters, trained, strict=True):
                assert_same_bits(master.cpu(), p, f"{dtype}, master weights")
            for entry in engine.basic_optimizer.state.values():
                assert_same_bits(entry["exp_avg"], torch.zeros_like(entry["exp_avg"]), f"{dtype}, momentum")
            assert [group["lr"] for group in engine.basic_optimizer.param_groups] == [0.1]
    # The same for a Lion that the user made.
    model = Model(rank, world_size)
    start = {name: p.detach().to(torch.bfloat16) for name, p in model.named_parameters()}
    lion = Lion(model.parameters(), lr=0.1, weight_decay=0.5)
    config = make_config(0, "bf16")
    del config["optimizer"]
    engine, *_ = initialize(model=model, optimizer=lion, config=config)
    assert engine.basic_optimizer is lion
    engine.optimizer.step()
    masters = [p.detach() for group in engine.optimizer.fp32_groups for p in group]
    for master, (name, p) in zip(masters, [s for s in start.items() if s[0] != "frozen"], strict=True):
        assert_same_bits(master.cpu(), p.float() * (1 - 0.1 * 0.5), name)  # one step of decay, not two

    adam = {**make_config(1), "optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}
    with engine_of(deepspeed, Model(rank, world_size), adam) as engine:
        assert type(engine.basic_optimizer) is torch.optim.AdamW


def test_engines_refuse_modes_and_keep_weights(tmp_path: Path) -> None:
    run_ranks(body_engines, 1, tmp_path)
