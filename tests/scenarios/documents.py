"""Tables of the project's documents, read as rows."""

from __future__ import annotations

import re
from pathlib import Path


def section(page: Path, heading: str) -> str:
    """The text below a heading, up to the next one of any level."""
    found = re.search(rf"^#+ {re.escape(heading)}$\n(.*?)(?=^#+ |\Z)", page.read_text(), re.MULTILINE | re.DOTALL)
    assert found, f"{page.name} has no heading {heading}"
    return found[1]


def tables(page: Path, heading: str) -> list[list[dict[str, str]]]:
    """The tables below a heading: rows by the titles of their columns."""
    made = []
    for block in re.findall(r"(?:^\|.*\n?)+", section(page, heading), re.MULTILINE):
        head, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines())
        made.append([dict(zip(head, cells, strict=True)) for cells in lines])
    return made


def table_with(page: Path, heading: str, column: str) -> list[dict[str, str]]:
    """The first table below a heading that has a column of this title."""
    return next(rows for rows in tables(page, heading) if column in rows[0])


def numbers_in(cell: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", cell)]
