"""Rows of messages, with the chat templates that people bring: trained is what the assistant has to write."""

import pytest
from chat_texts import (
    ANSWER,
    CITIES,
    CONVERSATIONS,
    FORMATS,
    LAST,
    QUESTION,
    RESULTS,
    THOUGHTFUL,
    TOOLS,
    WITH_TOOLS,
    assistant,
    calls,
    pairs,
    samples,
    tokenizer_of,
    user,
)
from transformers import AddedToken, AutoTokenizer

from abkd_fast.data.chat import PromptFormat, end_of_turn
from abkd_fast.data.rows import Row
from abkd_fast.data.tokenize import encode_prompts, tokenize
from abkd_fast.errors import ConfigError


def style_of(name, train_on="all"):
    return PromptFormat(train_on=train_on, chat_template_kwargs=FORMATS[name].kwargs)


def row_of(conversation):
    tools = {"tools": TOOLS} if conversation in WITH_TOOLS else {}
    return Row(f"{conversation} line 1", {"messages": CONVERSATIONS[conversation], **tools})


def tokenized(name, values, train_on="all"):
    """The samples of one row."""
    rows = [values if isinstance(values, Row) else Row("rows line 1", values)]
    dataset = tokenize(rows, tokenizer_of(name), 2048, style=style_of(name, train_on)).dataset
    assert {*dataset["row"]} == {0}
    assert dataset["row_length"][:] == [len(ids) for ids in dataset["input_ids"]]
    return [*zip(dataset["input_ids"], dataset["spans"], strict=True)]


def ids_of(name, text):
    return tokenizer_of(name)(text, add_special_tokens=False)["input_ids"]


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def text_of(name, ids):
    return decode(tokenizer_of(name), ids)


def trained(name, values, train_on="all"):
    """The trained texts of a row, by sample."""
    return spans_of(name, tokenized(name, values, train_on))


def spans_of(name, tokenized_samples):
    return [
        [text_of(name, ids[start:stop]) for start, stop in zip(spans[::2], spans[1::2], strict=True)]
        for ids, spans in tokenized_samples
    ]


@pytest.fixture
def changed():
    """Gives the tokenizer of a format, to be changed for one test: `old` in its template becomes `new`."""

    def change(name, old="", new=""):
        tokenizer_of.cache_clear()
        tokenizer = tokenizer_of(name)
        assert old in tokenizer.chat_template
        tokenizer.chat_template = tokenizer.chat_template.replace(old, new) if old else tokenizer.chat_template
        return tokenizer

    yield change
    tokenizer_of.cache_clear()


def refusal(name, values, train_on="all"):
    with pytest.raises(ConfigError) as error:
        tokenized(name, values, train_on)
    return str(error.value)


@pytest.mark.parametrize("train_on", ["all", "last"])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", FORMATS)
def test_trained_are_the_turns_of_the_assistant(name, conversation, train_on):
    """And the tokens before each are those of the prompt: what the model is given when it answers."""
    form, row = FORMATS[name], row_of(conversation)
    if reason := (form.refused if train_on == "all" else form.last_refused).get(conversation):
        message = refusal(name, row, train_on)
        assert message.startswith(f"{conversation} line 1: ")
        assert reason in message
        assert "\n" not in message
        return
    expected, got = samples(name, conversation, train_on), tokenized(name, row, train_on)
    assert spans_of(name, got) == [[text for _, text in sample] for sample in expected]
    for sample, (ids, spans) in zip(expected, got, strict=True):
        for (prompt, _), start in zip(sample, spans[::2], strict=True):
            assert ids[:start] == ids_of(name, prompt)
        assert spans[-1] == len(ids)
        assert text_of(name, ids) == "".join(sample[-1])
        ends = tokenizer_of(name).convert_tokens_to_ids(form.end)
        assert [ids[stop - 1] for stop in spans[1::2]] == [ends] * len(sample)
    (prompt,) = encode_prompts([row], tokenizer_of(name), style_of(name))
    assert prompt == ids_of(name, expected[-1][-1][0])


@pytest.mark.parametrize("name", FORMATS)
def test_the_templates_render_what_the_table_says(name):
    """A check of the table: prompts are the templates', and so are answers, up to what the tokenizer has to add."""
    form, tokenizer = FORMATS[name], tokenizer_of(name)
    for conversation, messages in CONVERSATIONS.items():
        tools = TOOLS if conversation in WITH_TOOLS else None
        for train_on, refused in (("all", form.refused), ("last", form.last_refused)):
            if refused.get(conversation):
                continue
            turns = [turn for sample in samples(name, conversation, train_on) for turn in sample]
            places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
            for place, (prompt, text) in zip(places[-len(turns) :], turns, strict=True):
                options = {"tools": tools, "tokenize": False, **(form.kwargs or {})}
                rendered = tokenizer.apply_chat_template(messages[:place], add_generation_prompt=True, **options)
                assert rendered == prompt
                whole = tokenizer.apply_chat_template(messages[: place + 1], **options)
                if name == "no end token":
                    text = text.removesuffix(form.end)
                if name != "r1":  # its answers don't begin with its generation prompt
                    assert whole.startswith(prompt + text)


@pytest.mark.parametrize(
    ("name", "conversation", "spans"),
    [
        ("llama2", "turns", [3]),
        ("llama3", "turns", [3]),
        ("chatml", "turns", [3]),
        ("no generation prompt", "turns", [3]),
        ("mistral", "tools", [2]),
        ("qwen3", "agent", [2]),  # thoughts stay until the user asks again
        ("qwen3", "turns", [1, 1, 1]),  # the empty thoughts of the last turn alone are there
        ("qwen3", "reasoning", [1, 1]),
        ("qwen3 that may not think", "turns", [1, 1, 1]),  # the same, but in the prompt
        ("r1", "reasoning", [1, 1]),
        ("no end token", "turns", [1, 1, 1]),  # the end token that was trained is not in the history
    ],
)
def test_a_history_that_is_not_what_was_trained_begins_a_new_sample(name, conversation, spans):
    assert [len(texts) for texts in trained(name, row_of(conversation))] == spans


def test_some_texts_in_full():
    """Without the helpers of the table."""
    assert trained("llama2", row_of("spaces")) == [[" words here </s>", " the end </s>"]]
    assert trained("qwen3", row_of("plain")) == [["<think>\n\n</think>\n\nIt is 5.<|im_end|>"]]
    assert trained("qwen3 that may not think", row_of("plain")) == [["It is 5.<|im_end|>"]]
    assert trained("r1", row_of("reasoning"), "last") == [["Again.\n</think>\n\nStill 5.<|end|>"]]
    assert trained("no generation prompt", row_of("plain")) == [["<|im_start|>assistant\nIt is 5.<|im_end|>"]]
    assert trained("no end token", row_of("spaces"), "last") == [["\n\nthe end  <end>"]]
    assert trained("phi3", row_of("turns")) == [["It is 5.<|end|>", "Then 9.<|end|>", "Welcome!<|end|>"]]
    called = [
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Lima"}}\n</tool_call><|im_end|>',
        "Blue, and rain.<|im_end|>",
    ]
    assert trained("qwen2.5", row_of("tools")) == [called]


@pytest.mark.parametrize("name", FORMATS)
def test_a_question_alone_is_a_prompt_without_labels(name):
    values = {"messages": [QUESTION]}
    ((ids, spans),) = tokenized(name, values)
    prompt, _ = samples(name, "reasoning" if name == "r1" else "plain")[0][0]
    assert ids == ids_of(name, prompt)
    assert spans == [len(ids)] * 2


@pytest.mark.parametrize("name", FORMATS)
def test_end_of_turn(name):
    end = tokenizer_of(name).convert_tokens_to_ids(FORMATS[name].end)
    assert end_of_turn(tokenizer_of(name), style_of(name)) == (None if name == "no end token" else end)


@pytest.mark.parametrize("name", FORMATS)
def test_an_answer_that_brings_its_end_of_turn(name):
    end = FORMATS[name].end
    thoughts = {"reasoning_content": "Hm."} if name == "r1" else {}

    def values(content):
        return {"messages": [QUESTION, assistant(content, **thoughts)]}

    expected = tokenized(name, values("It is 5."))
    assert tokenized(name, values(f"It is 5.{end}")) == expected
    for content in (f"It is{end} 5.", f"{end}It is 5.", f"It is 5.{end}{end}", f"It{end} is 5.{end}"):
        message = refusal(name, values(content))
        assert message.startswith("rows line 1: ")
        assert end in message


@pytest.mark.parametrize("name", FORMATS)
def test_calls_of_tools_that_a_template_has_no_place_for(name):
    values = {"messages": [user("Weather?"), assistant("I look.", tool_calls=calls("Lima"))]}
    if name.startswith("qwen"):
        call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Lima"}}\n</tool_call><|im_end|>'
        ((text,),) = trained(name, values)
        assert text.removeprefix("<think>\n").removeprefix("\n</think>\n\n") == f"I look.\n{call}"
    else:
        message = refusal(name, values)
        if name == "mistral":  # it shows calls in place of the content
            assert "loses content" in message
        else:
            assert "loses a tool call" in message


@pytest.mark.parametrize(("role", "conversation"), [("user", "turns"), ("system", "system")])
def test_a_message_before_an_answer_that_a_template_loses(role, conversation, changed):
    changed("chatml", "in messages", f"in messages if message.role != '{role}'")
    assert f"loses a {role} message" in refusal("chatml", row_of(conversation))


# Losses that a look for the part's name in the text would not find, because the name stands elsewhere too.


def test_tools_that_a_question_names():
    values = {"messages": [user("Use get_weather for Lima."), assistant("It rains.")], "tools": TOOLS}
    assert "loses a tool" in refusal("chatml", values)
    assert trained("qwen2.5", values) == [["It rains.<|im_end|>"]]


def test_a_call_that_the_content_names():
    answer = assistant("I ask get_weather.", tool_calls=calls("Lima"))
    assert "loses a tool call" in refusal("chatml", {"messages": [CITIES, answer]})


def test_one_of_two_calls(changed):
    changed("qwen2.5", "in message.tool_calls or []", "in (message.tool_calls or [])[:1]")
    assert "loses a tool call" in refusal("qwen2.5", row_of("tools"))


def test_the_arguments_of_a_call(changed):
    changed("qwen2.5", "call.function.arguments | tojson", "'{}'")
    assert "loses a tool call" in refusal("qwen2.5", row_of("tools"))


@pytest.mark.parametrize(
    "thoughts", [{"reasoning_content": "5"}, {"reasoning": "Two and three."}, {"thinking": "Two and three."}]
)
def test_thoughts_that_the_content_repeats_or_of_another_name(thoughts):
    """Rows may have each of these names. Templates look for one of them."""
    values = {"messages": [QUESTION, assistant("It is 5.", **thoughts)]}
    assert f"loses {min(thoughts)}" in refusal("chatml", values)


def test_a_result_of_a_tool_that_a_template_loses(changed):
    changed("chatml", "in messages", "in messages if message.role != 'tool'")
    values = {"messages": [CITIES, assistant("I look."), RESULTS[0], LAST]}
    assert "loses a tool message" in refusal("chatml", values)


def test_thoughts_that_the_template_removes_from_the_content(changed):
    changed("r1", "<think>\n", "")
    assert "loses reasoning_content" in refusal("r1", row_of("reasoning"))
    assert "loses content" in refusal("r1", row_of("reasoning"), "last")
    assert trained("r1", row_of("plain")) == [["It is 5.<|end|>"]]


def test_an_end_of_turn_and_an_end_token_that_are_the_same(changed):
    """Phi 3's template writes the end token again where no answer is asked for. The first is the end of the turn."""
    changed("phi3").eos_token = "<|end|>"
    assert trained("phi3", row_of("turns")) == [["It is 5.<|end|>", "Then 9.<|end|>", "Welcome!<|end|>"]]


def test_tokens_that_take_the_spaces_after_them(changed):
    """As Phi 3's do: the tokens are the tokenizer's, whatever the template writes there."""
    names = FORMATS["phi3"].special.split()[1:]
    tokens = [AddedToken(name, rstrip=True, special=True, normalized=False) for name in names]
    changed("phi3").add_special_tokens({"additional_special_tokens": tokens})
    assert ids_of("phi3", "<|user|>\n\nHi") == ids_of("phi3", "<|user|>Hi")
    assert trained("phi3", row_of("turns")) == [["It is 5.<|end|>", "Then 9.<|end|>", "Welcome!<|end|>"]]
    assert trained("phi3", row_of("spaces")) == [["words here \n\n<|end|>", "the end  <|end|>"]]


@pytest.mark.parametrize(
    ("folder", "name"), [("llama2", "llama2"), ("mistral", "llama2"), ("qwen1.5", "chatml"), ("gpt2", "no end token")]
)
@pytest.mark.parametrize("conversation", ["plain", "turns", "spaces", "odd"])
def test_tokenizers_as_people_have_them(folder, name, conversation, shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / folder)
    tokenizer.chat_template = FORMATS[name].template
    dataset = tokenize([row_of(conversation)], tokenizer, 2048).dataset
    got = [
        (ids[:start], decode(tokenizer, ids[:stop]).removeprefix(decode(tokenizer, ids[:start])))
        for ids, spans in zip(dataset["input_ids"], dataset["spans"], strict=True)
        for start, stop in zip(spans[::2], spans[1::2], strict=True)
    ]
    # A history whose tokens differ from prompt and response, as spaces at the seam may make them, is another sample.
    assert got == [
        (tokenizer(prompt, add_special_tokens=False)["input_ids"], text.replace("<end>", tokenizer.eos_token))
        for prompt, text in pairs(name, conversation)
    ]


@pytest.mark.parametrize("name", ["llama2", "gemma", "mistral"])
def test_roles_that_do_not_alternate(name):
    message = refusal(name, {"messages": [QUESTION, QUESTION, ANSWER]})
    assert message == "rows line 1: the chat template fails (roles must alternate)"


def test_trained_messages_may_be_chosen():
    values = {"messages": CONVERSATIONS["turns"], "trained": [1, 3]}
    assert trained("chatml", values) == [["It is 5.<|im_end|>", "Then 9.<|im_end|>"]]
    assert trained("chatml", values, "last") == [["Then 9.<|im_end|>"]]


def test_thoughts_of_earlier_turns_are_no_part_of_the_prompt():
    """They are not lost where they are not trained: the model does not see them either."""
    values = {"messages": [QUESTION, THOUGHTFUL, user("Sure?"), assistant("Yes.")]}
    assert trained("chatml", values, "last") == [["Yes.<|im_end|>"]]
    assert "loses reasoning_content" in refusal("chatml", values)


def test_a_conversation_that_begins_with_an_answer():
    values = {"messages": [assistant("Hello."), QUESTION, ANSWER]}
    message = refusal("chatml", values)
    assert "begins with an answer, to which there is no prompt" in message
    assert trained("chatml", values, "last") == [["It is 5.<|im_end|>"]]
    assert trained("chatml", {**values, "trained": [2]}) == [["It is 5.<|im_end|>"]]


def test_thoughts_whose_beginning_the_generation_prompt_has():
    """As servers of R1 write them."""
    values = {"messages": [QUESTION, assistant("Hm.\n</think>\n\nIt is 5.")]}
    assert trained("r1", values) == [["Hm.\n</think>\n\nIt is 5.<|end|>"]]


def test_a_generation_prompt_that_closes_the_thoughts(changed):
    """And a template that renders answers without them."""
    changed("r1", "<think>\n", "<think>\n\n</think>\n\n")
    assert trained("r1", row_of("plain")) == [["It is 5.<|end|>"]]
    for thoughts in ({"reasoning_content": "Hm."}, {"content": "<think>\nHm.\n</think>\n\n5"}):
        message = refusal("r1", {"messages": [QUESTION, assistant("It is 5.") | thoughts]})
        assert "closes <think>, but the answer has thoughts" in message


def test_thoughts_in_two_places():
    answer = assistant("<think>\nHm.\n</think>\n\nIt is 5.", reasoning_content="Hm.")
    assert "has both reasoning_content and <think>" in refusal("r1", {"messages": [QUESTION, answer]})


def test_an_end_of_turn_of_two_tokens(changed):
    """As Command R7B's. The last one is the end, and both are trained."""
    changed("chatml", "<|im_end|>", "<|im_end|><end>")
    assert end_of_turn(tokenizer_of("chatml"), style_of("chatml")) == tokenizer_of("chatml").convert_tokens_to_ids(
        "<end>"
    )
    assert trained("chatml", row_of("turns"))[0][0] == "It is 5.<|im_end|><end>"


def test_a_line_end_that_is_a_token_of_its_own(changed):
    """As in Gemma's tokenizer. It ends no turn."""
    changed("chatml").add_tokens(["\n"])
    assert trained("chatml", row_of("plain")) == [["It is 5.<|im_end|>"]]
    changed("no end token").add_tokens(["\n"])
    assert end_of_turn(tokenizer_of("no end token"), style_of("no end token")) is None


def test_a_cut_answer_without_weight_leaves_the_ends_of_others():
    values = {"messages": [*CONVERSATIONS["turns"]], "trained": [1, 3], "ended": False}
    assert trained("chatml", values) == [["It is 5.<|im_end|>", "Then 9.<|im_end|>"]]
    assert trained("chatml", {**values, "trained": [1, 3, 5]})[0][-1] == "Welcome!"
    assert "all have weight 0" in refusal("chatml", {**values, "trained": []})


def test_messages_before_an_answer_that_is_to_be_written():
    """They may end with an answer, which stays in the prompt."""
    values = {"messages": [QUESTION, ANSWER], "is_prompt": True}
    (prompt,) = encode_prompts([Row("rows line 1", values)], tokenizer_of("chatml"), style_of("chatml"))
    ((ids, spans),) = tokenized("chatml", values)
    assert prompt == ids
    assert spans == [len(ids)] * 2
    assert "It is 5." in text_of("chatml", prompt)


def test_a_template_that_nobody_needs_disturbs_nobody(changed):
    tokenizer = changed("chatml")
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    rows = [Row("rows line 1", {"prompt": "Add", "output": " 3"}), Row("rows line 2", {"messages": [QUESTION, ANSWER]})]
    assert len(tokenize(rows[:1], tokenizer, 64).dataset) == 1
    assert end_of_turn(tokenizer, PromptFormat()) is None
    with pytest.raises(ConfigError, match="line 2: the chat template can't render a question and an answer"):
        tokenize(rows, tokenizer, 64)
    (note,) = tokenize(rows, tokenizer, 64, on_bad_row="skip").notes(rows, 64)
    assert note.startswith("1 of 2 rows are left out: rows line 2: the chat template can't")


def test_rows_that_lack_some_answers_are_told_from_rows_that_are_left_out():
    """Qwen 3's template gives each turn a sample. Those with a long history have too long a prompt."""
    rows = [row_of("turns"), row_of("plain")]
    tokenizer, style = tokenizer_of("qwen3"), style_of("qwen3")
    prompts = [spans[0] for _, spans in tokenized("qwen3", row_of("turns"))]
    assert prompts == sorted(prompts)
    result = tokenize(rows, tokenizer, 2048, prompts[0], style)
    assert result.dataset["row"][:] == [0, 1]
    (note,) = result.notes(rows, 2048)
    assert note.startswith(
        f"1 of 2 rows lack some of their answers: {rows[0].where}: the prompt has {prompts[-1]} tokens"
    )
