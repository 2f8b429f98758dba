"""Tokenized data in the cache of `datasets`: written once, then memory-mapped, and checked before every use."""

import hashlib
import json
import pathlib
import zlib
from collections.abc import Callable, Iterable

import datasets
import filelock
from datasets.table import MemoryMappedTable
from transformers import PreTrainedTokenizerBase

from ..console import console
from ..errors import ConfigError, disk_errors
from ..files import atomic_file, file_checksum, read_json, remove_leftovers, write_json

MOVE_CACHE = "set HF_DATASETS_CACHE to another folder"
FORMAT = 2  # of the stored data; data in another format are made anew


def fingerprint(contents: Iterable[str], tokenizer: PreTrainedTokenizerBase, *settings: object) -> str:
    """A hash of everything that tokenized data depend on."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}
    adds = tokenizer("a")["input_ids"]
    digest = hashlib.sha256(json.dumps([FORMAT, state, special, adds, tokenizer.chat_template, settings]).encode())
    for content in contents:
        digest.update(hashlib.sha256(content.encode()).digest())
    return digest.hexdigest()[:32]


def stored(key: str, write: Callable[[pathlib.Path], dict | None], doing: str = "") -> tuple[datasets.Dataset, dict]:
    """The data with this fingerprint, memory-mapped, and the notes about them.

    Two files keep them, KEY.arrow and KEY.json, which has a checksum of all. What is missing, cut or changed is made
    again.

    Args:
        write: writes a new Arrow stream, and returns the notes, JSON values by name.
        doing: what is printed before that.

    Raises Interrupted where there is no room, and ConfigError for a folder that can't be written to.
    """
    path = pathlib.Path(datasets.config.HF_DATASETS_CACHE) / "abkd_fast" / f"{key}.arrow"
    with disk_errors(path, MOVE_CACHE):
        if (notes := _whole_notes(path)) is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(f"{path}.lock"):  # another run that starts now waits, and finds the files
                if (notes := _whole_notes(path)) is None:
                    notes = _make(path, write, doing)
        return datasets.Dataset(MemoryMappedTable.from_file(str(path)), fingerprint=key), notes


def _make(path: pathlib.Path, write: Callable[[pathlib.Path], dict | None], doing: str) -> dict:
    if path.exists():
        console.print(f"{path} is damaged, or of an earlier version: it is made again")
    if doing:
        console.print(f"{doing}; later runs find the result in {path.parent}")
    remove_leftovers(path.parent, f"{path.stem}.")
    with atomic_file(path) as temporary:
        notes = write(temporary) or {}
    notes = json.loads(json.dumps(notes))  # as the next run reads them
    write_json(path.with_suffix(".json"), {"notes": notes, "checksum": _checksum(path, notes)})
    return notes


def _whole_notes(path: pathlib.Path) -> dict | None:
    """The notes about data that are as they were written; None where they are not, or not there."""
    try:
        record = read_json(path.with_suffix(".json"))
    except ConfigError:
        return None
    notes = record.get("notes")
    return notes if isinstance(notes, dict) and record.get("checksum") == _checksum(path, notes) else None


def _checksum(path: pathlib.Path, notes: dict) -> int | None:
    """Of the data, the notes, and the fingerprint: other data don't become these by another name."""
    content = file_checksum(path)
    return None if content is None else zlib.crc32(json.dumps([path.stem, notes]).encode(), content)
