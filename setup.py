"""The description of the package: the README as it can be read without the repository.

On a package index the README stands alone, and there is no address yet to which its relative links could be completed.
So they become the names of the files, which the source distribution holds. Everything else is in pyproject.toml.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import setup

_LINK = re.compile(r"(!?)\[((?:`[^`]*`|[^\]`])*)\]\((?!\w+:)([^)#\s]*)(?:#[^)\s]*)?\)")
NOTE = """
The files that this page names, with documentation, examples, launch scripts and tests, are in the source distribution:
`pip download --no-deps --no-binary lion_dist lion_dist`.
"""


def _named(link: re.Match[str]) -> str:
    is_image, text, path = link.groups()
    if is_image:
        return ""
    if not path or text.strip("`") == path:  # an anchor, or a path already
        return f"`{path}`" if path else text
    return f"`{path}`" if path.endswith(f"/{text}") else f"{text} (`{path}`)"


def description(readme: str) -> str:
    """Replaces the relative links of a README by the names of the files, and leaves relative images out."""
    return _LINK.sub(_named, readme) + NOTE


if __name__ == "__main__":
    readme = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
    setup(long_description=description(readme), long_description_content_type="text/markdown")
