"""Files of a run that anybody has changed: one line, or a report, and never a traceback."""

import contextlib
import copy
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from abkd_fast.config.recipe import load
from abkd_fast.errors import ConfigError
from abkd_fast.evaluation import tables
from abkd_fast.evaluation.runs import read_runs
from abkd_fast.finished import is_finished, read_summary
from abkd_fast.hub import find_run
from abkd_fast.pipeline import _table
from abkd_fast.report import main
from abkd_fast.training.save_dtype import _first_base
from abkd_fast.training.trackers import FILE, _known
from finished_runs import score, write_run
from runs import RECIPE

ODD = [None, [], {}, [[1]], {"a": {}}, "x", True, -1, 0.5, 2**64, 10**400, float("nan"), ["x"], {"path": 1}]
TEXTS = [b"", b"{", b"[]", b"1", b"null", b'"x"', b"\xff\xfe", b"[" * 99999, b'{"a":' * 99999, b"1" * 5000]
FILES = ("config.json", "summary.json", "eval/scores.json", "metrics.jsonl")


@pytest.fixture
def run(tmp_path):
    """A run as training leaves it, with the scores of a test set."""
    (config,) = load({**RECIPE, "run": {"name": "test", "dir": str(tmp_path)}})
    write_run(tmp_path, "test", sets={"Dolly": score(20.0, 0.1, seed1=20.1, seed2=19.9)})
    (tmp_path / "test" / "config.json").write_text(json.dumps(config.to_dict()))
    (tmp_path / "test" / "final").mkdir()
    return config


def places(value, place=()):
    """The places of all values within JSON values."""
    yield place
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from places(part, (*place, key))


def use(config):
    """What commands do with the files. Raises ConfigError alone."""
    folder = config.run.folder
    for question in (
        lambda: is_finished(config, resume=True),
        lambda: _table([config], [read_summary(folder)]),
        lambda: _first_base(str(folder / "final")),
        lambda: _known(config),
        lambda: find_run(folder),
        lambda: report(folder),
    ):
        with contextlib.suppress(ConfigError):
            question()


def report(folder):
    runs = read_runs([folder])
    tables.score_table(runs)
    tables.gain(runs)
    tables._report(runs[0])
    for kind, key in (("train", "loss"), ("dev", "rouge_l")):
        runs[0].curve(kind, key)
    assert runs[0].besides_seed


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(data=st.data())
def test_one_changed_value(run, data):
    path = run.run.folder / data.draw(st.sampled_from(FILES))
    before = path.read_bytes()
    lines = [json.loads(line) for line in before.splitlines()] if path.suffix == ".jsonl" else [json.loads(before)]
    place = data.draw(st.sampled_from([*places(lines)][1:]))
    holder = lines
    for key in place[:-1]:
        holder = holder[key]
    if data.draw(st.booleans()) or not isinstance(holder, dict):
        holder[place[-1]] = copy.deepcopy(data.draw(st.sampled_from(ODD)))
    else:
        del holder[place[-1]]
    path.write_text("\n".join(map(json.dumps, lines)))
    try:
        use(run)
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("name", [*FILES, FILE])
@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:8]))
def test_odd_files(run, capsys, name, text):
    (run.run.folder / name).write_bytes(text)
    use(run)
    if name in FILES[:3]:
        assert main([str(run.run.folder)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{run.run.folder / name} can't be read (" in line
        assert line.endswith(": move it aside")


def test_damaged_points_are_left_out_and_said(run, capsys):
    path = run.run.folder / "metrics.jsonl"
    (before,) = read_runs([run.run.folder])
    path.write_bytes(b'{"kind": "train", "step": "1"}\n\xff\n' + path.read_bytes() + b'{"kind": "tr')
    (after,) = read_runs([run.run.folder])
    assert after.points == before.points
    assert capsys.readouterr().out == f"{path}: 3 damaged lines are left out\n"
