"""What scores of several losses and seeds can bear: the papers' order against ours, and whether one loss is first."""

import itertools
import statistics

from scipy import stats

from abkd_fast.evaluation import published


def paper_means(table: str, titles: dict[str, str]) -> dict[str, dict[str, float]]:
    """The paper's means by test set, for the losses, given with their titles, that one of its tables has.

    Of several losses with one title, which the paper has one row for, only the first is there.
    """
    rows = published.read(published.find(table), []).rows.items()
    means = {name: {column: cell["mean"] for column, cell in cells.items()} for name, cells in rows}
    first = {title: loss for loss, title in reversed(titles.items())}
    named = ((loss, name) for title, loss in first.items() for name in means if published.is_named(name, title))
    return {loss: means[name] for loss, name in sorted(named, key=lambda pair: [*titles].index(pair[0]))}


def rank_correlation(ours: list[float], theirs: list[float]) -> str:
    """Kendall's tau of two lists of scores, in words. p: of "no more than chance", exact unless scores tie."""
    signs = [(a - b) * (c - d) for (a, c), (b, d) in itertools.combinations(zip(ours, theirs, strict=True), 2)]
    counts = f"{sum(sign > 0 for sign in signs)} of {len(signs)} pairs are in the paper's order"
    if ties := sum(sign == 0 for sign in signs):
        counts += f", {ties} are ties"
    if len({*ours}) == 1 or len({*theirs}) == 1:
        return counts
    result = stats.kendalltau(ours, theirs, alternative="greater")
    return f"{counts} (Kendall's tau {result[0]:+.2f}, p = {result[1]:.2g})"


def ahead_of(first: list[float], other: list[float]) -> dict[str, float | int | None]:
    """How far `first` is ahead, seed by seed. p: of a paired t test, one-sided; None with a single seed."""
    gaps = [a - b for a, b in zip(first, other, strict=True)]
    gap, p = statistics.fmean(gaps), None
    if len(gaps) > 1:
        has_spread = statistics.stdev(gaps) > 1e-9 * max(map(abs, (*first, *other)))
        test = stats.ttest_rel(first, other, alternative="greater") if has_spread else None
        p = float(test.pvalue) if test else float(gap <= 0)
    return {"gap": gap, "wins": sum(gap > 0 for gap in gaps), "p": p}
