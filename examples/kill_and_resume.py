"""Kill a conversion at random moments, resume it, and compare what it writes with what an uninterrupted one writes.

    python examples/kill_and_resume.py --times 100

On the CPU the two files are equal, but for the time that evaluation took. Each conversion is a process of its own, which is
killed by SIGKILL: nothing in it can clean up.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

import dfs_cli
from dfs_cli.cli.app import app

WITHOUT_IMAGES = (
    "--synthetic",
    "distilled",
    "--synthetic-images",
    "32",
    "--synthetic-steps",
    "12",
    "--batch-size",
    "16",
)
OUTPUTS = {"model.safetensors", "model.report.json", "model.report.md", "steps.csv"}


class Network(NamedTuple):
    """All that a file holds, but for times."""

    tensors: dict[str, torch.Tensor]
    manifest: dfs_cli.Manifest

    @classmethod
    def load(cls, path: Path) -> Network:
        network, manifest = dfs_cli.load(path)
        assert manifest.validation is not None
        untimed = manifest.validation.replace(images_per_second=0.0)
        return cls(network.state_dict(), manifest.replace(validation=untimed))

    def equals(self, other: Network) -> bool:
        same = self.tensors.keys() == other.tensors.keys() and self.manifest == other.manifest
        return same and all(torch.equal(tensor, other.tensors[name]) for name, tensor in self.tensors.items())


def warm_up() -> None:
    """Import here what every process would import."""
    with tempfile.TemporaryDirectory() as folder:
        tuning = dfs_cli.TuningConfig(steps=1, batch_size=64, hflip=0.0, device="cpu", workers=0)
        converted = dfs_cli.convert("resnet20_digits", 0.1, tuning=tuning)
        dfs_cli.save(converted, Path(folder) / "model.safetensors")
        dfs_cli.cost_report(converted)


def start(folder: Path, arguments: list[str]) -> int:
    """The process of a conversion in ``folder``. It is forked off, so that it need not import torch."""
    process = os.fork()
    if process == 0:
        os.setpgid(0, 0)
        os.chdir(folder)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")  # images are made again in each
        with folder.with_suffix(".err").open("a") as err, Path(os.devnull).open("w") as out:
            os.dup2(err.fileno(), 2)
            os.dup2(out.fileno(), 1)
        code = 70
        try:
            app(arguments)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        finally:
            os._exit(code)
    return process


def finish(process: int) -> int:
    """The exit code of a process; negative: the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def steps_of(path: Path) -> list[int]:
    """The steps in a log."""
    with path.open(newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--without-images", action="store_true", help="convert with images made from the network")
    options = parser.parse_args()
    torch.set_num_threads(1)
    arguments = ["convert", "resnet20_digits", "--budget", "0.1", "--steps", str(options.steps), "--device", "cpu"]
    arguments += ["--workers", "0", "--checkpoint-minutes", "0", "--log", "steps.csv"]
    arguments += WITHOUT_IMAGES if options.without_images else ()
    expected_files = OUTPUTS | ({"model.images.png", "cache"} if options.without_images else set())
    moments, failures, killed, number = random.Random(options.seed), 0, 0, 0
    warm_up()
    with tempfile.TemporaryDirectory() as root:
        whole = Path(root) / "whole"
        whole.mkdir()
        began = time.monotonic()
        if code := finish(start(whole, arguments)):
            sys.exit(f"the uninterrupted conversion ended with {code}: {whole.with_suffix('.err').read_text()}")
        seconds = time.monotonic() - began
        print(f"uninterrupted: {seconds:.1f} s", flush=True)
        expected = Network.load(whole / "model.safetensors")
        while killed < options.times:
            number += 1
            folder = Path(root) / f"run{number}"
            folder.mkdir()
            moment = moments.uniform(0, seconds)
            process = start(folder, arguments)
            time.sleep(moment)
            os.kill(process, signal.SIGKILL)
            was_killed = finish(process) == -signal.SIGKILL
            killed += was_killed
            has_checkpoint = (folder / "model.safetensors.checkpoint").exists()
            # One that had ended is left as it is: there is nothing to go on with.
            code = finish(start(folder, [*arguments, "--resume"])) if was_killed else 0
            files = {path.name for path in folder.iterdir()}
            problems = []
            if code:
                problems.append(f"exit code {code}: {folder.with_suffix('.err').read_text()[-300:]}")
            elif not Network.load(folder / "model.safetensors").equals(expected):
                problems.append("another network")
            elif steps_of(folder / "steps.csv") != list(range(1, options.steps + 1)):
                problems.append("not one row for each step")
            if files != expected_files:
                problems.append(f"files {sorted(files)}")
            failures += bool(problems)
            end = f"killed after {moment:.2f} s, {'a' if has_checkpoint else 'no'} checkpoint"
            end = end if was_killed else "had ended before"
            print(f"{number}: {end}; {'; '.join(problems) or 'equal'}", flush=True)
            shutil.rmtree(folder)
    print(f"{number} runs, {killed} killed and resumed, {failures} unlike the uninterrupted one")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
