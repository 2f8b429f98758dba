import csv
import functools
import importlib.util
import json
import pathlib
import xml.etree.ElementTree as ElementTree

import pytest

from abkd_fast.evaluation import figures
from abkd_fast.evaluation.runs import read_runs
from abkd_fast.evaluation.tables import gain, score_table
from abkd_fast.report import main
from finished_runs import score, write_run

matplotlib = pytest.importorskip("matplotlib")


@pytest.fixture
def make_run(tmp_path):
    return functools.partial(write_run, tmp_path / "runs")


@pytest.fixture
def four_runs(make_run):
    """A teacher, an initial student, ABKD and SFT; the alphabet would put the teacher last."""
    start, teacher = "old/place/runs/init/final", "old/place/runs/teacher/final"
    spread = {"Vicuna": score(12.0, 1.0, seed1=11, seed2=13), "Dolly": score(20.0, 0.5, seed1=19.5, seed2=20.5)}
    make_run("ab", "ab", student=start, teacher=teacher, sets=spread)
    make_run("init")
    lower = {"Dolly": score(18.04, 0.25, seed1=18, seed2=18.08), "Vicuna": score(13.0, None, seed1=13)}
    make_run("sft", student=start, sets=lower)
    upper = {"Dolly": score(24.0, 2.0, seed1=22, seed2=26), "Vicuna": score(20.0, 0.0, seed1=20, seed2=20)}
    return make_run("teacher", sets=upper).parent


def test_table_has_the_papers_layout(four_runs):
    table = score_table(read_runs([four_runs]))
    assert table.markdown().splitlines() == [
        "|  | Dolly | Vicuna | Average |",
        "| --- | ---: | ---: | ---: |",
        "| Teacher | 24.0 (2.0) | 20.0 (0.0) | 22.0 (1.4) |",
        "| ABKD | **20.0 (0.5)** | 12.0 (1.0) | **16.0 (1.1)** |",
        "| SFT | 18.0 (0.2) | **13.0** | - |",
        "",
        "Answers: temperature 1.0; 2 rows of Dolly with seeds 1, 2; 2 rows of Vicuna with seeds 1, 2.",
        "",
        "Not comparable: the runs differ in seeds of Vicuna.",
    ]
    header, *rows = csv.reader(table.csv().splitlines())
    assert header == ["row", "run", *(f"{s} {w}" for s in ("Dolly", "Vicuna", "Average") for w in ("mean", "std"))]
    assert rows[1][:1] + rows[1][2:6] == ["ABKD", "20.0", "0.5", "12.0", "1.0"]
    assert rows[2][4:] == ["13.0", "", "", ""]


def test_rows_of_one_name_are_told_apart(make_run):
    sets = {"mine": score(1.0, None, seed1=1)}
    for name, method, loss in (
        ("a", "ab", "ab:0.2,0.7"),
        ("b", "ab", "ab:0.5,0.5"),
        ("c", "kd", "jsd"),
        ("d", "kd", "jsd"),
        ("e", "gkd", "jsd"),
        ("f", "newest", "jsd"),
    ):
        folder = make_run(name, method, loss, teacher="x", sets=sets)
    labels = [run.label for run in read_runs([folder.parent])]
    assert labels == ["ABKD (0.2,0.7)", "ABKD (0.5,0.5)", "JSD (c)", "JSD (d)", "GKD", "newest"]


@pytest.mark.parametrize(
    ("ours", "words"),
    [
        (score(21.0, 0.5), "distillation gains +3.0, 50% of the way to the teacher, more than the spread over seeds"),
        (score(18.3, 0.5), "distillation gains +0.3, 5% of the way to the teacher, no more than the spread over seeds"),
        (score(16.0, 0.5), "distillation loses 2.0, more than the spread over seeds"),
    ],
)
def test_gain_says_what_the_numbers_say(make_run, ours, words):
    make_run("teacher", sets={"test": score(24.0, 0.1)})
    make_run("plain", student="start", sets={"test": score(18.0, 0.25)})
    folder = make_run("ab", "ab", student="start", teacher="runs/teacher/final", sets={"test": ours})
    sentence = gain(read_runs([folder.parent]))
    assert sentence.startswith(
        f"test: ABKD {ours['mean']:.1f} (0.5) ROUGE-L, SFT from the same start 18.0 (0.2), teacher"
    )
    assert words in sentence


def test_no_gain_without_the_same_start(make_run):
    make_run("teacher", sets={"test": score(24.0, 0.1)})
    make_run("plain", student="another", sets={"test": score(18.0, 0.25)})
    sets = {"test": score(20.0, 0.1)}
    folder = make_run("ab", "ab", student="start", teacher="runs/teacher/final", sets=sets)
    assert gain(read_runs([folder.parent])) is None


def test_adapters_are_results_and_starts(make_run):
    """As in llama.json: every path is a base model, and results are adapters."""
    test = {"test": score(20.0, 0.1)}
    make_run("teacher", student={"path": "7b", "lora": {"rank": 16}}, sets=test)
    make_run("init", student={"path": "3b", "lora": {"rank": 16}}, sets=test)
    start, teacher = ({"path": p, "adapter": f"runs/{n}/final"} for p, n in (("3b", "init"), ("7b", "teacher")))
    folder = make_run("abkd", "ab", student=start, teacher=teacher, sets=test)
    labels = {run.folder.name: run.label for run in read_runs([folder.parent])}
    assert labels == {"teacher": "Teacher", "init": "Initial student", "abkd": "ABKD"}
    assert gain(read_runs([folder.parent])) is None
    make_run("sft", student=start, sets={"test": score(18.0, 0.1)})
    assert "SFT from the same start 18.0" in gain(read_runs([folder.parent]))


def test_gain_is_of_a_run_that_learnt_from_the_teacher(make_run):
    """Fine-tuning that has a teacher only in its recipe is none, and the teacher may have the same start."""
    test = {"test": score(20.0, 0.1)}
    make_run("teacher", student="start", sets=test)
    folder = make_run("a-sft", student="start", teacher="runs/teacher/final", sets=test)
    assert gain(read_runs([folder.parent])) is None
    make_run("ab", "ab", student="start", teacher="runs/teacher/final", sets=test)
    (folder / "summary.json").rename(folder / "unfinished.json")
    assert gain(read_runs([folder.parent])) is None
    (folder / "unfinished.json").rename(folder / "summary.json")
    assert gain(read_runs([folder.parent])).startswith("test: ABKD 20.0 (0.1) ROUGE-L, SFT from the same start 20.0")


def test_command_writes_tables_figures_and_reports(four_runs, capsys):
    assert main([str(four_runs)]) == 0
    output = capsys.readouterr().out
    assert "20.0 (0.5)" in output
    assert (four_runs / "scores.md").read_text().startswith("|  | Dolly")
    assert (four_runs / "scores.csv").read_text().startswith("row,run,Dolly mean")
    for stem in (four_runs / "rouge_l", four_runs / "ab" / "curves", four_runs / "teacher" / "curves"):
        assert stem.with_suffix(".png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        ElementTree.parse(stem.with_suffix(".svg"))
    texts = [element.text for element in ElementTree.parse(four_runs / "rouge_l.svg").iter() if element.text]
    assert {"ABKD", "SFT", "Teacher", "Training step", "ROUGE-L on development rows"} <= set(map(str.strip, texts))
    assert "Initial student" not in texts
    report = (four_runs / "ab" / "report.md").read_text()
    assert "method: ab, loss ab:0.2,0.7" in report
    assert "dev loss: 3.5000 before, 2.2500 in the end" in report
    assert "peak memory: 2.5 GB" in report
    assert "![loss, speed and memory](curves.png)" in report
    assert "dev ROUGE-L" not in report


def test_runs_one_by_one_are_together_in_their_common_folder(four_runs, make_run):
    make_run("quiet", rouge=(None, None))
    assert main([str(four_runs / "ab"), str(four_runs / "quiet")]) == 0
    assert (four_runs / "scores.csv").exists()
    assert main([str(four_runs / "quiet")]) == 0
    assert {path.name for path in (four_runs / "quiet").iterdir()} > {"report.md", "curves.png"}
    assert not (four_runs / "quiet" / "scores.md").exists()
    assert not (four_runs / "quiet" / "rouge_l.png").exists()


def test_more_runs_than_colours_stay_apart(make_run, monkeypatch):
    styles = []
    plot = matplotlib.axes.Axes.plot

    def note(axes, *values, **style):
        styles.append(tuple(style[key] for key in ("color", "marker", "linestyle")))
        return plot(axes, *values, **style)

    monkeypatch.setattr(matplotlib.axes.Axes, "plot", note)
    for index in range(2 * len(figures.COLORS) + 1):
        folder = make_run(f"run{index} <&>", rouge=(index, index + 1))
    figures.rouge_curves(read_runs([folder.parent]), folder.parent / "many")
    assert len(set(styles)) == 2 * len(figures.COLORS) + 1
    assert all(first[1:] != second[1:] for first, second in zip(styles, styles[len(figures.COLORS) :], strict=False))
    texts = [element.text for element in ElementTree.parse(folder.parent / "many.svg").iter()]
    assert f"SFT (run{len(figures.COLORS)} <&>)" in texts


def test_bad_input_is_one_line_and_status_2(four_runs, tmp_path, capsys, monkeypatch):
    def error(*arguments):
        assert main(list(map(str, arguments))) == 2
        output = capsys.readouterr().err
        assert output.count("\n") == 1
        return output

    assert "nowhere: no finished run there" in error(tmp_path / "nowhere")
    assert "no finished run there" in error(four_runs / "ab" / "eval")
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert "the report can't be written" in error(four_runs, "--out", blocked / "x")
    assert '"row" and some of "Dolly mean"' in error(four_runs, "--paper", blocked)
    blocked.write_text("row,Dolly mean\nABKD,many\n")
    assert 'line 2: Dolly mean is "many", expected a number' in error(four_runs, "--paper", blocked)
    blocked.write_text("row,Dolly mean\nABKD,1\nABKD,2\n")
    assert "line 3: a second ABKD" in error(four_runs, "--paper", blocked)
    assert "paper: none of these runs has scores" in error(four_runs / "init", "--paper", blocked)
    (four_runs / "ab" / "eval" / "scores.json").write_text("[")
    assert "scores.json can't be read" in error(four_runs)
    (four_runs / "ab" / "eval" / "scores.json").unlink()
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    assert error(four_runs) == "error: matplotlib is not installed: pip install matplotlib\n"
    assert (four_runs / "scores.md").read_text().startswith("|  | Dolly")
    assert (four_runs / "scores.csv").exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", {}),
        ("config.json", []),
        ("summary.json", {"steps": 1}),
        ("eval/scores.json", {"weights": {}, "settings": [], "sets": {}}),
        ("eval/scores.json", {"weights": {}, "settings": {}, "sets": {"Dolly": {"rouge_l": 1}}}),
    ],
)
def test_damaged_runs_are_one_line(four_runs, file, content, capsys):
    (four_runs / "ab" / file).write_text(json.dumps(content))
    assert main([str(four_runs)]) == 2
    output = capsys.readouterr().err
    assert "can't be read" in output
    assert output.count("\n") == 1


def test_half_an_evaluation_in_a_summary_is_one_line(four_runs, capsys):
    path = four_runs / "ab" / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dev_loss_before": None}))
    assert main([str(four_runs)]) == 2
    assert "can't be read (dev_loss without dev_loss_before" in capsys.readouterr().err


def test_scores_of_other_answers_are_not_compared_silently(make_run):
    sets = {"test": score(20.0, 0.1, seed1=20.1, seed2=19.9)}
    make_run("a", sets=sets)
    folder = make_run("b", sets=sets)
    path = folder / "eval" / "scores.json"
    scores = json.loads(path.read_text())
    assert score_table(read_runs([folder.parent])).notes == [
        "Answers: temperature 1.0; 2 rows of test with seeds 1, 2."
    ]
    scores["settings"]["temperature"] = 0.5
    scores["sets"]["test"]["content"] = "1f"
    path.write_text(json.dumps(scores))
    notes = score_table(read_runs([folder.parent])).notes
    assert notes[1:] == ["Not comparable: the runs differ in temperature, rows of test."]


def in_characters(folder):
    """Makes a run's scores those of characters."""
    path = folder / "eval" / "scores.json"
    scores = json.loads(path.read_text())
    scores["settings"]["rouge_tokens"] = "characters"
    path.write_text(json.dumps(scores))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eval": {"rouge_tokens": "characters"}}))


def test_scores_of_characters_are_named_and_in_columns_of_their_own(four_runs, tmp_path, monkeypatch):
    in_characters(four_runs / "ab")
    runs = read_runs([four_runs])
    table = score_table(runs)
    assert table.columns == ["Dolly", "Dolly (characters)", "Vicuna", "Vicuna (characters)", "Average"]
    lines = table.markdown().splitlines()
    assert lines[2:5] == [
        "| Teacher | 24.0 (2.0) | - | 20.0 (0.0) | - | - |",
        "| ABKD | - | **20.0 (0.5)** | - | **12.0 (1.0)** | - |",
        "| SFT | **18.0 (0.2)** | - | **13.0** | - | - |",
    ]
    assert "Not comparable: the runs differ in rouge_tokens, seeds of Vicuna." in lines
    assert gain(runs) is None
    labels = []
    monkeypatch.setattr(matplotlib.axes.Axes, "set", lambda self, **names: labels.append(names.get("ylabel")))
    figures.rouge_curves(runs, tmp_path / "figure")
    assert labels == ["ROUGE-L / ROUGE-L (characters) on development rows"]
    for name in ("sft", "teacher"):
        in_characters(four_runs / name)
    runs = read_runs([four_runs])
    table = score_table(runs)
    assert table.columns == ["Dolly (characters)", "Vicuna (characters)", "Average (characters)"]
    assert next(csv.reader(table.csv().splitlines()))[2] == "Dolly (characters) mean"
    summary = four_runs / "ab" / "summary.json"
    measured = {"dev_rouge_l_before": 1.0, "dev_rouge_l": 2.0}
    summary.write_text(json.dumps({**json.loads(summary.read_text()), **measured}))
    assert main([str(four_runs)]) == 0
    report = (four_runs / "ab" / "report.md").read_text()
    assert "dev ROUGE-L (characters): 1.00 before, 2.00 in the end" in report
    assert "| Dolly (characters) |" in report
    published = tmp_path / "paper.csv"
    published.write_text("row,Dolly mean,Dolly std\nABKD,21.0,0.2\n")  # of words
    assert main([str(four_runs), "--paper", str(published)]) == 2


def test_one_run_by_two_paths_is_one_row(four_runs, monkeypatch):
    monkeypatch.chdir(four_runs)
    assert len(read_runs([four_runs / "ab", pathlib.Path("ab")])) == 1


@pytest.mark.parametrize("losses", [(), (None, None), (-1.0, -3.0), (0.0, 0.0)])
def test_curves_of_any_losses(make_run, losses, recwarn, monkeypatch):
    folder = make_run("run")
    points = [{"kind": "train", "step": step, "loss": loss} for step, loss in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
    limits = []
    save = matplotlib.figure.Figure.savefig

    def note(figure, path, **options):
        limits.append(figure.axes[0].get_ylim())
        save(figure, path, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", note)
    assert main([str(folder)]) == 0
    low, high = limits[0]
    assert low <= min([loss for loss in losses if loss is not None], default=0) <= high
    assert not recwarn.list
