"""BoxTensor: one rank's part of a tensor, as boxes, for torch.distributed.checkpoint.

Neither DTensor nor ShardedTensor can describe a flat cut of a tensor, such as "elements 1000 to 1300 in memory order".
Boxes (boxes.py) can, through the three methods that torch.distributed.checkpoint calls on tensors of unknown types:
``__create_write_items__``, ``__create_chunk_list__`` and ``__get_tensor_shard__``. A BoxTensor is saved in the tensor's
own shape, and loaded from any other cut, without a collective. It is a view: loading into one writes to its memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf, nan
from operator import add
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from .._torch_compat import ATEN_TO_COPY, make_wrapper_subclass
from .boxes import Box, cut, memory_order

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem

_aten = torch.ops.aten


class BoxTensor(Tensor):
    """Part of a tensor, as boxes.

    Attributes:
        boxes: the elements that belong to the part; the boxes do not overlap.
        parts: for each box, its elements in the shape of the box. They are views.
    """

    boxes: tuple[Box, ...]
    parts: tuple[Tensor, ...]

    @staticmethod
    def __new__(
        cls, shape: Sequence[int], boxes: Sequence[Box], parts: Sequence[Tensor], dtype: torch.dtype, device: Any
    ) -> BoxTensor:
        self: BoxTensor = make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=device)
        for box, part in zip(boxes, parts, strict=True):
            if tuple(part.shape) != box.sizes:
                raise ValueError(f"expected a part of shape {box.sizes} for {box}, got shape {tuple(part.shape)}")
        self.boxes, self.parts = tuple(boxes), tuple(parts)
        return self

    @staticmethod
    def of_runs(
        shape: Sequence[int], strides: Sequence[int] | None, runs: Sequence[tuple[int, Tensor]], like: Tensor
    ) -> BoxTensor:
        """Makes a BoxTensor of runs of elements in memory order.

        Args:
            shape: shape of the whole tensor.
            strides: strides of a dense tensor with that memory order; None is row-major.
            runs: for each run, the number of its first element, and its elements, 1-D and contiguous.
            like: a tensor with the dtype and device of the result.
        """
        order = tuple(range(len(shape))) if strides is None else memory_order(strides)
        back = sorted(range(len(order)), key=lambda i: order[i])
        boxes, parts = [], []
        for start, run in runs:
            at = 0
            for box in cut(shape, start, start + run.numel(), order):
                in_order = run[at : at + box.numel].view([box.sizes[d] for d in order])
                boxes.append(box)
                parts.append(in_order.permute(back))
                at += box.numel
        return BoxTensor(shape, boxes, parts, like.dtype, like.device)

    def within(self, shape: Sequence[int], offsets: Sequence[int]) -> BoxTensor:
        """The same elements as part of a larger tensor.

        Args:
            shape: shape of the larger tensor.
            offsets: index in it of this tensor's first element.
        """
        boxes = [Box(tuple(map(add, box.offsets, offsets)), box.sizes) for box in self.boxes]
        return BoxTensor(shape, boxes, self.parts, self.dtype, self.device)

    def map(self, function: Callable[[Tensor], Tensor], like: Tensor | None = None) -> BoxTensor:
        """The same boxes with ``function`` applied to each part.

        Args:
            like: a tensor with the dtype and device of the result; None: those of the new parts.
        """
        parts = [function(part) for part in self.parts]
        like = next(iter(parts), self) if like is None else like
        return BoxTensor(self.shape, self.boxes, parts, like.dtype, like.device)

    def check_cut(self, own: Tensor) -> None:
        """Checks that this tensor can be copied into another one.

        Raises:
            TypeError: the other one is no BoxTensor.
            ValueError: its boxes are others.
        """
        if not isinstance(own, BoxTensor):
            raise TypeError(f"{_ADVICE} It cannot be copied into a whole tensor. {_REMEDY}")
        if own.shape != self.shape or own.boxes != self.boxes:
            raise ValueError(
                f"a BoxTensor with boxes {list(self.boxes)} does not fit one with boxes {list(own.boxes)}, because it "
                "is another cut of the tensor: go through a checkpoint"
            )

    @property
    def data(self) -> BoxTensor:
        """Another view of the same memory. What is assigned to it is copied into that memory: a BoxTensor of the same
        cut, or a whole tensor, of the same shape and dtype, on any device."""
        return self.detach()  # type: ignore[return-value]

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, Tensor):
            raise TypeError(f"{_ADVICE} Its data must be a tensor, got {type(value).__name__}. {_REMEDY}")
        if value.shape != self.shape or value.dtype != self.dtype or value.is_meta or value.layout != torch.strided:
            raise ValueError(
                f"{_ADVICE} Its data must be dense, of shape {tuple(self.shape)} and {self.dtype}, got a tensor of "
                f"shape {tuple(value.shape)}, {value.dtype} and {value.layout} on {value.device}. {_REMEDY}"
            )
        self.data.copy_(value)

    # Methods that torch.distributed.checkpoint calls.

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets, i),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties(self.dtype), self.shape),
            )
            for i, chunk in enumerate(self.__create_chunk_list__())
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        return [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)) for box in self.boxes]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        offsets = tuple(index.offset or ())
        if index.index is not None and index.index < len(self.boxes) and self.boxes[index.index].offsets == offsets:
            return self.parts[index.index]
        for box, part in zip(self.boxes, self.parts, strict=True):
            if box.offsets == offsets:
                return part
        raise ValueError(f"{index.fqn} has no box at offsets {offsets} on this rank; its boxes are {list(self.boxes)}")

    # Operators that copy, move or compute elementwise give BoxTensors, and reductions of all elements plain tensors.
    # Both see this rank's part alone. Any other one raises an error.

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, self = kwargs or {}, args[0]
        if func in (_aten.detach.default, _aten.alias.default):
            return self.map(lambda part: part)
        if func is _aten.copy_.default:
            source = args[1]
            if isinstance(source, BoxTensor):
                source.check_cut(self)
                for part, other in zip(self.parts, source.parts, strict=True):
                    part.copy_(other)
            elif not isinstance(source, Tensor):
                self.fill_(source)
            else:
                whole = source.expand(self.shape)
                for box, part in zip(self.boxes, self.parts, strict=True):
                    part.copy_(whole[box.slices()])
            return self
        if func in (_aten.new_empty.default, _aten.new_zeros.default) and tuple(args[1]) != tuple(self.shape):
            return func(torch.empty(0, dtype=self.dtype, device=self.device), *args[1:], **kwargs)
        if func in _ELEMENTWISE:
            rest = () if func in (_aten.new_empty.default, _aten.new_zeros.default) else args[1:]
            known = {k: v for k, v in kwargs.items() if k not in ("memory_format", "layout", "pin_memory")}
            function = _ELEMENTWISE[func]
            return self.map(lambda part: function(part, *rest, **known), function(_empty_of(self), *rest, **known))
        if func is _aten.equal.default:  # of this rank's part
            same_shape = self.shape == args[1].shape
            return same_shape and all(part.all() for part in _elementwise(_aten.eq.Tensor, args, {}).parts)
        if (torch.Tag.pointwise in func.tags and "out" not in kwargs) or func in _IN_PLACE:
            return _elementwise(func, args, kwargs)
        if func in _REDUCTIONS and isinstance(self, BoxTensor):
            return _reduced(func, self, args[1:], kwargs)
        if func is torch.ops.c10d.broadcast_.default:
            return _broadcast(func, args, kwargs)
        raise NotImplementedError(f"{_ADVICE} It does not support {func}. {_REMEDY}")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"BoxTensor(shape={tuple(self.shape)}, dtype={self.dtype}, boxes={list(self.boxes)})"

    def __deepcopy__(self, memo: dict[int, Any]) -> BoxTensor:
        memo[id(self)] = copied = self.map(torch.clone)
        return copied

    def __copy__(self) -> BoxTensor:
        return self.map(lambda part: part)

    def _refuse_memory(self, *_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(f"{_ADVICE} It has no memory of its own for all of its elements. {_REMEDY}")

    # torch's own would use that memory, and the process would die.
    apply_ = share_memory_ = __dlpack__ = _refuse_memory

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            f"{_ADVICE} It cannot be pickled, as torch.save would: save full_state_dict(rank0_only=True), called on "
            "every rank; or call consolidate_state_dict() on every rank before the first one saves its state_dict(); "
            "or save the BoxTensors through lion_dist.checkpoint or torch.distributed.checkpoint. A file that "
            "torch.save has begun is no checkpoint: remove it"
        )


_ADVICE = "This is a BoxTensor, one rank's part of a sharded tensor, from ShardedLion's state or its state_dict()."
_REMEDY = (
    "The plain tensors that this rank holds are in its attribute parts; full_state_dict(), called on every rank, has "
    "whole tensors"
)
_ELEMENTWISE: dict[Any, Callable[..., Tensor]] = {
    _aten.clone.default: torch.clone,
    ATEN_TO_COPY: lambda part, *_, **kw: part.to(**{k: v for k, v in kw.items() if v is not None}, copy=True),
    _aten.zeros_like.default: torch.zeros_like,
    _aten.empty_like.default: torch.empty_like,
    _aten.new_empty.default: torch.empty_like,
    _aten.new_zeros.default: torch.zeros_like,
}


def _empty_of(t: Tensor) -> Tensor:
    return torch.empty(0, dtype=t.dtype, device=t.device)


# Elementwise operators that torch does not tag as such.
_IN_PLACE = {_aten.zero_.default, _aten.fill_.Scalar, _aten.fill_.Tensor, _aten.abs_.default}

# Reductions of all elements, and for those that can reduce some dimensions only the argument that names them, counted
# after the tensor.
_REDUCTIONS: dict[Any, int | None] = {
    _aten.sum.default: None, _aten.sum.dim_IntList: 0, _aten.mean.default: None, _aten.mean.dim: 0,
    _aten.prod.default: None, _aten.nansum.default: 0, _aten.std.correction: 0, _aten.var.correction: 0,
    _aten.norm.Scalar: None, _aten.linalg_vector_norm.default: 1, _aten.any.default: None, _aten.all.default: None,
    _aten.count_nonzero.default: 0, _aten.max.default: None, _aten.min.default: None, _aten.amax.default: 0,
    _aten.amin.default: 0,
}  # fmt: skip
_OF_NOTHING = {_aten.max.default: -inf, _aten.amax.default: -inf, _aten.min.default: inf, _aten.amin.default: inf}


def _elementwise(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> BoxTensor:
    """Applies an elementwise operator to the parts. Plain tensors beside them are whole, or have no dimensions."""
    first = next(t for t in (*args, *kwargs.values()) if isinstance(t, BoxTensor))
    for t in (*args, *kwargs.values()):
        if isinstance(t, BoxTensor):
            t.check_cut(first)
        elif isinstance(t, Tensor) and t.dim() and t.shape != first.shape:
            raise ValueError(
                f"{_ADVICE} {func} takes numbers, BoxTensors of the same boxes and whole tensors of shape "
                f"{tuple(first.shape)} beside it, got shape {tuple(t.shape)}. {_REMEDY}"
            )

    def computed(part_of: Callable[[Tensor], Tensor]) -> Tensor:
        def own(value: Any) -> Any:
            cut = isinstance(value, BoxTensor) or (isinstance(value, Tensor) and value.dim())
            return part_of(value) if cut else value

        found: Tensor = func(*map(own, args), **{key: own(value) for key, value in kwargs.items()})
        return found

    def part_of(t: Tensor, i: int) -> Tensor:
        return t.parts[i] if isinstance(t, BoxTensor) else t[first.boxes[i].slices()]

    name = func.overloadpacket.__name__
    changed = func in _IN_PLACE or (name.endswith("_") and not name.startswith("__"))  # __lshift__ is not in place
    if changed and not isinstance(args[0], BoxTensor):
        raise TypeError(f"{_ADVICE} {func} cannot change a whole tensor by it. {_REMEDY}")
    parts = [computed(lambda t, i=i: part_of(t, i)) for i in range(len(first.boxes))]  # type: ignore[misc]
    if changed:
        found: BoxTensor = args[0]
        return found
    like = computed(_empty_of)
    return BoxTensor(first.shape, first.boxes, parts, like.dtype, like.device)


def _reduced(func: Any, t: BoxTensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """Reduces this rank's part to one number: shape ()."""
    at = _REDUCTIONS[func]
    dims = kwargs.get("dim") if at is None or len(args) <= at else args[at]
    if dims or isinstance(dims, int) or kwargs.get("keepdim") or (at is not None and any(args[at + 1 : at + 2])):
        raise NotImplementedError(
            f"{_ADVICE} {func} can only reduce it over all dimensions, without keepdim. {_REMEDY}"
        )
    elements: Tensor = torch.cat([_empty_of(t), *(part.reshape(-1) for part in t.parts)])
    if not elements.numel() and func in _OF_NOTHING and t.is_floating_point():
        return elements.new_full((), _OF_NOTHING[func])
    reduced: Tensor = func(elements, *args, **kwargs)
    return reduced


def _broadcast(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Takes part in a broadcast with whole tensors of NaN, or of 0 where there is none.

    set_optimizer_state_dict(broadcast_from_rank0=True) makes it on the first rank for every tensor that it was given,
    and then loads. An error here would leave the other ranks in their broadcast, where the load raises on every rank:
    the first has BoxTensors and the others have not.

    Raises:
        TypeError: after it, on a rank that would have to receive into a BoxTensor.
    """

    def whole(t: Tensor) -> Tensor:
        fill = nan if t.is_floating_point() else 0
        return torch.full(t.shape, fill, dtype=t.dtype, device=t.device) if isinstance(t, BoxTensor) else t

    tensors, group, root = args[:3]
    sent = func([whole(t) for t in tensors], *args[1:], **kwargs)
    if dist.ProcessGroup.unbox(group).rank() != root and any(isinstance(t, BoxTensor) for t in tensors):
        work: dist.Work | None = dist.Work.unbox(sent[1])
        if work is not None:  # NCCL returns None from a synchronous call
            work.wait()
        raise TypeError(f"{_ADVICE} A broadcast cannot be received into it, since ranks hold other parts. {_REMEDY}")
    return sent
