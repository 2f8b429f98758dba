"""Charts of a report, as files beside it. Without matplotlib a note says so. Colors differ for any color vision."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import numpy as np

from harness import Report

COLORS = ("#D55E00", "#56B4E9", "#0072B2", "#999999")  # Okabe and Ito


def _pyplot(report: Report) -> ModuleType | None:
    if importlib.util.find_spec("matplotlib") is None:
        report.note("chart: skipped, matplotlib is not installed (pip install '.[bench]')")
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw_bars(rows: list[dict], ways: dict[str, str], title: str, report: Report) -> None:
    """timing.png and .svg: a group of bars for each row, its seconds/sample by way, on a logarithmic scale."""
    if (pyplot := _pyplot(report)) is None:
        return
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.6 * len(rows)), constrained_layout=True)
    colors = dict(zip(ways, COLORS, strict=False))
    for place, row in enumerate(rows):
        present = [way for way in ways if way in row]
        for number, way in enumerate(present):
            y = place + 0.27 * (number - (len(present) - 1) / 2)
            bar = axes.barh(y, row[way], 0.25, color=colors[way], label=ways[way])
            axes.bar_label(bar, [f"{row[way]:.3g}"], padding=3, fontsize=8)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.set_xscale("log")
    decades = np.log10([row[way] for row in rows for way in ways if way in row])
    axes.set_xlim(10 ** np.floor(decades.min()), 10 ** np.ceil(decades.max() + 0.2))  # room for the last number
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.set_xlabel("seconds/sample, on a logarithmic scale")
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, frameon=False)
    for kind in ("png", "svg"):
        figure.savefig(report.folder / f"timing.{kind}", dpi=150)
    pyplot.close(figure)
    report.note(f"chart: {report.folder / 'timing.png'} and .svg")
    report.markdown.append("![seconds/sample](timing.png)")


def draw_lines(rows: list[dict], names: tuple[str, ...], title: str, report: Report) -> None:
    """kernels.png: time and extra memory of each name against the number of tokens."""
    if (pyplot := _pyplot(report)) is None:
        return
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for panel, key, label in zip(panels, ("ms", "mib"), ("time, ms", "extra memory, MiB"), strict=True):
        for name, color, marker in zip(names, (COLORS[2], COLORS[0], COLORS[3]), "os^", strict=True):
            points = [(row["tokens"], row[key]) for row in rows if row["name"] == name and row[key] is not None]
            if points:
                panel.plot(*zip(*points, strict=True), color=color, marker=marker, label=name)
        panel.set(xlabel="tokens", ylabel=label, yscale="log")
        panel.set_xscale("log", base=2)
        panel.grid(alpha=0.3)
        panel.legend()
    figure.suptitle(title, fontsize=10)
    figure.savefig(report.folder / "kernels.png", dpi=150)
    report.note(f"chart: {report.folder / 'kernels.png'}")
