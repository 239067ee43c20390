"""Lists and verifies a checkpoint: ``python -m lion_dist.checkpoint PATH``.

PATH is a checkpoint or a folder of several, of which the latest is taken. Ends with 0 if every byte of it is what was
saved, else with 1 and the reason.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from .folders import latest
from .manifest import NAME, Manifest
from .reader import Reader


def describe(manifest: Manifest) -> str:
    lines = []
    for name, held in sorted(manifest.tensors.items()):
        chunks = f", in {len(held.chunks)} chunks" if len(held.chunks) > 1 else ""
        lines.append(f"{name}: {held.dtype} {list(held.shape)}{chunks}")
    for name, value in sorted(manifest.objects.items()):
        text = json.dumps(value)
        lines.append(f"{name} = {text if len(text) <= 100 else text[:97] + '...'}")
    nbytes = sum(held.nbytes for held in manifest.tensors.values())
    lines.append(f"{len(manifest.tensors)} tensors, {nbytes:,} bytes in {len(manifest.files)} files")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lion_dist.checkpoint", description=__doc__.split(":")[0] + ".")
    parser.add_argument("path", type=Path, help="a checkpoint, or a folder of several, of which the latest is taken")
    parser.add_argument("--quiet", action="store_true", help="verify only")
    options = parser.parse_args(argv)
    try:
        path = options.path if (options.path / NAME).exists() else latest(options.path)
        reader = Reader(path)
        manifest = reader.manifest
        if not options.quiet:
            print(describe(manifest))
        reader.verify(reader.every_block())
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{path}: whole")
    return 0


if __name__ == "__main__":
    sys.exit(main())
