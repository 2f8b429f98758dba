"""What libraries raise while they read something of the user's is one line, and --debug shows where it comes from."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from abkd_fast.config.models import ModelConfig
from abkd_fast.data import quickstart
from abkd_fast.data.chat import PromptFormat
from abkd_fast.data.encode import Encoder
from abkd_fast.data.rows import Row
from abkd_fast.errors import ConfigError, first_line, origin, reading
from abkd_fast.models import loading, tokenizers
from abkd_fast.train import main
from bad_recipes import GOOD, SMALL


class PanicException(BaseException):
    """What libraries in Rust raise, by its name."""


@pytest.mark.parametrize(
    "error",
    [
        AttributeError("x"), KeyError("x"), IndexError("x"), TypeError("x"), OverflowError("x"), RecursionError("x"),
        ValueError("x\ny"), OSError(5, "x"), Exception("x"), MemoryError(), PanicException("x"),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_any_error_of_a_library_is_one_line_with_its_cause(error):
    with pytest.raises(ConfigError) as caught, reading("model/x can't be read", ": get it again", "key"):
        raise error
    assert str(caught.value) == f"model/x can't be read ({first_line(error)}): get it again"
    assert caught.value.key == "key"
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [ConfigError("x"), KeyboardInterrupt(), SystemExit(3)])
def test_what_is_no_librarys_error_stays_as_it_is(error):
    with pytest.raises(type(error)) as caught, reading("model/x can't be read"):
        raise error
    assert caught.value is error


def test_the_origin_is_found_behind_lines_that_say_more():
    def name_the_row():
        try:
            with reading("x"):
                raise IndexError("y")
        except ConfigError as error:
            raise ConfigError(f"row 1: {error}") from None

    with pytest.raises(ConfigError, match=r"row 1: x \(y\)") as caught:
        name_the_row()
    assert type(origin(caught.value)) is IndexError
    alone = ConfigError("z")
    assert origin(alone) is alone


@pytest.mark.parametrize("is_asked", [False, True])
def test_debug_shows_the_traceback_before_the_line(tmp_path, monkeypatch, capsys, is_asked):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.json").write_text(json.dumps({**GOOD, "tokenizer": "broken"}))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/tokenizer.json").write_text("[]")
    assert main(["--config", "recipe.json", *["--debug"] * is_asked]) == 2
    *trace, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: tokenizer: broken: no tokenizer there (")
    assert bool(trace) == is_asked
    if is_asked:
        assert trace[0].startswith("Traceback (most recent call last)")
        assert "transformers" in "".join(trace)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**SMALL)).save_pretrained(folder)
    quickstart.tokenizer().save_pretrained(folder)
    return folder


def nested(depth):
    return '{"a": ' + "[" * depth + "]" * depth + "}"


CONTENTS = {
    "empty": "",
    "cut": "{",
    "a list": "[]",
    "a text": '"x"',
    "a number": "5",
    "nothing": "null",
    "not UTF-8": b"\xff\xfe\0",
    "digits": '{"a": ' + "9" * 5000 + "}",
    "endless nesting": "[" * 100_000,
    "deep": nested(300),
}


def read(folder):
    loading.read_meta_model(ModelConfig(path=str(folder)), "student")
    tokenizer = tokenizers.read_tokenizer(str(folder), "tokenizer")
    tokenizers.end_tokens(str(folder), tokenizer, PromptFormat())


FILES = "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("content", CONTENTS)
def test_a_damaged_file_of_a_model_is_one_line(folder, file, content):
    path, damaged = folder / file, CONTENTS[content]
    before = path.read_bytes()
    path.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
    try:
        with pytest.raises(ConfigError, match=r"^[^\n]+\([^\n]+\)"):
            read(folder)
    finally:
        path.write_bytes(before)


def test_a_tokenizer_that_fails_at_a_text_names_the_row():
    """tokenizers raises a plain Exception, and transformers passes it on."""
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<end>": 2}, unk_token="<none>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder = Encoder(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>"), PromptFormat())
    rows = [Row(f"x line {number}", {"prompt": text, "output": " b"}) for number, text in enumerate("abca", 1)]
    good, _, bad, last = encoder.encode(rows)
    assert good == last != []
    assert str(bad).startswith("the tokenizer can't encode its text (WordLevel error: Missing [UNK] token")
    with pytest.raises(ConfigError, match=r"^x line 3: the tokenizer can't encode its text"):
        encoder.encode_prompts(rows)
    with pytest.raises(ConfigError, match=r"^x line 3: the tokenizer can't encode its text"):
        encoder.encode_prompts(rows[2:3])


def test_a_model_that_the_library_can_not_load(folder):
    spec = ModelConfig(path=str(folder))
    whole = loading.read_meta_model(spec, "student").whole
    path = folder / "model.safetensors"
    before = path.read_bytes()
    path.write_bytes(before[:-8])
    try:
        with pytest.raises(ConfigError, match=r"student.path: .*: its weights can't be read \("):
            loading.load(spec, whole, "student", torch.float32, torch.device("cpu"))
    finally:
        path.write_bytes(before)
