"""register() and unregister(), and what a config may say of the optimizer."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lion_dist
from lion_dist import Lion
from lion_dist.deepspeed import DeepSpeedLion, register, registered, unregister
from tests.asserts import assert_same_bits
from tests.deepspeed.common import Model, engine_of, make_config, start_deepspeed, weights
from tests.harness import run_ranks
from tests.marks import skip_module_without

skip_module_without("deepspeed")

REPLACED = ("_configure_basic_optimizer", "_configure_fp16_optimizer")


def insides() -> tuple[Any, ...]:
    """The attributes that register() changes."""
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
        with pytest.raises(RuntimeError, match=r"does not know the internals of DeepSpeed .* has changed nothing"):
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


def test_other_optimizers_are_built_as_before(stock: tuple[Any, ...]) -> None:
    register()
    from deepspeed.runtime.engine import DeepSpeedEngine

    engine = SimpleNamespace(optimizer_name=lambda: "SGD", optimizer_params=lambda: {"lr": 0.5})
    built = DeepSpeedEngine._configure_basic_optimizer(engine, [torch.nn.Parameter(torch.ones(3))])
    assert type(built) is torch.optim.SGD


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
    decay: dict[str, Any] = {"optimizer": {"type": "Lion", "params": {"lr": 0.1, "weight_decay": 0.5}}}
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
