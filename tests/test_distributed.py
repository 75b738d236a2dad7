"""Two processes that do one run together, on the CPU."""

import csv
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from common_processes import (
    DYNAMIC,
    figures,
    in_two_processes,
    right_in,
    right_in_all,
    step_of,
    steps_of_all,
    validation,
)
from torch import Tensor

import dfs_cli
from dfs_cli.data.loading import EpochSampler

pytestmark = pytest.mark.slow

TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dfs_cli"]
ONE = [sys.executable, "-m", "dfs_cli"]
CONVERT = ["convert", "resnet20_digits", "-b", "0.1", "--device", "cpu", "--workers", "0"]


def run(command: list[str], folder: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == code, done.stderr
    return done


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_figures_are_those_of_all_processes(tmp_path: Path) -> None:
    first, second = in_two_processes(figures, tmp_path)
    assert first["share"].tolist() == [0, 1] and second["share"].tolist() == [2, 3, 4]
    for found in (first, second):
        assert found["joined"].tolist() == [0, 1, 2, 3, 4] and torch.equal(found["own"], found["share"])
        assert found["mean"] == 2.0 and math.isnan(found["none"]) and found["some"] == 3.0
        assert found["total"].tolist() == [2, 1] and found["largest"] == [1, 5]
        assert found["first"] == "of 0" and found["all"] == [0, 1]
    assert first["weights"] == [0.8, 0.0] and second["weights"] == [1.2, 2.0]
    whole = list(EpochSampler(11, seed=3))
    # Of each batch of five the first process has two.
    assert first["order"] == whole[:2] + whole[5:7] and second["order"] == whole[2:5] + whole[7:10]
    assert (first["length"], second["length"]) == (4, 6)


def test_right_answers_are_told_in_the_order_of_the_split(tmp_path: Path) -> None:
    expected = right_in(validation())
    (right,) = expected["right"]
    assert right.shape == (119,) and 0 < right.double().mean() < 1 and expected["unreadable"] == ["image 70"]
    for found in in_two_processes(right_in_all, tmp_path):
        assert len(found["right"]) == 1 and torch.equal(found["right"][0], right)
        assert found["unreadable"] == expected["unreadable"] and found["top1"] == expected["top1"]


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    assert found.keys() == expected.keys(), what
    for name, tensor in expected.items():
        difference = float((found[name].double() - tensor.double()).abs().max())
        assert difference <= 2e-5 + 1e-3 * float(tensor.double().abs().max()), (what, name, difference)


def test_a_step_is_that_of_the_whole_batch(tmp_path: Path) -> None:
    first, second = in_two_processes(steps_of_all, tmp_path)
    for gate, dynamic in DYNAMIC.items():
        expected = step_of(dynamic, 1)
        for pieces in (1, 2):
            name = f"{gate} {pieces}"
            for key in ("network", "moments"):
                assert all(torch.equal(v, second[name][key][k]) for k, v in first[name][key].items()), name
            if gate == "probe" and pieces == 2:
                continue  # the least sure image of each piece takes the second pass
            for found, wanted in zip(first[name]["records"], expected["records"], strict=True):
                assert found[3:] == pytest.approx(wanted[3:], rel=1e-4), name
            # A parameter that no process used has no moments, in two processes as in one.
            assert_close(first[name]["moments"], expected["moments"], name)
            assert_close(first[name]["network"], expected["network"], name)


def test_evaluation_gives_the_same_json(artifact: Path, tmp_path: Path) -> None:
    arguments = ["eval", str(artifact), "--device", "cpu", "--json", "--results-file"]
    one, two = (run([*command, *arguments, name], tmp_path) for command, name in ((ONE, "1.json"), (TWO, "2.json")))
    printed, expected = json.loads(two.stdout), json.loads(one.stdout)
    assert json.loads((tmp_path / "2.json").read_text()) == printed
    del printed["images_per_second"], expected["images_per_second"]
    assert printed == expected


def test_another_budget_gives_the_same_network(artifact: Path, tmp_path: Path) -> None:
    arguments = ["eval", str(artifact), "--device", "cpu", "-q", "--budget", "0.05", "-o"]
    for command, name in ((ONE, "1.safetensors"), (TWO, "2.safetensors")):
        run([*command, *arguments, name], tmp_path)
    one, two = (dfs_cli.load(tmp_path / name).manifest for name in ("1.safetensors", "2.safetensors"))
    assert one.operating_point == two.operating_point and one.held_out == two.held_out


@pytest.mark.parametrize("gate", ["static", "probe", "rnn"])
def test_a_conversion_gives_what_one_process_gives(gate: str, tmp_path: Path) -> None:
    # With many points that are equally good on a few held-out images, the last digit would decide which is taken.
    spent = ["--spend", "-b", "0.05"] if gate == "rnn" else []
    arguments = [*CONVERT, "--steps", "12", "--gate", gate, *spent, "--json"]
    one = run([*ONE, *arguments, "-o", "one.safetensors", "--log-file", "one.csv"], tmp_path)
    two = run([*TWO, *arguments, "-o", "two.safetensors", "--log-file", "two.csv"], tmp_path)
    expected, found = (json.loads(done.stdout) for done in (one, two))
    assert found["keeps_budget"] and dfs_cli.load(tmp_path / "two.safetensors").keeps_budget
    assert found["top1_after"] == pytest.approx(expected["top1_after"], abs=0.5)
    assert found["cost"] == pytest.approx(expected["cost"], rel=0.05)
    steps, wanted = rows(tmp_path / "two.csv"), rows(tmp_path / "one.csv")
    assert [row["step"] for row in steps] == [row["step"] for row in wanted]
    losses, other_losses = ([float(row["train_loss"]) for row in some] for some in (steps, wanted))
    costs, other_costs = ([float(row["cost"]) for row in some] for some in (steps, wanted))
    if gate == "static":
        assert losses == pytest.approx(other_losses, rel=1e-4) and costs == pytest.approx(other_costs)
    else:  # each process explores by its own draws, between which the teacher's images are drawn
        assert statistics.fmean(losses) == pytest.approx(statistics.fmean(other_losses), rel=0.05)
        assert costs == pytest.approx(other_costs, rel=0.1)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json", ".md", ".csv"}


def test_a_mistake_is_said_once(tmp_path: Path) -> None:
    done = subprocess.run([*TWO, *CONVERT, "-b", "0.0001"], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode != 0 and done.stderr.count("dfs: error: budget 0.0001 cannot be reached") == 1


def processes_of(parent: int) -> list[int]:
    """The processes that run dfs below ``parent``, in order of their ranks."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(c) for c in children if b"dfs_cli" in Path(f"/proc/{c}/cmdline").read_bytes()]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="there is no /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_ends_the_run_which_goes_on(rank: int, tmp_path: Path) -> None:
    arguments = [*CONVERT, "--steps", "60", "--checkpoint-minutes", "0", "--log-file", "s.csv"]
    log = tmp_path / "stderr"
    with log.open("w") as stderr, subprocess.Popen([*TWO, *arguments], cwd=tmp_path, stderr=stderr) as process:
        deadline = time.monotonic() + 120
        while len(rows(tmp_path / "s.csv") if (tmp_path / "s.csv").exists() else []) < 3:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        os.kill(processes_of(process.pid)[rank], signal.SIGKILL)
        began = time.monotonic()
        assert process.wait(60) != 0 and time.monotonic() - began < 60
    said = [line for line in log.read_text().splitlines() if line.startswith("dfs: ")]
    assert len(said) == 1 and ("another process" in said[0] or "stopped by SIGTERM" in said[0]), log.read_text()
    assert not (tmp_path / "model.safetensors").exists() and (tmp_path / "model.safetensors.checkpoint").exists()
    done = run([*TWO, *arguments, "--resume"], tmp_path)
    assert "going on after step" in done.stderr and "step 60/60" in done.stderr
    assert [row["step"] for row in rows(tmp_path / "s.csv")] == [str(step) for step in range(1, 61)]
    assert not (tmp_path / "model.safetensors.checkpoint").exists()
    assert dfs_cli.load(tmp_path / "model.safetensors").keeps_budget


def test_images_are_made_in_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arguments = [
        *CONVERT,
        "--synthetic",
        "distilled",
        "--synthetic-images",
        "9",
        "--synthetic-steps",
        "3",
        "--steps",
        "2",
    ]
    done = run([*TWO, *arguments, "--save-synthetic", "made"], tmp_path)
    assert "making images: 15" in done.stderr, "five images for three steps in each process"
    assert len(list((tmp_path / "made").rglob("*.png"))) == 9
    manifest = dfs_cli.load(tmp_path / "model.safetensors").manifest
    assert manifest.bound is not None and manifest.bound <= 0.1
