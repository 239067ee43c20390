"""Steps that a CUDA graph cannot capture are refused by name, before anything is changed.

There need be no GPU here: torch is made to say that it captures. tests/gpu/test_graphs_gpu.py captures steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lion_dist import Lion, ShardedLion
from lion_dist.upload import CapturedUploads, is_capturing, refuse_in_capture
from tests.asserts import assert_same_bits


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Begins a capture, as far as torch says."""

    def begin() -> None:
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)

    return begin


def trained(**options: Any) -> tuple[list[nn.Parameter], Lion]:
    params = [nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(5))]
    for p in params:
        p.grad = torch.ones_like(p)
    opt = Lion(params, use_triton=False, **{"lr": torch.tensor(0.25), **options})
    opt.step()
    return params, opt


def drop_gradient(params: list[nn.Parameter], opt: Lion) -> None:
    params[1].grad = None


def add_group(params: list[nn.Parameter], opt: Lion) -> None:
    opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]})


@pytest.mark.parametrize(
    ("options", "change", "error", "message"),
    [
        ({}, lambda params, opt: None, ValueError, r"parameter 0 is on cpu; a CUDA graph can only step"),
        ({"lr": 0.25}, lambda params, opt: None, ValueError,
         r"lr of parameter group 0 is the number 0\.25, which .* torch\.tensor\(lr, .*device=\"cpu\"\)"),
        ({}, lambda params, opt: opt.param_groups[0].update(lr=1e-4), ValueError, "is the number 0.0001"),
        ({}, lambda params, opt: opt.param_groups[0].update(lr=torch.tensor(1.0, device="meta")), ValueError,
         "is a tensor on meta"),
        ({"momentum_dtype": "int8"}, lambda params, opt: None, ValueError, "group 0 has an 8-bit momentum"),
        ({}, drop_gradient, ValueError, r"parameter 1 \(shape \(5,\)\) had a gradient in the last step and has none"),
        ({}, lambda params, opt: opt.load_state_dict(opt.state_dict()), RuntimeError, "make a step before the capture"),
        ({}, add_group, RuntimeError, "make a step before the capture"),
        ({}, lambda params, opt: opt.state.clear(), RuntimeError, "make a step before the capture"),
        ({}, lambda params, opt: (opt.zero_grad(), opt.init_state()), RuntimeError, "make a step before the capture"),
        ({}, lambda params, opt: (opt.zero_grad(), opt.statistics()), RuntimeError, "make a step before the capture"),
    ],
    ids=[
        "CPU", "lr a number", "lr became a number", "lr elsewhere", "int8", "gradient", "load", "group", "state",
        "none since zero_grad", "measured without gradients",
    ],
)  # fmt: skip
def test_what_cannot_be_captured(
    capture: Callable[[], None], options: dict[str, Any], change: Callable[..., Any], error: type[Exception],
    message: str,
) -> None:  # fmt: skip
    params, opt = trained(**options)
    change(params, opt)
    before = [p.detach().clone() for p in params]
    state = {id(p): {name: t.clone() for name, t in entry.items()} for p, entry in opt.state.items()}
    capture()
    for _ in range(2):
        with pytest.raises(error, match=message):
            opt.step()
    for p, old in zip(params, before, strict=True):
        assert_same_bits(p.detach(), old)
    assert opt.state.keys() == {p for p in params if id(p) in state}
    for key, entry in opt.state.items():
        for name, t in entry.items():
            assert_same_bits(t, state[id(key)][name])


def test_the_first_step_cannot_be_captured(capture: Callable[[], None]) -> None:
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    opt = Lion([p], lr=torch.tensor(0.25))
    capture()
    with pytest.raises(RuntimeError, match="make a step before the capture"):
        opt.step()
    assert not opt.state


def test_a_parameter_without_a_gradient_before_and_now_is_left_out(capture: Callable[[], None]) -> None:
    """It is not what is refused: the parameters are on the CPU."""
    params, opt = trained()
    params[1].grad = None
    opt.step()
    capture()
    with pytest.raises(ValueError, match="parameter 0 is on cpu"):
        opt.step()


@pytest.mark.parametrize("stage", [1, 2])
def test_sharded_lion_is_refused(capture: Callable[[], None], tmp_path: Path, stage: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        p = nn.Parameter(torch.ones(300))
        opt = ShardedLion([p], lr=torch.tensor(0.25), stage=stage)
        (p * 2).sum().backward()
        capture()
        with pytest.raises(RuntimeError, match=r"ShardedLion\.step\(\) cannot be captured in a CUDA graph"):
            opt.step(lambda: pytest.fail("the closure was called"))
        with pytest.raises(RuntimeError, match=r"clip_grad_norm_\(\) of ShardedLion cannot be captured"):
            opt.clip_grad_norm_(1.0)
        assert (p == 1).all()
    finally:
        dist.destroy_process_group()


def test_backwards_of_stage_2_are_refused(
    capture: Callable[[], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Replays call no hooks, so that nothing would reduce their gradients, and the steps after them would do nothing.
    The optimizer can be used afterwards."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        p = nn.Parameter(torch.ones(300))
        opt = ShardedLion([p], lr=0.25, reduce_dtype=torch.bfloat16)
        capture()
        with pytest.raises(RuntimeError, match=r"gradients ShardedLion\(stage=2\) reduces cannot be captured"):
            (p * 2).sum().backward()
        with pytest.raises(RuntimeError, match=r"no_sync\(\) of ShardedLion cannot be captured"), opt.no_sync():
            pytest.fail("entered")
        monkeypatch.undo()
        opt.zero_grad()
        (p * 2).sum().backward()
        opt.step()
        assert (p == 0.75).all()
    finally:
        dist.destroy_process_group()


def test_no_capture_is_seen_where_cuda_was_never_used() -> None:
    """Asking would make a CUDA context, which a process that forks must not have."""
    if not torch.cuda.is_initialized():
        assert not is_capturing()
    refuse_in_capture()


def test_uploads_in_a_capture(capture: Callable[[], None]) -> None:
    """Memory is made beforehand, is never written to again, and an error says where it ends."""
    uploads = CapturedUploads(3)
    memory = torch.zeros(2, 3, dtype=torch.int64)
    uploads._free = list(memory)  # as `prepare` makes it, which needs a GPU
    capture()
    with pytest.raises(RuntimeError, match="make one step as it is now, and then capture"):
        refuse_in_capture()
    got: list[Tensor] = [uploads.upload([1, 2, 2**62 + i], torch.device("cpu")) for i in range(2)]
    assert [t.tolist() for t in got] == [[1, 2, 2**62], [1, 2, 2**62 + 1]]
    assert sorted(memory.tolist()) == [t.tolist() for t in got]
    with pytest.raises(RuntimeError, match="make one, and then capture more"):
        uploads.upload([1, 2, 3], torch.device("cpu"))
