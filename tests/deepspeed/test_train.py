"""examples/train.py --strategy deepspeed: its training loop on the harness's ranks, stopped and resumed."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

from lion_dist import checkpoint
from tests.asserts import assert_same_bits
from tests.examples.runs import LAST_LINE, ROOT, TINY
from tests.harness import device_of, run_ranks
from tests.marks import skip_module_without

from .common import start_deepspeed

skip_module_without("deepspeed")


def argv(out: Path, *options: str) -> list[str]:
    small = {**TINY, "steps": 12, "checkpoint-every": 4, "out": out}
    strategy = [] if any(option.startswith("--strategy") for option in options) else ["--strategy=deepspeed"]
    return [*(f"--{name}={value}" for name, value in small.items()), *strategy, *options]


class Stopped(Exception):
    pass


def body_train(rank: int, world_size: int, folder: Path) -> None:
    start_deepspeed(rank, world_size)
    sys.path.insert(0, str(ROOT / "examples"))
    import train
    from config import Config, make_parser
    from data import load_corpus
    from strategies import STRATEGIES
    from strategies.deepspeed import DeepSpeed

    class Shown(DeepSpeed):
        """Keeps the weights that a run ends with."""

        weights: dict[str, Tensor]

        def model_state(self) -> dict[str, Tensor]:
            Shown.weights = super().model_state()
            return Shown.weights

    STRATEGIES["deepspeed"] = Shown

    def run(out: Path, *options: str) -> str:
        dist.barrier()
        given = argv(out, f"--device={device_of(rank, world_size).type}", *options)
        parsed = vars(make_parser(given).parse_args(given))
        del parsed["preset"]
        config = Config(**parsed)
        out.mkdir(exist_ok=True)
        world = train.World(rank, world_size, device_of(rank, world_size))
        corpus = load_corpus(config.data, config.seq_len)
        return train.train(config, world, corpus, train.where_to_start(config, corpus, False))

    train_step = train.train_step

    def stop(*args: Any) -> Any:
        if args[-1] == 6:
            raise Stopped
        return train_step(*args)

    def options(name: str) -> tuple[str, str]:
        return "--deepspeed_config", str(ROOT / "launch/deepspeed" / f"{name}.json")

    for name in ("zero1", "zero2_offload"):
        assert LAST_LINE.fullmatch(run(folder / name, *options(name), "--steps=2"))
    assert LAST_LINE.fullmatch(run(folder / "whole", *options("zero3")))
    whole = Shown.weights
    vars(train)["train_step"] = stop
    with pytest.raises(Stopped):
        run(folder / "stopped", *options("zero3"))
    vars(train)["train_step"] = train_step
    run(folder / "stopped", *options("zero3"), "--resume")
    assert whole.keys() == Shown.weights.keys()
    for name, weight in whole.items():
        assert_same_bits(Shown.weights[name], weight, name)

    # What does not fit is refused on every rank, before anything is loaded.
    with pytest.raises(ValueError, match=r"'ZeRO stage': 3, 'ranks': 2}, and this run has {'ZeRO stage': 1"):
        run(folder / "stopped", *options("zero1"), "--resume")
    assert LAST_LINE.fullmatch(run(folder / "plain", "--strategy=zero2", "--steps=4"))
    with pytest.raises(ValueError, match="was not written by --strategy deepspeed"):
        run(folder / "plain", *options("zero3"), "--steps=4", "--resume")
    with pytest.raises(ValueError, match="was written by --strategy deepspeed, which has its own format"):
        run(folder / "stopped", "--strategy=zero2", "--resume")
    if rank == 0:
        shutil.rmtree(folder / "stopped/deepspeed/step-12")
    with pytest.raises(ValueError, match="step-12, which is missing"):
        run(folder / "stopped", *options("zero3"), "--resume")


def test_training_resumes_from_deepspeeds_own_files(tmp_path: Path) -> None:
    """Stopped in step 6, after the checkpoint of step 4: resumed, it ends with the bits of a run that was not. At stage
    3, where no rank has the model whole."""
    run_ranks(body_train, 2, tmp_path, (tmp_path,))
    whole, resumed = (checkpoint.read_extra(tmp_path / name / "step-12") for name in ("whole", "stopped"))
    assert whole["step"] == resumed["step"] == 12
    for name in ("whole", "stopped"):  # the last two are kept, over the restart too
        assert len(checkpoint.checkpoints(tmp_path / name)) == 2
    assert whole["scheduler"] == resumed["scheduler"]


def test_bad_options_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from config import Config

    with pytest.raises(ValueError, match="needs --deepspeed_config"):
        Config(strategy="deepspeed")
    with pytest.raises(ValueError, match="needs --deepspeed_config"):
        Config(strategy="ddp", deepspeed_config=tmp_path)
    with pytest.raises(ValueError, match="there is no file"):
        Config(strategy="deepspeed", deepspeed_config=tmp_path / "absent")
