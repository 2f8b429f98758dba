"""Invalid input fails before any weights load or any folder is made: one line that says what to do, exit status 2."""

import json

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from transformers import AutoConfig, PreTrainedTokenizerFast

import bad_recipes
from abkd_fast.data import quickstart
from abkd_fast.device import choose_dtype
from abkd_fast.errors import ConfigError, first_line
from abkd_fast.models import loading
from abkd_fast.train import main
from bad_recipes import BASE, GOOD, SMALL, STAGES, case

ROW = {"instruction": "Say hello.", "output": "Hello."}


@pytest.fixture(scope="module")
def model_folders(tmp_path_factory):
    """Model folders of a teacher. All but one have a fault, which is their name."""
    root = tmp_path_factory.mktemp("models")

    def make(name, tokenizer=None, **changes):
        AutoConfig.for_model(**{**SMALL, **changes}).save_pretrained(root / name)
        save_file({"x": torch.zeros(100)}, root / name / "model.safetensors")
        (tokenizer or quickstart.tokenizer()).save_pretrained(root / name)
        return root / name

    other = Tokenizer(tokenizer_models.BPE({"<end>": 0, "b": 1}, [], unk_token="<end>"))
    make("good")
    make("small", vocab_size=300)
    make("large", vocab_size=9000)
    make("foreign", PreTrainedTokenizerFast(tokenizer_object=other, eos_token="<end>"))
    make("endless", PreTrainedTokenizerFast(tokenizer_object=other))
    (make("no-config") / "config.json").unlink()
    (make("no-weights") / "model.safetensors").unlink()
    (make("broken-config") / "config.json").write_text("{")
    for file in make("no-tokenizer").glob("tokenizer*"):
        file.unlink()
    (make("broken-tokenizer") / "tokenizer.json").write_text("[]")
    cut = make("cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    (make("pointer") / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n")
    shards = {"weight_map": {"x": "model.safetensors", "y": "model-00002.safetensors"}}
    (make("shard-missing") / "model.safetensors.index.json").write_text(json.dumps(shards))
    (make("broken-index") / "model.safetensors.index.json").write_text("[]")
    return root


def with_teacher(folder):
    return {"method": "ab", "teacher": {"path": f"models/{folder}"}}


def minillm(sets):
    teacher = {"teacher": {"path": "models/good"}}
    return {"method": "minillm", "loss": "rkl", **teacher, "sets": ["minillm.rollouts=16", *sets]}


def on_policy(method, *sets):
    return {**with_teacher("good"), "method": method, "sets": sets}


def data(*rows):
    """A recipe that trains on these rows, in rows.jsonl."""
    lines = [row if isinstance(row, str | bytes) else json.dumps(row) for row in rows]
    content = b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines)
    return {"sets": ["data.train=rows.jsonl", "train.batch_size=1"], "files": {"rows.jsonl": content}}


FINISHED = {"runs/test/final/config.json": "{}"}
WRITTEN = {**GOOD, "data": {**GOOD["data"], "train_on": "all", "begin_token": "auto"}}  # in a run's folder

CASES = {
    **bad_recipes.CASES,
    # Responses of the student
    "share above 1": case(
        "on_policy.fraction is 1.5, expected at least 0 and at most 1", **on_policy("gkd", "on_policy.fraction=1.5")
    ),
    "negative share": case(
        "on_policy.threshold is -0.1, expected at least 0", **on_policy("distillm", "on_policy.threshold=-0.1")
    ),
    "unknown schedule of generation": case(
        'on_policy.schedule is "falling", expected one of decreasing,',
        **on_policy("distillm", "on_policy.schedule=falling"),
    ),
    "buffer smaller than a batch": case(
        "on_policy.replay_rows is 7, fewer than train.batch_size = 8", **on_policy("gkd", "on_policy.replay_rows=7")
    ),
    "smaller than a batch of imitkd": case(
        "on_policy.replay_rows is 7, fewer than", **on_policy("imitkd", "on_policy.replay_rows=7")
    ),
    "no buffer for distillm": case(
        "on_policy.replay_rows is 0, fewer than train.batch_size = 8",
        **on_policy("distillm", "on_policy.replay_rows=0"),
    ),
    "distillm without dev rows": case(
        "data.dev: missing, and method distillm follows its loss", **on_policy("distillm", "data.dev=null")
    ),
    "gkd without a teacher": case('teacher: missing, and method "gkd" needs one', method="gkd"),
    "teacher without an end": case(
        "teacher.path: models/endless: has no end token",
        **(on_policy("gkd") | with_teacher("endless") | {"method": "gkd"}),
    ),
    "choice of another method": case(
        '--set on_policy.threshold=0.2: on_policy.threshold is 0.2, but method "gkd" has no such choice, only distillm',
        **on_policy("gkd", "on_policy.threshold=0.2"),
    ),
    "share of imitkd": case(
        'on_policy.fraction is 0.2, but method "imitkd" has no such choice, only gkd',
        **on_policy("imitkd", "on_policy.fraction=0.2"),
    ),
    "choice of a method that generates nothing": case(
        'on_policy.fraction is 0.2, but method "kd"', **on_policy("kd", "on_policy.fraction=0.2")
    ),
    "no new tokens": case("sampling.max_new_tokens is 0", **on_policy("gkd", "sampling.max_new_tokens=0")),
    "no temperature": case(
        "sampling.temperature is 0.0, expected at least 0.001", **on_policy("gkd", "sampling.temperature=0")
    ),
    "no room for a response": case(
        "quickstart:small row ", "fills all 32: nothing to learn", **on_policy("gkd", "data.max_length=32")
    ),
    # Stages
    "list of stages": case("recipe.json: stages: expected an object of objects", stages=[{}]),
    "empty list of stages": case("recipe.json: stages: expected an object of objects", stages=[]),
    "stage is a number": case("recipe.json: stages: expected an object of objects", stages={"one": 1}),
    "stage without a name": case("recipe.json: stages: expected an object of objects", stages={"": {}}),
    "no stages": case("recipe.json: stages: none is left", stages={}),
    "stage's name is a path": case(
        'recipe.json stage ../one: run.stage is "../one", expected the name', stages={"../one": {}}
    ),
    "key of a stage": case("recipe.json stage one: optim.lrr: unknown key", stages={"one": {"optim": {"lrr": 1}}}),
    "stage that is not": case(
        "student.path: stage:x: no such stage before this one; earlier stages: one",
        recipe=BASE,
        sets=["two:student.path=stage:x"],
    ),
    "stage of itself": case(
        "stage:two: no such stage before this one; earlier stages: one",
        recipe=BASE,
        sets=["two:student.path=stage:two"],
    ),
    "stage without stages": case(
        "student.path: stage:one: no such stage before this one; earlier stages: none", student={"path": "stage:one"}
    ),
    "later stage's data": case(
        "data.train: nowhere.jsonl: no such file", recipe=BASE, sets=["two:data.train=nowhere.jsonl"]
    ),
    "rows of a stage that is not": case(
        "data.train: stage:x: no such stage before this one; earlier stages: none", sets=["data.train=stage:x"]
    ),
    "rows of a stage that trains": case(
        "data.train: stage:one trains a model, and writes no rows",
        recipe={**GOOD, "stages": STAGES},
        sets=["two:data.train=stage:one"],
    ),
    "model of a stage that writes rows": case(
        "student.path: stage:rows writes rows, not a model: give it as data.train",
        recipe={**GOOD, "stages": STAGES},
        sets=["two:student.path=stage:rows", "two:student.config=null"],
    ),
    "answers of random weights": case("student: method generate trains nothing: give the path", method="generate"),
    "answers to rows that are not": case(
        "data.train: nowhere.jsonl: no such file",
        recipe={**GOOD, "stages": STAGES},
        sets=["rows:data.train=nowhere.jsonl"],
    ),
    # Folders
    "run outside of the folder of runs": case(
        'run.name is "../x", expected the name of a folder', sets=["run.name=../x"]
    ),
    "absolute run": case('run.name is "/tmp/x", expected the name of a folder', sets=["run.name=/tmp/x"]),
    "run of dots": case('run.name is "..", expected the name of a folder', sets=["run.name=.."]),
    "run of two lines": case('run.name is "a\\nb", expected the name of a folder', sets=["run.name=a\nb"]),
    "run of a long name": case('run.name is "aaa', "expected the name of a folder", sets=["run.name=" + 210 * "a"]),
    "runs in a file": case(
        "run.dir: recipe.json/test can't be made: ", "recipe.json is not a folder", sets=["run.dir=recipe.json"]
    ),
    "run exists": case("runs/test exists already: choose another run.name", files={"runs/test/x": ""}),
    "run is a file": case("runs/test exists already", files={"runs/test": ""}),
    "run to resume is a file": case("runs/test exists already", files={"runs/test": ""}, arguments=["--resume"]),
    "run to resume is another folder": case(
        "runs/test exists already", files={"runs/test/x": ""}, arguments=["--resume"]
    ),
    "run not finished": case(
        "runs/test exists, but was not finished: add --resume", files={"runs/test/config.json": GOOD}
    ),
    "changed key": case(
        "(optim.lr was 0.0005, is 0.1; train.steps was 12, is 5): undo that",
        files={"runs/test/config.json": WRITTEN},
        sets=["optim.lr=0.1", "train.steps=5"],
        arguments=["--resume"],
    ),
    "broken configuration of a run": case(
        "runs/test/config.json can't be read (", files={"runs/test/config.json": ""}, arguments=["--resume"]
    ),
    "broken summary of a run": case(
        "runs/test/summary.json can't be read",
        files={**FINISHED, "runs/test/config.json": WRITTEN, "runs/test/summary.json": "{"},
        arguments=["--resume"],
    ),
    "cache in a file": case(
        "cache.dir: ",
        "recipe.json is not a folder that can be written to; choose another",
        **with_teacher("good"),
        cache={"dir": "recipe.json", "mode": "disk"},
    ),
    # Data
    "no file": case("data.train: nowhere.jsonl: no such file or folder", sets=["data.train=nowhere.jsonl"]),
    "no dev file": case("data.dev: a/b/c: no such file or folder", sets=["data.dev=a/b/c"]),
    "no data set": case(
        "data.train: nobody/nothing: no such file, and no data set of that name on the Hub",
        sets=["data.train=nobody/nothing"],
    ),
    "unknown split": case(
        "data.train: quickstart:tain: no such split; valid are train, small, dev, test",
        sets=["data.train=quickstart:tain"],
    ),
    "folder without rows": case("data.train: models: a folder without .jsonl files", sets=["data.train=models"]),
    "empty file": case("data.train: rows.jsonl: has no rows", **data()),
    "broken row": case("data.train: rows.jsonl line 2: broken JSON", **data(ROW, '{"instruction": ')),
    "row that is no object": case("rows.jsonl line 1: expected a JSON object", **data("5")),
    "row of endless digits": case(
        "rows.jsonl line 2: broken JSON: has a whole number of more than 4,300 digits", **data(ROW, "1" * 5000)
    ),
    "row of endless brackets": case(
        "rows.jsonl line 2: broken JSON: is nested more than 100 levels deep", **data(ROW, "[" * 100_000)
    ),
    "row that is deep": case(
        "rows.jsonl line 2: broken JSON: is nested more than 100 levels deep", **data(ROW, "[" * 300 + "]" * 300)
    ),
    "row of NULs": case("rows.jsonl line 2: broken JSON", **data(ROW, b"\0\0\0")),
    "row that is not UTF-8": case("rows.jsonl line 1: is not UTF-8 text", **data(b'{"instruction": "\xff"}')),
    "row with half a character": case(
        "rows.jsonl line 1: has half of a surrogate pair", **data('{"prompt": "x", "output": "\\ud800"}')
    ),
    "row without an output": case(
        'rows.jsonl line 2: missing "output"; keys are instruction', **data(ROW, {"instruction": "x"})
    ),
    "row without an instruction": case(
        'rows.jsonl line 1: missing "instruction"; keys are output', **data({"output": "x"})
    ),
    "output that is a number": case('rows.jsonl line 1: "output" must be text, got 5', **data({**ROW, "output": 5})),
    "empty output": case('rows.jsonl line 1: "output" is empty: nothing to learn', **data({**ROW, "output": " \n"})),
    "input that is a list": case('rows.jsonl line 1: "input" must be text', **data({**ROW, "input": [1]})),
    "messages without an answer": case(
        "rows.jsonl line 1", "the last by the assistant", **data({"messages": [{"role": "user", "content": "x"}]})
    ),
    "messages without a template": case(
        "rows.jsonl line 1: has messages, but the tokenizer has no chat template",
        **data({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}),
    ),
    "empty prompt": case("rows.jsonl line 1: the prompt is empty", **data({"prompt": "", "output": "x"})),
    "fewer rows than a batch": case(
        "quickstart:small: 5 rows are fewer than train.batch_size = 8", sets=["data.train_rows=5"]
    ),
    # MiniLLM
    "fewer rollouts than a batch": case(
        "minillm.rollouts is 7, but a step takes train.batch_size = 8", **minillm(sets=["minillm.rollouts=7"])
    ),
    "fewer rows than rollouts": case(
        "minillm.rollouts is 17, but data.train has 16 rows", **minillm(sets=["minillm.rollouts=17"])
    ),
    "another loss": case("loss is fkl, but minillm needs rkl: it lowers", **minillm(sets=["loss=fkl"])),
    "other probabilities than the models'": case(
        "sampling.top_p is 0.9, but minillm needs 1", **minillm(sets=["sampling.top_p=0.9"])
    ),
    "rollouts at another temperature": case(
        "sampling.temperature is 0.7, but minillm needs 1", **minillm(sets=["sampling.temperature=0.7"])
    ),
    "teacher's weight above 1": case(
        "minillm.teacher_weight is 1.2, expected at least 0 and at most 1",
        **minillm(sets=["minillm.teacher_weight=1.2"]),
    ),
    "negative discount": case("minillm.gamma is -0.1, expected at least 0", **minillm(sets=["minillm.gamma=-0.1"])),
    "no reward's scale": case("minillm.reward_scale is 0.0", **minillm(sets=["minillm.reward_scale=0"])),
    "no inner epochs": case(
        "minillm.inner_epochs is 0, expected at least 1", **minillm(sets=["minillm.inner_epochs=0"])
    ),
    "share of the text above 1": case(
        "minillm.text_kd is 2.0, expected at least 0", **minillm(sets=["minillm.text_kd=2"])
    ),
    # Models and tokenizers
    "no folder": case("student.path: ./nowhere: no such model folder", student={"path": "./nowhere"}),
    "no model of that name": case(
        "student.path: nobody/nothing: no such folder, and no such model on the Hub", student={"path": "nobody/nothing"}
    ),
    "folder without a configuration": case(
        "teacher.path: models/no-config has no config.json; expected a model folder", **with_teacher("no-config")
    ),
    "broken configuration": case(
        "teacher.path: models/broken-config", "not a valid JSON file", **with_teacher("broken-config")
    ),
    "folder without weights": case(
        "teacher.path: models/no-weights has no weights (*.safetensors or *.bin)", **with_teacher("no-weights")
    ),
    "truncated weights": case(
        "teacher.path: models/cut/model.safetensors is damaged or incomplete", **with_teacher("cut")
    ),
    "pointer to weights": case(
        "teacher.path: models/pointer/model.safetensors is damaged or incomplete", **with_teacher("pointer")
    ),
    "missing shard": case(
        "models/shard-missing lacks 1 files of its index, the first: model-00002.safetensors",
        **with_teacher("shard-missing"),
    ),
    "broken index": case("models/broken-index/model.safetensors.index.json is damaged", **with_teacher("broken-index")),
    "unknown kind of model": case("student.config (", "lama", sets=["student.config.model_type=lama"]),
    "kind of model without a next token": case("student.config (", sets=["student.config.model_type=t5"]),
    "more layers than anybody has": case(
        "student.config (num_hidden_layers is 10000000000, expected at most 10000)",
        sets=["student.config.num_hidden_layers=10000000000"],
    ),
    "width that is a word": case("student.config (", "hidden_size", sets=["student.config.hidden_size=wide"]),
    "width that is no multiple": case("student.config (", sets=["student.config.num_attention_heads=5"]),
    "too few positions": case(
        "data.max_length is 128, but the student has 64 positions; lower it",
        sets=["student.config.max_position_embeddings=64"],
    ),
    "no tokenizer's folder": case("tokenizer: ./nowhere: no tokenizer there (no such folder)", tokenizer="./nowhere"),
    "folder without a tokenizer": case(
        "teacher.path: models/no-tokenizer is a folder without a tokenizer", **with_teacher("no-tokenizer")
    ),
    "broken tokenizer": case(
        "tokenizer: models/broken-tokenizer: no tokenizer there (", tokenizer="models/broken-tokenizer"
    ),
    "tokenizer without an end": case("tokenizer: models/endless: has no end token", tokenizer="models/endless"),
    "two tokenizers": case(
        "quickstart:small row 1: uses an id that is another token for the teacher: ",
        "tokenizers of student (840 tokens) and teacher (2) differ at id ",
        **with_teacher("foreign"),
    ),
    "student's vocabulary too small": case(
        "the tokenizer has 840 tokens, but the student fewer (student has 300)", sets=["student.config.vocab_size=300"]
    ),
    "teacher's vocabulary too small": case(
        "the teacher fewer (student has 1024, teacher has 300)", **with_teacher("small")
    ),
    "vocabularies of two kinds": case(
        "vocabulary: the student has 1024 vocabulary entries and the teacher 9000", **with_teacher("large")
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_one_line_and_status_2(tmp_path, monkeypatch, capsys, model_folders, name):
    words, sets, files, arguments = CASES[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(model_folders)
    for file, content in files.items():
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content) if isinstance(content, dict) else content
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    monkeypatch.setattr(loading, "load", lambda *arguments: pytest.fail("weights are loaded"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    options = [part for override in sets for part in ("--set", override)]
    assert main(["--config", "recipe.json", *options, *arguments]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    for word in words:
        assert word in output.err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_type_that_a_gpu_does_not_compute_in():
    for section in ("train.", ""):  # of a recipe, and of a command's option
        with pytest.raises(ConfigError, match=f"^{section}dtype is float32, but packed attention on a GPU"):
            choose_dtype("float32", torch.device("cuda"), section)


def test_gpu_without_the_kernels_of_attention(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    reason = r"^train.device: Tesla T4 has compute capability 7\.5, but packed attention needs 8\.0 or more; use"
    for wish in ("auto", "bfloat16"):
        with pytest.raises(ConfigError, match=reason):
            choose_dtype(wish, torch.device("cuda"), "train.")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert choose_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert choose_dtype("auto", torch.device("cpu")) == torch.float32


def test_a_librarys_error_is_one_line_with_its_reason():
    assert first_line(ValueError("No room\nand more")) == "No room"
    assert first_line(ValueError("Class validation error:\n    ValueError: 3 heads\nmore")) == (
        "Class validation error: ValueError: 3 heads"
    )
    assert first_line(ValueError("")) == "ValueError"
    assert first_line(ValueError("a" * 300)) == "a" * 199 + "…"
