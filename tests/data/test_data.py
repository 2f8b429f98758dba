import copy
import itertools
import json
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from abkd_fast.data import quickstart
from abkd_fast.data.batches import balance_by_tokens, pack, prefetch, step_samples
from abkd_fast.data.rows import read_rows
from abkd_fast.data.tokenize import tokenize
from abkd_fast.errors import ConfigError
from runs import Run, poison

GOOD = {"instruction": "Say hello.", "input": "", "output": "Hello."}


def tokenized(rows, max_length=64, max_prompt_length=None):
    return tokenize(rows, quickstart.tokenizer(), max_length, max_prompt_length).dataset


def test_tokens_are_prompt_response_and_end(write_jsonl):
    tokenizer = quickstart.tokenizer()
    rows = read_rows(write_jsonl([{"prompt": "Add 1 and 2.", "output": " It is 3."}]))
    sample = tokenized(rows)[0]
    prompt = tokenizer("Add 1 and 2.")["input_ids"]
    assert sample["spans"] == [len(prompt), len(sample["input_ids"])]
    assert sample["input_ids"][: len(prompt)] == prompt
    assert sample["input_ids"][-1] == tokenizer.eos_token_id
    assert tokenizer.decode(sample["input_ids"]) == "Add 1 and 2. It is 3.<end>"


def test_long_response_is_cut_and_long_prompt_refused(write_jsonl):
    row = {"prompt": "Add 1 and 2.", "output": " It is 3." * 30}
    rows = read_rows(write_jsonl([row]))
    cut = tokenized(rows, 20)[0]
    assert len(cut["input_ids"]) == 20
    assert cut["input_ids"] == tokenized(rows, 500)[0]["input_ids"][:20]
    with pytest.raises(ConfigError, match=r"line 1: the prompt has \d+ tokens and fills all 4.*raise data.max_length"):
        tokenized(rows, 4)


def test_empty_prompt_and_missing_chat_template_are_refused(write_jsonl):
    # A response whose first token nothing predicts would take the last token of the sample before it.
    with pytest.raises(ConfigError, match="line 1: the prompt is empty"):
        tokenized(read_rows(write_jsonl([{"prompt": "", "output": "Hello."}])))
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    with pytest.raises(ConfigError, match="no chat template"):
        tokenized(read_rows(write_jsonl([{"messages": messages}])))


def test_cache_follows_content_and_length(write_jsonl):
    rows = read_rows(write_jsonl([{"prompt": "Add 1 and 2.", "output": "3"}]))
    other = read_rows(write_jsonl([{"prompt": "Add 1 and 2.", "output": "4"}]))
    assert tokenized(rows)[0] == tokenized(rows)[0]
    assert tokenized(rows)[0] != tokenized(other)[0]
    assert len(tokenized(rows, 8)[0]["input_ids"]) <= 8


def test_chat_template(write_jsonl):
    tokenizer = quickstart.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    sample = tokenize(read_rows(write_jsonl([{"messages": messages}])), tokenizer, 64).dataset[0]
    text = tokenizer.decode(sample["input_ids"])
    assert text == "user: Hi\nassistant: Hello<end>"
    assert tokenizer.decode(sample["input_ids"][: sample["spans"][0]]) == "user: Hi\nassistant: "


def test_long_prompts_are_left_out_and_long_sequences_counted(write_jsonl):
    tokenizer = quickstart.tokenizer()
    texts = [("Add 1 and 2.", " 3"), ("Add 1 and 2. " * 3, " 3"), ("Add 1.", " It is 3." * 9), ("Add 1 and 2.", " 3.")]
    path = write_jsonl([{"prompt": prompt, "output": output} for prompt, output in texts])
    rows = read_rows(path)
    prompts = [len(tokenizer(prompt)["input_ids"]) for prompt, _ in texts]
    wholes = [tokenizer(prompt + output)["input_ids"] + [tokenizer.eos_token_id] for prompt, output in texts]
    limit = len(wholes[3])  # of exactly this length, a row is not cut
    assert prompts[0] < prompts[1] - 1
    for max_prompt_length, kept in ((prompts[1] - 1, [0, 2, 3]), (prompts[1], [0, 1, 2, 3]), (None, [0, 1, 2, 3])):
        dataset = tokenized(rows, 512, max_prompt_length)
        assert dataset["row"][:] == kept
        assert dataset["input_ids"][:] == [wholes[row] for row in kept]
        assert [start for start, _ in dataset["spans"]] == [prompts[row] for row in kept]
        notes = [*tokenize(rows, tokenizer, 512, max_prompt_length).notes(rows, 512)]
        reason = f"the prompt has {prompts[1]} tokens, more than data.max_prompt_length = {max_prompt_length}"
        left_out = f"1 of 4 rows are left out: {path} line 2: {reason}"
        assert notes == ([] if len(kept) == 4 else [left_out])
    result = tokenize(rows, tokenizer, limit, prompts[1] - 1)
    dataset = result.dataset
    assert dataset["input_ids"][:] == [wholes[row][:limit] for row in (0, 2, 3)]
    assert dataset["row_length"][:] == [len(wholes[row]) for row in (0, 2, 3)]
    cut, left_out = result.notes(rows, limit)
    assert cut == f"1 of 3 samples exceed {limit} tokens and are cut"
    assert left_out.startswith(f"1 of 4 rows are left out: {path} line 2: ")
    with pytest.raises(ConfigError, match=r"line 1 and all others: the prompts exceed 2 tokens.*raise data.max_prompt"):
        tokenized(rows, 512, 2)


def test_rows_of_a_bad_step_are_named_rightly_where_others_are_left_out(write_jsonl, tmp_path, monkeypatch, capsys):
    long = {"prompt": "Add 1 and 2. " * 9, "output": " 3"}
    path = write_jsonl([long, *[{"prompt": f"Add {n}.", "output": str(n)} for n in range(2, 6)], long])
    poison(monkeypatch, 1)
    assert Run(tmp_path, f"data.train={path}", "data.max_prompt_length=20", "data.dev=null")() == 1
    captured = capsys.readouterr()
    assert f"2 of 6 rows are left out: {path} line 1: the prompt has 54 tokens, more than" in captured.out
    assert "data.max_prompt_length = 20, and 1 others" in captured.out
    assert f"samples {path} line 2, 3, 4, 5; " in captured.err


@given(st.lists(st.integers(1, 512), min_size=1, max_size=70), st.integers(1, 9))
def test_samples_are_dealt_evenly(lengths, world):
    shares = balance_by_tokens(lengths, world)
    assert sorted(place for share in shares for place in share) == list(range(len(lengths)))
    assert all(share == sorted(share) for share in shares)
    assert max(map(len, shares)) <= -(-len(lengths) // world)
    loads = [sum(lengths[place] for place in share) for share in shares]
    if len(lengths) % world == 0:
        assert len({len(share) for share in shares}) == 1
        assert max(loads) - min(loads) <= max(lengths)


lengths = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(lengths=lengths, max_tokens=st.integers(24, 64))
def test_packing_keeps_every_response_token_once(lengths, max_tokens):
    samples = [
        {"input_ids": list(range(100 * i, 100 * i + prompt + response)), "spans": [prompt, prompt + response]}
        for i, (prompt, response) in enumerate(lengths)
    ]
    batches = pack(samples, max_tokens)
    assert all(batch.tokens <= max_tokens for batch in batches)
    assert [sample for batch in batches for sample in batch.samples] == samples
    labels = torch.cat([batch.labels for batch in batches]).tolist()
    assert labels == [token for sample in samples for token in sample["input_ids"][sample["spans"][0] :]]
    for batch in batches:
        # A position predicts its successor within the same sequence.
        assert batch.labels.tolist() == (batch.input_ids[0, batch.positions] + 1).tolist()
        starts = batch.cu_seqlens.tolist()
        assert starts[-1] == batch.tokens
        assert (batch.position_ids[0, starts[:-1]] == 0).all()
        assert batch.max_seqlen == max(b - a for a, b in itertools.pairwise(starts))


def test_epochs_are_permutations_that_depend_on_seed_and_epoch_alone(write_jsonl):
    rows = read_rows(write_jsonl([{"prompt": f"Add {i}", "output": str(i)} for i in range(20)]))
    dataset = tokenized(rows)

    def samples(seed, *steps):
        return [sample["input_ids"] for step in steps for sample in step_samples(dataset, 6, seed, step)]

    first, second = samples(1, 0, 1, 2), samples(1, 3, 4, 5)
    assert first == samples(1, 0, 1, 2)
    assert first != second != samples(2, 0, 1, 2)
    assert second[6:12] == samples(1, 4)
    for epoch in (first, second):
        assert len(epoch) == 18
        assert len({json.dumps(ids) for ids in epoch}) == 18


def test_real_dolly_has_the_published_lengths(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "gpt2")
    rows = read_rows(str(shared / "data" / "dolly" / "train.jsonl"))
    assert len(rows) == 11435
    result = tokenize(rows, tokenizer, 512, 256)
    dataset = result.dataset
    prompt = torch.tensor([start for start, _ in dataset["spans"]]).double()
    total = torch.tensor([len(ids) for ids in dataset["input_ids"]]).double()
    assert prompt.mean().item() == pytest.approx(71.3, abs=0.1)
    assert total.mean().item() == pytest.approx(145.6, abs=0.2)
    assert int(total.max()) == 512
    # The papers' tools left the long prompts out already.
    assert [*result.notes(rows, 512)] == ["198 of 11435 samples exceed 512 tokens and are cut"]


def test_items_made_ahead_are_the_same():
    made = []

    def items():
        for number in range(5):
            made.append(number)
            yield number

    coming = prefetch(items())
    assert next(coming) == 0
    assert next(coming) == 1
    assert list(coming) == [2, 3, 4]
    assert made == [0, 1, 2, 3, 4]


def test_an_error_ahead_reaches_the_caller():
    def items():
        yield 1
        raise OSError("no such page")

    coming = prefetch(items())
    assert next(coming) == 1
    with pytest.raises(OSError, match="no such page"):
        next(coming)


def test_the_next_item_is_made_while_the_last_is_used():
    begun = threading.Event()

    def items():
        yield 1
        begun.set()
        yield 2

    coming = prefetch(items())
    assert next(coming) == 1
    assert begun.wait(timeout=60)
    coming.close()


@pytest.mark.parametrize(
    "row",
    [
        GOOD,
        {"prompt": "Say hello.", "output": "Hello."},
        {"messages": [{"role": "user", "content": "Say."}, {"role": "assistant", "content": "Hello."}]},
    ],
)
def test_cut_answer_teaches_no_end(write_jsonl, row):
    tokenizer = copy.deepcopy(quickstart.tokenizer())
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    whole, cut = (
        tokenize(read_rows(write_jsonl([row | more])), tokenizer, 64).dataset["input_ids"][0]
        for more in ({}, {"ended": False})
    )
    assert whole == [*cut, tokenizer.eos_token_id]


def test_held_out_tasks_are_none_of_the_other_splits():
    held_out, *others = ([*quickstart.rows(split)] for split in ("held-out", "test", "dev", "train"))
    assert len(held_out) == 1000
    assert all(isinstance(row["output"], list) for row in held_out)
    for split in others:
        assert held_out[:100] != split[:100]


def test_each_caller_has_its_own_tokenizer():
    """Runs change theirs; a later one in the same process must not see that."""
    changed, size = quickstart.tokenizer(), len(quickstart.tokenizer())
    changed.add_tokens(["<new>"])
    changed.chat_template = "none"
    assert (len(quickstart.tokenizer()), quickstart.tokenizer().chat_template) == (size, None)
