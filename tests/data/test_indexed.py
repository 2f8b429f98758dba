"""Indexed binary files: read as they were written, refused where they are not whole, trained on like JSONL."""

import pathlib

import numpy as np
import pytest

from abkd_fast.data import indexed_dataset, quickstart
from abkd_fast.data.rows import DEV, TRAIN, read_rows
from abkd_fast.data.tokenize import tokenize
from abkd_fast.errors import ConfigError
from abkd_fast.teacher.store import hash_samples
from runs import Run, assert_same

ITEMS = [[5, 6, 127, 7], [1], [], [9, 9, 9, 120, 9]]


def read(path):
    return [ids.tolist() for _, ids in indexed_dataset.read_items(pathlib.Path(path))]


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64", "uint16", "uint32"])
def test_items_are_as_written(write_indexed, dtype):
    path = write_indexed(ITEMS, dtype=dtype)
    where, ids = zip(*indexed_dataset.read_items(pathlib.Path(path)), strict=True)
    assert where == tuple(f"{path} item {number}" for number in (1, 2, 3, 4))
    assert [item.tolist() for item in ids] == ITEMS
    assert {item.dtype for item in ids} == {np.dtype(dtype)}
    assert read(write_indexed([], "empty_0", dtype)) == []


@pytest.mark.parametrize(
    ("dtype", "separator"),
    [("uint16", 65535), ("uint16", -1), ("uint32", 4294967295), ("uint32", -1), ("int32", 2147483647), ("int32", -1)],
)
def test_separator(write_indexed, dtype, separator):
    path = write_indexed([[3, 4, separator, 5, 6, 0]], dtype=dtype)
    (row,) = read_rows(path)
    assert {key: ids.tolist() for key, ids in row.values.items()} == {"prompt_ids": [3, 4], "output_ids": [5, 6, 0]}


def test_sources(write_indexed, write_jsonl, tmp_path):
    for name in ("train_0", "train_1", "train_3", "valid_0"):
        write_indexed([[1]], name)
    folder = str(tmp_path)
    assert [path.name for path in indexed_dataset.find(folder, TRAIN)] == ["train_0.bin", "train_1.bin"]
    assert [path.name for path in indexed_dataset.find(folder, DEV)] == ["valid_0.bin"]
    write_indexed([[1]], "dev_0")
    assert [path.name for path in indexed_dataset.find(folder, DEV)] == ["dev_0.bin"]
    for suffix in ("bin", "idx"):
        assert indexed_dataset.find(f"{folder}/train_3.{suffix}", DEV) == [tmp_path / "train_3.bin"]
    assert indexed_dataset.find(write_jsonl([]), TRAIN) == []
    with pytest.raises(ConfigError, match=r"has dev_0\.bin, but no test_0\.bin; name a file"):
        indexed_dataset.find(folder, ("test",))


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def put(path, offset, content):
    old = path.read_bytes()
    path.write_bytes(old[:offset] + content + old[offset + len(content) :])


# What is done to the .bin and the .idx file of ITEMS, 34 bytes of header, 4 lengths, 4 places; and what the error says.
DAMAGE = {
    "no index": (lambda data, index: index.unlink(), "train_0.idx: can't be read (No such file or directory)"),
    "no data": (lambda data, index: data.unlink(), "train_0.bin: can't be read (No such file or directory)"),
    "truncated data": (lambda data, index: cut(data, 18), "item 4: is bytes 10 to 20, but the file has 18: it is"),
    "empty data": (lambda data, index: cut(data, 0), "item 1: is bytes 0 to 8, but the file has 0"),
    "truncated index": (lambda data, index: cut(index, 60), "has 60 bytes, but its 4 items ask for 90"),
    "truncated header": (lambda data, index: cut(index, 20), "its header alone 34"),
    "empty index": (lambda data, index: cut(index, 0), "is not the index of a binary file: it begins with b''"),
    "another format": (lambda data, index: put(index, 0, b"TNTIDX\0\0\1"), "it begins with b'TNTIDX"),
    "another version": (lambda data, index: put(index, 9, b"\2"), "has version 2 of its format, expected 1"),
    "floating point": (lambda data, index: put(index, 17, b"\6"), "has type code 6, expected that of whole numbers"),
    "countless items": (lambda data, index: put(index, 18, b"\xff" * 8), "18446744073709551615 items ask for"),
    "negative length": (lambda data, index: put(index, 34, b"\xff" * 4), "item 1: is bytes 0 to -2"),
    "place before the start": (lambda data, index: put(index, 50, b"\xff" * 8), "item 1: is bytes -1 to 7"),
    "place that overflows": (lambda data, index: put(index, 50, b"\xff" * 7 + b"\x7f"), "item 1: is bytes 92233720"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_one_line(write_indexed, name):
    damage, message = DAMAGE[name]
    path = pathlib.Path(write_indexed(ITEMS))
    damage(path, path.with_suffix(".idx"))
    with pytest.raises(ConfigError) as error:
        read(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("item", "dtype", "message"),
    [
        ([3, 4, 5], "uint16", "item 2: has no separator (65535); without prompts it is plain text, for data.pretrain"),
        ([3, 4, 65535], "uint16", "item 2: the response is empty"),
        ([65535, 4], "uint16", "item 2: the prompt is empty"),
        ([3, 65535, 4, 65535, 5], "uint16", "item 2: has token id 65535, but the tokenizer has 840 tokens"),
        ([3, 2000, 65535, 4], "uint16", "item 2: has token id 2000, but the tokenizer has 840 tokens"),
        ([3, -2, -1, 4], "int32", "item 2: has token id -2"),
        ([3, 255, 4], "uint8", "item 1: uint8 has no room for the tokenizer's 840 tokens and a separator"),
    ],
)
def test_items_that_are_no_rows_are_named(write_indexed, item, dtype, message):
    path = write_indexed([[3, -1, 4, 0], item], dtype=dtype)
    with pytest.raises(ConfigError) as error:
        tokenize(read_rows(path), quickstart.tokenizer(), 64)
    assert f"{path} {message}" in str(error.value)


def as_items(rows):
    """Rows as the papers' tools store them."""
    tokenizer = quickstart.tokenizer()
    for row in rows:
        prompt = tokenizer(row.values["prompt"])["input_ids"]
        whole = tokenizer(row.values["prompt"] + row.values["output"])["input_ids"]
        yield [*prompt, 65535, *whole[len(prompt) :], tokenizer.eos_token_id]


def test_samples_are_those_of_the_same_rows_as_jsonl(write_indexed, write_jsonl, tmp_path):
    """JSONL of all splits beside the binary file is not read."""
    tokenizer = quickstart.tokenizer()
    rows = read_rows("quickstart:small", 50)
    items = list(as_items(rows))
    write_indexed(items[:30], "train_0")
    write_indexed(items[30:], "train_1")
    write_jsonl([row.values for row in rows[:5]], "valid.jsonl")
    limits = 42, 38  # some are cut, some left out
    expected = tokenize(rows, tokenizer, *limits).dataset
    binary = tokenize(read_rows(str(tmp_path)), tokenizer, *limits).dataset
    assert 0 < len(binary) < 50
    assert max(expected["row_length"]) > 42
    assert binary.features == expected.features
    assert binary.to_dict() == expected.to_dict()
    assert hash_samples(binary) == hash_samples(expected), "the teacher's cache is the same"
    assert len(read_rows(str(tmp_path), limit=31)) == 31


def test_run_is_that_of_the_same_rows_as_jsonl(write_indexed, tmp_path):
    write_indexed(as_items(read_rows("quickstart:small", 20)), "train_0")
    write_indexed(as_items(read_rows("quickstart:dev", 4)), "valid_0")
    folder = f'"{tmp_path}"'
    jsonl, binary = Run(tmp_path / "jsonl"), Run(tmp_path / "binary", f"data.train={folder}", f"data.dev={folder}")
    assert [jsonl(), binary()] == [0, 0]
    assert_same(binary, jsonl)
