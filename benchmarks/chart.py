"""Draws the results of benchmarks.iteration, one bar for each mode, for the README.

    python -m benchmarks.chart benchmarks/chart.png "2 H200s, NVLink=benchmarks/results/iteration_nvlink.json" ...

Each TITLE=JSON, written by `python -m benchmarks.iteration --json`, becomes a panel: medians over the turns, fastest
first.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from .peers import MODES

OURS, PEERS, COMPUTE = "tab:red", "tab:gray", "lightgray"


def bars(path: Path) -> list[tuple[str, float]]:
    """(mode, median ms of an iteration) of the modes that ran, fastest first."""
    rows = [row for row in json.loads(path.read_text()) if row["turns"]]
    return sorted(
        ((row["mode"], statistics.median(turn["ms"] for turn in row["turns"])) for row in rows), key=lambda bar: bar[1]
    )


def colour(mode: str) -> str:
    if mode == "compute":
        return COMPUTE
    return PEERS if MODES[mode].distribution else OURS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("panels", nargs="+", metavar="TITLE=JSON")
    options = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = [(title, bars(Path(path))) for title, _, path in (panel.rpartition("=") for panel in options.panels)]
    heights = [len(found) for _, found in panels]
    figure, axes = plt.subplots(
        len(panels), figsize=(9, 0.32 * sum(heights) + len(panels)), height_ratios=heights, squeeze=False
    )
    for axis, (title, found) in zip(axes[:, 0], panels, strict=True):
        names = [MODES[mode].what for mode, _ in found]
        drawn = axis.barh(names, [ms for _, ms in found], color=[colour(mode) for mode, _ in found])
        axis.bar_label(drawn, fmt="%.0f" if found[-1][1] >= 1000 else "%.1f", padding=3, fontsize=8)
        axis.invert_yaxis()
        axis.set_title(f"{title}: ms an iteration", fontsize=10, loc="left")
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(options.picture, dpi=120)


if __name__ == "__main__":
    main()
