"""Where a command's results go: text, JSON, or nowhere; everything else goes to stderr."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import typer

from dfs_cli.cli.options import JsonOutput, Quiet
from dfs_cli.distributed import is_first
from dfs_cli.errors import printable

if TYPE_CHECKING:
    from rich.console import Console

    from dfs_cli.cli.progress import PlainObserver, TerminalObserver
    from dfs_cli.cli.step_log import StepLog


@dataclasses.dataclass(frozen=True)
class Output:
    """The one sink of a command.

    Args:
        as_json: print one JSON object on stdout, and nothing else there.
        quiet: no progress, and no text.
    """

    as_json: JsonOutput = False
    quiet: Quiet = False

    def result(self, record: Any, render: Callable[[Console], None]) -> None:
        """The result of the command: ``record`` as JSON, or what ``render`` prints."""
        if not is_first():
            return
        if self.as_json:
            typer.echo(json.dumps(record))
        elif not self.quiet:
            render(_plain_console())

    def say(self, *lines: str) -> None:
        """Lines on stderr."""
        if not self.is_silent:
            for line in lines:
                self.stderr().print(line, highlight=False, soft_wrap=True, markup=False)

    def stderr(self) -> Console:
        """The console for everything that is not a result."""
        return _plain_console(stderr=True, quiet=self.is_silent)

    @property
    def is_silent(self) -> bool:
        """Whether there is no text but results: of several processes the first one alone prints."""
        return self.quiet or not is_first()

    def observer(
        self, logs: bool = False, settings: bool = False, log: StepLog | None = None
    ) -> TerminalObserver | PlainObserver:
        """Shows a run: bars where stderr is a terminal, lines elsewhere.

        Args:
            logs: lines where stderr is no terminal, too.
            settings: the resolved settings first.
            log: where steps are written, too.
        """
        from dfs_cli.cli.progress import create_observer

        return create_observer(self.stderr(), logs and not self.is_silent, settings, log)


def _plain_console(**settings: Any) -> Console:
    """A console that shows text as it is: nothing in it is markup, and control characters are escaped."""
    from rich.console import Console
    from rich.text import Text

    class PlainConsole(Console):
        def render_str(self, text: str, **settings: Any) -> Text:
            return super().render_str("\n".join(map(printable, text.split("\n"))), **settings)

    return PlainConsole(markup=False, emoji=False, highlight=False, **settings)
