"""Steps tensors by the rule. This is what the optimizers use of this folder.

    update = LionUpdate(use_triton)
    prepared = update.prepare(tensors)              # validates; raises before anything is changed
    update.step(prepared, hypers, grad_scale)       # new parameters and momenta
    update.sum_of_squares(prepared)                 # of the gradients, for clipping
    update.hyper_table(hypers, device)              # hyper-parameters as a tensor

`SignUpdate` (signs.py) makes the step in two halves, with 2-bit signs between them. All methods are called without
gradients enabled (torch.no_grad).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import check_use_triton
from .backends.batch import Prepared, mark_changed
from .hypers import HyperTables, StepHypers
from .prepare import Preparer
from .reference import HyperParameters, hyper_checksum
from .segments import StepTensors

__all__ = ["LionUpdate", "Prepared", "check_use_triton"]


class LionUpdate:
    """Applies the rule to the tensors of each step.

    It keeps tables and views between steps as long as the tensors stay the same. An optimizer that steps several sets
    of tensors in turn should have one for each set.

    Args:
        use_triton: None: for CUDA tensors, if Triton is installed. True: for all tensors, or an error. False: for none.

    Raises:
        TypeError, ValueError: see `check_use_triton`.
    """

    def __init__(self, use_triton: bool | None) -> None:
        check_use_triton(use_triton)
        self.use_triton = use_triton
        self._preparer = Preparer(use_triton)
        self._tables = HyperTables()

    def prepare(self, tensors: StepTensors) -> Prepared:
        """Validates the tensors of a step and brings tables and views up to date. Changes no parameter and no state.

        Returns:
            An object for the other methods. It holds this step's gradients, so drop it after the step. It is valid
            until the next call of `prepare`.

        Raises:
            TypeError: a gradient is sparse, or its dtype is not a storage dtype.
            ValueError: shapes or devices do not match, parameters share memory, or use_triton=True and Triton cannot
                reach the tensors.
        """
        return self._preparer.prepare(tensors)

    def forget(self) -> None:
        """Drops tables and views: they may keep memory that other code wants to free."""
        self._preparer = Preparer(self.use_triton)

    @property
    def absent(self) -> list[bool]:
        """For each entry of the last prepared tensors, whether it had no gradient; empty if all had one."""
        return self._preparer.absent

    def step(self, prepared: Prepared, hypers: list[HyperParameters], grad_scale: Tensor | None = None) -> None:
        """Steps every parameter that has a gradient. On GPUs that is one launch for each device and mix of dtypes.

        Args:
            prepared: the tensors of the step.
            hypers: hyper-parameters of each parameter group, indexed by ``groups`` of the tensors.
            grad_scale: float32, shape (), multiplied into every gradient; None is 1.
        """
        step_hypers = StepHypers(self._tables, hypers, grad_scale)
        for batch in prepared.batches:
            batch.step(prepared, step_hypers)
        params = prepared.tensors.params
        if not prepared.complete:
            params = [p for p, g in zip(params, prepared.grads, strict=True) if g is not None]
        mark_changed(params)

    def pack_signs(
        self, prepared: Prepared, hypers: list[HyperParameters], grad_scale: Tensor | None, salt: int,
        signs: Tensor, checksum: Tensor,
    ) -> Tensor:  # fmt: skip
        """See `SignUpdate.pack`.

        Returns:
            The hyper-parameter table, for the other half.
        """
        step_hypers = StepHypers(self._tables, hypers, grad_scale)
        table = step_hypers.table(signs.device)
        if not prepared.batches:
            checksum.copy_(hyper_checksum(table, salt, grad_scale))
        for batch in prepared.batches:
            batch.pack_signs(prepared, step_hypers, signs, checksum, salt)
        return table

    def sum_of_squares(self, prepared: Prepared) -> Tensor | None:
        """The sum of squares of all gradients: float64, shape (), or None if there are none. The tensors must be on one
        device."""
        sums = [total for batch in prepared.batches if (total := batch.sum_of_squares(prepared)) is not None]
        return torch.stack(sums).sum() if sums else None

    def hyper_table(self, hypers: list[HyperParameters], device: torch.device) -> Tensor:
        """Hyper-parameters as float64, shape (groups, HYPER_COLUMNS), on a device. Do not write to it."""
        return self._tables.table(hypers, device)
