"""Runs of the checkpoints' toy with weights and momenta of any form, under any strategy."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor

from lion_dist import ShardedLion
from lion_dist.checkpoint.logical import flat_slices
from lion_dist.memory_order import flat
from lion_dist.update import codecs
from tests.asserts import assert_same_bits
from tests.scenarios.checkpoint_forms import MOMENTA, WEIGHTS
from tests.scenarios.checkpoint_toy import OVER_TWO_DIMENSIONS, Run

IN_PARTS = ("fsdp1", "fsdp2", *OVER_TWO_DIMENSIONS)  # strategies that cut parameters within blocks


class Way(NamedTuple):
    """A strategy, a key of WEIGHTS and one of MOMENTA."""

    strategy: str
    weights: str
    momentum: str

    def start(self, seed: int, ranks: dist.ProcessGroup | None) -> Run:
        dtype, master_weights = WEIGHTS[self.weights]
        return Run(
            self.strategy, seed, ranks, dtype, master_weights=master_weights, momentum_dtype=MOMENTA[self.momentum]
        )

    def needs_cast(self, saved: Way) -> bool:
        """Whether only cast=True loads what the other way saved."""
        bf16_alone = (self.weights == "bf16") != (saved.weights == "bf16") and self.weights != "master"
        return bf16_alone or (self.momentum != saved.momentum and "int8" not in (self.momentum, saved.momentum))

    def loses_nothing(self, saved: Way, same_cut: bool) -> bool:
        """Whether a run goes on with the bits of the one that the other way saved."""
        if self.momentum != saved.momentum or (
            self.weights != saved.weights and "bf16" in (self.weights, saved.weights)
        ):
            return False
        whole = self.strategy not in IN_PARTS and saved.strategy not in IN_PARTS
        if self.strategy == "fsdp1" and self.weights != saved.weights:
            same_cut = False  # FSDP1 lays parameters out by the bytes of their dtype, and blocks of a momentum follow
        return self.momentum != "int8" or whole or same_cut


def kept(run: Run) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights as exactly as they are kept, and momenta, by name, whole and in float32; a collective call."""
    if run.strategy in IN_PARTS:
        options = StateDictOptions(full_state_dict=True)
        weights: dict[str, Any] = get_model_state_dict(run.wrapped, options=options)
        state: Any = get_optimizer_state_dict(run.wrapped, run.optimizer, options=options)["state"]
    else:
        weights = run.model.state_dict()
        sharded = isinstance(run.optimizer, ShardedLion)
        entries = (run.optimizer.full_state_dict() if sharded else run.optimizer.state_dict())["state"]
        names = {id(p): n for n, p in run.model.named_parameters()}
        params = [p for group in run.optimizer.param_groups for p in group["params"]]
        state = {names[id(params[i])]: entry for i, entry in entries.items()}
    exact, momenta = {}, {}
    for name, entry in state.items():
        entry = {key: t.to("cpu", copy=True) for key, t in entry.items()}  # the run goes on
        p, remainder, m = weights[name].detach().to("cpu", copy=True), entry.get("remainder"), entry["exp_avg"]
        exact[name] = p.float() if remainder is None else codecs.join(p, remainder.short())
        momenta[name] = (
            codecs.decode(m.reshape(-1), entry["exp_avg_scale"]).view(m.shape) if m.dtype == torch.int8 else m.float()
        )
    return exact, momenta


def assert_loaded(
    run: Run, here: Way, saved: Way, weights: dict[str, Tensor], momenta: dict[str, Tensor], what: str
) -> None:
    """Asserts that a run has loaded what another one kept, as `kept` showed it, bit by bit; a collective call."""
    own_weights, own_momenta = kept(run)
    for name, expected in weights.items():
        if here.weights == "bf16":
            expected = codecs.split(expected)[0].float() if saved.weights == "master" else expected.bfloat16().float()
        assert_same_bits(own_weights[name], expected, f"{what}: {name}")
    if here.momentum != "int8":
        for name, m in momenta.items():
            assert_same_bits(own_momenta[name], m.to(MOMENTA[here.momentum]).float(), f"{what}: momentum of {name}")
        return
    if here.strategy not in IN_PARTS:
        for name, m in momenta.items():
            codes, scale = codecs.encode(m.reshape(-1))
            assert_same_bits(
                own_momenta[name], codecs.decode(codes, scale).view(m.shape), f"{what}: momentum of {name}"
            )
        return
    slices = flat_slices(run.wrapped)
    for wrapped, p in run.model.named_parameters():
        name = wrapped.replace("_fsdp_wrapped_module.", "")
        entry, m = run.optimizer.state[p], momenta[name]
        if isinstance(p, DTensor):
            part = distribute_tensor(m, p.device_mesh, p.placements, src_data_rank=None).to_local().contiguous()
            own = entry["exp_avg"].to_local()
        else:
            start = slices[id(p)].start
            part, own = m.reshape(-1)[start : start + p.numel()], entry["exp_avg"]
        codes, scale = codecs.encode(part.reshape(-1).cpu())
        assert_same_bits(flat(own).cpu(), codes, f"{what}: codes of {name}")
        assert_same_bits(entry["exp_avg_scale"].cpu(), scale, f"{what}: scales of {name}")
