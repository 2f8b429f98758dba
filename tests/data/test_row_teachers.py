"""Which of several teachers a row has."""

import json

import pytest

from abkd_fast.data.row_teachers import TeacherNames
from abkd_fast.data.rows import read_rows
from abkd_fast.errors import ConfigError

ROW = {"prompt": "a", "output": "b"}
BOTH = TeacherNames(("math", "code"))


@pytest.fixture
def nest(tmp_path):
    """A folder with files of one name in two folders."""
    for name in ("train-a", "train-b"):
        (tmp_path / "nest" / name).mkdir(parents=True)
        (tmp_path / "nest" / name / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    return tmp_path / "nest"


def test_a_rows_own_column_wins_over_its_file(tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    (folder / "train-math.jsonl").write_text(json.dumps(ROW) + "\n" + json.dumps(ROW | {"teacher": "code"}) + "\n")
    (folder / "train-code.jsonl").write_text(json.dumps(ROW | {"teacher": None}) + "\n")
    names = BOTH._replace(by_file=(("train-math.jsonl", "math"), (f"{folder}/train-code.jsonl", "code")))
    rows = read_rows(str(folder), teachers=names)
    assert [row.teacher for row in rows] == ["code", "math", "code"]
    assert not any("not read" in note for note in rows.notes)


@pytest.mark.parametrize(
    "entries",
    [
        {"train-a/rows.jsonl": "math", "train-b/rows.jsonl": "code"},
        {"NEST/train-a/rows.jsonl": "math", "NEST/train-b/../train-b/rows.jsonl": "code"},
        {"rows.jsonl": "math", "NEST/train-b/rows.jsonl": "code"},  # the more exact entry decides, wherever it stands
        {"train-b/rows.jsonl": "code", "rows.jsonl": "math"},
    ],
)
def test_an_entry_may_be_a_path_or_a_name(nest, entries):
    by_file = tuple((key.replace("NEST", str(nest)), name) for key, name in entries.items())
    assert [row.teacher for row in read_rows(str(nest), teachers=BOTH._replace(by_file=by_file))] == ["math", "code"]


def test_a_name_of_two_files_is_refused(nest):
    names = BOTH._replace(by_file=(("rows.jsonl", "math"),))
    with pytest.raises(ConfigError, match=r"is the name of .*train-a.* and of .*train-b.*: give their paths"):
        read_rows(str(nest), teachers=names)


@pytest.mark.parametrize("extra", ["missing.jsonl", "rows.jsonl"])
def test_an_entry_without_a_file_is_refused(nest, extra):
    """Also one whose files all have a more exact entry."""
    known = ("train-a/rows.jsonl", "math"), ("train-b/rows.jsonl", "code")
    names = BOTH._replace(by_file=(*known, (extra, "math")))
    with pytest.raises(ConfigError, match=f"data.teachers names {extra}, but no row is of that file; the files are "):
        read_rows(str(nest), teachers=names)
    assert len(read_rows(str(nest), 1, teachers=names)) == 1, "files beyond the limit are not known"


def test_a_file_whose_rows_are_all_left_out_is_known(nest):
    (nest / "train-a" / "rows.jsonl").write_text("{}\n")
    names = BOTH._replace(by_file=(("train-a/rows.jsonl", "math"), ("train-b/rows.jsonl", "code")))
    assert [row.teacher for row in read_rows(str(nest), on_bad_row="skip", teachers=names)] == ["code"]


NONE = 'has no teacher, expected one of math, code, by the column "teacher", or data.teachers: '


@pytest.mark.parametrize(
    ("teacher", "by_file", "problem"),
    [
        ("chess", (), '"teacher" is "chess", expected one of math, code'),
        (["math"], (), '"teacher" is ["math"], expected one of math, code'),
        (None, (), f"{NONE}it gives whole files one"),
        ("", (), f"{NONE}it gives whole files one"),
        (None, (("b.jsonl", "math"),), f"{NONE}it has b.jsonl"),
    ],
)
def test_rows_without_a_teacher_are_refused_or_said(write_jsonl, teacher, by_file, problem):
    path = write_jsonl([ROW | {"teacher": teacher}, ROW | {"teacher": "math"}])
    with pytest.raises(ConfigError) as refused:
        read_rows(path, teachers=BOTH._replace(by_file=by_file))
    assert str(refused.value) == f"{path} line 1: {problem}"
    rows = read_rows(path, teachers=BOTH, on_bad_row="skip")
    assert [row.teacher for row in rows] == ["math"]
    assert len(rows.notes) == 2, "the first line names it"


def test_the_column_may_have_another_name(write_jsonl):
    path = write_jsonl([{"q": "a", "a": "b", "field": "math"}])
    columns = {"prompt": "q", "output": "a", "teacher": "field"}
    (row,) = read_rows(path, columns=columns, teachers=BOTH)
    assert row.teacher == "math"
    del columns["teacher"]
    with pytest.raises(ConfigError, match=r'the column "teacher", which data\.columns must name, too'):
        read_rows(path, columns=columns, teachers=BOTH)


def test_rows_that_are_handed_on_keep_any_name(write_jsonl):
    path = write_jsonl([ROW | {"teacher": "any"}, ROW, ROW | {"teacher": 7}])
    assert [row.teacher for row in read_rows(path, teachers=TeacherNames())] == ["any", None, None]
