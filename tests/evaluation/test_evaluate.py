import functools
import json
import shutil
import signal
import statistics

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from abkd_fast import train
from abkd_fast.data import quickstart
from abkd_fast.data.rows import read_rows
from abkd_fast.data.tokenize import encode_prompts
from abkd_fast.evaluate import main
from abkd_fast.evaluation import evaluator, test_sets
from abkd_fast.files import locked
from abkd_fast.generation.growing_file import GrowingFile
from abkd_fast.generation.sampling import SamplingParams, sample
from scoring import ROWS, SMALL, lines_of, rouge_by_hand, write_recipe

SHORT = ["--max-new-tokens", "8", "--device", "cpu"]


@pytest.fixture
def model_folder(tmp_path):
    folder = tmp_path / "model"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**SMALL)).save_pretrained(folder)
    quickstart.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def command(model_folder, write_jsonl, tmp_path):
    """The command's arguments, with one small set."""
    data = write_jsonl(ROWS, "set.jsonl")

    def make(*more, seeds=(10, 20), sets=()):
        sets = sets or [f"dolly={data}"]
        required = ["--model", str(model_folder), "--out", str(tmp_path / "out"), "--data", *sets]
        return [*required, "--seeds", *map(str, seeds), *SHORT, *more]

    return make


def scores_of(tmp_path):
    return json.loads((tmp_path / "out" / "scores.json").read_text())


def test_scores_are_those_of_the_samples(command, model_folder, tmp_path, capsys):
    assert main(command("--max-prompt-length", "40", "--no-repeat-ngram-size", "2")) == 0
    tokenizer = quickstart.tokenizer()
    rows = read_rows(str(tmp_path / "set.jsonl"))
    whole = encode_prompts(rows, tokenizer)
    prompts = [prompt[:40] for prompt in whole]
    references = [ROWS[0]["output"], [ROWS[1]["output"]], [ROWS[2]["output"]]]
    chosen = SamplingParams(max_new_tokens=8, no_repeat_ngram_size=2, eos_token_ids=(0,))
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    means = []
    for seed in (10, 20):
        responses = sample(model, prompts, chosen, [(seed << 32) + row for row in range(3)])
        texts = [tokenizer.decode(response, skip_special_tokens=True).strip() for response in responses]
        lines = lines_of(tmp_path / "out" / f"Dolly.seed{seed}.jsonl")
        assert [line["prompt"] for line in lines] == tokenizer.batch_decode(prompts)
        assert [line["output"] for line in lines] == references
        assert [line["response"] for line in lines] == texts
        assert [line["rouge_l"] for line in lines] == list(map(rouge_by_hand, texts, references))
        assert not any(line["exact_match"] for line in lines)
        means.append(statistics.fmean(line["rouge_l"] for line in lines))
    scores = scores_of(tmp_path)
    dolly = scores["sets"]["Dolly"]
    seeds = {"10": means[0], "20": means[1]}
    assert dolly["rouge_l"] == {"mean": statistics.fmean(means), "std": statistics.stdev(means), "seeds": seeds}
    assert dolly["exact_match"]["mean"] == 0
    assert dolly["rows"] == 3
    assert dolly["cut_prompts"] == sum(len(prompt) > 40 for prompt in whole) > 0
    assert scores["settings"]["no_repeat_ngram_size"] == 2
    output = capsys.readouterr().out
    assert f"{dolly['cut_prompts']} prompts cut to 40 tokens" in output
    assert "no_repeat_ngram_size 2" in output


def test_interrupted_evaluation_continues_to_the_same_files(command, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert main(command()) == 0
    undisturbed = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(evaluator.loading, "load", lambda *_: pytest.fail("weights are loaded for nothing"))
    assert main(command()) == 0
    monkeypatch.undo()
    for path in out.iterdir():
        path.unlink()

    add, count = GrowingFile.add, 0

    def add_and_be_stopped(self, *arguments):
        nonlocal count
        add(self, *arguments)
        count += 1
        if count == 2:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(GrowingFile, "add", add_and_be_stopped)
        assert main(command("--batch-size", "1")) == 75
    error = capsys.readouterr().err
    assert "SIGTERM after 2 of 6 answers to Dolly, which are kept; continue with:\n" in error
    assert "-m abkd_fast.evaluate --model" in error
    with (out / "Dolly.seed10.jsonl").open("ab") as file:
        file.write(b'{"prompt": 5}\n{"prompt": "damaged\n{"prompt": "torn \xc3')
    assert main(command()) == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == undisturbed


def test_interrupt_outside_of_sampling(command, capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluator.loading, "load", stop)
    assert main(command()) == 75
    error = capsys.readouterr().err
    assert error.startswith("interrupted; continue with:\n")
    assert "-m abkd_fast.evaluate --model" in error


def test_more_seeds_and_sets_are_added(command, write_jsonl, tmp_path):
    assert main(command()) == 0
    first = (tmp_path / "out" / "Dolly.seed10.jsonl").read_bytes()
    data, more = tmp_path / "set.jsonl", write_jsonl(ROWS[:2], "more.jsonl")
    assert main(command(seeds=(10, 30), sets=[f"Dolly={data}", f"mine={more}"])) == 0
    scores = scores_of(tmp_path)["sets"]
    assert list(scores["Dolly"]["rouge_l"]["seeds"]) == ["10", "20", "30"]
    assert list(scores["mine"]["rouge_l"]["seeds"]) == ["10", "30"]
    assert (tmp_path / "out" / "Dolly.seed10.jsonl").read_bytes() == first


def test_scores_of_another_evaluation_are_kept(model_folder, write_jsonl, tmp_path, command, capsys):
    data = {"dolly": write_jsonl(ROWS, "set.jsonl")}
    protocol = test_sets.Protocol(sampling=SamplingParams(max_new_tokens=8, no_repeat_ngram_size=6))
    both = [
        evaluator.Evaluation(str(model_folder), data, tmp_path / "out", [seed], protocol, device="cpu")
        for seed in (10, 20)
    ]
    for each in both:  # both have looked into the folder when it was empty
        each.run()
    assert list(scores_of(tmp_path)["sets"]["Dolly"]["rouge_l"]["seeds"]) == ["10", "20"]
    with locked(tmp_path / "out"):
        assert main(command(seeds=(30,))) == 2
    assert "another process is at work" in capsys.readouterr().err


def test_sets_may_be_read_already(model_folder, write_jsonl, tmp_path):
    def evaluation(sets):
        return evaluator.Evaluation(str(model_folder), sets, tmp_path / "out", device="cpu")

    by_name = evaluation({"dolly": write_jsonl(ROWS)})
    assert evaluation(by_name.sets).sets is by_name.sets
    assert [(test.name, len(test.prompts)) for test in by_name.sets] == [("Dolly", 3)]


def test_other_model_settings_and_rows_are_refused(command, model_folder, write_jsonl, tmp_path, capsys):
    assert main(command()) == 0
    before = (tmp_path / "out" / "scores.json").read_bytes()
    assert main(command("--temperature", "0.5")) == 2
    assert "scores.json is of other temperature: choose another, or delete" in capsys.readouterr().err
    assert main(command("--rows", "2")) == 2
    assert "scores.json has scores of another Dolly: choose another folder" in capsys.readouterr().err
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**SMALL)).save_pretrained(model_folder)
    assert main(command()) == 2
    assert "scores.json is of other weights" in capsys.readouterr().err
    assert (tmp_path / "out" / "scores.json").read_bytes() == before
    (tmp_path / "out" / "scores.json").unlink()
    assert main(command()) == 2
    assert "Dolly.seed10.jsonl exists, and not as the result of this command" in capsys.readouterr().err


def test_adapter_is_merged_into_its_base(command, model_folder, tmp_path):
    folder = tmp_path / "adapter"
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    settings = peft.LoraConfig(r=4, lora_alpha=64, init_lora_weights=False, target_modules=["v_proj", "down_proj"])
    adapted = peft.get_peft_model(model, settings)
    adapted.save_pretrained(folder)
    quickstart.tokenizer().save_pretrained(folder)
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    quickstart.tokenizer().save_pretrained(tmp_path / "merged")
    results = []
    for name in ("adapter", "merged"):
        out = tmp_path / f"of-{name}"
        assert main(command("--model", str(tmp_path / name), "--out", str(out))) == 0
        results.append(lines_of(out / "Dolly.seed10.jsonl"))
    assert results[0] == results[1]
    assert main(command("--out", str(tmp_path / "of-base"))) == 0
    assert lines_of(tmp_path / "of-base" / "Dolly.seed10.jsonl") != results[0]


def test_one_greedy_answer_is_enough(command, tmp_path, capsys):
    assert main(command("--temperature", "0")) == 0
    assert list(scores_of(tmp_path)["sets"]["Dolly"]["rouge_l"]["seeds"]) == ["10"]
    assert "temperature 0.0" in capsys.readouterr().out
    assert main(command("--temperature", "0")) == 0
    assert "temperature 0.0" in capsys.readouterr().out, "settings are printed with scores that were there"


def test_weights_of_another_model_are_refused(command, model_folder, capsys):
    weights = load_file(model_folder / "model.safetensors")
    save_file({f"module.{name}": tensor for name, tensor in weights.items()}, model_folder / "model.safetensors")
    assert main(command()) == 2
    error = capsys.readouterr().err
    assert "its weights don't fit its config.json: no lm_head.weight and " in error
    assert len(error.splitlines()) == 1


def test_names_with_brackets_are_no_markup(command, tmp_path, capsys):
    out = tmp_path / "o[x]y[/b]"
    assert main(command("--out", str(out), sets=[f"[bold]={tmp_path / 'set.jsonl'}"])) == 0
    output = capsys.readouterr().out
    assert "o[x]y[/b]" in output.replace("\n", "")
    assert "[bold]" in output


BAD = {
    "no model": (["--model", "./nowhere"], "model.path: ./nowhere: no such model folder"),
    "no set": (["--data", "dolly=nowhere.jsonl"], "dolly: nowhere.jsonl: no such file"),
    "set without a name": (["--data", "nowhere.jsonl"], "data: nowhere.jsonl: expected NAME=FILE"),
    "set's name is a path": (["--data", "a/b=quickstart:dev"], "\"a/b\" can't be a set's name"),
    "two of one name": (
        ["--data", "sinst=quickstart:dev", "s-ni=quickstart:dev"],
        "s-ni: there are two sets called Super-Natural",
    ),
    "a name twice": (
        ["--data", "dolly=quickstart:dev", "dolly=quickstart:test"],
        "data: dolly=quickstart:dev dolly=quickstart:test: a name is given twice",
    ),
    "out is a file": (["--out", "bare.jsonl"], "out: bare.jsonl can't be used: "),
    "out in a file": (["--out", "bare.jsonl/out"], "out: bare.jsonl/out can't be made: "),
    "empty set": (["--data", "mine=empty.jsonl"], "mine: empty.jsonl: has no rows"),
    "set without outputs": (
        ["--data", "mine=bare.jsonl"],
        'mine: bare.jsonl line 1: "output" must be a text or a list of texts to compare with, got null',
    ),
    "outputs of numbers": (["--data", "mine=numbers.jsonl"], 'mine: numbers.jsonl line 1: "output" must be'),
    "set is a folder": (["--data", "dolly=model"], "dolly: model is a folder, and expected is a file of it"),
    "a seed twice": (["--seeds", "10", "20", "10"], "seeds are [10, 20, 10]: one is given twice"),
    "huge seed": (["--seeds", "9" * 5000], "seeds: 999"),
    "seeds not numbers": (["--seeds", "10", "ten"], "seeds: ten: expected a whole number from 0"),
    "negative seed": (["--seeds=-1"], "seeds: -1: expected a whole number from 0"),
    "no out": (["--model", "model"], "out: missing, and model is no run's folder final/"),
    "no tokenizer": (["--model", "bare", "--out", "out"], "model: bare is a folder without a tokenizer"),
    "no GPU": (["--device", "cuda"], "device is cuda, but PyTorch sees no GPU"),
    "rows": (["--rows", "0"], "rows is 0, expected at least 1"),
    "temperature": (["--temperature", "-1"], "temperature is -1.0, expected at least 0"),
    "prompt length": (["--max-prompt-length", "0"], "max_prompt_length is 0, expected at least 1"),
    "no room": (
        ["--data", "mine=long.jsonl"],
        "mine: long.jsonl line 1: the prompt has 256 tokens, and the model 128 positions: no room for an answer",
    ),
    "no begin token": (["--bos"], "dolly: begin_token is true, but the tokenizer has no begin token"),
    "no template": (["--chat-template", "nowhere.jinja"], "chat_template: nowhere.jinja: can't be read (No such file"),
    "template is a folder": (["--chat-template", "model"], "chat_template: model: can't be read (Is a directory"),
    "empty template": (["--chat-template", "empty.jsonl"], "chat_template: empty.jsonl: is empty, expected a chat"),
    "binary template": (
        ["--chat-template", "model/model.safetensors"],
        "chat_template: model/model.safetensors: can't be",
    ),
    "broken template": (
        ["--chat-template", "broken.jinja"],
        "chat_template: broken.jinja: the chat template can't render a question and an answer",
    ),
    "text as template": (
        ["--chat-template", "bare.jsonl"],
        "chat_template: bare.jsonl: the chat template renders no answer of the assistant",
    ),
    "template's values": (
        ["--chat-template-kwargs", "{"],
        "chat_template_kwargs: {: expected a JSON object, for example",
    ),
    "values that are none": (["--chat-template-kwargs", "[1]"], "chat_template_kwargs: [1]: expected a JSON object"),
    "deep values": (["--chat-template-kwargs", "[" * 99999], "chat_template_kwargs: [[["),
    "lonely adapter": (["--model", "adapter"], "model: adapter/adapter_config.json names no base model"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_status_2(model_folder, write_jsonl, tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    arguments, message = BAD[name]
    for file, rows in {
        "empty.jsonl": [],
        "bare.jsonl": [{"instruction": "Say hello."}],
        "numbers.jsonl": [{"instruction": "Say hello.", "output": ["one", 2]}],
        "long.jsonl": [{"prompt": "word " * 400, "output": "x"}],
    }.items():
        write_jsonl(rows, file)
    (tmp_path / "broken.jinja").write_text("{% for m in messages %}{{ m.content }}")
    (tmp_path / "bare").mkdir()
    for file in model_folder.glob("[!t]*"):
        (tmp_path / "bare" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    monkeypatch.setattr(evaluator.loading, "load", lambda *_: pytest.fail("weights are loaded"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    defaults = {"--model": ["model"], "--data": ["dolly=quickstart:dev"], "--out": ["out"]}
    if name == "no out":
        del defaults["--out"]
    given = [part for key, values in defaults.items() if key not in arguments for part in (key, *values)]
    assert main([*given, *SHORT, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.fixture
def recipe(tmp_path):
    return functools.partial(write_recipe, tmp_path)


def test_result_is_scored_once(recipe, tmp_path, monkeypatch, capsys):
    assert train.main(recipe()) == 0
    folder = tmp_path / "runs" / "test"
    scores = json.loads((folder / "eval" / "scores.json").read_text())
    assert list(scores["sets"]["Dolly"]["rouge_l"]["seeds"]) == ["1", "2"]
    assert scores["settings"]["no_repeat_ngram_size"] == 6
    output = capsys.readouterr().out
    assert "Dolly" in output
    assert "and in each stage's report.md" in output
    assert (folder / "scores.md").read_text().startswith("|  | Dolly |\n")
    monkeypatch.setattr(evaluator.loading, "load", lambda *_: pytest.fail("weights are loaded for nothing"))
    assert train.main([*recipe(), "--resume"]) == 0
    monkeypatch.undo()
    # Test sets decide no weights: others may be asked for later, and the command of before says the same.
    assert train.main([*recipe("eval.seeds=[1,2,3]"), "--resume"]) == 0
    (folder / "eval").rename(tmp_path / "sampled")
    assert train.main([*recipe("eval.temperature=0"), "--resume"]) == 0
    scores = json.loads((folder / "eval" / "scores.json").read_text())
    assert scores["settings"]["temperature"] == 0
    shutil.rmtree(folder / "eval")
    (tmp_path / "sampled").rename(folder / "eval")
    again = ["--model", str(folder / "final"), "--data", f"dolly={tmp_path / 'set.jsonl'}", "--seeds", "2"]
    assert main([*again, "--max-prompt-length", "127", *SHORT]) == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("eval.rouge_rows=0", "eval.rouge_rows is 0, expected at least 1"),
        ("eval.seeds=[]", "eval.seeds are [], expected at least one"),
        ("eval.seeds=[1,1]", "eval.seeds are [1, 1]: one is given twice"),
        ("eval.temperature=-1", "eval.temperature is -1.0, expected at least 0"),
        ("eval.begin_token=true", "eval.sets.dolly: begin_token is true, but the tokenizer has no begin token"),
        ('eval.seeds="ten"', 'eval.seeds must be a list of numbers, got "ten"'),
        ('eval.sets={"dolly": 5}', "eval.sets.dolly must be text, got 5"),
        ('eval.sets={"dolly": "nowhere.jsonl"}', "eval.sets.dolly: nowhere.jsonl: no such file"),
        ("eval.sets=nowhere.jsonl", 'eval.sets must be an object, got "nowhere.jsonl"'),
        ("data.dev=null", "eval.rouge_rows: there is no data.dev whose rows could be answered"),
    ],
)
def test_bad_recipes(recipe, tmp_path, capsys, override, message):
    assert train.main(recipe(override)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("row", "override", "message"),
    [
        ({"prompt": "", "output": "x"}, "two:run.seed=10", "line 2: the prompt is empty: nothing predicts"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
            "two:tokenizer=quickstart",
            "line 2: has messages, but the tokenizer has no chat template",
        ),
        (ROWS[1], "two:data.max_length=200", "data.max_length is 200, but the student has 128 positions; lower it"),
    ],
)
def test_rows_of_test_sets_are_checked_before_the_first_stage(
    recipe, write_jsonl, tmp_path, capsys, monkeypatch, row, override, message
):
    sets = {"mine": write_jsonl([ROWS[0], row], "mine.jsonl")}
    arguments = recipe(override, sets=None)
    values = json.loads((tmp_path / "recipe.json").read_text())
    values["stages"] = {"one": {}, "between": {"student": {"path": "stage:one", "config": None}, "tokenizer": None}}
    values["stages"]["two"] = {
        "student": {"path": "stage:between", "config": None},
        "tokenizer": None,  # as the stages before have it
        "eval": {"sets": sets},
    }
    (tmp_path / "recipe.json").write_text(json.dumps(values))
    monkeypatch.setattr(evaluator.loading, "load", lambda *_: pytest.fail("weights are loaded"))
    for more in ((), ("--dry-run",)):
        assert train.main([*arguments, *more]) == 2
        assert message in capsys.readouterr().err


def test_generated_test_rows_accept_every_wording():
    rows = list(quickstart.rows("test"))
    assert all(len(row["output"]) == len(set(row["output"])) >= 2 for row in rows)
    by_question = {(row["instruction"], row["input"]): row["output"] for row in rows}
    seen = [row for row in quickstart.rows("train") if (row["instruction"], row["input"]) in by_question]
    assert len(seen) > 100
    assert all(row["output"] in by_question[row["instruction"], row["input"]] for row in seen)
