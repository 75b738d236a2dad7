"""Options of runs that take long: where they are saved, and how they go on."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from dfs_cli.cli.options import OUTPUT
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
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def ask(number: int, _frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a process that was forked off, to load images
            if number != signal.SIGINT:
                os._exit(128 + number)
            return  # a terminal sends it to all processes; the owner ends them
        if not stop.ask(number):
            raise Stopped(number)

    before = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup does
            before[number] = signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def how_to_resume() -> str:
    """The command line that goes on with this run."""
    words = [word for word in sys.argv[1:] if word not in ("--resume", "--force", "-f")]
    program = "torchrun ... -m dfs_cli" if "TORCHELASTIC_RUN_ID" in os.environ else "dfs"
    return f"{program} {shlex.join([*words, '--resume'])}"
