"""Charts of a report, as files beside it. Without matplotlib a note says so."""

import importlib.util

import numpy as np

from harness import Report

COLORS = ("#D55E00", "#56B4E9", "#0072B2", "#999999")  # Okabe and Ito: told apart with any color vision


def _figure(report: Report, panels: int, size: tuple[float, float]) -> tuple:
    """A figure and its panels; None for both without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        report.note("chart: skipped, matplotlib is not installed (pip install '.[bench]')")
        return None, None
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(1, panels)


def draw_bars(rows: list[dict], ways: dict[str, str], title: str, report: Report) -> None:
    """timing.png and .svg: a group of bars for each row, its seconds/sample by way, on a logarithmic scale.

    A bar's label has its seconds, and the row's `WAY_over_sft` if there is one.
    """
    figure, axes = _figure(report, 1, (8, 1.2 + 0.8 * len(rows)))
    if figure is None:
        return
    for place, row in enumerate(rows):
        present = [way for way in ways if way in row]
        for number, way in enumerate(present):
            y, color = place + 0.21 * (number - (len(present) - 1) / 2), COLORS[list(ways).index(way)]
            bar, ratio = axes.barh(y, row[way], 0.19, color=color, label=ways[way]), row.get(f"{way}_over_sft")
            label = f"{row[way]:.3g}" if ratio is None else f"{row[way]:.3g} ({ratio:.2f} x SFT)"
            axes.bar_label(bar, [label], padding=3, fontsize=8)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.invert_yaxis()
    decades = np.log10([row[way] for row in rows for way in ways if way in row])
    low, high = np.floor(decades.min()), decades.max()
    limits = 10**low, 10 ** (high + 0.3 * (high - low))  # room for the longest bar's label
    axes.set(xscale="log", xlim=limits, xlabel="seconds/sample, on a logarithmic scale")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    labels = [label for label in ways.values() if label in handles]
    bars = [handles[label] for label in labels]
    figure.legend(bars, labels, loc="outside lower center", ncols=len(ways), frameon=False, fontsize=9)
    for kind in ("png", "svg"):
        figure.savefig(report.folder / f"timing.{kind}", dpi=150)
    report.note(f"chart: {report.folder / 'timing.png'} and .svg")
    report.markdown.append("![seconds/sample](timing.png)")


def draw_lines(rows: list[dict], names: tuple[str, ...], title: str, report: Report) -> None:
    """kernels.png: time and extra memory of each name against the number of tokens."""
    figure, panels = _figure(report, 2, (10, 4))
    if figure is None:
        return
    for panel, key, label in zip(panels, ("ms", "mib"), ("time, ms", "extra memory, MiB"), strict=True):
        for name, color, marker in zip(names, (COLORS[2], COLORS[0], COLORS[3]), "os^", strict=True):
            if points := [(row["tokens"], row[key]) for row in rows if row["name"] == name and row[key] is not None]:
                panel.plot(*zip(*points, strict=True), color=color, marker=marker, label=name)
        panel.set(xlabel="tokens", ylabel=label, yscale="log")
        panel.set_xscale("log", base=2)
        panel.grid(alpha=0.3)
        panel.legend()
    figure.suptitle(title, fontsize=10)
    figure.savefig(report.folder / "kernels.png", dpi=150)
    report.note(f"chart: {report.folder / 'kernels.png'}")
