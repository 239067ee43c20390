"""The documents: links, anchors, code and names in them. MkDocs checks the links of its site by itself."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lion_dist
from lion_dist import checkpoint, deepspeed
from tests.documents import FENCE, ROOT, Page

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "benchmarks/RESULTS.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
# Paths of the repository, such as lion_dist/update/reference.py, where a document names them.
PATH = re.compile(r"(?<![\w./<>{}-])(?:lion_dist|examples|launch|benchmarks|tests|docs)/[\w./-]*\w")
each_page = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def anchors(page: Path) -> Iterator[str]:
    """The anchors that GitHub and MkDocs give the headings of a page."""
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        text = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading))
        yield text.strip().lower().replace(" ", "-")


@each_page
def test_relative_links_and_anchors_lead_somewhere(page: Path) -> None:
    for found in LINK.finditer(prose(page)):
        link = found[1] or found[2]
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), f"{link}: there is no file {target}"
        assert target.is_relative_to(ROOT), f"{link} leads out of the repository"
        if anchor:
            assert anchor in set(anchors(target)), f"{link}: {target.name} has no heading {anchor}"


@each_page
def test_paths_that_the_documents_name_exist(page: Path) -> None:
    if page.name != "CHANGELOG.md":  # which names what was there once
        for path in PATH.findall(prose(page)):
            assert (ROOT / path).exists(), f"there is no {path}"


@each_page
def test_python_code_compiles(page: Path) -> None:
    for fence in Page.read(page).fences("python"):
        ast.parse(fence.code)


def test_every_public_name_is_in_the_api_reference() -> None:
    shown = set(re.findall(r"^::: (\S+)", (ROOT / "docs/api.md").read_text(), re.MULTILINE))
    modules = {"checkpoint", "deepspeed"}
    expected = {f"lion_dist.{name}" for name in lion_dist.__all__ if name not in modules and not name.startswith("_")}
    expected |= {f"lion_dist.checkpoint.{name}" for name in checkpoint.__all__ if name != "convert"}
    expected |= {f"lion_dist.checkpoint.convert.{name}" for name in checkpoint.convert.__all__}
    expected |= {f"lion_dist.deepspeed.{name}" for name in ("DeepSpeedLion", "register", "registered", "unregister")}
    assert shown == expected
    assert all(hasattr(deepspeed, name.rpartition(".")[2]) for name in expected if ".deepspeed." in name)


def test_the_readme_is_short_and_the_citation_names_this_version() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 200
    assert f"\nversion: {lion_dist.__version__}\n" in (ROOT / "CITATION.cff").read_text()
