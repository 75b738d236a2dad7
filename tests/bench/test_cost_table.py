import json
from pathlib import Path

import pytest
from common import SIZE, tiny_resnet
from typer.testing import CliRunner

from dfs_cli.bench.cost_table import SMALLER, measure_costs
from dfs_cli.cli.app import app
from dfs_cli.config import DynamicConfig
from dfs_cli.cost.device import read_costs
from dfs_cli.surgery.plan import plan_costs

pytestmark = pytest.mark.medium
pytest.importorskip("onnxruntime")

BENCH = ["bench", "resnet20_digits", "--cost-table"]


@pytest.mark.slow
def test_the_parts_of_a_network_are_measured() -> None:
    model, dynamic = tiny_resnet(), DynamicConfig(bits=(4, 8), gate="probe")
    costs = measure_costs(model, dynamic, SIZE, ("static", "probe"))
    assert costs.measured and costs.unit == "ms" and costs.options == (0, 4, 8) and "onnxruntime" in costs.machine
    assert costs.machine["threads"] == "1"
    # Skipping costs nothing, and the whole is more than what always runs.
    rows = list(costs.blocks.values())
    assert all(row[0] == 0 for row in rows)
    assert 0 < costs.fixed < costs.dense and costs.static_int8 is not None and costs.static_int8 > 0
    assert list(costs.deciding) == ["probe"] and len(costs.deciding["probe"]) == 2
    assert costs.error is not None and costs.error < 1
    assert costs.scales == SMALLER and all(view.fixed > 0 for view in costs.smaller)
    # They fit the network that a conversion makes.
    for gate in ("probe", "static"):
        options = costs.useful((0, 4, 8))
        table = plan_costs(model, DynamicConfig(bits=options, gate=gate), SIZE).on_device(costs, gate)
        assert 0 < table.cheapest < table.dearest


def test_a_cost_table_is_written_and_a_conversion_keeps_to_it(tmp_path: Path) -> None:
    path, model = tmp_path / "costs.json", tmp_path / "model.safetensors"
    result = CliRunner().invoke(app, [*BENCH, str(path), "--bits", "0,8", "--gate", "rnn", "--json"])
    assert result.exit_code == 0, result.stderr
    costs = read_costs(path)
    assert json.loads(result.stdout) == costs.to_dict() and list(costs.deciding) == ["rnn"]
    assert costs.model == "resnet20_digits" and len(costs.blocks) == 9
    convert = ["convert", "resnet20_digits", "--budget", "1", "--bits", "0,8", "--steps", "1", "-o", str(model)]
    result = CliRunner().invoke(app, [*convert, "--gate", "static", "--objective", str(path), "--json"])
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["device"]["measured"] and report["cost_all_8_bit"] == costs.static_int8 / costs.dense  # type: ignore[operator]
    result = CliRunner().invoke(app, [*convert, "--dry-run", "--gate", "static", "--objective", str(path), "--json"])
    assert json.loads(result.stdout)["fixed_layers_cost"] == pytest.approx(costs.fixed / costs.dense)
    result = CliRunner().invoke(app, [*convert, "--force", "--gate", "probe", "--objective", str(path)])
    assert result.exit_code == 2 and "nothing about --gate probe" in result.stderr


@pytest.mark.slow
def test_costs_are_told_in_words(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [*BENCH, str(tmp_path / "costs.json"), "--bits", "0,8", "--gate", "ff"])
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("resnet20_digits, 1x8x8, in ms: dense float32") and "static int8" in lines[0]
    assert lines[3].split()[:2] == ["layer1.0", "0.0000"] and lines[12].startswith("always")
    assert lines[13].startswith("deciding by ff") and "differ from measured ones by" in lines[14]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "a.safetensors", "--cost-table", "c.json"], "--cost-table has no meaning for a converted network"),
        (["convert", "resnet20_digits", "-b", "0.5", "--objective", "energy"], "expected macs, latency, or a file"),
        (
            ["convert", "resnet20_digits", "-b", "0.5", "--objective", "latency", "--dry-run"],
            "--dry-run measures nothing",
        ),
        (["convert", "resnet20_digits", "-b", "0.5", "--threads", "0"], "threads 0"),
    ],
)
def test_mistakes_end_in_one_line(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1
