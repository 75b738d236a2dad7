"""Writing files whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from dfs_cli.errors import OutputError


def check_writable(paths: Iterable[Path], force: bool) -> None:
    """Raises OutputError where a path exists (unless ``force``), is a folder, or its folder cannot be written."""
    for path in paths:
        if path.is_dir():
            raise OutputError(f"output {path} is a folder")
        if path.exists() and not force:
            raise OutputError(f"output {path} exists already: pass --force to overwrite it, or another name")
        folder = path.parent
        if not folder.is_dir():
            raise OutputError(f"output folder {folder} does not exist")
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise OutputError(f"output folder {folder} cannot be written: {error.strerror or error}") from None


def write_atomically(path: Path, content: bytes | str, check: Callable[[Path], None] | None = None) -> None:
    """Write to a temporary name beside ``path``, check it there, then rename.

    Args:
        check: called with the temporary file; where it raises, nothing is left behind.

    Raises:
        OutputError: the folder cannot be written or the disk is full; nothing is left behind then.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary: Path | None = None
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        if check is not None:
            check(temporary)
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"output {path} cannot be written: {error.strerror or error}") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
