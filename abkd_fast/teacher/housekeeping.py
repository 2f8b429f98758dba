"""The caches of this machine: what they are, what they take of the disk, and their removal."""

import pathlib
import re
import shutil
from collections.abc import Iterator

import filelock

from ..console import format_bytes
from ..errors import ConfigError
from ..files import TOKENIZERS, check_path_length, disk_bytes, entries
from .folder import FILES, StatesFolder

NAME = re.compile("[0-9a-f]{32}")  # a fingerprint
WRITTEN = re.compile(
    rf"({'|'.join(map(re.escape, ('index.json', *FILES)))})(\.\d+\.tmp)?|lock|states-[-0-9a-z]+\.safetensors"
)


def folders(root: pathlib.Path) -> list[pathlib.Path]:
    """The folders of states in a cache folder, also of builds that were interrupted.

    Each is named by a fingerprint and has nothing in it that this package doesn't write.
    """
    check_path_length("dir", root)
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.is_symlink() and _is_states(path))


def _is_states(path: pathlib.Path) -> bool:
    try:
        names = {file.name for file in path.iterdir()}
    except OSError:  # it can't be read
        return False
    return bool(NAME.fullmatch(path.name) and names and all(WRITTEN.fullmatch(name) for name in names))


def tokenizers(root: pathlib.Path) -> list[pathlib.Path]:
    """The folders of tokenizers in a cache folder. The next run that needs one writes it again."""
    found = () if (root / TOKENIZERS).is_symlink() else entries(root / TOKENIZERS)
    return [path for path in found if _is_tokenizer(path)]


def _is_tokenizer(path: pathlib.Path) -> bool:
    is_named = NAME.fullmatch(path.name) and not path.is_symlink()
    return bool(is_named and (path / "tokenizer_config.json").is_file())


def describe(root: pathlib.Path) -> Iterator[str]:
    """A line for each folder of states: its bytes on the disk, its name, whose states it has. One for all tokenizers.

    The last line is that of all together.

    An output projection that several folders share is in the number of each, and once in that of all.
    """
    found = folders(root)
    if not root.is_dir():
        raise ConfigError(f"list: {root} is no folder")
    for folder in found:
        try:
            states = StatesFolder(str(folder), "list")
            left = states.blocks_left
            whose = f"{states.samples} samples of {states.teacher}" + (f", {left} blocks are missing" if left else "")
        except ConfigError:
            whose = "damaged, or of another version"
        yield f"{format_bytes(disk_bytes(folder)):>10}  {folder.name}  {whose}"
    if kept := tokenizers(root):
        yield f"{format_bytes(disk_bytes(*kept)):>10}  {TOKENIZERS}  {len(kept)} that Python programs had in memory"
    yield f"{format_bytes(disk_bytes(*found, *kept)):>10}  {len(found) + bool(kept)} in {root}"


def clear(root: pathlib.Path, names: list[str]) -> Iterator[str]:
    """Removes what `describe` lists: that of these names, or all. States that a process builds stay. A line for each.

    Raises ConfigError for a name that is not there; then nothing is removed.
    """
    known = {folder.name: [folder] for folder in folders(root)}
    if kept := tokenizers(root):
        known[TOKENIZERS] = kept
    if missing := [name for name in names if name not in known]:
        raise ConfigError(f"clear: {root} has no states {missing[0]}; --list shows what there is")
    freed = 0
    for name in names or [*known]:
        others = [path for other, paths in known.items() if other != name for path in paths]
        size = disk_bytes(*known[name], *others) - disk_bytes(*others)  # what others share stays
        try:
            for folder in known[name]:
                with filelock.FileLock(folder / "lock").acquire(timeout=0):
                    shutil.rmtree(folder)
        except filelock.Timeout:
            yield f"{name} stays: a process is at work on it"
            continue
        except OSError as error:
            yield f"{name} stays ({error.strerror})"
            continue
        freed += size
        yield f"{format_bytes(size):>10}  {name} is removed"
    yield f"{format_bytes(freed):>10}  are free again"
