"""Several ShardedLions clipped together, as expert parallelism needs it: experts are replicated over other ranks than
the dense parameters are."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import lion_dist
from lion_dist import Lion, ShardedLion, stepper
from lion_dist.meshes import sum_over_meshes
from lion_dist.update import reference
from tests.asserts import assert_same_bits
from tests.harness import device_of, run_ranks
from tests.scenarios.pair import LR, average, gradient
from tests.scenarios.passes import TINY

RANKS = 4
PARTS = [[0, 2], [1, 3]]  # ranks 0 and 2 hold the same experts, and so do 1 and 3
DENSE, EXPERTS = ((20, 33), (300,), (7,)), ((40, 33), (5,))


class Kind(NamedTuple):
    """One set of parameters.

    numbers: of the parameters, for their gradients: other ones for other experts.
    replicas: the global ranks that hold this rank's part, whose gradients are averaged.
    mesh: over which DTensors are sharded, by rows; None for plain tensors.
    """

    shapes: tuple[tuple[int, ...], ...]
    numbers: list[int]
    replicas: list[int]
    mesh: DeviceMesh | None = None

    def whole(self, device: torch.device) -> list[Tensor]:
        return [torch.full(shape, 1.0 + i, device=device) for shape, i in zip(self.shapes, self.numbers, strict=True)]

    def params(self, device: torch.device) -> list[nn.Parameter]:
        if self.mesh is None:
            return [nn.Parameter(t) for t in self.whole(device)]
        return [nn.Parameter(distribute_tensor(t, self.mesh, [Shard(0)])) for t in self.whole(device)]

    def own(self, t: Tensor) -> Tensor:
        """This rank's part of a whole tensor."""
        return t if self.mesh is None else distribute_tensor(t, self.mesh, [Shard(0)]).to_local()

    def idle(self, step: int) -> bool:
        """Whether nobody uses the parameters in a step: experts that no token has chosen."""
        return step == 2 and self.mesh is None and self.replicas == PARTS[1]

    def averages(self, step: int, device: torch.device) -> list[Tensor]:
        shapes = [torch.empty(shape, device=device) for shape in self.shapes]
        return [average(i, t, step, len(self.replicas)) for i, t in zip(self.numbers, shapes, strict=True)]

    def give_gradients(self, params: list[nn.Parameter], step: int, rank: int, stage: int) -> Tensor:
        """In stage 1 the averages. Returns the loss whose gradients stage 2 averages."""
        loss = torch.zeros((), device=local(params[0]).device)
        whole = self.averages(step, loss.device)
        for i, p, g in zip(self.numbers, params, whole, strict=True):
            if stage == 1:
                p.grad = g if self.mesh is None else distribute_tensor(g, self.mesh, [Shard(0)])
            else:
                of_rank = gradient(i, g, step, self.replicas.index(rank), len(self.replicas))
                loss = loss + (p.to_local() if isinstance(p, DTensor) else p).mul(self.own(of_rank)).sum()
        return loss


def local(t: Any) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


def body(rank: int, world_size: int) -> list[float]:
    device = device_of(rank, world_size)
    grid = init_device_mesh(device.type, (2, 2), mesh_dim_names=("replicas", "parts"))
    part = rank % 2
    dense = Kind(DENSE, [0, 1, 2], [0, 1, 2, 3])
    experts = [Kind(EXPERTS, [10 * n + 10, 10 * n + 11], PARTS[n]) for n in range(2)]
    over_mesh = Kind(EXPERTS, [10, 11], PARTS[part], grid["parts"])
    over_both = [Kind(EXPERTS, [10 * n + 10, 10 * n + 11], [rank], grid["parts"]) for n in range(2)]
    dense_over_mesh = Kind(DENSE, [0, 1, 2], PARTS[part], grid["parts"])
    norms = []
    for stage, sync in ((1, "params"), (2, "signs")):
        for name, kinds, everywhere in (
            ("plain experts", [dense, experts[part]], [dense, *experts]),
            ("experts first", [experts[part], dense], [*experts, dense]),
            ("experts over a mesh", [dense, over_mesh], [dense, over_mesh]),
            ("all over a mesh, experts on one rank each", [dense_over_mesh, over_both[rank // 2]],
             [dense_over_mesh, *over_both]),
        ):  # fmt: skip
            norms += train(rank, device, stage, sync, kinds, everywhere, f"stage {stage}, {sync}, {name}")
    return norms


def train(
    rank: int, device: torch.device, stage: int, sync: str, kinds: list[Kind], everywhere: list[Kind], what: str
) -> list[float]:
    """Trains beside Lions of whole parameters, those of ``everywhere``, of which ``kinds`` are on this rank."""
    params = [kind.params(device) for kind in kinds]
    optimizers = [
        ShardedLion(own, lr=LR, stage=stage, param_sync=sync, bucket_mb=TINY, process_group=own_group(kind, rank))
        for own, kind in zip(params, kinds, strict=True)
    ]
    copies = [[nn.Parameter(t) for t in kind.whole(device)] for kind in everywhere]
    lions = [Lion(of_kind, lr=LR) for of_kind in copies]
    norms = []
    for step in range(3):
        losses = [
            kind.give_gradients(own, step, rank, stage)
            for kind, own in zip(kinds, params, strict=True)
            if not kind.idle(step)
        ]
        if stage == 2:
            torch.stack(losses).sum().backward()
        used = [(of_kind, kind) for of_kind, kind in zip(copies, everywhere, strict=True) if not kind.idle(step)]
        grads = [g for _, kind in used for g in kind.averages(step, device)]
        total = torch.stack([reference.sum_of_squares(g) for g in grads]).sum()
        norm, scale = reference.clip_coefficient(total, 5.0)
        assert scale < 1
        if step == 1:  # a second call clips what is clipped
            lion_dist.clip_grad_norm_(optimizers, float("inf"))
        assert_same_bits(lion_dist.clip_grad_norm_(iter(optimizers), 5.0), norm, f"{what}, norm")
        for p, g in zip([p for of_kind, _ in used for p in of_kind], grads, strict=True):
            p.grad = g * scale
        for optimizer in (*optimizers, *lions):
            optimizer.step()
            optimizer.zero_grad()
        for kind, own in zip(kinds, params, strict=True):
            for p, copy in zip(own, copies[everywhere.index(kind)], strict=True):
                assert_same_bits(local(p.detach()), kind.own(copy.detach()), f"{what}, step {step}")
        norms.append(norm.item())
    return norms


def own_group(kind: Kind, rank: int) -> dist.ProcessGroup:
    """A new group for each optimizer, since several take part in one backward; on every rank in the same order."""
    groups = [[0, 1, 2, 3]] if len(kind.replicas) == 4 else PARTS if len(kind.replicas) == 2 else [[0], [1], [2], [3]]
    made = [dist.new_group(ranks) for ranks in groups]
    return next(group for group, ranks in zip(made, groups, strict=True) if rank in ranks)


def test_experts_beside_dense_parameters(tmp_path: Path) -> None:
    norms = run_ranks(body, RANKS, tmp_path)
    assert all(n == norms[0] for n in norms)


def grad_of(t: Tensor, sparse: bool = False) -> nn.Parameter:
    """A parameter whose gradient is its value."""
    p = nn.Parameter(t)
    p.grad = t.to_sparse() if sparse else t
    return p


def bad_input(rank: int, world_size: int) -> float:
    device = device_of(rank, world_size)
    rows, columns = ([dist.new_group(ranks) for ranks in halves] for halves in ([[0, 1], [2, 3]], PARTS))
    grid = init_device_mesh(device.type, (2, 2), mesh_dim_names=("replicas", "parts"))
    alone = [dist.new_group([r]) for r in range(world_size)][rank]

    def made(group: dist.ProcessGroup | None, params: list[nn.Parameter] | None = None) -> ShardedLion:
        params = params or [nn.Parameter(torch.ones(300, device=device))]
        optimizer = ShardedLion(params, lr=LR, stage=1, process_group=group)
        for p in params:
            p.grad = torch.ones_like(p)
        return optimizer

    everywhere, row, column = made(None), made(rows[rank // 2]), made(columns[rank % 2])
    sharded = made(alone, Kind(EXPERTS, [0, 1], [rank], grid["parts"]).params(device))
    plain = nn.Parameter(torch.ones(3, device=device))
    cases: list[tuple[Any, Any, type[Exception], str]] = [
        ([row, column], 1.0, ValueError, r"process groups have ranks \[.*\] and \[.*\] cannot be clipped together"),
        ([everywhere, sharded], 1.0, ValueError, r"ranks \[0, 1, 2, 3\].* in the mesh of DTensors of another one"),
        ([everywhere, plain], 1.0, TypeError, "got both: a Parameter stands beside"),
        ([plain, everywhere], 1.0, TypeError, "got both: a Parameter stands beside"),
        ([everywhere, Lion([plain])], 1.0, TypeError, "or ShardedLions, got a Lion: give the parameters"),
        (Lion([plain]), 1.0, TypeError, "or ShardedLions, got a Lion: give the parameters"),
        ([everywhere, "dense"], 1.0, TypeError, "got both: a str stands beside"),
        (["dense"], 1.0, TypeError, "takes parameters or ShardedLions, got str 'dense'"),
        ([everywhere, column], 0.0, ValueError, "max_norm must be > 0, got 0"),
        ([everywhere, column], "1.0", TypeError, "max_norm must be a number or a tensor of one element, got '1.0'"),
        ([plain], None, TypeError, "max_norm must be a number or a tensor of one element, got None"),
        ([everywhere, everywhere], 1.0, ValueError, "got a ShardedLion twice"),
        (nn.Sequential(), 1.0, TypeError, r"got a Sequential: give parameters, such as model\.parameters"),
        (None, 1.0, TypeError, r"got a NoneType: give parameters"),
        ([grad_of(plain.detach().to(torch.complex64))], 1.0, TypeError, "torch.complex64 and torch.strided; expected"),
        ([grad_of(plain.detach(), sparse=True)], 1.0, TypeError, "torch.float32 and torch.sparse_coo; expected"),
    ]
    for given, max_norm, error, said in cases:
        with pytest.raises(error, match=said):
            lion_dist.clip_grad_norm_(given, max_norm)
    params = nn.ParameterList([grad_of(torch.full((4,), 2.0, device=device)) for _ in range(4)])
    assert lion_dist.clip_grad_norm_(params, 1.0) == 8
    for optimizer in (everywhere, row, column, sharded):  # nothing was clipped
        optimizer.step()
        assert all((local(p.detach()) == 1 + i - LR).all() for i, p in enumerate(optimizer.param_groups[0]["params"]))
    # The mesh of DTensors, here of ranks 0 and 1 or 2 and 3, counts by itself.
    of_mesh = sharded.param_groups[0]["params"]
    for given in (sharded, [sharded], of_mesh):
        with pytest.raises(ValueError, match=rf"ranks \[{rank ^ 1}\], which the norm includes by itself"):
            lion_dist.clip_grad_norm_(given, 1.0, [rows[rank // 2]])
    for p in of_mesh:
        p.grad = torch.ones_like(p)
    other: Any = dist.new_group([0])
    for groups, error, said in (
        (other, TypeError, "must be a list of process groups, got a (ProcessGroup|int): give"),
        ([rows, other], TypeError, "got a list in it"),
        ([columns[rank % 2]] * 2, ValueError, r"two of process_groups have ranks \[\d\], whose elements"),
        ([columns[rank % 2], None], TypeError, "got a NoneType in it"),
        *([([other], ValueError, "this rank is not in one of process_groups")] * (rank > 0)),
    ):
        for given in (of_mesh, sharded):
            with pytest.raises(error, match=said):
                lion_dist.clip_grad_norm_(given, 1.0, groups)
    norm = lion_dist.clip_grad_norm_(of_mesh, float("inf"), iter([columns[rank % 2]]))
    assert norm.item() == pytest.approx((2 * (40 * 33 + 5)) ** 0.5, rel=1e-6)
    # One optimizer is clipped as by its own method: 600 elements.
    lone = made(None, [nn.Parameter(torch.ones(600, device=device))])
    expected = lone.clip_grad_norm_(float("inf"))
    assert expected.item() == pytest.approx(600**0.5, rel=1e-6)
    for given in (lone, [lone]):
        assert_same_bits(lion_dist.clip_grad_norm_(given, float("inf")), expected)
    # Groups may add in other orders. All ranks take the first one's sum, or their steps would be refused.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stepper, "sum_over_meshes", lambda sums: sum_over_meshes(sums) * (1 + rank))
        norm = lion_dist.clip_grad_norm_([column, everywhere], 1.0)
    column.step()
    everywhere.step()
    return norm.item()


def test_bad_input_and_sums_that_differ(tmp_path: Path) -> None:
    norms = run_ranks(bad_input, RANKS, tmp_path)
    assert norms == [norms[0]] * RANKS
