import importlib
import itertools
import pathlib

import pytest

pytest.importorskip("scipy")
BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def ranking(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("ranking")


def test_losses_find_the_papers_rows(ranking):
    found = ranking.paper_means("table2", {"jsd:0.1": "JSD", "ab:0.2,0.7": "ABKD", "sft": "SFT"})
    assert [*found] == ["jsd:0.1", "ab:0.2,0.7"]  # Table 2 has no SFT
    sets = ("Dolly", "Self-Instruct", "Vicuna", "Super-Natural", "Unnatural")
    assert found["ab:0.2,0.7"] == dict(zip(sets, (25.65, 13.47, 16.06, 26.47, 29.32), strict=True))
    assert ranking.paper_means("table3", {"distillm/sfkl:0.1": "DistiLLM"})["distillm/sfkl:0.1"]["Vicuna"] == 19.12


@pytest.mark.parametrize("ours", [(1, 2, 3, 4), (4, 3, 2, 1), (2, 1, 3, 4), (3, 1, 4, 2)])
def test_the_order_of_two_lists_is_compared_pair_by_pair(ranking, ours):
    same = pairs_in_order(ours)
    orders = [*itertools.permutations(ours)]
    chance = sum(pairs_in_order(order) >= same for order in orders) / len(orders)
    tau = f"Kendall's tau {(2 * same - 6) / 6:+.2f}, p = {chance:.2g}"
    text = ranking.rank_correlation(list(ours), [10, 20, 30, 40])
    assert text == f"{same} of 6 pairs are in the paper's order ({tau})"


def pairs_in_order(values):
    return sum(a < b for a, b in itertools.combinations(values, 2))


def test_ties_have_no_order(ranking):
    text = ranking.rank_correlation([1, 1, 2], [1, 2, 3])
    assert text.startswith("2 of 3 pairs are in the paper's order, 1 are ties (")
    assert ranking.rank_correlation([1, 1], [1, 2]) == "0 of 1 pairs are in the paper's order, 1 are ties"


def test_the_paper_has_one_row_for_losses_of_one_title(ranking):
    titles = {"fkl": "FKLD", "ab:0.2,0.7": "ABKD", "ab:0.5,0.5": "ABKD", "jsd:0.1": "JSD"}
    assert [*ranking.paper_means("table2", titles)] == ["fkl", "ab:0.2,0.7", "jsd:0.1"]


def test_first_is_tested_seed_by_seed(ranking):
    same_luck = ranking.ahead_of([10.0, 20.0, 30.0], [9.0, 18.9, 29.1])
    assert same_luck["gap"] == pytest.approx(1.0)
    assert (same_luck["wins"], round(same_luck["p"], 4)) == (3, 0.0017)  # t = 17.3 with 2 degrees of freedom
    assert ranking.ahead_of([9.0, 21.0, 30.0], [10.0, 20.0, 31.0])["p"] > 0.5
    assert ranking.ahead_of([2.0], [1.0]) == {"gap": 1.0, "wins": 1, "p": None}
    assert ranking.ahead_of([1.0, 2.0], [1.0, 2.0])["p"] == 1.0  # no lead
    assert ranking.ahead_of([2.0, 3.0], [1.0, 2.0])["p"] == 0.0
