import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dfs_cli.atomic import held
from dfs_cli.comparison.jobs import Job
from dfs_cli.comparison.results import Results, answers_folder
from dfs_cli.errors import OutputError

FIGURES: dict[str, Any] = {"cost": 0.1, "top1": 90.0, "top5": 99.0, "steps": 1}

ADD = """
import json, sys
from pathlib import Path
from dfs_cli.comparison.jobs import Job
from dfs_cli.comparison.results import Results
path, fresh, figures, bits = Path(sys.argv[1]), *map(json.loads, sys.argv[2:])
results = Results(path, fresh)
for seed in range(8):
    results.add(Job("uniform", seed, bits=bits), **figures)
"""


def fresh(**identity: Any) -> dict[str, Any]:
    return {"model": "net", "dynamic": {}, "original": None, "points": [], "skipped": [], **identity}


def stored(path: Path) -> list[tuple[int, int]]:
    return sorted((p["bits"], p["seed"]) for p in json.loads(path.read_text())["points"])


def test_sweeps_that_share_a_file_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    first, second = Results(path, fresh(dynamic={"0.1": 1})), Results(path, fresh(dynamic={"0.2": 2}))
    with first.update() as record:
        record["original"] = {"top1": 95.0}
    second.add(Job("uniform", 0, bits=8), **FIGURES)
    first.add(Job("uniform", 0, bits=4), **FIGURES)
    first.add(Job("skipnet", 0, budget=0.1), reason="diverged")
    assert stored(path) == [(4, 0), (8, 0)]
    record = json.loads(path.read_text())
    assert record["dynamic"] == {"0.1": 1, "0.2": 2} and record["original"] == {"top1": 95.0}
    assert len(record["summary"]) == 2
    assert second.has(Job("skipnet", 0, budget=0.1)) and not second.has(Job("skipnet", 1, budget=0.1))
    second.add(Job("skipnet", 0, budget=0.1), **FIGURES)
    record = json.loads(path.read_text())
    assert record["skipped"] == [] and len(record["points"]) == 3, "a later record takes the place of an earlier one"


@pytest.mark.slow
def test_processes_that_write_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    arguments = [sys.executable, "-c", ADD, str(path), json.dumps(fresh()), json.dumps(FIGURES)]
    processes = [subprocess.Popen([*arguments, str(bits)]) for bits in (4, 8)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert stored(path) == [(bits, seed) for bits in (4, 8) for seed in range(8)]
    assert list(tmp_path.iterdir()) == [path]


def test_a_sweep_that_was_started_again_with_other_settings_is_not_mixed_with(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    results = Results(path, fresh())
    results.add(Job("uniform", 0, bits=8), **FIGURES)
    Results(path, fresh(model="other"), restart=True)
    kept = path.read_text()
    with pytest.raises(OutputError, match="other settings"):
        results.add(Job("uniform", 0, bits=4), **FIGURES)
    assert path.read_text() == kept


def test_starting_again_follows_links(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    path, target = tmp_path / "s.json", tmp_path / "disk" / "r.json"
    path.symlink_to(target)
    Results(path, fresh()).add(Job("uniform", 0, bits=8), **FIGURES)
    answers_folder(path).mkdir()
    assert Results(path, fresh(), restart=True).record["points"] == []
    assert path.is_symlink() and json.loads(target.read_text())["points"] == [] and not answers_folder(path).exists()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"model": "net", "dynamic": {}, "points": [null], "skipped": []}',
        json.dumps(
            fresh(
                points=[
                    {"method": "dfs", "seed": 0, "budget": 0.1, "bits": None, "views": 1, "right": "gA==", "images": 9}
                ]
            )
        ),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "s.json"
    path.write_text(content)
    with pytest.raises(OutputError, match="is not the result of a sweep"):
        Results(path, fresh())


def test_results_that_are_held_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    Results(path, fresh()).add(Job("uniform", 0, bits=8), **FIGURES)
    with held(path):
        assert stored(path) == [(8, 0)]
