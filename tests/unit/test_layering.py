"""The walls of the house, read from the sources: maths (update/) and bytes (sharding/) meet only in the
two optimizers, and triton is tried in one place. Imports are read with ast, wherever in a file they stand. So are the
calls that make tensors."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import lion_dist

PACKAGE = Path(lion_dist.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = ("lion_dist", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(tree: ast.AST, module: str, is_package: bool = False) -> set[str]:
    """Absolute dotted names of all that is imported below a node of ``module``."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".") if is_package else module.split(".")[:-1]
            base = base[: len(base) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            found |= {prefix} | {f"{prefix}.{alias.name}" for alias in node.names}
    return found


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports(path: Path) -> set[str]:
    return imports_of(parse(path), module_name(path), path.name == "__init__.py")


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def closure(path: Path) -> set[str]:
    """The modules that a file imports, directly or through other files of lion_dist."""
    by_name = {module_name(p): p for p in FILES if p != PACKAGE / "__init__.py"}
    found: set[str] = set()
    todo = [path]
    while todo:
        new = imports(todo.pop()) - found
        found |= new
        todo += [by_name[name] for name in new if name in by_name]
    return found


def ids(paths: list[Path]) -> list[str]:
    return [str(p.relative_to(PACKAGE)) for p in paths]


def names_in(tree: ast.AST) -> set[str]:
    """Every identifier, and every string that is no longer than one (group["lr"])."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.arg | ast.keyword):
            found.add(node.arg or "")
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            found.add(node.value)
    return found


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch.distributed as dist", "torch.distributed"),
        ("from torch import distributed", "torch.distributed"),
        ("def f():\n    from ...sharding.layout import ShardLayout", "lion_dist.sharding.layout"),
        ("from ... import sharding", "lion_dist.sharding"),
        ("from . import triton_step", "lion_dist.update.backends.triton_step"),
        ("from .triton_step import LAUNCH", "lion_dist.update.backends.triton_step"),
        ("try:\n    import triton.language as tl\nexcept ImportError: pass", "triton.language"),
    ],
)
def test_the_reader_of_imports_sees(source: str, expected: str) -> None:
    assert expected in imports_of(ast.parse(source), "lion_dist.update.backends.triton")


def test_the_reader_of_names_sees() -> None:
    assert {"lr", "beta1", "betas", "sign"} <= names_in(ast.parse("f(beta1=group['lr'])\nx.betas\ndef sign(): ..."))


def test_files_are_found() -> None:
    assert {"update/reference.py", "sharding/layout.py", "lion.py"} <= set(ids(FILES))


UPDATE = [p for p in FILES if "update" in p.relative_to(PACKAGE).parts]
SHARDING = [p for p in FILES if p.parent.name == "sharding"]


@pytest.mark.parametrize("path", UPDATE, ids=ids(UPDATE))
def test_maths_never_communicates(path: Path) -> None:
    for name in closure(path):
        assert not within(name, "torch.distributed"), name
        assert not within(name, "lion_dist.sharding"), name
    assert "distributed" not in {n.attr for n in ast.walk(parse(path)) if isinstance(n, ast.Attribute)}


@pytest.mark.parametrize("path", SHARDING, ids=ids(SHARDING))
def test_sharding_names_no_hyper_parameter(path: Path) -> None:
    for name in closure(path):
        assert not within(name, "lion_dist.update"), name
    rule = {
        "beta",
        "betas",
        "beta1",
        "beta2",
        "lr",
        "weight_decay",
        "maximize",
        "lion_rule",
        "momentum_dtype",
        "exp_avg",
    }
    assert not names_in(parse(path)) & rule


def test_the_layout_knows_no_torch() -> None:
    assert {name.split(".")[0] for name in imports(PACKAGE / "sharding/layout.py")} <= {
        "__future__", "collections", "dataclasses", "hashlib", "math", "itertools", "typing",
    }  # fmt: skip


KERNELS = [p for p in FILES if p.parent.name in ("backends", "sharding") and p.name.startswith("triton_")]


@pytest.mark.parametrize("path", FILES, ids=ids(FILES))
def test_triton_is_tried_in_one_place(path: Path) -> None:
    """Everything else imports without it. One file imports kernels in a function, once it knows that they can run."""
    kernels = {module_name(p) for p in KERNELS} | {"lion_dist.update.backends.triton"}

    def of_triton(names: set[str]) -> bool:
        return any(within(n, "triton") for n in names) or any(within(n, kernel) for n in names for kernel in kernels)

    module, chooser = module_name(path), path == PACKAGE / "update/backends/__init__.py"
    is_kernel = module in kernels
    at_import = [node for node in parse(path).body if isinstance(node, ast.Import | ast.ImportFrom)]
    if path == PACKAGE / "sharding/all_to_all.py":
        assert not any(of_triton(imports_of(node, module)) for node in at_import)
    elif not chooser and not is_kernel:
        assert not of_triton(imports(path))
    tries = [node for node in ast.walk(parse(path)) if isinstance(node, ast.Try)]
    tried = any(of_triton(imports_of(node, module, chooser)) for node in tries)
    assert tried == chooser
    if is_kernel:
        assert any(of_triton(imports_of(node, module)) for node in at_import)


def test_the_wings_meet_only_in_the_sharded_optimizer_and_its_protocols() -> None:
    """StateColumn says names and dtypes of state, and no rule, so files that move state may use it."""

    def uses(path: Path, wing: str) -> bool:
        return any(within(n, f"lion_dist.{wing}") and not within(n, "lion_dist.update.state") for n in imports(path))

    both = {str(path.relative_to(PACKAGE)) for path in FILES if uses(path, "update") and uses(path, "sharding")}
    optimizer = {"sharded_lion.py", "stepper.py", "grad_source.py", "param_sync.py", "intake.py"}
    assert both == {*optimizer, "plain_beside_sharded.py"}


def test_every_folder_is_installed() -> None:
    """A wheel holds the packages that pyproject.toml lists."""
    text = (PACKAGE.parent / "pyproject.toml").read_text()
    (listed,) = re.findall(r"^packages = \[(.*?)\]", text, re.DOTALL | re.MULTILINE)
    packages = {module_name(path) for path in FILES if path.name == "__init__.py"}
    assert set(re.findall(r'"(.*?)"', listed)) == packages | {"lion_dist"}


TESTS_FOLDER = Path(__file__).parents[1]
TESTS = sorted(TESTS_FOLDER.rglob("*.py"))


def test_no_test_module_imports_another() -> None:
    """Helpers that several modules need stand in tests/scenarios and tests/asserts.py."""
    found = {
        f"{path.relative_to(TESTS_FOLDER)}: {name}"
        for path in TESTS
        for name in imports_of(parse(path), f"tests.{path.parent.name}.{path.stem}")
        if any(part.startswith("test_") for part in name.split(".")) and name.startswith("tests.")
    }
    assert not found


# Functions that make tensors, and the arguments without which torch.set_default_device() and set_default_dtype(), which
# are the user's, decide what they make. `arange` of integers is int64 whatever the default is.
NAMES = (
    "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones", "rand", "randn",
    "scalar_tensor", "tensor", "zeros",
)  # fmt: skip
MAKERS = {f"torch.{name}": {"dtype", "device"} for name in NAMES} | {"torch.arange": {"device"}}


@pytest.mark.parametrize("path", FILES, ids=ids(FILES))
def test_no_tensor_is_made_by_the_users_defaults(path: Path) -> None:
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call) and (name := ast.unparse(node.func)) in MAKERS:
            lacking = MAKERS[name] - {keyword.arg for keyword in node.keywords}
            assert not lacking, f"line {node.lineno}: {name} without {sorted(lacking)}"
