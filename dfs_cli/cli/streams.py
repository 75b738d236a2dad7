"""Standard streams and signals of the program."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import TextIO

from dfs_cli.errors import Stopped


class _Stream(io.FileIO):
    """A standard stream on which writing never fails: what cannot be written is dropped. No result is lost halfway for it.

    Args:
        descriptor: 1 or 2.
        failure: why nothing can be written; None: it can.
    """

    def __init__(self, descriptor: int, failure: OSError | None) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.failure = failure
        self.lost: OSError | None = None

    def write(self, data: object) -> int:
        size = memoryview(data).nbytes  # type: ignore[arg-type]  # whatever a buffered writer passes on
        if self.failure is None:
            try:
                return super().write(data)  # type: ignore[arg-type]
            except OSError as error:
                self.failure = error
        self.lost = self.failure
        return size


@contextlib.contextmanager
def standard_streams() -> Iterator[Callable[[], OSError | None]]:
    """Make standard output and error such that writing to them never fails.

    Yields:
        A function that tells why some of the output was lost. A reader who has gone has seen enough: nothing was lost then.
    """
    before = sys.stdout, sys.stderr
    if before != (sys.__stdout__, sys.__stderr__):
        yield lambda: None  # a program that embeds this one has streams of its own
        return
    for descriptor in (0, 1, 2):
        _open_if_closed(descriptor)
    raw = _Stream(1, _closed() if sys.stdout is None else None)
    stdout = _text(raw, sys.stdout, raw.isatty())
    stderr = _text(_Stream(2, _closed() if sys.stderr is None else None), sys.stderr, True)

    def lost() -> OSError | None:
        stdout.flush()
        return None if raw.lost is None or raw.lost.errno == errno.EPIPE else raw.lost

    sys.stdout, sys.stderr = stdout, stderr
    try:
        yield lost
    finally:
        stdout.flush()
        stderr.flush()
        sys.stdout, sys.stderr = before


@contextlib.contextmanager
def signals() -> Iterator[None]:
    """End a run on the signals by which systems end programs, as on Ctrl-C: what was begun is cleaned up."""

    def stop(number: int) -> None:
        raise Stopped(number)

    numbers = (signal.SIGTERM, signal.SIGHUP)
    with on_signals([n for n in numbers if signal.getsignal(n) is signal.SIG_DFL], stop):
        yield


@contextlib.contextmanager
def on_signals(numbers: Iterable[int], act: Callable[[int], None]) -> Iterator[None]:
    """Call ``act`` with the number of a signal that comes within the context; outside of the main thread, where Python does not
    allow it, do nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def handle(number: int, _frame: FrameType | None) -> None:
        if os.getpid() == owner:
            act(number)
        elif number != signal.SIGINT:  # a process that was forked off, to load images
            os._exit(128 + number)
        # A terminal sends SIGINT to all processes; the owner ends them.

    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _open_if_closed(descriptor: int) -> None:
    """Otherwise the next file that is opened takes its place, and gets what libraries print."""
    try:
        os.fstat(descriptor)
    except OSError:
        os.open(os.devnull, os.O_RDWR)


def _closed() -> OSError:
    return OSError(errno.EBADF, "it is closed")


def _text(stream: _Stream, before: TextIO | None, by_line: bool) -> io.TextIOWrapper:
    encoding = "utf-8" if before is None else before.encoding
    return io.TextIOWrapper(io.BufferedWriter(stream), encoding, errors="backslashreplace", line_buffering=by_line)
