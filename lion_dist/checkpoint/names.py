"""Names of a model's parameters, without what wrappers put into them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from .._torch_compat_distributed import unwrapped_names


@dataclass(frozen=True)
class Names:
    """Names of the parameters of a model.

    Attributes:
        by_id: the alphabetically first name of each parameter, by ``id(p)``.
        aliases: that first name, by each further name of a parameter.
    """

    by_id: dict[int, str]
    aliases: dict[str, str]

    @staticmethod
    def read(model: nn.Module) -> Names:
        all_names: dict[int, list[str]] = {}
        for wrapped, p in model.named_parameters(remove_duplicate=False):
            all_names.setdefault(id(p), []).extend(unwrapped_names(model, wrapped))
        by_id = {p: min(names) for p, names in all_names.items()}
        aliases = {name: by_id[p] for p, names in all_names.items() for name in names if name != by_id[p]}
        return Names(by_id, aliases)

    def of(self, p: Tensor) -> str:
        """The first name of a parameter of the model."""
        return self.by_id[id(p)]

    def __contains__(self, p: Tensor) -> bool:
        return id(p) in self.by_id
