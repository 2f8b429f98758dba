"""The checksums of a folder's files, by which damage is noticed before anything in it is used."""

import json
import pathlib

from .files import atomic_write, file_digest

NAME = "manifest.json"


def write(folder: pathlib.Path, path: pathlib.Path) -> None:
    """Writes the SHA-256 of all files of a folder, by their names there. Raises OSError."""
    digests = {name: file_digest(folder / name) for name in _names(folder)}
    atomic_write(path, json.dumps(digests, indent=2) + "\n")


def damage(folder: pathlib.Path, path: pathlib.Path, may_have_more: bool = False) -> str | None:
    """The damage of a folder in words; None where all files are as they were written.

    may_have_more: files that were added since are no damage.

    Raises PermissionError: what can't be read is not damaged.
    """
    try:
        digests = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(digests, dict) or not digests:
            return f"{path.name} names no files"
        if not may_have_more and (more := [name for name in _names(folder) if name not in digests]):
            return f"{more[0]} is not in {path.name}"
        for name, digest in digests.items():
            if file_digest(folder / name) != digest:
                return f"{name} differs from what was written"
    except PermissionError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _names(folder: pathlib.Path) -> list[str]:
    files = (path for path in folder.rglob("*") if path.is_file())  # chat templates may have a folder
    return sorted(name for path in files if (name := str(path.relative_to(folder))) != NAME)
