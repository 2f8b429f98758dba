"""The model card of a run's result: what a stranger on the Hub has to know, without the machine's folders."""

import json
import os
import pathlib
import re
from collections.abc import Iterator

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData, constants
from huggingface_hub.file_download import repo_folder_name

from .. import __version__
from ..config.methods import WITHOUT_TEACHER
from ..config.models import weights_in_words
from ..errors import printable
from ..files import is_local_path, read_json
from ..losses.divergences import parse
from ..models import wrappers
from ..models.identity import ADAPTER_SETTINGS
from ..models.loading import read_config
from .runs import Run, is_result
from .tables import gain, in_markdown, score_table

MADE = "<!-- abkd_fast wrote this card, and writes it anew at the next push. Without this line it stays as it is. -->"
UNFILLED = "# Model Card for Model ID"  # the title of peft's template, which it writes beside an adapter
FIGURE = "curves.png"  # of report.md
NO_PATHS = ("system", "chat_template_kwargs", "columns")  # keys whose values may look like paths
LOADERS = {
    "model": """from transformers import {kind}, AutoTokenizer

model = {kind}.from_pretrained({name}, dtype="auto")""",
    "adapter": """from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained({name}, dtype="auto")""",
    "adapter of a folder": """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({base}, dtype="auto")  # the base model, which is not part of this
model = PeftModel.from_pretrained(base, {name})""",
}
CHAT = """messages = [{"role": "user", "content": "Name three primary colors."}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")"""
PLAIN = 'inputs = tokenizer("Name three primary colors.", return_tensors="pt")'


def is_own(text: str) -> bool:
    """Whether a card was written by a program, so that a new one may take its place."""
    return MADE in text or UNFILLED in text


def write(run: Run, runs: list[Run], name: str) -> str:
    """The card of a run's final/ as Markdown with a YAML header.

    Args:
        runs: those of the same recipe, with this one; its start and its teacher may be among them.
        name: of the repository.
    """
    final, config = run.folder / "final", run.config
    is_adapter, is_distilled = (final / ADAPTER_SETTINGS).exists(), config["method"] != "sft"
    models = [name for model in (config["student"], *_teachers(run).values()) for name in _origins(model, runs)]
    bases, data = [*dict.fromkeys(filter(is_hub_name, models))], [_data_name(config["data"]["train"])]
    is_text = is_adapter or wrappers.language_config(whole := read_config(str(final))) is whole
    header = ModelCardData(
        base_model=bases or None,
        base_model_relation=("adapter" if is_adapter else "finetune") if bases else None,
        datasets=[name for name in data if is_hub_name(name, "dataset")] or None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation" if is_text else "image-text-to-text",
        tags=["abkd_fast", *(["knowledge-distillation"] if is_distilled else []), *(["lora"] if is_adapter else [])],
    )
    kind = "AutoModelForCausalLM" if is_text else "AutoModelForImageTextToText"
    related = [other for other in runs if other is run or run.begins_with(other) or run.learns_from(other)]
    stated = config | {"run": {key: value for key, value in config["run"].items() if key != "push_to_hub"}}
    lines = [
        MADE,
        "",
        f"# {name.rpartition('/')[2]}",
        "",
        f"A {'LoRA adapter of a language model' if is_adapter else 'language model'}, "
        f"{'distilled' if is_distilled else 'trained'} with abkd_fast.",
        "",
        *_facts(run, runs),
        "",
        *_results(run, related),
        "## How to load it",
        "",
        *_fenced(_loader(run, name, kind, is_adapter), "python"),
        "",
        "## The recipe",
        "",
        "<details><summary>Every value in force. Local folders and files have their last name alone.</summary>",
        "",
        *_fenced(json.dumps(without_folders(stated), indent=2), "json"),
        "",
        "</details>",
        "",
        f"Written by abkd_fast {__version__} with torch {torch.__version__} and transformers "
        f"{transformers.__version__}.",
        "",
    ]
    return str(ModelCard(f"---\n{header.to_yaml()}\n---\n\n" + "\n".join(lines)))


def _teachers(run: Run) -> dict[str, dict]:
    """The teachers that the method has used."""
    return {} if run.config["method"] in WITHOUT_TEACHER else run.teachers


def _origins(model: dict, runs: list[Run]) -> list[str | None]:
    """The models that a model was made of, before any training by these runs."""
    made = next((run for run in runs if is_result(model, run)), None)
    return [model["path"], model["adapter"]] if made is None else _origins(made.config["student"], runs)


def _facts(run: Run, runs: list[Run]) -> Iterator[str]:
    config, summary = run.config, run.summary
    yield f"- Student: {_model(config['student'], runs)}"
    for key, teacher in _teachers(run).items():
        name = key.removeprefix("teacher").removeprefix("s.")
        yield f"- Teacher{f' {_code(name)}' if name else ''}: {_model(teacher, runs)}"
    loss = "cross-entropy"
    if config["method"] not in WITHOUT_TEACHER:
        loss = f"divergence `{config['loss']}` ({parse(config['loss']).title})"
    yield f"- Method: `{config['method']}`, {loss}"
    for role, key in (("Training rows", "train"), ("Development rows", "dev")):
        if config["data"][key] is not None:
            yield f"- {role}: {_link(config['data'][key], 'dataset')}"
    step = f", weights of step {summary['selected_step']}" if summary["selected_step"] != summary["steps"] else ""
    yield f"- Steps: {summary['steps']} of {config['train']['batch_size']} samples{step}"


def _results(run: Run, related: list[Run]) -> Iterator[str]:
    summary, table = run.summary, score_table(related)
    measured = {"Loss": ("dev_loss", 4), run.dev_rouge: ("dev_rouge_l", 2)}
    lines = [
        f"- {name} on development rows: {summary[f'{key}_before']:.{digits}f} before, {summary[key]:.{digits}f} after"
        for name, (key, digits) in measured.items()
        if summary[key] is not None
    ]
    if table:
        sentence = gain(related)
        lines += ["", "ROUGE-L on test sets, mean (standard deviation) over seeds:", "", table.markdown().rstrip()]
        lines += ["", in_markdown(sentence)] if sentence else []
    if (run.folder / FIGURE).exists():
        lines += ["", f"![Loss, speed and memory over training]({FIGURE})"]
    if lines:
        yield from ("## Results", "", *lines, "")


def _loader(run: Run, name: str, kind: str, is_adapter: bool) -> str:
    final, base = run.folder / "final", run.config["student"]["path"]
    way = "model" if not is_adapter else "adapter" if is_hub_name(base) else "adapter of a folder"
    load = LOADERS[way].format(name=json.dumps(name), kind=kind, base=json.dumps(shown(base or "")))
    settings = final / "tokenizer_config.json"
    has_template = (final / "chat_template.jinja").exists() or (
        settings.exists() and "chat_template" in read_json(settings)
    )
    return "\n".join(
        [
            load,
            f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(name)})",
            CHAT if has_template else PLAIN,
            'answer = model.generate(**inputs, max_new_tokens=100)[0, inputs["input_ids"].shape[1] :]',
            "print(tokenizer.decode(answer, skip_special_tokens=True))",
        ]
    )


def _model(model: dict, runs: list[Run]) -> str:
    """A model in words: a link, the stage whose result it is, or the last name of a folder."""
    kept = model.get("hidden_states") or model.get("top_k")
    if kept:
        return f"known from {_code(shown(kept))}"
    if made := next((run for run in runs if is_result(model, run)), None):
        return f"{_code(made.folder.name)}, which the same recipe trained: {_model(made.config['student'], runs)}"
    text = weights_in_words(model, _link, _code)
    if (adapter := model["adapter"]) is not None:
        text += f" with the adapter {_link(adapter)}"
    if (lora := model.get("lora")) is not None:
        text += f" with a new LoRA adapter of rank {lora['rank']}"
    return text


def _link(path: str, kind: str = "model") -> str:
    if not is_hub_name(path, kind):
        return _code(shown(path))
    name = _data_name(path) if kind == "dataset" else path
    return f"[{name}](https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name})"


def _data_name(source: str) -> str:
    """The name of a data set in NAME:CONFIG:SPLIT."""
    return source if os.path.exists(source) else source.partition(":")[0]


def is_hub_name(path: str | None, kind: str = "model") -> bool:
    """Whether a path of a recipe is a name on the Hub, and no folder of the same name on the machine that trained.

    This machine's cache of the Hub decides that, because it is right without a network. kind: "model" or "dataset".
    """
    if path is None or is_local_path(path) or os.path.exists(path):
        return False
    name = _data_name(path) if kind == "dataset" else path
    return pathlib.Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type=kind)).is_dir()


def shown(path: str) -> str:
    """A path as a stranger may see it: the last name of a folder or file of this machine; else the text as it is."""
    is_local = is_local_path(path) or path.startswith("~") or "\\" in path or os.path.exists(path)
    parts = re.split(r"[/\\]", path.rstrip("/\\"))
    return "/".join(parts[-2:] if parts[-1] == "final" else parts[-1:]) if is_local else path


def without_folders(values: object, key: str = "") -> object:
    """The values of a configuration, in which folders and files of this machine have their last name alone."""
    if key in NO_PATHS:
        return values
    if isinstance(values, dict):
        return {shown(name): without_folders(inner, name) for name, inner in values.items()}
    if isinstance(values, list):
        return [without_folders(inner, key) for inner in values]
    return shown(values) if isinstance(values, str) else values


def _code(text: str) -> str:
    """Text of a user in one line of Markdown, as it is."""
    text = printable(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    return f"{fence}{space}{text}{space}{fence}"


def _fenced(text: str, language: str) -> list[str]:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return [fence + language, text, fence]
