"""Model cards: what they say, whatever names people give, and that no folder of the machine is in them."""

import json

import huggingface_hub
import pytest
import yaml

from abkd_fast.errors import ConfigError
from abkd_fast.evaluation import model_card
from abkd_fast.evaluation.runs import read_runs
from abkd_fast.hub import contents, find_run
from abkd_fast.push import main as push
from conftest import LLAMA
from finished_runs import score, write_run

SCORES = score(61.5, 1.25, seed10=60.25, seed20=62.75)


@pytest.fixture(autouse=True)
def downloaded(monkeypatch, tmp_path):
    """Models and data of the Hub that this machine has read."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("models--maker--small", "models--maker--large", "datasets--maker--rows"):
        (tmp_path / "hub" / name).mkdir(parents=True)


def result(root, name="abkd", files=None, train="maker/rows:plain:train", stage=None, **config):
    data = {"train": train, "dev": None, "train_on": "all"}
    run = {"dir": str(root.parent), "name": root.name, "stage": stage, "seed": 10, "push_to_hub": "me/old"}
    folder = write_run(root, name, data=data, run=run, **{"method": "ab", "student": "maker/small", **config})
    (folder / "final").mkdir()
    for file, content in (files or {"config.json": json.dumps(LLAMA)}).items():
        (folder / "final" / file).write_text(content)
    return folder


def parts(folder, name="me/mine"):
    """The header and the text of a run's card."""
    files = contents(*find_run(folder), name)
    _, header, text = files["README.md"].read_text().split("---\n", 2)
    return yaml.safe_load(header), text


def test_the_card_names_models_method_data_and_scores(tmp_path):
    root = tmp_path / "runs" / "mine"
    result(root, "teacher", stage="teacher", method="sft", student="maker/large", sets={"dolly": SCORES})
    result(root, "init", stage="init", method="sft", sets={"dolly": SCORES})
    student, teacher = ({"path": str(root / name / "final")} for name in ("init", "teacher"))
    own = {"student": student, "teacher": teacher, "sets": {"dolly": SCORES}, "stage": "abkd"}
    folder = result(root, **own)
    result(root, "other", **{**own, "stage": "other", "loss": "fkl"})
    (folder / "curves.png").write_bytes(b"png")
    header, text = parts(folder)
    assert header == {
        "base_model": ["maker/small", "maker/large"],
        "base_model_relation": "finetune",
        "datasets": ["maker/rows"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["abkd_fast", "knowledge-distillation"],
    }
    small, large = (f"[maker/{name}](https://huggingface.co/maker/{name})" for name in ("small", "large"))
    for line in (
        f"- Student: `init`, which the same recipe trained: {small}",
        f"- Teacher: `teacher`, which the same recipe trained: {large}",
        "- Method: `ab`, divergence `ab:0.2,0.7` (ABKD)",
        "- Training rows: [maker/rows](https://huggingface.co/datasets/maker/rows)",
        "- Steps: 20 of 8 samples, weights of step 10",
        "- Loss on development rows: 3.5000 before, 2.2500 after",
        "| Teacher | 61.5 (1.2) |",
        "| ABKD | **61.5 (1.2)** |",
        "![Loss, speed and memory over training](curves.png)",
    ):
        assert line in text.splitlines()
    assert "FKL" not in text  # another student of the recipe
    assert contents(*find_run(folder), "me/mine")["curves.png"] == folder / "curves.png"


def test_no_name_breaks_the_card_and_no_folder_is_in_it(tmp_path):
    secret = tmp_path / "home-of-somebody"
    secret.mkdir()
    name = "a`b|c<!--\n---\nlicense: other\n```# x"
    sets = {name: score(1.0, 0.0, seed10=1.0)}
    system = "Answer in km/h and/or mph, as on 2024/01/02."
    teacher = {"path": str(secret / name), "system": system, "chat_template": str(secret / "own.jinja")}
    folder = result(tmp_path / "runs", train=str(secret / name), teacher=teacher, student=str(secret), sets=sets)
    (folder / "final" / "tokenizer_config.json").write_text("{}")
    header, text = parts(folder)
    assert {*header} == {"library_name", "pipeline_tag", "tags"}
    assert str(tmp_path) not in text
    assert "<!--" not in text.replace(model_card.MADE, "").replace("<!--\\n", "").replace("\\<!--", "")
    assert "- Training rows: ```` a`b|c<!--\\n---\\nlicense: other\\n```# x ````" in text.splitlines()
    (row,) = (line for line in text.splitlines() if line.startswith("|  |"))
    assert row == "|  | a`b\\|c\\<!--\\n---\\nlicense: other\\n```# x |"
    fence = "`" * 4
    recipe = json.loads(text.split(f"{fence}json\n")[1].split(f"\n{fence}\n")[0])
    assert recipe["teacher"]["system"] == system
    assert recipe["teacher"]["chat_template"] == "own.jinja"
    assert recipe["teacher"]["path"] == name.rpartition("/")[2]
    assert recipe["student"]["path"] == "home-of-somebody"


@pytest.mark.parametrize("base", ["maker/small", "folder"])
def test_an_adapter_names_its_base(tmp_path, base, capsys):
    path = base if base != "folder" else str(tmp_path / "folder")
    files = {"adapter_config.json": json.dumps({"base_model_name_or_path": path, "r": 4})}
    files |= {"README.md": "---\nlibrary_name: peft\n---\n\n# Model Card for Model ID\n", "chat_template.jinja": "x"}
    student = {"path": path, "lora": {"rank": 4}}
    folder = result(tmp_path / "runs", files=files, method="sft", student=student)
    header, text = parts(folder)
    assert header["library_name"] == "peft"
    assert header.get("base_model") == ([base] if base != "folder" else None)
    assert header["tags"] == ["abkd_fast", "lora"]
    assert "with a new LoRA adapter of rank 4" in text
    assert "apply_chat_template" in text
    loads = "AutoPeftModelForCausalLM.from_pretrained(" if base != "folder" else 'from_pretrained("folder", dtype'
    assert loads in text
    settings = contents(*find_run(folder), "me/mine")["adapter_config.json"]
    shared = json.loads(settings if isinstance(settings, bytes) else settings.read_text())
    assert shared == {"base_model_name_or_path": base, "r": 4}
    assert ("users have to get folder themselves" in capsys.readouterr().out) == (base == "folder")


def test_a_card_of_ones_own_stays(tmp_path, capsys):
    folder = result(tmp_path / "runs")
    assert push([str(folder), "me/mine", "--dry-run"]) == 0
    assert "MB  README.md" in capsys.readouterr().out
    card = folder / "final" / "README.md"
    first = card.read_text()
    assert push([str(folder), "me/other", "--dry-run"]) == 0
    assert "# other" in card.read_text()
    card.write_text(first.replace(model_card.MADE, "Mine."))
    assert push([str(folder), "me/other", "--dry-run"]) == 0
    assert "Mine." in card.read_text()


def test_a_damaged_run_is_refused_in_one_line(tmp_path):
    folder = result(tmp_path / "runs")
    (folder / "summary.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"summary.json can't be read"):
        find_run(folder)
    assert read_runs([result(tmp_path / "runs", "whole")])
