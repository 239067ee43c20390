"""Checkpoints of models of which the ranks hold different parts, as the stages of a pipeline do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import LambdaLR

from lion_dist import Lion, ShardedLion, checkpoint
from lion_dist.dtensors import local
from tests.asserts import assert_same_bits
from tests.harness import run_ranks

LAYERS = 4


class Layer(nn.Module):
    """The last has no bias, and so no parameter without decay but its gain."""

    def __init__(self, i: int) -> None:
        super().__init__()
        self.linear = nn.Linear(5 + i, 6 + i, bias=i < LAYERS - 1)
        self.norm = nn.BatchNorm1d(6 + i)


def stage(layers: Sequence[int], seed: int = 0, *, tied: bool | None = None) -> Stage:
    """Layers of the whole model by the names that they have in it. The first and the last share a weight: one parameter
    of two names where both are here, else each a parameter of its own."""
    model = Stage()
    for i in layers:
        torch.manual_seed(100 * seed + i)
        model[f"layer{i}"] = Layer(i)
    torch.manual_seed(100 * seed + 99)
    shared = torch.randn(7, 3)
    if 0 in layers:
        model["embed"] = Weight(shared.clone())
    if LAYERS - 1 in layers:
        model["head"] = Weight(shared.clone())
    if 0 in layers and LAYERS - 1 in layers and tied is not False:
        model["head"].w = model["embed"].w
    return model


class Stage(nn.Module):
    """Modules by name, as in an nn.ModuleDict, which fully_shard() of torch 2.11 refuses."""

    def __setitem__(self, name: str, module: nn.Module) -> None:
        self.add_module(name, module)

    def __getitem__(self, name: str) -> nn.Module:
        return self.get_submodule(name)


class Weight(nn.Module):
    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w)


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Those for decay and those for none, and no empty ones: so a stage may have one or two."""
    params = dict(model.named_parameters())
    matrices = [p for p in params.values() if p.dim() > 1]
    gains = [p for n, p in params.items() if p.dim() < 2 and "layer2" not in n]
    rest = [p for n, p in params.items() if p.dim() < 2 and "layer2" in n]
    found = [{"params": gains, "lr": 3e-3}, {"params": rest, "lr": 7e-3}, {"params": matrices, "weight_decay": 0.3}]
    return [group for group in found if group["params"]]


def train(model: nn.Module, optimizer: Any, scheduler: LambdaLR, steps: range) -> None:
    """Each parameter's gradient is a function of its name and the step, so that any cut trains alike."""
    for step in steps:
        for name, p in model.named_parameters():
            name = "embed.w" if name == "head.w" else name
            torch.manual_seed(step * 1000 + sum((i + 1) * ord(c) for i, c in enumerate(name)))
            p.grad = torch.randint(-8, 9, p.shape) / 4
        for name, b in model.named_buffers():
            if b.is_floating_point():
                b += len(name) + step
        optimizer.step()
        scheduler.step()


def make(
    layers: Sequence[int], seed: int = 0, group: dist.ProcessGroup | None = None
) -> tuple[nn.Module, Any, LambdaLR]:
    model = stage(layers, seed)
    kwargs: dict[str, Any] = {"lr": 1e-2}
    if group is None:
        optimizer: Any = Lion(groups(model), **kwargs)
    else:
        optimizer = ShardedLion(groups(model), **kwargs, stage=1, process_group=group)
    return model, optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step))


def everything(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    found: dict[str, Any] = {f"w {n}": t.detach().clone() for n, t in model.state_dict(keep_vars=True).items()}
    names = {id(p): n for n, p in model.named_parameters()}
    state = optimizer.full_state_dict() if isinstance(optimizer, ShardedLion) else optimizer.state_dict()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, entry in state["state"].items():
        found[f"m {names[id(params[i])]}"] = entry["exp_avg"].clone()
    for group in optimizer.param_groups:
        values = {k: v for k, v in group.items() if k not in ("params", "param_names", "init_lr")}
        found.update({f"g {names[id(p)]}": values for p in group["params"]})
    return found


def assert_part(got: dict[str, Any], whole: dict[str, Any], what: str) -> None:
    for name, value in got.items():
        expected = whole[name] if name in whole else whole[name.replace("head", "embed")]
        if isinstance(value, Tensor):
            assert_same_bits(value, expected, f"{what}: {name}")
        else:
            assert value == expected, f"{what}: {name}"


def body_pipeline(rank: int, world_size: int, folder: Path) -> None:
    """Two stages of two replicas each; Lion in all, or a ShardedLion for each stage."""
    stages = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = stages[rank // 2]
    alone = [dist.new_group([r]) for r in range(world_size)][rank]
    whole, optimizer, scheduler = make(range(LAYERS))
    train(whole, optimizer, scheduler, range(3))
    then = everything(whole, optimizer)
    if rank == 0:
        checkpoint.save(folder / "whole", whole, optimizer, schedulers=scheduler, extra=1, process_group=alone)
    train(whole, optimizer, scheduler, range(3, 5))
    later = everything(whole, optimizer)
    cuts = {"half": ([0, 1], [2, 3]), "mixed": ([0, 2], [3, 1])}
    sharded = {"half": False, "mixed": True}
    for name, cut in cuts.items():
        model, optimizer, scheduler = make(cut[rank // 2], group=mine if sharded[name] else None)
        train(model, optimizer, scheduler, range(3))
        with torch.no_grad():
            for b in model.buffers():
                b += rank % 2  # replicas of a stage: the first one's count
        checkpoint.save(folder / name, model, optimizer, schedulers=scheduler, extra=1, process_group=dist.group.WORLD)
    dist.barrier()
    for source in ("whole", *cuts):
        for name, cut in cuts.items():
            what = f"{source} -> {name}, rank {rank}"
            model, optimizer, scheduler = make(cut[rank // 2], 1, mine if sharded[name] else None)
            train(model, optimizer, scheduler, range(20, 21))
            extra = checkpoint.load(
                folder / source, model, optimizer, schedulers=scheduler, process_group=dist.group.WORLD
            )
            assert extra == 1
            assert_part(everything(model, optimizer), then, what)
            train(model, optimizer, scheduler, range(3, 5))
            assert_part(everything(model, optimizer), later, f"{what}, later")
        if rank:
            continue
        # The whole model in one process; and its weights alone.
        model, optimizer, scheduler = make(range(LAYERS), 1)
        checkpoint.load(folder / source, model, optimizer, schedulers=scheduler, process_group=alone)
        assert everything(model, optimizer).keys() == then.keys()
        assert_part(everything(model, optimizer), then, f"{source} -> whole")
        train(model, optimizer, scheduler, range(3, 5))
        assert_part(everything(model, optimizer), later, f"{source} -> whole, later")
        model = stage(range(LAYERS), 2)
        checkpoint.load(folder / source, model, process_group=alone)
        assert_part({f"w {n}": t for n, t in model.state_dict().items()}, then, f"{source} -> weights")
    # A stage by itself has not all of it.
    model, optimizer, scheduler = make([0, 1], 1)
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=r"the checkpoint has \d+ tensors that the model or optimizer has not"):
        checkpoint.load(folder / "half", model, optimizer, schedulers=scheduler, process_group=dist.group.WORLD)
    assert_part(everything(model, optimizer), before, "refused")
    assert scheduler.last_epoch == 0


def test_stages_of_a_pipeline(tmp_path: Path) -> None:
    run_ranks(body_pipeline, 4, tmp_path, (tmp_path,), on_cpu=True)


def body_sharded_stages(rank: int, world_size: int, folder: Path) -> None:
    """Two stages, each of them FSDP over two ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))["dp"]
    alone = [dist.new_group([r]) for r in range(world_size)][rank]

    def make(kind: str, layers: Sequence[int], seed: int) -> tuple[nn.Module, Lion]:
        model: nn.Module = stage(layers, seed)
        if kind == "fsdp2":
            fully_shard(model, mesh=mesh)
        else:
            of_fsdp1: dict[str, Any] = {"process_group": mesh.get_group(), "device_id": torch.device("cpu")}
            model = FSDP(model, use_orig_params=True, **of_fsdp1)
        optimizer = Lion(model.parameters())
        optimizer.init_state()
        return model, optimizer

    for kind in ("fsdp1", "fsdp2"):
        model, optimizer = make(kind, ([0, 1], [2, 3])[rank // 2], 0)
        for p, entry in optimizer.state.items():
            entry["exp_avg"].copy_(p.detach() * 2)
        checkpoint.save(folder / kind, model, optimizer)
        dist.barrier()
    expected = dict(stage(range(LAYERS)).named_parameters())
    for kind in ("fsdp1", "fsdp2"):
        for source in ("fsdp1", "fsdp2"):
            model, optimizer = make(kind, ([0], [1, 2, 3])[rank // 2], 1)
            checkpoint.load(folder / source, model, optimizer)
            for p, entry in optimizer.state.items():
                assert_same_bits(local(entry["exp_avg"]), local(p).detach() * 2, f"{source} -> {kind}")
            weights: dict[str, Any] = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
            for name, weight in weights.items():
                if name in expected:
                    assert_same_bits(weight, expected[name].detach(), f"{source} -> {kind}: {name}")
        whole = stage(range(LAYERS), 1)
        one = Lion(whole.parameters())
        checkpoint.load(folder / kind, whole, one, process_group=alone)
        for name, p in whole.named_parameters():
            assert_same_bits(p.detach(), expected[name].detach(), name)
            assert_same_bits(one.state[p]["exp_avg"], p.detach() * 2, name)
    # Stages whose layers have the same names, so that their parts would be taken for replicas of each other.
    torch.manual_seed(rank // 2)
    same_names = nn.Linear(6, 6)
    fully_shard(same_names, mesh=mesh)
    with pytest.raises(ValueError, match=r"model\.\w+ has other values on rank 2 than on rank 0"):
        checkpoint.save(folder / "never", same_names)
    dist.barrier()


def test_stages_that_are_sharded(tmp_path: Path) -> None:
    run_ranks(body_sharded_stages, 4, tmp_path, (tmp_path,), on_cpu=True)


def body_refused(rank: int, world_size: int, folder: Path) -> None:
    def refused(message: str, model: nn.Module, optimizer: Any = None, schedulers: Any = ()) -> None:
        path = folder / "never"
        with pytest.raises((ValueError, TypeError), match=message):  # on both ranks
            checkpoint.save(path, model, optimizer, schedulers=schedulers)
        dist.barrier()
        assert not path.exists()

    torch.manual_seed(rank)
    # Stages that count their layers from 0: of other shapes, or of other values.
    refused(
        r"model\.0\.weight has shape and dtype \(\(3, 2\).* on rank 0 and \(\(3, 3\)",
        nn.Sequential(nn.Linear(2 + rank, 3)),
    )
    refused(r"model\.0\.weight has other values on rank 1 than on rank 0.*whole model", nn.Sequential(nn.Linear(2, 3)))
    refused("has shape and dtype", nn.Sequential(nn.Linear(2, 3).to(torch.float32 if rank else torch.bfloat16)))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    params = list(model.parameters())
    refused(
        r"parameter group 0 of rank 1 and a group of rank 0 both hold 0\.weight, but not the same parameters",
        model,
        Lion(params if rank else [{"params": params[:2]}, {"params": params[2:]}]),
    )
    refused(
        r"'lr' of the parameter group with 0\.weight is 0\.\d on rank 0 and", model, Lion(params, lr=0.1 + rank / 2)
    )
    optimizer = Lion(params)
    refused(r"the ranks have \[0, 1\] schedulers", model, optimizer, [LambdaLR(optimizer, lambda step: 1.0)] * rank)
    unsavable = [LambdaLR(optimizer, float if rank else lambda step: 1.0)]  # a type has attributes that no JSON has
    refused(r"scheduler\.0\.lr_lambdas\[0\].* is a .*, which a checkpoint cannot hold", model, optimizer, unsavable)
    if rank:  # its state cannot be made
        params[0].grad = torch.zeros(3, 2).to_sparse()
    refused(r"sparse.* \(on ranks \[1\]\)", model, Lion(params))
    params[0].grad = None
    state: dict[Any, Any] = optimizer.state[params[0]]
    if rank:
        state["other"] = object()
    refused(r"optim\.state\.0\.weight\.other is a object, which a checkpoint cannot hold", model, optimizer)
    # FSDP's parts and pipeline stages alike: what differs in its momentum alone.
    optimizer = Lion(params)
    optimizer.init_state()
    optimizer.state[params[1]]["exp_avg"].fill_(rank)
    refused(r"optim\.state\.0\.bias\.exp_avg has other values on rank 1", model, optimizer)


def test_models_that_cannot_be_saved_are_refused_on_every_rank(tmp_path: Path) -> None:
    run_ranks(body_refused, 2, tmp_path, (tmp_path,), on_cpu=True)
