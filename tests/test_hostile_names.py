"""Names and paths of a user may hold anything: nothing in them is markup, a control character, or endless on screen."""

import shlex
import subprocess
from contextlib import nullcontext

import pytest
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from abkd_fast import __main__, cli, console
from abkd_fast.console import ProgressBar, shown, styled
from abkd_fast.data import quickstart
from abkd_fast.errors import LONGEST, ConfigError, printable
from abkd_fast.files import cache_folder, check_path_length
from abkd_fast.train import main
from runs import SMALL, Run

# What is printed, and how it is shown.
NAMES = {
    "[/x]": "[/x]",
    "[red]a[/red]": "[red]a[/red]",
    "[link=x]a": "[link=x]a",
    ":smile:": ":smile:",
    "{a}": "{a}",
    "\x1b[31mred": "\\x1b[31mred",
    "\x9b31mred": "\\x9b31mred",
    "a\rb\b\a": "a\\rb\\x08\\x07",
    "\u202egpj": "\\u202egpj",
    "\udc80": "\\udc80",
}


def in_table(text):
    table = Table(text, title=text, caption=text)
    table.add_row(text)
    return table


def with_bar(text):
    with ProgressBar(text) as bar:
        bar.add_task(text, total=1)


WAYS = {
    "print": lambda text: console.console.print(text),
    "styled": lambda text: console.console.print(styled(text, "bold", text)),
    "table": lambda text: console.console.print(in_table(text)),
    "bar": with_bar,
    "error": lambda text: cli._print(f"error: {ConfigError(text)}"),
    "end": lambda text: cli._print(text),
}


@pytest.mark.parametrize("is_terminal", [False, True])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", WAYS)
def test_a_name_is_shown_as_it_is(monkeypatch, capsys, way, name, is_terminal):
    monkeypatch.setattr(console.console, "_force_terminal", is_terminal)
    monkeypatch.setattr(console.console, "_color_system", None)
    monkeypatch.setattr(console.console, "_width", 100)
    WAYS[way](name)
    output = "".join(capsys.readouterr())
    if way != "bar" or is_terminal:
        assert NAMES[name] in output
    rest = output.replace("\x1b[1m", "").replace("\x1b[0m", "").replace("\x1b[3m", "")  # rich's own
    for own in ("\x1b[?25l", "\x1b[?25h", "\x1b[2K", "\x1b[1A", "\r"):  # and its bars'
        rest = rest.replace(own, "")
    assert printable(rest, "\n") == rest


@pytest.mark.parametrize("folder", ["a[/x]", "[red]", "{b}", "\x1b[31m"])
def test_a_run_in_a_folder_of_that_name(tmp_path, capsys, folder):
    run = Run(tmp_path, f"run.dir={tmp_path / folder}", "run.name=[red]", "train.steps=1", "data.dev=null")
    final = printable(str(tmp_path / folder / "[red]"))
    assert run() == 0
    assert f"saved {final}/final" in capsys.readouterr().out
    assert run() == 2
    assert f"error: {final} exists already" in capsys.readouterr().err


def test_what_is_long_keeps_its_beginning_and_its_end():
    for text in (str(ConfigError("a" * 10_000_000 + ": unknown")), shown("a" * 10_000_000 + ": unknown")):
        assert len(text) < LONGEST + 10
        assert text.startswith("aaa")
        assert text.endswith("aaa: unknown")
    assert shown("a\n" * 5000) == "a\n" * 5000, "lines are not joined"
    assert printable("a" * 10_000) == "a" * 10_000


@pytest.mark.parametrize("where", ["key", "value", "recipe", "row"])
def test_megabytes_of_a_user_are_not_echoed(tmp_path, monkeypatch, capsys, write_jsonl, where):
    monkeypatch.chdir(tmp_path)
    long = "é" * 1_000_000
    run = Run(tmp_path / "run")
    more = {
        "key": ["--set", f"{long}=1"],
        "value": ["--set", f"train.steps={long}"],
        "recipe": ["--config", long],
        "row": ["--set", f"data.train={write_jsonl([{long: long}])}"],
    }[where]
    assert run(*more) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert len(line) < 2 * LONGEST


@pytest.mark.parametrize("word", ["a b", "it's", "\x1b[31m", "a\nb'c\\d", "é"])
def test_the_command_that_continues_can_be_pasted(word):
    quoted = cli._quoted(word)
    assert quoted.isprintable()
    shell = subprocess.run(["bash", "-c", f"printf %s {quoted}"], capture_output=True, check=True)
    assert shell.stdout.decode() == word
    if word.isprintable():
        assert shlex.split(quoted) == [word]
    assert main(["--config", word]) == 2


LONG, DEEP = "a" * 256, "/".join(["a" * 200] * 21)
COMMANDS = {
    "model": ["generate", "--model", ..., "--data", "x.jsonl", "--out", "y.jsonl"],
    "out": ["generate", "--model", "model", "--data", "x.jsonl", "--out", ...],
    "tokenizer": ["generate", "--model", "model", "--data", "x.jsonl", "--out", "y.jsonl", "--tokenizer", ...],
    "set": ["evaluate", "--model", "model", "--data", ..., "--out", "y"],
    "scores": ["evaluate", "--model", "model", "--data", "x=x.jsonl", "--out", ...],
    "run": ["report", ...],
    "report": ["report", "x", "--out", ...],
    "pushed run": ["push", ..., "me/model"],
    "states": ["cache", "--list", "--dir", ...],
    "cleared states": ["cache", "--clear", "x", "--dir", ...],
    "info": ["cache", "--info", ...],
    "recipe": ["train", "--config", ...],
    "run's folder": ["train", "--config", "quickstart", "--dry-run", "--set", ...],
}
BEFORE = {"set": "x=", "run's folder": "run.dir="}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**SMALL)).save_pretrained(folder)
    quickstart.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("path", [LONG, f"./{LONG}", DEEP], ids=["long name", "long name here", "long path"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_name_that_no_file_system_takes_is_one_line(tmp_path, monkeypatch, capsys, model, command, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(model)
    words = [BEFORE.get(command, "") + path if word is ... else word for word in COMMANDS[command]]
    assert __main__.main(words) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert line.startswith("error: ")
    assert [*tmp_path.iterdir()] == [tmp_path / "model"]


@pytest.mark.parametrize("length", [215, 216])
def test_the_longest_name_of_a_result_leaves_room_for_its_temporary_files(tmp_path, length):
    name = "a" * length
    longest = tmp_path / f"{name}.settings.json.{2**22}.tmp"
    longest.touch()
    with pytest.raises(ConfigError, match=r"out: .*: has a name of 216 bytes") if length > 215 else nullcontext():
        check_path_length("out", tmp_path / name, is_written=True)


@pytest.mark.parametrize("variable", ["ABKD_CACHE", "XDG_CACHE_HOME", "HOME"])
def test_a_cache_folder_that_can_not_be(monkeypatch, variable):
    for name in ("ABKD_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    if variable == "HOME":  # of a user whom the system doesn't know
        monkeypatch.delenv("HOME")
        monkeypatch.setattr("pwd.getpwuid", lambda user: {}[user])
    else:
        monkeypatch.setenv(variable, f"/{LONG}")
    with pytest.raises(ConfigError, match="ABKD_CACHE"):
        cache_folder()


def test_a_home_that_is_a_file(tmp_path, monkeypatch, capsys):
    home = tmp_path / "home"
    home.touch()
    monkeypatch.delenv("ABKD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", home / "datasets")
    assert Run(tmp_path / "run", "train.steps=1")() == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {home}/datasets/abkd_fast/")
    assert error.endswith("can't be written (Not a directory): set HF_DATASETS_CACHE to another folder\n")
