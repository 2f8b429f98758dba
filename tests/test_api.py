"""Distillation from Python, as a notebook does it."""

import json
import pathlib
import re
import signal
import subprocess
import sys
from typing import ClassVar

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import abkd_fast
import chat
from abkd_fast import cache, distill, train
from abkd_fast.data import quickstart
from abkd_fast.errors import ConfigError, Interrupted
from abkd_fast.evaluation import model_card
from abkd_fast.evaluation.runs import read_runs
from abkd_fast.evaluation.tables import write_report
from runs import GPT2, TIED

DOCS = pathlib.Path(__file__).parents[1] / "docs"
ROWS = [{"prompt": f"What is {n} plus 2?", "output": f"It is {n + 2}."} for n in range(24)]
SMALL = {"steps": 6, "batch_size": 4, "max_tokens": 256, "device": "cpu"}


def model(values, seed=0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of a student and of a teacher, with a tokenizer."""
    root = tmp_path_factory.mktemp("models")
    for name, values, seed in (("student", TIED, 1), ("teacher", GPT2, 2)):
        model(values, seed).save_pretrained(root / name)
        quickstart.tokenizer().save_pretrained(root / name)
    return root


@pytest.fixture
def values(tmp_path):
    """Keys of a small run."""

    def run(name, **more):
        shared = {"run": {"name": name, "dir": tmp_path}, "train": SMALL, "log": {"every_steps": 2}}
        shared |= {"data": {"max_length": 128}, "eval": {"every_steps": 3}}
        return shared | {"optim": {"lr": 3e-3, "betas": (0.9, 0.99)}} | more

    return run


def test_objects_give_the_bits_of_files(folders, values, tmp_path, cache_folder):
    """Models, tokenizer and rows as objects, or their folders and a file on the command line."""
    student, teacher = (AutoModelForCausalLM.from_pretrained(folders / name) for name in ("student", "teacher"))
    before = student.get_input_embeddings().weight.detach().clone()
    tokenizer = AutoTokenizer.from_pretrained(folders / "student")
    given = {"tokenizer": tokenizer, "train_dataset": ROWS, "eval_dataset": datasets.Dataset.from_list(ROWS[:5])}
    result = distill(student=student, teacher=teacher, **given, **values("objects"))
    assert not torch.equal(student.get_input_embeddings().weight, before), "trained in place"
    assert all(parameter.grad is None for parameter in teacher.parameters())

    files = tmp_path / "train.jsonl", tmp_path / "dev.jsonl"
    for file, rows in zip(files, (ROWS, ROWS[:5]), strict=True):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = values("files", data={"train": str(files[0]), "dev": str(files[1]), "max_length": 128})
    recipe |= {role: {"path": str(folders / role)} for role in ("student", "teacher")}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe, default=str))
    assert train.main(["--config", str(tmp_path / "recipe.json")]) == 0
    ours, theirs = load_file(result.final / "model.safetensors"), load_file(tmp_path / "files/final/model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert result.summary["steps"] == 6
    assert [(point["kind"], point["step"]) for point in result.history] == [
        ("dev", 0), ("train", 2), ("dev", 3), ("train", 4), ("train", 6), ("dev", 6)
    ]  # fmt: skip
    loaded = AutoModelForCausalLM.from_pretrained(result.final)
    assert torch.equal(loaded.get_input_embeddings().weight, student.get_input_embeddings().weight)
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(student.eval()(ids).logits, loaded(ids).logits, rtol=1e-5, atol=1e-5)
    assert teacher.generate(ids, max_new_tokens=2, pad_token_id=0).shape[1] >= 4, "the models can be used again"
    assert len(AutoTokenizer.from_pretrained(result.final)) == len(tokenizer)
    assert len([*(cache_folder / "tokenizers").iterdir()]) == 1, "the tokenizer was kept once"

    changed = {**recipe, "teacher": {"config": {"model_type": "llama", "rope_theta": 7.0}}, "student": {"config": TIED}}
    student = AutoModelForCausalLM.from_pretrained(folders / "student")
    mixed = distill(changed, student=student, teacher=teacher, tokenizer=tokenizer, run={"name": "mixed"})
    assert mixed.summary["dev_loss"] == result.summary["dev_loss"], "nothing of the recipe's models is left"
    assert json.loads((mixed.final / "config.json").read_text()) == json.loads(
        (result.final / "config.json").read_text()
    )

    paths = distill(tmp_path / "recipe.json", student=folders / "student", run={"name": "paths"})
    assert paths.summary["dev_loss"] == result.summary["dev_loss"]
    again = distill(recipe, run={"name": "paths"}, resume=True)
    assert again == paths, "a finished run is not repeated"


def test_values_of_other_types(folders, values):
    shared = {"student": folders / "student", "teacher": folders / "teacher", "train_dataset": ROWS}
    sections = values("types", loss=abkd_fast.AlphaBeta(0.2, 0.7))
    sections["train"] = {**SMALL, "steps": np.int64(1), "dtype": torch.float64}
    assert distill(**shared, **sections).summary["steps"] == 1


def stream():
    for number in range(10**9):
        yield {"prompt": f"What is {number} plus 2?", "output": f"It is {number + 2}."}


@pytest.mark.parametrize(
    "rows",
    [
        lambda: ROWS,
        lambda: datasets.Dataset.from_list(ROWS),
        lambda: datasets.IterableDataset.from_generator(stream),
        stream,
        lambda: ({**row, "unread": None} for row in ROWS),
    ],
    ids=["list", "dataset", "streaming", "generator", "mappings"],
)
def test_rows_in_memory(folders, values, rows, write_jsonl):
    sections = values("file", data={"train_rows": 24, "max_length": 64}, method="sft", train={**SMALL, "steps": 2})
    file = distill(student=folders / "student", train_dataset=write_jsonl(ROWS), **sections)
    losses_of_a_file = [point["loss"] for point in file.history]
    sections["run"] = {**sections["run"], "name": "rows"}
    result = distill(student=folders / "student", train_dataset=rows(), **sections)
    assert [point["loss"] for point in result.history] == losses_of_a_file


def test_chat_rows_and_functions(tmp_path, values):
    """Rows of messages, and functions that watch the training and end it."""
    chat.write_tokenizer(tmp_path / "chat")
    chat.write_conversations(tmp_path / "rows.jsonl", 24)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "chat")
    rows = datasets.Dataset.from_json(str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "datasets"))
    steps, dev, saved = [], [], []

    def on_step(point):
        steps.append(point["step"])
        assert {"loss", "lr", "samples_per_second"} <= point.keys()
        return point["step"] >= 4

    sections = values("watched", checkpoint={"every_steps": 2}, train={**SMALL, "steps": 100})
    watch = {"on_step": on_step, "on_eval": dev.append, "on_checkpoint": saved.append}
    models = {
        "student": model({**TIED, "vocab_size": len(tokenizer)}),
        "teacher": model(GPT2 | {"vocab_size": len(tokenizer)}),
    }
    result = distill(
        **models, tokenizer=tokenizer, train_dataset=rows, eval_dataset=rows.select(range(4)), **watch, **sections
    )
    assert steps == [2, 4]
    assert [point["step"] for point in dev] == [0, 3, 4]
    assert [folder.name for folder in saved] == ["step-000000", "step-000002", "step-000003", "step-000004"]
    assert result.summary["steps"] == result.summary["selected_step"] == 4
    assert result.summary["dev_loss"] == dev[-1]["loss"]
    AutoModelForCausalLM.from_pretrained(result.final)


def test_a_run_that_is_ended_before_its_first_step_takes_one(folders, values):
    own = {"student": folders / "student", "train_dataset": ROWS, "eval_dataset": ROWS[:4], "method": "sft"}
    result = distill(**own, on_eval=lambda point: True, **values("ended"))
    assert (result.summary["steps"], result.history[-1]["step"]) == (1, 1)


@pytest.mark.parametrize("fused", [True, False])
def test_own_optimizer_and_schedule(folders, values, fused):
    """Both leave weights alone in a step that is not finite, and continue from a checkpoint."""
    groups, sizes = [], []

    def optimizer(parameters):
        groups.append([group["weight_decay"] for group in parameters])
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=fused)

    def scheduler(made, steps):
        sizes.append(steps)
        return torch.optim.lr_scheduler.LinearLR(made, 1.0, 0.0, steps)

    own = {"student": folders / "student", "train_dataset": ROWS, "optimizer": optimizer, "scheduler": scheduler}
    sections = values("own", method="sft", checkpoint={"every_steps": 3}, log={"every_steps": 1}, optim={})
    result = distill(**own, **sections)
    assert groups == [[0.01, 0.0]]
    assert sizes == [6]
    rates = [point["lr"] for point in result.history if point["kind"] == "train"]
    assert rates == pytest.approx([0.1 * (1 - step / 6) for step in range(6)])

    def stop(folder):
        raise Stop

    sections["run"] = {**sections["run"], "name": "stopped"}
    with pytest.raises(Stop):
        distill(**own, **sections, on_checkpoint=stop)
    again = distill(**own, **sections, resume=True)
    ours, theirs = (load_file(one.final / "model.safetensors") for one in (again, result))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


class Stop(Exception):
    pass


def stop_at(step):
    def on_step(point):
        if point["step"] == step:
            raise Stop

    return on_step


def test_models_in_memory_resume_and_stay_what_they_are(values):
    """Saving and casting change a model's configuration; the teacher keeps its bits and what of it can be trained."""
    whole = distill(
        student=model(TIED),
        teacher=model(GPT2, 1),
        tokenizer=quickstart.tokenizer(),
        train_dataset=ROWS,
        **values("whole"),
    )
    student, teacher = model(TIED), model(GPT2, 1)
    teacher.train()
    bits = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    own = {"student": student, "teacher": teacher, "tokenizer": quickstart.tokenizer(), "train_dataset": ROWS}
    sections = values("cut", checkpoint={"every_steps": 2})
    with pytest.raises(Stop):
        distill(**own, **sections, on_step=stop_at(4))
    again = distill(**own, **sections, resume=True)
    ours, theirs = (load_file(one.final / "model.safetensors") for one in (again, whole))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    distill(**own, **values("bfloat16", train={**SMALL, "steps": 1, "dtype": "bfloat16"}))
    assert teacher.dtype == torch.float32
    assert all(torch.equal(tensor, bits[name]) for name, tensor in teacher.state_dict().items())
    assert teacher.training
    assert all(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize("is_other", [False, True], ids=["same", "other"])
@pytest.mark.parametrize(("every_steps", "end"), [(2, "signal"), (2, "error"), (None, "error")])
def test_a_resumed_run_trains_the_student_in_memory(values, every_steps, end, is_other):
    """The object that the interruption left, or another one, also from the start; frozen weights stay frozen."""

    def student(seed=0):
        made = model(TIED, seed)
        made.model.layers[0].mlp.requires_grad_(False)
        return made

    def on_step(point):
        if point["step"] == 4:
            if end == "error":
                raise Stop
            signal.raise_signal(signal.SIGINT)

    own = {"tokenizer": "quickstart", "train_dataset": ROWS, "method": "sft"}
    whole = distill(student=student(), **own, **values("whole"))
    begun, sections = student(), values("cut", checkpoint={"every_steps": every_steps})
    with pytest.raises(Stop if end == "error" else Interrupted):
        distill(student=begun, **own, **sections, on_step=on_step)
    resumed = student(7) if is_other else begun
    again = distill(student=resumed, **own, **sections, resume=True)
    ours, theirs = (load_file(one.final / "model.safetensors") for one in (again, whole))
    state = resumed.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.items()), "trained in place"


@pytest.mark.parametrize("kind", ["kept", "lost"])
def test_state_of_own_optimizers_and_schedules(folders, values, kind):
    """What JSON keeps continues to the same bits; what it would change is refused."""

    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                group["taken"] = group.get("taken", 0) + 1
                group["lr"] /= group["taken"]
            return super().step(closure)

    own = {"student": folders / "student", "train_dataset": ROWS, "method": "sft"}
    own["optimizer"] = lambda groups: Counting(groups, lr=0.5)
    own["scheduler"] = lambda made, steps: (
        schedules.MultiStepLR(made, [5]) if kind == "lost" else schedules.ConstantLR(made, 1.0)
    )
    sections = values("own", log={"every_steps": 1}, checkpoint={"every_steps": 2}, optim={})
    whole = distill(**own, **sections)
    sections["run"] = {**sections["run"], "name": "cut"}
    with pytest.raises(Stop):
        distill(**own, **sections, on_step=stop_at(5))
    if kind == "lost":
        with pytest.raises(ConfigError, match="a checkpoint can't keep the state of this schedule"):
            distill(**own, **sections, resume=True)
        return
    again = distill(**own, **sections, resume=True)
    ours, theirs = (load_file(one.final / "model.safetensors") for one in (again, whole))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_stages(values, tmp_path):
    """A recipe with stages, from a mapping, gives a result for each."""
    recipe = values(
        "stages", method="sft", tokenizer="quickstart", data={"train": "quickstart:small", "max_length": 128}
    )
    recipe["stages"] = {
        "first": {"student": {"config": TIED}},
        "second": {"student": {"path": "stage:first", "config": None}},
    }
    with pytest.raises(ConfigError, match="student: a model in memory is for a recipe without stages"):
        distill(recipe, student=model(TIED), tokenizer=quickstart.tokenizer())
    result = distill(recipe, train={"steps": 2})
    assert [*result.stages] == ["first", "second"]
    assert result.final == result.stages["second"].final == tmp_path / "stages" / "second" / "final"


SAME, schedules = model(TIED), torch.optim.lr_scheduler
OTHER = torch.optim.SGD([torch.zeros(3)])


class Adapted(torch.nn.Module):
    """As peft wraps a model."""

    peft_config: ClassVar[dict] = {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_dataset": 3}, "train_dataset is a int, expected a path, a data set of the datasets library"),
        ({"train_dataset": ROWS[0]}, "train_dataset is one dict, expected rows"),
        ({"train_dataset": datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS))}, "has the splits train"),
        ({"student": SAME, "teacher": SAME, "tokenizer": "quickstart"}, "student and teacher are one model"),
        ({"train_dataset": []}, "train_dataset: has no rows"),
        ({"train_dataset": [{"prompt": 3, "output": "x"}]}, "train_dataset row 1"),
        ({"train_dataset": ["text"]}, "train_dataset row 1"),
        ({"eval_dataset": [{"prompt": "x"}]}, "data.dev: eval_dataset row 1"),
        ({"student": torch.nn.Linear(2, 2)}, "student is a Linear, expected a transformers model"),
        ({"student": None}, "student: missing; give student: a model, a folder"),
        ({"recipe": 5}, "recipe is a int, expected a file, a packaged name or a mapping"),
        ({"recipe": [1]}, "recipe is a list, expected a file"),
        ({"run": None}, 'run: missing; give run={"name": …}'),
        ({"train_dataset": None}, "data.train: missing; give train_dataset"),
        ({"recipe": "quickstart.json", "student": SAME}, "student: a model in memory is for a recipe without stages"),
        ({"student": torch.device("meta")}, "student is a device, expected a transformers model"),
        ({"student": {"config": TIED, "lora": {"rank": 2}}, "tokenizer": "quickstart"}, "config gives random ones"),
        ({"recipe": {"student": {"lora": {"rank": 2}}}, "student": SAME, "tokenizer": "quickstart"},
         "a model in memory is trained as it is, but there is student.adapter or student.lora, too; leave that out"),
        ({"student": Adapted()}, 'give student={"path": BASE, "adapter": FOLDER}'),
        ({"student": model(TIED).to("meta")}, "some weights are on the meta device"),
        ({"teacher": "gpt2"}, "teacher: method sft has none, or leave teacher out"),
        ({"on_eval": print}, "on_eval: nothing is evaluated; give eval_dataset, or leave on_eval out"),
        ({"method": "generate", "on_step": print}, "on_step: method generate trains nothing"),
        ({"student": model(TIED)}, "tokenizer: missing, and the student was not loaded from a folder"),
        ({"teacher": "no/such/folder", "method": "kd"}, "no such model folder"),
        ({"lr": 1e-4}, "lr: unknown key"),
        ({"optim": {"lr": -1}}, "the arguments: optim.lr is -1"),
        ({"optim": {"lr": torch.tensor(1e-3)}}, "optim.lr must be a number"),
        ({"data": "x"}, "data must be a mapping, got x"),
        ({"on_step": 3}, "on_step is a int, expected a function; for example on_step=lambda point: "),
        ({"on_checkpoint": lambda: None}, "on_checkpoint takes other arguments"),
        ({"optimizer": OTHER}, "for example optimizer=lambda groups: torch.optim.AdamW"),
        ({"scheduler": lambda made: None}, "takes other arguments .*; for example scheduler=lambda optimizer, s"),
        ({"scheduler": lambda made, steps: None}, "scheduler gave a NoneType, expected one of torch.optim"),
        ({"scheduler": lambda made, steps: schedules.ReduceLROnPlateau(made)}, "scheduler gave a ReduceLROnPlateau"),
        ({"scheduler": lambda made, steps: schedules.ConstantLR(OTHER)}, "another optimizer"),
        ({"optimizer": lambda groups: OTHER}, "has 3 weights that are none of the student's"),
        ({"optimizer": lambda groups: torch.optim.SGD([*groups, *OTHER.param_groups])}, "has 3 weights"),
        ({"optimizer": lambda groups: torch.optim.SGD([{"params": []}])}, "optimizer has no weights"),
        ({"optimizer": torch.optim.SGD, "optim": {"lr": 1e-3}}, "optim.lr is 0.001, but there is a function optimizer"),
        ({"optimizer": torch.optim.SGD, "optim": {"name": "sgd"}}, 'optim.name is "sgd", but there is a function'),
        ({"scheduler": schedules.ConstantLR, "optim": {"warmup_ratio": 0.1}}, "warmup_ratio is 0.1, but there is"),
        ({"scheduler": schedules.ConstantLR, "optim": {"schedule": "linear"}}, "which replaces it: leave one out"),
        ({"optimizer": lambda groups: None}, "optimizer gave a NoneType"),
        ({"optimizer": lambda groups: torch.optim.LBFGS(groups[0]["params"])}, "optimizer gave a LBFGS"),
        ({"student": model(TIED).requires_grad_(False), "tokenizer": "quickstart"}, "none of its weights requires"),
    ],
)  # fmt: skip
def test_wrong_arguments(folders, values, change, message, tmp_path):
    """Each is one line, and leaves nothing that would keep the run's name."""
    arguments = {"student": folders / "student", "method": "sft", "train_dataset": ROWS, **values("wrong", optim={})}
    with pytest.raises(ConfigError, match=message) as raised:
        distill(**arguments | change)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_trained(context):
    with context(), pytest.raises(ConfigError, match="gradients are off: call distill outside"):
        distill("quickstart.json")


def test_weights_that_an_optimizer_leaves_out_are_counted(values, capsys):
    student = model(TIED)
    norms = sum(parameter.numel() for parameter in student.parameters() if parameter.dim() == 1)
    own = {"tokenizer": "quickstart", "train_dataset": ROWS, "optimizer": lambda groups: torch.optim.SGD(groups[:1])}
    distill(student=student, method="sft", **own, **values("some", optim={}))
    assert f"optimizer  {norms} of the student's weights are not given to it" in capsys.readouterr().out


def test_a_recipe_names_the_tokenizer_of_a_model_in_memory(folders, values):
    student = AutoModelForCausalLM.from_pretrained(folders / "student")
    student.name_or_path = "no/such/folder"
    result = distill(values("named", method="sft", tokenizer="quickstart"), student=student, train_dataset=ROWS)
    assert result.summary["steps"] == 6


@pytest.mark.parametrize("page", ["python-api", "losses-api", "transformers-trainer", "trl"])
def test_the_documents_programs(page, tmp_path, monkeypatch):
    """The Python of a page, from its top to its end, in one session."""
    page, names = DOCS / f"{page}.md", {"__name__": "notebook"}
    if not page.exists():
        pytest.skip("the documents are not there")
    if page.stem == "trl":
        pytest.importorskip("trl", reason="TRL is not installed")
    monkeypatch.chdir(tmp_path)
    programs = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(programs) > 1
    for program in programs:
        exec(compile(program, page.name, "exec"), names)


def test_import_is_light():
    code = "import sys, abkd_fast; print(abkd_fast.__version__); assert 'torch' not in sys.modules"
    version = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    assert version == abkd_fast.__version__
    assert {"distill", "Result"} <= {*dir(abkd_fast)}


@pytest.mark.parametrize("is_named", [True, False])
def test_what_is_published_says_that_models_were_in_memory(folders, values, is_named, cache_folder, capsys):
    """The card, the report, the list of caches; and the run's values alone don't pass for those of random weights."""
    models = {role: AutoModelForCausalLM.from_pretrained(folders / role) for role in ("student", "teacher")}
    for each in models.values() if not is_named else ():
        each.name_or_path = ""
    sections = values("published", cache={"mode": "disk"}, train={**SMALL, "steps": 1})
    distill(**models, tokenizer=str(folders / "student"), train_dataset=ROWS, eval_dataset=ROWS[:4], **sections)
    folder = pathlib.Path(sections["run"]["dir"]) / "published"
    (run,) = read_runs([folder])
    card = model_card.write(run, [run], "me/mine")
    write_report([run], folder)
    assert cache.main(["--list"]) == 0
    listed = capsys.readouterr().out
    for role, kind in (("student", "llama"), ("teacher", "gpt2")):
        of_card, of_list = (f"`{role}`", role) if is_named else (f"`{kind}`", kind)
        text = "{}, given in memory" if is_named else "a model in memory ({})"
        assert f"- {role.capitalize()}: {text.format(of_card)}" in card
        assert f"- {role}: {text.format(folders / role if is_named else kind)}" in (folder / "report.md").read_text()
        assert role == "student" or f"samples of {text.format(of_list)}" in listed
    for main in (train.main, cache.main):
        assert (
            main(
                [
                    "--config",
                    str(folder / "config.json"),
                    "--set",
                    "data.train=quickstart:small",
                    "--set",
                    "data.dev=null",
                ]
            )
            == 2
        )
        assert "is of a model that a Python program had in memory" in capsys.readouterr().err
