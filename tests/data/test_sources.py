"""Files, folders and data sets: the same rows from each of them, or one line that says what is wrong."""

import bz2
import csv
import datetime
import gzip
import io
import json
import lzma
import os
import pathlib

import datasets
import pyarrow
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from abkd_fast.data.rows import DEV, TRAIN, read_rows
from abkd_fast.data.text_files import MAGIC
from abkd_fast.errors import ConfigError

ROWS = [
    {"id": "007", "prompt": 'Añade 2, "3" y 4:\n\n', "output": "9 \U0001f600"},
    {"id": "1", "prompt": "x\u2028y", "output": " z\r\n\tw"},
    {"id": "", "prompt": "שלום", "output": "'\\n"},
]
CHAT = [
    {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": [
            {"type": "function", "function": {"name": "time", "arguments": {"zone": "UTC"}}}]}],
        "tools": [{"type": "function", "function": {"name": "time"}}],
    },
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
]  # fmt: skip


def jsonl(rows, **options):
    return "".join(json.dumps(row, **options) + "\n" for row in rows).encode()


def table(rows, delimiter=","):
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, rows[0].keys(), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def zstd(content):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as file:
        file.write(content)
    return sink.getvalue().to_pybytes()


def parquet(rows):
    sink = io.BytesIO()
    datasets.Dataset.from_list(rows).to_parquet(sink)
    return sink.getvalue()


def arrow(rows, kind=pyarrow.ipc.new_stream):
    sink = io.BytesIO()
    content = datasets.Dataset.from_list(rows).data.table
    with kind(sink, content.schema) as writer:
        writer.write_table(content)
    return sink.getvalue()


ALPACA = {"instruction": "Say hello.", "input": "", "output": "Hello."}
BOM = b"\xef\xbb\xbf"
FILES = {
    "rows.jsonl": jsonl(ROWS),
    "rows.JSONL": jsonl(ROWS, ensure_ascii=False),
    "rows": jsonl(ROWS),
    "rows.txt": BOM + jsonl(ROWS),
    "crlf.jsonl": jsonl(ROWS).replace(b"\n", b"\r\n\r\n"),
    "array.json": json.dumps(ROWS, indent=2).encode(),
    "array.txt": BOM + b"\n" + json.dumps(ROWS, ensure_ascii=False).encode(),
    "lines.json": jsonl(ROWS),
    "rows.csv": table(ROWS),
    "bom.csv": BOM + table(ROWS),
    "rows.tsv": table(ROWS, "\t"),
    "rows.parquet": parquet(ROWS),
    "stream.arrow": arrow(ROWS),
    "file.arrow": arrow(ROWS, pyarrow.ipc.new_file),
    "rows.jsonl.gz": gzip.compress(jsonl(ROWS)),
    "rows.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "rows.csv.gz": gzip.compress(table(ROWS)),
    "rows.jsonl.bz2": bz2.compress(jsonl(ROWS)),
    "rows.jsonl.xz": lzma.compress(jsonl(ROWS)),
    "rows.jsonl.zst": zstd(jsonl(ROWS)),
    "frames.jsonl.zst": zstd(jsonl(ROWS[:1])) + zstd(jsonl(ROWS[1:])),
    "rows.tsv.zst": zstd(table(ROWS, "\t")),
    "[1]*?.parquet": parquet(ROWS),
}


@pytest.mark.parametrize("name", FILES)
def test_the_same_rows_from_every_file(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    rows = read_rows(str(tmp_path / name))
    assert [row.values for row in rows] == [{"prompt": row["prompt"], "output": row["output"]} for row in ROWS]
    assert rows.notes[-1].endswith("3 rows of prompt and output; not read: id")
    assert len(read_rows(str(tmp_path / name), limit=2)) == 2


@pytest.mark.parametrize("kind", ["json", "parquet", "arrow", "csv"])
def test_chat_rows_are_the_same_from_every_file(tmp_path, kind):
    """Arrow adds keys that are null, and CSV has text alone."""
    texts = [{key: json.dumps(row.get(key)) for key in ("messages", "tools")} for row in CHAT]
    content = {"json": json.dumps(CHAT).encode(), "parquet": parquet(CHAT), "arrow": arrow(CHAT), "csv": table(texts)}
    (tmp_path / f"rows.{kind}").write_bytes(content[kind])
    assert [row.values for row in read_rows(str(tmp_path / f"rows.{kind}"))] == CHAT


def test_values_that_json_has_not(tmp_path):
    """Dates in messages become text. A date as an output is refused, and one that is not read doesn't matter."""
    date = datetime.datetime(2020, 1, 2)
    messages = [
        {"role": "user", "content": "Hi", "time": date},
        {"role": "assistant", "content": "Hello", "time": None},
    ]
    path = tmp_path / "rows.parquet"
    path.write_bytes(parquet([{"messages": messages, "date": date, "raw": b"x", "tags": [None, {"x": None}]}]))
    (row,) = read_rows(str(path))
    assert json.loads(json.dumps(row.values))["messages"][0]["time"] == "2020-01-02 00:00:00"
    path = tmp_path / "dates.parquet"
    path.write_bytes(parquet([{"prompt": "x", "output": b"y"}]))
    with pytest.raises(ConfigError, match='row 1: "output" must be text, got '):
        read_rows(str(path))


GOOD = b'{"prompt": "x", "output": "y"}\n'
BAD = {
    "utf-16.jsonl": (GOOD.decode().encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
    "utf-16-be.jsonl": (GOOD.decode().encode("utf-16-be"), "is UTF-16 text"),
    "utf-16-le.csv": (table(ROWS).decode().encode("utf-16-le"), "is UTF-16 text"),
    "utf-32.json": (GOOD.decode().encode("utf-32"), "is UTF-32 text"),
    "utf-32-be.json": (GOOD.decode().encode("utf-32-be"), "is UTF-32 text"),
    "latin-1.jsonl": (GOOD + '{"prompt": "é"}'.encode("latin-1"), "line 2: is not UTF-8 text"),
    "latin-1.json": ('[\n{"prompt": "é"}]'.encode("latin-1"), "line 2: is not UTF-8 text"),
    "latin-1.csv": ("prompt,output\né,x\n".encode("latin-1"), "is not UTF-8 text in line 1 or after it"),
    "parquet.jsonl": (parquet(ROWS), "is Parquet, not what its name says; it must end in .parquet"),
    "arrow.jsonl": (arrow(ROWS, pyarrow.ipc.new_file), "is Arrow, not what its name says; it must end in .arrow"),
    "gzip.jsonl": (gzip.compress(GOOD), "is gzip, not what its name says; it must end in .gz"),
    "zstd.json": (zstd(GOOD), "is Zstandard, not what its name says; it must end in .zst"),
    "bzip2.csv": (bz2.compress(GOOD), "is bzip2, not what its name says"),
    "xz.csv": (lzma.compress(GOOD), "is xz, not what its name says"),
    "zip.jsonl": (b"PK\3\4rest", "is zip or Excel, not what its name says; unpack it"),
    "zip.jsonl.gz": (gzip.compress(b"PK\3\4rest"), "is zip or Excel, not what its name says; unpack it"),
    "pointer.parquet": (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer; git lfs pull"),
    "pointer.jsonl": (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer; git lfs pull"),
    "json.parquet": (GOOD, "can't be read as a .parquet file ("),
    "gzip.parquet": (gzip.compress(parquet(ROWS)), "is gzip, not what its name says; it must end in .gz"),
    "cut.parquet": (parquet(ROWS)[:-9], "can't be read as a .parquet file ("),
    "cut.arrow": (arrow(ROWS)[:100], "can't be read as a .arrow file ("),
    "empty.parquet": (b"", "can't be read as a .parquet file ("),
    "json.jsonl.gz": (GOOD, "can't be read (Not a gzipped file"),
    "json.jsonl.bz2": (GOOD, "can't be read (Invalid data stream"),
    "json.jsonl.xz": (GOOD, "can't be read (Input format not supported"),
    "json.jsonl.zst": (GOOD, "can't be read (ZSTD decompress failed"),
    "cut.jsonl.gz": (gzip.compress(jsonl(ROWS))[:-9], "can't be read (Compressed file ended before"),
    "cut.jsonl.zst": (zstd(jsonl(ROWS))[:-9], "can't be read (Truncated compressed stream"),
    "cut.jsonl.xz": (lzma.compress(jsonl(ROWS))[:-9], "can't be read (Compressed file ended before"),
    "empty.jsonl": (b"", "has no rows"),
    "blank.jsonl": (b"\n \r\n", "has no rows"),
    "bom.jsonl": (BOM, "has no rows"),
    "empty.json": (b"[]", "has no rows"),
    "empty.csv": (b"", "has no rows"),
    "header.csv": (b"prompt,output\n", "has no rows"),
    "empty.jsonl.gz": (gzip.compress(b""), "has no rows"),
    "broken.jsonl": (GOOD + b'{"prompt": "x', "line 2: broken JSON: Unterminated string"),
    "more.jsonl": (GOOD + GOOD[:-1] + GOOD, "line 2: broken JSON: Extra data"),
    "nul.jsonl": (GOOD + b"\0" * 8, "line 2: broken JSON: has NUL bytes"),
    "lines.jsonl": (json.dumps(ROWS[0], indent=1).encode(), "line 1: an object that spans lines; each line must be"),
    "digits.jsonl": (b'{"id": %s}' % (b"1" * 4301), "line 1: broken JSON: has a whole number of more than 4,300"),
    "nested.jsonl": (b'{"x": ' + b"[" * 20000 + b"]" * 20000 + b"}", "is nested more than 100 levels deep"),
    "deep.jsonl": (b'{"x": ' + b"[" * 101 + b"]" * 101 + b"}", "is nested more than 100 levels deep"),
    "twice.jsonl": (b'{"prompt": "x", "output": "y", "output": "z"}', 'line 1: has the key "output" twice'),
    "half.jsonl": (b'{"prompt": "\\uD83d", "output": "y"}', "line 1: has half of a surrogate pair"),
    "object.json": (b'{"data": [{"prompt": "x", "output": "y"}]}', 'missing "instruction"; keys are data'),
    "columns.json": (b'{"instruction": ["x"], "output": ["y"]}', "write one object for each row"),
    "cut.json": (b'[{"prompt": "x", "output": "y"},\n{"prom', "row 2 (line 2): broken JSON: Unterminated string"),
    "open.json": (b'[{"prompt": "x", "output": "y"}', "broken JSON: the array goes on without a comma, or has no end"),
    "comma.json": (b'[{"prompt": "x", "output": "y"},]', "row 2 (line 1): broken JSON: Expecting value"),
    "after.json": (b'[{"prompt": "x", "output": "y"}]\n[]', "broken JSON: there is more after the array"),
    "twice.json": (b'[{"prompt": "x", "prompt": "y"}]', 'row 1: has the key "prompt" twice'),
    "list.json": (b"[[]]", "row 1: expected a JSON object"),
    "no-header.csv": (b"What is 2 + 2?,4\n", "line 1: expected the names of the columns, separated by commas"),
    "semicolons.csv": (b"prompt;output\nx;y\n", "line 1: expected the names of the columns, separated by commas"),
    "columns.csv": (b"prompt,output,output\n", 'line 1: has the column "output" twice'),
    "width.csv": (b'prompt,output\nx,"y\n"\nx,y,z\n', "line 4: has 3 fields, but the first line names 2 columns"),
    "quote.csv": (b'prompt,output\nx,y\nx,"y\nz\n', "line 3: broken CSV: unexpected end of data"),
    "missing.csv": (b"prompt,output\nx,\n", 'line 2: missing "output"'),
    "image.json": (b'[{"image": "a.png", "conversations": [{"from": "human", "value": "x"}]}]', 'has "image", and'),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_files_that_are_refused(tmp_path, name):
    content, message = BAD[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        read_rows(str(path))
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_fields_and_rows_of_any_size(tmp_path):
    text = "long " * 400_000
    for name, content in {
        "a.csv": table([{"prompt": text, "output": "x"}]),
        "a.json": jsonl([{"prompt": text, "output": "x"}]),
    }.items():
        (tmp_path / name).write_bytes(content)
        assert read_rows(str(tmp_path / name))[0].values["prompt"] == text


def test_bad_lines_of_every_file_are_left_out(tmp_path):
    contents = {
        "a.jsonl": GOOD + b'{"prompt\n\xff\n' + GOOD,
        "a.json": b'[%s, {"x": 1, "x": 2}, {"prompt": "\\ud800"}, %s]' % (GOOD, GOOD),
        "a.csv": b"prompt,output\nx,y\nx\nx,\nx,y\n",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        rows = read_rows(str(tmp_path / name), on_bad_row="skip")
        assert [row.values for row in rows] == [{"prompt": "x", "output": "y"}] * 2
        assert "2 rows are left out" in rows.notes[-1]


@pytest.mark.parametrize(
    "source",
    ["nowhere.jsonl", "/nowhere/at/all", "./nowhere", "a/b/c", "", "x" * 5000, "a\0b", "a/b.csv.gz", "nowhere::dev"],
)
def test_missing_file(source):
    with pytest.raises(ConfigError, match="no such file"):
        read_rows(source)


def test_unreadable_files(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_bytes(GOOD)
    (tmp_path / "rows.parquet").write_bytes(parquet(ROWS))

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "open", refuse)
    for name in ("rows.jsonl", "rows.parquet"):
        with pytest.raises(ConfigError, match=rf"{name}: can't be read \(Permission denied\)"):
            read_rows(str(tmp_path / name))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ConfigError, match=r"can't be read \(Permission denied\)"):
        read_rows(str(tmp_path))
    monkeypatch.undo()
    monkeypatch.setattr(pathlib.Path, "iterdir", refuse)
    with pytest.raises(ConfigError, match=r"can't be read \(Permission denied\)"):
        read_rows(str(tmp_path))


def test_folder_limit_and_formats(write_jsonl, tmp_path):
    write_jsonl([ALPACA, "", {"prompt": "P", "output": "O", "other": 1}], "a.jsonl")
    write_jsonl([{**ALPACA, "input": "I"}, {**ALPACA, "output": ["One.", "Another."]}], "b.jsonl")
    first, second, third, references = read_rows(str(tmp_path))
    assert first.values["prompt"].endswith("### Instruction:\nSay hello.\n\n### Response:\n")
    assert second.values == {"prompt": "P", "output": "O"}
    assert second.where.endswith("a.jsonl line 3")
    assert "### Input:\nI\n" in third.values["prompt"]
    assert references.values["output"] == "One."
    assert len(read_rows(str(tmp_path), limit=2)) == 2


# Files of a folder, and those that are the rows for training and for evaluation (or what the error says).
FOLDERS = [
    (["train.jsonl", "dev.jsonl", "valid.jsonl"], ["train.jsonl"], ["dev.jsonl"]),
    (["Train.jsonl", "validation.csv", "test.json"], ["Train.jsonl"], ["validation.csv"]),
    (["my_train-1.jsonl", "train-2.jsonl", "my-val.jsonl"], ["my_train-1.jsonl", "train-2.jsonl"], ["my-val.jsonl"]),
    (["a.jsonl", "b.jsonl"], ["a.jsonl", "b.jsonl"], ["a.jsonl", "b.jsonl"]),
    (["a.jsonl", "b.jsonl", "test.jsonl"], ["a.jsonl", "b.jsonl"], "says dev or valid; name a file (a.jsonl, b."),
    (["a.jsonl", "eval.jsonl"], ["a.jsonl"], ["eval.jsonl"]),
    (["dev.jsonl", "test.jsonl"], "no name of its files says train; name a file (dev.jsonl, test", ["dev.jsonl"]),
    (["train_test.jsonl"], "says train; name a file (train_test.jsonl)", "says dev or valid; name a file"),
    (["latest.jsonl", "restrained.jsonl"], ["latest.jsonl", "restrained.jsonl"], ["latest.jsonl", "restrained.jsonl"]),
    (["a.jsonl", "config.json", "README.md"], ["a.jsonl"], ["a.jsonl"]),
    (["train.csv", "train.parquet"], ["train.parquet"], "says dev or valid"),
    (["a.jsonl", "a.jsonl.gz", "b.jsonl.gz"], ["a.jsonl", "b.jsonl.gz"], ["a.jsonl", "b.jsonl.gz"]),
    (["data/train-0.parquet", "data/validation-0.parquet"], ["data/train-0.parquet"], ["data/validation-0.parquet"]),
    (["train/a.jsonl", "test/a.jsonl", "other/a.jsonl"], ["train/a.jsonl"], "says dev or valid; name a file"),
    (["train1.jsonl", "test1.jsonl", "val2.jsonl"], ["train1.jsonl"], ["val2.jsonl"]),
    (["trainset.jsonl", "testset.jsonl", "devdata.jsonl"], ["trainset.jsonl"], ["devdata.jsonl"]),
    (["dollyTrain.jsonl", "dollyTest.jsonl", "dollyValSet.jsonl"], ["dollyTrain.jsonl"], ["dollyValSet.jsonl"]),
    (["TRAIN.jsonl", "TESTset.jsonl"], ["TRAIN.jsonl"], "says dev or valid"),
    (["dataset.jsonl", "TestData2.jsonl"], ["dataset.jsonl"], "says dev or valid"),
    ([".train.jsonl", "notes.md", "deep/a.json"], "a folder without .jsonl files", "a folder without .jsonl files"),
]  # fmt: skip


@pytest.mark.parametrize(("names", "train", "dev"), FOLDERS)
def test_names_of_a_folder_say_its_splits(tmp_path, names, train, dev):
    for name in names:
        rows = [{"prompt": name, "output": "x"}]
        content = table(rows) if ".csv" in name else parquet(rows) if ".parquet" in name else jsonl(rows)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    for splits, expected in ((TRAIN, train), (DEV, dev)):
        if isinstance(expected, str):
            with pytest.raises(ConfigError) as error:
                read_rows(str(tmp_path), splits=splits)
            assert expected in str(error.value)
            continue
        rows = read_rows(str(tmp_path), splits=splits)
        assert [row.values["prompt"] for row in rows] == expected
        assert rows.notes[0].startswith(f"{tmp_path}: read {', '.join(expected)}")
        for name in {*names} - {*expected, "README.md", "other/a.jsonl"}:
            assert name in rows.notes[0].partition("not read: ")[2]


def test_a_split_of_a_folder_by_name(tmp_path):
    for name in ("train", "dev", "test"):
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl([{"prompt": name, "output": "x"}]))
    for split, name in {"test": "test", "validation": None, "dev": "dev"}.items():
        if name:
            assert read_rows(f"{tmp_path}::{split}")[0].values["prompt"] == name
        else:
            with pytest.raises(ConfigError, match="says valid; name a file"):
                read_rows(f"{tmp_path}::{split}")
    for source in (f"{tmp_path}:test", f"{tmp_path}:foo:test"):
        with pytest.raises(ConfigError, match=r"a folder of files has no configurations; name a split as .*::test$"):
            read_rows(source)
    with pytest.raises(ConfigError, match=r"a file has no splits and no configurations; name it as .*test.jsonl$"):
        read_rows(f"{tmp_path}/test.jsonl::test")


@pytest.mark.parametrize("split", ["train", "test", "foo", "train[:10]"])
def test_a_named_split_that_no_file_says_is_refused(tmp_path, split):
    """The folder is not read whole in its place."""
    (tmp_path / "rows.jsonl").write_bytes(GOOD)
    assert len(read_rows(str(tmp_path))) == 1
    with pytest.raises(ConfigError) as error:
        read_rows(f"{tmp_path}::{split}")
    assert f"no name of its files says {split}; name a file (rows.jsonl)" in str(error.value)


def test_papers_folder_trains_on_its_training_rows(shared):
    folder = str(shared / "data" / "dolly")
    assert len(read_rows(folder)) == 11435
    assert len(read_rows(folder, splits=DEV)) == 1000


def test_saved_data_sets(tmp_path):
    parts = {
        name: datasets.Dataset.from_list([{"prompt": name, "output": "x"}]) for name in ("train", "test", "validation")
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "parts")
    parts["test"].save_to_disk(tmp_path / "one")
    source = str(tmp_path / "parts")
    (row,) = rows = read_rows(source)
    assert (row.values["prompt"], row.where) == ("train", f"{source} row 1")
    assert rows.notes[0] == f"{source}: split train"
    assert read_rows(source, splits=DEV)[0].values["prompt"] == "validation"
    assert read_rows(f"{source}::test")[0].values["prompt"] == "test"
    assert read_rows(str(tmp_path / "one"))[0].values["prompt"] == "test"
    with pytest.raises(ConfigError, match="has no split dev; its splits are train, test, validation"):
        read_rows(f"{source}::dev")
    with pytest.raises(ConfigError, match="has one split, without a name; leave out :dev"):
        read_rows(f"{tmp_path / 'one'}::dev")
    for end in (":test", ":foo:test", ":foo"):
        with pytest.raises(ConfigError) as error:
            read_rows(source + end)
        ways = " or ".join(f"{source}::{name}" for name in parts)
        assert str(error.value) == f"{source}{end}: a saved data set has no configurations; name it as {ways}"
    with pytest.raises(ConfigError, match=r"has no configurations; name it as .*one$"):
        read_rows(f"{tmp_path / 'one'}:test")
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"one: can't be read \("):
        read_rows(str(tmp_path / "one"))


def test_clone_of_a_hub_data_set_with_configurations(tmp_path):
    for config in ("main", "extra"):
        (tmp_path / config).mkdir()
        for split in ("train", "test"):
            (tmp_path / config / f"{split}.jsonl").write_bytes(jsonl([{"question": config, "answer": split}]))
    lines = []
    for config in ("main", "extra"):
        lines.append(f"- config_name: {config}\n  data_files:\n")
        lines += [f"  - split: {split}\n    path: {config}/{split}.jsonl\n" for split in ("train", "test")]
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{''.join(lines)}---\n# Data\n")
    source = str(tmp_path)
    assert read_rows(f"{source}:extra")[0].outputs == "train"
    assert "extra" in read_rows(f"{source}:extra:test")[0].values["prompt"]
    for name, message in {
        source: "Config name is missing. Please pick one among the available configs: ['main', 'extra']",
        f"{source}:other": "'other' not found. Available: ['main', 'extra']",
        f"{source}:main:dev": "Unknown split \"dev\". Should be one of ['train', 'test']",
    }.items():
        with pytest.raises(ConfigError) as error:
            read_rows(name)
        assert str(error.value).startswith(f"{name}: can't be read (")
        assert message in str(error.value)
    with pytest.raises(ConfigError, match=rf"if test is a split, name it as {source}::test \(.*'main', 'extra'"):
        read_rows(f"{source}:test")
    with pytest.raises(ConfigError, match=rf"which split is meant by dev\? Name it: {source}:main:train or"):
        read_rows(f"{source}:main", splits=DEV)


@pytest.fixture
def hub(monkeypatch):
    """A Hub with a data set of these splits; it returns what was asked for."""
    asked = []

    def make(*names):
        def load_dataset(name, config, split):
            asked.append((name, config, split))
            return datasets.Dataset.from_list([{"prompt": "x", "output": split}])

        monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config: [*names])
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked

    return make


@pytest.mark.parametrize(
    ("source", "splits", "expected"),
    [
        ("openai/gsm8k:main:train", TRAIN, ("openai/gsm8k", "main", "train")),
        ("openai/gsm8k:main", TRAIN, ("openai/gsm8k", "main", "train")),
        ("me/data-1.5::test", TRAIN, ("me/data-1.5", None, "test")),
        ("me/data", TRAIN, ("me/data", None, "train")),
        ("me/data", DEV, ("me/data", None, "validation")),
        ("me/data::train[:10]", DEV, ("me/data", None, "train[:10]")),
    ],
)
def test_names_on_the_hub(hub, source, splits, expected):
    asked = hub("test", "train", "validation")
    assert read_rows(source, splits=splits)[0].where == f"{source} row 1"
    assert asked == [expected]


def test_splits_on_the_hub_that_names_dont_decide(hub):
    hub("train_sft", "test_sft", "train_gen", "test_gen")
    with pytest.raises(ConfigError, match=r"by train\? Name it: me/chat::train_sft or me/chat::test_sft or"):
        read_rows("me/chat")
    with pytest.raises(ConfigError, match=r"which split is meant by dev\?"):
        read_rows("me/chat", splits=DEV)
    assert hub("train_prefs", "test")[-1:] == []
    assert read_rows("me/chat")[0].outputs == "train_prefs"
    hub("everything")
    assert read_rows("me/chat", splits=DEV)[0].outputs == "everything"


def test_no_network():
    with pytest.raises(ConfigError) as error:
        read_rows("nobody/nothing:main:train")
    assert str(error.value).startswith(
        "nobody/nothing:main:train: no such file, and no data set of that name on the Hub"
    )
    assert "\n" not in str(error.value)


CONTENTS = [*FILES.values(), *(content for content, _ in BAD.values()), *MAGIC]
ENDS = ["jsonl", "json", "csv", "tsv", "parquet", "arrow", "jsonl.gz", "jsonl.bz2", "csv.xz", "json.zst", "txt"]


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=60)
    | st.text('[]{}":,\\u8d0 \r\n\tx1-e', max_size=40).map(str.encode)
    | st.sampled_from(CONTENTS),
    end=st.sampled_from(ENDS),
    cut=st.integers(0, 300),
    patch=st.tuples(st.integers(0, 300), st.binary(max_size=3)),
    policy=st.sampled_from(["stop", "skip"]),
)
@example(content=parquet(ROWS), end="parquet", cut=0, patch=(300, b"\xff"), policy="stop")
def test_any_file_is_read_or_refused_in_one_line(tmp_path, capfd, content, end, cut, patch, policy):
    place, new = patch
    content = content[: len(content) - cut % (len(content) + 1)] if cut % 3 == 0 else content
    content = content[:place] + new + content[place + len(new) :]
    path = tmp_path / f"rows.{end}"
    path.write_bytes(content)
    os.utime(path, ns=(0, hash(content) % (1 << 50)))  # `datasets` knows files by their times
    try:
        rows = read_rows(str(path), on_bad_row=policy)
    except ConfigError as error:
        line = str(error)
        assert line.startswith(str(path))
        assert "\n" not in line
    else:
        assert all({*row.values} == {"prompt", "output"} for row in rows)
    assert capfd.readouterr().err == ""
