"""Values that users give Lion in its groups: numbers of every kind, names of dtypes, keys of others, and frozen
parameters of every kind, which are nobody's business until they are unfrozen."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, OneCycleLR

from lion_dist import Lion
from lion_dist.hyper_values import to_dtype
from tests.asserts import assert_same_bits

BF16 = torch.bfloat16


class ListConfig(Sequence[float]):
    """A Sequence that is neither a list nor a tuple, such as OmegaConf's."""

    def __init__(self, values: list[float]) -> None:
        self._values = values

    def __getitem__(self, index: Any) -> Any:
        return self._values[index]

    def __len__(self) -> int:
        return len(self._values)


class OnlyFloat:
    """A number of a library that is not known here."""

    def __float__(self) -> float:
        return 0.25


def one_weight(**kwargs: Any) -> tuple[nn.Parameter, Lion]:
    p = nn.Parameter(torch.zeros(4))
    p.grad = torch.ones(4)
    return p, Lion([p], **kwargs)


# -- Values


@pytest.mark.parametrize(
    "betas",
    [
        [0.5, 0.75],
        ListConfig([0.5, 0.75]),
        np.array([0.5, 0.75]),
        np.array([0.5, 0.75], dtype=np.float32),
        torch.tensor([0.5, 0.75]),
        (Fraction(1, 2), Decimal("0.75")),
        (torch.tensor(0.5), np.float32(0.75)),
        (b for b in (0.5, 0.75)),
        {0.5: "", 0.75: ""}.keys().__iter__(),
    ],
    ids=lambda b: type(b).__name__,
)
def test_betas_may_be_any_container_of_two_numbers(betas: Any) -> None:
    p, opt = one_weight(lr=0.25, betas=betas)
    for holder in (opt.param_groups[0], opt.defaults):
        assert holder["betas"] == (0.5, 0.75)
        assert type(holder["betas"]) is tuple
        assert {type(beta) for beta in holder["betas"]} == {float}
    opt.step()
    assert p.tolist() == [-0.25] * 4


NUMBERS = [
    1, np.float32(0.25), np.float64(0.25), np.int64(1), np.array(0.25), np.array([0.25]), Fraction(1, 4),
    Decimal("0.25"), OnlyFloat(), torch.tensor([0.25]), torch.tensor(1), torch.tensor(0.25, dtype=BF16),
]  # fmt: skip


@pytest.mark.parametrize("number", NUMBERS, ids=lambda n: f"{type(n).__name__} {n!r}"[:40])
def test_numbers_of_every_kind(number: Any) -> None:
    value = float(number.item() if isinstance(number, np.ndarray) else number)
    p, opt = one_weight(lr=number, weight_decay=number)
    group = opt.param_groups[0]
    assert type(group["weight_decay"]) is float
    assert group["weight_decay"] == value
    assert group["lr"] is number if isinstance(number, Tensor) else type(group["lr"]) is float
    assert group["init_lr"] == value
    opt.step()
    assert p.tolist() == [-value] * 4
    # In a group of its own, in a state_dict, and written there between steps.
    other = Lion([{"params": [nn.Parameter(torch.zeros(4))], "lr": number, "weight_decay": number}])
    assert type(other.param_groups[0]["weight_decay"]) is float
    saved = {"state": {}, "param_groups": [{"params": [0], "lr": number, "betas": np.array([0.5, 0.75])}]}
    other.load_state_dict(saved)
    assert other.param_groups[0]["betas"] == (0.5, 0.75)
    assert float(other.param_groups[0]["lr"]) == value
    group.update(lr=number, weight_decay=number, betas=ListConfig([0.5, 0.75]))
    p.data.zero_()
    opt.step()
    assert p.tolist() == [-value] * 4


@pytest.mark.parametrize("value", [True, np.bool_(True)], ids=["bool", "NumPy's"])
def test_switches(value: Any) -> None:
    p, opt = one_weight(lr=0.25, maximize=value, decoupled_weight_decay=value)
    assert opt.param_groups[0]["maximize"] is True
    assert opt.param_groups[0]["decoupled_weight_decay"] is True
    opt.step()
    assert p.tolist() == [0.25] * 4


@pytest.mark.parametrize("name", ["bfloat16", "torch.bfloat16"])
def test_momentum_dtype_by_name(name: str) -> None:
    p, opt = one_weight(momentum_dtype=name)
    assert opt.param_groups[0]["momentum_dtype"] is opt.defaults["momentum_dtype"] is BF16
    opt.add_param_group({"params": [q := nn.Parameter(torch.zeros(3))], "momentum_dtype": "float32"})
    opt.step()
    assert opt.state[p]["exp_avg"].dtype == BF16
    assert opt.state[q]["exp_avg"].dtype == torch.float32
    assert to_dtype(None) is None
    for bad in ("int16", "", "float64", 16, torch.uint8, np.float32):
        with pytest.raises(TypeError, match="momentum_dtype must be None, float32, bfloat16, float16 or int8, got"):
            one_weight(momentum_dtype=bad)


def test_a_scheduler_may_write_a_tensor_into_betas() -> None:
    """CyclicLR and OneCycleLR make new tuples, of what they compute and what was there."""
    p, opt = one_weight(lr=0.25, betas=(0.5, 0.75))
    opt.step()
    opt.param_groups[0]["betas"] = (torch.tensor(0.25), *opt.param_groups[0]["betas"][1:])
    q, expected = one_weight(lr=0.25, betas=(0.5, 0.75))
    expected.step()
    expected.param_groups[0]["betas"] = (0.25, 0.75)
    for w, optimizer in ((p, opt), (q, expected)):
        w.grad = torch.tensor([-0.1, 0.1, 0.0, 1.0])
        optimizer.step()
    assert_same_bits(p.detach(), q.detach())
    opt.param_groups[0]["betas"] = (torch.tensor(1.25), 0.75)
    with pytest.raises(ValueError, match="betas must be two numbers"):
        opt.step()
    for make in (
        lambda opt: CyclicLR(opt, base_lr=0.1, max_lr=0.5, base_momentum=torch.tensor(0.5), max_momentum=0.75),  # type: ignore[arg-type]
        lambda opt: OneCycleLR(opt, torch.tensor(0.5), total_steps=5, base_momentum=torch.tensor(0.5)),  # type: ignore[arg-type]
    ):
        p, opt = one_weight(lr=0.25)
        scheduler = make(opt)
        for _ in range(4):
            opt.step()
            scheduler.step()
        assert 0 < abs(p.tolist()[0]) < 2


# -- Keys of others


def ours(caught: list[warnings.WarningMessage]) -> list[str]:
    assert all(w.filename == __file__ for w in caught), "a warning should point at the user's line"
    return [str(w.message) for w in caught]


def test_a_key_that_nobody_knows_is_named_once_and_kept() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        params = [nn.Parameter(torch.zeros(3)) for _ in range(3)]
        opt = Lion([{"params": [params[0]], "weight_deacy": 0.1}, {"params": [params[1]], "weight_deacy": 0.2}])
        opt.add_param_group({"params": [params[2]], "Betas": (0.5, 0.5), "lr_mult": 2.0, "_own": 1, 7: 8})  # type: ignore[dict-item]
        saved = opt.state_dict()
        opt.load_state_dict(saved)
        opt.step()
        saved["param_groups"][0]["beta"] = 3
        opt.load_state_dict(saved)
    messages = ours(caught)
    assert len(messages) == 5, messages
    for message, words in zip(
        messages,
        [
            ('"weight_deacy"', 'mean "weight_decay"'),
            ('"Betas"', 'mean "betas"'),
            ('"lr_mult"', "Lion reads lr, betas"),
            ('"7"', "Lion reads lr, betas"),
            ('"beta"', 'mean "betas"'),
        ],
        strict=True,
    ):
        assert all(word in message for word in words), message
    assert [group.get("weight_deacy") for group in opt.param_groups] == [0.1, 0.2, None]
    assert opt.param_groups[2]["_own"] == 1


def test_keys_of_frameworks_and_schedulers_make_no_noise() -> None:
    """Those that torch's schedulers write, that DeepSpeed and Hugging Face hand over, and AdamW's own."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        p = nn.Parameter(torch.zeros(3))
        q = nn.Parameter(torch.zeros(3))
        adam = torch.optim.AdamW([{"params": [("p", p)], "eps": 1e-6}], lr=0.25)
        opt = Lion([{**adam.param_groups[0], "name": "all", "lr_scale": 0.5, "swa_lr": 0.1, "step": 0}], lr=0.25)
        OneCycleLR(opt, max_lr=0.5, total_steps=12)
        LambdaLR(opt, lambda t: 1.0)
        opt.add_param_group({"params": [("q", q)], "min_lr": 0.1, "bias_correction": True, "moe": False})
        other = Lion([{"params": [("p", p)]}, {"params": [("q", q)]}])
        other.load_state_dict(opt.state_dict())
        assert other.param_groups[0]["eps"] == 1e-6
        assert other.param_groups[0]["name"] == "all"
        copy.deepcopy(other)
        pickle.loads(pickle.dumps(other))
