"""Trains a small GPT on bytes with Lion, in one process or many, on CPUs (gloo) or GPUs (NCCL).

    torchrun --nproc_per_node 2 examples/train.py                 gradients and momentum sharded over two ranks
    torchrun --nproc_per_node 2 examples/train.py --resume        the same, after a crash or SIGTERM
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nproc_per_node 2 --max_restarts 3 examples/train.py
                                                                  continues by itself after a crash
    torchrun --nproc_per_node 4 examples/train.py --strategy hybrid --replicas 2
                                                                  each half of the ranks shards a copy of the model
    python examples/train.py --strategy single                    one process
    torchrun --nproc_per_node 2 examples/train.py --dtype bf16 --master-weights --momentum int8
                                                                  bfloat16 weights that learn as float32 weights do
    python examples/train.py --help

(With that variable torchrun makes a new store for each restart. Without it, at least up to torch 2.13, restarted ranks
find the addresses of ended processes in the old store, and fail or hang now and then.)

Losses and entropies are in nats per byte. The last line on stdout is

    val_loss=<loss> unigram=<entropy> bigram=<entropy> tokens_per_s=<of all ranks> peak_mib=<of rank 0>
"""

import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import cos, pi
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

import lion_dist.checkpoint
from checkpoint import KEPT, check_unused, find_checkpoint, path_of
from config import DTYPES, Config, make_parser
from data import Corpus, bigram_entropy, load_corpus, training_batch, unigram_entropy, validation_batches
from model import GPT
from report import History, peak_mib, printable, save_curve, save_statistics, write_line
from stopping import Stopping
from strategies import STRATEGIES
from strategies.single import Single


@dataclass(frozen=True)
class World:
    """This process: its rank among the `size` processes of the run, and its device."""

    rank: int
    size: int
    device: torch.device


def find_world(config: Config) -> World:
    """Reads what torchrun has set (without torchrun: a single process) and selects this rank's device.

    Raises:
        ValueError: the strategy or the machine does not allow this number of processes.
    """
    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    rank, size, local_rank, local_size = (int(os.environ.get(name, alone)) for name, alone in names.items())
    if config.strategy == "single" and size > 1:
        raise ValueError(
            f"--strategy single is for one process, but WORLD_SIZE is {size}: start it as "
            "`python examples/train.py --strategy single`, or choose another strategy"
        )
    if config.replicas and size % config.replicas:
        raise ValueError(
            f"--replicas {config.replicas} does not divide the {size} processes: give a divisor of it, or leave it out "
            "for one replica on each node"
        )
    if config.device == "cpu":
        # torchrun gives every rank one thread. Divide the cores among the ranks instead.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
        return World(rank, size, torch.device("cpu"))
    if config.device != "cuda":
        raise ValueError(f"--device must be cpu or cuda, got {config.device!r}")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} here for {local_size} processes; start "
            "fewer of them, or use --device cpu"
        )
    torch.cuda.set_device(local_rank)
    return World(rank, size, torch.device("cuda", local_rank))


def start_process_group(world: World) -> None:
    on_gpu = world.device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method="env://" if "RANK" in os.environ else "tcp://127.0.0.1:0",  # without torchrun: a group of one
        rank=world.rank,
        world_size=world.size,
        device_id=world.device if on_gpu else None,
    )


def leave_together(world: World) -> None:
    """Ends the process group when every rank has finished with it: gloo fails a rank whose peer has left.

    It waits through the store and not by dist.barrier(): a thread of gloo's may still be leaving the barrier while
    Python shuts down, and abort the process.
    """
    store = dist.distributed_c10d._get_default_store()
    for stage in ("finished", "left"):  # twice, because the first rank may be the store's server and must leave last
        store.set(f"{stage}/{world.rank}", "")
        if stage == "finished" or world.rank == 0:
            store.wait([f"{stage}/{rank}" for rank in range(world.size)])
    dist.destroy_process_group()


def lr_factor(step: int, warmup: int, steps: int) -> float:
    """The learning rate as a fraction of its peak: a linear warm-up, then half a cosine down to a tenth."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * cos(pi * (step - warmup) / max(1, steps - warmup))


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts the parameters in place. The buffers stay float32: they are the angles of the rotary embeddings."""
    for p in model.parameters():
        p.data = p.data.to(dtype)


def loss_on(
    module: nn.Module, windows: Tensor, config: Config, device: torch.device, reduction: str = "mean"
) -> Tensor:
    """The loss of predicting each byte of a window, except the first, from the bytes before it.

    On a GPU matrices multiply in bfloat16: float32 weights by way of autocast, bfloat16 weights as they are.
    """
    windows = windows.to(device, non_blocking=True).long()
    with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda" and config.dtype == "fp32"):
        logits = module(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten(), reduction=reduction)


def train_step(strategy: Single, corpus: Corpus, config: Config, world: World, step: int) -> Tensor:
    """Accumulates gradients, clips and steps. Returns the mean loss of this rank's windows, on the device."""
    strategy.zero_grad()
    mean_loss = torch.zeros((), device=world.device)
    for micro_step in range(config.accumulation):
        place = {"seed": config.seed, "step": step, "micro_step": micro_step, "rank": world.rank}
        windows = training_batch(corpus.train, config.batch_size, config.seq_len, **place)
        last = micro_step == config.accumulation - 1
        with nullcontext() if last else strategy.no_sync():
            loss = loss_on(strategy.wrapped, windows, config, world.device) / config.accumulation
            strategy.backward(loss, last)
        mean_loss += loss.detach()
    strategy.step(config.clip)
    return mean_loss


@torch.no_grad()
def evaluate(model: nn.Module, corpus: Corpus, config: Config, world: World) -> float:
    """The mean loss over the validation windows, which are divided among the ranks. Every rank must call it."""
    total = torch.zeros(2, dtype=torch.float64, device=world.device)  # sum of losses, number of bytes
    share = {"rank": world.rank, "world_size": world.size}
    for windows in validation_batches(
        corpus.validation, config.eval_windows, config.batch_size, config.seq_len, **share
    ):
        total[0] += loss_on(model, windows, config, world.device, reduction="sum")
        total[1] += len(windows) * config.seq_len
    if world.size > 1:
        dist.all_reduce(total)
    return float(total[0] / total[1])


def check_replicas(model: nn.Module) -> None:
    """Raises RuntimeError unless every rank's model has the same bits as rank 0's. Every rank must call it."""
    differ = torch.zeros((), device=next(model.parameters()).device)
    for p in model.parameters():
        theirs = p.detach().clone()
        dist.broadcast(theirs, src=0)
        differ += not torch.equal(p, theirs)
    dist.all_reduce(differ)
    if differ:
        raise RuntimeError(f"the replicas differ from rank 0's in {int(differ)} parameters, counted over all ranks")


def train(config: Config, world: World, corpus: Corpus, resumed: Path | None) -> str:
    """Runs the training, in a process group if the strategy needs one. Returns the line that summarises it."""
    stopping = Stopping(steps=config.log_every)
    torch.manual_seed(config.seed)
    model = GPT(config.model()).to(world.device)
    cast_parameters(model, DTYPES[config.dtype])
    parameters = sum(p.numel() for p in model.parameters())  # counted before they are sharded
    groups = lion_dist.decay_groups(model, config.weight_decay)
    strategy = STRATEGIES[config.strategy](model, groups, config)
    scheduler = LambdaLR(strategy.optimizer, lambda step: lr_factor(step, config.warmup, config.steps))
    first_step, history = 0, History(train=[], validation=[])
    if resumed:
        strategy.load(resumed, scheduler)
        extra = lion_dist.checkpoint.read_extra(resumed)
        first_step, history = extra["step"], extra["history"]

    writes = world.rank == 0  # this rank prints and draws for all
    statistics = config.folder / "statistics.jsonl"
    if writes and not resumed:
        statistics.unlink(missing_ok=True)
    bar = tqdm(total=config.steps, initial=first_step, unit="step", disable=not writes, mininterval=1.0)
    unigram, bigram = unigram_entropy(corpus.validation), bigram_entropy(corpus.validation)
    read_per_step = world.size * config.accumulation * config.batch_size * config.seq_len
    if writes:
        bar.write(
            f"{config.strategy} on {world.size} x {world.device.type}, steps {first_step} to {config.steps}: "
            f"{parameters:,} parameters; a step reads {read_per_step:,} bytes of text "
            f"and each rank sends {strategy.bytes_sent_per_step(world.size, config.accumulation):,} bytes (calculated)"
        )
        bar.write(
            f"{corpus.name}: {len(corpus.train):,} bytes to train on, {len(corpus.validation):,} held out, of unigram "
            f"entropy {unigram:.4f} and bigram entropy {bigram:.4f}"
        )

    seconds, clock = 0.0, time.perf_counter()  # of training, without validation and checkpoints
    for step in range(first_step, config.steps):
        done = step + 1
        strategy.measures = config.statistics and done % config.log_every == 0
        loss = train_step(strategy, corpus, config, world, step)
        scheduler.step()
        bar.update()
        if writes and done % config.log_every == 0:
            history["train"].append((done, loss.item()))
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            if strategy.measures:
                write_line(statistics, {"step": done, **strategy.numbers})
        evaluates, saves = (done % n == 0 or done == config.steps for n in (config.eval_every, config.checkpoint_every))
        a_step = (seconds + time.perf_counter() - clock) / (done - first_step)
        stops = done < config.steps and stopping.agreed(done, a_step, world.device)
        if done == config.steps:
            stopping.finish()
        if evaluates or saves or stops:
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            seconds += time.perf_counter() - clock
            if evaluates:
                val_loss = evaluate(strategy.model, corpus, config, world)
                history["validation"].append((done, val_loss))
                if writes:
                    bar.write(f"step {done}: val_loss {val_loss:.4f} (unigram {unigram:.4f}, bigram {bigram:.4f})")
            if saves or stops:
                extra = {"step": done, "history": history, "run": identity(config, corpus)}
                strategy.save(path_of(config.folder, done), scheduler, extra, keep_last=KEPT)
            clock = time.perf_counter()
        if stops:
            bar.close()
            return f"stopped by SIGTERM after step {done}: --resume continues"
    bar.close()

    if strategy.replicated and world.size > 1:
        check_replicas(model)
    val_loss, weights = history["validation"][-1][1], strategy.model_state()
    if writes:
        curve = config.folder / "curve.png"
        save_curve(curve, history, unigram, bigram, f"{config.strategy} on {world.size} x {world.device.type}")
        if config.statistics and statistics.exists():  # no step was measured if --log-every is more than --steps
            save_statistics(config.folder / "statistics.png", statistics)
        prompt = bytes(corpus.validation[:64].tolist())
        writer = GPT(config.model()).to(world.device)  # a whole model, since the trained one may be sharded
        writer.load_state_dict(weights)
        text = writer.generate(prompt, config.sample, seed=config.seed)
        if strategy.replicated and world.size > 1:
            print(f"the weights are the same bits on all {world.size} ranks")
        print(f"curve: {curve}\nsample, after the first {len(prompt)} bytes held out:\n{printable(text)}")
    tokens_per_s = (config.steps - first_step) * read_per_step / seconds if seconds else 0.0
    return (
        f"val_loss={val_loss:.4f} unigram={unigram:.4f} bigram={bigram:.4f} "
        f"tokens_per_s={tokens_per_s:.0f} peak_mib={peak_mib(world.device):.0f}"
    )


def identity(config: Config, corpus: Corpus) -> dict[str, Any]:
    return {**config.identity(), "data (sha256)": corpus.digest}


def restarted(world: World) -> bool:
    """Whether torchrun has restarted the ranks after a failure. Its count rises only on the node that failed."""
    count = torch.tensor(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), device=world.device)
    if dist.is_initialized():
        dist.all_reduce(count, op=dist.ReduceOp.MAX)
    return count.item() > 0


def check_same_data(corpus: Corpus, world: World) -> None:
    """Raises ValueError, on every rank, where one has other bytes than rank 0. Where no --data is given, these are the
    sources of each node's own Python."""
    if world.size == 1:
        return
    own = torch.frombuffer(bytearray.fromhex(corpus.digest), dtype=torch.uint8).to(world.device)
    digests = [torch.empty_like(own) for _ in range(world.size)]
    dist.all_gather(digests, own)
    if others := [rank for rank, digest in enumerate(digests) if not torch.equal(digest, digests[0])]:
        raise ValueError(
            f"{corpus.name} has other bytes on ranks {others} than on rank 0: give all nodes the same files with --data"
        )


def where_to_start(config: Config, corpus: Corpus, is_restart: bool) -> Path | None:
    """Returns the checkpoint to continue from; None: the run begins from the start."""
    if config.resume or (is_restart and lion_dist.checkpoint.checkpoints(config.folder)):
        return find_checkpoint(config.folder, identity(config, corpus))
    if not is_restart:
        check_unused(config.folder)
    return None


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(argv)
    options = vars(parser.parse_args(argv))
    del options["preset"]
    try:
        config = Config(**options)
        world = find_world(config)
        corpus = load_corpus(config.data, config.seq_len)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if config.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
    alone = config.strategy == "single"  # in no process group: Lion itself never communicates
    if not alone:
        start_process_group(world)
    try:
        check_same_data(corpus, world)
        resumed = where_to_start(config, corpus, restarted(world))
        config.folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    summary = train(config, world, corpus, resumed)
    if not alone:
        leave_together(world)
    if world.rank == 0:
        print(summary, flush=True)


if __name__ == "__main__":
    main()
