"""``dfs export``."""

import json
from pathlib import Path

import onnx
import pytest
from common_export import subgraphs
from onnx import TensorProto
from typer.testing import CliRunner

from dfs_cli.cli.app import app
from dfs_cli.export import runtime

pytestmark = pytest.mark.medium


def test_export_command(artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    result = CliRunner().invoke(app, ["export", str(artifact), "--onnx", str(out), "--num-samples", "200", "--json"])
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert record["images"] == 200 and record["labelled"] and record["same_decisions"] >= 0.995
    assert record["bytes"] == out.stat().st_size


def test_a_file_that_exists_is_kept_without_force(artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    out.write_text("mine")
    result = CliRunner().invoke(app, ["export", str(artifact), "--onnx", str(out)])
    assert result.exit_code == 2 and "--force" in result.stderr
    assert out.read_text() == "mine"


@pytest.mark.parametrize("option", ["--static", "--tensorrt"])
def test_a_plain_graph(artifact: Path, tmp_path: Path, option: str) -> None:
    out = tmp_path / "out.onnx"
    result = CliRunner().invoke(
        app, ["export", str(artifact), "--onnx", str(out), "--num-samples", "50", option, "--json"]
    )
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert record["static"] and record["tensorrt"] == (option == "--tensorrt")
    graph = onnx.load(out).graph
    assert not list(subgraphs(graph))
    has_unsigned = TensorProto.UINT8 in {tensor.data_type for tensor in graph.initializer}
    assert has_unsigned == (option == "--static")


@pytest.mark.parametrize("batch", ["16", "dynamic"])
def test_a_graph_for_batches(artifact: Path, tmp_path: Path, batch: str) -> None:
    arguments = [
        "export",
        str(artifact),
        "--onnx",
        str(tmp_path / "out.onnx"),
        "--num-samples",
        "100",
        "--batch",
        batch,
    ]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert str(record["batch"]) == batch and record["images"] == 100 and record["same_decisions"] >= 0.995
    said = CliRunner().invoke(app, [*arguments, "--force"]).stdout
    assert f"takes {batch if batch == '16' else 'any number of'} images at once" in said


@pytest.mark.parametrize("batch", ["0", "many"])
def test_a_batch_that_is_none_is_refused(artifact: Path, tmp_path: Path, batch: str) -> None:
    result = CliRunner().invoke(app, ["export", str(artifact), "--onnx", str(tmp_path / "out.onnx"), "--batch", batch])
    assert result.exit_code == 2 and len(result.stderr.strip().splitlines()) == 1
    assert f"--batch {batch!r}: expected 1 to 65536, or dynamic" in result.stderr


def test_without_the_packages_it_says_what_to_install(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["export", str(artifact), "--onnx", str(tmp_path / "out.onnx")])
    assert result.exit_code == 2 and "pip install 'dfs-cli[onnx]'" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
