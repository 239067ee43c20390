"""Lion.step() in CUDA graphs: replays make the steps that eager calls make, bit for bit, while lr changes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lion_dist import Lion, ShardedLion
from lion_dist.update.segments import TILE
from lion_dist.upload import CAPTURES
from tests.asserts import assert_same_bits

from .common import BF16, F32, GPU, needs_gpu, reuse_freed_memory, run_on_gpus

pytestmark = [needs_gpu, pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")]  # where a step is refused

SIZES = ((300, 7), (1,), (TILE + 3,), (129,), (64, 64))


def groups_of(params: list[Tensor]) -> list[dict[str, Any]]:
    return [{"params": params[::2], "weight_decay": 0.5}, {"params": params[1::2]}]


class Pair:
    """Two equal models, one stepped by eager calls and one by replays, each with an lr tensor of its own.

    Attributes:
        eager, graphed: the parameters of both.
    """

    def __init__(self, dtype: torch.dtype = F32, **options: Any) -> None:
        generator = torch.Generator().manual_seed(3)
        self.generator = generator
        values = [torch.randn(size, generator=generator).to(dtype) for size in SIZES]
        self.eager = [v.to(GPU).requires_grad_() for v in values]
        self.graphed = [v.to(GPU).requires_grad_() for v in values]
        self.lrs = [torch.tensor(0.01, device=GPU), torch.tensor(0.01, device=GPU)]
        self.optimizers = [
            Lion(groups_of(params), lr=lr, **options)
            for params, lr in zip((self.eager, self.graphed), self.lrs, strict=True)
        ]
        for p in (*self.eager, *self.graphed):
            p.grad = torch.zeros_like(p)
        self.fill_gradients()

    def fill_gradients(self) -> None:
        """New values at the same addresses, equal in both models."""
        for p, q in zip(self.eager, self.graphed, strict=True):
            values = torch.randn(p.shape, generator=self.generator).to(p.device, p.dtype)
            for t in (p, q):
                assert t.grad is not None
                t.grad.copy_(values)

    def set_lr(self, value: float) -> None:
        for lr in self.lrs:
            lr.fill_(value)

    def step_both(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def assert_equal(self, what: str) -> None:
        for i, (p, q) in enumerate(zip(self.eager, self.graphed, strict=True)):
            assert_same_bits(q.detach(), p.detach(), f"{what}, parameter {i}")
            for name, t in self.optimizers[0].state[p].items():
                assert_same_bits(self.optimizers[1].state[q][name], t, f"{what}, {name} {i}")


@contextmanager
def capture(graph: torch.cuda.CUDAGraph) -> Iterator[None]:
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        yield


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (F32, {}),
        (BF16, {}),
        (BF16, {"master_weights": True}),
        (F32, {"momentum_dtype": BF16, "maximize": True}),
        (F32, {"use_triton": False}),
    ],
    ids=["fp32", "bf16", "bf16 + master", "bf16 momentum", "plain torch"],
)
def test_a_hundred_replays(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """With another lr and other gradients in each; eager steps before, between and after replays."""
    pair = Pair(dtype, **options)
    pair.step_both()
    pair.step_both()
    graph = torch.cuda.CUDAGraph()
    with capture(graph):
        pair.optimizers[1].step()
    pair.assert_equal("a capture changes nothing")
    for number in range(100):
        pair.fill_gradients()
        pair.set_lr(0.01 * (1 + number % 7))
        pair.optimizers[0].step()
        if number % 10 == 9:
            pair.optimizers[1].step()
        else:
            graph.replay()
        if number % 25 == 0:
            reused = reuse_freed_memory()
            pair.assert_equal(f"step {number}")
            del reused
    pair.assert_equal("the end")


def test_gradients_that_moved_before_the_capture() -> None:
    """Their addresses are copied in every replay, from memory that later steps do not write to; and the step after a
    replay takes its own."""
    pair = Pair()
    pair.step_both()
    kept = [p.grad for p in pair.graphed]
    for p in pair.graphed:
        assert p.grad is not None
        p.grad = p.grad.clone()
    graph = torch.cuda.CUDAGraph()
    with capture(graph):
        pair.optimizers[1].step()
    captured = [p.grad for p in pair.graphed]
    for number in range(6):
        for p, old, new in zip(pair.graphed, kept, captured, strict=True):
            p.grad = old if number % 2 else new
        pair.fill_gradients()
        pair.optimizers[0].step()
        pair.optimizers[1].step() if number % 2 else graph.replay()
        reused = reuse_freed_memory()
        pair.assert_equal(f"step {number}")
        del reused


def test_tables_that_a_graph_reads_are_kept() -> None:
    """The optimizer makes new tables when parameters move and a decay changes; replays still step the tensors that the
    graph was given, by the decay of then."""
    pair = Pair()
    pair.step_both()
    optimizer = pair.optimizers[1]
    graph = torch.cuda.CUDAGraph()
    with capture(graph):
        optimizer.step()
    old = [p.data for p in pair.graphed]
    for p in pair.graphed:
        p.data = p.data.clone()
    optimizer.param_groups[0]["weight_decay"] = 0.25
    optimizer.step()
    twins = [t.clone().requires_grad_() for t in old]
    twin = Lion(groups_of(twins), lr=0.01)
    for p, q in zip(pair.graphed, twins, strict=True):
        twin.state[q] = {"exp_avg": optimizer.state[p]["exp_avg"].clone()}
        q.grad = p.grad
    reused = reuse_freed_memory()
    pair.set_lr(0.125)
    twin.param_groups[0]["lr"] = twin.param_groups[1]["lr"] = 0.125
    graph.replay()
    twin.step()
    for i, (t, q) in enumerate(zip(old, twins, strict=True)):
        assert_same_bits(t, q.detach(), f"parameter {i}")
    del reused


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 3, bias=False), nn.LayerNorm(3)).to(GPU)


def test_a_graph_of_the_whole_iteration() -> None:
    """As docs/performance.md writes it: forward, backward and step; its gradients are the graph's own."""
    eager, graphed = network(), network()
    rates = [torch.tensor(0.01, device=GPU) for _ in range(2)]
    optimizers = [
        Lion(model.parameters(), lr=lr, weight_decay=0.1) for model, lr in zip((eager, graphed), rates, strict=True)
    ]
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9) for optimizer in optimizers]
    generator = torch.Generator(GPU).manual_seed(1)
    x, static = torch.zeros(16, 64, device=GPU), torch.zeros(16, 64, device=GPU)

    def iteration(number: int, batch: Tensor) -> None:
        optimizers[number].zero_grad(set_to_none=True)
        (eager, graphed)[number](batch).square().mean().backward()
        optimizers[number].step()

    def draw() -> None:
        x.normal_(generator=generator)
        static.copy_(x)

    side = torch.cuda.Stream()
    for _ in range(3):
        draw()
        iteration(0, x)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            iteration(1, static)
        torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    optimizers[1].zero_grad(set_to_none=True)
    with capture(graph):
        iteration(1, static)
    for number in range(20):
        draw()
        iteration(0, x)
        graph.replay()
        for scheduler in schedulers:
            scheduler.step()
        for p, q in zip(eager.parameters(), graphed.parameters(), strict=True):
            assert_same_bits(q.detach(), p.detach(), f"iteration {number}")
    assert float(rates[1]) == float(rates[0]) < 0.002


def test_many_captures_without_a_step_between_them() -> None:
    """Each with gradients of its own. The last one that there is no memory for raises, and a step mends it."""
    pair = Pair()
    pair.step_both()
    graphs, kept = [], []
    for _ in range(CAPTURES):
        for p in pair.graphed:
            kept.append(p.grad)
            p.grad = torch.zeros_like(p)
        graphs.append((torch.cuda.CUDAGraph(), [p.grad for p in pair.graphed]))
        with capture(graphs[-1][0]):
            pair.optimizers[1].step()
    for p in pair.graphed:
        p.grad = torch.zeros_like(p)
    with pytest.raises(RuntimeError, match="make one, and then capture more"), capture(torch.cuda.CUDAGraph()):
        pair.optimizers[1].step()
    for graph, grads in (*graphs[::5], graphs[0]):
        for p, g in zip(pair.graphed, grads, strict=True):
            p.grad = g
        pair.fill_gradients()
        pair.optimizers[0].step()
        graph.replay()
        pair.assert_equal("one of many graphs")
    for p in pair.graphed:
        p.grad = torch.zeros_like(p)
    pair.fill_gradients()
    pair.step_both()
    with capture(torch.cuda.CUDAGraph()):
        pair.optimizers[1].step()
    pair.assert_equal("after more graphs")


def moved(pair: Pair) -> None:
    pair.graphed[1].data = pair.graphed[1].data.clone()


def new_decay(pair: Pair) -> None:
    pair.optimizers[1].param_groups[0]["weight_decay"] = 0.25


@pytest.mark.parametrize("change", [moved, new_decay])
def test_what_changed_before_the_capture_is_refused(change: Callable[[Pair], None]) -> None:
    """A step makes the tables anew; nothing was changed by the refusal."""
    pair = Pair()
    pair.step_both()
    change(pair)
    with (
        pytest.raises(RuntimeError, match="make one step as it is now, and then capture"),
        capture(torch.cuda.CUDAGraph()),
    ):
        pair.optimizers[1].step()
    pair.assert_equal("refused")
    pair.optimizers[0].param_groups[0]["weight_decay"] = pair.optimizers[1].param_groups[0]["weight_decay"]
    pair.step_both()
    graph = torch.cuda.CUDAGraph()
    with capture(graph):
        pair.optimizers[1].step()
    pair.optimizers[0].step()
    graph.replay()
    pair.assert_equal("captured")


def test_refusals_leave_a_usable_optimizer() -> None:
    """Of a number as lr, a gradient that is gone, an 8-bit momentum and a first step."""
    for options, match in (
        ({}, "had a gradient in the last step"),
        ({"lr": 0.01}, "is the number 0.01"),
        ({"momentum_dtype": "int8"}, "8-bit momentum"),
        (None, "make a step before the capture"),
    ):
        p = torch.ones(1000, device=GPU, requires_grad=True)
        p.grad = torch.ones_like(p)
        opt = Lion([p], **{"lr": torch.tensor(0.01, device=GPU), **(options or {})})  # type: ignore[arg-type]
        if options is not None:
            opt.step()
        before = p.detach().clone()
        if options == {}:
            p.grad = None
        with pytest.raises((RuntimeError, ValueError), match=match), capture(torch.cuda.CUDAGraph()):
            opt.step()
        assert_same_bits(p.detach(), before)
        p.grad = torch.ones_like(p)
        opt.step()
        assert not torch.equal(p.detach(), before)


def check_sharded_lion(rank: int, world_size: int) -> None:
    p = nn.Parameter(torch.ones(1000, device="cuda"))
    optimizer = ShardedLion([p], lr=torch.tensor(0.01, device="cuda"))
    for _ in range(2):
        (p * 2).sum().backward()
        optimizer.step()
    (p * 2).sum().backward()
    with pytest.raises(RuntimeError, match="cannot be captured"), capture(torch.cuda.CUDAGraph()):
        optimizer.step()
    optimizer.step()
    dist.barrier()


def check_fsdp2(rank: int, world_size: int) -> None:
    """The step alone, over the shards, whose gradients stay where the last backward left them."""
    from torch.distributed.fsdp import fully_shard

    models: list[Any] = [network(), network()]
    optimizers = []
    for model in models:
        fully_shard(model)
        optimizers.append(Lion(model.parameters(), lr=torch.tensor(0.01, device="cuda")))
        model(torch.ones(4, 64, device="cuda")).square().mean().backward()
        optimizers[-1].step()
    graph = torch.cuda.CUDAGraph()
    with capture(graph):
        optimizers[1].step()
    for number in range(5):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"].fill_(0.01 * number)
        optimizers[0].step()
        graph.replay()
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert_same_bits(q.to_local(), p.to_local(), f"step {number}")


@pytest.mark.parametrize("check", [check_sharded_lion, check_fsdp2])
def test_on_ranks(check: Callable[[int, int], None], tmp_path: Path) -> None:
    run_on_gpus(check, 1, tmp_path)


def test_a_copy_of_an_optimizer_captures_by_itself() -> None:
    pair = Pair()
    pair.step_both()
    with capture(torch.cuda.CUDAGraph()):
        pair.optimizers[1].step()
    twin = copy.deepcopy(pair.optimizers[1])
    params = [p for group in twin.param_groups for p in group["params"]]
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="make a step before the capture"), capture(torch.cuda.CUDAGraph()):
        twin.step()
    twin.step()
    with capture(torch.cuda.CUDAGraph()):
        twin.step()
