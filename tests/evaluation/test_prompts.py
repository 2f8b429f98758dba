"""What the commands and runs put before an answer: begin tokens, chat templates and their values."""

import copy
import json

import peft
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from abkd_fast import evaluate, generate, train
from abkd_fast.config.recipe import load, packaged_recipes
from abkd_fast.data import quickstart
from abkd_fast.data.chat import PromptFormat
from abkd_fast.data.rows import read_rows
from abkd_fast.data.tokenize import encode_prompts
from abkd_fast.models import tokenizers
from abkd_fast.stages import protocol
from chains import CHATML, chat_tokenizer, save_chain_model
from runs import Run
from scoring import lines_of

SHORT = ["--max-new-tokens", "4", "--device", "cpu"]
QUESTION = {"role": "user", "content": "What is 1 + 2?"}
ANSWER = {"role": "assistant", "content": "It is 3."}


def beginning(tokenizer=None):
    """A tokenizer that puts a begin token before plain text, as Llama's."""
    tokenizer = copy.deepcopy(tokenizer or quickstart.tokenizer())
    tokenizer.bos_token = "~"
    begin = tokenizer.bos_token_id
    single = TemplateProcessing(single="~ $A", special_tokens=[("~", begin)])
    tokenizer.backend_tokenizer.post_processor = single
    assert tokenizer("b")["input_ids"][0] == begin
    return tokenizer


def prompts_of(tmp_path, model, data, *more, name="answers"):
    """The tokens of the prompts that `generate` answers."""
    out = tmp_path / f"{name}.jsonl"
    assert generate.main(["--model", str(model), "--data", data, "--out", str(out), *SHORT, *more]) == 0
    return [line["prompt_ids"] for line in lines_of(out)]


def settings_of(folder):
    return json.loads((folder / "scores.json").read_text())["settings"]


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("option", ["auto", "true", "false"])
def test_begin_token_of_both_commands(tmp_path, write_jsonl, adds, option):
    tokenizer = beginning()
    if not adds:
        tokenizer.add_bos_token = False
    model = save_chain_model(tmp_path / "model", tokenizer, {})
    data = write_jsonl([{"prompt": "Say hello.", "output": "Hello."}])
    bare = tokenizer("Say hello.", add_special_tokens=False)["input_ids"]
    begins = {"auto": adds, "true": True, "false": False}[option]
    expected = [tokenizer.bos_token_id, *bare] if begins else bare
    given = ["--begin-token", option] if option != "auto" else []
    assert prompts_of(tmp_path, model, data, *given) == [expected]
    command = ["--model", model, "--data", f"mine={data}", "--seeds", "10", *SHORT]
    assert evaluate.main([*command, *given, "--out", str(tmp_path / "out")]) == 0
    (line,) = lines_of(tmp_path / "out" / "mine.seed10.jsonl")
    assert line["prompt"] == tokenizer.decode(expected)
    assert settings_of(tmp_path / "out")["begin_token"] is begins
    if option == "true":  # the name of before
        assert evaluate.main([*command, "--bos", "--out", str(tmp_path / "bos")]) == 0
        assert settings_of(tmp_path / "bos") == settings_of(tmp_path / "out")


def test_answers_with_another_begin_token_are_refused(tmp_path, write_jsonl, capsys):
    model, data = save_chain_model(tmp_path / "model", beginning(), {}), write_jsonl([{"prompt": "b", "output": "c"}])
    prompts_of(tmp_path, model, data)
    command = ["--model", model, "--data", data, "--out", str(tmp_path / "answers.jsonl"), *SHORT]
    assert generate.main([*command, "--begin-token", "false"]) == 2
    assert "was made with other prompts, begin_token: choose another" in capsys.readouterr().err
    command = ["--model", model, "--data", f"mine={data}", "--out", str(tmp_path / "out"), *SHORT, "--seeds"]
    assert evaluate.main([*command, "1"]) == 0
    assert evaluate.main([*command, "2", "--begin-token", "false"]) == 2
    assert "is of other begin_token: choose another" in capsys.readouterr().err


@pytest.mark.parametrize("begins", [True, False])
def test_a_runs_result_keeps_its_begin_token(tmp_path, write_jsonl, begins):
    """Its tokenizer says what the model was trained with, so that "auto" is right later."""
    tokenizer = beginning()
    tokenizer.add_bos_token = not begins
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    data = write_jsonl([{"prompt": "Say hello.", "output": "Hello."}] * 4, "data.jsonl")
    run = Run(
        tmp_path / "run",
        "train.steps=1",
        tokenizer=str(tmp_path / "tokenizer"),
        data={"train": data, "begin_token": begins, "max_length": 64},
        eval={"sets": {"mine": data}, "seeds": [1], "max_new_tokens": 4},
    )
    assert run() == 0
    final = run.folder / "final"
    saved = AutoTokenizer.from_pretrained(final)
    assert (saved("b")["input_ids"][0] == saved.bos_token_id) == begins
    assert settings_of(run.folder / "eval")["begin_token"] is begins
    (prompt,) = prompts_of(tmp_path, final, write_jsonl([{"prompt": "Say hello."}]))
    assert (prompt[0] == saved.bos_token_id) == begins


def test_begin_token_of_evaluations_is_that_of_training_unless_given():
    config = load("quickstart")[0]
    assert protocol(config).begin_token == "auto"
    for data, of_eval, expected in ((True, "null", True), (False, "true", True), (True, '"auto"', "auto")):
        overrides = [f"data.begin_token={json.dumps(data)}", f"eval.begin_token={of_eval}"]
        assert protocol(load("quickstart", overrides)[0]).begin_token == expected


def test_the_papers_llama_has_no_begin_token():
    for name in packaged_recipes():
        if name.startswith("llama/"):
            assert all(config.data.begin_token is protocol(config).begin_token is False for config in load(name))


class Stubborn:
    """A tokenizer whose begin token can't be chosen."""

    bos_token_id, bos_token = 3, "<s>"

    def __call__(self, text):
        return {"input_ids": [3, 9]}


def test_a_tokenizer_that_can_not_keep_the_begin_token(tmp_path, monkeypatch, capsys):
    assert tokenizers.keep_begin_token(Stubborn(), PromptFormat())
    assert tokenizers.keep_begin_token(Stubborn(), PromptFormat(begin_token=True))
    assert not tokenizers.keep_begin_token(Stubborn(), PromptFormat(begin_token=False))
    monkeypatch.setattr(tokenizers, "keep_begin_token", lambda *_: False)
    assert Run(tmp_path / "run", "train.steps=1", "data.begin_token=false")() == 0
    assert "can't keep data.begin_token: give later commands --begin-token false" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["gpt2", "llama2", "mistral"])
@pytest.mark.parametrize("begins", [True, False])
def test_real_tokenizers_keep_the_begin_token(shared, tmp_path, name, begins):
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / name)
    assert tokenizers.keep_begin_token(tokenizer, PromptFormat(begin_token=begins))
    tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert (saved("a")["input_ids"][0] == saved.bos_token_id) == begins


def test_an_adapter_brings_its_tokenizer(tmp_path, write_jsonl):
    model = save_chain_model(tmp_path / "model", beginning(), {})
    adapter = tmp_path / "adapter"
    settings = peft.LoraConfig(r=2, target_modules=["v_proj"])
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model), settings).save_pretrained(adapter)
    data = write_jsonl([{"prompt": "Say hello."}])
    (prompt,) = prompts_of(tmp_path, adapter, data)  # it has none: the model's is taken
    assert prompt[0] == beginning().bos_token_id
    tokenizer = beginning()
    tokenizer.add_bos_token = False
    tokenizer.save_pretrained(adapter)
    assert prompts_of(tmp_path, adapter, data, name="without") == [prompt[1:]]


def test_chat_template_and_its_values(tmp_path, write_jsonl, capsys):
    tokenizer = chat_tokenizer(chat_template=None)
    model = save_chain_model(tmp_path / "model", tokenizer, {})
    template = tmp_path / "mine.jinja"
    template.write_text(CHATML + "{% if add_generation_prompt and calm %}Calmly: {% endif %}")
    data = write_jsonl([{"messages": [QUESTION, ANSWER]}])
    given = ["--chat-template", str(template)]
    plain = prompts_of(tmp_path, model, data, *given, name="plain")
    calm = prompts_of(tmp_path, model, data, *given, "--chat-template-kwargs", '{"calm": true}', name="calm")
    text = "<|im_start|>user\nWhat is 1 + 2?<|im_end|>\n<|im_start|>assistant\n"
    assert plain == tokenizer([text], add_special_tokens=False)["input_ids"]
    assert calm == tokenizer([text + "Calmly: "], add_special_tokens=False)["input_ids"]
    command = ["--model", model, "--data", f"mine={data}", "--seeds", "1", *SHORT, *given]
    for name, kwargs in {"plain": [], "calm": ["--chat-template-kwargs", '{"calm": true}']}.items():
        assert evaluate.main([*command, *kwargs, "--out", str(tmp_path / f"of-{name}")]) == 0
    assert settings_of(tmp_path / "of-calm")["chat_template_kwargs"] == '{"calm": true}'
    settings = settings_of(tmp_path / "of-plain")
    assert (settings["chat_template_kwargs"], len(settings["chat_template"])) == (None, 12)
    (line,) = lines_of(tmp_path / "of-calm" / "mine.seed1.jsonl")
    assert line["prompt"].endswith("<|im_start|>assistant\nCalmly: ")
    assert line["output"] == [ANSWER["content"]]  # the reference is the last answer
    capsys.readouterr()
    other = ["--chat-template-kwargs", '{"calm": false}']
    assert evaluate.main([*command, *other, "--out", str(tmp_path / "of-calm")]) == 2
    assert "is of other chat_template_kwargs" in capsys.readouterr().err


def test_test_sets_need_answers(tmp_path, write_jsonl, capsys):
    model = save_chain_model(tmp_path / "model", chat_tokenizer(), {})
    data = write_jsonl([{"messages": [QUESTION, ANSWER]}, {"messages": [QUESTION]}])
    command = ["--model", model, "--data", f"mine={data}", "--out", str(tmp_path / "out"), *SHORT]
    assert evaluate.main(command) == 2
    assert "line 2: the messages end without a text of the assistant to compare with" in capsys.readouterr().err


def test_a_runs_result_keeps_its_chat_template(tmp_path, write_jsonl):
    tokenizer = chat_tokenizer(chat_template=None)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "mine.jinja").write_text(CHATML)
    data = write_jsonl([{"messages": [QUESTION, ANSWER]}] * 4)
    run = Run(
        tmp_path / "run",
        "train.steps=1",
        tokenizer=str(tmp_path / "tokenizer"),
        data={"train": data, "chat_template": str(tmp_path / "mine.jinja"), "max_length": 64},
        eval={"sets": {"mine": data}, "seeds": [1], "max_new_tokens": 4},
    )
    assert run() == 0
    saved = AutoTokenizer.from_pretrained(run.folder / "final")
    assert saved.chat_template == CHATML
    rows = read_rows(data)
    assert encode_prompts(rows, saved) == encode_prompts(rows, chat_tokenizer())
    recipe = json.loads((tmp_path / "run" / "recipe.json").read_text())
    recipe["data"]["chat_template"] = "nowhere.jinja"
    path = tmp_path / "broken.json"
    path.write_text(json.dumps({**recipe, "run": {"name": "other", "dir": str(tmp_path)}}))
    assert train.main(["--config", str(path)]) == 2
