"""All commands under one name."""

import subprocess
import sys

import pytest

import abkd_fast
from abkd_fast.__main__ import COMMANDS, main


def test_version_and_help(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == abkd_fast.__version__
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "message"), [(["trian"], "no command trian; did you mean train?"), ([], "usage: abkd-fast COMMAND")]
)
def test_unknown_commands(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_explain_themselves(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert "usage:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("started", "typed"),
    [
        ("/usr/bin/abkd-fast", "abkd-fast "),
        ("abkd-fast.exe", "abkd-fast "),
        ("abkd_fast/__main__.py", "python -m abkd_fast "),
        ("abkd_fast/train.py", "python -m abkd_fast."),
    ],
)
@pytest.mark.parametrize("name", ["train", "info"])
def test_help_names_what_was_typed(name, started, typed, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [started])
    with pytest.raises(SystemExit):
        main([name, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: {typed}{name} ")


def test_the_module_runs():
    ran = subprocess.run([sys.executable, "-m", "abkd_fast", "train", "--config", "none.json"], capture_output=True)
    assert ran.returncode == 2
    assert b"none.json: no such file" in ran.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "--model", "x", "--data", "x", "--out", ""],
        ["evaluate", "--model", "x", "--data", "x=x", "--out", ""],
        ["report", ""],
        ["report", "x", "--out", ""],
        ["push", "", "me/x"],
        ["cache", "--list", "--dir", ""],
    ],
)
def test_an_empty_path_is_not_this_folder(arguments, tmp_path, monkeypatch, capsys):
    """It is what a shell makes of a variable that isn't set."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(": is empty, expected a path\n")
    assert not [*tmp_path.iterdir()]
