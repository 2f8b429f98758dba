"""The type of the weights in final/, and what else final/ needs to be used as its base was."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from abkd_fast import distill
from abkd_fast.config.recipe import load
from abkd_fast.data import quickstart
from abkd_fast.errors import ConfigError
from abkd_fast.training.checkpoint import copy_model
from abkd_fast.training.save_dtype import INDEX, Conversion, choose
from abkd_fast.training.trainer import Trainer
from runs import RECIPE, SMALL, Run

SHORT = "train.steps=2", "data.dev=null"


def save_base(folder, dtype=torch.bfloat16, **settings):
    """A student on the disk, with the generation settings that such models are published with."""
    values = {key: value for key, value in SMALL.items() if key != "model_type"}
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **values)).to(dtype)
    model.save_pretrained(folder)
    quickstart.tokenizer().save_pretrained(folder)
    published = {"eos_token_id": 2, "pad_token_id": 5, **settings}
    (folder / "generation_config.json").write_text(json.dumps(published))
    return str(folder)


def run_of(folder, *overrides, student, **sections):
    return Run(folder, *SHORT, *overrides, student=student, tokenizer=None, **sections)


def types_of(final):
    (file,) = final.glob("*model.safetensors")
    return {tensor.dtype for tensor in load_file(file).values()}


def test_a_converted_result_is_the_rounded_one_and_resuming_is_exact(tmp_path, undisturbed):
    run = Run(tmp_path / "run", "run.save_dtype=bfloat16", "checkpoint.every_steps=5")
    assert run() == 0
    exact, ours = undisturbed.weights(), run.weights()
    assert exact.keys() == ours.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, exact[name].bfloat16()), name
    saved = load_file(run.folder / "checkpoints" / "step-000010" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert run("--resume") == 0  # is finished
    assert run("--resume", "--set", "run.save_dtype=float16") == 2


def test_auto_is_the_type_of_a_model_in_memory(tmp_path):
    base = AutoModelForCausalLM.from_pretrained(save_base(tmp_path / "base"), dtype=torch.float16)
    values = {"run": {"name": "given", "dir": str(tmp_path), "save_dtype": "auto"}, "train": {"steps": 1}}
    final = distill(RECIPE, student=base, data={"dev": None}, **values).final
    assert types_of(final) == {torch.float16}


def test_auto_is_the_type_of_the_first_base_and_of_files_that_alone_know_it(tmp_path):
    def chosen(path):
        own = {"student": {"path": str(path)}, "run": {"name": "x", "save_dtype": "auto"}}
        (config,) = load({**RECIPE, **own} if path else {**RECIPE, "run": own["run"]})
        return choose(config, None)

    assert chosen(None) == torch.float32  # random weights
    base, root = save_base(tmp_path / "base", torch.float16), tmp_path / "runs"
    path = base
    for name in ("init", "more"):  # stages, whose results are float32
        (root / name / "final").mkdir(parents=True)
        (root / name / "config.json").write_text(json.dumps({"student": {"path": path}}))
        path = str(root / name / "final")
    assert chosen(path) == torch.float16
    settings = tmp_path / "base" / "config.json"
    values = json.loads(settings.read_text())
    settings.write_text(json.dumps({key: values[key] for key in values if key != "dtype"}))
    assert chosen(path) == torch.float16
    settings.write_text(json.dumps({**values, "dtype": "float8_e4m3fn"}))
    with pytest.raises(ConfigError, match=r"auto, but .* has torch\.float8_e4m3fn; give float32, bfl"):
        chosen(path)


def test_weights_that_the_type_cannot_hold_are_refused_and_nothing_is_lost(tmp_path, capsys, monkeypatch):
    base = save_base(tmp_path / "base", torch.float32)
    step = Trainer.train_step

    def grown(self, samples):
        result = step(self, samples)
        with torch.no_grad():
            self.student.causal_lm.model.norm.weight[3] = 1e5
        return result

    monkeypatch.setattr(Trainer, "train_step", grown)
    run = run_of(tmp_path / "run", "run.save_dtype=float16", student={"path": base})
    assert run() == 2
    error = capsys.readouterr().err
    assert "model.norm.weight has 100000, and the type ends at 65504" in error
    assert "continue with --resume --set run.save_dtype=float32, or bfloat16" in error
    assert error.count("\n") == 1
    assert not (run.folder / "final").exists()
    assert run.checkpoints() == ["step-000002"]
    assert run("--resume", "--set", "run.save_dtype=bfloat16") == 0
    assert run.weights()["model.norm.weight"][3] == torch.tensor(1e5).bfloat16()


def test_a_copied_checkpoint_is_converted_file_by_file_with_its_index(tmp_path):
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"dtype": "float32", "text_config": {"dtype": "float32"}}))
    numbers = {"a.weight": torch.ones(4), "b.gate_bias": torch.ones(2), "c.count": torch.ones(3, dtype=torch.int64)}
    for number, name in enumerate(numbers, 1):
        save_file({name: numbers[name]}, folder / f"model-0000{number}-of-00003.safetensors", {"format": "pt"})
    index = {"metadata": {"total_size": 48, "total_parameters": 9}, "weight_map": {}}
    (folder / INDEX).write_text(json.dumps(index))
    model = SimpleNamespace(_keep_in_fp32_modules_strict={"gate_bias"}, _keep_in_fp32_modules=None)
    student = SimpleNamespace(has_adapter=False, saved_model=model)
    copy_model(folder, tmp_path / "final", Conversion(torch.float16, student).apply)
    files = sorted((tmp_path / "final").glob("*.safetensors"))
    types = [tensor.dtype for file in files for tensor in load_file(file).values()]
    assert types == [torch.float16, torch.float32, torch.int64]
    metadata = json.loads((tmp_path / "final" / INDEX).read_text())["metadata"]
    assert metadata == {"total_size": 8 + 8 + 24, "total_parameters": 9}
    settings = json.loads((tmp_path / "final" / "config.json").read_text())
    assert settings == {"dtype": "float16", "text_config": {"dtype": "float16"}}
    assert load_file(folder / "model-00001-of-00003.safetensors")["a.weight"].dtype == torch.float32


TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<end>{% endfor %}"


@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["all weights", "lora"])
def test_final_has_its_bases_type_and_generation_and_the_chat_template(tmp_path, lora, capsys):
    base = save_base(tmp_path / "base", temperature=0.6, top_p=0.9)  # without do_sample, as Llama 2 has it
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    overrides = f"data.chat_template={tmp_path / 'own.jinja'}", "run.save_dtype=auto"
    run = run_of(tmp_path / "run", *overrides, student={"path": base, "lora": lora})
    assert run() == 0
    final = run.folder / "final"
    settings = json.loads((final / "generation_config.json").read_text())
    assert {key: settings[key] for key in ("temperature", "top_p", "pad_token_id")} == {
        "temperature": 0.6,
        "top_p": 0.9,
        "pad_token_id": 5,
    }
    assert settings["eos_token_id"] == [0, 2]  # the tokenizer's, too
    assert AutoTokenizer.from_pretrained(final).chat_template == TEMPLATE
    assert types_of(final) == {torch.bfloat16}  # an adapter's weights follow
    assert "final/ has its weights in bfloat16, converted from float32" in capsys.readouterr().out
    if lora is None:
        assert json.loads((final / "config.json").read_text())["dtype"] == "bfloat16"
        assert AutoModelForCausalLM.from_pretrained(final, dtype="auto").dtype == torch.bfloat16
