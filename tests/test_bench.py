import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeFolder, make_dynamic, tiny_resnet
from typer.testing import CliRunner

from dfs_cli.bench.inference import ObservedGate
from dfs_cli.bench.process import pinned_to
from dfs_cli.bench.tuning import peak_bytes
from dfs_cli.bench.workload import default_mix, draw_policies, force
from dfs_cli.cli.app import app
from dfs_cli.config import DEFAULT_MIX, DynamicConfig, GateKind, parse_mix
from dfs_cli.latency import measure

CPU = torch.device("cpu")


def test_peak_memory_by_hand() -> None:
    def step() -> None:
        first = torch.empty(1 << 20)  # 4 MiB
        second = torch.empty(1 << 20)
        del first
        third = torch.empty(1 << 19)
        del second, third

    peak = peak_bytes(step, CPU)
    assert 8 * 2**20 <= peak <= 8 * 2**20 + 4096


def test_a_tuning_step_is_measured_against_a_dense_one() -> None:
    arguments = [
        "bench",
        "resnet20_cifar",
        "--tuning",
        "--no-pretrained",
        "--batch-size",
        "8",
        "--repeats",
        "2",
        "--json",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert record["options"] == [0, 2, 3, 4, 5, 6, 8] and record["batch_size"] == 8
    seconds = [record[f"{name}_seconds"]["median"] for name in ("tuning", "dense")]
    assert record["time_ratio"] == pytest.approx(seconds[0] / seconds[1])
    assert record["memory_ratio"] == pytest.approx(record["tuning_bytes"] / record["dense_bytes"])
    # The dense step holds at least its weights, their gradients, AdamW's two moments, and the images.
    parameters = 272_474 * 4
    assert record["dense_bytes"] > 4 * parameters


def test_bench_says_what_it_needs() -> None:
    for arguments, message in (
        (["bench", "resnet20_cifar", "--tuning", "--mix", "0:1"], "--mix"),
        (["bench", "resnet20_cifar", "--no-pretrained", "--mix", "0:0.5"], "add up to 1"),
        (["bench", "resnet20_cifar", "--no-pretrained", "--mix", "half"], "bitwidth:share"),
        (["bench", "resnet20_cifar", "--no-pretrained", "--bits", "0,8", "--mix", "4:1"], "none of the options"),
        (["bench", "resnet20_cifar", "--no-pretrained", "--data", "images"], "--data"),
        (["bench", "resnet20_cifar", "--no-pretrained", "--threads", "0"], "threads 0"),
        (["bench", "missing.safetensors"], "does not exist"),
        (["bench", "missing.safetensors", "--img-size", "99"], "--img-size has no meaning for a converted network"),
        (["bench", "missing.safetensors", "--tuning"], "--tuning measures a MODEL"),
        (["bench", "missing.safetensors", "--val-split", "val"], "pass that too"),
        (["bench", "resnet20_cifar", "--no-pretrained", "--device", "cuda"], "--device has no meaning for MODEL"),
        (["bench", "resnet20_cifar", "--tuning", "--val-split", "val"], "--val-split has no meaning for --tuning"),
        (["bench", "resnet20_cifar", "--tuning", "--no-pretrained", "--threads", "0"], "threads 0 is below 1"),
        (["bench", "resnet20_cifar", "--tuning", "--no-pretrained", "--repeats", "0"], "repeats 0 is below 1"),
        (["bench", "resnet20_cifar", "--tuning", "--gate", "rnn", "--mirror"], "--mirror is for"),
        (["bench", "resnet21", "--tuning"], "resnet21"),
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2 and message in result.stderr


def run_bench(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["bench", *arguments, "--threads", "1", "--repeats", "3", "--json"])
    assert result.exit_code == 0, result.stderr
    record: dict[str, Any] = json.loads(result.stdout)
    return record


def test_inference_of_a_model_is_measured_side_by_side() -> None:
    record = run_bench("resnet20_cifar", "--no-pretrained", "--mix", "0:0.5,8:0.5")
    rows = {(row["name"], row["batch"]): row for row in record["rows"]}
    expected = {(name, batch) for name in ("pytorch-dense", "pytorch-dfs") for batch in (1, 64)}
    assert set(rows) == expected | {(name, 1) for name in ("ort-fp32", "ort-int8-static", "ort-dfs")}
    for row in rows.values():
        assert 0 < row["p25_ms"] <= row["p50_ms"] <= row["p75_ms"] <= row["p95_ms"]
        assert row["images_per_second"] == pytest.approx(1000 * row["batch"] / row["p50_ms"])
    own, dense = rows["ort-dfs", 1], rows["ort-fp32", 1]
    assert own["speedup"]["ort-fp32"] == pytest.approx(dense["p50_ms"] / own["p50_ms"])
    assert own["time"] == pytest.approx(own["p50_ms"] / dense["p50_ms"])
    # Of nine blocks, four or five run at 8 bits, a sixteenth of the dense cost.
    assert 0.4 / 16 < own["cost"] == rows["pytorch-dfs", 1]["cost"] < 0.6 / 16
    # In batches every image has blocks of its own.
    assert own["cost"] != rows["pytorch-dfs", 64]["cost"] == pytest.approx(own["cost"], rel=0.2)
    assert 0 < rows["pytorch-dfs", 64]["gate_ms"] < rows["pytorch-dfs", 64]["p50_ms"]
    assert own["peak_bytes"] is None or own["peak_bytes"] >= 0
    # Weights, at least.
    assert rows["pytorch-dense", 1]["peak_bytes"] > 4 * 272_474
    assert record["graph"] == {"features": "bytes"}
    assert record["threads"] == 1 and record["options"] == [0, 8] and "seed 0" in record["decisions"]
    assert rows["ort-int8-static", 1]["file_bytes"] < 0.4 * rows["ort-fp32", 1]["file_bytes"]


def test_a_file_is_measured_with_its_own_decisions(artifact: Path, make_folder: MakeFolder) -> None:
    record = run_bench(str(artifact), "--data", str(make_folder()))
    assert record["decisions"].startswith("real") and record["images"] == 40
    assert {row["name"] for row in record["rows"]} >= {"pytorch-dfs", "ort-dfs"}
    assert record["graph"]["images"] == 40 and record["graph"]["holds"] is True
    renamed = artifact.with_name("network.bin")
    shutil.copy(artifact, renamed)
    forced = run_bench(str(renamed), "--mix", "0:1")
    assert "images" not in forced["graph"]
    own = next(row for row in forced["rows"] if row["name"] == "pytorch-dfs")
    assert own["file_bytes"] == artifact.stat().st_size


def test_a_mix_that_nobody_named_has_the_options() -> None:
    assert default_mix((0, 2, 3, 4, 5, 6, 8)) == DEFAULT_MIX
    assert default_mix((0, 4)) == "0:0.5,4:0.5" and default_mix((0, 8, 32)) == "0:0.5,8:0.5"
    assert default_mix((0, 32)) == "0:0.5,32:0.5" and default_mix((16, 32)) == "16:0.5,32:0.5"
    result = CliRunner().invoke(
        app, ["bench", "resnet20_cifar", "--no-pretrained", "--bits", "0,4", "--threads", "1", "--repeats", "1"]
    )
    assert result.exit_code == 0, result.stderr
    assert "0:0.5,4:0.5" in result.stdout and "2 to 7 bits take as long as 8" in result.stdout
    assert "not compared" in result.stdout


def test_all_threads_keep_to_the_cores() -> None:
    ready, done = threading.Event(), threading.Event()
    seen: list[set[int]] = []

    def wait() -> None:
        ready.wait()
        seen.append(os.sched_getaffinity(0))
        done.wait()
        seen.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=wait)
    thread.start()
    before = os.sched_getaffinity(0)
    try:
        with pinned_to(1) as cores:
            ready.set()
            while not seen:
                time.sleep(0.001)
    finally:
        ready.set()
        done.set()
        thread.join()
    assert cores == 1 and len(seen[0]) == 1 and seen[1] == before == os.sched_getaffinity(0)


def test_without_onnxruntime_its_rows_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "has_onnx", lambda: False)
    arguments = ["bench", "resnet20_cifar", "--no-pretrained", "--threads", "1", "--repeats", "1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    assert "left out" in result.stdout and "ort-dfs" not in result.stdout and "pytorch-dfs" in result.stdout


def test_shares_of_blocks_by_hand() -> None:
    mix = parse_mix("0:0.5,4:0.25,8:0.25")
    policies = draw_policies(mix, (0, 4, 8), 10, seed=3, images=6)
    for policy in policies.tolist():
        assert policy.count(0) == 5 and {policy.count(1), policy.count(2)} == {2, 3}
    assert len(policies.unique(dim=0)) > 3
    assert torch.equal(policies, draw_policies(mix, (0, 4, 8), 10, seed=3, images=6))
    assert torch.equal(policies[:1], draw_policies(mix, (0, 4, 8), 10, seed=3))
    assert not torch.equal(policies, draw_policies(mix, (0, 4, 8), 10, seed=4, images=6))


@pytest.mark.parametrize("gate", ["rnn", "ff", "probe"])
def test_forced_decisions_are_what_the_network_decides(gate: GateKind) -> None:
    network = make_dynamic(tiny_resnet(), DynamicConfig(bits=(0, 4, 8), gate=gate))
    decisions = force(network, torch.tensor([0, 2, 1, 1, 0])).run(torch.randn(3, 3, 32, 32)).decisions
    assert decisions[:, :5].tolist() == [[0, 2, 1, 1, 0]] * 3
    assert (decisions[:, 5:] == -1).all()


def test_an_observed_gate_does_its_work_and_decides_as_it_is_told() -> None:
    network = make_dynamic(tiny_resnet(), DynamicConfig(bits=(0, 4, 8), gate="rnn"))
    images, own = torch.randn(3, 3, 32, 32), network.gate
    expected = network.run(images)
    network.gate = ObservedGate(own, None)  # type: ignore[assignment]
    assert torch.equal(network.run(images).logits, expected.logits)
    network.gate = ObservedGate(own, torch.tensor([[0, 2, 1, 1, 0], [1, 1, 1, 2, 0], [2, 0, 0, 0, 1]]))  # type: ignore[assignment]
    assert network.run(images).decisions.tolist() == network.gate.policies.tolist()  # type: ignore[union-attr]
    assert network.gate.seconds > 0  # type: ignore[operator]
