"""Loading a checkpoint: entries of the optimizer's state that other code keeps beside Lion's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lion_dist import Lion, checkpoint
from lion_dist.checkpoint import optimizer_state
from tests.asserts import assert_same_bits
from tests.scenarios.checkpoint_linear import Before, trained
from tests.scenarios.tampering import rewrite


def with_others(value: float) -> tuple[nn.Module, Lion]:
    """Adds the entries that timm's Lookahead, an EMA in float32 of bfloat16 weights, and counters add to a state."""
    model, optimizer = trained(value)
    model.bfloat16()
    state: dict[Any, Any] = optimizer.state
    for i, p in enumerate(model.parameters()):
        state[p]["slow"] = p.detach().clone()
        state[p]["ema"] = torch.full_like(p, value / 3, dtype=torch.float32)
        state[p]["step"] = torch.tensor(value)
        state[p]["count"] = i + int(value)
        state[p]["rows"] = torch.arange(value, value + 4)
        state[p]["name"] = ("a", None)
    state["rounds"] = {"n": value}
    state["scale"] = torch.tensor([value, value])
    return model, optimizer


def test_entries_of_others_are_kept(tmp_path: Path) -> None:
    model, optimizer = with_others(5.0)
    checkpoint.save(tmp_path / "step-1", model, optimizer)
    expected: list[dict[str, Any]] = [optimizer.state[p] for p in model.parameters()]
    for fresh in (True, False):
        other, loaded = with_others(7.0)
        if fresh:  # before the wrapper has made its own
            loaded = Lion([{"params": [other.weight]}, {"params": [other.bias]}])
            loaded.init_state()
            with pytest.raises(ValueError, match=r"exp_avg is float32 in the checkpoint and torch.bfloat16 here"):
                checkpoint.load(tmp_path / "step-1", other, loaded)
            for p in other.parameters():
                loaded.state[p]["exp_avg"] = loaded.state[p]["exp_avg"].float()
        checkpoint.load(tmp_path / "step-1", other, loaded)
        state: dict[Any, Any] = loaded.state
        for p, entry in zip(other.parameters(), expected, strict=True):
            assert state[p].keys() == entry.keys()
            for key, value in entry.items():
                if isinstance(value, Tensor):
                    assert_same_bits(state[p][key], value, key)
                else:
                    assert state[p][key] == value
        assert state["rounds"] == {"n": 5.0}
        assert torch.equal(state["scale"], torch.tensor([5.0, 5.0]))
        # Entries that the checkpoint has not are not kept, as in torch's load_state_dict.
        for p in other.parameters():
            state[p]["late"] = 1
        checkpoint.load(tmp_path / "step-1", other, loaded)
        assert all("late" not in loaded.state[p] for p in other.parameters())


def test_a_load_takes_no_larger_entries_than_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this limit a sparse file would fill the memory."""
    model, optimizer = trained(1.0)
    entries: Any = optimizer.state
    entries["large"] = torch.zeros(1 << 20)
    with monkeypatch.context() as patch:
        patch.setattr(optimizer_state, "max_entry_bytes", lambda shape: 1 << 30)
        checkpoint.save(tmp_path / "step-1", model, optimizer)
    model, optimizer = trained(-1.0)
    before = Before(model, optimizer)
    with pytest.raises(ValueError, match=r"optim\.beside\.large has 4194304 bytes; expected at most 65536"):
        checkpoint.load(tmp_path / "step-1", model, optimizer)
    before()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("x", object(), r"optim\.state\.weight\.x is a object, which a checkpoint cannot hold"),
        ("x", torch.zeros(9, 8000), r"optim\.state\.weight\.x is a Tensor of shape \(9, 8000\) .*cannot hold"),
        ("x", {"deep": torch.zeros(9000)}, r"optim\.state\.weight\.x\.deep is a Tensor"),
        (7, 1, "the state of weight has an entry 7"),
        ("\x1b[31m", 1, r"cannot be a name"),
    ],
    ids=["object", "large", "large within", "number for a key", "escape"],
)
def test_entries_that_cannot_be_saved_are_refused_by_name(key: Any, value: Any, message: str, tmp_path: Path) -> None:
    model, optimizer = trained(1.0)
    state: dict[Any, Any] = optimizer.state[model.weight]
    state[key] = value
    with pytest.raises((TypeError, ValueError), match=message) as error:
        checkpoint.save(tmp_path / "step-1", model, optimizer)
    assert "\x1b" not in str(error.value)
    assert not any(tmp_path.iterdir())


def test_too_many_entries_are_refused(tmp_path: Path) -> None:
    model, optimizer = trained(1.0)
    state: dict[Any, Any] = optimizer.state
    state[model.weight].update({str(i): i for i in range(16)})
    with pytest.raises(TypeError, match="17 entries for weight"):
        checkpoint.save(tmp_path / "step-1", model, optimizer)
    del state[model.weight]["3"]
    state.update({str(i): i for i in range(257)})
    with pytest.raises(TypeError, match="257 keys that are no parameters"):
        checkpoint.save(tmp_path / "step-1", model, optimizer)
    state[(1, 2)] = [state.pop(str(i)) for i in range(257)]
    with pytest.raises(TypeError, match=r"entry \(1, 2\)"):
        checkpoint.save(tmp_path / "step-1", model, optimizer)


@pytest.mark.parametrize("others", ["exp_avg_sq", "momentum_buffer"])
def test_states_of_other_optimizers_are_refused(others: str, tmp_path: Path) -> None:
    path = tmp_path / "step-1"
    model, optimizer = trained(1.0)
    optimizer.state[model.bias]["slow"] = torch.zeros_like(model.bias)
    checkpoint.save(path, model, optimizer)

    def adams(raw: dict[str, Any]) -> None:
        raw["tensors"][f"optim.state.bias.{others}"] = raw["tensors"].pop("optim.state.bias.slow")

    rewrite(path, adams)
    message = f"the state of bias has an entry '{others}', so it is another optimizer's"
    model, optimizer = trained(-1.0)
    before = Before(model, optimizer)
    with pytest.raises(ValueError, match=message):
        checkpoint.load(path, model, optimizer)
    before()
    optimizer.state[model.bias][others] = torch.zeros_like(model.bias)
    with pytest.raises(ValueError, match=message):  # and no checkpoint is saved that nothing would load
        checkpoint.save(tmp_path / "step-2", model, optimizer)


def test_entries_without_a_momentum_are_refused(tmp_path: Path) -> None:
    model, optimizer = trained(1.0)
    optimizer.state[model.bias]["slow"] = torch.zeros_like(model.bias)
    checkpoint.save(tmp_path / "step-1", model, optimizer)

    def forget(raw: dict[str, Any]) -> None:
        raw["tensors"]["optim.state.bias.other"] = raw["tensors"].pop("optim.state.bias.exp_avg")

    rewrite(tmp_path / "step-1", forget)
    model, optimizer = trained(-1.0)
    before = Before(model, optimizer)
    with pytest.raises(ValueError, match=r"the state of bias .* has \['other', 'slow'\], but no exp_avg"):
        checkpoint.load(tmp_path / "step-1", model, optimizer)
    before()
