"""Formats of rows: each comes to one of three shapes, or is refused in one line that names what is wrong."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abkd_fast.data.formats import OURS, PROMPT, PROMPT_WITH_INPUT, check_row
from abkd_fast.data.rows import read_rows
from abkd_fast.errors import ConfigError

USER, HELLO = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
EMPTY = {"role": "assistant", "content": " "}
CALL = {"type": "function", "function": {"name": "time", "arguments": {"zone": "UTC"}}}
TOOL = {"type": "function", "function": {"name": "time", "parameters": {"type": "object"}}}
RESULT = {"role": "tool", "content": "12"}
SYSTEM = {"role": "system", "content": "Be kind."}
SAY = {"prompt": PROMPT.format(instruction="Say"), "output": "Hello"}
SAY_WITH = {"prompt": PROMPT_WITH_INPUT.format(instruction="Say", input="it"), "output": "Hello"}
PLAIN = {"prompt": "Say", "output": "Hello"}
CHAT = {"messages": [USER, HELLO]}
ALPACA = {"instruction": "Say hello.", "input": "", "output": "Hello."}


def said(*turns):
    return [{"from": name, "value": text} for name, text in turns]


def call(**function):
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "time", **function}}],
    }


# Rows of each format, and what they come to.
GOOD = {
    "Alpaca": ({"instruction": "Say", "input": "it", "output": "Hello"}, SAY_WITH),
    "Alpaca without input": ({"instruction": "Say", "input": "", "output": "Hello"}, SAY),
    "null is missing": ({"instruction": "Say", "input": None, "prompt": None, "output": "Hello"}, SAY),
    "Dolly": ({"instruction": "Say", "context": "it", "response": "Hello", "category": "qa"}, SAY_WITH),
    "question": ({"question": "Say", "answer": "Hello"}, SAY),
    "question and context": ({"question": "Say", "context": "it", "answer": "Hello"}, SAY_WITH),
    "braces are no places": ({"question": "{x} {instruction}", "answer": "{y}"},
                             {"prompt": PROMPT.format(instruction="{x} {instruction}"), "output": "{y}"}),
    "prompt and output": ({"prompt": "Say", "output": "Hello"}, PLAIN),
    "prompt and response": ({"prompt": "Say", "response": "Hello"}, PLAIN),
    "prompt and answer": ({"prompt": "Say", "answer": "Hello"}, PLAIN),
    "several outputs": ({"prompt": "Say", "output": ["Hello", "Hey"]}, PLAIN),
    "cut answer": ({"prompt": "Say", "output": "Hello", "ended": False}, {**PLAIN, "ended": False}),
    "whole answer": ({"prompt": "Say", "output": "Hello", "ended": True}, PLAIN),
    "empty text beside another": ({"prompt": "", "instruction": "Say", "output": "Hello", "answer": ""}, SAY),
    "TRL": ({"prompt": "Say", "completion": "Hello"}, PLAIN),
    "TRL's messages": ({"prompt": [USER], "completion": [HELLO]}, CHAT),
    "TRL's prompt with an answer": (
        {"prompt": [USER, HELLO, USER], "completion": [HELLO]},
        {"messages": [USER, HELLO, USER, HELLO], "trained": [3]}),
    "prompt of messages, answer of text": ({"prompt": [USER], "answer": "Hello"}, CHAT),
    "messages": ({"messages": [USER, HELLO]}, CHAT),
    "messages beside a prompt": ({"prompt": "Hi", "prompt_id": "1", "messages": [USER, HELLO]}, CHAT),
    "messages as JSON text": ({"messages": json.dumps([USER, HELLO])}, CHAT),
    "messages of a cut answer": ({**CHAT, "ended": False}, {**CHAT, "ended": False}),
    "system column": ({"system": "Be kind.", "messages": [USER, HELLO]}, {"messages": [SYSTEM, USER, HELLO]}),
    "the same system twice": ({"system": "Be kind.", "messages": [SYSTEM, USER, HELLO]},
                              {"messages": [SYSTEM, USER, HELLO]}),
    "ShareGPT": ({"conversations": said(("human", "Hi"), ("gpt", "Hello"))}, CHAT),
    "ShareGPT with system": ({"system": "Be kind.", "conversations": said(("human", "Hi"), ("gpt", "Hello"))},
                             {"messages": [SYSTEM, USER, HELLO]}),
    "conversations with role": ({"conversations": [USER, HELLO]}, CHAT),
    "roles of other names": (
        {"conversations": said(
            ("System", "Be kind."), ("Human", "Hi"), ("chatgpt", "Hello"), ("user", "Hi"), ("bard", "Hello"))},
        {"messages": [SYSTEM, USER, HELLO, USER, HELLO]}),
    "ShareGPT's tools": (
        {"tools": json.dumps([TOOL]), "conversations": said(
            ("human", "Hi"), ("function_call", json.dumps(CALL["function"])), ("observation", "12"), ("gpt", "Hello"))},
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]},
                      RESULT, HELLO], "tools": [TOOL]}),
    "parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
                            {"role": "assistant", "content": ["Hel", "lo"]}]}, CHAT),
    "tools": ({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}], "tools": [TOOL]},
              {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}], "tools": [TOOL]}),
    "one tool as text": ({**CHAT, "tools": json.dumps(TOOL)}, {**CHAT, "tools": [TOOL]}),
    "no tools": ({**CHAT, "tools": []}, CHAT),
    "thought": ({"messages": [USER, {**HELLO, "reasoning_content": "I see.", "name": None}]},
                {"messages": [USER, {**HELLO, "reasoning_content": "I see."}]}),
    "weights": ({"messages": [USER, {**HELLO, "weight": 0}, USER, {**HELLO, "weight": 1}]},
                {"messages": [USER, HELLO, USER, HELLO], "trained": [3]}),
    "weights after a system column": ({"system": "Be kind.", "messages": [USER, {**HELLO, "weight": 0}, USER, HELLO]},
                                      {"messages": [SYSTEM, USER, HELLO, USER, HELLO], "trained": [4]}),
    "train": ({"messages": [USER, {**HELLO, "train": False}, USER, {**HELLO, "train": True}]},
              {"messages": [USER, HELLO, USER, HELLO], "trained": [3]}),
    "train and weight": ({"messages": [USER, {**HELLO, "train": True, "weight": 1}]}, CHAT),
    "an empty answer is not trained": ({"messages": [USER, EMPTY, USER, HELLO]},
                                       {"messages": [USER, EMPTY, USER, HELLO], "trained": [3]}),
    "arguments as text": ({"messages": [USER, call(arguments='{"zone": "UTC"}'), RESULT, HELLO]},
                          {"messages": [USER, call(arguments={"zone": "UTC"}), RESULT, HELLO]}),
    **{f"arguments that are no object: {text}": ({"messages": [USER, call(arguments=text)]},
                                                 {"messages": [USER, call(arguments=text)]})
       for text in ("[1]", "f(", "", '{"a": 1, "a": 2}')},
    "a bare call": ({"messages": [USER, {**HELLO, "tool_calls": [{"name": "time", "arguments": "{}"}]}]},
                    {"messages": [USER, {**HELLO, "tool_calls": [{"name": "time", "arguments": {}}]}]}),
    "weight 1": ({"messages": [USER, {**HELLO, "weight": 1}]}, CHAT),
    "token ids": ({"prompt_ids": [1, 2], "output_ids": [3], "prompt": "a", "output": "b", "ended": True},
                  {"prompt": "a", "prompt_ids": [1, 2], "output_ids": [3], "output": "b"}),
}  # fmt: skip

# Rows that are refused, and what the line says.
BAD = {
    "no object": ([1], "expected a JSON object with instruction, input and output, got [1]"),
    "no known key": ({"q": "x"}, 'missing "instruction"; keys are q (expected instruction, input, output'),
    "plain text": ({"text": "x"}, "plain text is for data.pretrain"),
    "no answer": ({"instruction": "x"}, 'missing "output"; keys are instruction'),
    "null answer": ({"prompt": "x", "output": None}, 'missing "output"; keys are prompt (null counts as missing'),
    "two prompts": ({"prompt": "x", "instruction": "y", "output": "z"}, 'has both "prompt" and "instruction"'),
    "two questions": ({"question": "x", "instruction": "y", "output": "z"}, 'has both "instruction" and "question"'),
    "two answers": ({"prompt": "x", "response": "y", "answer": "z"}, 'has both "response" and "answer": one must'),
    "two inputs": ({"question": "x", "input": "y", "context": "z", "answer": "z"}, 'has both "input" and "context"'),
    "two chats": ({**CHAT, "conversations": []}, 'has both "messages" and "conversations"'),
    "two system prompts": ({**CHAT, "system": "a", "system_prompt": "b"}, 'has both "system" and "system_prompt"'),
    "another system prompt": ({"system": "Rude.", "messages": [SYSTEM, USER, HELLO]}, "and another one in"),
    "input beside prompt": ({"prompt": "x", "input": "y", "output": "z"}, 'has "input", for which "prompt" has no'),
    "input beside messages": ({"prompt": [USER], "input": "y", "output": "z"}, 'has "input", for which "prompt"'),
    "input 0 beside prompt": ({"prompt": "x", "input": 0, "output": "z"}, 'has "input", for which "prompt" has no'),
    "input 0": ({"instruction": "x", "input": 0, "output": "z"}, '"input" must be text, got 0'),
    "input false": ({"instruction": "x", "input": False, "output": "z"}, '"input" must be text, got false'),
    "context of nothing": ({"question": "x", "context": [], "answer": "z"}, '"context" must be text, got []'),
    "system false": ({**CHAT, "system": False}, '"system" must be text, got false'),
    "system 0 beside text": ({"prompt": "x", "system": 0, "output": "z"}, 'has "system", for which "prompt"'),
    "tools 0": ({**CHAT, "tools": 0}, '"tools" must be a list of objects'),
    "system beside text": ({"instruction": "x", "system": "y", "output": "z"}, 'has "system", for which "instruction"'),
    "tools beside text": ({"prompt": "x", "tools": [TOOL], "output": "z"}, "bring messages, or name the columns"),
    "columns of lists": ({"prompt": ["x", "y"], "output": "z"}, '"prompt" must be text, got ["x", "y"]; write one'),
    "instructions": ({"instruction": ["x", "y"], "output": ["z"]}, "write one object for each row"),
    "a number": ({"question": 2, "answer": "z"}, '"question" must be text, got 2'),
    "blank answer": ({"question": "x", "answer": " \n"}, '"answer" is empty: nothing to learn'),
    "empty answer": ({"prompt": [USER], "completion": ""}, '"completion" is empty: nothing to learn'),
    "ended": ({**PLAIN, "ended": "false"}, '"ended" must be true or false, got "false"'),
    "image": ({**CHAT, "images": ["a.png"]}, 'has "images", and only text can be read'),
    "image in a message": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, HELLO]},
        '"content" has a part of type "image_url": only text can be read'),
    "content of an object": ({"messages": [{"role": "user", "content": {}}, HELLO]}, '"content" of a message must be'),
    "no content": ({"messages": [{"role": "user"}, HELLO]}, "text or a list of text parts, got null"),
    "no role": ({"messages": [{"content": "x"}, HELLO]}, "keys are content"),
    "foreign role": ({"messages": [{"role": "critic", "content": "x"}, HELLO]}, 'got "critic"'),
    "empty messages": ({"messages": []}, '"messages" must be a list of objects'),
    "messages of text": ({"messages": ["x"]}, '"messages" must be a list of objects with role and content, got ["x"]'),
    "messages that are no JSON": ({"messages": "[{'role': 'user'}]"}, '"messages" must be a list, or its JSON text'),
    "columns of messages": ({"messages": {"role": ["user"], "content": ["x"]}}, "must be a list of objects"),
    "no question": ({"messages": [HELLO]}, "must follow a question"),
    "no assistant": ({"messages": [USER]}, "the last by the assistant, but the last is by the user"),
    "last by a user": ({"messages": [USER, HELLO, USER]}, "but the last is by the user"),
    "empty message": ({"messages": [USER, {"role": "assistant", "content": " "}]}, "is empty: nothing to learn"),
    "weights 0": ({"messages": [USER, {**HELLO, "weight": 0}]}, "have weight 0: nothing to learn"),
    "weight": ({"messages": [USER, {**HELLO, "weight": 0.5}]}, '"weight" of a message must be 0 or 1, got 0.5'),
    "calls": ({"messages": [USER, {**HELLO, "tool_calls": "x"}]}, '"tool_calls" must be a list of objects, got "x"'),
    "call of a number": ({"messages": [USER, {**HELLO, "tool_calls": [{"function": 5}]}]}, "name and arguments, got 5"),
    "call without a name": ({"messages": [USER, {**HELLO, "tool_calls": [{"function": {"arguments": {}}}]}]},
                            'a function call must be an object with name and arguments, got {"arguments": {}}'),
    "tool without a name": ({**CHAT, "tools": [TOOL, {"a": 1}]}, '"tools" must be functions with a name, got {"a": 1}'),
    "function without a name": ({**CHAT, "tools": [{"function": {}, "name": "f"}]}, "must be functions with a name"),
    "reasoning_content": ({"messages": [USER, {**HELLO, "reasoning_content": 5}]},
                          '"reasoning_content" of a message must be text, got 5'),
    "thinking": ({"messages": [USER, {**HELLO, "thinking": ["x"]}]}, '"thinking" of a message must be text, got ["x"]'),
    "train": ({"messages": [USER, {**HELLO, "train": "no"}]}, '"train" of a message must be true or false, got "no"'),
    "train against weight": ({"messages": [USER, {**HELLO, "train": False, "weight": 1}]}, '1 and "train" false'),
    "empty and weight 0": ({"messages": [USER, EMPTY, USER, {**HELLO, "weight": 0}]}, "are empty or have weight 0"),
    "call": ({"conversations": said(("human", "x"), ("function_call", "[]"))}, "must be an object with name"),
    "call that is no JSON": ({"conversations": said(("human", "x"), ("function_call", "f()"))}, "broken JSON"),
    "tools": ({**CHAT, "tools": [1]}, '"tools" must be a list of objects, or the JSON text of one, got [1]'),
    "text and messages": ({"prompt": "x", "completion": [HELLO]}, "give two texts, or two lists"),
    "half of the ids": ({"prompt_ids": [1], "output": "x"}, '"output_ids" must be a list of whole numbers, got null'),
    "ids of another kind": ({"prompt_ids": [1, True], "output_ids": [2]}, '"prompt_ids" must be a list of whole'),
    "huge id": ({"prompt_ids": [1 << 40], "output_ids": [2]}, '"prompt_ids" has a number that is no token id'),
    "no ids": ({"prompt_ids": [1], "output_ids": []}, '"output_ids" is empty: nothing to learn'),
}  # fmt: skip


def plain(values):
    return {key: part.tolist() if isinstance(part, np.ndarray) else part for key, part in values.items()}


@pytest.mark.parametrize("name", GOOD)
def test_formats(write_jsonl, name):
    row, expected = GOOD[name]
    (read,) = read_rows(write_jsonl([row]))
    assert plain(read.values) == expected


@pytest.mark.parametrize("name", BAD)
def test_rows_that_are_refused(write_jsonl, name):
    row, message = BAD[name]
    path = write_jsonl([PLAIN, row])
    with pytest.raises(ConfigError) as error:
        read_rows(path)
    assert str(error.value).startswith(f"{path} line 2: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "has no rows"),
        ([ALPACA, '{"instruction": '], "line 2: broken JSON"),
        ([ALPACA, {"instruction": "x"}], 'line 2: missing "output"; keys are instruction'),
        ([{"output": "x"}], 'line 1: missing "instruction"; keys are output'),
        ([{**ALPACA, "output": 5}], 'line 1: "output" must be text, got 5'),
        ([{**ALPACA, "output": []}], 'line 1: "output" must be text, got []'),
        ([{**ALPACA, "output": [5, "b"]}], 'line 1: "output" must be text, got 5'),
        ([{**ALPACA, "output": [" ", "b"]}], 'line 1: "output" is empty'),
        ([{**ALPACA, "output": None}], 'line 1: missing "output"; keys are instruction, input (null counts as missing'),
        ([{**ALPACA, "output": "  \n"}], 'line 1: "output" is empty'),
        ([{**ALPACA, "input": 3}], 'line 1: "input" must be text'),
        ([{"messages": [{"role": "user", "content": "x"}]}], "the last by the assistant"),
        (["5"], "line 1: expected a JSON object"),
        (['{"prompt": "x", "output": "\\ud800"}'], "line 1: has half of a surrogate pair"),
    ],
)  # fmt: skip
def test_bad_rows_are_named(write_jsonl, rows, message):
    path = write_jsonl(rows)
    with pytest.raises(ConfigError) as error:
        read_rows(path)
    assert message in str(error.value)
    assert path in str(error.value)


ASKED, ASKED_AGAIN = ({"messages": messages, "is_prompt": True} for messages in ([USER], [USER, HELLO, USER]))
PROMPT_ONLY = {
    "prompt": ({"prompt": "Say"}, {"prompt": "Say"}),
    "empty output": ({"prompt": "Say", "output": ""}, {"prompt": "Say"}),
    "null output": ({"instruction": "Say", "output": None}, {"prompt": SAY["prompt"]}),
    "no outputs": ({"question": "Say", "answer": None}, {"prompt": SAY["prompt"]}),
    "messages": ({"messages": [USER]}, ASKED),
    "last empty": ({"messages": [USER, {"role": "assistant", "content": ""}]}, ASKED),
    "more turns": ({"messages": [USER, HELLO, USER]}, ASKED_AGAIN),
    "list of messages": ({"prompt": [USER]}, ASKED),
    "token ids": ({"prompt_ids": [1, 2]}, {"prompt_ids": [1, 2]}),
}


@pytest.mark.parametrize("name", PROMPT_ONLY)
def test_rows_of_a_prompt_alone(write_jsonl, name):
    row, expected = PROMPT_ONLY[name]
    path = write_jsonl([row])
    for outputs in ("optional", "ignored"):
        assert plain(read_rows(path, outputs=outputs)[0].values) == expected
    with pytest.raises(ConfigError, match="line 1: "):
        read_rows(path)


@pytest.mark.parametrize("name", GOOD)
def test_optional_outputs_are_read_where_they_are(write_jsonl, name):
    row, expected = GOOD[name]
    assert plain(read_rows(write_jsonl([row]), outputs="optional")[0].values) == expected


@pytest.mark.parametrize(
    ("row", "expected", "reference"),
    [
        ({"prompt": "Say", "output": ["Hello", "Hey"]}, {"prompt": "Say"}, ["Hello", "Hey"]),
        ({"prompt": "Say", "output": 5}, {"prompt": "Say"}, 5),
        ({"prompt": "Say", "output": "x", "ended": False}, {"prompt": "Say"}, "x"),
        ({"question": "Say", "answer": "Hello"}, {"prompt": SAY["prompt"]}, "Hello"),
        ({"prompt": [USER], "completion": [HELLO]}, ASKED, "Hello"),
        ({"conversations": said(("human", "Hi"), ("gpt", "Hello"))}, ASKED, "Hello"),
        ({"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "Hello"}]}]},
         ASKED, "Hello"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": []}]}, ASKED, None),
        ({"messages": [USER, HELLO, USER, HELLO], "tools": [TOOL]},
         {**ASKED_AGAIN, "tools": [TOOL]}, "Hello"),
        ({"messages": [USER, HELLO, USER, {**HELLO, "weight": 0}]}, ASKED, "Hello"),
        ({"messages": [USER, {**HELLO, "train": True}, USER, EMPTY, USER, {**HELLO, "train": False}]}, ASKED, "Hello"),
        ({"messages": [USER, HELLO, HELLO, USER, {**HELLO, "weight": 0}]},
         {**ASKED, "messages": [USER, HELLO]}, "Hello"),
        ({"system": "Be kind.", "messages": [USER, HELLO, USER, {**HELLO, "weight": 0}]},
         {"messages": [SYSTEM, USER], "is_prompt": True}, "Hello"),
        ({"messages": [USER, HELLO, HELLO]}, {**ASKED, "messages": [USER, HELLO]}, "Hello"),
        ({"messages": [USER, HELLO, USER]}, ASKED_AGAIN, None),
        ({"prompt": [USER], "completion": ["Hello", "Hey"]}, ASKED, ["Hello", "Hey"]),
        ({"prompt_ids": [1], "messages": [USER]}, {"prompt_ids": [1], **ASKED}, None),
        ({"prompt_ids": [1], "output_ids": [2], "output": "x"}, {"prompt_ids": [1], "output_ids": [2]}, "x"),
    ],
)  # fmt: skip
def test_ignored_outputs_are_references_alone(write_jsonl, row, expected, reference):
    (read,) = read_rows(write_jsonl([row]), outputs="ignored")
    assert plain(read.values) == expected
    assert read.outputs == reference


def test_columns(write_jsonl):
    path = write_jsonl([{"frage": "Say", "antwort": "Hello", "output": "not read"}, {"antwort": "x", "frage": "y"}])
    rows = read_rows(path, columns={"prompt": "frage", "output": "antwort"})
    assert [row.values for row in rows] == [PLAIN, {"prompt": "y", "output": "x"}]
    assert read_rows(path, columns=(("instruction", "frage"), ("output", "antwort")))[0].values == SAY
    path = write_jsonl([{"prompt": "Say", "instruction": "x", "answer": "Hello", "output": "x"}])
    assert read_rows(path, columns={"prompt": "prompt", "output": "answer"})[0].values == PLAIN
    path = write_jsonl([{"dialog": said(("human", "Hi"), ("gpt", "Hello")), "functions": [TOOL]}])
    (row,) = read_rows(path, columns={"messages": "dialog", "tools": "functions"})
    assert row.values == {**CHAT, "tools": [TOOL]}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "data.columns: is empty"),
        ({"outptu": "x"}, '"outptu" is no name of ours; did you mean output?'),
        ({"prompt": 5}, "prompt must be a column's name, got 5"),
        ({"prompt": "prompt", "output": "anwser"}, 'data.columns names "anwser", and the columns are prompt, answer'),
        ({"prompt": "frage", "output": "antwort"}, ': data.columns names "frage", and the columns are prompt, answer'),
        ({"prompt": "prompt", "instruction": "answer"}, 'has both "prompt" and "instruction"'),
    ],
)
def test_columns_that_are_refused(write_jsonl, columns, message):
    path = write_jsonl([{"prompt": "Say", "answer": "Hello"}])
    with pytest.raises(ConfigError) as error:
        read_rows(path, columns=columns)
    assert message in str(error.value)


def test_notes_say_what_was_recognized_and_what_was_not_read(write_jsonl):
    path = write_jsonl([{"id": 1, **PLAIN}, {"question": "x", "answer": "y", "category": "z"}, PLAIN])
    (note,) = read_rows(path).notes
    expected = "2 rows of prompt and output and 1 rows of question and answer (the papers' prompt)"
    assert note == f"{path}: {expected}; not read: id, category"


def test_a_column_that_one_format_reads_and_another_drops_is_named(write_jsonl):
    path = write_jsonl(
        [
            {**CHAT, "input": "dropped", "answer": "", "response": None},
            {"question": "x", "input": "read", "answer": "y"},
        ]
    )
    (note,) = read_rows(path).notes
    assert note.endswith("; not read: input")


def test_a_prompt_of_messages_has_both_references(write_jsonl):
    (row,) = read_rows(write_jsonl([{"prompt": [USER], "completion": ["Hello", "Hey"]}]))
    assert (row.values, row.outputs) == (CHAT, ["Hello", "Hey"])


def test_a_prompt_of_messages_has_no_cut_answer(write_jsonl):
    (row,) = read_rows(write_jsonl([{"messages": [USER], "ended": False}]), outputs="optional")
    assert row.values == ASKED


def test_an_answer_without_weight_is_no_reference(write_jsonl):
    path = write_jsonl([{"messages": [USER, {**HELLO, "weight": 0}]}])
    with pytest.raises(ConfigError, match="are empty or have weight 0: nothing to learn"):
        read_rows(path, outputs="ignored")


def test_bad_rows_are_left_out_and_named(write_jsonl):
    bad = [{"prompt": "x"}, '{"prompt": ', "7", '{"a": 1, "a": 2}', {"prompt": "x", "output": ""}]
    path = write_jsonl([bad[0], PLAIN, *bad[1:], {**PLAIN, "output": "Bye"}, PLAIN])
    rows = read_rows(path, on_bad_row="skip", limit=2)
    assert [row.values["output"] for row in rows] == ["Hello", "Bye"]
    assert rows[1].where == f"{path} line 7"
    note = rows.notes[-1]
    assert note.startswith(f'{path}: 5 rows are left out: {path} line 1: missing "output"')
    assert f"; {path} line 3: broken JSON: Expecting value; {path} line 4: expected a JSON object" in note
    assert note.endswith("; …")
    with pytest.raises(ConfigError, match=r'has no rows that can be used: .* line 1: missing "output"'):
        read_rows(write_jsonl(bad), on_bad_row="skip")


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
KEYS = st.sampled_from(
    [
        *(*OURS, "question", "context", "completion", "response", "answer", "system", "conversations", "ended"),
        *(
            "images",
            "prompt_ids",
            "output_ids",
            "role",
            "content",
            "from",
            "value",
            "weight",
            "tool_calls",
            "text",
            "train",
            "thinking",
        ),
    ]
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.sampled_from(["user", "gpt", "assistant"])
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)


@settings(max_examples=400, deadline=None)
@given(row=st.dictionaries(KEYS | TEXT, VALUES, max_size=5) | VALUES)
def test_any_row_is_read_or_refused_in_one_line(row):
    for outputs in ("required", "optional", "ignored"):
        try:
            checked = check_row(row, "file line 1", outputs)
            values = checked.values
        except ConfigError as error:
            line = str(error)
            assert line.startswith("file line 1: ")
            assert "\n" not in line
            continue
        assert {*values} <= {
            "prompt",
            "output",
            "messages",
            "tools",
            "trained",
            "ended",
            "prompt_ids",
            "output_ids",
            "is_prompt",
            "teacher_prompt",
            "teacher_messages",
        }
        for message in values.get("messages", []):
            assert isinstance(message["role"], str)
            assert isinstance(message["content"], str)
        if outputs == "required":
            has_output = "output" in values or "output_ids" in values
            assert has_output or values["messages"][-1]["role"] == "assistant"
