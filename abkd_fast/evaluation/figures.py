"""Figures in print quality, PNG and SVG: ROUGE-L over training, and the curves of one run. Needs matplotlib."""

import contextlib
import itertools
import math
import pathlib
import statistics
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..files import atomic_file
from .runs import Run, replicates

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette without its yellow, which is faint on white, and three darker colors. Readers with any color
# vision can tell most of them apart. In gray the markers differ.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255", "#999933", "#6A3D9A")
MARKERS = "osD^vP*X<>"
LINES = ("-", "-.", ":")  # each time that the colors start again, the next one
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
    "svg.fonttype": "none",
    "savefig.dpi": 300,
}


def rouge_curves(runs: list[Run], stem: pathlib.Path) -> list[pathlib.Path]:
    """Draws the papers' Figure 1: ROUGE-L on dev rows over training, one line a run, the teacher's result dashed.

    Runs that differ in their seed alone are one line, their mean, in a band of one standard error to each side.
    Runs whose results others start from are left out. Returns the paths; none if no run has such points.
    """
    shown = [run for run in runs if not any(other.begins_with(run) or other.learns_from(run) for other in runs)]
    groups = replicates(run for run in shown or runs if run.curve("dev", "rouge_l")[0])
    if not groups:
        return []
    names = {run.dev_rouge for run, *_ in groups}
    with _figure(1, (5.5, max(3.4, 0.22 * len(groups))), stem) as (panel,):  # high enough for the legend
        for index, group in enumerate(groups):
            style, name = _style(index), group[0].label
            steps, means, low, high = _over_seeds(group)
            panel.plot(steps, means, **style, label=name if len(names) == 1 else f"{name}: {group[0].dev_rouge}")
            if len(group) > 1:  # the band is above the grid and below all lines
                panel.fill_between(steps, low, high, color=style["color"], alpha=0.12, linewidth=0, zorder=1.6)
        teachers = replicates(run for run in runs if any(other.learns_from(run) for other in itertools.chain(*groups)))
        for teacher, *others in teachers[:1]:
            ends = [run.curve("dev", "rouge_l")[1][-1:] for run in (teacher, *others)]
            if all(ends) and names == {teacher.dev_rouge}:
                height = statistics.fmean(itertools.chain(*ends))
                panel.update_datalim([(0, height)])  # axhline itself leaves no margin above a line
                panel.axhline(height, color="#555555", linestyle="--", label=teacher.label)
        panel.set(xlabel="Training step", ylabel=f"{' / '.join(sorted(names))} on development rows")
        panel.set_xlim(left=0)
        title = {"title": _band(groups), "title_fontsize": 8, "alignment": "left"}
        panel.legend(loc="upper left", bbox_to_anchor=(1, 1), **title)
    return _paths(stem)


def _style(index: int) -> dict[str, str | bool]:
    turn, place = divmod(index, len(COLORS))
    marker, line = MARKERS[(index + turn) % len(MARKERS)], LINES[turn % len(LINES)]
    return {"color": COLORS[place], "marker": marker, "linestyle": line, "clip_on": False}


def _over_seeds(group: list[Run]) -> tuple[list[int], list[float], list[float], list[float]]:
    """ROUGE-L on dev rows at the steps at which all runs have it: steps, means, and an error below and above."""
    curves = [dict(zip(*run.curve("dev", "rouge_l"), strict=True)) for run in group]
    steps = [step for step in curves[0] if all(step in curve for curve in curves)]
    values = [[curve[step] for curve in curves] for step in steps]
    means = [*map(statistics.fmean, values)]
    errors = [statistics.stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else 0.0 for scores in values]
    low, high = ([mean + sign * error for mean, error in zip(means, errors, strict=True)] for sign in (-1, 1))
    return steps, means, low, high


def _band(groups: list[list[Run]]) -> str | None:
    """What the bands are, if there are some."""
    counts = sorted({len(group) for group in groups} - {1})
    numbers = " or ".join(map(str, counts))
    return f"band: ± standard error\nover {numbers} training seeds" if counts else None


def run_curves(run: Run, stem: pathlib.Path) -> None:
    """Draws one run's loss, speed and memory over its steps."""
    own = "training" if run.config["method"] == "sft" else "training, the method's"
    with _figure(3, (9.0, 2.6), stem) as panels:
        loss, speed, memory = panels
        loss.plot(*run.curve("train", "loss"), color=COLORS[0], label=own)
        steps, values = run.curve("dev", "loss")
        if steps:
            loss.plot(steps, values, color=COLORS[1], marker=MARKERS[0], label="dev, cross-entropy", clip_on=False)
        loss.legend()
        speed.plot(*run.curve("train", "samples_per_second"), color=COLORS[0])
        steps, values = run.curve("train", "peak_memory_bytes")
        memory.plot(steps, [value / 1e9 for value in values], color=COLORS[0])
        for panel, label in zip(panels, ("Loss a token", "Samples a second", "Peak memory (GB)"), strict=True):
            panel.set(xlabel="Training step", ylabel=label)
            panel.set_xlim(left=0)
            low, high = panel.dataLim.intervaly
            if low <= high:  # something is drawn
                panel.set_ylim(min(0, 1.05 * low), max(0, 1.05 * high) or 1)


@contextlib.contextmanager
def _figure(panels: int, size: tuple[float, float], stem: pathlib.Path) -> Iterator[list["Axes"]]:
    """Gives panels side by side, and saves them when the block ends. The size is in inches."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        yield list(figure.subplots(1, panels, squeeze=False)[0])
        for path in _paths(stem):
            with atomic_file(path) as temporary:
                figure.savefig(temporary, format=path.suffix[1:])


def _paths(stem: pathlib.Path) -> list[pathlib.Path]:
    return [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
