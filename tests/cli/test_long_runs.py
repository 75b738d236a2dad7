"""Conversions and sweeps that are interrupted, and go on."""

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import dfs_cli
from dfs_cli.checkpoint import Checkpoint
from dfs_cli.cli.app import app
from dfs_cli.cli.step_log import StepLog
from dfs_cli.conversion import stages
from dfs_cli.errors import OutputError
from dfs_cli.records import StepRecord

pytestmark = pytest.mark.medium

CONVERT = [
    "convert",
    "resnet20_digits",
    "-b",
    "0.2",
    "--workers",
    "0",
    "--device",
    "cpu",
    "--steps",
    "6",
    "--log",
    "s.csv",
]
SYNTHETIC = ["--synthetic", "distilled", "--synthetic-images", "16", "--synthetic-steps", "6"]


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """In a job in the background, shells have SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def record(step: int, loss: float = 1.0) -> StepRecord:
    return StepRecord(step, 9, loss, 50.0, 0.1, 0.1, 1.0, 1e-3)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def convert(*more: str) -> Result:
    return CliRunner().invoke(app, [*CONVERT, *more])


def signal_at(step: int, number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send this process a signal when a step is written to the log."""
    write = StepLog.step

    def written(log: StepLog, record: StepRecord) -> None:
        write(log, record)
        if record.step == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(StepLog, "step", written)


def assert_same(first: Path, second: Path) -> None:
    """The same networks, with the same figures but for times."""
    networks = []
    for path in (first, second):
        network, manifest = dfs_cli.load(path)
        assert manifest.validation is not None
        manifest = manifest.replace(validation=manifest.validation.replace(images_per_second=0.0))
        networks.append((network.state_dict(), manifest))
    (tensors, manifest), (others, other) = networks
    assert manifest == other and tensors.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())


def test_a_log_has_one_row_for_each_step(tmp_path: Path) -> None:
    first = StepLog(tmp_path / "s.csv")
    for step in (1, 2, 3, 4):
        first.step(record(step))
    first.close()
    with (tmp_path / "s.csv").open("a") as file:
        file.write("5,9,all,0.")  # killed
    second = StepLog(tmp_path / "s.csv")
    for step in (3, 4, 5):
        second.step(record(step, loss=2.0))
    second.close()
    found = rows(tmp_path / "s.csv")
    assert [row["step"] for row in found] == ["1", "2", "3", "4", "5"]
    assert [row["train_loss"] for row in found] == ["1.0", "1.0", "2.0", "2.0", "2.0"]
    assert found[0]["train_top1"] == "50.0"


def test_a_log_is_not_written_over_something_else(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("name,age\n")
    with pytest.raises(OutputError, match="not a log of this kind"):
        StepLog(tmp_path / "s.csv")
    assert (tmp_path / "s.csv").read_text() == "name,age\n"
    log = StepLog(tmp_path / "s.csv", restart=True)
    log.step(record(1))
    log.close()
    assert len(rows(tmp_path / "s.csv")) == 1


def test_a_log_of_several_networks_keeps_the_steps_of_the_others(tmp_path: Path) -> None:
    for _ in range(2):
        log = StepLog(tmp_path / "s.csv", has_jobs=True)
        for job in ("dfs 0.1, seed 0", "uniform 8 bit, seed 0"):
            log.job(job)
            log.step(record(1))
            log.step(record(2))
        log.close()
    assert [(row["job"][:3], row["step"]) for row in rows(tmp_path / "s.csv")] == [
        ("dfs", "1"), ("dfs", "2"), ("uni", "1"), ("uni", "2"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("number", "code"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)]
)
def test_a_signal_saves_the_run_which_then_goes_on(
    number: signal.Signals, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert convert("-o", "whole.safetensors", "--log", "whole.csv").exit_code == 0
    with monkeypatch.context() as patch:
        signal_at(4, number, patch)
        stopped = convert()
    assert stopped.exit_code == code
    assert "saved in model.safetensors.checkpoint; to go on: dfs " in stopped.stderr and "--resume" in stopped.stderr
    assert not Path("model.safetensors").exists() and len(rows(Path("s.csv"))) == 4

    refused = convert()
    assert refused.exit_code == 2 and "pass --resume to go on with it" in refused.stderr
    refused = convert("--resume", "--lr", "0.002")
    assert refused.exit_code == 2 and "tuning.lr is 0.001 there, 0.002 here" in refused.stderr

    resumed = convert("--resume")
    assert resumed.exit_code == 0 and "going on after step 4 of 6" in resumed.stderr
    assert "measuring" not in resumed.stderr and "original:" not in resumed.stderr, "what was found out is known"
    assert_same(Path("model.safetensors"), Path("whole.safetensors"))
    assert rows(Path("s.csv")) == rows(Path("whole.csv")) and len(rows(Path("s.csv"))) == 6
    assert not Path("model.safetensors.checkpoint").exists()


@pytest.mark.slow
def test_what_comes_after_tuning_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(stages, "finish", lambda *_: os.kill(os.getpid(), signal.SIGINT))  # not waited for
        assert convert().exit_code == 130
    resumed = convert("--resume")
    assert resumed.exit_code == 0 and "going on after step 6 of 6" in resumed.stderr
    assert len(rows(Path("s.csv"))) == 6
    assert dfs_cli.load("model.safetensors").keeps_budget


@pytest.mark.slow
def test_a_run_that_was_killed_while_it_wrote_its_results_writes_them_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "remove", lambda _: None)
        assert convert("--resume").exit_code == 0
    Path("model.safetensors").rename("whole.safetensors")
    Path("model.safetensors").write_bytes(Path("whole.safetensors").read_bytes())
    Path("model.report.md").unlink()  # the network was there before it
    assert Path("model.safetensors.checkpoint").exists()
    resumed = convert("--resume")
    assert resumed.exit_code == 0, resumed.stderr
    assert_same(Path("model.safetensors"), Path("whole.safetensors"))
    assert Path("model.report.md").exists() and not Path("model.safetensors.checkpoint").exists()
    again = convert("--resume")
    assert again.exit_code == 2 and "exists already" in again.stderr, "there is nothing to go on with"


def test_resuming_starts_where_there_is_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = convert("--resume", "--steps", "1")
    assert result.exit_code == 0 and "going on" not in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {
        "model.safetensors", "model.report.json", "model.report.md", "s.csv",
    }  # fmt: skip


@pytest.mark.slow
def test_images_that_are_being_made_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dfs_cli.cli.progress import PlainObserver

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "first"))
    assert convert(*SYNTHETIC, "-o", "whole.safetensors", "--log", "whole.csv").exit_code == 0
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "second"))
    advances: list[int] = []

    def advance(_: PlainObserver, units: int) -> None:
        advances.append(units)
        if len(advances) == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(PlainObserver, "advance", advance)
        assert convert(*SYNTHETIC).exit_code == 143
        resumed = convert(*SYNTHETIC, "--resume")
    assert resumed.exit_code == 0 and "timing this machine" not in resumed.stderr
    assert advances[:7] == [16] * 4 + [64] + [16] * 2
    assert_same(Path("model.safetensors"), Path("whole.safetensors"))


@pytest.mark.slow
def test_a_sweep_goes_on_with_the_network_that_was_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["sweep", "resnet20_digits", "-b", "0.05", "--baselines", "none", "--steps", "6", "--workers", "0"]
    arguments += ["--log", "steps.csv", "--device", "cpu", "-o"]
    assert CliRunner().invoke(app, [*arguments, "whole.json", "--log", "steps-of-whole.csv"]).exit_code == 0
    with monkeypatch.context() as patch:
        signal_at(3, signal.SIGINT, patch)
        stopped = CliRunner().invoke(app, [*arguments, "s.json"])
    assert stopped.exit_code == 130 and "to go on: dfs " in stopped.stderr
    assert Path("s.dfs-0.05-seed-0.checkpoint").is_file()
    resumed = CliRunner().invoke(app, [*arguments, "s.json"])
    assert resumed.exit_code == 0 and not list(tmp_path.glob("*.checkpoint"))
    first, second = (json.loads(Path(name).read_text())["points"] for name in ("whole.json", "s.json"))
    assert first == second
    assert rows(Path("steps.csv")) == rows(Path("steps-of-whole.csv")) and len(rows(Path("steps.csv"))) == 6


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--without-images"]])
def test_conversions_that_are_killed_go_on(more: list[str]) -> None:
    script = Path(__file__).parents[2] / "examples" / "kill_and_resume.py"
    command = [sys.executable, "-W", "ignore", str(script), "--times", "3", "--steps", "5", *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 killed and resumed, 0 unlike" in done.stdout
