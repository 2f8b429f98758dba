"""Plain text for the language-modeling loss: documents become tokens, and these become blocks of one length."""

import itertools
import json
import pathlib
from collections.abc import Iterator

import datasets
import numpy as np
import pyarrow
from transformers import PreTrainedTokenizerBase

from ..config.schema import PretrainConfig
from ..errors import ConfigError, reading
from ..files import file_digest
from . import indexed_dataset
from .rows import TRAIN
from .text_files import read_jsonl
from .token_store import fingerprint, stored
from .tokenize import SAMPLE

NEWLINE = "<@x(x!>"  # MiniLLM's data.txt has this for a line end within a document
PIECE = 1 << 20  # about so many characters are tokenized at once
ITEMS = 1024  # so many items of a binary file are read at once


def check_source(source: str) -> None:
    """Raises ConfigError if there is no such text, or if the first document of a file can't be read."""
    for file in _find_files(source):
        next(indexed_dataset.read_items(file) if file.suffix == ".bin" else _read_documents(file), None)


def load_blocks(spec: PretrainConfig, tokenizer: PreTrainedTokenizerBase, max_length: int) -> datasets.Dataset:
    """Columns input_ids (blocks of max_length tokens) and spans (all but the first token, which nothing predicts).

    Documents follow each other, with an end token after each. Items of binary files are taken as they are. An
    incomplete block at the end is dropped. The result is stored beside tokenized rows, under a hash of files, tokenizer
    and limits, and memory-mapped. The memory that this takes doesn't depend on the amount of text.

    Raises ConfigError for files that can't be read, foreign token ids, and too little text for a block.
    """
    files = _find_files(spec.path)
    key = fingerprint([json.dumps(_identity(file)) for file in files], tokenizer, max_length, spec.rows)
    dataset, _ = stored(
        key,
        lambda path: _write(path, _cut(_token_ids(files, tokenizer, spec.rows), max_length)),
        f"plain text: tokenizing {spec.path}",
    )
    if not len(dataset):
        raise ConfigError(f"data.pretrain: {spec.path}: is too short for one block of data.max_length = {max_length}")
    return dataset


def _identity(file: pathlib.Path) -> list[str]:
    parts = [file, file.with_suffix(".idx")] if file.suffix == ".bin" else [file]
    try:
        return [file.suffix, *map(file_digest, parts)]
    except OSError as error:
        raise ConfigError(f"data.pretrain: {error.filename}: can't be read ({error.strerror})") from None


def _find_files(source: str) -> list[pathlib.Path]:
    """The source itself, or a folder's binary files, or else its .jsonl and .txt files by name; or ConfigError."""
    path = pathlib.Path(source)
    if not path.exists():
        raise ConfigError(f"data.pretrain: {source}: no such file or folder")
    files = indexed_dataset.find(source, TRAIN)
    if not files:
        there = path.iterdir() if path.is_dir() else [path]
        files = sorted(file for file in there if file.suffix in (".jsonl", ".txt"))
    if not files:
        raise ConfigError(f"data.pretrain: {source}: expected a .jsonl, .txt or .bin file, or a folder with some")
    return files


def _read_documents(path: pathlib.Path) -> Iterator[Iterator[str]]:
    """Yields the documents of a text file, each in pieces of about PIECE characters, to be read in order.

    A .jsonl file has one document in each line, as "text"; blank ones are skipped. A .txt file is one document. In
    MiniLLM's format, which has NEWLINE in its first piece, each line of a .txt file is one.

    Raises ConfigError, which names file and line, for a document that can't be read.
    """
    if path.suffix == ".jsonl":
        for where, values in read_jsonl(path):
            if not isinstance(values, dict) or not isinstance(values.get("text"), str):
                raise ConfigError(f'{where}: expected a JSON object with "text"')
            if values["text"].strip():
                yield iter([values["text"]])
        return
    pieces = _read_pieces(path)
    first = next(pieces, "")
    pieces = itertools.chain([first], pieces)
    if NEWLINE in first:
        for piece in pieces:
            yield from (iter([line.replace(NEWLINE, "\n")]) for line in piece.split("\n") if line.strip())
    elif first:
        yield pieces


def _read_pieces(path: pathlib.Path) -> Iterator[str]:
    """Yields the text of a file in pieces of whole lines."""
    try:
        with path.open(encoding="utf-8") as file:
            while lines := file.readlines(PIECE):
                yield "".join(lines)
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text ({error.reason})") from None


def _token_ids(
    files: list[pathlib.Path], tokenizer: PreTrainedTokenizerBase, limit: int | None
) -> Iterator[np.ndarray]:
    """Yields all tokens in order, int32, some at a time. `limit` is the number of documents or items, None for all."""
    if files[0].suffix == ".bin":
        items = itertools.islice((item for file in files for item in indexed_dataset.read_items(file)), limit)
        while some := list(itertools.islice(items, ITEMS)):
            for where, ids in some:
                try:
                    indexed_dataset.check_ids(ids, len(tokenizer))
                except ConfigError as error:
                    raise ConfigError(f"{where}: {error}") from None
            yield np.concatenate([ids for _, ids in some]).astype(np.int32)
        return
    documents = itertools.islice((document for file in files for document in _read_documents(file)), limit)
    pieces = (piece for document in documents for piece in itertools.chain(document, [""]))  # "" marks its end
    for texts in _group(pieces):
        with reading("data.pretrain: the tokenizer can't encode this text"):
            ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        ids = (some if text else [tokenizer.eos_token_id] for text, some in zip(texts, ids, strict=True))
        yield np.fromiter(itertools.chain.from_iterable(ids), np.int32)


def _group(pieces: Iterator[str]) -> Iterator[list[str]]:
    """Yields the same pieces in lists of at least PIECE characters."""
    group, size = [], 0
    for piece in pieces:
        group.append(piece)
        size += len(piece)
        if size >= PIECE:
            yield group
            group, size = [], 0
    if group:
        yield group


def _cut(tokens: Iterator[np.ndarray], length: int) -> Iterator[np.ndarray]:
    """Yields the stream of tokens as blocks [n, length], some at a time."""
    rest = np.empty(0, np.int32)
    for some in tokens:
        stream = np.concatenate([rest, some])
        whole = len(stream) // length * length
        yield stream[:whole].reshape(-1, length)
        rest = stream[whole:]


def _write(path: pathlib.Path, blocks: Iterator[np.ndarray]) -> None:
    """Writes blocks [n, length] as an Arrow file with the columns of SAMPLE."""
    schema = SAMPLE.arrow_schema
    with pyarrow.ipc.new_stream(str(path), schema) as writer:
        for some in blocks:
            ends = np.arange(0, some.size + 1, some.shape[1], dtype=np.int32)
            ids = pyarrow.ListArray.from_arrays(ends, some.reshape(-1))
            spans = pyarrow.array([[1, some.shape[1]]] * len(some), schema.field("spans").type)
            writer.write_batch(pyarrow.record_batch([ids, spans], schema=schema))
