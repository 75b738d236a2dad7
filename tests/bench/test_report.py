from typing import Any

import pytest
from rich.console import Console

from dfs_cli.errors import ConfigError
from dfs_cli.report.bench import print_inference
from dfs_cli.report.plot import plot_times

ROW: dict[str, Any] = {
    "name": "ort-int8-static", "batch": 1, "runs": 4, "mean_ms": 20.0, "low_ms": 19.0, "high_ms": 21.5, "p50_ms": 18.0,
    "p95_ms": 30.0, "p99_ms": 31.0, "images_per_second": 50.0, "peak_bytes": None, "file_bytes": 3 * 2**20, "cost": 1.0,
    "time": 1.0, "controller_ms": None, "speedup": {"ort-dfs": 0.5}, "top1": 88.0, "interrupted": 0.0,
}  # fmt: skip
DYNAMIC = ROW | {
    "name": "ort-dfs",
    "cost": 0.03,
    "peak_bytes": 2**21,
    "time": 0.5,
    "controller_ms": 2.0,
    "mean_ms": 10.0,
    "low_ms": 9.0,
    "high_ms": 11.0,
    "top1": None,
}
PAIRING = {
    "name": "ort-int8-static", "time": 0.5, "time_low": 0.4, "time_high": 0.6, "top1": 1.25, "top1_error": 0.5,
    "winner": "first",
}  # fmt: skip
VERDICT = {
    "name": "ort-dfs",
    "batch": 1,
    "pairings": [PAIRING],
    "at_equal_top1": None,
    "at_equal_time": "ort-int8-static",
}
RECORD: dict[str, Any] = {
    "model": "resnet18", "rows": [ROW, DYNAMIC], "threads": 2, "repeats": 4, "options": [0, 8], "gate": "rnn",
    "image_size": [3, 64, 32], "images": 64, "decisions": "real, on validation images", "graph": {"features": "int8"},
    "machine": {"processor": "abacus", "cores": "2"}, "verdicts": [],
}  # fmt: skip
COMPARED = {"features": "float", "images": 40, "same_decisions": 0.95, "holds": False}


def lines_of(record: dict[str, Any]) -> list[str]:
    console = Console(width=40)
    with console.capture() as captured:
        print_inference(console, record)
    return captured.get().splitlines()


def test_a_record_of_inference_in_words() -> None:
    lines = lines_of(RECORD)
    assert lines[:3] == [
        "resnet18, 3x64x32, options 0,8, gate rnn, 2 threads, 64 images, 4 times in turns",
        "machine: processor abacus, cores 2",
        "decisions: real, on validation images",
    ]
    assert lines[3].startswith("ort-dfs: features between blocks are int8; not compared")
    expected = "ort-int8-static 1 4 20.000 19.000 - 21.500 18.000 30.000 31.000 50.0 - 3.00 1.0000 1.00 88.00"
    assert " ".join(lines[5].split()) == expected
    expected = "ort-dfs 1 4 10.000 9.000 - 11.000 18.000 30.000 31.000 50.0 2.0 3.00 0.0300 0.50 -"
    assert " ".join(lines[6].split()) == expected
    # 2 of its 10 ms, which are half of the dense network's.
    assert lines[7] == "ort-dfs, batch 1: deciding takes 2.00 ms, 10.0% of pytorch-dense"
    assert lines[8:] == ["ort-dfs, batch 1: 0.50 x ort-dfs (slower)"]


def test_a_verdict_in_words() -> None:
    lines = lines_of(RECORD | {"verdicts": [VERDICT]})[-3:]
    assert lines == [
        "ort-dfs takes 0.50 times the time of ort-int8-static (0.40 to 0.60 in single passes), top-1 +1.25 (standard error "
        "0.50): ort-dfs wins",
        "time at equal top-1: nothing else here has the top-1 of ort-dfs",
        "top-1 at equal time: ort-int8-static has -1.25 beside ort-dfs",
    ]
    lines = lines_of(RECORD | {"verdicts": [VERDICT | {"at_equal_top1": "ort-int8-static", "at_equal_time": None}]})
    assert lines[-2:] == [
        "time at equal top-1: ort-int8-static takes 2.00 of the time of ort-dfs",
        "top-1 at equal time: nothing else here takes as little time as ort-dfs",
    ]
    unknown = VERDICT | {"pairings": [PAIRING | {"top1": None, "winner": "other"}]}
    assert lines_of(RECORD | {"verdicts": [unknown]})[-1].endswith("in single passes): ort-int8-static wins")


def test_the_verdict_of_each_batch_names_its_size() -> None:
    lines = lines_of(RECORD | {"verdicts": [VERDICT, VERDICT | {"batch": 8}]})[-6:]
    assert lines[3:] == [f"batch 8: {line}" for line in lines[:3]]


def test_a_busy_machine_is_named() -> None:
    record = RECORD | {"rows": [ROW | {"interrupted": 0.25}]}
    told = "other programs ran: of some candidates 25% of the runs were interrupted"
    assert lines_of(record)[6] == f"{told}, which makes them slower"
    assert lines_of(record | {"threads": 1})[6] == f"{told}; these count with the time that they had a core"


def test_a_graph_that_differs_is_named() -> None:
    line = lines_of(RECORD | {"graph": COMPARED})[3]
    assert line.endswith("same decisions as the network for 95.00% of 40 images: dfs export would refuse it")


def test_other_notes() -> None:
    lines = lines_of(RECORD | {"graph": None, "options": [0, 4, 8]})
    assert "pip install" in lines[3] and "2 to 7 bits" in lines[4]


def test_a_plot_has_a_point_for_each_candidate_with_a_top1() -> None:
    pytest.importorskip("matplotlib")
    figure = plot_times(RECORD | {"verdicts": [VERDICT], "rows": [ROW, DYNAMIC | {"top1": 90.0}, ROW | {"batch": 8}]})
    (axes,) = figure.axes
    points = {tuple(container.lines[0].get_xydata()[0]) for container in axes.containers}  # type: ignore[attr-defined]
    assert points == {(20.0, 88.0), (10.0, 90.0)}
    assert {text.get_text() for text in axes.texts} == {"resnet18", "ort-int8-static"}
    with pytest.raises(ConfigError, match="nothing to draw"):
        plot_times(RECORD)
