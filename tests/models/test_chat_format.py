"""What a run's data were rendered with stays with its tokenizer."""

import copy

import pytest

from abkd_fast.data import quickstart
from abkd_fast.data.chat import PromptFormat
from abkd_fast.models.tokenizers import keep_chat_format

QUESTION = [{"role": "user", "content": "Hi"}]
TEMPLATE = "\n{% for m in messages %}[{{ m.role }}{{ mode }}] {{ m.content }}{% endfor %}"


@pytest.fixture
def tokenizer():
    tokenizer = copy.deepcopy(quickstart.tokenizer())
    tokenizer.add_special_tokens({"bos_token": "<begin>"})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def rendered(tokenizer, **kwargs):
    return tokenizer.apply_chat_template(QUESTION, tokenize=False, **kwargs)


@pytest.mark.parametrize("value", ["B", 'it\'s \\ "so"\n', True, None, 5, 2.5, ["a", None], {"a": [True]}])
def test_values_of_the_template(tokenizer, tmp_path, value):
    expected = rendered(tokenizer, mode=value)
    style = PromptFormat(chat_template_kwargs={"mode": value})
    for _ in range(2):  # the next stage keeps them again
        keep_chat_format(tokenizer, style)
        assert rendered(tokenizer) == expected
    assert tokenizer.chat_template.count("set mode") == 1
    assert rendered(tokenizer, mode="other") == "\n[userother] Hi"  # a command may still give another
    tokenizer.save_pretrained(tmp_path)
    assert rendered(type(tokenizer).from_pretrained(tmp_path)) == expected


def test_several_templates(tokenizer):
    tokenizer.chat_template = {"default": TEMPLATE, "other": "other" + TEMPLATE}
    keep_chat_format(tokenizer, PromptFormat(chat_template_kwargs={"mode": "B"}))
    assert rendered(tokenizer) == "\n[userB] Hi"
    assert rendered(tokenizer, chat_template="other") == "other\n[userB] Hi"


def test_a_begin_token_that_the_template_lacks(tokenizer):
    keep_chat_format(tokenizer, PromptFormat(begin_token=False))
    assert tokenizer.chat_template == TEMPLATE
    for _ in range(2):
        keep_chat_format(tokenizer, PromptFormat(begin_token=True))
        assert rendered(tokenizer) == "<begin>\n[user] Hi"
