"""Change valid files in thousands of ways, and see that every command that reads them ends well.

Each case must end in one line and exit code 2, or load and run, within 10 seconds and 2 GiB above the file's size, and
nothing of the file may be executed. `python examples/mutate_files.py --cases 10000`
"""

from __future__ import annotations

import argparse
import collections
import random
import sys
import tempfile
from pathlib import Path

import torch

import dfs_cli
from dfs_cli.config import GateKind

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from mutations import draw
from verdicts import judge, watch

NETWORKS: tuple[tuple[GateKind, tuple[int, ...], float], ...] = (
    ("probe", (0, 2, 8), 0.04), ("rnn", (0, 4, 8), 0.3), ("ff", (0, 8, 32), 0.3), ("static", (0, 2, 4, 8), 0.04),
)  # fmt: skip


def valid_files(folder: Path) -> list[bytes]:
    """A file of each gate, tuned for a moment."""
    tuning = dfs_cli.TuningConfig(steps=2, batch_size=32, hflip=0.0, workers=0)
    files = []
    for gate, bits, budget in NETWORKS:
        path = folder / f"{gate}.safetensors"
        dynamic = dfs_cli.DynamicConfig(bits=bits, gate=gate)
        dfs_cli.save(dfs_cli.convert("resnet20_digits", budget, tuning=tuning, dynamic=dynamic), path)
        files.append(path.read_bytes())
    return files


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case, to see one again")
    parser.add_argument("--show", action="store_true", help="print every case, and what the command said")
    args = parser.parse_args()
    torch.set_num_threads(1)
    watch()
    faults: list[str] = []
    codes: collections.Counter[int] = collections.Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files, state = valid_files(folder), dict(dfs_cli.load_model("resnet20_digits").state_dict())
        for number in range(args.first, args.first + args.cases):
            case = draw(random.Random(f"{args.seed} {number}"), files, state)
            verdict = judge(case, folder)
            codes[verdict.code] += 1
            if args.show:
                print(f"case {number}: {verdict.code} {case.what[:200]!r} {verdict.said.strip()!r}", flush=True)
            if verdict.fault:
                faults.append(verdict.fault)
                print(f"case {number}: {verdict.fault[:300]!r} {case.command} {case.what[:300]!r}", flush=True)
            if number % 500 == 499:
                print(f"{number + 1} cases, {len(faults)} faults, exit codes {dict(codes)}", flush=True)
    print(f"{args.cases} cases, {len(faults)} faults, exit codes {dict(codes)}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
