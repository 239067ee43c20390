"""The contents of a checkpoint by key, for a load to compare and to take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .conversions import Conversion
from .json_values import from_json
from .keys import MASTER, MODEL, STATE, TIED
from .manifest import TensorEntry
from .names import Names
from .reader import Reader


class Contents:
    """Tensors and values of a checkpoint, by key.

    Attributes:
        tensors: shape, dtype and place of each tensor: those of the reader's manifest.
        objects: values that are not tensors.
        cast: whether tensors may be converted to another dtype.

    Raises:
        ValueError: what it says of master weights is wrong.
    """

    def __init__(self, reader: Reader, cast: bool) -> None:
        self._reader, self.cast = reader, cast
        self.tensors = reader.manifest.tensors
        self.objects: dict[str, Any] = {key: from_json(value) for key, value in reader.manifest.objects.items()}
        self._check_masters()

    def _check_masters(self) -> None:
        for key in self.objects:
            if not key.startswith(MASTER):
                continue
            weight = MODEL + key.removeprefix(MASTER)
            entry = self.tensors.get(weight)
            if entry is None or entry.torch_dtype != torch.float32 or self.objects[key] is not True:
                mark = repr(self.objects[key])[:40]
                got = "there is no such tensor" if entry is None else f"it is {entry.dtype}, marked by {mark}"
                raise ValueError(
                    f"{key} says that {weight} holds master weights, but {got}; expected float32 and true: this is not "
                    "what lion_dist saves"
                )

    def is_master(self, name: str) -> bool:
        """Whether a parameter was saved as its master weight."""
        return MASTER + name in self.objects

    def keys(self, prefix: str) -> list[str]:
        """The keys that begin with a prefix: those of tensors first."""
        return [key for key in (*self.tensors, *self.objects) if key.startswith(prefix)]

    def value(self, key: str) -> Any:
        """A value, which may be a small tensor; None if there is none."""
        return self._reader.fetch(key) if key in self.tensors else self.objects.get(key)

    def convert(self, key: str, conversion: Conversion, origin: str | None = None) -> None:
        """As `Reader.convert`."""
        self._reader.convert(key, conversion, origin)

    def fetch(self, key: str, limit: int) -> Tensor:
        """As `Reader.fetch`."""
        return self._reader.fetch(key, limit)

    def scan(self, key: str, check: Callable[[Tensor], None]) -> None:
        """As `Reader.scan`."""
        self._reader.scan(key, check)

    def tensor(self, key: str, shape: tuple[int, ...]) -> TensorEntry:
        """The entry of a tensor. Raises ValueError unless there is one of this shape."""
        entry = self.tensors.get(key)
        if entry is None:
            raise ValueError(f"{key} is not a tensor in the checkpoint")
        if entry.shape != shape:
            raise ValueError(f"{key} has shape {entry.shape} in the checkpoint and {shape} here")
        return entry

    def check_tensor(self, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        """Raises ValueError unless there is a tensor that can be loaded into one of this dtype and shape."""
        entry = self.tensor(key, shape)
        if entry.torch_dtype != dtype and not self.cast:
            raise ValueError(
                f"{key} is {entry.dtype} in the checkpoint and {dtype} here: pass cast=True to convert it, or make the "
                "model and optimizer with the same dtypes (momentum_dtype)"
            )

    def untie(self, names: Names) -> dict[str, str]:
        """Finds weights that were tied when they were saved, and are known here by a name that was an alias then. The
        contents under the first name are entered under the alias too.

        Args:
            names: names of the parameters here.

        Returns:
            The first name in the checkpoint, by name here.
        """
        tied = {}
        for name in names.by_id.values():
            first = self.objects.get(TIED + name)
            if not isinstance(first, str) or MODEL + name in self.tensors or MODEL + first not in self.tensors:
                continue
            tied[name] = first
            self.tensors[MODEL + name] = self.tensors[MODEL + first]
            if self.is_master(first):
                self.objects[MASTER + name] = True
            old, new = STATE + first + ".", STATE + name + "."
            for values in (self.tensors, self.objects):
                copies: dict[str, Any] = {new + k.removeprefix(old): v for k, v in values.items() if k.startswith(old)}
                values.update(copies)
        return tied
