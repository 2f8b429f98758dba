"""Multimodal models: the language model alone is trained, and the whole is saved as what it was."""

import json

import huggingface_hub.errors as hub
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from abkd_fast import generate
from abkd_fast.config.models import ModelConfig
from abkd_fast.config.recipe import load
from abkd_fast.config.sampling import SamplingParams
from abkd_fast.data import quickstart
from abkd_fast.errors import ConfigError
from abkd_fast.generation.sampling import sample
from abkd_fast.models import loading, wrappers
from abkd_fast.training.trainer import Trainer
from runs import Killed, Run, assert_same, at_step, crash

TEXT = {
    "vocab_size": 1024,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "max_position_embeddings": 128,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TOKENS = {"image_token_id": 1000, "boi_token_index": 1001, "eoi_token_index": 1002, "image_token_index": 1000}
GEMMA3 = {"model_type": "gemma3", "text_config": TEXT, "vision_config": VISION, "mm_tokens_per_image": 4, **TOKENS}


class WrapperRun(Run):
    """A small run whose student is a multimodal model."""

    def __init__(self, folder, path, *overrides, lora=None, **sections):
        sections = {"student": {"path": str(path), "lora": lora}, "tokenizer": None, **sections}
        super().__init__(
            folder, "train.steps=4", "eval.every_steps=2", "checkpoint.every_steps=2", *overrides, **sections
        )

    def trainer(self):
        return Trainer(load(self.arguments[1], self.arguments[3::2])[0], resume=True)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A multimodal model as it is published: in bfloat16, with a processor, and weights that transformers ignores."""
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**GEMMA3), dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors") | {"mtp.fc.weight": torch.randn(3, 3)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    quickstart.tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "Gemma3ImageProcessor"}')
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, published):
    """A run that nothing has interrupted."""
    run = WrapperRun(tmp_path_factory.mktemp("run"), published)
    assert run() == 0
    return run


def own_dev_loss(model, run):
    """The mean cross-entropy of the responses, by transformers, one row at a time."""
    rows = run.trainer().data.dev.dev_set
    total, labels = 0.0, 0
    for row in rows:
        ids, (start, stop) = torch.tensor(row["input_ids"]), row["spans"]
        with torch.no_grad():
            logits = model.eval()(input_ids=ids[None]).logits[0, start - 1 : stop - 1]
        total += torch.nn.functional.cross_entropy(logits, ids[start:stop], reduction="sum").item()
        labels += stop - start
    return total / labels


def settings_of(folder):
    return json.loads((folder / "config.json").read_text())


def test_final_is_what_the_model_was(trained, published):
    final = trained.folder / "final"
    ours, theirs = trained.weights(), load_file(published / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        is_trained = name.startswith("language_model.")
        assert ours[name].dtype == (torch.float32 if is_trained else tensor.dtype), name
        assert torch.equal(ours[name], tensor.to(ours[name].dtype)) != is_trained, name
    before, now = settings_of(published), settings_of(final)
    for values in (
        now,
        now["text_config"],
        before,
        before["text_config"],
        now["vision_config"],
        before["vision_config"],
    ):
        values.pop("dtype")
    assert now == before
    processor = "preprocessor_config.json"
    assert (final / processor).read_bytes() == (published / processor).read_bytes()


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModelForImageTextToText])
def test_dev_loss_is_that_of_transformers(trained, auto):
    model = auto.from_pretrained(trained.folder / "final", dtype=torch.float32)
    assert type(model).__name__ == "Gemma3ForConditionalGeneration"
    summary = json.loads((trained.folder / "summary.json").read_text())
    assert abs(own_dev_loss(model, trained) - summary["dev_loss"]) < 1e-4


def test_a_resumed_run_is_the_same(tmp_path, published, trained, monkeypatch):
    run = WrapperRun(tmp_path, published)
    with monkeypatch.context() as patch:
        at_step(patch, 3, crash)
        with pytest.raises(Killed):
            run()
    checkpoint = run.folder / "checkpoints" / run.checkpoints()[-1]
    kept, theirs = load_file(checkpoint / "model.safetensors"), load_file(published / "model.safetensors")
    assert kept.keys() == theirs.keys()
    assert all(torch.equal(kept[name], theirs[name]) for name in kept if "language_model" not in name)
    assert run("--resume") == 0
    assert_same(run, trained)


def test_only_the_language_model_is_in_the_run(tmp_path, published):
    trainer = WrapperRun(tmp_path, published).trainer()
    trainer.build()
    language = sum(p.numel() for p in trainer.student_meta.model.parameters())
    assert sum(p.numel() for p in trainer.student.parameters()) == language
    assert sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"]) == language
    others = dict(trainer.student.wrapper.model.named_parameters())
    assert {p.device.type for name, p in others.items() if "language_model" not in name} == {"meta"}
    assert trainer.student.form == "packed"


def test_random_weights_and_dry_run(tmp_path, capsys):
    options = "train.batch_size=2", "data.train_rows=2", "data.dev=null"
    run = WrapperRun(tmp_path, None, *options, student={"config": GEMMA3}, tokenizer="quickstart")
    assert run("--dry-run") == 0
    output = capsys.readouterr().out
    assert "memory" in output
    assert "multimodal student, a gemma3 model: its language model alone is trained" in output
    trainer = run.trainer()
    trainer.build()
    trainer.checkpoint_writer.save_model(tmp_path / "final")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype=torch.float32)
    others = dict(trainer.student.wrapper.model.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, others[name]), name


def test_generation_from_final(tmp_path, trained, write_jsonl):
    out, data = tmp_path / "out.jsonl", write_jsonl([{"prompt": "3 + 4", "output": ""}])
    arguments = ["--model", str(trained.folder / "final"), "--data", str(data), "--out", str(out), "--device", "cpu"]
    assert generate.main([*arguments, "--temperature", "0", "--max-new-tokens", "12"]) == 0
    (row,) = map(json.loads, out.read_text().splitlines())
    prompt = torch.tensor([row["prompt_ids"]])
    model = AutoModelForCausalLM.from_pretrained(trained.folder / "final", dtype=torch.float32)
    own = model.generate(input_ids=prompt, do_sample=False, max_new_tokens=12, no_repeat_ngram_size=6)
    assert own[0, prompt.shape[1] :][: len(row["output_ids"])].tolist() == row["output_ids"]


@pytest.mark.parametrize("training", [False, True])
def test_sampling_from_the_whole(published, training):
    """What `AutoModelForCausalLM` gives for a multimodal folder."""
    model = AutoModelForCausalLM.from_pretrained(published, dtype=torch.float32).train(training)
    prompt = [5, 9, 300, 41, 7, 8, 12, 3, 77, 20]  # longer than the window
    (ours,) = sample(model, [prompt], SamplingParams(max_new_tokens=12, temperature=0), seeds=[1])
    assert {module.training for module in model.modules()} == {training}
    assert model.config.text_config._attn_implementation == "sdpa"
    own = model.eval().generate(input_ids=torch.tensor([prompt]), do_sample=False, max_new_tokens=12, eos_token_id=1023)
    assert own[0, len(prompt) :].tolist() == ours


def test_lora(tmp_path, published, cache_folder):
    run = WrapperRun(tmp_path, published, "optim.lr=0.1", "train.steps=2", lora={"rank": 2})
    assert run() == 0
    adapter = load_file(run.folder / "final" / "adapter_model.safetensors")
    assert len(adapter) == 8  # two matrices for each of q_proj and v_proj, in two layers
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in adapter)
    model = AutoModelForCausalLM.from_pretrained(published, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, run.folder / "final")
    summary = json.loads((run.folder / "summary.json").read_text())
    assert abs(own_dev_loss(model, run) - summary["dev_loss"]) < 1e-4
    # As the adapter that a run goes on with, and merged into a teacher.
    spec = ModelConfig(path=str(published), adapter=str(run.folder / "final"))
    merged = [loaded(spec, key) for key in ("student", "teacher")]
    row = torch.arange(9)[None]
    with torch.no_grad():
        expected = model(input_ids=row).logits
        for ours in merged:
            with ours.own_attention():
                assert torch.allclose(ours.causal_lm.eval()(input_ids=row).logits, expected, atol=1e-4)
    assert [ours.has_adapter for ours in merged] == [True, False]


def loaded(spec, key):
    whole = loading.read_meta_model(spec, key).whole
    return loading.load(spec, whole, key, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_names_of_older_files_stay(tmp_path, published, file):
    for settings in published.glob("*.json"):
        (tmp_path / settings.name).write_bytes(settings.read_bytes())
    older = "vision_tower.vision_model."
    weights = load_file(published / "model.safetensors")
    weights = {name.replace("vision_tower.", older): tensor for name, tensor in weights.items()}
    if file.endswith("bin"):
        torch.save(weights, tmp_path / file)
    else:
        save_file(weights, tmp_path / file, {"format": "pt"})
    student = loaded(ModelConfig(path=str(tmp_path)), "student")
    student.save(tmp_path / "saved", quickstart.tokenizer(), student.weights())
    ours = load_file(tmp_path / "saved" / "model.safetensors")
    assert ours.keys() == weights.keys()
    assert all(torch.equal(ours[name].to(weights[name].dtype), tensor) for name, tensor in weights.items())


def test_an_adapter_of_the_vision_part(tmp_path, published):
    model = AutoModelForCausalLM.from_pretrained(published)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2)).save_pretrained(tmp_path)
    spec = ModelConfig(path=str(published), adapter=str(tmp_path))
    with pytest.raises(ConfigError, match=r"vision_tower.*but the language model \(model.language_model\) alone"):
        loading.read_meta_model(spec, "student")
    assert loading.read_meta_model(spec, "teacher").adapter_size


PLAIN = {key: value for key, value in TEXT.items() if key not in ("sliding_window", "layer_types")}
LINEAR = {f"linear_{name}": 4 for name in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")}
PROJECTOR = dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim"), 16)
FAMILIES = {
    "gemma4": {
        "text_config": {**TEXT, "global_head_dim": 16, "hidden_size_per_layer_input": 8, "pad_token_id": 0},
        "vision_config": {**VISION, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8},
    },
    "llama4": {
        "text_config": {**PLAIN, "intermediate_size_mlp": 24, "num_local_experts": 2, "attention_chunk_size": 8},
        "vision_config": {**VISION, **PROJECTOR},
    },
    "mistral3": {
        "text_config": {**PLAIN, "model_type": "mistral"},
        "vision_config": {**VISION, "model_type": "pixtral", "head_dim": 8},
    },
    "qwen3_5": {
        "text_config": {**PLAIN, **LINEAR, "layer_types": ["linear_attention", "full_attention"]},
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "depth": 1,
            "num_heads": 2,
            "out_hidden_size": 16,
        },
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_families(tmp_path, family):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **FAMILIES[family])
    wrappers.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "published")
    quickstart.tokenizer().save_pretrained(tmp_path / "published")
    run = WrapperRun(tmp_path, tmp_path / "published")
    assert run("--dry-run") == 0
    assert run() == 0
    ours, theirs = run.weights(), load_file(tmp_path / "published" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    vision = [name for name in theirs if ours[name].dtype == torch.bfloat16]
    assert any("vis" in name for name in vision)
    assert all(torch.equal(ours[name], theirs[name]) for name in vision)
    whole = wrappers.model_class(config).from_pretrained(run.folder / "final", dtype=torch.float32)
    # transformers 5.24 fails in Llama 4's forward pass without images.
    model = wrappers.language_model(whole) if family == "llama4" else whole
    summary = json.loads((run.folder / "summary.json").read_text())
    assert abs(own_dev_loss(model, run) - summary["dev_loss"]) < 1e-4


def refused(folder, values):
    """The line for a folder with this configuration."""
    (folder / "config.json").write_text(json.dumps(values))
    save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(ConfigError) as caught:
        loading.read_meta_model(ModelConfig(path=str(folder)), "student")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_models_that_are_refused(tmp_path):
    assert "no causal language model for its text part (qwen2_vl_text)" in refused(tmp_path, {"model_type": "qwen2_vl"})
    text = {"model_type": "cohere2", **TEXT, "layer_types": None}
    other = {
        "model_type": "cohere2_vision",
        "text_config": text,
        "vision_config": {**VISION, "model_type": "siglip_vision_model"},
    }
    assert "its logits differ from those of its language model" in refused(tmp_path, other)


def test_code_of_its_own(tmp_path):
    values = {"model_type": "novel", "auto_map": {"AutoConfig": "configuration_novel.NovelConfig"}}
    assert "it has code of its own (auto_map), which is not run" in refused(tmp_path, values)


LINES = {
    hub.GatedRepoError: "its owner lets only chosen accounts read it",
    hub.RepositoryNotFoundError: "no such folder, and no such model on the Hub (a private one needs a login)",
    hub.LocalEntryNotFoundError: "no such folder, and no such model on the Hub can be asked for",
}


@pytest.mark.parametrize("kind", LINES, ids=lambda kind: kind.__name__)
def test_what_the_hub_says(monkeypatch, kind):
    def refuse(*arguments, **options):
        raise kind.__new__(kind)

    monkeypatch.setattr(transformers.utils.hub, "hf_hub_download", refuse)
    with pytest.raises(ConfigError) as caught:
        loading.read_meta_model(ModelConfig(path="somebody/something"), "student")
    assert LINES[kind] in str(caught.value)
    assert "\n" not in str(caught.value)
