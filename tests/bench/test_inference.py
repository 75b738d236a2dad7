import itertools
import time
from typing import cast

import pytest
import torch
from common import SIZE, make_dynamic, tiny_resnet

from dfs_cli.bench import candidates
from dfs_cli.bench.candidates import Candidate, ObservedNetwork, list_candidates
from dfs_cli.bench.inference import Run, bench_inference, make_rows
from dfs_cli.bench.workload import workload_of_model
from dfs_cli.config import DynamicConfig, GateKind

pytestmark = pytest.mark.medium


@pytest.mark.parametrize("gate", ["rnn", "probe", "static"])
def test_an_observed_network_does_the_same(gate: GateKind) -> None:
    network = make_dynamic(tiny_resnet(), DynamicConfig(bits=(0, 4, 8), gate=gate))
    images = torch.randn(3, *SIZE)
    expected, found = network.run(images), ObservedNetwork(network).eval().run(images)
    assert torch.equal(found.logits, expected.logits)
    assert bool(found.decisions.equal(expected.decisions).all())


def test_deciding_is_timed_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    network = ObservedNetwork(make_dynamic(tiny_resnet(), DynamicConfig(bits=(0, 4, 8), gate="rnn"))).eval()
    ticks = itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: float(next(ticks)))
        network.run(torch.randn(1, *SIZE))
    # With a clock that ticks whenever it is read: one tick for each of five blocks, one before and one after the pass.
    assert network.deciding_seconds == 7


def candidate(name: str, batch: int, cost: float = 1.0) -> Candidate:
    return Candidate(name, batch, lambda: lambda images: images, size=100, cost=cost)


def test_rows_by_hand() -> None:
    names = ("pytorch-dense", 1), ("pytorch-dfs", 1), ("ort-fp32", 1), ("ort-dfs", 1), ("pytorch-dfs", 64)
    seconds = [0.4], [0.1, 0.3, 0.2], [0.05], [0.02], [3.2]
    runs = [[Run(s, 0.0) for s in values] for values in seconds]
    runs[1] = [Run(s, d) for s, d in zip(seconds[1], (0.01, 0.0, 0.02), strict=True)]
    peaks = [5, 6, None, 7, 8]
    rows = make_rows([candidate(*name, cost=0.5) for name in names], runs, peaks)
    assert [(row.name, row.batch) for row in rows] == list(names)
    assert [row.peak_bytes for row in rows] == peaks
    dense, dynamic, fp32, own, large = rows
    assert (dynamic.p25_ms, dynamic.p50_ms, dynamic.p75_ms) == pytest.approx((150, 200, 250))
    assert dynamic.p95_ms == pytest.approx(290) and dynamic.runs == 3
    assert dynamic.controller_ms == pytest.approx(10) and dense.controller_ms is None
    assert dynamic.images_per_second == pytest.approx(5) and large.images_per_second == pytest.approx(20)
    assert dynamic.speedup == pytest.approx({"pytorch-dense": 2, "ort-fp32": 0.25, "ort-dfs": 0.1})
    assert own.speedup["pytorch-dense"] == pytest.approx(20)
    # Each against the dense network in its own runtime.
    assert [row.time for row in rows] == pytest.approx([1, 0.5, 1, 0.4, 1])
    assert fp32.file_bytes == 100 and fp32.cost == 0.5 and large.speedup == {}


def test_all_ways_to_run_a_model_are_compared() -> None:
    pytest.importorskip("onnxruntime")
    workload = workload_of_model(tiny_resnet(), DynamicConfig(bits=(0, 8), gate="rnn"), SIZE)
    bench = bench_inference(workload, threads=1, repeats=5)
    rows = {(row.name, row.batch): row for row in bench.rows}
    in_pytorch = [(name, batch) for name in ("pytorch-dense", "pytorch-dfs") for batch in (1, 64)]
    assert list(rows) == in_pytorch + [(name, 1) for name in ("ort-fp32", "ort-int8-static", "ort-dfs")]
    assert {key: row.runs for key, row in rows.items()} == {key: 5 if key[1] == 1 else 2 for key in rows}
    assert rows["ort-dfs", 1].cost == rows["pytorch-dfs", 1].cost == workload.cost
    assert rows["pytorch-dfs", 64].cost == workload.batch_cost != workload.cost
    assert rows["ort-int8-static", 1].cost == 1 / 16
    assert {name for name, _ in rows if rows[name, 1].controller_ms is not None} == {"pytorch-dfs"}
    assert bench.graph == {"features": "int8"} and bench.options == (0, 8) and bench.image_size == SIZE


def test_memory_of_the_dense_network_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "has_onnx", lambda: False)
    model = tiny_resnet()
    workload = workload_of_model(model, DynamicConfig(bits=(0, 8), gate="rnn"), SIZE)
    bench = bench_inference(workload, threads=1, repeats=1)
    dense, large = (row for row in bench.rows if row.name == "pytorch-dense")
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    assert dense.file_bytes == large.file_bytes == weights
    # The widest features: 16 channels of 16 x 16 pixels behind the stem, input and output of a layer, at least.
    features = 2 * 16 * 16 * 16 * 4
    for row in (dense, large):
        assert row.peak_bytes is not None
        assert weights + row.batch * features <= row.peak_bytes <= weights + row.batch * 8 * features


def test_without_onnxruntime_pytorch_alone_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "has_onnx", lambda: False)
    workload = workload_of_model(tiny_resnet(), DynamicConfig(bits=(0, 8), gate="rnn"), SIZE)
    found, graph = list_candidates(workload, threads=1)
    assert graph is None and {candidate.name for candidate in found} == {"pytorch-dense", "pytorch-dfs"}
    step = found[2].build()
    logits = cast(torch.Tensor, step(workload.images[:1]))
    assert torch.allclose(logits, workload.network(workload.images[:1]), atol=1e-5)
