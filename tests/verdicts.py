"""What must come of a changed file: see :mod:`mutations`."""

from __future__ import annotations

import resource
import sys
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from mutations import FILE, Case, Trap
from typer.testing import CliRunner

from dfs_cli.cli.app import app

SECONDS, BYTES = 10, 2 * 2**30
"""How long a command may take, and how much memory above the size of its file."""

_forbidden: list[str] = []
_watching = False
_STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "shutil.rmtree")


def _watch(event: str, _: tuple[Any, ...]) -> None:
    if _watching and event in _STARTS:
        _forbidden.append(event)


def watch() -> None:
    """From now on notice what starts programs or connects anywhere. It cannot be undone within a process."""
    sys.addaudithook(_watch)


class Verdict(NamedTuple):
    """What came of a case.

    Args:
        fault: what is wrong; None: nothing.
        code: exit code.
        said: the line on stderr.
    """

    fault: str | None
    code: int
    said: str


def judge(case: Case, folder: Path, clock: Callable[[], float] = time.perf_counter) -> Verdict:
    """Run the command of ``case`` in this process, with its file in ``folder``."""
    global _watching
    path = folder / f"case{case.suffix}"
    path.write_bytes(case.content)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, clock()
    _forbidden.clear()
    Trap.sprung, _watching = False, True
    try:
        result = CliRunner().invoke(app, [str(path) if part == FILE else part for part in case.command])
    finally:
        _watching = False
    seconds, grown = clock() - began, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    said, code = result.stderr, result.exit_code
    fault = None
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        fault = f"{type(result.exception).__name__}: {result.exception}"
    elif code not in (0, 2):
        fault = f"exit code {code}"
    elif code == 2 and not (said.startswith("dfs: error: ") and said.count("\n") == 1 and said.endswith("\n")):
        fault = "not one line"
    elif any(unicodedata.category(c) in ("Cc", "Cf", "Cs") and c != "\n" for c in said + result.stdout):
        fault = "control characters"
    elif seconds > SECONDS:
        fault = f"{seconds:.1f} seconds"
    elif grown > BYTES + len(case.content):
        fault = f"{grown / 2**20:.0f} MiB"
    elif Trap.sprung or _forbidden:
        fault = f"something ran: {_forbidden}"
    return Verdict(fault, code, said)
