"""DeepSpeed's checkpoints: saved and loaded by the engine, converted to the universal format and loaded by another
number of ranks at another stage, and read by zero_to_fp32."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import lion_dist
from tests.asserts import assert_same_bits
from tests.harness import run_ranks
from tests.marks import skip_module_without

from .common import DTYPES, Model, PlainLion, averaged, engine_of, make_config, micro_steps, start_deepspeed, weights

skip_module_without("deepspeed")

RANKS = 2  # that save
BEFORE, AFTER = 3, 2
PARAMS: dict[str, Any] = {
    "optimizer": {"type": "Lion", "params": {"lr": 1e-2, "betas": [0.9, 0.99], "weight_decay": 0.2}}
}
SUB_GROUPS = {"zero_optimization": {"sub_group_size": 3000}}
ACCUMULATE_FP32 = {"data_types": {"grad_accum_dtype": "fp32"}}

# Name -> stage, dtype, offload, what else the config says.
SAVED: dict[str, tuple[int, str, bool, dict[str, Any]]] = {
    "0-fp32": (0, "fp32", False, {}),
    "0-bf16": (0, "bf16", False, {}),
    "1-bf16": (1, "bf16", False, ACCUMULATE_FP32),  # BF16_Optimizer
    "2-bf16": (2, "bf16", False, {}),
    "2-bf16-elastic": (2, "bf16", False, {"zero_optimization": {"elastic_checkpoint": True}}),
    "2-fp32-offload": (2, "fp32", True, {}),
    "3-bf16": (3, "bf16", False, SUB_GROUPS),
    "3-bf16-one-group": (3, "bf16", False, SUB_GROUPS),
}
# What is loaded from the universal checkpoint of which, on how many ranks.
# (Stage 3 of DeepSpeed 0.19.8 gives all groups the hyper-parameters of the first when it loads one.)
UNIVERSAL = [("2-bf16", 1, 1), ("2-bf16", 2, 1), ("2-fp32-offload", 1, 4), ("3-bf16-one-group", 3, 1)]


def config_of(name: str, stage: int | None = None, **more: Any) -> dict[str, Any]:
    saved_stage, dtype, offload, extras = SAVED[name]
    return make_config(saved_stage if stage is None else stage, dtype, offload, **PARAMS, **extras, **more)


def groups_of(name: str, model: Model) -> list[dict[str, Any]]:
    return [{"params": list(model.parameters())}] if name.endswith("one-group") else model.groups()


def expected(name: str, steps: int) -> PlainLion:
    model = Model(0, RANKS, steady=True)
    plain = PlainLion(
        model, DTYPES[SAVED[name][1]], {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.2}, groups_of(name, model)
    )
    for step in range(steps):
        plain.step(averaged(model, range(step, step + 1)))
    return plain


def assert_same_weights(got: dict[str, Tensor], plain: PlainLion, what: str) -> None:
    for name, p in plain.weights().items():
        assert_same_bits(got[name], p, f"{what}: {name}")


def body_save_and_load(rank: int, world_size: int, folder: Path) -> None:
    deepspeed = start_deepspeed(rank, world_size)
    lion_dist.deepspeed.register()
    for name in SAVED:
        model = Model(rank, world_size, steady=True)
        with engine_of(deepspeed, model, config_of(name), groups_of(name, model)) as engine:
            micro_steps(engine, 0, BEFORE)
            engine.save_checkpoint(str(folder / name), tag="saved")
            micro_steps(engine, BEFORE, AFTER)
            final = weights(deepspeed, engine)
            momenta = [entry["exp_avg"].clone() for entry in engine.basic_optimizer.state.values()]
        assert_same_weights(final, expected(name, BEFORE + AFTER), name)

        model = Model(rank, world_size, steady=True)
        with engine_of(deepspeed, model, config_of(name), groups_of(name, model)) as engine:
            micro_steps(engine, 20, 1)  # a state that the load must replace
            assert engine.load_checkpoint(str(folder / name), tag="saved")[0] is not None
            assert_same_weights(weights(deepspeed, engine), expected(name, BEFORE), f"{name}, loaded")
            micro_steps(engine, BEFORE, AFTER)
            assert_same_weights(weights(deepspeed, engine), expected(name, BEFORE + AFTER), f"{name}, resumed")
            for got, m in zip(engine.basic_optimizer.state.values(), momenta, strict=True):
                assert_same_bits(got["exp_avg"], m, f"{name}, momentum")


def body_convert(rank: int, world_size: int, folder: Path) -> None:
    start_deepspeed(rank, world_size)
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    for name, (stage, *_) in SAVED.items():
        if stage and name not in ("1-bf16", "2-bf16-elastic"):  # DeepSpeed's tool reads nothing of these
            masters = expected(name, BEFORE).masters
            found = get_fp32_state_dict_from_zero_checkpoint(str(folder / name), tag="saved")
            assert found.keys() == masters.keys(), name
            for key, p in found.items():
                assert_same_bits(p.float(), masters[key], f"{name}, zero_to_fp32: {key}")
    for name in {source for source, _, _ in UNIVERSAL}:
        universal_of(folder / name, rank)


def body_load_universal(rank: int, world_size: int, folder: Path, loads: list[tuple[str, int]]) -> None:
    deepspeed = start_deepspeed(rank, world_size)
    lion_dist.deepspeed.register()
    for name, stage in loads:
        case = f"{name} at stage {stage} on {world_size} ranks"
        model = Model(0, RANKS, average=True, steady=True)
        config = config_of(name, stage, checkpoint={"load_universal": True})
        with engine_of(deepspeed, model, config, groups_of(name, model)) as engine:
            assert engine.load_checkpoint(str(folder / name), tag="universal")[0] is not None
            assert_same_weights(weights(deepspeed, engine), expected(name, BEFORE), f"{case}, loaded")
            micro_steps(engine, BEFORE, AFTER)
            assert_same_weights(weights(deepspeed, engine), expected(name, BEFORE + AFTER), f"{case}, resumed")
            for entry in engine.basic_optimizer.state.values():
                assert list(entry) == ["exp_avg"], case
                assert entry["exp_avg"].dtype == torch.float32, case


MOMENTUM_16 = {**PARAMS["optimizer"]["params"], "momentum_dtype": "bfloat16"}
ADAM = {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.2, "torch_adam": True}}


def universal_of(folder: Path, rank: int) -> None:
    from deepspeed.checkpoint import ds_to_universal

    if rank == 0:
        paths = {"input_folder": str(folder / "saved"), "output_folder": str(folder / "universal")}
        workers = {"num_extract_workers": 1, "num_merge_workers": 1}
        options = {"keep_temp_folder": False, "strict": True, "inject_missing_state": True}
        ds_to_universal.main(Namespace(**paths, **workers, **options))
    dist.barrier()


def body_momentum_in_16_bits(rank: int, world_size: int, folder: Path) -> None:
    """Adam's universal checkpoint too: DeepSpeed puts either into the optimizer without asking it."""
    deepspeed = start_deepspeed(rank, world_size)
    lion_dist.deepspeed.register()
    for stage in (2, 3):
        for optimizer in ({"type": "Lion", "params": MOMENTUM_16}, ADAM):
            there = folder / f"{stage}-{optimizer['type']}"
            model = Model(rank, world_size, steady=True)
            config = make_config(stage, "bf16", optimizer=optimizer)
            with engine_of(deepspeed, model, config, [{"params": list(model.parameters())}]) as engine:
                micro_steps(engine, 0, BEFORE)
                engine.save_checkpoint(str(there), tag="saved")
                micro_steps(engine, BEFORE, AFTER)
                final = weights(deepspeed, engine)
            universal_of(there, rank)
            model = Model(rank, world_size, steady=True)
            lion = {"type": "Lion", "params": MOMENTUM_16}
            config = make_config(stage, "bf16", optimizer=lion, checkpoint={"load_universal": True})
            with engine_of(deepspeed, model, config, [{"params": list(model.parameters())}]) as engine:
                engine.load_checkpoint(str(there), tag="universal")
                if optimizer is ADAM:
                    with pytest.raises(ValueError, match="of Adam, start Lion from the weights alone"):
                        micro_steps(engine, BEFORE, AFTER)
                    continue
                micro_steps(engine, BEFORE, AFTER)
                for entry in engine.basic_optimizer.state.values():
                    assert entry["exp_avg"].dtype == torch.bfloat16, stage
                for name, p in weights(deepspeed, engine).items():
                    assert_same_bits(p, final[name], f"stage {stage}: {name}")


def test_universal_with_a_momentum_in_16_bits_and_from_adam(tmp_path: Path) -> None:
    run_ranks(body_momentum_in_16_bits, RANKS, tmp_path, (tmp_path,))


def test_checkpoints(tmp_path: Path) -> None:
    """Training goes on with the bits that it would have had, from an engine's own checkpoint, and from a universal one
    on another number of ranks and at another stage."""
    on_cpu = torch.cuda.device_count() < RANKS  # those who load, too
    run_ranks(body_save_and_load, RANKS, tmp_path, (tmp_path,))
    run_ranks(body_convert, 1, tmp_path, (tmp_path,), on_cpu=on_cpu)
    for ranks in sorted({ranks for _, _, ranks in UNIVERSAL}):
        loads = [(name, stage) for name, stage, n in UNIVERSAL if n == ranks]
        run_ranks(body_load_universal, ranks, tmp_path, (tmp_path, loads), on_cpu=on_cpu)
