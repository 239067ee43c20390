"""Sums over the elements of a step that has not been made, by the rule in reference.py: nothing is written.

Sums of a run: float64, shape (COLUMNS,). The first four columns are sums of squares; the others count elements.
Signs: the packed signs of runs (`reference.pack_signs`), by number of the parameter, its device, first element and
    length. A kernel reads them by their addresses, so those of another device must not be found.

`backends.batch.Batch.add_up` adds up over many runs: by a kernel where Triton steps them (backends/triton_sums.py),
elsewhere by the torch operations of this file, which read the elements some thirty times.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..memory_order import flat, laid_out_like
from . import codecs, reference
from .codecs import BLOCK
from .reference import PER_BYTE, Scalars
from .state import EXP_AVG, EXP_AVG_SCALE, REMAINDER

# Squares of the weights, momenta, changes of the weights and gradients; signs that are zero, that are those of the
# gradients, and that are the opposite of the last; those that have a last one, and all elements.
PARAM, MOMENT, UPDATE, GRAD, ZERO, AGREE, FLIPPED, COMPARED, ELEMENTS = range(9)
COLUMNS = 9
PIECE = 1 << 22  # elements that are added up at a time, a multiple of BLOCK: it takes a dozen temporary tensors

Key = tuple[int, torch.device, int, int]
Signs = dict[Key, Tensor]


def of_run(
    p: Tensor, state: Mapping[str, Tensor], g: Tensor | None, s: Scalars, last: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The sums of a run, on its device.

    Args:
        p, state: as of `backends.plain.Run`.
        g: its gradient, in the memory order of p; None: it is not stepped.
        s: scalars.
        last: its packed signs in an earlier step, or None.

    Returns:
        The sums, and the packed signs; None if it is not stepped.
    """
    p, m, g, remainder = _one_dimensional(p, state, g)
    scale = state.get(EXP_AVG_SCALE)
    sums, packed = [], []
    for at in range(0, p.numel(), PIECE):
        part = slice(at, min(at + PIECE, p.numel()))
        weight = p[part] if remainder is None else codecs.join(p[part], remainder[part])
        moment = m[part] if scale is None else codecs.decode(m[part], scale[at // BLOCK : -(-part.stop // BLOCK)])
        if g is None:
            sums.append(_of_idle(weight, moment))
            continue
        before = None if last is None else last[at // PER_BYTE : -(-part.stop // PER_BYTE)]
        of_piece, sign = _of_piece(weight, moment, g[part], s, before)
        sums.append(of_piece)
        packed.append(reference.pack_signs(sign))
    return torch.stack(sums).sum(0), torch.cat(packed) if packed else None


def _one_dimensional(
    p: Tensor, state: Mapping[str, Tensor], g: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Parameter, momentum, gradient and remainder of a run in one order: that of the momentum's blocks, if it has
    any."""
    m, remainder = state[EXP_AVG], state.get(REMAINDER)
    if p.dim() == m.dim() == 1 and p.is_contiguous() and m.is_contiguous():
        return p, m, g, remainder

    def laid(t: Tensor) -> Tensor:
        return flat(laid_out_like(t, m)) if EXP_AVG_SCALE in state else t.reshape(-1)

    return laid(p), laid(m), None if g is None else laid(g), None if remainder is None else laid(remainder)


def _of_idle(weight: Tensor, moment: Tensor) -> Tensor:
    """The sums of elements that are not stepped."""
    n = weight.numel()
    return _row(_squares(weight), _squares(moment), 0, 0, n, 0, 0, 0, n)


def _of_piece(weight: Tensor, moment: Tensor, g: Tensor, s: Scalars, last: Tensor | None) -> tuple[Tensor, Tensor]:
    """The sums of elements, and their signs, as `reference.judge` returns them.

    Args:
        weight, moment, g: of any storage dtypes, 1-D.
        s: scalars.
        last: their packed signs in an earlier step, or None.
    """
    sign, _ = reference.judge(*reference.blend(g, moment, s), moment.dtype)
    change = reference.parameter_rule(weight, sign, s).double() - weight.double()
    used = g.float() * s.grad_scale
    flipped: Tensor | int = 0
    if last is not None:
        flipped = _count(sign * reference.unpack_signs(last, sign.numel()) < 0)
    n = sign.numel()
    return _row(
        _squares(weight), _squares(moment), _squares(change), _squares(used), _count(sign == 0),
        _count(sign * used > 0), flipped, 0 if last is None else n, n,
    ), sign  # fmt: skip


def _row(param: Tensor, *others: Tensor | int) -> Tensor:
    """A row of sums. The host does not wait for numbers on their way to a GPU."""
    assert len(others) == COLUMNS - 1
    return torch.stack([param, *(o if isinstance(o, Tensor) else torch.full_like(param, o) for o in others)])


def _squares(t: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(t, dtype=torch.float64)
    return norm.square()


def _count(mask: Tensor) -> Tensor:
    return mask.sum(dtype=torch.float64)
