"""Memory of a training run in each precision and strategy: bytes per parameter and rank, counted beside arithmetic.

    python -m benchmarks.precision_memory                 two gloo ranks
    python -m benchmarks.precision_memory --ranks 4
    python -m benchmarks.precision_memory --table 8       arithmetic for 8 ranks, as in docs/precision.md; runs nothing

A rank makes a model of linear layers and a norm, and takes one step. Before the gradients are zeroed it counts the
bytes of all tensors that are alive, each storage once:

Weights: the parameters that it holds between steps. FSDP2 gathers others for a while in a forward and a backward.
Gradients: ``p.grad``, or in stage 2 this rank's part of the averages. Buckets under way are not among them.
State: the optimizer's: momenta, scales of 8-bit momenta, remainders of master weights.
Rest: everything else that the optimizer or the strategy keeps, such as signs, and in stage 2 the zeros that the
    smallest parameter has in ``p.grad``. The scratch memory of a step on a CPU is left out: it has one size, whatever
    that of the model.

The arithmetic is that of docs/precision.md and lion_dist/plan. It leaves out that parts are padded to whole blocks.
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lion_dist import Lion, ShardedLion
from lion_dist.dtensors import local
from lion_dist.plan.precision import PRECISIONS, Precision
from lion_dist.plan.strategies import STRATEGIES, Bytes, Shards, Strategy
from lion_dist.update.backends.chunks import Chunks

from .measure import run_ranks

WIDTH, LAYERS = 256, 7  # fewer elements than are compiled on a CPU, which would take long


class Run(NamedTuple):
    """A model after its backward, and its optimizer before the step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer


def backward(model: nn.Module) -> None:
    p = next(model.parameters())
    model(torch.ones(1, p.shape[-1], dtype=p.dtype)).sum().backward()


def ddp(model: nn.Module, precision: Precision) -> Run:
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = Lion(wrapped.parameters(), **precision.arguments)
    backward(wrapped)
    return Run(wrapped, optimizer)


def stage1(model: nn.Module, precision: Precision, param_sync: str) -> Run:
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    named = model.named_parameters()
    optimizer = ShardedLion(named, stage=1, param_sync=param_sync, **precision.arguments)
    backward(wrapped)
    return Run(wrapped, optimizer)


def stage2(model: nn.Module, precision: Precision, param_sync: str) -> Run:
    optimizer = ShardedLion(model.named_parameters(), param_sync=param_sync, **precision.arguments)
    backward(model)
    return Run(model, optimizer)


def fsdp2(model: nn.Module, precision: Precision) -> Run:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.children():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = Lion(model.parameters(), **precision.arguments)
    backward(model)
    return Run(model, optimizer)


class Way(NamedTuple):
    """A strategy of lion_dist/plan, and how a run of it is made."""

    strategy: Strategy
    make: Callable[[nn.Module, Precision], Run]

    def bytes(self, precision: Precision) -> Bytes:
        """Bytes per parameter on a rank. FSDP2 shards the model over all ranks, or over none."""
        total = self.strategy.memory(precision).total
        return total if self.strategy.shards is Shards.NONE else Bytes(0, total.whole)


MAKERS: dict[str, Callable[[nn.Module, Precision], Run]] = {
    "DDP": ddp,
    'stage 1, "params"': partial(stage1, param_sync="params"),
    'stage 1, "signs"': partial(stage1, param_sync="signs"),
    'stage 2, "params"': partial(stage2, param_sync="params"),
    'stage 2, "signs"': partial(stage2, param_sync="signs"),
    "FSDP2": fsdp2,
}
WAYS = {name: Way(STRATEGIES[name], make) for name, make in MAKERS.items()}

# Other optimizers, with gradients in the dtype of the weights if nothing else is said. AdamW: two float32 moments.
# FlashOptim (0.1.4): momenta in 8 bits with an fp16 scale for each 32 elements; 24-bit master weights take a byte.
# DeepSpeed (0.19.8): float32 masters and momentum, both sharded. Megatron's distributed optimizer: whole float32
# gradients; float32 masters and momentum sharded.
_FLASH = 1 + 2 / 32
PEERS = {
    "AdamW, fp32, one device or DDP": Bytes(4 + 4 + 8, 0),
    "AdamW, fp32, FSDP2": Bytes(0, 4 + 4 + 8),
    "AdamW, bf16 with float32 masters, one device or DDP": Bytes(2 + 2 + 4 + 8, 0),
    "AdamW, bf16 with float32 masters, FSDP2": Bytes(0, 2 + 2 + 4 + 8),
    "FlashLion, bf16 with 24-bit masters, one device or DDP": Bytes(2 + 2 + 1 + _FLASH, 0),
    "FlashLion, bf16 with 24-bit masters, FSDP2": Bytes(0, 2 + 2 + 1 + _FLASH),
    "FlashAdamW, bf16 with 24-bit masters, one device or DDP": Bytes(2 + 2 + 1 + 2 * _FLASH, 0),
    "FlashAdamW, bf16 with 24-bit masters, FSDP2": Bytes(0, 2 + 2 + 1 + 2 * _FLASH),
    "DeepSpeed ZeRO-1, bf16, Lion": Bytes(2 + 2, 4 + 4),
    "DeepSpeed ZeRO-2, bf16, Lion": Bytes(2, 2 + 4 + 4),
    "DeepSpeed ZeRO-3, bf16, Lion": Bytes(0, 2 + 2 + 4 + 4),
    "Megatron's distributed optimizer, bf16, Lion": Bytes(2 + 4, 4 + 4),
    "Megatron's distributed optimizer, bf16, AdamW": Bytes(2 + 4, 4 + 8),
}


# Counting ------------------------------------------------------------------------------------------------------


class Counted(NamedTuple):
    """Bytes per parameter on a rank, as the head of this file defines them."""

    weights: float
    gradients: float
    state: float
    rest: float


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """The sizes in bytes of the storages behind tensors, by address."""
    found = {}
    for t in tensors:
        storage = local(t.detach()).untyped_storage()
        if storage.nbytes():
            found[storage.data_ptr()] = storage.nbytes()
    return found


def alive() -> dict[int, int]:
    """The `storages` of all plain tensors that Python knows and that gc.freeze() has not set aside."""
    gc.collect()
    return storages(t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu")


def gradients(run: Run) -> list[Tensor]:
    if isinstance(run.optimizer, ShardedLion):
        source, shards = run.optimizer._grads, range(len(run.optimizer._shards))
        return [g for i in shards for g in source.grads_of(i) if g is not None]
    return [p.grad for p in run.model.parameters() if p.grad is not None]


def state(run: Run) -> list[Tensor]:
    if isinstance(run.optimizer, ShardedLion):
        shards = run.optimizer._shards
        whole = [t for shard in shards for tensors in shard.whole.values() for t in tensors]
        return [*whole, *(t for shard in shards for t in shard.buffers.values())]
    return [t for entry in run.optimizer.state.values() for t in entry.values() if isinstance(t, Tensor)]


def count(way: Way, precision: Precision) -> Counted:
    """Trains one step of a new model, and counts. A collective call."""
    gc.collect()
    gc.freeze()  # what is there already is not counted, and not looked at again
    layers = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)]
    model = nn.Sequential(*layers, nn.LayerNorm(WIDTH)).to(precision.weights)
    numel = sum(p.numel() for p in model.parameters())
    run = way.make(model, precision)
    run.optimizer.step()
    kinds = [storages(tensors) for tensors in (run.model.parameters(), gradients(run), state(run))]
    rest = alive()
    scratch = storages(found._memory for found in gc.get_objects() if type(found) is Chunks)
    for kind in (*kinds, scratch):
        for address in kind:
            rest.pop(address, None)
    gc.unfreeze()
    return Counted(*(sum(kind.values()) / numel for kind in (*kinds, rest)))


def count_all(rank: int, ranks: int, rendezvous: str, out: str) -> None:
    """Counts every combination, and writes what the first rank counted."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks)
    counted = [[count(way, precision) for precision in PRECISIONS] for way in WAYS.values()]
    if rank == 0:
        Path(out).write_text(json.dumps(counted))
    dist.barrier()
    dist.destroy_process_group()


# Tables --------------------------------------------------------------------------------------------------------


def arithmetic(ranks: int) -> list[str]:
    """The lines of the tables of docs/precision.md: formulas in W, and their values for W = ``ranks``."""
    same = {"DDP": "one device, DDP", "FSDP2": "FSDP1, FSDP2"}
    head = [f"| | {' | '.join(same.get(name, name) for name in WAYS)} |", f"|{'---|' * (len(WAYS) + 1)}"]
    lines = [*head]
    for precision in PRECISIONS:
        lines.append(f"| {precision.name} | {' | '.join(str(way.bytes(precision)) for way in WAYS.values())} |")
    lines += ["", *head]
    for precision in PRECISIONS:
        numbers = [f"{way.bytes(precision).on(ranks):.2f}" for way in WAYS.values()]
        lines.append(f"| {precision.name} | {' | '.join(numbers)} |")
    lines += ["", f"| | bytes | for W = {ranks} |", "|---|---|---|"]
    return [*lines, *(f"| {name} | {peer} | {peer.on(ranks):.2f} |" for name, peer in PEERS.items())]


def print_counted(counted: list[list[Counted]], ranks: int) -> None:
    print("| strategy | precision | weights | gradients | state | rest | counted | arithmetic | counted / arithmetic |")
    print(f"|{'---|' * 9}")
    for (name, way), of_way in zip(WAYS.items(), counted, strict=True):
        for precision, found in zip(PRECISIONS, of_way, strict=True):
            expected = way.bytes(precision)
            kinds = " | ".join(f"{kind:.2f}" for kind in found)
            total, ratio = sum(found), sum(found) / expected.on(ranks)
            print(
                f"| {name} | {precision.name} | {kinds} | {total:.2f} | {expected} = {expected.on(ranks):.2f} | "
                f"{ratio:.3f} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--table", type=int, metavar="W", help="print the arithmetic for W ranks, and run nothing")
    options = parser.parse_args()
    if options.table:
        print("\n".join(arithmetic(options.table)))
        return
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "counted.json"
        run_ranks(count_all, (options.ranks, f"{folder}/rendezvous", str(out)), options.ranks)
        counted = [[Counted(*kinds) for kinds in of_way] for of_way in json.loads(out.read_text())]
    print(f"{options.ranks} gloo ranks, torch {torch.__version__}; bytes per parameter on a rank")
    print(f"`{shlex.join(['python', '-m', 'benchmarks.precision_memory', *sys.argv[1:]])}`\n")
    print_counted(counted, options.ranks)


if __name__ == "__main__":
    main()
