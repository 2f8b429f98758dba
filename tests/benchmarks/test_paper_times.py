"""The paper's seconds/sample, and the order of methods beside it."""

import importlib
import pathlib

import pytest

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"
PAPER = ["MiniLLM", "GKD", "DISTILLM", "AlphaNet", "ABKD", "KD", "SFT"]  # most seconds first


@pytest.fixture
def paper(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("paper")


@pytest.fixture
def timing(paper):
    return importlib.import_module("timing")


def test_paper_has_every_method_that_is_timed(paper, timing):
    assert sorted(paper.SECONDS, key=paper.SECONDS.get, reverse=True) == PAPER
    assert set(timing.METHODS) == set(PAPER)
    assert paper.ratio("ABKD") == 0.768 / 0.344
    assert paper.ratio("MiniLLM", "GKD") == 4.452 / 2.078


SAFE = "pairs are in the paper's order."
CASES = {
    "the paper's order": (
        {name: [14.0 - 2 * place, 13.0 - 2 * place] for place, name in enumerate(PAPER)},
        f"Order, ours: {' > '.join(PAPER)}. 21 of 21 {SAFE}",
    ),
    "one round": (
        {"SFT": [1.0], "KD": [2.0]},
        "Order, ours: KD > SFT. 1 of 1 pairs are in the paper's order; one round doesn't show which of them are safe.",
    ),
    "a swapped pair": (
        {"SFT": [1.0, 1.0, 1.0], "KD": [2.0, 2.0, 2.0], "ABKD": [1.5, 1.6, 1.4]},
        f"Order, ours: KD > ABKD > SFT. 2 of 3 {SAFE}\n\n"
        "- ABKD / KD: 1.18 in the paper, 0.75 here; another order in 3 of 3 rounds",
    ),
    "a pair swapped in one round": (
        {"SFT": [1.0], "MiniLLM": [0.5]},
        "Order, ours: SFT > MiniLLM. 0 of 1 pairs are in the paper's order; one round doesn't show which of them are "
        "safe.\n\n- MiniLLM / SFT: 12.94 in the paper, 0.50 here",
    ),
    "rounds that don't agree": (
        {"SFT": [1.0, 3.0, 1.0, 1.0, 1.0], "KD": [2.0] * 5, "ABKD": [1.9, 1.9, 1.9, 2.1, 2.1]},
        f"Order, ours: KD > ABKD > SFT. 2 of 3 {SAFE}\n\n"
        "- ABKD / KD: 1.18 in the paper, 0.95 here; another order in 3 of 5 rounds, not safe\n"
        "- ABKD / SFT: 2.23 in the paper, 1.90 here; the same order in 4 of 5 rounds, not safe\n"
        "- KD / SFT: 1.89 in the paper, 2.00 here; the same order in 4 of 5 rounds, not safe",
    ),
    "equal": (
        {"SFT": [1.0, 1.0], "KD": [1.0, 1.0]},
        f"Order, ours: SFT > KD. 0 of 1 {SAFE}\n\n- KD / SFT: 1.89 in the paper, 1.00 here; "
        "another order in 2 of 2 rounds",
    ),
}


@pytest.mark.parametrize(("times", "expected"), CASES.values(), ids=CASES.keys())
def test_order_note(paper, times, expected):
    assert paper.order_note("ours", times) == expected


def test_order_notes_are_of_methods_that_agree(paper, timing):
    """A way with fewer than two of them has no order. SFT, without a teacher, stands in the cached one as it is."""
    times = {("SFT", "ours"): [1.0, 1.0], ("SFT", "published"): [5.0, 5.0], ("GKD", "ours"): [4.0, 4.0]}
    times |= {("KD", "ours"): [3.0, 3.0], ("KD", "cached"): [2.0, 2.0], ("MiniLLM", "ours"): [9.0, 9.0]}
    notes = paper.order_notes(timing.WAYS, times, ["SFT", "KD", "GKD"])
    assert [note.partition(".")[0] for note in notes] == [
        "Order, ours: GKD > KD > SFT",
        "Order, ours, teacher's states cached: KD > SFT",
    ]


@pytest.mark.parametrize("difference", [0.5, float("nan")])
def test_a_row_of_sides_that_differ_has_the_papers_ratio_alone(timing, difference):
    benchmark = object.__new__(timing.Benchmark)
    benchmark.methods, benchmark.tolerance = timing.METHODS, 1e-4
    benchmark.difference = lambda name: difference if name == "GKD" else 0.0
    times = {(name, way): [x, 3 * x] for name, x in (("SFT", 1e3), ("GKD", 4e3)) for way in ("published", "ours")}
    row = benchmark.row("GKD", times)
    assert {key: value for key, value in row.items() if "_over_" in key} == {"paper_over_sft": 2.078 / 0.344}
    assert (row["published"], row["paper"]) == (8.0, 2.078)
    benchmark.difference = lambda name: 0.0
    assert benchmark.row("GKD", times)["published_over_sft"] == 4.0
    assert benchmark.row("GKD", times)["published_over_ours"] == 1.0
