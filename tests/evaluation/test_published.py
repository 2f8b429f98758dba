"""The paper's tables beside ours, and runs that differ in their training seed alone."""

import csv
import functools
import json
import re

import pytest

from abkd_fast.errors import ConfigError
from abkd_fast.evaluation import figures, published
from abkd_fast.evaluation.runs import read_runs, replicates
from abkd_fast.evaluation.tables import gain, score_table
from abkd_fast.report import main
from finished_runs import score, write_run

DOLLY = {"Dolly": score(20.0, 0.5, seed1=19.5, seed2=20.5)}


@pytest.fixture
def make_run(tmp_path):
    return functools.partial(write_run, tmp_path / "runs")


@pytest.fixture
def without_figures(monkeypatch):
    """The command without its slow half."""
    pytest.importorskip("matplotlib")
    for name in ("rouge_curves", "run_curves"):
        monkeypatch.setattr(figures, name, lambda *arguments: [])


def seed(number, **run):
    return {"seed": number, "name": "mine", "dir": "runs", "stage": None, **run}


def of_mean(value):
    return {"Dolly": score(value, 0.5, seed1=value - 0.5, seed2=value + 0.5)}


def beside(folder, paper):
    table = score_table(read_runs([folder]))
    return published.beside(table, published.read(published.find(str(paper)), table.columns))


def test_the_papers_tables_are_the_published_ones():
    for name, rows, first, last in (("table2", 8, 23.80, 29.32), ("table3", 9, 24.54, 38.66)):
        table = published.read(published.find(name), [])
        assert table.name == f"Table {name[-1]} of the ABKD paper"
        assert table.columns == ["Dolly", "Self-Instruct", "Vicuna", "Super-Natural", "Unnatural"]
        cells = [*table.rows.values()]
        assert (len(cells), cells[0]["Dolly"]["mean"], cells[-1]["Unnatural"]["mean"]) == (rows, first, last)


@pytest.mark.parametrize(
    ("name", "method", "loss"),
    [
        ("SFT", "sft", "ab:0.2,0.7"),
        ("FKLD", "kd", "fkl"),
        ("FKLD", "ab", "fkl"),
        ("RKLD", "ab", "rkl"),
        ("WSD", "ab", "wsd:0.5"),
        ("BDKD", "ab", "bdkd"),
        ("Jensen's KL", "ab", "jsd:0.1"),
        ("AKL", "ab", "akl:0.5"),
        ("DISTILLM", "distillm", "srkl:0.1"),
        ("AlphaNet", "ab", "alphanet:0.2,0.9,batch"),
        ("ABKD", "ab", "ab:0.1,0.8"),
    ],
)
def test_every_row_of_the_paper_finds_ours(make_run, name, method, loss):
    folder = make_run("one", method, loss, teacher=None if method == "sft" else "x", sets=DOLLY)
    rows = [row for paper in published.TABLES for row in beside(folder, paper).rows]
    assert {row.paper for row in rows if row.runs} <= {name, None}
    assert name in {row.paper for row in rows if row.runs}


def test_paper_ours_and_difference_are_in_one_place(make_run, without_figures, capsys):
    teacher = "runs/teacher/final"
    upper = {"Dolly": score(30.0, 0.0, seed1=30, seed2=30), "mine": score(50.0, 1.0, seed1=49, seed2=51)}
    make_run("teacher", sets=upper)
    spread = {"Vicuna": score(16.0, 0.1, seed1=15.9, seed2=16.1), "Dolly": score(25.125, 0.25, seed1=25, seed2=25.25)}
    make_run("ab", "ab", teacher=teacher, sets=spread)
    folder = make_run("jsd", "ab", "jsd:0.1", teacher=teacher, sets={"Vicuna": score(15.5, None, seed1=15.5)}).parent
    assert main([str(folder), "--paper", "table2"]) == 0
    assert "Jensen's KL" in capsys.readouterr().out
    lines = (folder / "scores.md").read_text().splitlines()
    sets = "Dolly | Self-Instruct | Vicuna | Super-Natural | Unnatural"
    assert lines[0] == f"|  |  | {sets} | mine | Average |"
    assert lines[2:7] == [
        "| FKLD | paper | 23.80 (0.37) | 10.01 (0.75) | 15.25 (0.65) | 17.69 (0.26) | 18.99 (0.05) | - | - |",
        "| RKLD | paper | 24.77 (0.37) | 12.02 (0.48) | 15.06 (0.28) | 23.27 (0.29) | 26.01 (0.11) | - | - |",
        "| WSD | paper | 23.33 (0.52) | 10.52 (0.47) | 14.83 (0.61) | 19.67 (0.13) | 21.21 (0.21) | - | - |",
        "| BDKD | paper | 23.94 (0.24) | 11.83 (0.39) | 15.21 (0.23) | 19.56 (0.23) | 21.66 (0.23) | - | - |",
        "| Jensen's KL | paper | 23.79 (0.24) | 11.52 (0.18) | 15.35 (0.80) | 21.36 (0.17) | 21.97 (0.10) | - | - |",
    ]
    assert lines[7:9] == [
        "|  | ours: JSD | - | - | 15.50 | - | - | - | - |",
        "|  | ours - paper |  |  | +0.15 |  |  |  |  |",
    ]
    assert lines[11:15] == [
        "| ABKD | paper | 25.65 (0.24) | 13.47 (0.42) | 16.06 (0.25) | 26.47 (0.31) | 29.32 (0.08) | - | - |",
        "|  | ours | **25.12 (0.25)** | - | **16.00 (0.10)** | - | - | - | - |",
        "|  | ours - paper | -0.52* |  | -0.06 |  |  |  |  |",
        "| Teacher | ours | 30.00 (0.00) | - | - | - | - | 50.00 (1.00) | - |",
    ]
    notes = (folder / "scores.md").read_text()
    assert "paper: Table 2 of the ABKD paper; its models and data may be others. A difference with * is beyond" in notes
    assert "Self-Instruct, Super-Natural, Unnatural: none of these runs answered them." in notes
    assert "FKLD, RKLD, WSD, BDKD, AKL, AlphaNet: none of these runs is one." in notes
    with (folder / "scores.csv").open(newline="") as file:
        rows = {row["row"]: row for row in csv.DictReader(file)}
    assert [*rows] == ["FKLD", "RKLD", "WSD", "BDKD", "JSD", "AKL", "AlphaNet", "ABKD", "Teacher"]
    ours = {key.removeprefix("Dolly "): value for key, value in rows["ABKD"].items() if key.startswith("Dolly ")}
    numbers = {"mean": "25.125", "std": "0.25", "paper": "25.65", "paper std": "0.24", "beyond": "True"}
    assert ours == {**numbers, "difference": str(25.125 - 25.65)}
    assert (rows["JSD"]["paper"], rows["JSD"]["Vicuna beyond"], rows["JSD"]["Dolly paper"]) == (
        "Jensen's KL",
        "",
        "23.79",
    )
    assert (rows["AKL"]["run"], rows["AKL"]["Dolly mean"], rows["Teacher"]["paper"]) == ("", "", "")


def test_several_of_ours_are_all_beside_their_row(make_run):
    for name, loss, mean in (("a", "ab:0.2,0.7", 25.0), ("b", "ab:0.5,0.5", 26.0)):
        folder = make_run(name, "ab", loss, teacher="x", sets=of_mean(mean)).parent
    lines = [line.split(" | ")[:3] for line in beside(folder, "table2").markdown().splitlines()]
    place = lines.index(["| ABKD", "paper", "25.65 (0.24)"])
    assert lines[place + 1 : place + 5] == [
        ["| ", "ours: ABKD (0.2,0.7)", "25.00 (0.50)"],
        ["| ", "ours - paper", "-0.65"],
        ["| ", "ours: ABKD (0.5,0.5)", "**26.00 (0.50)**"],
        ["| ", "ours - paper", "+0.35"],
    ]


def test_files_of_users_are_read(make_run, tmp_path):
    folder = make_run("ab", "ab", teacher="x", sets=DOLLY | {"Vicuna": DOLLY["Dolly"]}).parent
    file = tmp_path / "table2"  # a path, though the paper's table has this name
    file.write_text("row,Vicuna mean,Vicuna std,Unnatural mean\nabkd,17.5,0.25,30\nFKLD,16.25,,29\n")
    assert beside(folder, file).markdown().splitlines()[:7] == [
        "|  |  | Vicuna | Unnatural | Dolly | Average |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        "| abkd | paper | 17.50 (0.25) | 30.00 | - | - |",
        "|  | ours: ABKD | **20.00 (0.50)** | - | **20.00 (0.50)** | **20.00 (0.71)** |",
        "|  | ours - paper | +2.50* |  |  |  |",
        "| FKLD | paper | 16.25 | 29.00 | - | - |",
        "",
    ]


def test_a_table_of_another_report_is_read_back(make_run, without_figures):
    sets = DOLLY | {"Vicuna": DOLLY["Dolly"]}
    folder = make_run("ab", "ab", teacher="x", sets=sets).parent
    for arguments in ([], ["--paper", "table3"]):
        assert main([str(folder), "--out", str(folder), *arguments]) == 0
        again = beside(folder, folder / "scores.csv")
        ours = next(row for row in again.rows if row.paper == "ABKD")
        assert [cell and cell["change"] for cell in ours.differences if cell] == [0.0, 0.0, 0.0]
    assert [row.label for row in again.rows] == ["ABKD"], "rows that were published only have no score of ours"
    file = folder / "other.csv"
    file.write_text("row,Dolly mean,Average mean\nABKD,1,2\n")
    table = beside(folder, file)
    assert table.rows[0].published[table.columns.index("Average")] is None
    assert table.notes[-1] == "The average of other.csv is over other sets, and is left out."


@pytest.mark.parametrize(
    ("paper", "words"),
    [
        ("table1", "table1 has seconds a sample, not ROUGE-L: benchmarks/timing.py sets it beside ours"),
        ("table4", "table4: no such file, and no table of the paper; did you mean table"),
        ("nowhere.csv", "no such file, and no table of the paper; valid are table2, table3"),
    ],
)
def test_other_names_are_refused(make_run, capsys, paper, words):
    assert main([str(make_run("ab", sets=DOLLY)), "--paper", paper]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("row,Dolly mean\nABKD,12%\n", 'line 2: Dolly mean is "12%", expected a number'),
        ("row,Dolly mean\nABKD,nan\n", 'Dolly mean is "nan"'),
        ("row,Dolly mean,Dolly std\nABKD,1,-3\n", "Dolly std is -3, expected 0 or more"),
        ("row,Dolly mean\nABKD,1\nabkd,2\n", "line 3: a second abkd"),
        ("row,Dolly mean\nJSD,1\nJensen\u2019s KL,2\n", "line 3: a second Jensen"),
        ("row,Dolly mean\n,1\n", "line 2: has no name"),
        ("row,Dolly mean,Dolly mean\nABKD,1,2\n", "names a column twice"),
        ("row;Dolly mean\nABKD;1\n", "separated by commas; got row;Dolly mean"),
    ],
)
def test_published_files_that_make_no_sense_are_refused(make_run, tmp_path, content, words):
    folder = make_run("ab", "ab", teacher="x", sets=DOLLY).parent
    (tmp_path / "file.csv").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(words)):
        beside(folder, tmp_path / "file.csv")


def test_spaces_and_dashes_of_published_files_mean_nothing(make_run, tmp_path):
    folder = make_run("jsd", "ab", "jsd:0.1", teacher="x", sets=DOLLY).parent
    (tmp_path / "file.csv").write_text("row, Dolly mean, Dolly std\nJensen\u2019s KL , 19.5,-\n", encoding="utf-8")
    (row,) = beside(folder, tmp_path / "file.csv").rows
    assert (row.label, row.published) == ("JSD", [{"mean": 19.5, "std": None}])


def test_nothing_in_common_is_refused(make_run, capsys):
    folder = make_run("ab", sets={"mine": score(1.0, None, seed1=1)})
    assert main([str(folder), "--paper", "table2"]) == 2
    assert "no set is in both: Table 2 of the ABKD paper has Dolly" in capsys.readouterr().err


def test_seeds_are_one_row_with_the_spread_over_them(make_run):
    values = {1: 19.0, 2: 20.0, 3: 24.0}
    for number, mean in values.items():
        make_run(f"ab-seed{number}", "ab", teacher="x", sets=of_mean(mean), run=seed(number, name=f"seed{number}"))
    folder = make_run("sft", sets=of_mean(18.0), run=seed(1)).parent
    runs = read_runs([folder])
    assert [run.label for run in runs] == ["ABKD", "ABKD", "ABKD", "SFT"]
    table = score_table(runs)
    assert table.rows[0].cells[0] == {
        "mean": 21.0,
        "std": pytest.approx(7**0.5),
        "seeds": {"1": 19.0, "2": 20.0, "3": 24.0},
    }
    assert table.markdown().splitlines()[2:4] == ["| ABKD | **21.0 (2.6)** |", "| SFT | 18.0 (0.5) |"]
    assert table.notes[-2:] == [
        "ABKD: 3 training seeds; the spread is over them.",
        "Every other row of ours: one training seed; the spread is over the seeds of the answers.",
    ]
    first, _ = csv.DictReader(table.csv().splitlines())
    assert first["run"].split("; ") == [str(folder / f"ab-seed{number}") for number in values]


@pytest.mark.parametrize(
    ("change", "labels"),
    [
        ({}, ["ABKD", "ABKD"]),
        ({"run": seed(2, name="other", dir="elsewhere", stage="again")}, ["ABKD", "ABKD"]),
        ({"run": seed(1, name="other")}, ["ABKD (a)", "ABKD (b)"]),  # one seed twice
        ({"run": None}, ["ABKD (a)", "ABKD (b)"]),
        ({"optim": {"lr": 2e-3}}, ["ABKD (a)", "ABKD (b)"]),
        ({"loss": "ab:0.5,0.5"}, ["ABKD (0.2,0.7)", "ABKD (0.5,0.5)"]),
        ({"student": "another"}, ["ABKD (a)", "ABKD (b)"]),
    ],
)
def test_only_the_seed_may_differ(make_run, change, labels):
    make_run("a", "ab", teacher="x", sets=DOLLY, run=seed(1), optim={"lr": 1e-3})
    values = {"teacher": "x", "sets": DOLLY, "run": seed(2), "optim": {"lr": 1e-3}, **change}
    if values["run"] is None:
        del values["run"]
    runs = read_runs([make_run("b", "ab", **values).parent])
    assert [run.label for run in runs] == labels
    assert len(replicates(runs)) == len(score_table(runs).rows) == len(set(labels))


def test_groups_of_one_name_are_told_apart(make_run):
    for rate, number in ((1e-3, 1), (1e-3, 2), (2e-3, 1), (2e-3, 2)):
        name = f"rate{rate:g}-seed{number}"
        folder = make_run(name, "ab", teacher="x", sets=DOLLY, run=seed(number), optim={"lr": rate}).parent
    labels = ["ABKD (rate0.001-seed1 and 1 more)", "ABKD (rate0.002-seed1 and 1 more)"]
    assert [row.label for row in score_table(read_runs([folder])).rows] == labels


def test_recipes_of_several_seeds_gain_over_their_means(tmp_path):
    """Each recipe has its own teacher, from the students' start. No other teacher is taken for the SFT run."""
    for number in (1, 2):
        root = tmp_path / "runs" / f"seed{number}"
        make = functools.partial(write_run, root)
        place = {"name": f"seed{number}", "dir": "runs"}
        make("teacher", student="base", sets=of_mean(24.0), run=seed(number, **place, stage="teacher"))
        teacher = f"runs/seed{number}/teacher/final"
        sets = of_mean(20.0 + number)
        make("ab", "ab", student="base", teacher=teacher, sets=sets, run=seed(number, **place, stage="ab"))
    folders = [tmp_path / "runs" / "seed1", tmp_path / "runs" / "seed2"]
    runs = read_runs(folders)
    assert [row.label for row in score_table(runs).rows] == ["Teacher", "ABKD"]
    assert gain(runs) is None
    for number, folder in enumerate(folders, 1):
        place = {"name": folder.name, "stage": "sft"}
        write_run(folder, "sft", student="base", sets=of_mean(17.0 + number), run=seed(number, **place), optim={})
    sentence = gain(read_runs(folders))
    assert sentence.startswith("Dolly: ABKD 21.5 (0.7) ROUGE-L, SFT from the same start 18.5 (0.7), teacher 24.0 (0.0)")
    assert "distillation gains +3.0" in sentence


@pytest.mark.parametrize("change", [{"settings": {"temperature": 0.0}}, {"content": "other"}])
def test_seeds_that_were_answered_in_different_ways_have_no_mean(make_run, change):
    for number in (1, 2):
        folder = make_run(f"ab{number}", "ab", teacher="x", sets=DOLLY, run=seed(number))
    path = folder / "eval" / "scores.json"
    scores = json.loads(path.read_text()) | {key: value for key, value in change.items() if key == "settings"}
    scores["sets"]["Dolly"] |= {key: value for key, value in change.items() if key == "content"}
    path.write_text(json.dumps(scores))
    table = score_table(read_runs([folder.parent]))
    assert [len(row.runs) for row in table.rows] == [1, 1]
    assert any("Not comparable" in note for note in table.notes)


def test_sets_that_some_seeds_lack_are_named(make_run):
    make_run("a", "ab", teacher="x", sets=DOLLY | {"Vicuna": DOLLY["Dolly"]}, run=seed(1))
    folder = make_run("b", "ab", teacher="x", sets=of_mean(22.0), run=seed(2)).parent
    table = score_table(read_runs([folder]))
    assert table.markdown().splitlines()[2] == "| ABKD | **21.0 (1.4)** | **20.0** | **20.0** |"
    assert table.notes[-1] == "ABKD: 2 training seeds (1 on Vicuna, 1 on Average); the spread is over them."


def test_a_score_that_is_no_number_is_one_line(make_run):
    folder = make_run("ab", "ab", teacher="x", sets={"Dolly": score(1.0, None, seed1=float("nan"))})
    with pytest.raises(ConfigError, match="a score is not finite"):
        read_runs([folder])


@pytest.mark.parametrize("run", [{"seed": "x"}, {"dir": 1}, {"name": None}, []])
def test_a_damaged_place_is_one_line(make_run, run):
    folder = make_run("a")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "run": run}))
    with pytest.raises(ConfigError, match=r"config.json can't be read \(run"):
        read_runs([folder])


def test_figure_has_a_line_a_loss_and_a_band_over_seeds(make_run, monkeypatch):
    axes, drawn = pytest.importorskip("matplotlib.axes").Axes, {}

    def note(kind):
        original = getattr(axes, kind)
        drawn[kind] = []

        def draw(self, *values, **style):
            drawn[kind].append((values, style))
            return original(self, *values, **style)

        monkeypatch.setattr(axes, kind, draw)

    for kind in ("plot", "fill_between", "axhline", "legend"):
        note(kind)
    teacher = "runs/teacher/final"
    make_run("teacher", rouge=(4.0, 9.0))
    make_run("ab1", "ab", teacher=teacher, rouge=(1.0, 3.0), run=seed(1))
    make_run("ab2", "ab", teacher=teacher, rouge=(2.0, 5.0), run=seed(2))
    folder = make_run("fkl", "ab", "fkl", teacher=teacher, rouge=(0.0, 1.0), run=seed(1)).parent
    figures.rouge_curves(read_runs([folder]), folder / "figure")
    (ab, fkl), (band,), (line,), (legend,) = (drawn[kind] for kind in drawn)
    assert (ab[0], ab[1]["label"]) == (([10, 20], [1.5, 4.0]), "ABKD")
    assert (fkl[0], fkl[1]["label"]) == (([10, 20], [0.0, 1.0]), "FKLD")
    steps, low, high = band[0]
    assert steps == [10, 20]
    assert [*low, *high] == pytest.approx([1.0, 3.0, 2.0, 5.0])  # of two values the error is half their distance
    assert band[1]["color"] == ab[1]["color"]
    assert (line[0], line[1]["label"]) == ((9.0,), "Teacher")
    assert legend[1]["title"] == "band: ± standard error\nover 2 training seeds"
