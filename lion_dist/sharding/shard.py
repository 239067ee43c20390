"""A shard: parameters where they lie, and one rank's flat buffers of the state that belongs to them.

Column: one kind of state, described by its name, dtype and block. A shard has one flat buffer for each column, in which
    `ShardLayout.slices` says where each parameter's runs lie. This file does not know what the columns mean.
Whole column: a column ``of_param`` where every rank writes whole parameters. Every rank then keeps all of this state,
    in one tensor for each parameter, with the parameter's memory order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from .._torch_compat import foreach_copy_, tensors_alike
from ..dtensors import local, locals_of, placed_like
from ..frozen import takes_part
from ..memory_order import flat, flat_bytes, is_dense, laid_out_like
from ..meshes import Placing, local_box
from .box_tensor import BoxTensor
from .boxes import Box
from .collectives import all_gather_in_place, all_reduce_sum, check_device, start_all_gather
from .layout import ALIGN, Run, ShardLayout

# Largest number of elements of a shard with several parameters. Shards are stepped and synchronised one after another,
# so that the collective of one hides behind the work of the next; it must be large enough to be efficient.
SHARD_NUMEL = 1 << 29

_BITS = {2: torch.int16, 4: torch.int32}  # by element size

_DTYPE, _SHAPE = attrgetter("dtype"), attrgetter("shape")


class Column(Protocol):
    """One kind of state, kept for every ``block`` consecutive elements of a parameter. Equal columns are alike."""

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def block(self) -> int: ...

    @property
    def of_param(self) -> bool:
        """Whether the state is needed wherever the parameter is written."""

    def numel(self, length: int) -> int:
        """Number of elements kept for ``length`` elements of a parameter."""

    def shape(self, of: Sequence[int]) -> tuple[int, ...]:
        """Shape of the state of a parameter of shape ``of``: the same where ``block`` is 1, else 1-D."""


class State(NamedTuple):
    """The tensors of a shard's state; see `Shard`."""

    buffers: dict[str, Tensor]
    whole: dict[str, list[Tensor]]


def check_shardable(params: Sequence[Tensor], others: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Raises ValueError where a parameter that takes part cannot be sharded over the group together with ``others``."""
    device = next((local(p).device for p in (*others, *params) if takes_part(p)), None)
    for i, p in enumerate(params):
        if not takes_part(p):
            continue
        part = local(p)
        check_device(part.device, group)
        if part.device != device:
            raise ValueError(
                f"parameter {i} of the group is on {part.device}, but the optimizer's others are on {device}: all "
                "parameters of a rank must be on one device, so move the model before making the optimizer"
            )
        if not is_dense(part):
            raise ValueError(
                f"parameter {i} of the group, shape {tuple(p.shape)}, has gaps between its elements (strides "
                f"{part.stride()}); ShardedLion needs dense parameters: use .contiguous() or .clone()"
            )


def make_shards(
    params: Sequence[Tensor], columns: Sequence[tuple[Column, ...]], world_size: int, keep_whole: bool = False
) -> list[Shard]:
    """Shards whose state is zeros, in the order of the parameters.

    Args:
        params: dense, on one device.
        columns: the columns of each parameter.
        world_size: number of ranks.
        keep_whole: whether columns ``of_param`` are whole on every rank.
    """
    alike: dict[tuple[torch.dtype, tuple[Column, ...], Placing], list[list[Tensor]]] = {}
    filled: dict[tuple[torch.dtype, tuple[Column, ...], Placing], int] = {}
    for p, own in zip(params, columns, strict=True):
        key = p.dtype, own, Placing.of(p)
        parts = alike.setdefault(key, [])
        if not parts or filled[key] + local(p).numel() > SHARD_NUMEL:
            parts.append([])
            filled[key] = 0
        parts[-1].append(p)
        filled[key] += local(p).numel()
    return [Shard(part, own, world_size, keep_whole) for (_, own, _), parts in alike.items() for part in parts]


class Shard:
    """Parameters of one dtype with the same columns and placing, and this rank's part of their state.

    Attributes:
        params: the parameters, dense, all on one device.
        placing: their mesh, if they are DTensors.
        locals: what this rank holds of them: plain tensors, which are what is cut over the ranks, as of `refresh`.
        numbers: the number of each parameter in the optimizer, for error messages.
        columns: the kinds of state.
        layout: how the parameters are cut; its parameter numbers are indices into ``params``.
        buffers: for each column that is not whole, by its name, the flat state, shape (layout.shard_numel / block,).
        whole: for each whole column, by its name, the state of each parameter.
        offloaded: whether all of this state lies on the CPU for now, wherever the parameters are.
        tail_buffer: staging memory for the tails of the parameters, shape (layout.tail_buffer_numel,), in their dtype.
    """

    def __init__(
        self, params: list[Tensor], columns: tuple[Column, ...], world_size: int, keep_whole: bool = False
    ) -> None:
        self.params = params
        self.placing = Placing.of(params[0])
        self.locals = params if self.placing.mesh is None else locals_of(params)
        self.numbers = list(range(len(params)))
        self.columns = columns
        self.layout = ShardLayout.make([t.numel() for t in self.locals], world_size)
        device = self.locals[0].device
        self.buffers: dict[str, Tensor] = {}
        self.whole: dict[str, list[Tensor]] = {}
        for column in columns:
            if keep_whole and column.of_param:
                self.whole[column.name] = [_zeros(column, t) for t in self.locals]
                continue
            if ALIGN % column.block:
                raise ValueError(f"the block of {column.name} must divide {ALIGN}, got {column.block}")
            numel = column.numel(self.layout.shard_numel)
            self.buffers[column.name] = torch.zeros(numel, dtype=column.dtype, device=device)
        self.offloaded = False
        self.tail_buffer = torch.zeros(self.layout.tail_buffer_numel, dtype=params[0].dtype, device=device)
        self._slices: dict[int, list[list[Run]]] = {}
        self._described = self._describe()
        self._alike = tensors_alike(self.locals)  # a comparison in one call, which says no to more than must be refused
        self._addresses: list[int] = []
        self._gathered: list[Tensor] = []  # completed by the all-gather: heads in place, and the tail buffer
        self._tails: list[Tensor] = []  # the tails in the parameters ...
        self._staged_tails: list[Tensor] = []  # ... and in the tail buffer

    @property
    def device(self) -> torch.device:
        """The device of the buffers, when they are not offloaded."""
        return self.tail_buffer.device

    def _describe(self) -> list[list[Any]]:
        return [list(map(attribute, self.locals)) for attribute in (_DTYPE, _SHAPE, Tensor.stride)]

    def refresh(self) -> None:
        """Follows parameters that have moved. Raises ValueError where a dtype, a shape or strides have changed."""
        if self.placing.mesh is not None:
            self.locals = locals_of(self.params)
        if not self._alike(*self.locals):
            self._check_unchanged()
            self._alike = tensors_alike(self.locals)
        addresses = list(map(Tensor.data_ptr, self.locals))
        if addresses != self._addresses:
            self._take_addresses(addresses)

    def _check_unchanged(self) -> None:
        described = self._describe()
        if described != self._described:
            pairs = zip(zip(*self._described, strict=True), zip(*described, strict=True), strict=True)
            i, before, now = next((i, a, b) for i, (a, b) in enumerate(pairs) if a != b)
            raise ValueError(
                f"parameter {self.numbers[i]} changed from (dtype, shape, strides) {before} to {now} after ShardedLion "
                "was made: convert the model before making the optimizer"
            )

    def _take_addresses(self, addresses: list[int]) -> None:
        layout = self.layout
        heads = [flat(p, 0, head) for p, head in zip(self.locals, layout.heads, strict=True) if head]
        self._gathered = [*heads, self.tail_buffer] if layout.tail_buffer_numel else heads
        # As integers: copies of 16-bit floats on a GPU may change the bits of a NaN.
        bits = _BITS[self.tail_buffer.element_size()]
        staged = self.tail_buffer.view(bits)
        self._tails = [flat(self.locals[t.param], t.start, t.length).view(bits) for t in layout.tails]
        self._staged_tails = [staged[t.offset : t.offset + t.length] for t in layout.tails]
        self._addresses = addresses

    # Parameters -----------------------------------------------------------------------------------

    def start_gather(self, group: dist.ProcessGroup) -> Any:
        """Starts bringing every rank's slices of the parameters to every rank.

        Returns:
            The work to `wait` for before `finish_gather`; None if there is nothing to bring.
        """
        # All tails are staged, though only this rank's part of the buffer is sent: the gather overwrites the rest.
        if self._tails:
            foreach_copy_(self._staged_tails, self._tails)
        return start_all_gather(self._gathered, group) if self._gathered else None

    def finish_gather(self) -> None:
        """Copies the tails into the parameters. Autograd does not notice any of these writes."""
        if self._tails:
            foreach_copy_(self._tails, self._staged_tails)

    # State ----------------------------------------------------------------------------------------

    def gather_state(self, group: dist.ProcessGroup, keep: bool) -> Iterator[dict[str, Tensor]]:
        """Yields the whole state of each parameter in turn, by column name; a collective call.

        Yields:
            Tensors on the CPU, in the shape that the column gives to the state of what this rank holds of the
            parameter, and in its memory order. Where ``keep`` is False, this rank only contributes its part, and the
            dicts are empty.
        """
        layout, rank = self.layout, dist.get_rank(group)

        def gathered(column: Column, length: int, offset: int) -> Tensor:
            """The parts of all ranks, given how many elements of parameters a part belongs to, and where it lies."""
            part = self._state_of(column, length, offset).to(self.device)
            whole = part.new_empty(part.numel() * layout.world_size)
            whole.narrow(0, rank * part.numel(), part.numel()).copy_(part)
            # As bytes: backends do not know every dtype.
            all_gather_in_place([whole.view(torch.uint8)] if part.numel() else [], group)
            return whole

        part = layout.tail_buffer_numel // layout.world_size
        sharded = [column for column in self.columns if column.name in self.buffers]
        all_tails = [gathered(column, part, layout.tail_shard_offset) for column in sharded]
        tails, offset = {t.param: t for t in layout.tails}, 0
        for i, p in enumerate(self.locals):
            length = layout.heads[i] // layout.world_size
            state = {name: _on_cpu(of_params[i]) for name, of_params in self.whole.items() if keep}
            for column, staged in zip(sharded, all_tails, strict=True):
                head = gathered(column, length, offset)
                if not keep:
                    continue
                shape, strides = _shape_and_strides(column, p)
                whole = torch.empty_strided(shape, strides, dtype=column.dtype, device="cpu")
                flat(whole, 0, head.numel()).copy_(head)
                if i in tails:
                    t = tails[i]
                    flat(whole, head.numel()).copy_(staged.narrow(0, t.offset // column.block, column.numel(t.length)))
                state[column.name] = whole
            offset += length
            yield {column.name: state[column.name] for column in self.columns if keep}

    def take_state(self, state: Mapping[int, Mapping[str, Tensor]], group: dist.ProcessGroup) -> None:
        """Copies a state into the buffers, this rank's slices of it, and into whole columns; a collective call.

        Args:
            state: by ``id`` of the parameter and by column name: whole tensors, of DTensors such as are placed as they
                are (with blocks: plain tensors of what this rank holds); or `BoxTensor`s that `boxes` made of
                this shard or of one with the same layout, where they are on every rank. Missing state becomes zeros.
            group: the ranks.
        """
        rank = dist.get_rank(group)
        for i, p in enumerate(self.locals):
            own_state = state.get(id(self.params[i]), {})
            for column in self.columns:
                given = own_state.get(column.name)
                if column.name in self.whole:
                    self._take_whole(i, column, given, group)
                    continue
                if isinstance(given, BoxTensor):
                    self.boxes(i, column, rank).copy_(given)
                    continue
                in_order = None
                if given is not None:
                    given = local(given)
                    in_order = laid_out_like(given, p) if column.block == 1 else given.contiguous()
                for start, own in self._runs(i, column, rank):
                    if in_order is None:
                        own.zero_()
                    else:
                        own.copy_(flat(in_order, start, own.numel()))

    def _take_whole(self, param: int, column: Column, given: Tensor | None, group: dist.ProcessGroup) -> None:
        own = self.whole[column.name][param]
        if given is not None and not isinstance(given, BoxTensor):
            own.copy_(local(given))
            return
        own.zero_()
        if given is not None:
            self.boxes(param, column, dist.get_rank(group)).copy_(given)
            all_reduce_sum(flat_bytes(own), group)  # of each byte that is not 0, one rank has the value

    def state_on(self, device: torch.device | str) -> State:
        """The state on a device: copies, of what does not lie there."""
        with torch.inference_mode(False):  # tensors that are made in it could never be stepped outside
            whole = {name: [t.to(device) for t in of_params] for name, of_params in self.whole.items()}
            return State({name: buffer.to(device) for name, buffer in self.buffers.items()}, whole)

    def put_state(self, state: State, offloaded: bool) -> None:
        """Takes the tensors of `state_on` in place of the present ones, and drops views of the parameters, so that the
        memory of parameters that move too is free; `refresh` makes new views."""
        self.buffers.update(state.buffers)
        for name, of_params in state.whole.items():
            self.whole[name][:] = of_params  # in place, as others refer to the list
        self.offloaded = offloaded
        self._addresses, self._gathered, self._tails, self._staged_tails = [], [], [], []

    def slices(self, param: int, rank: int) -> list[Run]:
        """The runs of a parameter that a rank owns."""
        if rank not in self._slices:
            owned = self._slices[rank] = [[] for _ in self.params]
            for s in self.layout.slices(rank):
                owned[s.param].append(s)
        return self._slices[rank][param]

    def state(self, param: int, column: Column, rank: int) -> Tensor:
        """A parameter's state where it lies: the tensor of a whole column, placed as the parameter is, else this rank's
        `boxes`."""
        if column.name in self.whole:
            return placed_like(self.whole[column.name][param], self.params[param])
        return self.boxes(param, column, rank)

    def boxes(self, param: int, column: Column, rank: int) -> BoxTensor:
        """A view of the part of a parameter's state that belongs to this rank's slices, in the shape of the whole
        parameter's state; where a DTensor's state has blocks, in that of the state of what this rank holds. The first
        rank has the box of one without elements."""
        p, part = self.params[param], self.locals[param]
        own = column.block == 1 and self.placing.mesh is not None
        shape, strides = _shape_and_strides(column, part)
        whole_shape = tuple(p.shape) if own else shape
        buffer = self.whole[column.name][param] if column.name in self.whole else self.buffers[column.name]
        if rank == 0 and 0 in whole_shape:
            nothing, box = buffer.new_empty(whole_shape), Box((0,) * len(whole_shape), whole_shape)
            return BoxTensor(whole_shape, [box], [nothing], nothing.dtype, nothing.device)
        found = BoxTensor.of_runs(shape, strides, self._runs(param, column, rank), buffer)
        return found.within(whole_shape, local_box(p).offsets) if own else found

    def _runs(self, param: int, column: Column, rank: int) -> list[tuple[int, Tensor]]:
        """The runs of a parameter's state that a rank owns: where each starts, and a view of its elements."""
        slices = self.slices(param, rank)
        if column.name not in self.whole:
            return [(s.start // column.block, self._state_of(column, s.length, s.offset)) for s in slices]
        whole = self.whole[column.name][param]
        starts = [s.start // column.block for s in slices]
        return [(at, flat(whole, at, column.numel(s.length))) for at, s in zip(starts, slices, strict=True)]

    def _state_of(self, column: Column, length: int, offset: int) -> Tensor:
        """The state of ``length`` elements of parameters from ``offset`` of the shard: a view, 1-D."""
        return self.buffers[column.name].narrow(0, offset // column.block, column.numel(length))


def number_params(shards: Sequence[Shard], params: Sequence[Tensor]) -> None:
    """Numbers the parameters of shards as they lie in all parameters of the optimizer."""
    number_of = {id(p): i for i, p in enumerate(params)}
    for shard in shards:
        shard.numbers = [number_of[id(p)] for p in shard.params]


def whole_state(shards: Sequence[Shard]) -> list[tuple[str, Tensor]]:
    """The tensors of all whole columns, which must be the same on every rank, each with a name for messages.

    Raises:
        RuntimeError: they are offloaded, and a backend for the device could not send them.
    """
    if any(shard.whole and shard.offloaded for shard in shards):
        raise RuntimeError(
            "the parameters' state, which every rank keeps whole, is on the CPU after offload_state(): call "
            "reload_state() on every rank first"
        )
    return [
        (f"{name} of parameter {number}", t)
        for shard in shards
        for name, of_params in shard.whole.items()
        for number, t in zip(shard.numbers, of_params, strict=True)
    ]


def _zeros(column: Column, p: Tensor) -> Tensor:
    shape, strides = _shape_and_strides(column, p)
    return torch.empty_strided(shape, strides, dtype=column.dtype, device=p.device).zero_()


def _on_cpu(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu").copy_(t)


def _shape_and_strides(column: Column, p: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape of a parameter's state, and strides with which it is numbered as the parameter's elements are."""
    return (tuple(p.shape), p.stride()) if column.block == 1 else (column.shape(p.shape), (1,))
