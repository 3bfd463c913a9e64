"""Files that are whole at any time: they are written aside and then renamed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from newton_summary.errors import UsageError


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Puts a file in its place when it is complete; until then the old one stays.

    Links are followed.  What is no file, such as a pipe, is written as it is: there is nothing to put in its place.

    Args:
        path: the file.  Folders above it are made.
        write: writes the content to the path that it is given, in the same folder.

    Raises:
        UsageError: the file cannot be written.
    """
    target = path.resolve() if path.is_symlink() else path
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        if target.exists() and not target.is_file() and not target.is_dir():
            write(target)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"cannot write {path} ({reason}): make room, or choose another folder with --out") from error
    finally:
        if target.parent.is_dir():
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    write_atomically(path, lambda temporary: _write_text(temporary, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
