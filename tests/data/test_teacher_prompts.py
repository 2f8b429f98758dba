"""What the teacher reads: the student's responses, token by token, after another prompt."""

import copy
import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import chat
from abkd_fast.data import quickstart
from abkd_fast.data.batches import collate, count_labels, teacher_view
from abkd_fast.data.chat import PromptFormat
from abkd_fast.data.encode import Sample
from abkd_fast.data.rows import Row, read_rows
from abkd_fast.data.teacher_prompts import CutSample, TeacherFormat, TeacherPrompts
from abkd_fast.data.tokenize import tokenize
from abkd_fast.errors import ConfigError

ASK, SAY = {"role": "user", "content": "Add 1 and 2."}, {"role": "assistant", "content": "It is 3."}
AGAIN, MORE = {"role": "user", "content": "And 4?"}, {"role": "assistant", "content": "It is 7."}
HINT = {"role": "user", "content": "1 and 2 are 3. Add 1 and 2."}
SYSTEM = {"role": "system", "content": "Be kind."}
PLAIN = {"prompt": "Add 1 and 2.\n", "output": "It is 3."}
CHAT = {"messages": [ASK, SAY, AGAIN, MORE]}
STYLE = PromptFormat()
TURN = "<|im_start|>{}\n{}<|im_end|>\n"


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = copy.deepcopy(quickstart.tokenizer())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = chat.CHATML
    return tokenizer


@pytest.fixture
def read(write_jsonl, tokenizer):
    """Tokenizes rows: the result, and for each sample the texts that student and teacher read."""

    def read(*rows, system=None, template=None, limit=512, style=STYLE, **options):
        own = copy.deepcopy(tokenizer)
        own.chat_template = template or own.chat_template
        teacher = TeacherFormat(own, style, system, template is not None)
        result = tokenize(read_rows(write_jsonl(rows), **options), tokenizer, limit, None, style, teacher=teacher)
        views = [(sample, teacher_view(sample)) for sample in result.dataset]
        for sample, view in views:
            student, theirs = map(collate, ([sample], [view]))
            assert student.labels.tolist() == theirs.labels.tolist()
        return result, [tuple(tokenizer.decode(one["input_ids"]) for one in pair) for pair in views]

    return read


def test_a_text_prompt_of_the_teacher(read):
    result, texts = read(
        {**PLAIN, "teacher_prompt": "1 and 2 are 3.\nAdd 1 and 2.\n"}, {"instruction": "Add.", "output": "3"}
    )
    assert texts[0] == ("Add 1 and 2.\nIt is 3.<end>", "1 and 2 are 3.\nAdd 1 and 2.\nIt is 3.<end>")
    assert texts[1][0] == texts[1][1]
    (note,) = result.notes([None] * 2, 512)
    assert note.startswith("the teacher reads a prompt of its own in 1 of 2 rows; all prompts: on average ")


def test_tokens_are_the_students_where_the_seam_would_give_others(read, tokenizer):
    """After a space "It" would be one token with it."""
    result, texts = read({**PLAIN, "teacher_prompt": "Say: "})
    assert texts == [("Add 1 and 2.\nIt is 3.<end>", "Say: It is 3.<end>")]
    ours, theirs = (result.dataset[0][f"{prefix}input_ids"] for prefix in ("", "teacher_"))
    assert theirs[-5:] == ours[-5:]
    assert theirs != [*tokenizer("Say: It is 3.")["input_ids"], tokenizer.eos_token_id]


def test_messages_of_the_teacher(read):
    two = TURN.format("user", AGAIN["content"]) + TURN.format("assistant", MORE["content"]).rstrip("\n")
    first = TURN.format("assistant", SAY["content"])
    own = TURN.format("user", ASK["content"]) + first + two
    hinted = TURN.format("user", HINT["content"]) + first + two
    before = [HINT, SAY, AGAIN]  # the answer is added
    shots = [ASK, {**SAY, "content": "3"}, HINT, SAY, AGAIN, MORE]  # an answer more than the row has
    result, texts = read(*({**CHAT, "teacher_messages": messages} for messages in ([*before, MORE], before, shots)))
    assert {text for text, _ in texts} == {own}
    assert [text for _, text in texts[:2]] == [hinted, hinted]
    assert texts[2][1] == TURN.format("user", ASK["content"]) + TURN.format("assistant", "3") + hinted
    assert {len(spans) for spans in result.dataset["teacher_spans"]} == {4}


def test_the_last_turn_needs_no_partner_for_the_others(read):
    row = {**CHAT, "teacher_messages": [HINT]}
    with pytest.raises(ConfigError, match='line 1: as the teacher reads it: "teacher_messages" has 1 answers, but'):
        read(row)
    _, texts = read(row, style=PromptFormat(train_on="last"))
    assert texts[0][1] == TURN.format("user", HINT["content"]) + TURN.format("assistant", "It is 7.").rstrip("\n")
    weighted = {"messages": [ASK, {**SAY, "weight": 0}, AGAIN, MORE], "teacher_messages": [HINT]}
    assert read(weighted)[1] == texts


def test_a_system_text_comes_before_every_prompt(read):
    ids = [5, 6, 7]
    rows = [
        PLAIN,
        {**PLAIN, "teacher_prompt": "Say: "},
        {"messages": [ASK, SAY]},
        {"messages": [SYSTEM, ASK, SAY]},
        {"messages": [ASK, SAY], "teacher_messages": [HINT], "system": "Be kind."},
    ]
    _, texts = read(*rows, system="1 and 2 are 3. ")
    told, system = "1 and 2 are 3. ", TURN.format("system", "1 and 2 are 3. ")
    asked = TURN.format("user", ASK["content"]) + TURN.format("assistant", SAY["content"]).rstrip("\n")
    both = TURN.format("system", "1 and 2 are 3. \n\nBe kind.")
    assert [text for _, text in texts] == [
        f"{told}Add 1 and 2.\nIt is 3.<end>",
        f"{told}Say: It is 3.<end>",
        system + asked,
        both + asked,
        both + asked.replace(ASK["content"], HINT["content"]),
    ]
    with pytest.raises(ConfigError, match=r"token ids alone have no text that teacher\.system could stand before"):
        read({"prompt_ids": ids, "output_ids": ids}, system="x")


def test_responses_given_as_token_ids(read, tokenizer):
    prompt, output = (tokenizer(text)["input_ids"] for text in ("Add 1 and 2.\n", "It is 3."))
    row = {"prompt_ids": prompt, "output_ids": output, "prompt": "Add 1 and 2.\n"}
    messages = {**row, "teacher_messages": [HINT]}
    _, texts = read({**row, "teacher_prompt": "Say: "}, messages, row, system="Hm. ")
    prompted = TURN.format("system", "Hm. ") + TURN.format("user", HINT["content"]) + "<|im_start|>assistant\n"
    assert [text for _, text in texts] == ["Hm. Say: It is 3.", f"{prompted}It is 3.", "Hm. Add 1 and 2.\nIt is 3."]


def test_rows_without_an_answer(read):
    rows = {"prompt": "Add.", "teacher_prompt": "1 and 2. Add."}, {"messages": [ASK], "teacher_messages": [HINT]}
    result, texts = read(*rows, outputs="optional")
    assert [text for _, text in texts] == [
        "1 and 2. Add.",
        TURN.format("user", HINT["content"]) + "<|im_start|>assistant\n",
    ]
    assert all(start == stop for start, stop in result.dataset["teacher_spans"])


def test_another_template_with_the_same_answers(read):
    other = chat.CHATML.replace("<|im_start|>{{ m.role }}\n", "{{ m.role }}:\n").replace(
        "<|im_start|>assistant\n", "assistant:\n"
    )
    _, texts = read(CHAT, PLAIN, template=other)
    assert texts[0][1].startswith("user:\nAdd 1 and 2.<|im_end|>\nassistant:\nIt is 3.<|im_end|>\nuser:\nAnd 4?")
    assert texts[1][0] == texts[1][1]
    with pytest.raises(
        ConfigError, match=r"line 1: as the teacher reads it: its response has '!<\|im_end\|>' in place of '<\|im_end"
    ):
        read(CHAT, template=chat.CHATML.replace("{{ m.content }}", "{{ m.content }}!"))
    forgetful = chat.CHATML.replace("{{ m.content }}", "{{ m.content if loop.revindex < 3 else '' }}")
    with pytest.raises(ConfigError, match=r"the history of an answer in another way: data\.train_on=last"):
        read(CHAT, template=forgetful)


def test_the_students_cut_is_the_teachers(read):
    """Tokens of the prompt and two of the answer. The teacher's sequence is longer than the limit."""
    long = {**PLAIN, "teacher_prompt": "Do as I say. " * 8}
    whole, _ = read(long)
    start = whole.dataset[0]["spans"][0]
    result, texts = read(long, limit=start + 2)
    sample = result.dataset[0]
    assert count_labels(sample) == count_labels(teacher_view(sample)) == 2
    assert texts[0] == ("Add 1 and 2.\nIt is", long["teacher_prompt"] + "It is")
    assert len(sample["teacher_input_ids"]) > start + 2
    # Of a conversation later turns may be cut away altogether; the beginning of their prompt may stay.
    limit = read(CHAT)[0].dataset[0]["spans"][1] + 3
    _, texts = read({**CHAT, "teacher_messages": [HINT, SAY, AGAIN, MORE]}, limit=limit)
    hinted = TURN.format("user", HINT["content"]) + TURN.format("assistant", "It is 3.").rstrip("\n")
    assert texts[0][1] == hinted
    # Of a text far over the limit only the beginning is encoded.
    endless = {"prompt": "Q:", "output": " 12 é" * 3000, "teacher_prompt": "Q. "}
    for limit in range(8, 14):  # also within a character
        result, _ = read(endless, limit=limit)
        assert count_labels(teacher_view(result.dataset[0])) == limit - result.dataset[0]["spans"][0]


BAD = {
    "both": ({"teacher_prompt": "x", "teacher_messages": [ASK]}, 'has both "teacher_prompt" and "teacher_messages"'),
    "prompt of a number": ({"teacher_prompt": 7}, '"teacher_prompt" must be text, got 7'),
    "prompt of messages": ({"teacher_prompt": [ASK]}, '"teacher_prompt" must be text, got'),
    "empty prompt": ({"teacher_prompt": ""}, '"teacher_prompt" is empty: leave it out where'),
    "messages beside text": ({"teacher_messages": [ASK]}, 'has "teacher_messages" beside a prompt that is text'),
    "text beside messages": ({**CHAT, "teacher_prompt": "x"}, 'has "teacher_prompt" beside messages'),
    "messages of text": ({**CHAT, "teacher_messages": "x"}, '"teacher_messages" must be a list, or its JSON text'),
    "no messages": ({**CHAT, "teacher_messages": []}, '"teacher_messages" must be a list of objects'),
    "message without a role": ({**CHAT, "teacher_messages": [{"content": "x"}]}, '"teacher_messages" must be objects'),
    "only an answer": ({**CHAT, "teacher_messages": [SAY]}, '"teacher_messages" begins with the answer'),
    "another answer": (
        {**CHAT, "teacher_messages": [HINT, {**SAY, "content": "It is 4."}, AGAIN]},
        "as the teacher reads it: its response has '4.<|im_end|>' in place of '3.<|im_end|>': the trained tokens must",
    ),
    "answer without a question": (
        {"messages": [ASK], "teacher_messages": [HINT, SAY]},
        '"teacher_messages" ends with an answer, but the row has no such message',
    ),
    "end token": ({"teacher_prompt": "x", "output": "a<end>b"}, "has the end token <end> in its middle"),
}


@pytest.mark.parametrize(("row", "error"), BAD.values(), ids=BAD)
def test_bad_rows_are_refused_in_one_line(read, row, error):
    row = row if "messages" in row else {**PLAIN, **row}
    with pytest.raises(ConfigError) as caught:
        read(row, outputs="optional")
    assert error in str(caught.value)
    assert "rows.jsonl line 1: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_rows_may_be_left_out(write_jsonl, tokenizer):
    bad = {**CHAT, "teacher_messages": [HINT, {**SAY, "content": "It is 4."}, AGAIN]}
    rows = read_rows(write_jsonl([bad, CHAT]))
    teacher = TeacherFormat(tokenizer, PromptFormat())
    result = tokenize(rows, tokenizer, 512, on_bad_row="skip", teacher=teacher)
    assert result.dataset["row"][:] == [1]
    assert result.why_left_out(0).startswith("as the teacher reads it: ")


def test_data_without_such_prompts_keep_their_fingerprints_and_columns(write_jsonl, tokenizer):
    rows = read_rows(write_jsonl([PLAIN, CHAT]))
    plain = tokenize(rows, tokenizer, 64).dataset
    assert plain.column_names == ["input_ids", "spans", "row", "row_length"]
    same = tokenize(rows, tokenizer, 64, teacher=TeacherFormat(tokenizer, PromptFormat())).dataset
    assert same._fingerprint == plain._fingerprint
    told = [tokenize(rows, tokenizer, 64, teacher=TeacherFormat(tokenizer, PromptFormat(), text)) for text in "ab"]
    assert len({plain._fingerprint, *(one.dataset._fingerprint for one in told)}) == 3


def test_columns_may_have_other_names(write_jsonl):
    (row,) = read_rows(
        write_jsonl([{"q": "x", "a": "y", "t": "z"}]),
        columns={"prompt": "q", "output": "a", "teacher_prompt": "t"},
    )
    assert row.values == {"prompt": "x", "output": "y", "teacher_prompt": "z"}


PIECES = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(turns=PIECES, splits=st.sets(st.integers(1, 4)), merges=st.booleans(), data=st.data())
def test_spans_are_paired_turn_by_turn(turns, splits, merges, data):
    """Rows of turns (tokens of the student's prompt, of the answer, of the teacher's prompt), cut anywhere."""
    counter = iter(range(10, 10_000))

    def take(count):
        return [next(counter) for _ in range(count)]

    answers = [take(answer) for _, answer, _ in turns]
    prompts, theirs = ([take(turn[place]) for turn in turns] for place in (0, 2))

    def sample(prompts, first, stop):
        """The turns before `stop` in one sequence, of which those from `first` are trained."""
        ids, spans = [], []
        for number in range(stop):
            ids += prompts[number]
            spans += [len(ids), len(ids) + len(answers[number])] if number >= first else []
            ids += answers[number]
        return Sample(ids, spans)

    bounds = [0, *sorted(split for split in splits if split < len(turns)), len(turns)]
    groups = [*itertools.pairwise(bounds)]
    whole = [sample(theirs, 0, len(turns))] if merges else [sample(theirs, *group) for group in groups]
    prompts_of = TeacherPrompts.__new__(TeacherPrompts)  # the answers are the same: nothing is decoded
    for first, stop in groups:
        full = sample(prompts, first, stop)
        limit = data.draw(st.integers(full.spans[0] + 1, len(full.input_ids)))
        pairs = zip(full.spans[::2], full.spans[1::2], strict=True)
        spans = [min(place, limit) for pair in pairs if pair[0] < limit for place in pair]
        own = CutSample(full.input_ids[:limit], spans, 0, len(full.input_ids), first, limit < len(full.input_ids))
        view = prompts_of._view(own, whole, is_given=False)
        expected = sample(theirs, first, first + len(spans) // 2)
        removed = len(answers[first + len(spans) // 2 - 1]) - (spans[-1] - spans[-2])
        assert view.input_ids == expected.input_ids[: len(expected.input_ids) - removed]
        assert view.spans == [*expected.spans[:-1], expected.spans[-1] - removed]
        labels = [collate([one._asdict()]).labels.tolist() for one in (Sample(own.input_ids, own.spans), view)]
        assert labels[0] == labels[1]


def test_rows_are_json(write_jsonl):
    """Null is missing, and messages may be JSON text."""
    rows = read_rows(
        write_jsonl([{**CHAT, "teacher_messages": json.dumps([HINT]), "teacher_prompt": None, "tools": []}])
    )
    assert isinstance(rows[0], Row)
    assert rows[0].values["teacher_messages"] == [HINT]
