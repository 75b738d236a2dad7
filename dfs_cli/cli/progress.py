"""How a run is shown: bars in a terminal, plain lines elsewhere; always on stderr."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from dfs_cli.cli.memory import keep_freed_memory, return_freed_memory
from dfs_cli.cli.step_log import StepLog
from dfs_cli.config import Configuration
from dfs_cli.cost.table import CostTable
from dfs_cli.errors import printable
from dfs_cli.observer import VARIED_STAGES, Observer
from dfs_cli.records import StepRecord

_SMOOTHING = 0.95
_PLAIN_LINES = 10


class _Averages:
    """Running averages of what a step reports."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def update(self, record: StepRecord) -> str:
        for key in ("loss", "accuracy", "cost"):
            new = getattr(record, key)
            self.values[key] = _SMOOTHING * self.values.get(key, new) + (1 - _SMOOTHING) * new
        v = self.values
        return f"loss {v['loss']:.3f}  acc {v['accuracy']:.1f}%  cost {v['cost']:.4f}  target {record.target:.4f}"


class _Optional(ProgressColumn):
    """A column that is shown only where the total is known."""

    def __init__(self, column: ProgressColumn) -> None:
        super().__init__()
        self.column = column

    def render(self, task: Task) -> Any:
        return Text("") if task.total is None else self.column(task)


class _Logged(Observer):
    """Writes steps to a file, if there is one."""

    log: StepLog | None = None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.log is not None:
            self.log.close()

    def stage(self, name: str, total: int | None) -> None:  # noqa: ARG002
        return_freed_memory()
        keep_freed_memory(varied=name in VARIED_STAGES)

    def job(self, name: str) -> None:
        if self.log is not None:
            self.log.job(name)

    def step(self, record: StepRecord) -> None:
        if self.log is not None:
            self.log.step(record)


class TerminalObserver(_Logged):
    """A bar per stage, with loss, accuracy, cost and the time left.

    Args:
        settings: show the resolved settings first, and keep finished bars.
    """

    def __init__(self, console: Console, settings: bool = False) -> None:
        self.console = console
        self.settings = settings
        self.averages = _Averages()
        self.progress = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}", markup=False),
            _Optional(BarColumn(bar_width=20)),
            _Optional(MofNCompleteColumn()),
            TextColumn("{task.fields[figures]}", style="cyan", markup=False),
            TimeElapsedColumn(),
            _Optional(TimeRemainingColumn(compact=True)),
            console=console,
        )
        self.task: Any = None

    def __enter__(self) -> TerminalObserver:
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._finish()
        self.progress.stop()
        super().__exit__(kind)

    def job(self, name: str) -> None:
        super().job(name)
        self.averages = _Averages()
        self.console.print(name, highlight=False)

    def configured(self, configuration: Configuration, table: CostTable) -> None:
        if self.settings:
            print_configuration(self.console, configuration, table)

    def stage(self, name: str, total: int | None) -> None:
        super().stage(name, total)
        self._finish()
        if not self.settings and self.task is not None:
            self.progress.remove_task(self.task)
        self.task = self.progress.add_task(name, total=total, figures="")

    def advance(self, units: int) -> None:
        self.progress.advance(self.task, units)

    def step(self, record: StepRecord) -> None:
        super().step(record)
        self.progress.update(self.task, completed=record.step, figures=self.averages.update(record))

    def estimate(self, seconds: float) -> None:
        self.console.print(estimate_text(seconds), highlight=False)

    def tried(self, value: float, cost: float) -> None:
        self.progress.update(self.task, figures=f"operating point {value:.4g}  cost {cost:.4f}")

    def note(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)

    def _finish(self) -> None:
        if self.task is not None:
            task = next(t for t in self.progress.tasks if t.id == self.task)
            self.progress.update(self.task, total=task.total or 1, completed=task.total or 1)
            self.progress.stop_task(self.task)


class PlainObserver(_Logged):
    """A line now and then, for logs.

    Args:
        logs: whether there are any lines.
        settings: whether the settings and each stage have one.
    """

    def __init__(self, console: Console, logs: bool = True, settings: bool = False) -> None:
        self.console = console
        self.logs, self.settings = logs, settings
        self.averages = _Averages()
        self.began = time.monotonic()

    def __enter__(self) -> PlainObserver:
        return self

    def job(self, name: str) -> None:
        super().job(name)
        self.averages = _Averages()
        self._print(name)

    def configured(self, configuration: Configuration, table: CostTable) -> None:
        if self.settings and self.logs:
            print_configuration(self.console, configuration, table)

    def stage(self, name: str, total: int | None) -> None:
        super().stage(name, total)
        self.began = time.monotonic()
        if self.settings:
            self._print(name if total is None else f"{name}: {total}")

    def step(self, record: StepRecord) -> None:
        super().step(record)
        figures = self.averages.update(record)
        if record.step % max(1, record.total_steps // _PLAIN_LINES) == 0:
            left = (time.monotonic() - self.began) * (record.total_steps / record.step - 1)
            self._print(f"step {record.step}/{record.total_steps}  {figures}  {left:.0f} s left")

    def estimate(self, seconds: float) -> None:
        self._print(estimate_text(seconds))

    def note(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def _print(self, line: str) -> None:
        if self.logs:
            self.console.print(line, highlight=False, soft_wrap=True, markup=False)


def create_observer(
    console: Console, logs: bool = True, settings: bool = False, log: StepLog | None = None
) -> TerminalObserver | PlainObserver:
    """Bars where ``console`` is a terminal, lines elsewhere; steps are written to ``log``, too."""
    is_shown = console.is_terminal and not console.quiet
    observer = TerminalObserver(console, settings) if is_shown else PlainObserver(console, logs, settings)
    observer.log = log
    return observer


def estimate_text(seconds: float) -> str:
    """How long tuning will take, in words."""
    if seconds < 90:
        return f"tuning will take about {max(1, round(seconds))} more seconds on this machine"
    if seconds < 5400:
        return f"tuning will take about {round(seconds / 60)} more minutes on this machine"
    return f"tuning will take about {seconds / 3600:.1f} more hours on this machine"


def print_configuration(console: Console, configuration: Configuration, table: CostTable) -> None:
    """The resolved settings of a conversion, a line per group."""
    tuning, dynamic, data = configuration.tuning, configuration.dynamic, configuration.data
    images, preprocessing = configuration.images, configuration.preprocessing
    source = "given" if data is None else data.dataset or data.data_dir
    if configuration.synthesis is not None:
        source = f"synthetic images ({configuration.synthesis.kind}), all of them in each split"
    lines = {
        "model": f"{configuration.model}, {len(table.blocks)} blocks, {table.dense_macs / 1e9:.4g} GMACs",
        "budget": f"{'' if configuration.spend else 'at most '}{configuration.budget:g} of {table.scale} (all at 8 bits: "
        f"{table.uniform_cost(8):.4f}; reachable: {table.cheapest:.4f} to {table.dearest:.4f})",
        "limit": "" if configuration.limit is None else f"{configuration.limit:g} for every image",
        "options": f"{','.join(map(str, dynamic.bits))} bits, fixed layers {dynamic.fixed_bits} bits, gate {dynamic.gate}"
        f"{' (second pass mirrored)' if dynamic.mirror else ''}",
        "data": f"{source}: {images['train']} to tune, "
        f"{images['calibration']} held out, {images['validation']} to validate; "
        f"{'x'.join(map(str, preprocessing.input_size))}, crop {preprocessing.crop_pct:g}, "
        f"mean {','.join(f'{m:g}' for m in preprocessing.mean)}, std {','.join(f'{s:g}' for s in preprocessing.std)}",
        "tuning": f"{configuration.steps} steps of {tuning.batch_size}, lr {tuning.lr:g}"
        f"{', backbone frozen' if tuning.freeze_backbone else ''}{', amp' if tuning.amp else ''}, "
        f"flips {tuning.hflip:g}, crops from {tuning.min_crop:g}, "
        f"{configuration.device}, {tuning.workers} workers, seed {tuning.seed}",
    }
    for name, text in lines.items():
        if not text:
            continue
        console.print(Text.assemble((f"{name:8}", "bold"), printable(text)), soft_wrap=True)
