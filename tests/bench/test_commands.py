import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from common import MakeFolder
from typer.testing import CliRunner

from dfs_cli.bench import candidates
from dfs_cli.cli.app import app

pytestmark = pytest.mark.medium

FILE, MODEL = ["bench", "missing.safetensors"], ["bench", "resnet20_cifar", "--no-pretrained"]
TUNING = ["bench-tuning", "resnet20_cifar", "--no-pretrained"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*MODEL, "--mix", "0:0.5"], "add up to 1"),
        ([*MODEL, "--mix", "half"], "bitwidth:share"),
        ([*MODEL, "--bits", "0,8", "--mix", "4:1"], "none of the options"),
        ([*MODEL, "--data", "images"], "--data has no meaning for MODEL"),
        ([*MODEL, "--val-split", "val"], "--val-split has no meaning for MODEL"),
        ([*MODEL, "--threads", "0"], "threads 0: expected 1 to"),
        ([*MODEL, "--repeats", "0"], "repeats 0: expected 1 to"),
        (FILE, "does not exist"),
        ([*FILE, "--img-size", "99"], "--img-size has no meaning for a converted network"),
        ([*FILE, "--no-pretrained"], "--pretrained has no meaning for a converted network"),
        ([*FILE, "--checkpoint", "a.pth"], "--checkpoint is for real images: pass --data DIR, too"),
        ([*FILE, "--against", "b.safetensors"], "--against is for real images"),
        ([*FILE, "--plot", "a.png"], "--plot is for real images"),
        ([*MODEL, "--against", "b.safetensors"], "--against has no meaning for MODEL"),
        ([*FILE, "--gate", "rnn"], "--gate has no meaning for a converted network"),
        ([*FILE, "--val-split", "val"], "--val-split is for real images"),
        ([*TUNING, "--threads", "0"], "threads 0: expected 1 to"),
        ([*TUNING, "--repeats", "0"], "repeats 0: expected 1 to"),
        ([*TUNING, "--gate", "rnn", "--mirror"], "--mirror is for"),
        ([*TUNING, "--budget", "2"], "budget 2"),
        (["bench-tuning", "resnet21"], "resnet21"),
        (["bench-tuning", "missing.safetensors"], "missing.safetensors"),
    ],
)
def test_mistakes_end_in_one_line(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("option", ["--device", "--batch-size", "--budget", "--tuning"])
def test_inference_has_no_options_of_tuning(option: str) -> None:
    assert "No such option" in CliRunner().invoke(app, [*MODEL, option, "1"]).stderr


def test_tuning_has_no_options_of_inference() -> None:
    for option in ("--mix", "--data", "--val-split"):
        assert "No such option" in CliRunner().invoke(app, [*TUNING, option, "1"]).stderr


def run_bench(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["bench", *arguments, "--threads", "1", "--repeats", "1", "--json"])
    assert result.exit_code == 0, result.stderr
    record: dict[str, Any] = json.loads(result.stdout)
    return record


def test_a_file_is_measured_with_its_own_decisions(artifact: Path, make_folder: MakeFolder) -> None:
    record = run_bench(str(artifact), "--data", str(make_folder()))
    assert record["decisions"] == "real, on validation images" and record["images"] == 40
    assert {row["name"] for row in record["rows"]} >= {"pytorch-dfs", "ort-dfs"}
    assert record["graph"]["images"] == 40 and record["graph"]["holds"] is True


def test_a_file_is_compared_with_others_on_the_same_images(
    artifact: Path, make_folder: MakeFolder, tmp_path: Path
) -> None:
    plot, data = tmp_path / "time.png", str(make_folder())
    twin = shutil.copy(artifact, tmp_path / "twin.safetensors")
    record = run_bench(str(artifact), "--data", data, "--against", str(twin), "--plot", str(plot), "--batch-sizes", "4")
    rows = {(row["name"], row["batch"]): row for row in record["rows"]}
    wanted = {"name", "batch", "mean_ms", "p50_ms", "p95_ms", "p99_ms", "images_per_second", "cost", "top1"}
    assert all(wanted <= row.keys() for row in record["rows"])
    own, other, dense = (rows[name, 1] for name in ("ort-dfs", "twin", "ort-fp32"))
    assert own["top1"] == other["top1"] == rows["pytorch-dfs", 64]["top1"] and own["cost"] == other["cost"]
    assert dense["top1"] == rows["pytorch-dense", 1]["top1"] > 90 and rows["ort-int8-static", 1]["top1"] > 90
    assert own["p50_ms"] <= own["p95_ms"] <= own["p99_ms"]
    assert own["images_per_second"] == pytest.approx(1000 / own["mean_ms"])
    pairings = {pairing["name"]: pairing for pairing in record["verdicts"][0]["pairings"]}
    assert list(pairings) == ["ort-int8-static", "ort-fp32", "twin"] and pairings["twin"]["top1"] == 0
    assert [(verdict["name"], verdict["batch"]) for verdict in record["verdicts"]] == [("ort-dfs", 1), ("ort-dfs", 4)]
    for name in ("ort-dfs", "twin", "ort-fp32", "ort-int8-static"):  # batches give the answers of single images
        one, four = rows[name, 1], rows[name, 4]
        assert (one["runs"], four["runs"]) == (40, 10) and one["top1"] == four["top1"]
        assert four["images_per_second"] == pytest.approx(4000 / four["mean_ms"])
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_file_without_images_is_measured_with_a_mix(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "has_onnx", lambda: False)
    renamed = artifact.with_name("network.bin")
    shutil.copy(artifact, renamed)
    record = run_bench(str(renamed), "--mix", "0:1")
    assert record["graph"] is None and record["decisions"].startswith("0:1 of the blocks")
    own = next(row for row in record["rows"] if row["name"] == "pytorch-dfs")
    assert own["file_bytes"] == artifact.stat().st_size


@pytest.mark.slow
def test_the_options_of_a_model_follow_the_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "has_onnx", lambda: False)
    assert run_bench(*MODEL[1:], "--mix", "0:0.25,4:0.25,16:0.5")["options"] == [0, 4, 16]
    assert run_bench(*MODEL[1:], "--mix", "4:1")["options"] == [0, 4]
    record = run_bench(*MODEL[1:])
    assert record["model"] == "resnet20_cifar" and record["gate"] == "rnn" and record["options"] == [0, 8]
    # Of nine blocks, four or five run at 8 bits, a sixteenth of the dense cost.
    alone, batch = (row["cost"] for row in record["rows"] if row["name"] == "pytorch-dfs")
    assert 0.4 / 16 < alone < 0.6 / 16 and alone != batch == pytest.approx(alone, rel=0.2)


def test_inference_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "has_onnx", lambda: False)
    result = CliRunner().invoke(app, [*MODEL, "--bits", "0,4", "--threads", "1", "--repeats", "1"])
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("resnet20_cifar, 3x32x32, options 0,4, gate rnn, 1 threads")
    assert lines[2] == "decisions: 0:0.5,4:0.5 of the blocks, drawn by seed 0, in batches anew for each image"
    assert "left out" in lines[3] and "2 to 7 bits take as long as 8" in lines[4]
    assert [line.split()[:2] for line in lines[6:10]] == [
        [name, batch] for name in ("pytorch-dense", "pytorch-dfs") for batch in ("1", "64")
    ]
    assert "ort-dfs" not in result.stdout


def test_tuning_is_told_as_json_and_in_words() -> None:
    arguments = [*TUNING, "--batch-size", "4", "--repeats", "1", "--threads", "1"]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert record["model"] == "resnet20_cifar" and record["options"] == [0, 2, 3, 4, 5, 6, 8]
    assert record["batch_size"] == 4 and record["gate"] == "probe" and record["threads"] == 1
    text = CliRunner().invoke(app, arguments).stdout.splitlines()
    assert text[0].startswith("resnet20_cifar, batches of 4 images of 3x32x32, options 0,2,3,4,5,6,8, gate probe, cpu")
    assert [line[:11].strip() for line in text[1:]] == ["fine-tuning", "dfs tuning", "ratio"]
