"""What scores of several losses and seeds can bear: the papers' order against ours, and whether one loss is first."""

import itertools
import statistics

from scipy import stats

from abkd_fast.evaluation import published


def paper_means(table: str, titles: dict[str, str]) -> dict[str, dict[str, float]]:
    """The paper's means by test set, for the losses, given with their titles, that one of its tables has."""
    rows = published.read(published.find(table), []).rows.items()
    means = {name: {column: cell["mean"] for column, cell in cells.items()} for name, cells in rows}
    return {loss: means[name] for loss, title in titles.items() for name in means if published.is_named(name, title)}


def rank_correlation(ours: list[float], theirs: list[float]) -> str:
    """Kendall's tau of two lists of scores, in words. The p value is exact, of "no more than chance"."""
    result = stats.kendalltau(ours, theirs, alternative="greater")
    pairs = [*itertools.combinations(zip(ours, theirs, strict=True), 2)]
    same = sum((a - b) * (c - d) > 0 for (a, c), (b, d) in pairs)
    tau = f"Kendall's tau {result[0]:+.2f}, p = {result[1]:.2g}"
    return f"{same} of {len(pairs)} pairs are in the paper's order ({tau})"


def ahead_of(first: list[float], other: list[float]) -> dict[str, float | int | None]:
    """How far `first` is ahead, seed by seed. p: of a paired t test, one-sided; None with a single seed."""
    gaps = [a - b for a, b in zip(first, other, strict=True)]
    p = stats.ttest_rel(first, other, alternative="greater").pvalue if len(gaps) > 1 else None
    return {"gap": statistics.fmean(gaps), "wins": sum(gap > 0 for gap in gaps), "p": p}
