"""Lists and verifies a checkpoint: ``python -m lion_dist.checkpoint PATH``.

PATH is a checkpoint, or a folder of checkpoints, of which the latest is taken. The exit status is 0 if every byte of it
is what was saved, else 1, and the reason is printed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from .files import MANIFEST
from .folders import latest
from .manifest import Manifest
from .reader import Reader


def describe(manifest: Manifest) -> str:
    """The tensors and values of a checkpoint, one per line."""
    lines = []
    for name, entry in sorted(manifest.tensors.items()):
        chunks = f", in {len(entry.chunks)} chunks" if len(entry.chunks) > 1 else ""
        lines.append(f"{name}: {entry.dtype} {list(entry.shape)}{chunks}")
    for name, value in sorted(manifest.objects.items()):
        text = json.dumps(value)
        lines.append(f"{name} = {text if len(text) <= 100 else text[:97] + '...'}")
    nbytes = sum(entry.nbytes for entry in manifest.tensors.values())
    lines.append(f"{len(manifest.tensors)} tensors, {nbytes:,} bytes in {len(manifest.files)} files")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: the arguments; None: those of the process.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="python -m lion_dist.checkpoint", description=__doc__.split(":")[0] + ".")
    parser.add_argument(
        "path", type=Path, help="a checkpoint, or a folder of checkpoints, of which the latest is taken"
    )
    parser.add_argument("--quiet", action="store_true", help="verify only")
    options = parser.parse_args(argv)
    try:
        path = options.path if (options.path / MANIFEST).exists() else latest(options.path)
        reader = Reader(path)
        manifest = reader.open()
        if not options.quiet:
            print(describe(manifest))
        reader.verify()
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{path}: whole")
    return 0


if __name__ == "__main__":
    sys.exit(main())
