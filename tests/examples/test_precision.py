"""The main job with bfloat16 weights, master weights and a momentum in 8 bits."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from lion_dist import Lion, checkpoint
from tests.examples.runs import ROOT, assert_same_checkpoint, last, run_well, step_of
from tests.harness import spawn_only

PRECISION = ("--dtype", "bf16", "--master-weights", "--momentum", "int8")


@spawn_only
def test_a_resumed_run_is_that_which_was_not_disturbed(tmp_path: Path) -> None:
    short = ("--layers", "1", "--seq-len", "16", "--checkpoint-every", "18", "--eval-windows", "2", "--sample", "4")
    options = ("--strategy", "single", *short, *PRECISION)
    whole, out = tmp_path / "whole", tmp_path / "out"
    loss = run_well(0, whole, *options)[0]
    shutil.copytree(whole, out)
    shutil.rmtree(checkpoint.latest(out))
    assert step_of(out) == 18
    assert run_well(0, out, "--resume", *options)[0] == loss
    assert_same_checkpoint(out, whole)
    history = checkpoint.read_extra(checkpoint.latest(out))["history"]
    assert history == checkpoint.read_extra(checkpoint.latest(whole))["history"]
    losses = [value for _, value in history["train"]]
    assert losses[-1] < losses[0] - 0.5  # it learns
    momenta = {name: t.dtype for name, t in last(whole).manifest.tensors.items() if name.endswith(".exp_avg")}
    assert momenta
    assert set(momenta.values()) == {"int8"}


def test_a_run_of_a_version_without_these_options_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the options' defaults, which stand for what that version did, and with no others."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from checkpoint import find_checkpoint
    from config import Config

    def options(config: Config) -> dict[str, object]:
        return {**config.identity(), "data (sha256)": "x"}

    earlier = {k: v for k, v in options(Config()).items() if k not in ("dtype", "master_weights", "momentum")}
    model, path = torch.nn.Linear(2, 2), tmp_path / "step-100"
    checkpoint.save(path, model, Lion(model.named_parameters()), extra={"run": earlier})
    assert find_checkpoint(tmp_path, options(Config())) == path
    for other, said in (
        (Config(dtype="bf16"), "dtype is 'fp32' in the checkpoint, 'bf16' now"),
        (Config(momentum="int8"), "momentum is 'auto' in the checkpoint, 'int8' now"),
        (Config(steps=7), "steps is 1000 in the checkpoint, 7 now"),
    ):
        with pytest.raises(ValueError, match=said):
            find_checkpoint(tmp_path, options(other))
