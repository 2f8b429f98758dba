"""What docs/security.md promises: nothing that is given is executed, and nothing is written where it wasn't meant."""

import ast
import bz2
import gzip
import json
import lzma
import os
import pathlib
import pickle
import shutil
import signal
import types

import datasets
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import torch

import abkd_fast
from abkd_fast import evaluate, generate, train
from abkd_fast.api import distill
from abkd_fast.cli import INTERRUPTED
from abkd_fast.data import quickstart, unpacking
from abkd_fast.errors import ConfigError
from abkd_fast.files import LOCK, why_untrusted
from chains import save_chain_model
from runs import RECIPE, Run, at_step, send

SHORT = ("train.steps=1", "data.dev=null", "log.every_steps=1", "data.max_length=128")
ROW = {"prompt": "Say hello. ", "output": "Hello."}


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A file that code of an attacker makes. Whoever asks for leave to run it gets it."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "it was executed"


@pytest.fixture(scope="module")
def good_model(tmp_path_factory):
    return save_chain_model(tmp_path_factory.mktemp("model") / "good", quickstart.tokenizer(), {})


@pytest.fixture
def model(good_model, tmp_path):
    """A model folder that a test may change."""
    return pathlib.Path(shutil.copytree(good_model, tmp_path / "model"))


def change(path, **values):
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **values}))


def refused(status, capsys, *words):
    assert status == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for word in words:
        assert word in error


def command_of(kind, model, tmp_path, write_jsonl):
    """A command that reads a model folder."""
    rows = write_jsonl([ROW] * 8)
    if kind == "train":
        run = Run(tmp_path, *SHORT, student={"path": str(model)}, tokenizer=str(model), data={"train": rows})
        return train.main, run.arguments
    if kind == "generate":
        return generate.main, ["--model", str(model), "--data", rows, "--out", str(tmp_path / "answers.jsonl")]
    return evaluate.main, ["--model", str(model), "--data", f"set={rows}", "--out", str(tmp_path / "eval")]


# Code that comes with a model

CODE = "import pathlib\npathlib.Path({!r}).touch()\nclass Own:\n    pass\n"
OWN = {
    "configuration": ("config.json", {"model_type": "novel", "auto_map": {"AutoConfig": "own.Own"}}),
    "model": ("config.json", {"model_type": "clip_text_model", "auto_map": {"AutoModelForCausalLM": "own.Own"}}),
    "tokenizer": (
        "tokenizer_config.json",
        {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}},
    ),
}


@pytest.mark.parametrize("command", ["train", "generate", "evaluate"])
@pytest.mark.parametrize("part", OWN)
def test_code_of_a_model_is_not_run(model, tmp_path, write_jsonl, canary, capsys, part, command):
    name, values = OWN[part]
    change(model / name, **values)
    (model / "own.py").write_text(CODE.format(str(canary)))
    main, arguments = command_of(command, model, tmp_path, write_jsonl)
    refused(main(arguments), capsys, "it has code of its own (auto_map), which is not run: give a model that")


def test_a_known_model_is_read_without_the_code_that_it_has_as_well(model, tmp_path, write_jsonl, canary):
    names = ("AutoConfig", "AutoModelForCausalLM")
    change(model / "config.json", auto_map=dict.fromkeys(names, "own.Own"))
    change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]})
    (model / "own.py").write_text(CODE.format(str(canary)))
    main, arguments = command_of("train", model, tmp_path, write_jsonl)
    assert main([*arguments, "--dry-run"]) == 0


AUTO = ["AutoConfig", "AutoTokenizer", "AutoModelForCausalLM", "kind", "wrappers.model_class(whole)"]


def test_every_call_of_transformers_says_that_no_code_is_run():
    """transformers would ask on the standard input."""
    root, calls = pathlib.Path(abkd_fast.__file__).parent, 0
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner, name = ast.unparse(node.func.value), node.func.attr
                is_model = owner.removeprefix("transformers.") in AUTO
                if name in ("from_pretrained", "from_config") and is_model:
                    given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                    assert given.get("trust_remote_code") == "False", f"{path}:{node.lineno}"
                    calls += 1
    assert calls >= 9


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (pathlib.Path.touch, (self.path,))


@pytest.mark.parametrize("command", ["train", "generate"])
@pytest.mark.parametrize(
    "write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))], ids=["torch.save", "pickle"]
)
def test_pickles_are_not_run(model, tmp_path, write_jsonl, canary, capsys, command, write):
    (model / "model.safetensors").unlink()
    write({"model.norm.weight": Attack(canary)}, model / "pytorch_model.bin")
    main, arguments = command_of(command, model, tmp_path, write_jsonl)
    refused(main(arguments), capsys, "its weights can't be read")


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
        "{{ messages.append(1) }}",
        "{% include 'CANARY' %}",
    ],
)
def test_chat_templates_reach_nothing_of_python(tmp_path, write_jsonl, canary, capsys, template):
    file = tmp_path / "template.jinja"
    file.write_text(template.replace("CANARY", str(canary)))
    turns = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello."}]
    data = {"train": write_jsonl([{"messages": turns}] * 8), "chat_template": str(file)}
    refused(Run(tmp_path, *SHORT, data=data)(), capsys, "the chat template")


def test_yaml_makes_no_objects(tmp_path, canary, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f'run: !!python/object/apply:os.system ["touch {canary}"]\n')
    refused(train.main(["--config", str(recipe)]), capsys, "recipe.yaml")


# Names

NAMES = ["../out", "/out", "a/b", "..", "", "a\0b", "a\nb"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", ["run", "stage", "set"])
def test_names_stay_in_their_folder(tmp_path, capsys, place, name):
    changes = {
        "run": {"run": {"name": name, "dir": str(tmp_path / "runs")}},
        "stage": {"stages": {name: {}}},
        "set": {"eval": {"sets": {name: "quickstart:dev"}}},
    }
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({**RECIPE, "run": {"name": "x", "dir": str(tmp_path / "runs")}, **changes[place]}))
    refused(train.main(["--config", str(recipe)]), capsys)
    assert [*tmp_path.iterdir()] == [recipe]


# Links

LINKS = ["config.json", "summary.json", "metrics.jsonl", "samples.jsonl", LOCK, "final.tmp", "config.json.tmp"]
LINKS += ["config.json.PID.tmp", "summary.json.PID.tmp"]  # as this process names its temporary files


def link(path, target):
    """Puts a link to a precious file in the place of a file, of whose content it is where there is one."""
    path = path.with_name(path.name.replace("PID", str(os.getpid())))
    target.write_bytes(path.read_bytes() if path.exists() else b"precious")
    path.unlink(missing_ok=True)
    path.symlink_to(target)
    return target.read_bytes()


@pytest.mark.parametrize("name", LINKS)
def test_a_link_in_a_run_folder_leads_nowhere(tmp_path, monkeypatch, name):
    samples = "log.samples=1", "sampling.max_new_tokens=2", "data.dev_rows=1", "eval.every_steps=1"
    run, precious, before = Run(tmp_path, "train.steps=2", *samples), tmp_path / "precious", []
    with monkeypatch.context() as patch:
        at_step(patch, 1, lambda: (before.append(link(run.folder / name, precious)), send(signal.SIGTERM)()))
        assert run() == INTERRUPTED
    assert run("--resume") in (0, 2)
    assert [precious.read_bytes()] == before


@pytest.mark.parametrize("name", ["answers.jsonl", "answers.jsonl.settings.json", "answers.jsonl.PID.tmp"])
def test_a_link_beside_answers_leads_nowhere(good_model, tmp_path, write_jsonl, name):
    main, arguments = command_of("generate", good_model, tmp_path, write_jsonl)
    before = link(tmp_path / name, tmp_path / "precious")
    assert main([*arguments, "--max-new-tokens", "2"]) in (0, 2)
    assert (tmp_path / "precious").read_bytes() == before


def test_links_to_folders_are_the_users_choice(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    assert Run(tmp_path, *SHORT, f"run.dir={tmp_path / 'runs'}")() == 0
    assert (tmp_path / "disk" / "test" / "final").is_dir()


# Caches

ME, OTHER = os.geteuid(), 4711


@pytest.mark.parametrize(
    ("owner", "mode", "words"),
    [
        (ME, 0o040755, None),
        (ME, 0o100644, None),
        (0, 0o040755, None),
        (OTHER, 0o040700, "belongs to another user (uid 4711): choose a folder of your own"),
        (ME, 0o040777, "chmod -R go-w"),
        (ME, 0o100666, "chmod -R go-w"),
        (ME, 0o040775, "chmod -R go-w"),
        (ME, 0o041777, None),  # as /tmp
        (OTHER, 0o041777, "belongs to another user"),
        (ME, 0o101666, "chmod -R go-w"),  # a file has no use of that bit
    ],
)
def test_who_may_have_written_a_cache(tmp_path, monkeypatch, owner, mode, words):
    status = types.SimpleNamespace(st_uid=owner, st_gid=OTHER, st_mode=mode)
    monkeypatch.setattr(pathlib.Path, "stat", lambda _: status)
    problem = why_untrusted(tmp_path)
    assert problem is None if words is None else words in problem


@pytest.mark.parametrize(("name", "members", "is_own"), [("me", [], True), ("me", ["you"], False), ("we", [], False)])
def test_a_group_of_one_user_is_that_user(tmp_path, monkeypatch, name, members, is_own):
    monkeypatch.setattr("pwd.getpwuid", lambda _: types.SimpleNamespace(pw_name="me"))
    monkeypatch.setattr("grp.getgrgid", lambda _: types.SimpleNamespace(gr_name=name, gr_mem=members))
    tmp_path.chmod(0o775)
    assert (why_untrusted(tmp_path) is None) == is_own


def cached_run(tmp_path, model):
    teacher = {"method": "ab", "teacher": {"path": str(model)}, "cache": {"mode": "disk"}}
    return Run(tmp_path, *SHORT, **teacher)


@pytest.mark.parametrize("place", [".", "*", "*/index.json", "*/states*", "weights.json"])
def test_a_cache_that_others_may_write_is_not_used(good_model, tmp_path, cache_folder, capsys, place):
    run = cached_run(tmp_path, good_model)
    assert run() == 0
    (path,) = (
        [cache_folder]
        if place == "."
        else [path for path in cache_folder.glob(place) if path.name != "weights.json" or place == path.name]
    )
    path.chmod(0o777)
    refused(run("--set", "run.name=other"), capsys, f"{path}: a cache is used unseen, but others may write to this one")


def test_what_a_run_writes_is_trusted_whatever_the_umask(good_model, tmp_path, cache_folder):
    before = os.umask(0)
    try:
        assert cached_run(tmp_path, good_model)() == 0
    finally:
        os.umask(before)
    written = [path for path in (cache_folder, *cache_folder.rglob("*")) if path.name != LOCK]
    assert len(written) > 5
    assert not any(map(why_untrusted, written))


def test_kept_tokenizers_that_others_may_write_are_not_used(tmp_path, cache_folder):
    (cache_folder / "tokenizers").mkdir(parents=True)
    cache_folder.chmod(0o777)
    with pytest.raises(ConfigError, match="others may write to this one"):
        distill({**RECIPE, "run": {"name": "x", "dir": str(tmp_path)}}, tokenizer=quickstart.tokenizer())


# Data


def write_arrow(table, path, new=pyarrow.ipc.new_stream):
    with new(str(path), table.schema, options=pyarrow.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)


def write_saved(table, path):
    path.mkdir()
    data = datasets.Dataset(table)
    data.save_to_disk(str(path))
    (file,) = path.glob("*.arrow")
    write_arrow(table, file)


def compressed(pack):
    return lambda table, path: path.write_bytes(
        pack("".join(json.dumps(row) + "\n" for row in table.to_pylist()).encode())
    )


BOMBS = {
    "rows.jsonl.gz": compressed(gzip.compress),
    "rows.jsonl.bz2": compressed(bz2.compress),
    "rows.jsonl.xz": compressed(lzma.compress),
    "rows.jsonl.zst": compressed(lambda content: pyarrow.Codec("zstd").compress(content, asbytes=True)),
    "rows.arrow": write_arrow,
    "file.arrow": lambda table, path: write_arrow(table, path, pyarrow.ipc.new_file),
    "rows.parquet": pyarrow.parquet.write_table,
    "saved": write_saved,
}


@pytest.mark.parametrize("name", BOMBS)
def test_small_files_that_unpack_to_much_are_refused(tmp_path, monkeypatch, capsys, name):
    table = pyarrow.table({"prompt": ["a"] * 30, "output": ["b " * 2500] * 30})
    BOMBS[name](table, tmp_path / name)
    run = Run(tmp_path, *SHORT, data={"train": str(tmp_path / name), "max_length": 128})
    assert run("--dry-run") == 0, "within the limit that any file has"
    capsys.readouterr()
    monkeypatch.setattr(unpacking, "ALWAYS", 100_000)
    monkeypatch.setattr(unpacking, "TIMES", 1)
    refused(run("--dry-run"), capsys, " unpack to more than 0.1 MB", "store it without compression")


def test_a_dictionary_of_arrow_counts_too(tmp_path, monkeypatch):
    table = pyarrow.table({"prompt": pyarrow.array(["a" * 1_000_000]).dictionary_encode()})
    write_arrow(table, tmp_path / "rows.arrow")
    monkeypatch.setattr(unpacking, "ALWAYS", 100_000)
    with pytest.raises(ConfigError, match="unpack to more than"):
        unpacking.check_arrow(tmp_path / "rows.arrow")
