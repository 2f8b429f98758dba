"""The paper's seconds/sample (arXiv:2505.04560, Table 1), and the order of its methods beside that of a run."""

import csv
import itertools
import statistics

from abkd_fast.evaluation.published import PAPER

_ROWS = csv.DictReader((PAPER / "table1.csv").read_text().splitlines())
SECONDS = {row["row"]: float(row["seconds_per_sample"]) for row in _ROWS}


def ratio(name: str, other: str = "SFT") -> float:
    """The quotient of two methods' seconds."""
    return SECONDS[name] / SECONDS[other]


def order_note(way: str, times: dict[str, list[float]]) -> str:
    """Methods by their time, and a line for each pair that the paper has in another order, or whose order is not safe.

    `times` gives the time of every round, in any unit, for two or more of the paper's methods. A pair is judged by its
    medians. Its order is safe if every round has it, and there is more than one round.
    """
    medians = {name: statistics.median(values) for name, values in times.items()}
    rounds, others, lines = len(next(iter(times.values()))), 0, []
    pairs = list(itertools.combinations(sorted(times, key=SECONDS.get, reverse=True), 2))
    for more, less in pairs:
        is_other = medians[more] <= medians[less]
        count = sum((x <= y) == is_other for x, y in zip(times[more], times[less], strict=True))
        others += is_other
        if is_other or count < rounds:
            ratios = f"{ratio(more, less):.2f} in the paper, {medians[more] / medians[less]:.2f} here"
            order = f"; {'another' if is_other else 'the same'} order in {count} of {rounds} rounds"
            order += "" if count == rounds else ", not safe"
            lines.append(f"- {more} / {less}: {ratios}{order if rounds > 1 else ''}")
    order = " > ".join(sorted(medians, key=medians.get, reverse=True))
    note = f"Order, {way}: {order}. {len(pairs) - others} of {len(pairs)} pairs are in the paper's order"
    note += "." if rounds > 1 else "; one round doesn't show which of them are safe."
    return "\n".join([note, "", *lines]).rstrip()


def order_notes(ways: dict[str, str], times: dict[tuple[str, str], list[float]], names: list[str]) -> list[str]:
    """`order_note` of these methods for each way that has two of them; `times` is by method and way.

    SFT has no teacher whose states could be cached: next to cached methods it stands as it is.
    """
    times, notes = times | {("SFT", "cached"): times["SFT", "ours"]}, []
    for way, title in ways.items():
        present = {name: times[name, way] for name in names if (name, way) in times}
        notes += [order_note(title, present)] if len(present) > 1 else []
    return notes
