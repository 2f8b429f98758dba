"""Results on the Hub, pushed by the library's own client to a server that speaks its protocol."""

import json
import threading
import time

import huggingface_hub
import pytest
import torch
import yaml
from torch.distributed import HashStore

from abkd_fast import processes
from abkd_fast.push import main as push
from hub_server import TOKEN, Hub, serve
from runs import Run


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with serve(Hub()) as hub:
        constants = {"ENDPOINT": hub.address, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
        constants |= {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_TOKEN_PATH": str(tmp_path / "token")}
        for name, value in constants.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


SHORT = "train.steps=1", "data.dev=null", "eval.every_steps=null"


def stages(folder, **own):
    sections = {"init": {}, "more": {"student": {"path": "stage:init", "config": None}}}
    for name, values in own.items():
        sections[name] = {**sections[name], **values}
    run = Run(folder, *SHORT, stages=sections)
    run.root = run.folder
    return run


def card(content):
    _, header, text = content.decode().split("---\n", 2)
    return yaml.safe_load(header), text


def test_a_run_pushes_its_result_and_loads_from_it(hub, tmp_path):
    run = Run(tmp_path / "run", *SHORT, "run.push_to_hub=mine", "run.save_dtype=bfloat16")
    assert run() == 0
    files, final = hub.files["me/mine"], run.folder / "final"
    assert files == {path.name: path.read_bytes() for path in final.iterdir()}
    assert {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= {*files}
    header, text = card(files["README.md"])
    assert header == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["abkd_fast"],
    }
    snippet = text.split("```python\n")[1].split("```")[0]
    assert '"me/mine"' in snippet
    spaces = {}
    exec(snippet.replace('"me/mine"', repr(str(final))), spaces)
    assert spaces["model"].dtype == torch.bfloat16
    recipe = json.loads(text.split("```json\n")[1].split("```")[0])
    assert recipe["run"]["dir"] == "run"
    assert "push_to_hub" not in recipe["run"]
    assert str(tmp_path) not in "".join(content.decode("latin1") for content in files.values())
    asked = len(hub.requests)
    assert run("--resume") == 0  # pushes again: nothing has changed but the time
    assert len(hub.requests) > asked


def test_a_failed_upload_keeps_the_run_and_says_the_way_out(hub, tmp_path, capsys):
    hub.fails_at = "/commit/"
    run = Run(tmp_path / "run", *SHORT, "run.push_to_hub=me/mine")
    assert run() == 75
    text = capsys.readouterr().err
    assert f"{run.folder / 'final'} is saved, but not on the Hub: me/mine: the upload has failed" in text
    assert f"abkd-fast push {run.folder} me/mine pushes it" in text
    assert (run.folder / "final" / "model.safetensors").exists()
    assert push([str(run.folder), "me/mine"]) == 75
    text = capsys.readouterr().err
    assert "the upload has failed" in text
    assert f"-m abkd_fast.push {run.folder} me/mine" in text
    hub.fails_at = None
    assert push([str(run.folder / "final"), "me/mine"]) == 0
    assert f"pushed to {hub.address}/me/mine" in capsys.readouterr().out
    assert "model.safetensors" in hub.files["me/mine"]


def reading(hub, monkeypatch):
    hub.account["auth"]["accessToken"]["role"] = "read"


def offline(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def unreachable(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("change", "name", "message"),
    [
        (lambda hub, patch: patch.delenv("HF_TOKEN"), "me/mine", "Token is required"),
        (lambda hub, patch: patch.setenv("HF_TOKEN", "hf_other"), "me/mine", "Invalid user token"),
        (reading, "me/mine", "the token may only read"),
        (lambda *_: None, "you/mine", "the token is that of me, and may write for me, lab"),
        (offline, "me/mine", "offline mode is enabled"),
        (unreachable, "me/mine", "the Hub can't be used ("),
        (lambda *_: None, "me/a/b", "expected a repository of the Hub, USER/NAME"),
        (lambda *_: None, "me/a--b", "expected a repository of the Hub, USER/NAME"),
    ],
)
def test_what_would_fail_at_the_end_is_found_before_training(hub, tmp_path, capsys, monkeypatch, change, name, message):
    change(hub, monkeypatch)
    run = Run(tmp_path / "run", f"run.push_to_hub={name}")
    for arguments in ([], ["--dry-run"]):
        assert run(*arguments) == 2
        error = capsys.readouterr().err
        assert "run.push_to_hub" in error
        assert message in error
        assert error.count("\n") == 1
        assert not run.folder.exists()
    assert hub.repositories == {}


def test_a_repository_is_made_when_training_begins(hub, tmp_path):
    run = Run(tmp_path / "run", "run.push_to_hub=me/mine")
    assert run("--dry-run") == 0
    assert run("--set", "data.train=missing.jsonl") == 2
    run.folder.mkdir()
    (run.folder / "notes").touch()
    assert run() == 2
    assert hub.repositories == {}
    assert not any(request.startswith(("POST", "PUT")) for request in hub.requests)


def test_stages_of_one_name_are_refused_and_one_stage_is_pushed(hub, tmp_path, capsys):
    run = stages(tmp_path / "run")
    assert run("--set", "run.push_to_hub=me/mine") == 2
    assert "the stages init, more would all be pushed to me/mine; name one: --set more:run" in capsys.readouterr().err
    assert run("--set", "more:run.push_to_hub=me/mine", "--set", "more:run.save_dtype=auto") == 0
    assert hub.files["me/mine"]["model.safetensors"] == (run.root / "more" / "final" / "model.safetensors").read_bytes()
    _, text = card(hub.files["me/mine"]["README.md"])
    assert "- Student: `init`, which the same recipe trained: random weights (`llama`)" in text
    assert push([str(run.root), "lab/other"]) == 2
    assert "has the stages init, more: name one with --stage" in capsys.readouterr().err
    assert push([str(run.root), "lab/other", "--stage", "mroe"]) == 2
    assert "has no finished stage mroe; its stages are init, more" in capsys.readouterr().err
    assert push([str(run.root), "lab/other", "--stage", "init", "--private"]) == 0
    assert hub.repositories == {"me/mine": False, "lab/other": True}
    assert push([str(run.root / "init"), "me/mine", "--private"]) == 2
    assert "is there already, and public" in capsys.readouterr().err


def test_a_stage_that_writes_rows_is_not_pushed(hub, tmp_path, capsys):
    path = {"path": "models/large"}
    run = Run(tmp_path / "run", "run.push_to_hub=me/mine", method="generate", student=path)
    assert run() == 2
    assert "method generate trains no model that could be pushed" in capsys.readouterr().err
    folder = tmp_path / "rows"
    (folder / "final").mkdir(parents=True)
    (folder / "summary.json").write_text("{}")
    assert push([str(folder), "me/mine"]) == 2
    assert "its result is rows, not a model" in capsys.readouterr().err
    assert push([str(tmp_path / "run"), "me/mine"]) == 2
    assert "no finished run there" in capsys.readouterr().err


def test_other_ranks_wait_for_the_upload_without_a_collective(monkeypatch):
    monkeypatch.setattr(processes, "_store", HashStore())
    first, order = threading.get_ident(), []
    monkeypatch.setattr(processes, "_last", iter([0, 0]))
    monkeypatch.setattr(processes, "is_rank0", lambda: threading.get_ident() == first)

    def other():
        processes.run_last_on_rank0(order.append, "never")
        order.append("other")

    thread = threading.Thread(target=other)
    thread.start()

    def fail():
        time.sleep(0.05)
        order.append("first")
        raise OSError

    with pytest.raises(OSError):  # noqa: PT011 - its own
        processes.run_last_on_rank0(fail)
    thread.join(5)
    assert order == ["first", "other"]
