"""The one place that turns errors into text."""

from __future__ import annotations

import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import typer

from dfs_cli.errors import DfsError, printable

P = ParamSpec("P")
R = TypeVar("R")


def one_line_errors(command: Callable[P, R]) -> Callable[P, R]:
    """End a command that raises a DfsError with one line on stderr and the error's exit code."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        _quieten_libraries()
        try:
            result = command(*args, **kwargs)
            sys.stdout.flush()
            return result
        except BrokenPipeError:
            # Whoever read this has seen enough; the interpreter must not try to flush once more.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except DfsError as error:
            message = printable(" ".join(str(error).split()))
            print(f"dfs: error: {message}", file=sys.stderr)
            raise typer.Exit(error.exit_code) from None
        except OSError as error:
            where = f" {error.filename}" if error.filename else ""
            print(printable(f"dfs: error:{where} {error.strerror or error}"), file=sys.stderr)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            print("dfs: interrupted", file=sys.stderr)
            raise typer.Exit(130) from None

    return wrapped


def _quieten_libraries() -> None:
    """Keep what libraries say to their developers out of the user's terminal."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read by torch's profiler
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for name in ("timm", "fvcore", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
