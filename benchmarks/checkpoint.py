"""Time to save and load a training state on several ranks: lion_dist.checkpoint and other libraries.

    python -m benchmarks.checkpoint --folder /some/fast/disk --repeats 3
    python -m benchmarks.checkpoint --folder /tmp/x --ranks 2 --cpu --layers 1 --width 64     the script, without GPUs
    (from the repository's root; --help for sizes)

State: the weights of benchmarks/llama.py and their momenta, float32: 8.3 GB with the defaults, in every mode, after one
    iteration. GB/s are these bytes over the time, whatever else a mode writes.
Mode: one way to save and load, with one process for each rank. Where there are more ranks than GPUs, ranks share GPUs.
Save: time until the call has returned on every rank; and time until the bytes are on the disk, for which the benchmark
    calls fsync on what the mode has left to the operating system. `fsync` says which modes call it themselves.
Asynchronous save: how long the training waits for the call, and the time until the bytes are on the disk.
Load: time until every rank has its state again, from files that are still in the operating system's cache. The weights
    are zeroed before, and compared after.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lion_dist import Lion, ShardedLion, checkpoint

from .llama import LanguageModel, Llama
from .measure import join_group, machine, run_ranks
from .peer_steps import BETAS, DECAY, LR, installed_version, missing
from .peers import shard_fsdp2
from .peers_deepspeed import deepspeed_zero
from .trainer import Trainer, make_trainer

SEQ_LEN = 64  # in the iteration that makes the state; no parameter's shape depends on it


class Job(NamedTuple):
    """A mode's functions, which take a path and are collective. ``save_async`` returns a function that waits."""

    trainer: Trainer
    save: Callable[[Path], object]
    load: Callable[[Path], object]
    save_async: Callable[[Path], Callable[[], object]] | None = None


def trainer_of(forward: Any, optimizer: Any) -> Trainer:
    return make_trainer(forward, optimizer, lambda _: None, argparse.Namespace(clip=False))


def through_lion_dist(model: nn.Module, optimizer: Lion | ShardedLion) -> Job:
    return Job(
        trainer_of(model, optimizer),
        lambda path: checkpoint.save(path, model, optimizer),
        lambda path: checkpoint.load(path, model, optimizer),
        lambda path: checkpoint.async_save(path, model, optimizer).result,
    )


def through_dcp(model: nn.Module, optimizer: Lion) -> Job:
    """torch.distributed.checkpoint as in torch's tutorials, with its own storage."""
    beside = dist.new_group(backend="gloo")

    def state() -> dict[str, Any]:
        weights, momenta = get_state_dict(model, optimizer)
        return {"model": weights, "optim": momenta}

    def load(path: Path) -> None:
        found = state()
        dcp_load(found, checkpoint_id=path)
        set_state_dict(model, optimizer, model_state_dict=found["model"], optim_state_dict=found["optim"])

    def save_async(path: Path) -> Callable[[], object]:
        pending: Any = dcp_async_save(state(), checkpoint_id=path, process_group=beside)
        wait: Callable[[], object] = pending.result
        return wait

    return Job(trainer_of(model, optimizer), lambda path: dcp_save(state(), checkpoint_id=path), load, save_async)


def lion_of(model: LanguageModel) -> Lion:
    return Lion(model.groups(DECAY), lr=LR, betas=BETAS)


def wrap_in_ddp(model: LanguageModel) -> DistributedDataParallel:
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def zero2(model: LanguageModel) -> Job:
    return through_lion_dist(model, ShardedLion(model.groups(DECAY), lr=LR, betas=BETAS, stage=2))


def ddp(model: LanguageModel) -> Job:
    return through_lion_dist(wrap_in_ddp(model), lion_of(model))


def dcp_ddp(model: LanguageModel) -> Job:
    return through_dcp(wrap_in_ddp(model), lion_of(model))


def fsdp2(model: LanguageModel) -> Job:
    shard_fsdp2(model, reshard=True)
    return through_lion_dist(model, lion_of(model))


def dcp_fsdp2(model: LanguageModel) -> Job:
    shard_fsdp2(model, reshard=True)
    return through_dcp(model, lion_of(model))


def zero_redundancy(model: LanguageModel) -> Job:
    optimizer = ZeroRedundancyOptimizer(model.groups(DECAY), Lion, lr=LR, betas=BETAS)

    def save(path: Path) -> None:
        optimizer.consolidate_state_dict(0)
        if dist.get_rank() == 0:
            path.mkdir()
            torch.save({"model": model.state_dict(), "optim": optimizer.state_dict()}, path / "state.pt")

    def load(path: Path) -> None:
        saved = torch.load(path / "state.pt", weights_only=True, map_location="cpu", mmap=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optim"])

    return Job(trainer_of(wrap_in_ddp(model), optimizer), save, load)


def deepspeed_zero2(model: LanguageModel) -> Job:
    trainer = deepspeed_zero(model, argparse.Namespace(sequences=1, clip=False), stage=2, ours=True)
    engine: Any = trainer.forward

    def load(path: Path) -> None:
        found, _ = engine.load_checkpoint(path)
        assert found is not None

    return Job(trainer, engine.save_checkpoint, load)


class Mode(NamedTuple):
    """``fsync``: whether a save itself waits for the disk. ``distribution``: the package it needs, for pip; or ""."""

    make: Callable[[LanguageModel], Job]
    what: str
    fsync: bool
    distribution: str = ""


MODES = {
    "zero2": Mode(zero2, "ShardedLion stage 2: lion_dist.checkpoint", True),
    "ddp": Mode(ddp, "DDP + Lion: lion_dist.checkpoint", True),
    "dcp_ddp": Mode(dcp_ddp, "DDP + Lion: torch.distributed.checkpoint", True),
    "fsdp2": Mode(fsdp2, "FSDP2 + Lion: lion_dist.checkpoint", True),
    "dcp_fsdp2": Mode(dcp_fsdp2, "FSDP2 + Lion: torch.distributed.checkpoint", True),
    "zero_redundancy": Mode(
        zero_redundancy, "DDP + ZeroRedundancyOptimizer of Lion: consolidate_state_dict and torch.save", False
    ),
    "deepspeed_zero2": Mode(deepspeed_zero2, "DeepSpeed ZeRO-2, lion_dist's Lion: save_checkpoint", False, "deepspeed"),
}


@dataclass
class Turn:
    """Seconds on the slowest rank, and bytes on the disk. 0: the mode cannot do that."""

    save_s: float
    save_synced_s: float
    load_s: float
    nbytes: float
    waits_s: float = 0.0
    async_synced_s: float = 0.0


def meet(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def sync_to_disk(folder: Path) -> None:
    """Calls fsync on every file; those that are on the disk already cost next to nothing."""
    for path in files_in(folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def time_save(save: Callable[[Path], object], path: Path, device: torch.device) -> tuple[float, float]:
    """(seconds until the call has returned on every rank, seconds until the bytes are on the disk)."""
    meet(device)
    start = time.perf_counter()
    save(path)
    meet(device)
    returned = time.perf_counter() - start
    if dist.get_rank() == 0:
        sync_to_disk(path)
    dist.barrier()
    return returned, time.perf_counter() - start


def local_weights(model: nn.Module) -> list[Tensor]:
    params = (p.detach() for p in model.parameters())
    return [p.to_local() if isinstance(p, DTensor) else p for p in params]


def take_turn(job: Job, model: nn.Module, folder: Path, device: torch.device) -> Turn:
    path, beside = folder / "saved", folder / "beside"
    weights = local_weights(model)
    sums = [w.double().sum().item() for w in weights]
    save_s, save_synced_s = time_save(job.save, path, device)
    nbytes = sum(file.stat().st_size for file in files_in(path))
    torch._foreach_zero_(weights)
    meet(device)
    start = time.perf_counter()
    job.load(path)
    meet(device)
    turn = Turn(save_s, save_synced_s, time.perf_counter() - start, nbytes)
    if [w.double().sum().item() for w in local_weights(model)] != sums:
        raise RuntimeError(f"{path}: the loaded weights differ from the saved ones, by their sums")
    if job.save_async is not None:
        save_async = job.save_async

        def save_beside(to: Path) -> None:
            start = time.perf_counter()
            wait = save_async(to)
            turn.waits_s = time.perf_counter() - start
            wait()

        _, turn.async_synced_s = time_save(save_beside, beside, device)
    worst = torch.tensor(list(asdict(turn).values()), dtype=torch.float64, device=device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return Turn(*worst.tolist())


def run_rank(rank: int, mode: str, options: argparse.Namespace, rendezvous: str, out: str) -> None:
    if options.cpu:
        device = torch.device("cpu")
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=options.ranks)
    else:
        device = join_group(rank, options.ranks, rendezvous)
    torch.manual_seed(0)
    with device:
        model = LanguageModel(llama(options))
    job = MODES[mode].make(model)
    job.trainer.backward(job.trainer.forward(torch.zeros(1, SEQ_LEN, dtype=torch.long, device=device)))
    job.trainer.step()
    turns = []
    for number in range(options.repeats):
        folder = Path(options.folder) / f"{mode}-{number}"
        if rank == 0:
            folder.mkdir()
        dist.barrier()
        turns.append(asdict(take_turn(job, model, folder, device)))
        dist.barrier()
        if rank == 0:
            shutil.rmtree(folder)
    if rank == 0:
        Path(out).write_text(json.dumps(turns))
    dist.barrier()
    dist.destroy_process_group()


def llama(options: argparse.Namespace) -> Llama:
    width = options.width
    heads, kv_heads = width // 64, max(1, width // 256)
    return Llama(
        layers=options.layers, width=width, heads=heads, kv_heads=kv_heads, ffn=4 * width, seq_len=SEQ_LEN
    )  # fmt: skip


def run_mode(mode: str, options: argparse.Namespace) -> list[Turn]:
    if reason := missing(MODES[mode].distribution):
        raise RuntimeError(reason)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "turns.json"
        try:
            run_ranks(run_rank, (mode, options, f"{folder}/rendezvous", str(out)), options.ranks)
        finally:
            for left in Path(options.folder).glob(f"{mode}-*"):
                shutil.rmtree(left, ignore_errors=True)
        return [Turn(**turn) for turn in json.loads(out.read_text())]


def row(mode: str, turns: list[Turn], nbytes: int) -> str:
    medians = Turn(*(statistics.median(values) for values in zip(*(asdict(t).values() for t in turns), strict=True)))

    def rate(seconds: float) -> str:
        return f"{seconds:.2f} ({nbytes / 1e9 / seconds:.2f})" if seconds else ""

    _, what, fsync, distribution = MODES[mode]
    version = f" ({distribution} {installed_version(distribution)})" if distribution else ""
    cells = [
        f"{what}{version} (`{mode}`)", f"{medians.nbytes / 1e9:.2f}", "yes" if fsync else "no", f"{medians.save_s:.2f}",
        rate(medians.save_synced_s), rate(medians.load_s), f"{medians.waits_s:.2f}" if medians.waits_s else "",
        rate(medians.async_synced_s),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="where to save; the benchmark removes what it has saved")
    parser.add_argument("--modes", default=",".join(MODES), help=f"of {', '.join(MODES)}")
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count())
    parser.add_argument("--layers", type=int, default=Llama.layers)
    parser.add_argument("--width", type=int, default=Llama.width, help="a multiple of 64")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cpu", action="store_true", help="run on CPUs, with gloo")
    parser.add_argument("--json", type=Path, help="write every turn here")
    options = parser.parse_args()
    Path(options.folder).mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        nbytes = 8 * sum(p.numel() for p in LanguageModel(llama(options)).parameters())
    where = f"{options.ranks} CPU processes" if options.cpu else machine(options.ranks)
    print(
        f"{datetime.date.today()}, {where}, torch {torch.__version__}, {nbytes / 1e9:.3f} GB of state, seconds (GB/s),"
    )
    print(f"medians of {options.repeats}")
    print("| | on disk, GB | fsync | save | on disk after | load | async save: training waits | on disk after |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    found = {}
    for mode in options.modes.split(","):
        try:
            found[mode] = run_mode(mode, options)
            print(row(mode, found[mode], nbytes), flush=True)
        except Exception as error:
            print(f"| {MODES[mode].what} (`{mode}`) | {str(error).strip().splitlines()[-1]} |||||||", flush=True)
    if options.json:
        options.json.write_text(json.dumps({mode: [asdict(t) for t in of] for mode, of in found.items()}, indent=1))


if __name__ == "__main__":
    main()
