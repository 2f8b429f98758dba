"""teacher.top_k: which line of the file is which row's, and which of its numbers are which token's."""

import datasets
import numpy as np
import pytest

from abkd_fast.config.recipe import load
from abkd_fast.data.tokenize import ROW, TAUGHT
from abkd_fast.errors import ConfigError
from abkd_fast.teacher.top_k import TopKTargets
from abkd_fast.training.trainer import Trainer
from runs import TIED, Run

VOCAB = 60
TURNS = [40, 1, 41, 42, 40, 2, 3, 43]  # two answers: [41, 42] and [2, 3, 43]
SPANS = [2, 4, 5, 8]


def samples_of(*samples, **more):
    """Tokenized samples, one of each row. Each is (ids, spans), and the length before the cut if that is another."""
    columns = {
        "input_ids": [ids for ids, *_ in samples],
        "spans": [spans for _, spans, *_ in samples],
        "row": range(len(samples)),
        "row_length": [length[0] if length else len(ids) for ids, _, *length in samples],
    }
    return datasets.Dataset.from_dict({**columns, **more}, features=TAUGHT if more else ROW)


def read(path, dataset, numbers=None, place="data.jsonl line {}"):
    where = [place.format(number + 1) for number in numbers or range(len(dataset))]
    return TopKTargets(path, dataset, where, VOCAB, numbers)


def entries(ids, offset=10):
    """What a server returns: the token that is there, and one more. Log-probabilities tell the place."""
    return [None] + [
        {str(token): {"logprob": -1 - place / 100}, str((token + offset) % VOCAB): {"logprob": -5.0}}
        for place, token in enumerate(ids[1:], 1)
    ]


def places_of(targets, index=0):
    """The places that the log-probabilities tell."""
    _, log_probs = targets.of([{"index": index}])
    return [round(-100 * (number + 1)) for number in log_probs[:, 0].tolist()]


def refused(path, dataset, *arguments, **options):
    with pytest.raises(ConfigError) as error:
        read(path, dataset, *arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_entries_of_a_server_are_read_where_their_tokens_are(write_jsonl):
    answers = {"output_ids": [41, 42, 2, 3, 43]}
    path = write_jsonl([{**answers, "prompt_logprobs": entries(TURNS)}])
    assert places_of(read(path, samples_of((TURNS, SPANS)))) == [2, 3, 5, 6, 7]
    # A cut ends the sample, within an answer or before it. The list goes on.
    assert places_of(read(path, samples_of((TURNS[:6], [2, 4, 5, 6], 8)))) == [2, 3, 5]
    assert places_of(read(path, samples_of((TURNS[:5], [2, 4], 8)))) == [2, 3]
    # They are of what the teacher reads.
    theirs = {"teacher_input_ids": [[50, 51, *TURNS]], "teacher_spans": [[4, 6, 7, 10]]}
    path = write_jsonl([{**answers, "prompt_logprobs": entries([50, 51, *TURNS])}])
    assert places_of(read(path, samples_of((TURNS, SPANS), **theirs))) == [4, 5, 7, 8, 9]


@pytest.mark.parametrize("spans", [SPANS, [5, 8]])
def test_entries_that_are_not_of_these_tokens_are_refused(write_jsonl, spans):
    ids = [token for start, stop in zip(spans[::2], spans[1::2], strict=True) for token in TURNS[start:stop]]
    for listed, words in (
        (entries([*TURNS, 9]), "has 9 entries, but the teacher reads 8 tokens in data.jsonl line 1: give one for each"),
        (entries(TURNS[1:]), "has 7 entries, but the teacher reads 8 tokens in data.jsonl line 1: give one for each"),
        (entries(ids), f"has {len(ids)} entries, but the teacher reads 8 tokens"),
        # With the whole vocabulary an entry has every token.
        ([None, *[{str(token): {"logprob": -5.0} for token in range(VOCAB)}] * 8], "has 9 entries, but the teacher"),
        (entries([8, *TURNS[:-1]]), f"entry {spans[0]}: has no token {ids[0]}, which is there in data.jsonl line 1: "),
        (entries([*TURNS[:6], 4, 43]), "entry 6: has no token 3, which is there in data.jsonl line 1: tokenizer, chat"),
    ):
        message = refused(write_jsonl([{"output_ids": ids, "prompt_logprobs": listed}]), samples_of((TURNS, spans)))
        assert words in message
        assert message.endswith(", or set data.train_on=last") == ("entries" in words and len(spans) > 2)


def lines_of(count):
    """Lines of samples with one response token each, whose log-probability tells the line."""
    return [{"output_ids": [7], "top_ids": [[7]], "top_log_probs": [[-1 - line / 100]]} for line in range(count)]


def test_a_row_has_the_line_of_its_number(write_jsonl):
    dataset, path = samples_of(([1, 7], [1, 2]), ([2, 7], [1, 2])), write_jsonl(lines_of(5))
    for numbers in ([0, 1], [1, 4], [0, 3]):  # nothing else differs
        targets = read(path, dataset, numbers)
        assert [places_of(targets, index) for index in (0, 1)] == [[number] for number in numbers]
    assert "has no line for data.jsonl line 6" in refused(path, dataset, [1, 5])
    # A file that says more than its sample, which once was cut, and now is whole.
    path = write_jsonl([{**lines_of(1)[0], "output_ids": [7, 8], "top_ids": [[7], [8]], "top_log_probs": [[-1], [-2]]}])
    read(path, samples_of(([1, 7], [1, 2], 3)))
    assert '"output_ids" has 2 tokens, but data.jsonl line 1 has 1' in refused(path, samples_of(([1, 7], [1, 2])))


@pytest.mark.parametrize("is_one_file", [False, True])
def test_rows_that_are_left_out_have_lines_all_the_same(tmp_path, write_jsonl, is_one_file):
    rows = [{"prompt_ids": [1, number + 2], "output_ids": [9, 0]} for number in range(6)]
    lines = [{"output_ids": [9, 0], "top_ids": [[9], [0]], "top_log_probs": [[-1 - n / 100], [-2]]} for n in range(6)]
    both = [{**row, **line} for row, line in zip(rows, lines, strict=True)]
    for table in (rows, lines, both):
        table[1] = {}
    rows[3] = both[3] = "{broken"
    for row in (rows[4], both[4]):
        row["prompt_ids"] = [1] * 9  # too long
    train, top = (write_jsonl(both if is_one_file else table, name) for table, name in ((rows, "rows"), (lines, "top")))
    data = {"train": train, "on_bad_row": "skip", "max_prompt_length": 5, "max_length": 16}
    sections = {"method": "kd", "loss": "fkl", "student": {"config": TIED}, "data": data, "eval": {}}
    sections["teacher"] = {"top_k": f"{tmp_path}/./rows" if is_one_file else top}
    train_part = {"steps": 1, "batch_size": 1, "max_tokens": 64, "device": "cpu"}
    trainer = Trainer(load(Run(tmp_path, **sections, train=train_part).arguments[1])[0])
    assert [sample["input_ids"][1] for sample in trainer.data.train_set] == [2, 4, 7]
    assert [places_of(trainer.method.top_k, index)[0] for index in range(3)] == [0, 2, 5]


def test_prompt_ids_of_the_data_are_the_students(write_jsonl):
    theirs = {"teacher_input_ids": [[5, 6, 7]], "teacher_spans": [[2, 3]]}
    dataset = samples_of(([1, 7], [1, 2]), **theirs)
    path = write_jsonl([{**lines_of(1)[0], "prompt_ids": [1]}])
    read(path, dataset, place=f"{path} line {{}}")
    assert '"prompt_ids" has 1 tokens, but data.jsonl line 1 has 2' in refused(path, dataset)


HUGE = int("9" * 400)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"top_log_probs": [[-HUGE, -1]]}, "token 0 of the response has the log-probability -9999"),
        ({"top_log_probs": [[-1, HUGE]]}, "token 0 of the response has the log-probability 9999"),
        ({"top_log_probs": [[-1, -1e39]]}, "log-probability -1e+39, expected a finite number; leave that token out"),
        ({"top_log_probs": [[-1, float("-inf")]]}, "log-probability -inf, expected a finite number; leave that token"),
        ({"top_log_probs": [[-1, float("nan")]]}, "log-probability nan, expected a finite number; leave that token"),
        ({"top_log_probs": [[-1, None]]}, "the log-probabilities must be numbers, got null; leave that token out"),
        ({"top_ids": [[7, 1 << 63]]}, "has id 9223372036854775808, but the student has 60 tokens; leave that token"),
        ({"top_ids": [[7, -(1 << 70)]]}, "has id -1180591620717411303424, but the student has 60 tokens"),
        ({"top_ids": [[7, HUGE]]}, "token 0 of the response has id 9999"),
        ({"top_ids": [[7, True]]}, "the ids must be whole numbers, got true"),
        ({"top_ids": [[7, 7]]}, "has id 7 twice; give each token once"),
        ({"top_ids": [[]], "top_log_probs": [[]]}, "has no tokens of the teacher's; each needs one at least"),
        ({"output_ids": [HUGE]}, '"output_ids": token 0 is 9999'),
        ({"prompt_ids": [HUGE]}, '"prompt_ids": token 0 is 9999'),
        ({"prompt_logprobs": [None, {"7": {"logprob": -HUGE}}]}, "has the log-probability -9999"),
        *(
            ({"prompt_logprobs": [None, {"7": {"logprob": -1}, key: {"logprob": -2}}]}, words)
            for key, words in (
                ("1_0", 'entry 1: expected {"token id": {"logprob": number}}, got {"7": {"logprob": -1}, "1_0": '),
                (" 8", 'entry 1: expected {"token id": '),
                ("+8", 'entry 1: expected {"token id": '),
                ("\N{ARABIC-INDIC DIGIT EIGHT}", 'entry 1: expected {"token id": '),
                ("-8", 'entry 1: expected {"token id": '),
                ("07", "has id 7 twice"),
                ("9" * 400, "has id 9999"),
            )
        ),
        ({"prompt_logprobs": [None, {}]}, 'entry 1: expected {"token id": {"logprob": number}}, got {}'),
        ({"prompt_logprobs": [None, {"7": -1}]}, 'entry 1: expected {"token id": {"logprob": number}}, got {"7": -1}'),
    ],
)
def test_numbers_that_can_not_be_meant_are_refused_in_one_line(write_jsonl, recwarn, change, words):
    line = {"output_ids": [7], "prompt_ids": [1], "top_ids": [[7, 8]], "top_log_probs": [[-1, -2]]}
    message = refused(write_jsonl([{**line, **change}]), samples_of(([1, 7], [1, 2])))
    assert words in message
    assert len(message) < 500
    assert not recwarn


def test_a_log_probability_may_be_very_low(write_jsonl):
    line = {"output_ids": [7], "top_ids": [[7, 8, 9]], "top_log_probs": [[-1, -9999.0, -3e38]]}
    _, log_probs = read(write_jsonl([line]), samples_of(([1, 7], [1, 2]))).of([{"index": 0}])
    assert log_probs.tolist() == [np.float32([-1, -9999, -3e38]).tolist()]
