"""Writing files whole or not at all, one or several together."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dfs_cli.errors import TakenError, WriteError
from dfs_cli.locks import beside, locked


@dataclass(frozen=True)
class File:
    """What to write where.

    Args:
        path: a name; where it is a link, the file that it leads to is written.
        content: text is written as UTF-8; what UTF-8 has no place for (in names of files) is escaped.
        check: called with the temporary file; where it raises, nothing is written.
    """

    path: Path
    content: bytes | str
    check: Callable[[Path], None] | None = None

    @property
    def data(self) -> bytes:
        """The content in bytes."""
        return self.content.encode(errors="backslashreplace") if isinstance(self.content, str) else self.content


def write_atomically(path: Path, content: bytes | str, check: Callable[[Path], None] | None = None) -> None:
    """Write one file, in place of what has its name, once nobody else does; see :func:`write_files`."""
    with held(path):
        write_files([File(path, content, check)], replace=True)


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold the name ``path``, once nobody else does, until the end of the block.

    Raises:
        WriteError: the folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(path, wait=True))
        except OSError as error:
            raise WriteError(f"output {path} cannot be written: {error.strerror or error}") from None
        yield


def write_files(files: Sequence[File], replace: bool) -> None:
    """Write all files under temporary names beside their own, check them there, then rename them; or change nothing.

    Hold the names (:func:`dfs_cli.locks.locked`): then what is left by a process that was killed is removed by the next one.

    Args:
        files: of different names.
        replace: replace files that have these names.

    Raises:
        TakenError: a file has one of these names, and ``replace`` is not given.
        WriteError: a folder cannot be written, or the disk is full. The message says what stands.
    """
    moves = [_Move(file) for file in files]
    try:
        for move in moves:
            move.write()
        _rename(moves, replace)
    finally:
        for move in moves:
            move.clean()


def _rename(moves: list[_Move], replace: bool) -> None:
    done: list[_Move] = []
    try:
        for move in moves:
            move.rename(replace, keep_old=len(moves) > 1)
            done.append(move)
    except BaseException as error:
        standing = [str(move.file.path) for move in done if not move.undo()]
        if standing and isinstance(error, (TakenError, WriteError)):
            raise WriteError(f"{error}, except {', '.join(standing)}") from None
        raise


class _Move:
    """A file on its way from its temporary name to its own."""

    def __init__(self, file: File) -> None:
        self.file, self.target = file, Path(os.path.realpath(file.path))
        token = secrets.token_hex(4)
        self.temporary, self.old = beside(self.target, f"{token}.new"), beside(self.target, f"{token}.old")
        self.is_new = False

    def write(self) -> None:
        """Write the temporary file. It gets the mode that the system gives new files, or that of the file it will replace."""
        try:
            with self.temporary.open("xb") as file:
                file.write(self.file.data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._failure(error) from None
        with contextlib.suppress(OSError):  # modes are a nicety, which not every file system has
            shutil.copymode(self.target, self.temporary)
        if self.file.check is not None:
            self.file.check(self.temporary)

    def rename(self, replace: bool, keep_old: bool) -> None:
        """Give the temporary file its name."""
        self.is_new = not replace or not os.path.lexists(self.target)
        try:
            if not replace:
                _rename_to_free_name(self.temporary, self.target)
                return
            if keep_old:
                with contextlib.suppress(OSError):
                    os.link(self.target, self.old)
            self.temporary.replace(self.target)
        except FileExistsError:
            raise TakenError(f"output {self.file.path} was taken meanwhile: nothing was written there") from None
        except OSError as error:
            raise self._failure(error) from None

    def undo(self) -> bool:
        """Put things back; False where that cannot be done."""
        try:
            if self.is_new:
                self.target.unlink()
            else:
                self.old.replace(self.target)
        except OSError:
            return False
        return True

    def clean(self) -> None:
        """Remove what is not needed any more."""
        for path in (self.temporary, self.old):
            with contextlib.suppress(OSError):
                path.unlink()

    def _failure(self, error: OSError) -> WriteError:
        reason = error.strerror or error
        return WriteError(f"output {self.file.path} cannot be written: {reason}; nothing was written")


def _rename_to_free_name(source: Path, target: Path) -> None:
    """Rename, but never replace; FileExistsError where the name is taken."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # the file system has no hard links
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        source.replace(target)
    else:
        source.unlink()
