"""Which caches there are, and their removal."""

import os

import pytest
from test_cache import recipe as recipe  # a fixture
from test_states_folder import build
from test_states_folder import small as small  # a fixture

from abkd_fast import cache
from abkd_fast.teacher import housekeeping
from abkd_fast.teacher.store import HiddenStateStore


def printed(capsys, *arguments):
    assert cache.main([*arguments]) == 0
    return capsys.readouterr().out.splitlines()


def test_list_and_clear(small, cache_folder, capsys, monkeypatch, tmp_path):
    assert cache.main(["--list"]) == 2
    assert f"list: {cache_folder} is no folder" in capsys.readouterr().err
    cache_folder.mkdir()
    assert printed(capsys, "--list")[-1].endswith(f"0 in {cache_folder}")
    build(small)
    build(small, "cache.dtype=float8")
    names = [folder.name for folder in housekeeping.folders(cache_folder)]
    capsys.readouterr()
    lines = printed(capsys, "--list")
    assert len(names) == 2
    assert all(name in line and "12 samples of " in line for name, line in zip(names, lines, strict=False))
    files = [os.lstat(path) for name in names for path in (cache_folder / name).rglob("*")]
    taken = sum({file.st_ino: file.st_blocks * 512 for file in files}.values())  # both have one output projection
    assert lines[-1].split() == [f"{taken / 1e6:.1f}", "MB", "2", "in", str(cache_folder)]

    (cache_folder / "mine").mkdir()
    (cache_folder / "mine" / "notes.txt").write_text("mine")
    (cache_folder / ("0" * 32)).mkdir()
    for name in ("index.json", "thesis.txt"):
        (cache_folder / ("0" * 32) / name).write_text("{}")
    assert cache.main(["--clear", "mine"]) == 2
    assert "has no states mine" in capsys.readouterr().err
    assert printed(capsys, "--clear", names[0])[0].endswith(f"{names[0]} is removed")
    assert [folder.name for folder in housekeeping.folders(cache_folder)] == names[1:]
    assert printed(capsys, "--clear", "--dir", str(tmp_path / "other"))[-1].endswith("are free again")
    assert (cache_folder / names[1]).exists()
    printed(capsys, "--clear")
    assert housekeeping.folders(cache_folder) == []
    assert (cache_folder / "mine" / "notes.txt").exists(), "nothing else is touched"
    assert (cache_folder / ("0" * 32) / "thesis.txt").exists()


def test_tokenizers_of_python_programs(cache_folder, capsys):
    """They are listed and removed with all, or by their name; nothing else in their folder is."""
    for name in ("a" * 32, "b" * 32, "mine"):
        (cache_folder / "tokenizers" / name).mkdir(parents=True)
        (cache_folder / "tokenizers" / name / "tokenizer_config.json").write_text("{}")
    (cache_folder / "tokenizers" / ("c" * 32)).symlink_to(cache_folder / "tokenizers" / "mine")
    line, total = printed(capsys, "--list")
    assert line.endswith("tokenizers  2 that Python programs had in memory")
    assert total.split()[:2] == line.split()[:2]
    assert total.endswith(f"1 in {cache_folder}")
    for names in (["tokenizers"], []):
        (cache_folder / "tokenizers" / ("a" * 32)).mkdir(exist_ok=True)
        (cache_folder / "tokenizers" / ("a" * 32) / "tokenizer_config.json").write_text("{}")
        assert printed(capsys, "--clear", *names)[0].endswith("tokenizers is removed")
        left = {path.name for path in (cache_folder / "tokenizers").iterdir()}
        assert left == {"mine", "c" * 32}
    assert housekeeping.tokenizers(cache_folder) == []


def test_states_that_are_being_built_stay(small, cache_folder, capsys, monkeypatch):
    def write(store, number, rows, original=HiddenStateStore.write):
        if number == 1:
            capsys.readouterr()
            (name,) = [folder.name for folder in housekeeping.folders(cache_folder)]
            assert printed(capsys, "--clear")[0] == f"{name} stays: a process is at work on it"
            assert any("blocks are missing" in line for line in printed(capsys, "--list"))
        return original(store, number, rows)

    monkeypatch.setattr(HiddenStateStore, "write", write)
    build(small)
    assert len(housekeeping.folders(cache_folder)) == 1


def test_damaged_folders_are_listed_and_removed(small, cache_folder, capsys):
    build(small)
    (folder,) = housekeeping.folders(cache_folder)
    (folder / "index.json").write_text("{")
    capsys.readouterr()
    assert "damaged, or of another version" in printed(capsys, "--list")[0]
    printed(capsys, "--clear", folder.name)
    assert not folder.exists()


@pytest.mark.parametrize(
    "arguments", [["--list", "--set", "a=1"], ["--info", "x", "--dir", "y"], ["--list", "--clear"]]
)
def test_options_that_do_not_belong_together(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cache.main(arguments)
    assert ended.value.code == 2
