"""What scores of several losses and seeds can bear: the papers' order against ours, and whether one loss is first."""

import csv
import importlib.resources
import itertools
import statistics

from scipy import stats


def published(table: str) -> dict[str, dict[str, float]]:
    """The means of one of the paper's tables ("table2", "table3"), by row and test set."""
    file = importlib.resources.files("abkd_fast.evaluation") / "paper" / f"{table}.csv"
    rows = csv.DictReader(file.read_text(encoding="utf-8").splitlines())
    means = {row.pop("row"): {key: float(value) for key, value in row.items() if key.endswith(" mean")} for row in rows}
    return {name: {key.removesuffix(" mean"): mean for key, mean in row.items()} for name, row in means.items()}


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
