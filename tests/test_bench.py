import json

import pytest
import torch
from typer.testing import CliRunner

from dfs_cli.bench import _peak_bytes
from dfs_cli.cli.app import app

CPU = torch.device("cpu")


def test_peak_memory_by_hand() -> None:
    def step() -> None:
        first = torch.empty(1 << 20)  # 4 MiB
        second = torch.empty(1 << 20)
        del first
        third = torch.empty(1 << 19)
        del second, third

    peak = _peak_bytes(step, CPU)
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
        (["bench", "resnet20_cifar"], "--tuning"),
        (["bench", "resnet20_cifar", "--tuning", "--no-pretrained", "--repeats", "0"], "repeats 0 is below 1"),
        (["bench", "resnet20_cifar", "--tuning", "--gate", "rnn", "--mirror"], "--mirror is for"),
        (["bench", "resnet21", "--tuning"], "resnet21"),
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2 and message in result.stderr
