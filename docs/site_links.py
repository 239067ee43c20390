"""A hook of MkDocs: links from the pages to files of the repository that lie outside docs/ work in the site too.

The pages link to such files by relative paths, as a forge shows them: ``[results](../benchmarks/RESULTS.md)``. The site
mirrors each linked file under ``repository/``, follows the links of mirrored pages in turn, and rewrites the paths.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

MIRROR = "repository"
_CODE = re.compile(r"^ *```.*?^ *```|`[^`\n]+`", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^)#\s]+)")


def relative_links(markdown: str) -> list[re.Match[str]]:
    """The paths of all relative links outside of code, without their anchors."""
    code = [match.span() for match in _CODE.finditer(markdown)]
    return [m for m in _LINK.finditer(markdown) if not any(start <= m.start() < end for start, end in code)]


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
    """Adds the repository's own documents to the pages of the site."""
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
            waiting += [_uri(_target(uri, link[0])) for link in relative_links(path.read_text())]
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrites the relative links of a page so that they hold in the site."""
    here = page.file.src_uri
    for link in reversed(relative_links(markdown)):
        path = os.path.relpath(_uri(_target(here, link[0])), os.path.dirname(here) or ".")
        markdown = markdown[: link.start()] + path + markdown[link.end() :]
    return markdown
