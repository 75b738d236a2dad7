"""Names of files that one process holds: locks that end with the process."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

# filelock leaves its lock files behind, and takes a file system without locks for one on which somebody holds the lock.

_LOCK, _TRIES, _PAUSE_S = "lock", 10, 0.05

_held: set[int] = set()
"""Descriptors of the locks held. A process that is forked off closes them: a lock must not outlive its process."""


def beside(path: Path, ending: str) -> Path:
    """A hidden file of dfs beside ``path``, or beside what it links to; short, however long the name of ``path``."""
    target = Path(os.path.realpath(path))
    tag = hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]
    return target.parent / f".dfs-{tag}.{ending}"


@contextlib.contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold the name ``path`` until the end of the block, or of the process. What a killed process left beside it is removed.

    Where the file system has no locks, nothing is held.

    Args:
        wait: until the name is free.

    Raises:
        BlockingIOError: somebody holds it, and ``wait`` is not given.
        OSError: the folder cannot be written.
    """
    with _locked(beside(path, _LOCK), wait):
        yield


def clean(folder: Path) -> None:
    """Remove what killed processes left in ``folder``; what running ones hold stays."""
    with contextlib.suppress(OSError):
        for lock in folder.glob(f".dfs-*.{_LOCK}"):
            with contextlib.suppress(OSError), _locked(lock, wait=False, tries=1):
                pass


@contextlib.contextmanager
def _locked(lock: Path, wait: bool, tries: int = _TRIES) -> Iterator[None]:
    descriptor, is_locked = _acquire(lock, wait, tries)
    _held.add(descriptor)
    try:
        if is_locked:
            for left in lock.parent.glob(f"{lock.stem}.*"):
                if left != lock:
                    left.unlink(missing_ok=True)
        yield
    finally:
        if descriptor in _held:  # not in a process that was forked off
            with contextlib.suppress(OSError):
                lock.unlink()  # while it is held: whoever waits for it finds out
            _held.remove(descriptor)
            os.close(descriptor)


def _acquire(lock: Path, wait: bool, tries: int) -> tuple[int, bool]:
    """The lock file's descriptor, and whether it is locked."""
    while True:
        descriptor = _open(lock)
        try:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if _is_at(descriptor, lock):
                return descriptor, True
        except BlockingIOError:
            tries -= 1
            if tries <= 0:
                os.close(descriptor)
                raise
            time.sleep(_PAUSE_S)  # it may be cleaned just now
        except (OSError, ImportError):  # the file system, or the operating system, has no such locks
            return descriptor, False
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _open(lock: Path) -> int:
    try:
        return os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:  # of another user
        if not lock.exists():
            raise
        return os.open(lock, os.O_RDONLY)


def _is_at(descriptor: int, lock: Path) -> bool:
    """Whether the file is still the one of that name: who held it before has removed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), lock.stat())
    except FileNotFoundError:
        return False


def _close_held() -> None:
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_held)
