"""The one place that turns errors into text."""

from __future__ import annotations

import errno
import functools
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import typer

from dfs_cli.distributed import leave, says_what_failed
from dfs_cli.errors import DfsError, Stopped, is_out_of_memory, printable

P = ParamSpec("P")
R = TypeVar("R")

_FAILURES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
"""What the machine does; any other error of the operating system is of a name that was given."""


def one_line_errors(command: Callable[P, R]) -> Callable[P, R]:
    """End a command that fails in a way that the user should know about with one line on stderr and an exit code."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        _quieten_libraries()
        try:
            return command(*args, **kwargs)
        except (Exception, KeyboardInterrupt) as error:
            code = explain(error)
            if code is None:
                raise
            raise typer.Exit(code) from None
        finally:
            leave()

    return wrapped


def explain(error: BaseException) -> int | None:
    """Say in one line on stderr what went wrong, and return the exit code; None where it is a fault of the program.

    Of several processes, the first one that finds out says it.
    """
    code, line = _code_and_line(error)
    if code is not None and says_what_failed():
        _print(line)
    return code


def _code_and_line(error: BaseException) -> tuple[int | None, str]:
    if isinstance(error, KeyboardInterrupt):
        number = error.number if isinstance(error, Stopped) else signal.SIGINT
        what = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
        return 128 + number, f"dfs: {what}"
    if isinstance(error, DfsError):
        return error.exit_code, _error_line(str(error))
    if is_out_of_memory(error):
        advice = "try a smaller --batch-size, a smaller model or fewer --workers"
        return 1, _error_line(f"there is not enough memory: {advice}")
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return 1 if error.errno in _FAILURES else 2, _error_line(f"{where}{error.strerror or error}")
    return None, ""


def explain_usage(error: Exception) -> int | None:
    """As :func:`explain`, for what typer says about the command line; None where ``error`` is something else."""
    message = getattr(error, "format_message", None)  # of typer's exceptions, wherever it takes them from
    if message is None:
        return None
    path = getattr(getattr(error, "ctx", None), "command_path", "dfs")
    if says_what_failed():
        say_error(f"{' '.join(message().split()).rstrip('.')} (see {path} --help)")
    return 2


def say_error(message: str) -> None:
    """One line on stderr, in which nothing controls the terminal."""
    _print(_error_line(message))


def _error_line(message: str) -> str:
    return f"dfs: error: {printable(' '.join(message.split()))}"


def _print(line: str) -> None:
    if sys.stderr is not None:  # closed; print would take standard output in its place
        print(line, file=sys.stderr)


def _quieten_libraries() -> None:
    """Keep what libraries say to their developers out of the user's terminal, and matplotlib from looking for a display."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read by torch's profiler
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of DDP, on parameters that are unused, or are not
    os.environ["MPLBACKEND"] = "agg"  # a notebook leaves the name of its own, which may not be installed here
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message="Grad strides do not match")  # those of 1x1 convolutions, by DDP
    for name in ("timm", "fvcore", "huggingface_hub", "matplotlib"):
        logging.getLogger(name).setLevel(logging.ERROR)
