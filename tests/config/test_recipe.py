"""Recipes: bases, stages and overrides on top of each other, and the packaged recipes. Errors: test_bad_input.py."""

import json
import re

import pytest
from transformers import AutoConfig

from abkd_fast.config.methods import OnPolicyConfig
from abkd_fast.config.recipe import load, packaged_recipes
from abkd_fast.errors import ConfigError

GOOD = {
    "run": {"name": "test"},
    "tokenizer": "quickstart",
    "student": {"config": {"model_type": "llama"}},
    "teacher": {"path": "somewhere"},
    "data": {"train": "quickstart:small"},
}
PACKAGED = sorted(packaged_recipes())


@pytest.fixture
def write(tmp_path):
    def write(values, name="recipe.json"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(values))
        return str(path)

    return write


def test_defaults_and_types(write):
    (loaded,) = load(write({**GOOD, "optim": {"lr": 1, "betas": [0.9, 0.95]}}))
    assert loaded.optim.lr == 1.0
    assert isinstance(loaded.optim.lr, float)
    assert loaded.optim.betas == (0.9, 0.95)
    assert loaded.method == "ab"
    assert loaded.to_dict()["train"]["batch_size"] == 32


def test_overrides(write):
    (loaded,) = load(write(GOOD), ["optim.lr=1e-4", "run.name=other", "teacher.path=../models/t", "loss=ab:0.1,0.8"])
    assert (loaded.optim.lr, loaded.run.name, loaded.teacher.path) == (1e-4, "other", "../models/t")
    assert loaded.loss == "ab:0.1,0.8"


def test_stages_merge_and_take_their_own_overrides(write):
    stages = {"one": {"method": "sft", "optim": {"eps": 1e-6}}, "two": {"teacher": {"path": "stage:one"}}}
    recipe = write({**GOOD, "optim": {"lr": 1e-3}, "stages": stages})
    one, two = load(recipe, ["two:train.steps=7", "run.seed=3"])
    assert (one.method, one.optim.lr, one.optim.eps, one.train.steps) == ("sft", 1e-3, 1e-6, None)
    assert (two.method, two.optim.lr, two.optim.eps, two.train.steps) == ("ab", 1e-3, 1e-8, 7)
    assert [c.run.seed for c in (one, two)] == [3, 3]
    assert str(two.run.folder) == "runs/test/two"
    # What a stage sets itself, above all "stage:NAME", is only changed by naming the stage.
    one, two = load(recipe, ["teacher.path=x", "optim.eps=1e-7", "one:optim.eps=1e-5"])
    assert (one.teacher.path, two.teacher.path) == ("x", "stage:one")
    assert (one.optim.eps, two.optim.eps) == (1e-5, 1e-7)


def test_shared_values_of_on_policy_reach_the_stages_that_read_them(write):
    stages = {"teacher": {"method": "sft"}, "gkd": {"method": "gkd"}, "distillm": {"method": "distillm"}}
    shared = {**GOOD, "on_policy": {"loss_margin": 0.3}, "data": {"train": "x", "dev": "y"}}
    recipe = write({**shared, "stages": stages})
    overrides = ["on_policy.fraction=0.2", "on_policy.replay_rows=500", "distillm:on_policy.threshold=0.1"]
    teacher, gkd, distillm = (config.on_policy for config in load(recipe, overrides))
    assert teacher == OnPolicyConfig()
    assert gkd == OnPolicyConfig(fraction=0.2, replay_rows=500)
    assert distillm == OnPolicyConfig(replay_rows=500, loss_margin=0.3, threshold=0.1)
    refused = {
        ("imitkd:on_policy.fraction=0.2",): 'no stage "imitkd"',
        (
            "gkd:on_policy.threshold=0.2",
        ): '--set gkd:on_policy.threshold=0.2: on_policy.threshold is 0.2, but method "gkd"',
        ("on_policy.fraction=2",): "--set on_policy.fraction=2: on_policy.fraction is 2.0, expected at least 0",
        (
            "on_policy.fracton=0.2",
        ): "--set on_policy.fracton=0.2: on_policy.fracton: unknown key; did you mean fraction?",
        ("gkd:method=kd", "on_policy.fraction=0.2"): (
            '--set on_policy.fraction=0.2: on_policy.fraction is 0.2, but method "sft" has no such choice, only gkd'
        ),
    }
    for overrides, message in refused.items():
        with pytest.raises(ConfigError, match=re.escape(message)):
            load(recipe, [*overrides])


def test_cross_entropy_has_the_datas_labels_alone(write):
    """gkd never writes with on_policy.fraction = 0, wherever that is said."""
    recipe = write({**GOOD, "hard_weight": 0.3, "stages": {"ab": {}, "gkd": {"method": "gkd"}}})
    message = f'{recipe}: hard_weight is 0.3, but method "gkd" trains on the student\'s responses'
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(recipe)
    assert load(recipe, ["gkd:hard_weight=0"])[0].hard_weight == 0.3
    for key in ("on_policy.fraction=0", "gkd:on_policy.fraction=0"):
        assert [config.hard_weight for config in load(recipe, [key])] == [0.3, 0.3]


def test_configuration_spells_every_value_of_a_loss(write):
    spelled = {"alphanet": "alphanet:0.2,0.8,token", "alphanet:.1,2,batch": "alphanet:0.1,2,batch", "fkl": "fkl"}
    for loss, full in spelled.items():
        assert load(write({**GOOD, "loss": loss}))[0].to_dict()["loss"] == full


def test_recipe_states_only_what_differs_from_its_bases(write):
    stages = {"teacher": {"method": "sft"}, "ab": {"optim": {"lr": 1e-4}}, "rest": {}}
    write({**GOOD, "optim": {"lr": 1e-3, "eps": 1e-6}, "stages": stages}, "lowest.json")
    write({"base": "lowest.json", "optim": {"eps": 1e-7}, "stages": {"rest": None}, "train": {"steps": 3}}, "base.json")
    own = {"ab": {"optim": {"weight_decay": 0.5}}, "rkl": {"loss": "rkl"}}
    recipe = write({"base": "../base.json", "comment": "x", "temperature": 2, "stages": own}, "own/recipe.json")
    teacher, ab, rkl = load(recipe, ["train.steps=4", "rkl:train.steps=5"])
    assert [c.run.stage for c in (teacher, ab, rkl)] == ["teacher", "ab", "rkl"]
    assert [c.method for c in (teacher, ab, rkl)] == ["sft", "ab", "ab"]
    assert [c.optim.lr for c in (teacher, ab, rkl)] == [1e-3, 1e-4, 1e-3]
    assert [c.optim.weight_decay for c in (teacher, ab, rkl)] == [0.01, 0.5, 0.01]
    assert [c.loss for c in (teacher, ab, rkl)] == ["ab:0.2,0.7", "ab:0.2,0.7", "rkl"]
    assert [c.train.steps for c in (teacher, ab, rkl)] == [4, 4, 5]
    assert {(c.optim.eps, c.temperature) for c in (teacher, ab, rkl)} == {(1e-7, 2.0)}


def test_null_takes_away_what_the_base_has(write):
    write({**GOOD, "optim": {"lr": 1e-3}, "train": {"steps": 3}, "stages": {"one": {}, "two": {}}}, "base.json")
    changes = {"optim": None, "train": {"steps": None, "batch_size": None}, "teacher": None, "method": "sft"}
    (one,) = load(write({"base": "base.json", **changes, "stages": {"two": None}}))
    assert (one.optim.lr, one.train.steps, one.train.batch_size, one.teacher) == (5e-4, None, 32, None)
    (alone,) = load(write({"base": "base.json", "stages": None}))
    assert (alone.run.stage, str(alone.run.folder)) == (None, "runs/test")
    # A stage that was taken away and comes again begins anew.
    write({"base": "base.json", "stages": {"one": None}}, "middle.json")
    two, one = load(write({"base": "middle.json", "stages": {"one": {"loss": "fkl"}}}))
    assert (two.run.stage, one.run.stage, one.loss) == ("two", "one", "fkl")
    # Where null is a value, it is that value, not the default.
    (loaded,) = load(write({**GOOD, "data": {"train": "x", "max_prompt_length": None}}))
    assert loaded.data.max_prompt_length is None


def test_base_is_a_file_beside_the_recipe_or_else_a_packaged_one(write, tmp_path, monkeypatch):
    recipe = write({"base": "quickstart.json", "run": {"name": "mine"}})
    assert [str(c.run.folder) for c in load(recipe)][:2] == ["runs/mine/teacher", "runs/mine/init"]
    write({**GOOD, "run": {"name": "other"}}, "quickstart.json")
    assert [str(c.run.folder) for c in load(recipe)] == ["runs/mine"]
    monkeypatch.chdir(tmp_path)
    assert load("recipe.json") == load(recipe)


@pytest.mark.parametrize("recipe", PACKAGED)
def test_resolved_configuration_is_a_recipe(write, recipe):
    for config in load(recipe):
        assert load(write(config.to_dict())) == [config]


# As in the papers' scripts: student, method, loss, learning rate, epochs, samples a step, and whether the plain-text
# loss is added, of the stage that gives a row of the tables its student.
TABLE = {
    "gpt2.json": ("gpt2", "ab", "ab:0.2,0.7", 5e-4, 20, 32, True),
    "gpt2-fkl.json": ("gpt2", "kd", "fkl", 5e-4, 20, 32, True),
    "gpt2-rkl.json": ("gpt2", "kd", "rkl", 5e-4, 20, 32, True),
    "gpt2-wsd.json": ("gpt2", "kd", "wsd:0.5", 5e-4, 20, 32, True),
    "gpt2-bdkd.json": ("gpt2", "kd", "bdkd", 5e-4, 20, 32, True),
    "gpt2-jsd.json": ("gpt2", "kd", "jsd:0.1", 5e-4, 20, 32, True),
    "gpt2-akl.json": ("gpt2", "kd", "akl:0.5", 5e-4, 20, 32, True),
    "gpt2-alphanet.json": ("gpt2", "kd", "alphanet:0.2,0.9,batch", 5e-4, 20, 32, True),
    "gpt2-kd.json": ("gpt2", "kd", "fkl", 5e-4, 20, 32, False),
    "gpt2-minillm.json": ("gpt2", "minillm", "rkl", 5e-6, 20, 32, True),
    "gpt2-sft.json": ("gpt2", "sft", None, 5e-4, 20, 32, False),
    "gpt2-seqkd.json": ("gpt2", "seqkd", None, 5e-4, 20, 32, True),
    "gpt2-imitkd.json": ("gpt2", "imitkd", "fkl", 5e-4, 20, 32, True),
    "gpt2-gkd.json": ("gpt2", "gkd", "jsd:0.1", 5e-4, 20, 32, False),
    "gpt2-distillm.json": ("gpt2", "distillm", "sfkl:0.1", 5e-4, 20, 32, True),
    "gpt2-medium.json": ("gpt2-medium", "ab", "ab:0.2,0.7", 3e-4, 20, 4, True),
    "gpt2-medium-kd.json": ("gpt2-medium", "kd", "fkl", 5e-4, 20, 16, False),
    "gpt2-medium-minillm.json": ("gpt2-medium", "minillm", "rkl", 5e-6, 20, 16, True),
    "gpt2-medium-sft.json": ("gpt2-medium", "sft", None, 1e-4, 20, 32, False),
    "gpt2-medium-seqkd.json": ("gpt2-medium", "seqkd", None, 5e-4, 20, 32, True),
    "gpt2-medium-imitkd.json": ("gpt2-medium", "imitkd", "fkl", 5e-4, 20, 32, True),
    "gpt2-medium-gkd.json": ("gpt2-medium", "gkd", "jsd:0.1", 5e-4, 20, 32, False),
    "gpt2-medium-distillm.json": ("gpt2-medium", "distillm", "srkl:0.1", 5e-4, 20, 16, True),
    "gpt2-large.json": ("gpt2-large", "ab", "ab:0.2,0.7", 1e-4, 10, 16, True),
    "gpt2-large-kd.json": ("gpt2-large", "kd", "fkl", 5e-4, 10, 32, False),
    "gpt2-large-minillm.json": ("gpt2-large", "minillm", "rkl", 5e-6, 20, 16, True),
    "gpt2-large-sft.json": ("gpt2-large", "sft", None, 1e-4, 10, 32, False),
    "gpt2-large-seqkd.json": ("gpt2-large", "seqkd", None, 5e-4, 10, 16, True),
    "gpt2-large-imitkd.json": ("gpt2-large", "imitkd", "fkl", 5e-4, 10, 16, True),
    "gpt2-large-gkd.json": ("gpt2-large", "gkd", "jsd:0.1", 5e-4, 10, 16, False),
    "gpt2-large-distillm.json": ("gpt2-large", "distillm", "srkl:0.1", 1e-4, 10, 16, True),
    "llama.json": ("open_llama_3b_v2", "ab", "ab:0.1,0.8", 2.5e-4, 10, 16, True),
    "llama-kd.json": ("open_llama_3b_v2", "kd", "fkl", 2.5e-4, 10, 16, True),
    "llama-minillm.json": ("open_llama_3b_v2", "minillm", "rkl", 5e-6, 10, 32, True),
    "llama-sft.json": ("open_llama_3b_v2", "sft", None, 5e-4, 20, 16, False),
    "llama-seqkd.json": ("open_llama_3b_v2", "seqkd", None, 2.5e-4, 10, 16, False),
    "llama-imitkd.json": ("open_llama_3b_v2", "imitkd", "fkl", 5e-4, 10, 32, True),
    "llama-gkd.json": ("open_llama_3b_v2", "gkd", "jsd:0.1", 2.5e-4, 10, 16, True),
    "llama-distillm.json": ("open_llama_3b_v2", "distillm", "sfkl:0.1", 5e-4, 10, 16, True),
}
# Recipes of other models than the papers': test_model_recipes.py.
TODAY_PAIRS, TODAY_ROWS = ("qwen3", "llama3", "gemma3", "smollm"), ("", "-sft", "-gkd", "-distillm")
TODAY = {f"{pair}{row}.json" for pair in TODAY_PAIRS for row in TODAY_ROWS}
# The DISTILLM rows: the share of the student's text at first, and how much the dev loss has to rise for more of it.
DISTILLM = {"gpt2": (0.0, 0.1), "llama": (0.2, 0.2)}
# Of the stages before it that train: the model, learning rate, epochs, samples a step, and which step's weights stay.
EARLIER = {
    "runs/gpt2/teacher": ("gpt2-xl", 5e-5, 10, 8, "last"),
    "runs/gpt2/init": ("gpt2", 5e-4, 3, 32, "dev_loss"),
    "runs/gpt2/medium-init": ("gpt2-medium", 5e-4, 3, 32, "dev_loss"),
    "runs/gpt2/large-init": ("gpt2-large", 5e-4, 3, 32, "dev_loss"),
    "runs/llama/teacher": ("open_llama_7b_v2", 5e-4, 20, 16, "last"),
    "runs/llama/init": ("open_llama_3b_v2", 5e-4, 3, 32, "dev_loss"),
}


def pretrained(config, stages):
    """The name of the pre-trained model that a stage's student comes from."""
    if config.student.path.startswith("stage:"):
        return pretrained(stages[config.student.path.removeprefix("stage:")], stages)
    return config.student.path.rpartition("/")[2]


def test_every_packaged_recipe_is_found_by_its_earlier_name_too():
    """Recipes were flat files, gpt2-kd.json for gpt2/kd.json and gpt2.json for gpt2/ab.json."""
    earlier = {name: name.replace("/", "-").removesuffix("-ab") + ".json" for name in PACKAGED}
    assert {*earlier.values()} == {*TABLE, *TODAY, "quickstart.json", "self.json"}
    for name, flat in earlier.items():
        assert load(f"{name}.json") == load(name) == load(flat)


@pytest.mark.parametrize("recipe", TABLE)
def test_recipe_has_the_values_of_the_papers(recipe):
    *_, config = load(recipe)
    stages = {c.run.stage: c for c in load(recipe)}
    loss = None if config.method in ("sft", "seqkd") else config.loss
    plain_text = config.data.pretrain is not None and config.data.pretrain.weight == 1
    train = config.train
    assert (pretrained(config, stages), config.method, loss, config.optim.lr, train.epochs, train.batch_size,
            plain_text) == TABLE[recipe]  # fmt: skip
    # The folders of one pair lie side by side, named as the recipes are.
    family, _, row = recipe.removesuffix(".json").partition("-")
    row = row if row not in ("", "medium", "large") else f"{row}-abkd".lstrip("-")
    assert str(config.run.folder) == f"runs/{family}/{row}"


@pytest.mark.parametrize("recipe", TABLE)
def test_recipe_trains_its_teacher_and_initial_student_as_the_papers_do(recipe):
    *earlier, _ = load(recipe)
    stages = {c.run.stage: c for c in earlier}
    for c in (c for c in earlier if c.method != "generate"):
        values = (pretrained(c, stages), c.optim.lr, c.train.epochs, c.train.batch_size, c.eval.select)
        assert values == EARLIER[str(c.run.folder)]
        assert (c.method, c.teacher, c.data.pretrain) == ("sft", None, None)


@pytest.mark.parametrize("recipe", [name for name in TABLE if "seqkd" in name])
def test_seqkd_trains_on_what_the_teacher_answers(recipe):
    """By sampling, as in the papers: temperature 1, all tokens, at most 256. The dev rows stay those of the data."""
    *earlier, config = load(recipe)
    answers = earlier[-1]
    assert (answers.method, answers.run.stage, answers.run.seed) == ("generate", "answers", 10)
    assert "stage:teacher" in (answers.student.path, answers.student.adapter)
    sampling = answers.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.max_new_tokens) == (1.0, 0, 1.0, 256)
    assert config.data.train == "stage:answers"
    assert config.data.dev == answers.data.dev == earlier[0].data.dev
    assert answers.data.train == earlier[0].data.train


@pytest.mark.parametrize("recipe", [name for name in TABLE if load(name)[-1].method in ("imitkd", "gkd", "distillm")])
def test_on_policy_recipes_have_the_papers_choices(recipe):
    *_, config = load(recipe)
    given, sampling = config.on_policy, config.sampling
    assert given.replay_rows == 1000
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.max_new_tokens) == (1.0, 0, 1.0, 256)
    if config.method == "gkd":
        assert given.fraction == 0.5
    if config.method == "distillm":
        assert (given.threshold, given.loss_margin) == DISTILLM[recipe.partition("-")[0]]
        assert given.schedule == "decreasing"


def test_recipes_of_a_pair_share_their_teacher_and_initial_student():
    by_folder = {}
    for config in (config for recipe in PACKAGED for config in load(recipe)):
        assert by_folder.setdefault(config.run.folder, config) == config
    assert {str(folder) for folder in by_folder} >= EARLIER.keys()


@pytest.mark.parametrize("recipe", PACKAGED)
def test_recipe_is_short_says_what_it_is_and_refers_to_its_own_stages(recipe):
    text = packaged_recipes()[recipe].read_text()
    values = json.loads(text)
    assert len(values["comment"]) > 10
    if "base" in values:
        assert text.count("\n") <= 12
        assert values["base"].removesuffix(".json") in PACKAGED
    earlier = set()
    for config in load(recipe):
        assert set(re.findall('"stage:(.*?)"', json.dumps(config.to_dict()))) <= earlier
        earlier.add(config.run.stage)
    if recipe.startswith(("gpt2", "llama")):
        assert config.eval.select == "last"


@pytest.mark.parametrize("recipe", TABLE)
def test_plain_text_can_be_left_out(recipe):
    assert all(config.data.pretrain is None for config in load(recipe, ["data.pretrain=null"]))
    *_, config = load(recipe, ["data.pretrain.path=elsewhere"])
    assert (config.data.pretrain is not None) == TABLE[recipe][-1]


def test_plain_text_can_be_left_out_of_one_stage():
    assert load("gpt2.json", ["abkd:data.pretrain=null"])[-1].data.pretrain is None


@pytest.mark.parametrize("recipe", [name for name in TABLE if "minillm" in name])
def test_minillm_has_the_values_of_its_scripts(recipe):
    config, own = load(recipe)[-1], load(recipe)[-1].minillm
    assert (own.rollouts, own.inner_epochs, own.teacher_weight, own.gamma) == (256, 4, 0.2, 0.95)
    assert (own.reward_scale, own.clip_reward, own.clip_ratio, own.text_kd) == (0.5, 100, 0.2, 0.5)
    optim = config.optim
    assert (config.train.steps, optim.warmup_steps, optim.betas, optim.weight_decay) == (5000, 100, (0.9, 0.95), 1e-6)
    assert optim.schedule == ("cosine" if recipe.startswith("llama") else "constant")
    assert optim.clip_norm == 1


def test_students_keep_their_models_own_dropout_but_minillms():
    rates = {(config.method == "minillm", config.student.dropout) for recipe in PACKAGED for config in load(recipe)}
    assert rates == {(False, None), (True, 0.0)}
    gpt2 = AutoConfig.for_model("gpt2")
    assert (gpt2.embd_pdrop, gpt2.attn_pdrop, gpt2.resid_pdrop) == (0.1, 0.1, 0.1)
