"""A hook of MkDocs: links from the pages to files of the repository that lie outside docs/ work in the site too.

The pages link to such files by relative paths, as a forge shows them: ``[results](../benchmarks/RESULTS.md)``. The site
mirrors each linked file under ``repository/``, follows the links of mirrored pages in turn, and rewrites the paths.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

MIRROR = "repository"
_CODE = re.compile(r"^ *```.*?^ *```|`[^`\n]+`", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^)#\s]+)")


def each_link(markdown: str, change: Callable[[str], str]) -> str:
    """Applies ``change`` to the path of every relative link outside of code."""
    code = [match.span() for match in _CODE.finditer(markdown)]

    def changed(match: re.Match[str]) -> str:
        inside = any(start <= match.start() < end for start, end in code)
        return match[0] if inside else change(match[0])

    return _LINK.sub(changed, markdown)


def _source(uri: str) -> PurePosixPath:
    """The path in the repository of what the site holds as ``uri``."""
    return PurePosixPath(uri[len(MIRROR) + 1 :] if uri.startswith(f"{MIRROR}/") else f"docs/{uri}")


def _uri(path: str) -> str:
    """The reverse of `_source`."""
    return path[len("docs/") :] if path.startswith("docs/") else f"{MIRROR}/{path}"


def _target(page: str, link: str) -> str:
    """The path in the repository of a link in a page with this uri."""
    return os.path.normpath(_source(page).parent / link)


def on_files(files: Files, config: Any) -> Files:
    root = Path(config["config_file_path"]).parent
    waiting = [_uri(path) for path in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/RESULTS.md")]
    waiting += [file.src_uri for file in files.documentation_pages()]
    seen: set[str] = set()
    while waiting:
        uri = waiting.pop()
        path = root / _source(uri)
        if uri in seen or not path.is_file():  # MkDocs warns of a link to what is not there
            continue
        seen.add(uri)
        if uri not in files.src_uris:
            files.append(File.generated(config, uri, abs_src_path=str(path)))
        if uri.endswith(".md"):
            waiting += _links(uri, path.read_text())
    return files


def _links(page: str, markdown: str) -> list[str]:
    """The uris that the relative links of a page lead to."""
    found: list[str] = []
    each_link(markdown, lambda link: found.append(_uri(_target(page, link))) or link)
    return found


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    here = page.file.src_uri
    return each_link(markdown, lambda link: os.path.relpath(_uri(_target(here, link)), os.path.dirname(here) or "."))
