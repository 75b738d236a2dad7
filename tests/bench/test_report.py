from typing import Any

from rich.console import Console

from dfs_cli.report.bench import print_inference

ROW: dict[str, Any] = {
    "name": "pytorch-dense", "batch": 1, "runs": 4, "p50_ms": 20.0, "p25_ms": 19.0, "p75_ms": 21.5, "p95_ms": 30.0,
    "images_per_second": 50.0, "peak_bytes": None, "file_bytes": 3 * 2**20, "cost": 1.0, "time": 1.0, "controller_ms": None,
    "speedup": {"ort-dfs": 0.5},
}  # fmt: skip
DYNAMIC = ROW | {
    "name": "pytorch-dfs",
    "cost": 0.03,
    "peak_bytes": 2**21,
    "time": 0.5,
    "controller_ms": 2.0,
    "p50_ms": 10.0,
}
RECORD: dict[str, Any] = {
    "model": "resnet18", "rows": [ROW, DYNAMIC], "threads": 2, "cores": 0, "repeats": 4, "options": [0, 8], "gate": "rnn",
    "image_size": [3, 64, 32], "images": 64, "decisions": "real, on validation images", "graph": {"features": "int8"},
}  # fmt: skip
COMPARED = {"features": "float", "images": 40, "same_decisions": 0.95, "holds": False}


def lines_of(record: dict[str, Any]) -> list[str]:
    console = Console(width=40)
    with console.capture() as captured:
        print_inference(console, record)
    return captured.get().splitlines()


def test_a_record_of_inference_in_words() -> None:
    lines = lines_of(RECORD)
    assert lines[:2] == [
        "resnet18, 3x64x32, options 0,8, gate rnn, 2 threads, in turns",
        "decisions: real, on validation images",
    ]
    assert lines[2].startswith("ort-dfs: features between blocks are int8; not compared")
    assert " ".join(lines[4].split()) == "pytorch-dense 1 4 20.00 19.00 - 21.50 30.00 50.0 - 3.00 1.0000 1.00"
    assert " ".join(lines[5].split()) == "pytorch-dfs 1 4 10.00 19.00 - 21.50 30.00 50.0 2.0 3.00 0.0300 0.50"
    # 2 of its 10 ms, which are half of the dense network's.
    assert lines[6] == "pytorch-dfs, batch 1: deciding takes 2.00 ms, 10.0% of pytorch-dense"
    assert lines[7:] == ["pytorch-dfs, batch 1: 0.50 x ort-dfs (slower)"]


def test_a_graph_that_differs_is_named() -> None:
    line = lines_of(RECORD | {"graph": COMPARED, "cores": 2})[2]
    assert line.endswith("same decisions as the network for 95.00% of 40 images: dfs export would refuse it")


def test_other_notes() -> None:
    lines = lines_of(RECORD | {"graph": None, "cores": 2, "options": [0, 4, 8]})
    assert "2 threads on 2 cores" in lines[0] and "pip install" in lines[2] and "2 to 7 bits" in lines[3]
