"""timing.py's chart: a group of bars for each method, on a logarithmic scale."""

from __future__ import annotations

import pathlib

import matplotlib
import numpy as np

from steps import WAYS

matplotlib.use("Agg")

from matplotlib import pyplot

COLOURS = {"published": "#D55E00", "ours": "#56B4E9", "cached": "#0072B2"}  # told apart by everybody (Okabe and Ito)


def draw(rows: list[dict], title: str, folder: pathlib.Path) -> None:
    """`rows`: a method's name, and its seconds/sample by way. Writes timing.png and timing.svg."""
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.6 * len(rows)), constrained_layout=True)
    for place, row in enumerate(rows):
        ways = [way for way in WAYS if way in row]
        for number, way in enumerate(ways):
            y = place + 0.27 * (number - (len(ways) - 1) / 2)
            bar = axes.barh(y, row[way], 0.25, color=COLOURS[way], label=WAYS[way])
            axes.bar_label(bar, [f"{row[way]:.3g}"], padding=3, fontsize=8)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.set_xscale("log")
    decades = np.log10([row[way] for row in rows for way in WAYS if way in row])
    axes.set_xlim(10 ** np.floor(decades.min()), 10 ** np.ceil(decades.max() + 0.2))  # room for the last number
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.set_xlabel("seconds/sample, on a logarithmic scale")
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, frameon=False)
    for kind in ("png", "svg"):
        figure.savefig(folder / f"timing.{kind}", dpi=150)
    pyplot.close(figure)
