import itertools
import time
from dataclasses import replace

import pytest
import torch
from common import SIZE, make_dynamic, tiny_resnet

from dfs_cli.bench import candidates
from dfs_cli.bench.candidates import Candidate, ObservedNetwork, list_candidates
from dfs_cli.bench.inference import Run, bench_inference, by_pass, make_rows
from dfs_cli.bench.workload import Workload, workload_of_model
from dfs_cli.config import DynamicConfig, GateKind
from dfs_cli.errors import ConfigError

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


def workload(targets: torch.Tensor | None = None, images: int = 4) -> Workload:
    made = workload_of_model(tiny_resnet(), DynamicConfig(bits=(0, 8), gate="rnn"), SIZE)
    return replace(made, images=made.images[:images], targets=targets, is_original=targets is not None)


def candidate(name: str, batch: int, of: Workload, in_pytorch: bool = True) -> Candidate:
    return Candidate(name, batch, lambda: lambda images: images, 100, 0.5, of, in_pytorch=in_pytorch)


def runs(seconds: list[float], answers: list[int], deciding: float = 0.0) -> list[Run]:
    return [Run(s, deciding, (a,)) for s, a in zip(seconds, answers, strict=True)]


def test_rows_by_hand() -> None:
    of = workload(torch.tensor([0, 1, 2, 3]))
    names = ("pytorch-dense", 1), ("pytorch-dfs", 1), ("ort-fp32", 1), ("ort-dfs", 1), ("pytorch-dfs", 64)
    answers = [0, 1, 2, 0]
    # The images take 0.1, 0.1, 0.1 and 0.5 s; in the second of three passes another program slowed down the first one.
    own = [runs([0.1, 0.1, 0.1, 0.5], answers, 0.02) for _ in range(3)]
    own[1][0] = own[1][0]._replace(seconds=0.7, interrupted=True)
    others = [[runs([s] * 4, [0, 1, 2, 3])] for s in (0.4, 0.05, 0.02)]
    passes = [others[0], own, *others[1:], [runs([3.2], [0])]]
    rows = make_rows(
        [candidate(*name, of) for name in names[:4]] + [candidate("pytorch-dfs", 64, of)], passes, [5, 6, None, 7, 8]
    )
    assert [(row.name, row.batch) for row in rows] == list(names)
    assert [row.peak_bytes for row in rows] == [5, 6, None, 7, 8]
    dense, dynamic, fp32, fast, large = rows
    assert dynamic.mean_ms == pytest.approx(200) and dynamic.p50_ms == pytest.approx(100)
    assert dynamic.p95_ms == pytest.approx(100 + 0.85 * 400) and dynamic.p99_ms == pytest.approx(100 + 0.97 * 400)
    assert (dynamic.low_ms, dynamic.high_ms) == pytest.approx((200, 350))
    assert dynamic.runs == 12 and dynamic.interrupted == pytest.approx(1 / 12)
    assert dynamic.top1 == 75 and dense.top1 == fp32.top1 == 100
    assert dynamic.controller_ms == pytest.approx(20) and dense.controller_ms is None
    assert dynamic.images_per_second == pytest.approx(5) and large.images_per_second == pytest.approx(20)
    assert dynamic.speedup == pytest.approx({"pytorch-dense": 2, "ort-fp32": 0.25, "ort-dfs": 0.1})
    assert fast.speedup["pytorch-dense"] == pytest.approx(20)
    # Each against the dense network in its own runtime.
    assert [row.time for row in rows] == pytest.approx([1, 0.5, 1, 0.4, 1])
    assert fp32.file_bytes == 100 and fp32.cost == 0.5 and large.speedup == {}


def test_without_meaningful_weights_there_is_no_top1() -> None:
    of = workload(torch.tensor([0, 1, 2, 3]))
    found = candidate("ort-fp32", 1, of)._replace(has_answers=False)
    (row,) = make_rows([found], [[runs([0.1] * 4, [0, 1, 2, 3])]], [None])
    assert row.top1 is None
    (row,) = make_rows([candidate("ort-fp32", 1, workload())], [[runs([0.1] * 4, [0, 1, 2, 3])]], [None])
    assert row.top1 is None


def test_turns_are_divided_into_passes() -> None:
    turns = [runs([float(i)], [i]) for i in range(6)]
    assert [[run.answers for run in one] for one in by_pass(turns, blocks=3)] == [
        [(0,), (1,), (2,)], [(3,), (4,), (5,)],
    ]  # fmt: skip


def test_all_ways_to_run_a_model_are_compared() -> None:
    pytest.importorskip("onnxruntime")
    workload = workload_of_model(tiny_resnet(), DynamicConfig(bits=(0, 8), gate="rnn"), SIZE)
    bench = bench_inference(workload, threads=1, repeats=2, batch_sizes=(1, 16))
    rows = {(row.name, row.batch): row for row in bench.rows}
    in_pytorch = [(name, batch) for name in ("pytorch-dense", "pytorch-dfs") for batch in (1, 64)]
    names = ("ort-fp32", "ort-int8-static", "ort-dfs")
    assert list(rows) == in_pytorch + [(name, batch) for batch in (1, 16) for name in names]
    assert {key: row.runs for key, row in rows.items()} == {key: 128 // key[1] for key in rows}
    assert rows["ort-dfs", 1].cost == rows["pytorch-dfs", 1].cost == workload.cost
    assert rows["pytorch-dfs", 64].cost == workload.batch_cost != workload.cost
    assert rows["ort-int8-static", 1].cost == 1 / 16
    assert {name for name, _ in rows if rows[name, 1].controller_ms is not None} == {"pytorch-dfs"}
    assert bench.graph == {"features": "int8"} and bench.options == (0, 8) and bench.image_size == SIZE
    assert [verdict.batch for verdict in bench.verdicts] == [1, 16]
    for verdict in bench.verdicts:
        assert verdict.at_equal_top1 is None  # random images have no classes
        assert [pairing.name for pairing in verdict.pairings] == ["ort-int8-static", "ort-fp32"]
        own, int8 = rows["ort-dfs", verdict.batch], rows["ort-int8-static", verdict.batch]
        assert verdict.pairings[0].time == pytest.approx(own.mean_ms / int8.mean_ms)
        assert own.images_per_second == pytest.approx(1000 * verdict.batch / own.mean_ms)
    assert "onnxruntime" in bench.machine and bench.machine["processor"]


@pytest.mark.parametrize("size", [0, 3, 128])
def test_batches_fill_blocks_of_images(size: int) -> None:
    with pytest.raises(ConfigError, match=f"--batch-sizes {size}: expected divisors of 64"):
        bench_inference(workload(), threads=1, batch_sizes=(1, size))


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
    logits = step(workload.images[:1])
    assert torch.allclose(logits, workload.network(workload.images[:1]), atol=1e-5)
