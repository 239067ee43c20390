"""The rule through torch.compile, on 1-D CPU tensors: one graph for all lengths and hyper-parameters.

[Note: Several runs a call] A call of a compiled function takes 30 us, however little it does. So the step takes SLOTS
runs, and empty slots are filled with a few zeros. Dynamo would take tensors of one length in its first call for tensors
that always have one length, and tensors of one storage for tensors that may overlap, and compile again for others. So
the first call has other lengths than any later one, and no two parameters or momenta of a call may share a storage.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..._torch_compat import recompile_limit
from .. import reference
from ..reference import EightBits, Scalars

SLOTS = 4

# Mixes of dtypes times numbers of threads, each of which is a graph of one function; torch's own limit is 8.
MAX_GRAPHS = 64

# The scalars are one tensor, not seven: fewer guards to check in a call, and fewer addresses to keep in registers.


def _step(tensors: list[Tensor], scalars: Tensor) -> None:
    s = Scalars(*scalars.unbind())
    for i in range(0, len(tensors), 3):
        reference.lion_step_(tensors[i], tensors[i + 1], tensors[i + 2], s)


def _sign_step(tensors: list[Tensor], scalars: Tensor) -> None:
    g, m, packed = tensors
    reference.sign_step_(g, m, packed, Scalars(*scalars.unbind()))


def _apply_signs(tensors: list[Tensor], scalars: Tensor) -> None:
    p, packed = tensors
    reference.apply_signs_(p, packed, Scalars(*scalars.unbind()))


def _step_master(tensors: list[Tensor], scalars: Tensor) -> None:
    p, g, m, remainder = tensors
    reference.lion_step_(p, g, m, Scalars(*scalars.unbind()), None, remainder)


def _step_codes(tensors: list[Tensor], scalars: Tensor) -> None:
    p, g, m, scale, seed = tensors
    reference.lion_step_(p, g, m, Scalars(*scalars.unbind()), EightBits(scale, seed, 0))


def _step_codes_master(tensors: list[Tensor], scalars: Tensor) -> None:
    p, g, m, scale, seed, remainder = tensors
    reference.lion_step_(p, g, m, Scalars(*scalars.unbind()), EightBits(scale, seed, 0), remainder)


def _sign_step_codes(tensors: list[Tensor], scalars: Tensor) -> None:
    g, m, packed, scale, seed = tensors
    reference.sign_step_(g, m, packed, Scalars(*scalars.unbind()), EightBits(scale, seed, 0))


def _apply_signs_master(tensors: list[Tensor], scalars: Tensor) -> None:
    p, packed, remainder = tensors
    reference.apply_signs_(p, packed, Scalars(*scalars.unbind()), remainder)


Mix = tuple[torch.dtype, ...]


class Compiled:
    """A function that is compiled at its first call, anew for each mix of dtypes.

    Args:
        function: writes into 1-D tensors; its second argument is the rule's scalars, float32, stacked. Functions must
            not share their code, whose recompilations torch counts and limits.
    """

    warned = False  # of any function

    def __init__(self, function: Callable[[list[Tensor], Tensor], None]) -> None:
        self._function = function
        self._compiled: Callable[[list[Tensor], Tensor], None] | None = None
        self.failed: set[Mix] = set()  # mixes of dtypes that cannot be compiled
        self._seen: set[tuple[Mix, int]] = set()  # mixes and numbers of threads that have a graph

    def __call__(self, tensors: list[Tensor], scalars: Tensor) -> bool:
        """Calls the function, compiled.

        Returns:
            False if it cannot be compiled (often because a C++ compiler is missing). Then nothing has been written, and
            the first time a warning says so.
        """
        mix = tuple([t.dtype for t in tensors])
        if mix in self.failed:
            return False
        if self._compiled is None:
            self._compiled = torch.compile(self._function, dynamic=True, fullgraph=True)
        threads = torch.get_num_threads()
        try:
            if (mix, threads) in self._seen:
                self._compiled(tensors, scalars)
            else:  # setting the limit would slow every call down
                with recompile_limit(MAX_GRAPHS):
                    self._compiled(tensors, scalars)
                self._seen.add((mix, threads))
        except Exception as error:  # compilation precedes every write
            self.failed.add(mix)
            if not Compiled.warned:
                Compiled.warned = True
                reason = (str(error).strip().splitlines() or [""])[0]
                warnings.warn(
                    "lion_dist: torch.compile failed, so steps on the CPU run as plain torch, two to three times "
                    f"slower. Usually a C++ compiler such as g++ is missing. {type(error).__name__}: {reason}",
                    stacklevel=2,
                )
            return False
        return True


class CompiledStep(Compiled):
    """`reference.lion_step_` of up to SLOTS runs in one call. See [Note: Several runs a call]."""

    def __init__(self) -> None:
        super().__init__(_step)
        self._fillers: dict[Mix, list[Tensor]] = {}

    def step(self, runs: Sequence[tuple[Tensor, Tensor, Tensor]], scalars: Tensor) -> bool:
        """Steps runs.

        Args:
            runs: parameter, gradient and momentum of each of up to SLOTS runs, 1-D, of two elements or more.
            scalars: the rule's scalars, stacked.

        Returns:
            As `Compiled.__call__`.
        """
        mix = tuple([t.dtype for t in runs[0]])
        if mix not in self._fillers:
            # Long enough that the compiler makes loops for several threads.
            first = [torch.zeros((1 << 16) + i, dtype=dtype, device="cpu") for i in range(SLOTS) for dtype in mix]
            fillers = [torch.zeros(8, dtype=dtype, device="cpu") for _ in range(SLOTS) for dtype in mix]
            self._fillers[mix] = fillers
            if not self(first, scalars):
                return False
        tensors = [t for run in runs for t in run]
        return self(tensors + self._fillers[mix][len(tensors) :], scalars)


step_ = CompiledStep()
sign_step_ = Compiled(_sign_step)
apply_signs_ = Compiled(_apply_signs)
step_master_ = Compiled(_step_master)
step_codes_ = Compiled(_step_codes)
step_codes_master_ = Compiled(_step_codes_master)
sign_step_codes_ = Compiled(_sign_step_codes)
apply_signs_master_ = Compiled(_apply_signs_master)
