"""A layout made flesh: parameters where they lie, and one rank's flat buffer of what goes with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._torch_compat import foreach_copy_
from ..frozen import takes_part
from ..memory_order import flat, is_dense, laid_out_like
from .box_tensor import BoxTensor
from .boxes import Box
from .collectives import all_gather_in_place, check_device, start_all_gather
from .layout import ParamSlice, ShardLayout

# Elements of the parameters of a shard, if they are more than one. Shards are stepped and synchronised one after
# another, so that the collective of one hides behind the work of the next; it must be large enough to be efficient.
SHARD_NUMEL = 1 << 29


def check_shardable(params: Sequence[Tensor], others: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Raises where parameters that take part cannot be sharded over the group, beside ``others``."""
    device = next((p.device for p in (*others, *params) if takes_part(p)), None)
    for i, p in enumerate(params):
        if not takes_part(p):
            continue
        check_device(p.device, group)
        if p.device != device:
            raise ValueError(
                f"parameter {i} of the group is on {p.device}, others on {device}: a rank's must share one"
            )
        if not is_dense(p):
            raise ValueError(
                f"parameter {i} of the group, shape {tuple(p.shape)}, has gaps between its elements (strides "
                f"{p.stride()}); ShardedLion needs dense parameters: use .contiguous() or .clone()"
            )


def make_shards(params: Sequence[Tensor], dtypes: Sequence[torch.dtype], world_size: int) -> list[Shard]:
    """Shards of zeros, in the order of the parameters.

    Args:
        dtypes: of each parameter's momentum.
    """
    alike: dict[tuple[torch.dtype, torch.dtype], list[list[Tensor]]] = {}
    filled: dict[tuple[torch.dtype, torch.dtype], int] = {}
    for p, dtype in zip(params, dtypes, strict=True):
        key = p.dtype, dtype
        parts = alike.setdefault(key, [])
        if not parts or filled[key] + p.numel() > SHARD_NUMEL:
            parts.append([])
            filled[key] = 0
        parts[-1].append(p)
        filled[key] += p.numel()
    return [Shard(part, dtype, world_size) for (_, dtype), parts in alike.items() for part in parts]


class Shard:
    """Parameters of one dtype whose momenta share a dtype, and this rank's part of those momenta.

    Attributes:
        params: the parameters, dense, all on one device.
        numbers: theirs, as the user counts them, for messages.
        layout: their cut; parameter numbers are indices into ``params``.
        exp_avg: the momentum shard, shape (layout.shard_numel,).
        pack: staging for the tails, shape (layout.pack_numel,), dtype of the parameters.
    """

    def __init__(self, params: list[Tensor], dtype: torch.dtype, world_size: int) -> None:
        self.params = params
        self.numbers = list(range(len(params)))
        self.layout = ShardLayout.make([p.numel() for p in params], world_size)
        device = params[0].device
        self.exp_avg = torch.zeros(self.layout.shard_numel, dtype=dtype, device=device)
        self.pack = torch.zeros(self.layout.pack_numel, dtype=params[0].dtype, device=device)
        self._slices: dict[int, list[list[ParamSlice]]] = {}
        self._described = self._describe()
        self._addresses: list[int] = []
        self._buffers: list[Tensor] = []  # what the all-gather completes: heads in place, and the pack
        self._tails: list[Tensor] = []  # where the tails lie in the parameters ...
        self._packed_tails: list[Tensor] = []  # ... and in the pack

    def _describe(self) -> list[tuple[Any, ...]]:
        return [(p.dtype, p.shape, p.stride()) for p in self.params]

    def refresh(self) -> None:
        """Follows parameters that have moved; raises for ones that have become something else."""
        described = self._describe()
        if described != self._described:
            i = next(i for i, (a, b) in enumerate(zip(described, self._described, strict=True)) if a != b)
            raise ValueError(
                f"a parameter changed from (dtype, shape, strides) {self._described[i]} to {described[i]} under "
                "ShardedLion: convert the model before making the optimizer"
            )
        addresses = [p.data_ptr() for p in self.params]
        if addresses == self._addresses:
            return
        heads = [flat(p, 0, head) for p, head in zip(self.params, self.layout.heads, strict=True) if head]
        self._buffers = [*heads, self.pack] if self.layout.pack_numel else heads
        # As integers: copies of 16-bit floats on a GPU may change the bits of a NaN.
        bits = {2: torch.int16, 4: torch.int32}[self.pack.element_size()]
        pack = self.pack.view(bits)
        self._tails = [flat(self.params[t.param], t.start, t.length).view(bits) for t in self.layout.tails]
        self._packed_tails = [pack[t.pack_offset : t.pack_offset + t.length] for t in self.layout.tails]
        self._addresses = addresses

    def start_gather(self, group: dist.ProcessGroup) -> Any:
        """Starts bringing every rank's slices to every rank: heads in place, tails through the pack.

        Returns:
            What to `wait` for before `finish_gather`; None if there is nothing to bring.
        """
        # All tails go into the pack, though only this rank's part of it counts: the gather overwrites the rest.
        if self._tails:
            foreach_copy_(self._packed_tails, self._tails)
        return start_all_gather(self._buffers, group) if self._buffers else None

    def finish_gather(self) -> None:
        """Puts the tails in their place. All of it is unseen by autograd."""
        if self._tails:
            foreach_copy_(self._tails, self._packed_tails)

    def gather_exp_avgs(self, group: dist.ProcessGroup, keep: bool) -> Iterator[Tensor]:
        """Every parameter's whole momentum in turn, on the CPU and in the parameter's shape; a collective.
        Where ``keep`` is False this rank only contributes, and gets empty tensors."""
        rank, layout = dist.get_rank(group), self.layout

        def gathered(numel: int, shard_offset: int) -> Tensor:
            whole = torch.empty(numel * layout.world_size, dtype=self.exp_avg.dtype, device=self.exp_avg.device)
            whole.narrow(0, rank * numel, numel).copy_(self.exp_avg.narrow(0, shard_offset, numel))
            all_gather_in_place([whole] if numel else [], group)
            return whole

        pack = gathered(layout.pack_numel // layout.world_size, layout.pack_shard_offset)
        tails, offset = {t.param: t for t in layout.tails}, 0
        for i, p in enumerate(self.params):
            numel = layout.heads[i] // layout.world_size
            head = gathered(numel, offset)
            offset += numel
            if not keep:
                yield torch.empty(0)
                continue
            exp_avg = torch.empty_strided(p.shape, p.stride(), dtype=self.exp_avg.dtype)
            flat(exp_avg, 0, head.numel()).copy_(head)
            if i in tails:
                t = tails[i]
                flat(exp_avg, t.start).copy_(pack[t.pack_offset : t.pack_offset + t.length])
            yield exp_avg.contiguous()

    def take_exp_avgs(self, exp_avgs: dict[int, Tensor], rank: int) -> None:
        """Takes over this rank's slices of momenta in the shapes of their parameters, by ``id`` of these: whole, or
        `BoxTensor`s of this very shard's cut. Momenta that are not given become zeros."""
        for i, p in enumerate(self.params):
            given = exp_avgs.get(id(p))
            if isinstance(given, BoxTensor):
                self.boxes(i, rank).copy_(given)
                continue
            in_order = None if given is None else laid_out_like(given, p)
            for s in self.slices(i, rank):
                own = self.exp_avg.narrow(0, s.shard_offset, s.length)
                if in_order is None:
                    own.zero_()
                else:
                    own.copy_(flat(in_order, s.start, s.length))

    def slices(self, param: int, rank: int) -> list[ParamSlice]:
        """What a rank owns of a parameter."""
        if rank not in self._slices:
            owned = self._slices[rank] = [[] for _ in self.params]
            for s in self.layout.slices(rank):
                owned[s.param].append(s)
        return self._slices[rank][param]

    def boxes(self, param: int, rank: int) -> BoxTensor:
        """A parameter's momentum as this rank has it: a view. One without elements is the first rank's."""
        p = self.params[param]
        if rank == 0 and not p.numel():
            nothing = self.exp_avg[:0].view(p.shape)
            return BoxTensor(p.shape, [Box((0,) * p.dim(), tuple(p.shape))], [nothing], nothing.dtype, nothing.device)
        runs = [(s.start, self.exp_avg.narrow(0, s.shard_offset, s.length)) for s in self.slices(param, rank)]
        return BoxTensor.of_runs(p.shape, p.stride(), runs, self.exp_avg)
