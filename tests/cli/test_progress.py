import io

import pytest
from rich.console import Console

import dfs_cli
from dfs_cli.cli.progress import TerminalObserver, create_observer, estimate_text
from dfs_cli.records import StepRecord

pytestmark = pytest.mark.medium


def shown(console: Console) -> str:
    return console.export_text(styles=False)


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=160, record=True)


def step(number: int) -> StepRecord:
    return StepRecord(number, 4, 2.0, 50.0, 0.02, 0.03, 1.0, 1e-3)


def test_a_terminal_sees_bars_figures_and_the_estimate() -> None:
    console = terminal()
    with create_observer(console, settings=True) as observer:
        assert isinstance(observer, TerminalObserver)
        observer.stage("loading held-out images", 10)
        observer.advance(4)
        assert observer.progress.tasks[0].completed == 4
        observer.stage("tuning", 4)
        observer.step(step(1))
        assert observer.progress.tasks[1].completed == 1
        observer.estimate(600.0)
        observer.step(step(2))
        task = observer.progress.tasks[1]
        assert task.description == "tuning" and task.completed == 2
        assert task.fields["figures"] == "loss 2.000  acc 50.0%  cost 0.0200  target 0.0300"
        observer.stage("setting the operating point", None)
        observer.tried(1.5, 0.0123)
        assert observer.progress.tasks[2].fields["figures"] == "operating point 1.5  cost 0.0123"
    assert all(task.finished for task in observer.progress.tasks)
    assert "tuning will take about 10 more minutes on this machine" in shown(console)


def test_a_terminal_keeps_one_bar_for_a_sweep_and_shows_an_interrupted_one() -> None:
    console = terminal()
    with pytest.raises(KeyboardInterrupt), create_observer(console) as observer:
        assert isinstance(observer, TerminalObserver)
        observer.job("dfs 0.03, seed 0 (1 of 2)")
        observer.stage("tuning", 4)
        observer.stage("validation", 8)
        observer.advance(1)
        raise KeyboardInterrupt
    assert isinstance(observer, TerminalObserver)
    (task,) = observer.progress.tasks
    assert task.description == "validation" and not task.finished
    assert "dfs 0.03, seed 0 (1 of 2)" in shown(console)


def test_a_log_has_lines_and_without_it_there_are_notes_alone() -> None:
    for logs, expected in ((True, ["tuning: 4", "step 4/4", "note"]), (False, ["note"])):
        console = Console(file=io.StringIO(), width=160, record=True)
        with create_observer(console, logs, settings=True) as observer:
            observer.stage("tuning", 4)
            for number in (1, 2, 3, 4):
                observer.step(step(number))
            observer.note("note")
        lines = shown(console)
        assert all(word in lines for word in expected) and ("step" in lines) is logs


def test_the_settings_of_a_run_are_shown_first() -> None:
    console = Console(file=io.StringIO(), width=200, record=True)
    tuning = dfs_cli.TuningConfig(steps=1, batch_size=64, hflip=0.0)
    with create_observer(console, settings=True) as observer:
        dfs_cli.convert("resnet20_digits", 0.05, tuning=tuning, observer=observer)
    lines = shown(console).splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["model", "budget", "options", "data", "tuning"]
    assert "at most 0.05" in lines[1] and "0,2,3,4,5,6,8 bits, fixed layers 8 bits, gate probe" in lines[2]
    assert "digits: 1167 to tune, 180 held out, 450 to validate; 1x8x8" in lines[3] and "1 steps of 64" in lines[4]


def test_estimates_are_told_in_the_unit_of_their_size() -> None:
    assert estimate_text(0.2).startswith("tuning will take about 1 more seconds")
    assert "10 more minutes" in estimate_text(599.0) and "2.0 more hours" in estimate_text(7200.0)
