"""Output files of a run: checked and reserved at its start, written together at its end."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from dfs_cli.atomic import File, write_files
from dfs_cli.errors import OutputError, TakenError, WriteError
from dfs_cli.locks import clean, locked

_PROBE = bytes(4096)
_OF_THE_NAME = (errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
_OTHER_NAMES = 100


class Outputs:
    """Names that are reserved for this process.

    Args:
        force: whether files of these names may be replaced.
    """

    def __init__(self, force: bool) -> None:
        self.force = force

    def write(self, files: Sequence[File]) -> None:
        """Write all files, or none.

        Raises:
            WriteError: that failed. The message says what stands.
            TakenError: a name was taken meanwhile.
        """
        write_files(files, self.force)

    def keep(self, files: Sequence[File]) -> tuple[tuple[Path, ...], OutputError | None]:
        """Write files that took long to make, in any case: where that fails, under other names, or in the temporary folder.

        Returns:
            Where they are, and what went wrong, which says so, too.
        """
        try:
            self.write(files)
        except OutputError as error:
            paths = _write_elsewhere(files, beside=isinstance(error, TakenError))
            where = f"; wrote {', '.join(map(str, paths))} instead" if paths else ", not in the temporary folder either"
            return paths, WriteError(f"{error}{where}")
        return tuple(file.path for file in files), None


@contextlib.contextmanager
def reserve(paths: Iterable[Path], force: bool, inputs: Iterable[Path | None] = ()) -> Iterator[Outputs]:
    """Reserve the names of outputs until the end of the block, for this process alone.

    Args:
        force: allow that files of these names are replaced.
        inputs: files that are read, and must not be replaced.

    Raises:
        OutputError: as :func:`check_writable`; or another process has reserved one of the names.
    """
    paths = tuple(paths)
    _check_places(paths, inputs)
    with contextlib.ExitStack() as stack:
        for path in paths:
            try:
                stack.enter_context(locked(path))
            except BlockingIOError:
                raise OutputError(
                    f"output {path} is being written by another run of dfs: wait for it, or pass another name"
                ) from None
            except OSError as error:
                raise _unwritable(f"output {path}", error) from None
        _check_free(paths, force)
        for folder in {_target(path).parent for path in paths}:
            clean(folder)
        yield Outputs(force)


def check_writable(paths: Iterable[Path], force: bool, inputs: Iterable[Path | None] = ()) -> None:
    """Check the names of outputs, and reserve nothing.

    Raises:
        OutputError: a file exists (unless ``force``); a name is of something else than a file, of an input, or given twice; its
            folder does not exist or cannot be written.
        WriteError: the disk is full or read-only.
    """
    paths = tuple(paths)
    _check_places(paths, inputs)
    _check_free(paths, force)


def _check_places(paths: tuple[Path, ...], inputs: Iterable[Path | None]) -> None:
    targets: dict[Path, Path] = {}
    for path in paths:
        target = _target(path)
        if target in targets:
            raise OutputError(f"outputs {targets[target]} and {path} are the same file: pass two names")
        targets[target] = path
        for source in inputs:
            if source is not None and _is_same(path, source):
                raise OutputError(f"output {path} is an input, too ({source}): pass another name")
        if any(_is_open_as(path, descriptor) for descriptor in (1, 2)):
            raise OutputError(f"output {path} is where the output of the program goes: pass another name")
        folder = target.parent if path.is_symlink() else path.parent
        if not folder.is_dir():
            raise OutputError(f"output folder {folder} {'is not a folder' if folder.exists() else 'does not exist'}")
    for folder in {target.parent for target in targets}:
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(_PROBE)
        except OSError as error:
            raise _unwritable(f"output folder {folder}", error) from None


def _check_free(paths: tuple[Path, ...], force: bool) -> None:
    for path in paths:
        if path.exists() and not force:
            raise OutputError(f"output {path} exists already: pass --force to overwrite it, or another name")


def _target(path: Path) -> Path:
    """The file that is written: ``path``, or what it links to."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        raise _unwritable(f"output {path}", error) from None
    else:
        if stat.S_ISDIR(mode):
            raise OutputError(f"output {path} is a folder")
        if not stat.S_ISREG(mode):
            raise OutputError(f"output {path} is a device, a pipe or a socket: pass the name of a file")
    return Path(os.path.realpath(path))


def _is_same(path: Path, other: Path) -> bool:
    """Whether both names are of one file: also by links, hard or symbolic."""
    try:
        return path.samefile(other)
    except OSError:
        return False


def _is_open_as(path: Path, descriptor: int) -> bool:
    """Whether a standard stream goes to the file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError:
        return False


def _unwritable(what: str, error: OSError | ValueError) -> OutputError:
    """A mistake in the input where another name would do; else a failure of the machine."""
    reason = getattr(error, "strerror", None) or error
    by_name = isinstance(error, ValueError) or error.errno in _OF_THE_NAME
    return (OutputError if by_name else WriteError)(f"{what} cannot be written: {reason}")


def _write_elsewhere(files: Sequence[File], beside: bool) -> tuple[Path, ...]:
    """Write files under names that are free; where they are, or nothing."""
    for number in range(1, _OTHER_NAMES if beside else 1):
        paths = [_numbered(file.path, files[0].path.stem, number) for file in files]
        with contextlib.suppress(OutputError):
            return _write_as(files, paths)
    with contextlib.suppress(OutputError, OSError):
        folder = Path(tempfile.mkdtemp(prefix="dfs-"))
        try:
            return _write_as(files, [folder / file.path.name for file in files])
        except OutputError:
            folder.rmdir()
    return ()


def _write_as(files: Sequence[File], paths: Sequence[Path]) -> tuple[Path, ...]:
    with reserve(paths, force=False) as outputs:
        outputs.write([replace(file, path=path) for file, path in zip(files, paths, strict=True)])
    return tuple(paths)


def _numbered(path: Path, stem: str, number: int) -> Path:
    """``path`` with a number behind ``stem``, with which files begin that belong together."""
    stem = stem if path.name.startswith(stem) else path.stem
    return path.with_name(f"{stem}-{number}{path.name.removeprefix(stem)}")
