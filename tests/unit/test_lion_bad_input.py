"""Bad input of Lion: a clear error, and nothing is changed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lion_dist import Lion
from lion_dist.update import backends
from tests.asserts import assert_same_params
from tests.marks import needs_interpreter
from tests.scenarios.lion_params import SHAPES, feed, params_of, run, snapshot


def expanded() -> nn.Parameter:
    return nn.Parameter(torch.zeros(1).expand(5))


def of_dtype(dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.zeros(3, dtype=dtype))


BAD_HYPERS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "negative lr": ({"lr": -1e-4}, ValueError, "lr must be finite and >= 0, got -0.0001"),
    "NaN lr": ({"lr": math.nan}, ValueError, "lr must be finite"),
    "infinite lr": ({"lr": math.inf}, ValueError, "lr must be finite"),
    "lr of two elements": ({"lr": torch.tensor([0.1, 0.2])}, ValueError, "one element"),
    "negative lr tensor": ({"lr": torch.tensor(-0.1)}, ValueError, "lr must be finite and >= 0"),
    "beta1 of 1": ({"betas": (1.0, 0.99)}, ValueError, "betas must be"),
    "negative beta2": ({"betas": (0.9, -0.1)}, ValueError, "betas must be"),
    "NaN beta": ({"betas": (0.9, math.nan)}, ValueError, "betas must be"),
    "one beta": ({"betas": (0.9,)}, ValueError, "betas must be"),
    "three betas": ({"betas": (0.9, 0.99, 0.999)}, ValueError, "betas must be"),
    "negative weight decay": ({"weight_decay": -0.1}, ValueError, "weight_decay must be"),
    "NaN weight decay": ({"weight_decay": math.nan}, ValueError, "weight_decay must be"),
    "decoupled from lr 0": ({"init_lr": 0.0, "decoupled_weight_decay": True}, ValueError, "must be > 0"),
    "decay divided to infinity": (
        {"init_lr": 1e-300, "weight_decay": 1e300, "decoupled_weight_decay": True},
        ValueError,
        "too large",
    ),
    "initial lr that is none": ({"init_lr": "0.1"}, TypeError, "init_lr must be a number"),
    "maximize by word": ({"maximize": "no"}, TypeError, "maximize must be True or False, got 'no'"),
    "maximize by number": ({"maximize": 0}, TypeError, "maximize must be True or False"),
    "decoupled by word": ({"decoupled_weight_decay": "false"}, TypeError, "decoupled_weight_decay must be True or F"),
    "momentum of an unknown name": ({"momentum_dtype": "half"}, TypeError, "momentum_dtype must be .* got 'half'"),
    "lr in words": ({"lr": "1e-3"}, TypeError, "lr must be a number"),
    "complex lr": ({"lr": 1j}, TypeError, "lr must be a number"),
    "lr too large": ({"lr": 10**400}, ValueError, "lr must be finite"),
    "betas in words": ({"betas": "09"}, TypeError, "betas must be two numbers"),
    "betas by key": ({"betas": {0.9: 0, 0.99: 1}}, TypeError, "betas must be two numbers"),
    "betas of words": ({"betas": ("0.9", "0.99")}, TypeError, "betas must be two numbers"),
    "weight decay of two": ({"weight_decay": torch.ones(2)}, ValueError, "weight_decay must be"),
    "integer momentum": ({"momentum_dtype": torch.int16}, TypeError, "momentum_dtype"),
    "float64 momentum": ({"momentum_dtype": torch.float64}, TypeError, "momentum_dtype"),
    "momentum without sign": ({"momentum_dtype": torch.uint8}, TypeError, "or int8, got torch.uint8"),
    "momentum of a wider name": ({"momentum_dtype": "int16"}, TypeError, "or int8, got 'int16'"),
    "momentum of 8-bit floats": (
        {"momentum_dtype": torch.float8_e4m3fn},
        TypeError,
        "or int8, got torch.float8_e4m3fn",
    ),
    "8 bits by number": ({"momentum_dtype": 8}, TypeError, "momentum_dtype must be .* got 8"),
    "8 bits and negative lr": ({"momentum_dtype": torch.int8, "lr": -1e-4}, ValueError, "lr must be finite and >= 0"),
    "8 bits and NaN beta": ({"momentum_dtype": "int8", "betas": (0.9, math.nan)}, ValueError, "betas must be"),
    "master weights by word": ({"master_weights": "yes"}, TypeError, "master_weights must be True or False, got 'yes'"),
    "master weights by number": ({"master_weights": 1}, TypeError, "master_weights must be True or False, got 1"),
    "no master weights": ({"master_weights": None}, TypeError, "master_weights must be True or False, got None"),
    "master weights and negative decay": (
        {"master_weights": True, "weight_decay": -0.1},
        ValueError,
        "weight_decay must be",
    ),
}
bad_hypers = pytest.mark.parametrize(("bad", "error", "message"), BAD_HYPERS.values(), ids=BAD_HYPERS.keys())


@bad_hypers
def test_bad_hyper_parameters_in_the_constructor(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    of_constructor = {"lr" if key == "init_lr" else key: value for key, value in bad.items()}
    with pytest.raises(error, match=message.replace("init_lr", "lr")):
        Lion(params_of(), **of_constructor)
    with pytest.raises(error, match=message):
        Lion([{"params": params_of(), **bad}])


@bad_hypers
def test_bad_hyper_parameters_of_a_new_group(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    params = params_of()
    opt = Lion(params, lr=0.25)
    run(opt, params, range(1))
    before = snapshot(opt)
    with pytest.raises(error, match=message):
        opt.add_param_group({"params": params_of(seed=5), **bad})
    assert snapshot(opt) == before
    run(opt, params, range(1, 2))


@bad_hypers
def test_bad_hyper_parameters_in_a_state_dict(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    params = params_of()
    opt = Lion(params, lr=0.25)
    run(opt, params, range(1))
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0].update(bad)
    for entry in saved["state"].values():
        entry["exp_avg"] += 1
    before = snapshot(opt)
    with pytest.raises(error, match=message):
        opt.load_state_dict(saved)
    assert snapshot(opt) == before


BETWEEN_STEPS = [
    "negative lr", "NaN lr", "infinite lr", "beta1 of 1", "negative beta2", "one beta", "negative weight decay",
    "NaN weight decay", "decoupled from lr 0", "maximize by word", "decoupled by word", "lr in words", "betas in words",
]  # fmt: skip


@pytest.mark.parametrize("case", BETWEEN_STEPS)
def test_bad_hyper_parameters_between_steps(case: str) -> None:
    """In the second group: the first must not have been stepped by then."""
    bad, error, message = BAD_HYPERS[case]
    params = params_of()
    opt = Lion([{"params": params[:2]}, {"params": params[2:]}], lr=0.25)
    run(opt, params, range(1))
    opt.param_groups[1].update(bad)
    before = snapshot(opt)
    feed(params, 1)
    with pytest.raises(error, match=message):
        opt.step()
    assert snapshot(opt) == before


BAD_PARAMS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "fp8": (lambda: [of_dtype(torch.float8_e4m3fn)], TypeError, "float8_e4m3fn"),
    "float64": (lambda: [of_dtype(torch.float64)], TypeError, "float64"),
    "complex": (lambda: [of_dtype(torch.complex64)], TypeError, "view_as_real"),
    "expanded": (lambda: [expanded()], ValueError, "share memory"),
    "in the middle": (lambda: [*params_of(seed=6), of_dtype(torch.float64)], TypeError, "parameter 5 .*float64"),
    "not a leaf": (lambda: [nn.Parameter(torch.ones(3)) * 2], ValueError, "non-leaf"),
}
bad_params = pytest.mark.parametrize(("make", "error", "message"), BAD_PARAMS.values(), ids=BAD_PARAMS.keys())


@bad_params
def test_bad_parameters(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Lion(make())
    params = params_of()
    opt = Lion(params, lr=0.25)
    run(opt, params, range(1))
    before = snapshot(opt)
    with pytest.raises(error, match=message):
        opt.add_param_group({"params": make()})
    assert snapshot(opt) == before


def test_no_parameters() -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        Lion([])
    Lion([{"params": []}]).step()


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_given_twice() -> None:
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="given twice"):
        Lion([p, p])
    with pytest.raises(ValueError, match="more than one parameter group"):
        Lion([{"params": [p]}, {"params": [p]}])
    opt = Lion([p])
    before = snapshot(opt)
    with pytest.raises(ValueError, match="more than one parameter group"):
        opt.add_param_group({"params": [p]})
    assert snapshot(opt) == before


def with_sparse_grad(p: nn.Parameter) -> None:
    p.grad = torch.ones_like(p).to_sparse()


def with_complex_grad(p: nn.Parameter) -> None:
    if not hasattr(p, "grad_dtype"):
        pytest.skip("this torch lets nobody assign a complex gradient to a real parameter")
    p.grad_dtype = None
    p.grad = torch.ones(p.shape, dtype=torch.complex64)


def with_float64_grad(p: nn.Parameter) -> None:
    if not hasattr(p, "grad_dtype"):
        pytest.skip("this torch lets nobody assign a gradient of another dtype")
    p.grad_dtype = None
    p.grad = torch.ones(p.shape, dtype=torch.float64)


def with_another_shape(p: nn.Parameter) -> None:
    p.grad = torch.ones_like(p)
    p.data = torch.ones(p.numel() + 1)


@pytest.mark.parametrize("use_triton", [False, pytest.param(True, marks=needs_interpreter)])
@pytest.mark.parametrize("first", [True, False], ids=["first step", "later"])
@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (with_sparse_grad, TypeError, "parameter 3 .*dense gradients"),
        (with_complex_grad, TypeError, "parameter 3 .*complex64"),
        (with_float64_grad, TypeError, "parameter 3 .*float64"),
        (with_another_shape, ValueError, "parameter 3 .*shape"),
    ],
    ids=["sparse", "complex", "float64", "another shape"],
)
def test_bad_gradients(
    spoil: Callable[[nn.Parameter], None], error: type[Exception], message: str, first: bool, use_triton: bool
) -> None:
    params = params_of()
    opt = Lion(params, lr=0.25, use_triton=use_triton)
    if not first:
        run(opt, params, range(1))
    feed(params, 1)
    spoil(params[3])
    before = snapshot(opt)
    with pytest.raises(error, match=message):
        opt.step()
    assert snapshot(opt) == before
    params[3].grad = None
    params[3].data = params_of()[3].data
    opt.step()
    assert not torch.equal(params[0], params_of()[0])


@pytest.mark.parametrize("use_triton", [False, pytest.param(True, marks=needs_interpreter)])
def test_parameters_that_share_memory(use_triton: bool) -> None:
    buffer = torch.zeros(100)
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(buffer[:60]), nn.Parameter(buffer[59:])]
    opt = Lion(params, lr=0.25, use_triton=use_triton)
    feed_shapes(params)
    before = snapshot(opt)
    with pytest.raises(ValueError, match="parameters 1 and 2 share memory"):
        opt.step()
    assert snapshot(opt) == before


def feed_shapes(params: list[nn.Parameter]) -> None:
    for p in params:
        p.grad = torch.ones_like(p)


def test_triton_on_the_cpu_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "interpreting", lambda: False)
    params = params_of()
    opt = Lion(params, lr=0.25, use_triton=True)
    feed(params, 0)
    before = snapshot(opt)
    with pytest.raises(ValueError, match="use_triton=True needs parameters on a GPU, got cpu"):
        opt.step()
    assert snapshot(opt) == before


def bigger_model() -> dict[str, Any]:
    params = [nn.Parameter(torch.zeros([n + 1 for n in shape])) for shape in SHAPES]
    opt = Lion(params)
    run(opt, params, range(1))
    return opt.state_dict()


def of_adamw() -> dict[str, Any]:
    params = params_of()
    opt = torch.optim.AdamW(params)
    run(opt, params, range(1))
    return opt.state_dict()


def of_lion(edit: Callable[[dict[str, Any]], Any]) -> Callable[[], dict[str, Any]]:
    def made() -> dict[str, Any]:
        params = params_of(seed=9)
        opt = Lion(params, lr=0.125)
        run(opt, params, range(2))
        state_dict = copy.deepcopy(opt.state_dict())
        edit(state_dict)
        return state_dict

    return made


BAD_STATE_DICTS: dict[str, tuple[Callable[[], Any], str]] = {
    "not a dict": (lambda: [1, 2], "state_dict with keys"),
    "empty": (dict, "state_dict with keys"),
    "no groups": (of_lion(lambda d: d.pop("param_groups")), "state_dict with keys"),
    "no state": (of_lion(lambda d: d.pop("state")), "state_dict with keys"),
    "another model": (bigger_model, "another model"),
    "AdamW's": (of_adamw, "another optimizer"),
    "fewer groups": (of_lion(lambda d: d["param_groups"].clear()), "groups of sizes"),
    "fewer parameters": (of_lion(lambda d: d["param_groups"][0]["params"].pop()), "groups of sizes"),
    "a wrong shape at the end": (of_lion(lambda d: d["state"][4].update(exp_avg=torch.ones(24))), "parameter 4"),
    "an integer momentum": (of_lion(lambda d: d["state"][4].update(exp_avg=torch.ones(2, 3, 4).int())), "parameter 4"),
    "a momentum that is none": (of_lion(lambda d: d["state"][4].update(exp_avg=3.0)), "parameter 4 is float"),
    "another key": (of_lion(lambda d: d["state"].update({0: {"momentum_buffer": torch.ones(17, 9)}})), "another opt"),
    "state of nobody": (of_lion(lambda d: d["state"].update({77: {"exp_avg": torch.ones(2)}})), "77"),
}


@pytest.mark.parametrize(("make", "message"), BAD_STATE_DICTS.values(), ids=BAD_STATE_DICTS.keys())
def test_bad_state_dicts(make: Callable[[], Any], message: str) -> None:
    params = params_of()
    opt = Lion(params, lr=0.25)
    run(opt, params, range(1))
    given = make()
    before = snapshot(opt)
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(given)
    assert snapshot(opt) == before
    expected = params_of()
    run(Lion(expected, lr=0.25), expected, range(2))
    run(opt, params, range(1, 2))
    assert_same_params(params, expected)


def test_tensors_without_memory_are_refused() -> None:
    with pytest.raises(TypeError, match="meta"):
        Lion([nn.Parameter(torch.zeros(3, device="meta"))])
    p = nn.Parameter(torch.zeros(3))
    opt = Lion([p])
    p.grad = torch.ones(3)
    opt.step()
    p.untyped_storage().resize_(0)  # as FSDP1 frees a flat parameter
    with pytest.raises(TypeError, match="no memory of its own"):
        opt.step()


@pytest.mark.parametrize("use_triton", [False, pytest.param(True, marks=needs_interpreter)])
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_gradient_whose_memory_was_freed(transposed: bool, steps: int, use_triton: bool) -> None:
    """Kernels would take its address for that of no gradient, and the CPU would read it."""
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(0)), nn.Parameter(torch.ones(5, 2))]
    opt = Lion(params, lr=0.5, use_triton=use_triton)
    for _ in range(1 + steps):
        for p in params:
            p.grad = torch.zeros_like(p)
        opt.step()
    for p in params:
        p.grad = torch.ones_like(p)
    freed = torch.ones(2, 5).T if transposed else torch.ones(5, 2)
    params[2].grad = freed
    freed.untyped_storage().resize_(0)
    for _ in range(2):
        with pytest.raises(TypeError, match=r"gradient of parameter 2 \(shape \(5, 2\)\) has no memory"):
            opt.step()
    params[2].grad = None
    opt.step()
    assert [p.tolist() for p in params] == [[0.5] * 3, [], [[1.0] * 2] * 5]


@pytest.mark.parametrize(
    ("bad", "name"), [({"lr": "1e-3"}, "lr"), ({"betas": 0.9}, "betas"), ({"weight_decay": None}, "weight_decay")]
)
def test_arguments_of_the_wrong_type_are_named(bad: dict, name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be"):
        Lion([nn.Parameter(torch.zeros(3))], **bad)


@pytest.mark.parametrize(
    "bad", [{"state": [], "param_groups": []}, {"state": {}, "param_groups": [{}]}, {"state": {}, "param_groups": 3}]
)
def test_malformed_state_dicts_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match="param_groups"):
        Lion([nn.Parameter(torch.zeros(3))]).load_state_dict(bad)
