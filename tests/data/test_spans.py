"""Samples with any trained spans, against masks: one flag for each token."""

import itertools

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abkd_fast.data.batches import collate, count_labels, make_step_batch, pack, prompt_of
from abkd_fast.teacher import store


@st.composite
def samples_of(draw):
    """Samples whose spans lie anywhere after the first token, also side by side, at the end, or empty at the end."""
    samples = []
    for number in range(draw(st.integers(1, 8))):
        length = draw(st.integers(1, 14))
        places = sorted(draw(st.lists(st.integers(1, length), max_size=6)))
        pairs = zip(places[::2], places[1::2], strict=False)
        spans = [place for pair in pairs if pair[0] < pair[1] for place in pair] or [length, length]
        samples.append({"input_ids": list(range(100 * number, 100 * number + length)), "spans": spans})
    return samples


def mask_of(sample):
    """Whether each token is trained."""
    pairs = list(zip(sample["spans"][::2], sample["spans"][1::2], strict=True))
    return [any(start <= place < stop for start, stop in pairs) for place in range(len(sample["input_ids"]))]


def labels_of(sample):
    return list(itertools.compress(sample["input_ids"], mask_of(sample)))


@settings(max_examples=200, deadline=None)
@given(samples_of())
def test_labels_of_a_batch_are_the_marked_tokens(samples):
    batch = collate(samples)
    assert batch.labels.tolist() == [token for sample in samples for token in labels_of(sample)]
    marked = torch.tensor([flag for sample in samples for flag in mask_of(sample)], dtype=torch.bool)
    assert batch.positions.tolist() == (marked.nonzero()[:, 0] - 1).tolist()
    assert torch.equal(batch.input_ids[0, batch.positions + 1], batch.labels)
    assert batch.positions.dtype == batch.labels.dtype == torch.int64
    assert [count_labels(sample) for sample in samples] == [len(labels_of(sample)) for sample in samples]
    step = make_step_batch(samples, samples[:1], 20)
    assert step.num_labels == len(batch.labels)
    assert step.num_pretrain_labels == len(labels_of(samples[0]))


@settings(max_examples=60, deadline=None)
@given(samples_of(), st.integers(4, 40))
def test_packing_loses_no_label(samples, max_tokens):
    labels = [token for batch in pack(samples, max_tokens) for token in batch.labels.tolist()]
    assert labels == [token for sample in samples for token in labels_of(sample)]


@settings(max_examples=60, deadline=None)
@given(samples_of(), st.integers(4, 40))
def test_layout_has_a_row_for_every_label(samples, block_tokens):
    columns = {name: [sample[name] for sample in samples] for name in ("input_ids", "spans")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "BLOCK_TOKENS", block_tokens)
        layout = store.Layout(datasets.Dataset.from_dict(columns))
    rows = {}
    for index, sample in enumerate(samples):
        places = layout.sample(index)
        rows |= zip(range(places.start, places.stop), labels_of(sample), strict=True)
    assert sorted(rows) == list(range(layout.rows))
    order = [index for block in layout.blocks for index in block]
    assert sorted(order) == list(range(len(samples)))
    for number, block in enumerate(layout.blocks):  # what is computed for a block lies in its place
        places = layout.block(number)
        computed = [token for batch in pack([samples[index] for index in block], 16) for token in batch.labels.tolist()]
        assert [rows[place] for place in range(places.start, places.stop)] == computed


@settings(max_examples=60, deadline=None)
@given(samples_of(), samples_of())
def test_hash_tells_samples_apart(ours, theirs):
    columns = [{name: [s[name] for s in samples] for name in ("input_ids", "spans")} for samples in (ours, theirs)]
    first, second = (store.hash_samples(datasets.Dataset.from_dict(each)) for each in columns)
    assert (first == second) == (columns[0] == columns[1])


def test_a_prompt_is_all_before_the_last_span():
    ids = list(range(9))
    assert prompt_of({"input_ids": ids, "spans": [2, 9]}) == [0, 1]
    assert prompt_of({"input_ids": ids, "spans": [2, 4, 6, 8]}) == ids[:6]
    assert prompt_of({"input_ids": ids, "spans": [9, 9]}) == ids
