"""Cases for test_bad_input.py: recipes that config/ refuses for their own text."""

from conftest import LLAMA

SMALL = {**LLAMA, "vocab_size": 1024, "eos_token_id": 0, "bos_token_id": 0}
GOOD = {
    "run": {"name": "test"},
    "method": "sft",
    "tokenizer": "quickstart",
    "student": {"config": SMALL},
    "data": {"train": "quickstart:small", "dev": "quickstart:dev", "train_rows": 16, "dev_rows": 4, "max_length": 128},
    "train": {"steps": 12, "batch_size": 8, "max_tokens": 256, "device": "cpu"},
}


def case(*words, sets=(), recipe=None, files=None, arguments=(), **sections):
    """The words that the message must contain, the --set values, the files, and other arguments.

    The recipe is GOOD with other `sections` (... removes one), or `recipe`.
    """
    if recipe is None:
        recipe = {key: value for key, value in {**GOOD, **sections}.items() if value is not ...}
    return words, sets, {"recipe.json": recipe, **(files or {})}, arguments


STAGES = {"one": {}, "rows": {"method": "generate", "student": {"path": "stage:one", "config": None}}, "two": {}}
BASE = {**GOOD, "optim": {"lr": 1e-3}, "stages": {"one": {}, "two": {"student": {"path": "stage:one", "config": None}}}}

CASES = {
    # The file
    "earlier path of a recipe": case(
        "abkd_fast/recipes/gpt2-kd.json: no such file; did you mean gpt2/kd.json?",
        arguments=["--config", "abkd_fast/recipes/gpt2-kd.json"],
    ),
    "no recipe": case(
        "nowhere.json: no such file; packaged recipes are gemma3", arguments=["--config", "nowhere.json"]
    ),
    "recipe misspelled": case(
        "quikstart: no such file; did you mean quickstart.json?", arguments=["--config", "quikstart"]
    ),
    "recipe is a folder": case("models: is a folder, expected a JSON or YAML file", arguments=["--config", "models"]),
    "recipe's name too long": case("can't be read (File name too long)", arguments=["--config", "a" * 300]),
    "recipe's name with NUL": case("a\\x00b: no such file", arguments=["--config", "a\0b"]),
    "empty recipe": case("recipe.json line 1: broken JSON: Expecting value", recipe=""),
    "trailing comma": case("recipe.json line 2: broken JSON", recipe='{"run": {"name": "x"},\n}'),
    "missing comma": case("recipe.json line 3: broken JSON: Expecting ',' delimiter", recipe='{\n"run": 1\n"data": 2}'),
    "recipe is a list": case("recipe.json: expected a JSON object", recipe="[1]"),
    "recipe is binary": case("recipe.json line 1: broken JSON", recipe=b"\0\0\0\0"),
    "recipe is not UTF-8": case("recipe.json: can't be read ('utf-8' codec", recipe=b'{"run": "\xff"}'),
    "endless brackets": case("recipe.json: can't be read (it is nested too deeply)", recipe="[" * 100_000),
    "endless number": case("recipe.json: can't be read (Exceeds the limit", recipe='{"run": ' + "1" * 5000 + "}"),
    "deep recipe": case("recipe.json: is nested more than 100 levels", recipe='{"a": ' + "[" * 300 + "]" * 300 + "}"),
    "deep value": case("is nested more than 100 levels", sets=["student.config=" + '{"a":' * 300 + "1" + "}" * 300]),
    "deep key": case("is nested more than 100 levels", sets=["a." * 500 + "b=1"]),
    "endless brackets in YAML": case(
        "recipe.yaml: can't be read (it is nested too deeply)",
        files={"recipe.yaml": "a: " + "[" * 10_000},
        arguments=["--config", "recipe.yaml"],
    ),
    "endless number in YAML": case(
        "recipe.yaml: can't be read (Exceeds the limit",
        files={"recipe.yaml": "a: " + "1" * 5000},
        arguments=["--config", "recipe.yaml"],
    ),
    "key written twice": case("recipe.json: optim: written twice", recipe='{"optim": {}, "run": {}, "optim": {}}'),
    # Keys
    "unknown key": case("recipe.json: optim.lrr: unknown key; did you mean lr?", optim={"lrr": 1}),
    "unknown section": case("recipe.json: optmi: unknown key; did you mean optim?", optmi={"lr": 1}),
    "unknown key of an inner section": case(
        "student.lora.rnk: unknown key; did you mean rank?", sets=["student.lora.rnk=8"]
    ),
    "key like no other": case("optim.foo: unknown key; valid are name, lr, min_lr,", optim={"foo": 1}),
    "key of control characters": case("a\\n\\x1bb: unknown key", recipe={**GOOD, "a\n\x1bb": 1}),
    "no run": case("recipe.json: run: missing", run=...),
    "no training data": case("recipe.json: data.train: missing", data={"dev": "quickstart:dev"}),
    "no student": case("recipe.json: student: missing", student=...),
    "no teacher": case('teacher: missing, and method "ab" needs one; give teacher.path', method="ab"),
    "no tokenizer": case("tokenizer: missing, and a student with random weights brings none", tokenizer=None),
    "no path of the student": case("student.path: missing; give a folder or a Hub name", student={}),
    "no path of the plain text": case("data.pretrain.path: missing", sets=["data.pretrain.weight=1"]),
    "null for a required key": case("recipe.json: run.name: missing", run={"name": None}),
    # Types
    "section is a number": case("recipe.json: student: expected an object, got 5", student=5),
    "section is a list": case("recipe.json: optim: expected an object, got []", optim=[]),
    "text for a number": case('recipe.json: optim.lr must be a number, got "0.2x"', optim={"lr": "0.2x"}),
    "true for a number": case("recipe.json: optim.lr must be a number, got true", optim={"lr": True}),
    "not a number": case("recipe.json: optim.lr must be a number, got NaN", optim={"lr": float("nan")}),
    "infinite number": case("recipe.json: optim.lr must be a number, got Infinity", optim={"lr": float("inf")}),
    "number of 400 digits": case("--set optim.lr=1000", "optim.lr must be a number", sets=["optim.lr=1" + 400 * "0"]),
    "fraction for a count": case(
        "recipe.json: log.every_steps must be a whole number, got 1.5", log={"every_steps": 1.5}
    ),
    "count beyond 64 bits": case("--set train.steps=1000", "train.steps is too large", sets=[f"train.steps={10**30}"]),
    "number for a text": case("recipe.json: loss must be text, got 5", loss=5),
    "number for a switch": case("must be true or false, got 1", sets=["train.gradient_checkpointing=1"]),
    "short list": case("recipe.json: optim.betas must be a list of 2 numbers, got [0.9]", optim={"betas": [0.9]}),
    "list of texts": case('recipe.json: optim.betas must be a number, got "a"', optim={"betas": ["a", 0.9]}),
    "text for a list": case('must be a list of texts, got "q_proj"', sets=["student.lora.targets=q_proj"]),
    "empty text": case("recipe.json: tokenizer is empty", tokenizer=""),
    "NUL in a path": case("data.train has a NUL character or is too long", sets=["data.train=a\0b"]),
    "endless path": case("data.train has a NUL character or is too long", sets=["data.train=" + 5000 * "a"]),
    # Ranges
    "negative learning rate": case("recipe.json: optim.lr is -0.1, expected above 0", optim={"lr": -0.1}),
    "no learning rate": case("recipe.json: optim.lr is 0.0, expected above 0", optim={"lr": 0}),
    "least above peak": case("optim.min_lr is 0.1, expected at least 0 and at most 0.0005", optim={"min_lr": 0.1}),
    "decay rate of 1": case(
        "recipe.json: optim.betas are [0.9, 1.0], expected two numbers from 0", optim={"betas": [0.9, 1]}
    ),
    "no epochs": case("train.epochs is 0, expected at least 1", sets=["train.epochs=0"]),
    "no batch": case("train.batch_size is 0, expected at least 1", sets=["train.batch_size=0"]),
    "no checkpoint kept": case("checkpoint.keep is 0, expected at least 1", sets=["checkpoint.keep=0"]),
    "negative seed": case("run.seed is -1, expected at least 0 and at most 4.29497e+09", sets=["run.seed=-1"]),
    "dropout above 1": case("student.dropout is 2.0, expected at least 0 and at most 1", sets=["student.dropout=2"]),
    "tiny temperature": case("temperature is 1e-300, expected at least 0.001", sets=["temperature=1e-300"]),
    "hard weight above 1": case("hard_weight is 1.5, expected at least 0 and at most 1", sets=["hard_weight=1.5"]),
    "negative weight of the plain text": case(
        "data.pretrain.weight is -1.0", sets=['data.pretrain={"path": "x", "weight": -1}']
    ),
    "adapter of rank 0": case("student.lora.rank is 0, expected at least 1", sets=["student.lora.rank=0"]),
    "adapter nowhere": case("student.lora.targets is empty, expected names", sets=["student.lora.targets=[]"]),
    # Choices
    "unknown method": case('method: unknown method "abk"; did you mean ab?', sets=["method=abk"]),
    "unknown loss": case('loss "ba:1,2": unknown divergence "ba"; did you mean "ab"?', sets=["loss=ba:1,2"]),
    "loss of words": case('loss "ab:x": expected numbers after the colon, as in "ab:0.2,0.7"', sets=["loss=ab:x"]),
    "loss with too many numbers": case('loss "ab:1,2,3": at most 2 values (alpha, beta)', sets=["loss=ab:1,2,3"]),
    "loss out of range": case('loss "jsd:0": lam is 0.0, expected a number between 0 and 1', sets=["loss=jsd:0"]),
    "loss of infinity": case('loss "ab:1e400": alpha is inf, expected a finite number', sets=["loss=ab:1e400"]),
    "unknown schedule": case(
        'optim.schedule is "sawtooth", expected one of cosine, linear, constant', optim={"schedule": "sawtooth"}
    ),
    "unknown cache mode": case('cache.mode is "ram", expected one of off, auto, memory, disk', cache={"mode": "ram"}),
    "unknown type of number": case('train.dtype is "float8", expected one of auto,', sets=["train.dtype=float8"]),
    "type that would need scaled losses": case(
        'train.dtype is "float16", expected one of auto, float32, bfloat16', sets=["train.dtype=float16"]
    ),
    "no GPU": case("train.device is cuda, but PyTorch sees no GPU", sets=["train.device=cuda"]),
    "no GPU for a later stage": case(
        "train.device is cuda, but PyTorch sees no GPU", stages=STAGES, sets=["two:train.device=cuda"]
    ),
    "unknown device": case('train.device is "gpu", expected one of auto, cpu, cuda', sets=["train.device=gpu"]),
    "unknown selection": case('eval.select is "best", expected one of last, dev_loss', sets=["eval.select=best"]),
    # Contradictions
    "path and config": case("student: has both path and config: give one, and null", sets=["student.path=x"]),
    "adapter and lora": case("student: give either adapter", student={"path": "x", "adapter": "y", "lora": {}}),
    "config without a type": case('student.config needs "model_type"', student={"config": {"hidden_size": 8}}),
    "budget below a sample": case("train.max_tokens is 256", "data.max_length = 512", sets=["data.max_length=512"]),
    "selection without dev rows": case(
        "eval.select is dev_loss, but data.dev is missing", sets=["eval.select=dev_loss", "data.dev=null"]
    ),
    "cross-entropy on what imitkd's student writes": case(
        'recipe.json: hard_weight is 0.1, but method "imitkd" trains on the student\'s responses',
        "set hard_weight=0",
        method="imitkd",
        hard_weight=0.1,
        teacher={"config": SMALL},
    ),
    "cross-entropy on what gkd's student writes": case(
        "--set hard_weight=0.5: hard_weight is 0.5, but",
        "set hard_weight=0; or on_policy.fraction=0, to train on the data's alone",
        method="gkd",
        teacher={"config": SMALL},
        sets=["hard_weight=0.5"],
    ),
    "cross-entropy on what distillm's student writes": case(
        'hard_weight is 1.0, but method "distillm"', method="distillm", hard_weight=1, teacher={"config": SMALL}
    ),
    "cross-entropy that a stage shares with gkd": case(
        'recipe.json: hard_weight is 0.2, but method "gkd" trains on',
        hard_weight=0.2,
        teacher={"config": SMALL},
        stages={"first": {"method": "ab"}, "second": {"method": "gkd"}},
    ),
    # Bases
    "no base": case("recipe.json: base: quikstart: no such file; did you mean quickstart.json?", base="quikstart"),
    "base is a number": case("recipe.json: base must be text, got 5", base=5),
    "base of itself": case("recipe.json: base: recipe.json leads back to itself", base="recipe.json"),
    "bases in a circle": case(
        "a.json (base of recipe.json): base: recipe.json leads back to itself",
        base="a.json",
        files={"a.json": {"base": "recipe.json"}},
    ),
    "base of a base that is not": case(
        "a.json (base of recipe.json): base: b.json: no such file", base="a.json", files={"a.json": {"base": "b.json"}}
    ),
    "broken base": case("a.json (base of recipe.json) line 2: broken JSON", base="a.json", files={"a.json": "{\n"}),
    "unknown key of a base": case(
        "a.json (base of recipe.json): optim.lrr: unknown key", base="a.json", files={"a.json": {"optim": {"lrr": 1}}}
    ),
    "value of a base": case(
        "b.json (base of recipe.json): log.every_steps is 0",
        base="sub/a.json",
        files={"sub/a.json": {"base": "b.json", "eval": {"every_steps": 1}}, "sub/b.json": {"log": {"every_steps": 0}}},
    ),
    "value of a base's stage": case(
        "a.json (base of recipe.json) stage one: optim.lr is -1.0",
        base="a.json",
        files={"a.json": {"stages": {"one": {"optim": {"lr": -1}}}}},
    ),
    "value on a base": case(
        "error: recipe.json: optim.eps is -1.0",
        base="a.json",
        optim={"eps": -1},
        files={"a.json": {"optim": {"lr": 1e-3}}},
    ),
    "null for a stage that no base has": case(
        "recipe.json: stages.tow is null, but no base has it; did you mean two?",
        recipe={"base": "a.json", "stages": {"tow": None}},
        files={"a.json": BASE},
    ),
    "null for every stage": case(
        "recipe.json: stages: none is left; null instead of all of them",
        recipe={"base": "a.json", "stages": {"one": None, "two": None}},
        files={"a.json": BASE},
    ),
    "null for a stage that another one needs": case(
        "stage:one: no such stage before this one",
        recipe={"base": "a.json", "stages": {"one": None}},
        files={"a.json": BASE},
    ),
    # --set
    "no value": case('--set optim.lr: expected key=value, for example "optim.lr=1e-4"', sets=["optim.lr"]),
    "no key": case("--set =1: expected key=value", sets=["=1"]),
    "empty part of a key": case("--set optim..lr=1: optim.: unknown key", sets=["optim..lr=1"]),
    "key below a text": case('--set run.name.x=1: run.name must be text, got {"x": 1}', sets=["run.name.x=1"]),
    "unknown stage": case('--set tow:loss=fkl: no stage "tow"; did you mean two?', recipe=BASE, sets=["tow:loss=fkl"]),
    "stage of a recipe without": case('--set one:loss=fkl: no stage "one"; there are no stages', sets=["one:loss=fkl"]),
    "stage as a section": case(
        "--set stages.two.loss=fkl: stages", '"STAGE:key=value"', recipe=BASE, sets=["stages.two.loss=fkl"]
    ),
    "value for a stage": case(
        "--set two:optim.lr=high: optim.lr must be a number", recipe=BASE, sets=["two:optim.lr=high"]
    ),
}
