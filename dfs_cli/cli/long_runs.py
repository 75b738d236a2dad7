"""Options of runs that take long: where they are saved, and how they go on."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dfs_cli.cli.options import OUTPUT
from dfs_cli.cli.streams import on_signals
from dfs_cli.config import CHECKPOINT_MINUTES
from dfs_cli.errors import ConfigError, Stopped

if TYPE_CHECKING:
    from dfs_cli.checkpoint import StopRequest

CheckpointMinutes = Annotated[
    float,
    typer.Option(
        "--checkpoint-minutes",
        metavar="M",
        help="Save the run so often at least, beside the output; 0: after every step.",
        rich_help_panel=OUTPUT,
    ),
]
Log = Annotated[
    Path | None,
    typer.Option(
        "--log",
        "--log-file",
        metavar="FILE",
        help="Write a row for each step: CSV (--log is not for torchrun).",
        rich_help_panel=OUTPUT,
    ),
]


@dataclasses.dataclass(frozen=True)
class LongRunOptions:
    """How often a run is saved, and where its steps are written."""

    checkpoint_minutes: CheckpointMinutes = CHECKPOINT_MINUTES
    log: Log = None

    def __post_init__(self) -> None:
        if not 0 <= self.checkpoint_minutes < math.inf:
            raise ConfigError(f"--checkpoint-minutes {self.checkpoint_minutes:g}: expected 0 or more")


@contextlib.contextmanager
def signals_wait_for(stop: StopRequest) -> Iterator[None]:
    """Within the context a signal that ends programs is told to ``stop`` first, so that the run may come to a point from which
    it can go on; the next one ends it at once."""

    def ask(number: int) -> None:
        if not stop.ask(number):
            raise Stopped(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    with on_signals([n for n in numbers if signal.getsignal(n) != signal.SIG_IGN], ask):  # nohup ignores one of them
        yield


def how_to_resume() -> str:
    """The command line that goes on with this run."""
    words = [word for word in sys.argv[1:] if word not in ("--resume", "--force", "-f")]
    program = "torchrun ... -m dfs_cli" if "TORCHELASTIC_RUN_ID" in os.environ else "dfs"
    return f"{program} {shlex.join([*words, '--resume'])}"
