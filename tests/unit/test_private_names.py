"""No file of the library but _torch_compat*.py names a private name of torch, and these name none in vain."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lion_dist
from lion_dist import _torch_compat as compat
from lion_dist import _torch_compat_distributed as compat_distributed

PACKAGE = Path(lion_dist.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
COMPAT = [Path(compat.__file__), Path(compat_distributed.__file__)]
# Private by their look alone: Python documents the first three; CPython has the fourth.
PYTHONS_OWN = {"_replace", "_asdict", "_make", "_getframe"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def names_defined(tree: ast.AST) -> set[str]:
    """Names that a file gives to functions, classes, variables and attributes."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


def names_of_torch(tree: ast.AST, own: set[str]) -> set[str]:
    """Private names that a file uses of others.

    Args:
        own: private names that the library defines itself.
    """
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            root = ast.unparse(node).split(".")[0]
            if root in ("torch", "dist", "c10d", "nn", "Tensor", "Optimizer") or node.attr not in own:
                found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            parts = node.value.split(".")
            if all(part.isidentifier() for part in parts):
                found |= {part for part in parts if is_private(part) and part not in own}
        elif isinstance(node, ast.Import):
            found |= {part for alias in node.names for part in alias.name.split(".") if is_private(part)}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            module = (node.module or "").split(".")
            found |= {part for part in [*module, *(alias.name for alias in node.names)] if is_private(part)}
    return found


OWN = set().union(*(names_defined(parse(path)) for path in FILES if path not in COMPAT)) | PYTHONS_OWN
# DeepSpeed's, which lion_dist/deepspeed.py checks for when `register` is called.
OWN |= {"_configure_basic_optimizer", "_configure_fp16_optimizer"}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("torch._foreach_add_(a, b)", {"_foreach_add_"}),
        ("torch._C._current_graph_task_id()", {"_C", "_current_graph_task_id"}),
        ("p.grad._version", {"_version"}),
        ("getattr(p, '_spec', None)", {"_spec"}),
        ("sys.modules['torch._dynamo.config']", {"_dynamo"}),
        ("from torch._compile import _disable_dynamo", {"_compile", "_disable_dynamo"}),
        ("def f():\n    import torch.distributed.tensor._utils", {"_utils"}),
        ("dist._ours", {"_ours"}),
        ("self._ours = other._ours", set()),
        ("from ._torch_compat import version_of", set()),
        ("point._replace(x=1)", set()),
    ],
)
def test_the_reader_of_private_names_sees(source: str, expected: set[str]) -> None:
    assert names_of_torch(ast.parse(source), PYTHONS_OWN | {"_ours"}) == expected


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if path not in COMPAT],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_no_other_file_names_a_private_name_of_torch(path: Path) -> None:
    assert names_of_torch(parse(path), OWN) == set()


def test_no_other_file_has_a_name_that_torch_has_too() -> None:
    """An attribute that both torch and we define would pass the test above: only `self` may have one."""
    torchs = set().union(*(names_of_torch(parse(path), PYTHONS_OWN) for path in COMPAT))
    for path in FILES:
        if path in COMPAT:
            continue
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Attribute) and node.attr in torchs:
                assert ast.unparse(node.value) in ("self", "cls"), f"{path}:{node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("module", [compat, compat_distributed], ids=lambda module: module.__name__.split(".")[-1])
def test_every_name_of_the_file_is_used_and_exported(module: object) -> None:
    path = Path(module.__file__)  # type: ignore[attr-defined]
    names: list[str] = module.__all__  # type: ignore[attr-defined]
    public = {name for name in names_defined(parse(path)) if not name.startswith("_")}
    top_level = {name for name in vars(module) if name in public}
    assert top_level <= set(names)
    elsewhere = {
        alias.name
        for other in FILES
        if other not in COMPAT
        for node in ast.walk(parse(other))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    inside = {node.id for p in COMPAT for node in ast.walk(parse(p)) if isinstance(node, ast.Name)}
    assert set(names) <= elsewhere | inside
