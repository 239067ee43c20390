"""The documents, and the code in them."""

from __future__ import annotations

import ast
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)


class Fence(NamedTuple):
    """A block of code in a page, with the line of the page on which its code begins, counted from 1."""

    line: int
    language: str
    code: str


@dataclass(frozen=True)
class Page:
    name: str  # the path in the repository
    text: str

    @classmethod
    def read(cls, path: Path) -> Page:
        return cls(str(path.relative_to(ROOT)), path.read_text())

    @property
    def prose(self) -> str:
        return FENCE.sub("", self.text)

    def fences(self, language: str = "") -> list[Fence]:
        """The blocks of one language, or of all."""
        found = []
        for match in FENCE.finditer(self.text):
            line = self.text.count("\n", 0, match.start()) + 2
            found.append(Fence(line, match[2], textwrap.dedent(match[3])))
        return [fence for fence in found if language in ("", fence.language)]


def guides() -> list[Page]:
    """The pages for users: README.md and those of docs/."""
    return [Page.read(path) for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))]


def names_read(code: str) -> set[str]:
    """The names that Python code reads before a statement of it has given them a value."""
    read: set[str] = set()
    written: set[str] = set()
    for statement in ast.parse(code).body:
        names = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
        read |= {name.id for name in names if isinstance(name.ctx, ast.Load)} - written
        written |= {name.id for name in names if isinstance(name.ctx, ast.Store)}
    return read


def imports_of(code: str) -> dict[str, str]:
    """The names that Python code imports, each with the package that it comes from."""
    found = {}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                source = alias.name if isinstance(node, ast.Import) else node.module or ""
                bound = alias.asname or (alias.name.partition(".")[0] if isinstance(node, ast.Import) else alias.name)
                found[bound] = source.partition(".")[0]
    return found
