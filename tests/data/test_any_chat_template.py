"""Chat templates put together at random, wrong ones too, with random messages: right, or one line."""

import json

import pytest
from chat_texts import TOOLS, calls, tokenizer_of
from hypothesis import example, given, settings
from hypothesis import strategies as st

from abkd_fast.data.chat import PromptFormat
from abkd_fast.data.encode import Encoder
from abkd_fast.data.rows import Row
from abkd_fast.errors import ConfigError

EXPRESSIONS = (
    "message.content|message.role|message.content or ''|message['content'] ~ ''|bos_token|eos_token|'<|im_end|>'"
    "|message.missing|message.missing.deeper|missing|missing()|message.content()|message.content.__class__|messages"
    "|message.content + 5|message.content - 'a'|message.content * 3|message.content[:3]|message.content[::-1]"
    "|messages[99].content|messages[-1].content|messages[0].content|1 / 0|1 % 0|-'a'|not 5|1 < 'a'|range(10 ** 9)"
    "|raise_exception('no')|raise_exception('a\\nb')|raise_exception()|raise_exception('')|loop.index|loop.last"
    "|loop.nextitem.role|self.x()|super()|tools|message.tool_calls|message.reasoning_content|'\\x00'|'\\u2028'"
    "|strftime_now('%Y')|strftime_now(5)|'%d' % 'a'|'{}'.format()|namespace(a=1).b.c|dict(a=1).a|[1, 2][5]|{}['a']"
    "|add_generation_prompt|'a' * 10000|{{ }}|)|'|\"|"
)
FILTERS = (
    "trim|upper|lower|length|first|last|tojson|safe|e|string|int|float|list|join|title|capitalize|nofilter|indent(3)"
    "|replace('a', 'b')|replace()|truncate(5)|default('x')|wordwrap(5)|center(99)"
)
STATEMENTS = (
    "{% if %}|{% endif %}|{% endfor %}|{% for %}|{% for x in 5 %}{% endfor %}|{% for x in message %}{{ x }}{% endfor %}"
    "|{% set x = message.content %}{{ x }}|{% set messages = [] %}|{% set loop = 5 %}|{% set a, b = 5 %}"
    "|{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}|{% include 'x' %}|{% extends 'x' %}|{% import 'x' as y %}"
    "|{% break %}|{% continue %}|{% generation %}|{% endgeneration %}|{% generation %}{{ message.content }}"
    "{% endgeneration %}|{% raw %}|{# |#}|{%|%}|{{|}}|{% do messages.append(5) %}|{% do message.update({'a': 5}) %}"
    "|{% if loop.last %}{{ eos_token }}{% endif %}|{% if loop.first %}{{ bos_token }}{% endif %}"
    "|{% block x %}{% endblock %}|{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}"
    "|{% call f() %}{% endcall %}|{% unknown %}"
    "|{% if message.role == 'system' %}{{ raise_exception('none') }}{% endif %}|{% with %}{% endwith %}"
)
TEXTS = (
    *("<|im_start|>", "<|im_end|>", "<|im_end|>\n", "<|endoftext|>", "<end>", "\n", "  ", ": ", "[/INST]", "assistant"),
    *("</think>\n", "<think>\n", "#", "é", "🙂"),
)
TERMS = st.sampled_from(EXPRESSIONS.split("|")) | st.builds(
    "{} | {}".format, st.sampled_from(EXPRESSIONS.split("|")[:8]), st.sampled_from(FILTERS.split("|"))
)
GOOD = ("", "{{ bos_token }}", "{{ eos_token }}", "{{ message.role }}", "{{ message.content }}", "{{ '' }}")
PIECES = (
    st.sampled_from(TEXTS)
    | st.sampled_from(TEXTS + GOOD)
    | st.sampled_from(TEXTS + GOOD)
    | st.sampled_from(TEXTS + GOOD)
    | st.sampled_from(STATEMENTS.split("|"))
    | TERMS.map("{{{{ {} }}}}".format)
    | TERMS.map("{{%- if {} %}}x{{% endif %}}".format)
)
FEW = st.just("") | st.just("") | PIECES
PROMPTS = ("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n", "assistant: ", "", "<|im_end|> ")


@st.composite
def templates(draw):
    """Mostly a loop over messages, with a few pieces at any place, or in place of one that has to be there."""
    body = ["<|im_start|>", "{{ message.role }}", "\n", "{{ message.content }}", "<|im_end|>", "\n"]
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.integers(0, len(body)))
        body[place : place + draw(st.integers(0, 1))] = [draw(PIECES)]
    prompt = draw(st.sampled_from(PROMPTS))
    asked = draw(st.sampled_from([f"{{% if add_generation_prompt %}}{prompt}{{% endif %}}", "", prompt]))
    loop = "{% for message in messages %}" + "".join(body) + "{% endfor %}"
    return draw(FEW) + loop + draw(FEW) + asked + draw(FEW)


CONTENTS = st.lists(
    st.sampled_from([*TEXTS, "It is 5.", " a\n", "", "<think>\nHm.\n</think>\n\nYes", "{{ 5 }}", "<b>", '"\\'])
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
    max_size=3,
).map("".join)
ROLES = st.sampled_from(["user", "user", "assistant", "assistant", "system", "tool"])
MORE = st.fixed_dictionaries(
    {},
    optional={
        "reasoning_content": CONTENTS,
        "tool_calls": st.sampled_from([calls("Lima"), [{"function": None}], [{}], [{"function": {"name": 5}}]]),
        "name": st.just("x"),
    },
)
PLAIN = st.builds(lambda role, content: {"role": role, "content": content}, ROLES, CONTENTS)
MESSAGES = st.lists(PLAIN | st.builds(lambda plain, more: {**plain, **more}, PLAIN, MORE), min_size=1, max_size=5)
CHATS = st.lists(CONTENTS, min_size=2, max_size=6).map(
    lambda texts: [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]
)
SOME_TOOLS = st.sampled_from([TOOLS, [{}], [{"name": "a"}]])
VALUES = st.fixed_dictionaries({"messages": MESSAGES | CHATS}, optional={"tools": SOME_TOOLS})
HELLO = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "It is 5."}]


def bare(text):
    return "".join(text.split())


def shows(text, content):
    """Whether a text has a content; white space may differ, and JSON may escape characters."""
    ways = bare(content), bare(json.dumps(content, ensure_ascii=False)[1:-1]), bare(json.dumps(content)[1:-1])
    return any(way in bare(text) for way in ways)


@settings(max_examples=400, deadline=None)
@given(template=templates(), values=VALUES, train_on=st.sampled_from(["all", "last"]))
@example("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", {"messages": HELLO}, "all")
@example("{{ 'a' * 10 ** 15 }}", {"messages": HELLO}, "all")
@example("{{ raise_exception('a\nb') }}", {"messages": HELLO}, "all")
@example("", {"messages": HELLO}, "all")
def test_any_template_and_messages_are_right_or_one_line(template, values, train_on):
    tokenizer, row = tokenizer_of("chatml"), Row("a row", values)
    original, tokenizer.chat_template = tokenizer.chat_template, template
    try:
        encoder = Encoder(tokenizer, PromptFormat(train_on=train_on))
        (result,) = encoder.encode([row])
        if not isinstance(result, ConfigError):
            (prompt,) = encoder.encode_prompts([row])
    except ConfigError as error:
        result = error
    finally:
        tokenizer.chat_template = original
    if isinstance(result, ConfigError):
        assert str(result)
        assert "\n" not in str(result)
        return
    messages = values["messages"]
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    is_answered = messages[-1]["role"] == "assistant"
    answers = (answers if train_on == "all" else answers[-1:]) if is_answered else []
    trained = []
    for ids, spans in result:
        assert spans[0] >= 1
        assert spans == sorted(spans)
        assert spans[-1] == len(ids)
        for start, stop in zip(spans[::2], spans[1::2], strict=True):
            if is_answered:
                trained.append(tokenizer.decode(ids[start:stop], clean_up_tokenization_spaces=False))
    assert result[-1].input_ids[: result[-1].spans[-2]] == prompt
    assert len(trained) == len(answers)
    for content, text in zip(answers, trained, strict=True):
        content = content.rstrip().removesuffix("<|im_end|>").removesuffix("<end>").removesuffix("<|endoftext|>")
        prompted = "x" if "add_generation_prompt %}x{% endif" in template else ""  # may be the answer's first character
        content = content.removeprefix("<think>\n").removeprefix(prompted)
        assert shows(text.removesuffix("<|endoftext|>"), content)


@pytest.mark.parametrize("half", ["\ud800", "{{ '\\ud800' }}"])
def test_half_of_a_surrogate_pair_in_a_template(half):
    template = "{% for message in messages %}{{ message.content }}HALF{% endfor %}".replace("HALF", half)
    test_any_template_and_messages_are_right_or_one_line.hypothesis.inner_test(template, {"messages": HELLO}, "all")
