"""Prompt and response meet at a seam. No token is lost, added or merged there."""

import copy
import functools
import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from abkd_fast.data import encode, quickstart
from abkd_fast.data.chat import PromptFormat
from abkd_fast.data.encode import Encoder
from abkd_fast.data.rows import Row, read_rows
from abkd_fast.data.tokenize import tokenize
from abkd_fast.errors import ConfigError
from conftest import SHARED

NAMES = ("gpt2", "llama2", "mistral", "qwen1.5")
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]

# What people write: words and numbers, every kind of space, punctuation, emoji of several characters, marks that
# combine with the letter before, scripts from right to left.
PIECES = (
    "Q:|A: |Answer|answer|cap|ital|1|12|3.14|=|==|:|(|)|...|'s|don't|<b>|</|[INST]|###|_|--|x| |  |\n|\n\n|\t|\r\n"
    "|\u00a0|\u3000|🙂|👍🏽|👩\u200d👧|é|e\u0301|\u0301|ﬁ|ß|مرحبا|שלום|नमस्ते|你好|。|ไทย|\u200d|\u202e"
)
TEXTS = st.lists(st.sampled_from(PIECES.split("|")) | st.text(max_size=3), max_size=8).map("".join)


@functools.cache
def tokenizer_of(name):
    folder = SHARED / "tokenizers" / name
    if not folder.is_dir():
        pytest.skip(f"no tokenizer at {folder}; set ABKD_TEST_DATA to a folder with some")
    return AutoTokenizer.from_pretrained(folder)


def only_sample(tokenizer, prompt, output, style=PromptFormat(), **more):  # noqa: B008 - it is frozen
    (result,) = Encoder(tokenizer, style).encode([Row("a row", {"prompt": prompt, "output": output, **more})])
    if isinstance(result, ConfigError):
        raise result
    (sample,) = result
    return sample


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def normal(tokenizer, text):
    """A text as the tokenizer itself normalizes it; the space that some put first is not part of it."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    is_unicode = isinstance(normalizer, normalizers.NFC)
    return normalizer.normalize_str(text) if is_unicode else text


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150, deadline=None)
@given(prompt=TEXTS, output=TEXTS)
@example("Q: capital?\nA: ", "Paris")
@example("One\n\n", "\ntwo")
@example("The cap", "ital")
@example("caf", "é")
@example("cafe", "\u0301 e\u0301")
@example("x =", "= 5")
@example("12", "3")
@example("👩", "\u200d👧")
@example("  ", "  x")
def test_prompt_and_response_decode_to_the_whole_text(name, prompt, output):
    tokenizer = tokenizer_of(name)
    alone = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    special = {*tokenizer.all_special_tokens}
    if not prompt or not alone or not output.strip() or any(token in prompt + output for token in special):
        return
    ids, (start, stop) = only_sample(tokenizer, prompt, output, PromptFormat(begin_token=False))
    assert ids[:start] == alone  # what generation gives the model
    assert stop == len(ids)
    assert stop - start >= 2
    assert ids[-1] == tokenizer.eos_token_id
    assert not {*ids[:-1]} & {*tokenizer.all_special_ids}
    text = decode(tokenizer, ids[:-1])
    first = decode(tokenizer, alone)
    assert normal(tokenizer, text) == normal(tokenizer, first + output)
    assert normal(tokenizer, first.lstrip(" ")) == normal(tokenizer, prompt.lstrip(" "))


@pytest.mark.parametrize("name", NAMES)
def test_the_papers_tokens_are_what_they_were(name, shared, write_indexed):
    """The papers tokenize prompt and response together and take what follows the tokens of the prompt."""
    tokenizer = tokenizer_of(name)
    rows = read_rows(str(shared / "data" / "dolly" / "train.jsonl"), 3000 if name == "gpt2" else 600)
    pairs = [(row.values["prompt"], row.values["output"]) for row in rows]
    prompts = tokenizer([prompt for prompt, _ in pairs], add_special_tokens=False)["input_ids"]
    wholes = tokenizer([prompt + output for prompt, output in pairs], add_special_tokens=False)["input_ids"]
    style = PromptFormat(begin_token=False)
    dataset = tokenize(rows, tokenizer, 10_000, style=style).dataset
    assert dataset["row"][:] == [*range(len(rows))]
    assert dataset["input_ids"][:] == [[*ids, tokenizer.eos_token_id] for ids in wholes]
    assert [spans[0] for spans in dataset["spans"]] == [*map(len, prompts)]
    if len(tokenizer) > 65535:
        return
    # The papers' tools write the same tokens to binary files, prompt and response with a separator between them.
    items = [
        [*whole[: len(prompt)], 65535, *whole[len(prompt) :], tokenizer.eos_token_id]
        for prompt, whole in zip(prompts, wholes, strict=True)
    ]
    binary = tokenize(read_rows(write_indexed(items)), tokenizer, 10_000, style=style).dataset
    for column in ("input_ids", "spans"):
        assert binary[column][:] == dataset[column][:]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("begin", ["auto", True, False])
def test_begin_tokens(name, begin):
    tokenizer, style = tokenizer_of(name), PromptFormat(begin_token=begin)
    if begin is True and tokenizer.bos_token is None:
        with pytest.raises(ConfigError, match="the tokenizer has no begin token"):
            Encoder(tokenizer, style)
        return
    added = begin is True or (begin == "auto" and name in ("llama2", "mistral"))
    expected = [tokenizer.bos_token_id] * added + tokenizer("Hi", add_special_tokens=False)["input_ids"]
    ids, (start, _) = only_sample(tokenizer, "Hi", " there", style)
    assert ids[:start] == expected
    row = Row("a row", {"prompt": "Hi"})
    assert Encoder(tokenizer, style).encode_prompts([row]) == [expected]
    if added:  # a prompt that begins with one gets no second
        ids, _ = only_sample(tokenizer, tokenizer.bos_token + "Hi", " there", style)
        assert ids.count(tokenizer.bos_token_id) == 1 + (tokenizer.bos_token_id == tokenizer.eos_token_id)


def test_begin_token_of_messages_is_the_templates():
    tokenizer = copy.deepcopy(tokenizer_of("llama2"))
    for begin_of_template, count in (("", 0), ("{{ bos_token }}", 1)):
        tokenizer.chat_template = begin_of_template + "{% for m in messages %}[{{ m.content }}]{% endfor %}"
        for begin, expected in (("auto", count), (True, 1), (False, count)):
            encoder = Encoder(tokenizer, PromptFormat(begin_token=begin))
            ((sample,),) = encoder.encode([Row("a row", {"messages": MESSAGES})])
            assert sample.input_ids[: sample.spans[0]].count(tokenizer.bos_token_id) == expected


def test_the_end_token_is_not_doubled_and_ends_nothing_in_the_middle():
    tokenizer = quickstart.tokenizer()
    plain = only_sample(tokenizer, "Add 1 and 2.", " It is 3.")
    assert only_sample(tokenizer, "Add 1 and 2.", " It is 3.<end>") == plain
    assert only_sample(tokenizer, "Add 1 and 2.", " It is 3.", ended=False).input_ids == plain.input_ids[:-1]
    with pytest.raises(ConfigError, match="has the end token <end> in its middle"):
        only_sample(tokenizer, "Add 1 and 2.", " It is<end> 3.")


def test_an_output_that_brings_the_templates_end_of_turn():
    tokenizer = tokenizer_of("qwen1.5")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ids, (start, _) = only_sample(tokenizer, prompt, "Hello<|im_end|>")
    assert ids[start:] == [*tokenizer("Hello")["input_ids"], end]


def test_a_tokenizer_that_cannot_continue_a_word_is_refused():
    vocabulary = {
        token: index for index, token in enumerate(["[UNK]", "[END]", "the", "cap", "##ital", "it", "##al", "capital"])
    }
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[END]")
    with pytest.raises(ConfigError, match="no tokens for 'ital' that continue 'the cap'"):
        only_sample(tokenizer, "the cap", "ital")
    assert only_sample(tokenizer, "the", " capital").input_ids == [2, 7, 1]


@pytest.mark.parametrize("name", NAMES)
def test_of_a_long_text_the_beginning_is_enough(name, monkeypatch):
    tokenizer = tokenizer_of(name)
    texts = ["word 123 né. " * 3000, "supercalifragilistic" * 3000, " " * 50_000 + "x", "a\n\n" * 9000, "the " * 20_000]
    texts += [
        "a" * 60_001,
        "".join(map(str, range(20_000))),
        "你好吗。" * 9000,
        "👩\u200d👧é" * 9000,
        "abcdefghij" * 6000,
    ]
    rows = [Row("a row", {"prompt": "Q:\n", "output": text}) for text in texts]
    rows += [Row("a row", {"prompt": text, "output": "Yes."}) for text in texts]

    def beginnings():
        samples = [sample for (sample,) in Encoder(tokenizer, PromptFormat(), 64).encode(rows)]
        return [(sample.input_ids[:64], min(64, sample.spans[0])) for sample in samples], samples

    short, lengths = beginnings()
    monkeypatch.setattr(encode, "LONG_TEXT", 10**9)
    whole, _ = beginnings()
    assert short == whole
    assert min(len(sample.input_ids) for sample in lengths) > 64
    assert len(lengths[0].input_ids) < 64 * encode.LONG_TEXT


def test_token_ids_are_taken_as_they_are():
    tokenizer = quickstart.tokenizer()
    rows = [
        Row("lists", {"prompt_ids": [5, 6], "output_ids": [7, 0]}),
        Row("arrays", {"prompt_ids": np.array([5], "<u2"), "output_ids": np.array([8, 9], "<u2")}),
        Row("to be written", {"prompt_ids": [5, 6]}),
        Row("foreign", {"prompt_ids": [5], "output_ids": [len(tokenizer)]}),
        Row("empty", {"prompt_ids": [], "output_ids": [5]}),
        Row("text", {"prompt": "Add", "output": " 3"}),
    ]
    first, second, third, foreign, empty, text = Encoder(tokenizer, PromptFormat(begin_token="auto")).encode(rows)
    assert first == [([5, 6, 7, 0], [2, 4])]
    assert second == [([5, 8, 9], [1, 3])]
    assert third == [([5, 6], [2, 2])]
    assert f"has token id {len(tokenizer)}" in str(foreign)
    assert "the prompt is empty" in str(empty)
    assert decode(tokenizer, text[0].input_ids) == "Add 3<end>"


def test_stored_tokens_follow_everything_that_they_depend_on(write_jsonl):
    """Every special token, the template, its arguments, the format and the limits have files of their own."""
    rows = read_rows(write_jsonl([{"messages": MESSAGES}]))
    base = copy.deepcopy(quickstart.tokenizer())
    base.add_special_tokens({"additional_special_tokens": ["<one>", "<two>"]})
    base.chat_template = "{% for m in messages %}{{ bos_token }}{{ m.content }}{{ extra }}{% endfor %}"
    base.bos_token = "<one>"
    other_bos, other_template = copy.deepcopy(base), copy.deepcopy(base)
    other_bos.bos_token = "<two>"
    other_template.chat_template = base.chat_template + " "
    settings_of = [
        (base, PromptFormat()),
        (other_bos, PromptFormat()),
        (other_template, PromptFormat()),
        (base, PromptFormat(chat_template_kwargs={"extra": "!"})),
        (base, PromptFormat(train_on="last")),
    ]
    texts = [
        json.dumps([*tokenize(rows, tokenizer, 64, style=style).dataset]) + tokenizer.bos_token
        for tokenizer, style in settings_of
    ]
    prints = [tokenize(rows, tokenizer, 64, style=style).dataset._fingerprint for tokenizer, style in settings_of]
    assert len({*prints}) == len(settings_of)
    assert texts[0] != texts[1]
    assert texts[0] != texts[3]
