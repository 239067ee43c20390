"""The main job as a user starts it: every strategy, a killed run resumed, and what it says to bad options.

The data and the model are small: these runs are about the machinery. Under torchrun they are skipped, since they start
processes themselves.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard

from lion_dist import checkpoint, decay_groups
from tests.asserts import momentum_parts
from tests.examples.runs import (
    LAST_LINE,
    ROOT,
    arguments,
    assert_same_checkpoint,
    await_checkpoint,
    errors_of,
    kill_after_checkpoint,
    on_proc,
    run,
    run_well,
    start,
    step_of,
    workers,
)
from tests.harness import DEADLINE_S, device_of, run_ranks, spawn_only


def statistics_of(out: Path) -> dict[str, float]:
    """The numbers of the last step."""
    last: dict[str, float] = json.loads((out / "statistics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 24
    return last


@spawn_only
def test_strategies_train_alike(tmp_path: Path) -> None:
    """Two ranks average the same gradients whatever the strategy; their norm for clipping is not the same
    to the last bit (torch's is float32), so the losses agree and the bits need not."""
    losses, numbers = {}, {}
    for strategy, ranks in (("single", 0), ("ddp", 2), ("zero1", 2), ("zero2", 2)):
        out = tmp_path / strategy
        options = "--strategy", strategy, "--statistics"
        val_loss, unigram, bigram, tokens_per_s, peak_mib = run_well(ranks, out, *options)
        assert 0 < bigram < unigram < 5.55  # ln 256
        assert val_loss < 5.55
        assert tokens_per_s > 0
        assert peak_mib > 0
        assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
        assert (out / "statistics.png").read_bytes().startswith(b"\x89PNG")
        losses[strategy], numbers[strategy] = val_loss, statistics_of(out)
    assert losses["ddp"] == pytest.approx(losses["zero1"], abs=2e-3)
    # The slices, and so the norm that the coefficient comes from, are those of stage 1: the same bits.
    assert losses["zero2"] == losses["zero1"]
    assert numbers["zero2"] == pytest.approx(numbers["zero1"], rel=1e-12)
    assert numbers["ddp"] == pytest.approx(numbers["zero1"], rel=1e-2)
    assert losses["single"] == pytest.approx(losses["ddp"], abs=0.5)  # half the data a step

    # FSDP: from the beginning, and then each strategy goes on from the last but one checkpoint of the one before it.
    out = tmp_path / "fsdp1"
    assert run_well(2, out, "--strategy", "fsdp1", "--statistics")[0] == pytest.approx(losses["ddp"], abs=2e-3)
    assert statistics_of(out) == pytest.approx(numbers["ddp"], rel=1e-2)
    resumed = {}
    for strategy, ranks, step, every in (
        ("fsdp2", 2, 18, 3), ("zero2", 2, 21, 2), ("hsdp", 4, 22, 6), ("hybrid", 4, 22, 6), ("ddp", 3, 22, 6),
        ("single", 0, 22, 6),
    ):  # fmt: skip
        shutil.rmtree(checkpoint.latest(out))
        assert step_of(out) == step
        loss = run_well(
            ranks, out, "--resume", "--strategy", strategy, "--checkpoint-every", str(every), "--statistics"
        )[0]
        resumed[strategy] = loss
        if ranks == 2:  # else a step's data are others
            assert statistics_of(out) == pytest.approx(numbers["ddp"], rel=1e-2), strategy
            assert loss == pytest.approx(losses["ddp"], abs=2e-3), strategy
        assert step_of(out) == 24
    assert resumed["hybrid"] == pytest.approx(resumed["hsdp"], abs=2e-3)  # of the same data


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def body_meshes(rank: int, world_size: int, out: Path) -> None:
    sys.path.insert(0, str(ROOT / "examples"))
    from config import Config, make_parser
    from model import GPT
    from strategies import STRATEGIES

    def made(name: str, *more: str) -> tuple[Any, dict[str, int]]:
        """A strategy, and the number of elements of each parameter."""
        given = arguments(out, "--strategy", name, *more)
        options = vars(make_parser(given).parse_args(given))
        del options["preset"]
        config = Config(**options)
        model = GPT(config.model()).to(device_of(rank, world_size))
        whole = {name: p.numel() for name, p in model.named_parameters()}
        return STRATEGIES[name](model, decay_groups(model, 0.1), config), whole

    strategy, whole = made("hsdp")
    for name, p in strategy.model.named_parameters():
        assert isinstance(p, DTensor), name
        assert tuple(p.device_mesh.shape) == (2, 2), name
        assert p.placements == (Replicate(), Shard(0)), name
        assert p.to_local().numel() == whole[name] // 2, name
    halves, nodes = [0, 1] if rank < 2 else [2, 3], [0, 2] if rank % 2 == 0 else [1, 3]
    for ranks_of_node, options, shards, replicas in (
        ("4", (), halves, nodes),
        ("2", (), halves, nodes),
        ("1", (), [rank], [0, 1, 2, 3]),
        ("2", ("--replicas", "1"), [0, 1, 2, 3], [rank]),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LOCAL_WORLD_SIZE", ranks_of_node)
            strategy, whole = made("hybrid", *options)
        for name, p in strategy.model.named_parameters():
            assert isinstance(p, DTensor), name
            assert p.device_mesh.mesh.tolist() == shards, name
            assert p.placements == (Shard(0),), name
        assert dist.get_process_group_ranks(strategy.optimizer.process_group) == replicas
        numel = sum(part.numel() for part in momentum_parts(strategy.optimizer))
        momenta = torch.tensor(numel, device=device_of(rank, world_size))
        dist.all_reduce(momenta)
        assert momenta == sum(whole.values()), "each element on one rank"


def test_meshes_of_hsdp_and_hybrid(tmp_path: Path) -> None:
    run_ranks(body_meshes, 4, tmp_path, (tmp_path,))


@spawn_only
@on_proc
def test_a_killed_hybrid_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    short = ("--steps", "12", "--checkpoint-every", "2", "--layers", "1", "--seq-len", "16", "--eval-windows", "4")
    precision = ("--dtype", "bf16", "--master-weights", "--momentum", "int8", "--param-sync", "signs")
    options = ("--strategy", "hybrid", *short, *precision)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_well(4, whole, *options)
    assert kill_after_checkpoint(4, killed, *options) < 12
    run_well(4, killed, "--resume", *options)
    assert_same_checkpoint(killed, whole)


@spawn_only
@on_proc
@on_gpu
def test_killed_run_resumes_on_gpus(tmp_path: Path) -> None:
    """With --deterministic, which a GPU needs for it; autocast to bfloat16, NCCL."""
    ranks = min(2, torch.cuda.device_count())
    options = ("--device", "cuda", "--deterministic", "--steps", "200")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_well(ranks, whole, *options)
    assert kill_after_checkpoint(ranks, killed, *options) < 200
    run_well(ranks, killed, "--resume", *options)
    assert_same_checkpoint(killed, whole)


@spawn_only
@on_proc
def test_a_run_that_is_killed_and_stopped_ends_with_the_same_weights(tmp_path: Path) -> None:
    """All of it is killed; resumed under torchrun, one rank is killed, and torchrun's restart goes on; there one rank
    gets SIGTERM, all save in one step and end well; and it is resumed once more. The weights are those of a run that
    nobody disturbed."""
    whole, out, steps = tmp_path / "whole", tmp_path / "out", ("--steps", "64")
    run_well(2, whole, *steps)
    killed_at = kill_after_checkpoint(2, out, *steps)
    process = start(2, out, "--resume", *steps, torchrun=("--max_restarts", "2"))

    def runs() -> bool:
        return process.poll() is None

    try:
        await_checkpoint(runs, out, after=killed_at)
        os.kill(workers(process.pid)[0], signal.SIGKILL)
        crashed_at = step_of(out)
        await_checkpoint(runs, out, after=crashed_at)
        os.kill(workers(process.pid)[1], signal.SIGTERM)
        said, _ = process.communicate(timeout=DEADLINE_S)
    finally:
        process.kill()
    assert process.returncode == 0, errors_of(out).read_text()
    assert "stopped by SIGTERM after step" in said
    assert killed_at < crashed_at < step_of(out) < 64  # else there was nothing left to resume
    run_well(2, out, "--resume", *steps)
    assert_same_checkpoint(out, whole)
    assert len(checkpoint.checkpoints(out)) == 2  # the last two are kept, and nothing unfinished
    assert not list(out.glob(".*"))


def test_long_steps_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from stopping import Stopping

    device, handler = torch.device("cpu"), signal.getsignal(signal.SIGTERM)
    try:
        for seconds, asks in ((3.0, [2]), (0.4, [2, 3]), (0.001, list(range(2, 12)))):
            stopping = Stopping(steps=10)
            assert not stopping.agreed(1, seconds, device)
            stopping._asked = True
            assert [stopping.agreed(step, seconds, device) for step in asks] == [False] * (len(asks) - 1) + [True]
    finally:
        signal.signal(signal.SIGTERM, handler)


@spawn_only
def test_a_restart_that_one_node_has_counted_is_one_for_all(tmp_path: Path) -> None:
    """torchrun counts it where a rank has failed; on other nodes it looks like a start."""
    out, options = tmp_path / "out", ("--steps", "4", "--checkpoint-every", "2")
    run_well(2, out, *options)
    code, said, errors = run(2, out, *options, restarts=(0, 1))
    assert code == 0, errors
    assert LAST_LINE.fullmatch(said.splitlines()[-1])
    code, _, errors = run(2, out, *options)
    assert code == 2
    assert "has checkpoints of an earlier run" in errors


def body_other_data(rank: int, world_size: int) -> None:
    sys.path.insert(0, str(ROOT / "examples"))
    from data import Corpus
    from train import World, check_same_data

    world, nothing = World(rank, world_size, device_of(rank, world_size)), torch.empty(0)
    check_same_data(Corpus("text", nothing, nothing, "ab" * 32), world)
    with pytest.raises(ValueError, match=r"text has other bytes on ranks \[1\] than on rank 0"):
        check_same_data(Corpus("text", nothing, nothing, ("cd" if rank == 1 else "ab") * 32), world)


def test_ranks_with_other_data_are_refused_everywhere(tmp_path: Path) -> None:
    run_ranks(body_other_data, 3, tmp_path)


@spawn_only
def test_bad_options_say_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.chdir(ROOT)
    from train import main

    out = tmp_path / "out"

    def refused(*options: str) -> str:
        with pytest.raises(SystemExit) as error:
            main(arguments(out, "--strategy", "single", *options))
        assert error.value.code == 2
        return capsys.readouterr().err

    config = ["--deepspeed_config", str(ROOT / "launch/deepspeed/zero2.json")]
    for options, message in (
        (["--resume"], "nothing to resume"),
        (["--strategy", "zero9"], "--strategy must be one of"),
        (["--param-sync", "sings"], "--param-sync must be one of"),
        (["--dtype", "fp8"], "--dtype must be one of fp32, bf16"),
        (["--momentum", "int4"], "--momentum must be one of auto, float32"),
        (["--data", str(tmp_path / "absent")], "absent"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--lr", "-1"], "--lr must be at least 0"),
        (["--beta2", "1"], "--beta2 must be less than 1"),
        (["--replicas", "-1"], "--replicas must be at least 0"),
        (["--strategy", "deepspeed", *config, "--statistics"], "--statistics is not for --strategy deepspeed"),
        (["--replicas", "2"], "--replicas 2 does not divide the 1 processes"),
    ):
        assert message in refused(*options)
        assert not checkpoint.checkpoints(out)
    # A run that ends before its first measurement draws none.
    run_well(0, out, "--strategy", "single", "--steps", "1", "--statistics", "--log-every", "2")
    assert not (out / "statistics.png").exists()
    assert "has checkpoints of an earlier run" in refused("--steps", "1")
    assert "steps is 1 in the checkpoint, 2 now" in refused("--steps", "2", "--resume")
    assert "dtype is 'fp32' in the checkpoint, 'bf16' now" in refused("--steps", "1", "--dtype", "bf16", "--resume")
