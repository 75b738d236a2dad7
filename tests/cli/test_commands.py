import csv
import hashlib
import io
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from common import MakeFolder
from typer.testing import CliRunner, Result

import dfs_cli
from dfs_cli.artifact.artifact import read_manifest
from dfs_cli.cli.app import app
from dfs_cli.report.cost import layer_rows

pytestmark = pytest.mark.medium

SHORT = ["--steps", "20", "--workers", "0", "--device", "cpu"]


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])


def refused(result: Result, reason: str, code: int = 2) -> None:
    """One line on stderr, nothing on stdout, no traceback."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert reason in lines[0]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def written() -> list[str]:
    return sorted(p.name for p in Path().iterdir() if p.is_file())


def test_version_and_module() -> None:
    assert run("--version").stdout.strip() == f"dfs {dfs_cli.__version__}"
    found = subprocess.run(
        [sys.executable, "-m", "dfs_cli", "--version"], capture_output=True, text=True, check=True, timeout=60
    )
    assert found.stdout.strip() == f"dfs {dfs_cli.__version__}"


def test_convert_eval_profile() -> None:
    result = run("convert", "resnet20_digits", "--budget", "0.3", "--spend", *SHORT)
    assert result.exit_code == 0, result.output
    assert written() == ["model.report.json", "model.report.md", "model.safetensors"]
    for word in (
        "budget",
        "options",
        "tuning",
        "step 20/20",
        "more seconds on this machine",
        "wrote model.safetensors",
    ):
        assert word in result.stderr
    for word in ("top-1", "0.0625", "which was to be spent"):
        assert word in result.stdout
    report = json.loads(Path("model.report.json").read_text())
    assert 0.27 <= report["cost"] <= 0.303 and report["top1_after"] >= 97
    digest = hashlib.sha256(Path("model.safetensors").read_bytes()).hexdigest()
    assert report["file_sha256"] == digest and digest in Path("model.report.md").read_text()
    assert "everything at 8 bits" in Path("model.report.md").read_text()

    shown = run("eval", "model.safetensors", "--workers", "0")
    assert shown.exit_code == 0 and "top-1" in shown.stdout and "budget 0.3" in shown.stdout
    result = run("eval", "model.safetensors", "--json", "--workers", "0", "--results-file", "r.csv")
    record = json.loads(result.stdout)
    keys = "model images top1 top5 cost cost_p50 cost_p95 cost_max budget gmacs_dense gmacs_bitweighted param_count"
    assert set(record) >= {*keys.split(), "img_size", "crop_pct", "images_per_second", "option_shares"}
    assert record["images"] == 450 and record["budget"] == 0.3 and record["img_size"] == 8
    assert record["cost"] == pytest.approx(report["cost"]) and record["top1"] == pytest.approx(
        report["top1_after"], abs=1e-3
    )
    (row,) = csv.DictReader(io.StringIO(Path("r.csv").read_text()))
    assert float(row["top1"]) == record["top1"] and row["model"] == "resnet20_digits"
    quick = run("eval", "model.safetensors", "--amp", "--channels-last", "--json", "--workers", "0")
    assert abs(json.loads(quick.stdout)["top1"] - record["top1"]) < 1
    refused(run("eval", "model.safetensors", "--results-file", "r.csv"), "--force")
    assert run("eval", "model.safetensors", "--results-file", "r.csv", "--force").exit_code == 0

    again = run("profile", "--measure", "--json", "--workers", "0")
    stored = run("profile", "--json")
    assert json.loads(again.stdout) == json.loads(stored.stdout)
    refused(run("convert", "resnet20_digits", "--budget", "0.3", *SHORT), "--force")


def test_profile_shows_a_row_per_layer(artifact: Path) -> None:
    converted = dfs_cli.load(artifact)
    evaluation = converted.manifest.validation
    assert evaluation is not None
    rows = layer_rows(converted.manifest.table, evaluation)
    shown = run("profile", artifact).stdout
    for row in rows:
        assert any(line.startswith(row["name"] + " ") for line in shown.splitlines())
    assert "0=skipped" in shown and "w=32" in shown
    table = list(csv.DictReader(io.StringIO(run("profile", artifact, "--csv").stdout)))
    assert [r["layer"] for r in table] == [r["name"] for r in rows]
    assert float(table[1]["bits_16"]) == pytest.approx(rows[1]["histogram"][16])
    for name in ("plot.png", "plot.svg"):
        assert run("profile", artifact, "--plot", name).exit_code == 0
    assert Path("plot.png").read_bytes().startswith(b"\x89PNG") and "<svg" in Path("plot.svg").read_text()
    refused(run("profile", artifact, "--plot", "plot.png"), "--force")
    refused(run("profile", artifact, "--plot", "plot.gif"), ".png")
    refused(run("profile", artifact, "--json", "--csv"), "cannot be combined")
    refused(run("profile"), "model.safetensors does not exist")


def test_convert_own_images_from_a_checkpoint(make_folder: MakeFolder) -> None:
    data = make_folder(per_class=12, classes=3)
    torch.manual_seed(0)
    torch.save({"state_dict": timm.create_model("resnet20_cifar", num_classes=3).state_dict()}, "weights.pth")
    result = run(
        "convert", "resnet20_cifar", "--budget", "0.2", "--checkpoint", "weights.pth", "--data", data,
        "--num-classes", "3", "--bits", "0,8,32",
        "--gate", "ff", "--img-size", "16", "--mean", "0.5", "--std", "0.3", "--batch-size", "16", *SHORT,
        "--output", "own.safetensors", "--seed", "1", "--freeze-backbone",
    )  # fmt: skip
    assert "own.safetensors" in written() and "own.report.md" in written()
    manifest = dfs_cli.load("own.safetensors").manifest
    assert manifest.class_names == ("0", "1", "2") and manifest.source.weights == "weights.pth"
    assert manifest.preprocessing.input_size == (3, 16, 16) and manifest.preprocessing.mean == (0.5,) * 3
    # So few images may miss the budget by sampling; then the command must say so.
    assert manifest.validation is not None
    kept = manifest.validation.cost <= 1.01 * 0.2
    assert result.exit_code == (0 if kept else 1) and ("budget was missed" in result.stderr) is not kept
    result = run("eval", "own.safetensors", "--data", data, "--json", "--workers", "0", "--num-samples", "10")
    assert json.loads(result.stdout)["images"] == 10
    refused(run("eval", "own.safetensors"), "--data")
    refused(run("eval", "own.safetensors", "--data", make_folder("four", classes=4)), "a class '3'")


def test_missed_budget_is_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dfs_cli.Converted, "keeps_budget", False)
    result = run("convert", "resnet20_digits", "--budget", "0.3", *SHORT)
    assert result.exit_code == 1
    assert "the budget was missed" in result.stderr.splitlines()[-1]


def test_dry_run_plans_and_writes_nothing() -> None:
    result = run("convert", "resnet18", "--budget", "0.4", "--no-pretrained", "--dry-run", "--bits", "paper")
    assert result.exit_code == 0, result.output
    for word in ("layer1.0", "layer4.1", "12 bit", "reachable budgets", "0.0625"):
        assert word in result.stdout
    assert written() == []


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (["--gate", "rnn", "--budget", "0.1"], [0, 2, 3, 4, 5, 6, 8]),
        (["--gate", "rnn", "--budget", "0.1", "--spend"], [0, 4, 8, 16, 32]),
        (["--gate", "probe", "--budget", "0.1", "--spend"], [0, 2, 3, 4, 5, 6, 8]),
        (["--gate", "static", "--budget", "0.1", "--spend"], [0, 2, 3, 4, 5, 6, 8, 16, 32]),
        (["--bits", "paper", "--budget", "0.1"], [0, 8, 10, 12, 14, 16, 32]),
    ],
)
def test_the_default_options_are_those_that_the_budget_needs(arguments: list[str], options: list[int]) -> None:
    result = run("convert", "resnet20_digits", *arguments, "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["options"] == options


def test_json_is_all_that_is_printed_and_quiet_prints_nothing() -> None:
    arguments = ["convert", "resnet20_digits", "--budget", "0.05", "--steps", "3", "--workers", "0"]
    result = run(*arguments, "--json")
    report = json.loads(result.stdout)
    assert report["model"] == "resnet20_digits" and report["configuration"]["steps"] == 3
    assert report == json.loads(Path("model.report.json").read_text())
    assert report["unit"].startswith("bit-weighted MACs") and report["cost"] <= 1.01 * 0.05
    result = run(*arguments, "--quiet", "--force")
    assert result.exit_code == 0 and result.output == ""


def test_help_has_panels_and_examples() -> None:
    shown = run("convert", "--help").stdout
    panels = ["Model", "Data", "Preprocessing", "Options and gate", "Tuning", "Machine", "Output"]
    positions = [shown.index(f"─ {panel} ─") for panel in panels]
    assert positions == sorted(positions)
    for command in ("convert", "eval", "profile", "sweep", "export", "bench", "bench-tuning", "list"):
        shown = run(command, "--help").stdout
        assert shown.count(f" dfs {command}") >= 2, command


def test_list() -> None:
    found = json.loads(run("list", "resnet*_cifar", "--json").stdout)
    assert [m["name"] for m in found] == [f"resnet{d}_cifar" for d in (110, 20, 32, 38, 44, 56, 74)]
    assert "resnet18 " in run("list", "resnet18*").stdout
    refused(run("list", "vit*"), "no convertible model")


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["resnt50", "--budget", "0.4"], "close matches: resnet50"),
        (["vit_tiny_patch16_224", "--budget", "0.4"], "VisionTransformer"),
        (["resnet20_digits", "--budget", "0"], "(0, 1]"),
        (["resnet20_digits", "--budget", "1.5"], "(0, 1]"),
        (["resnet20_digits", "--budget", "0.0005"], "smallest reachable one is 0.0007"),
        (["resnet20_digits", "--budget", "0.4", "--bits", "0,1"], "bitwidth 1"),
        (["resnet20_digits", "--budget", "0.4", "--bits", "0,8,8"], "repeated"),
        (["resnet20_digits", "--budget", "0.4", "--bits", "8"], "at least two"),
        (["resnet20_digits", "--budget", "0.4", "--bits", "few"], "--bits 'few'"),
        (["resnet20_digits", "--budget", "0.4", "--spend", "--bits", "lowbit"], "cost at most"),
        (["resnet20_digits", "--budget", "0.4", "--epochs", "2", "--steps", "9"], "give one of them"),
        (["resnet20_digits", "--budget", "0.4", "--gate", "rnn", "--mirror"], "second pass"),
        (["resnet20_digits", "--budget", "0.4", "--fixed-bits", "1"], "bitwidth 1"),
        (["resnet20_digits", "--budget", "0.4", "--lr", "-1"], "lr -1"),
        (["resnet20_digits", "--budget", "0.4", "--epochs", "0"], "epochs 0"),
        (["resnet20_digits", "--budget", "0.4", "--mean", "a"], "--mean 'a'"),
        (["resnet20_digits", "--budget", "0.4", "--crop-pct", "0"], "crop-pct 0"),
        (["resnet20_digits", "--budget", "0.4", "--seed", "-1"], "seed -1"),
        (["resnet20_digits", "--budget", "0.4", "--output", "."], "not a file name"),
        (["resnet20_digits", "--budget", "0.4", "--output", "x" * 300], "File name too long"),
        (["resnet20_digits", "--budget", "0.4", "--output", "none/m.safetensors"], "none does not exist"),
        (["resnet20_digits", "--budget", "0.4", "--data", "none"], "data folder none does not exist"),
        (
            ["resnet20_cifar", "--budget", "0.4", "--no-pretrained", "--num-samples", "9"],
            "--num-samples goes with --data",
        ),
        (["resnet20_cifar", "--budget", "0.4", "--checkpoint", "none.pth", "--data", "."], "none.pth does not exist"),
        (["resnet20_cifar", "--budget", "0.4", "--data", "."], "pass --checkpoint"),
        (["resnet18", "--budget", "0.4", "--data", "."], "--checkpoint"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(args: list[str], reason: str) -> None:
    refused(run("convert", *args), reason)
    assert written() == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_cuda_without_cuda(artifact: Path) -> None:
    refused(run("convert", "resnet20_digits", "--budget", "0.4", "--device", "cuda"), "CUDA is not available")
    refused(run("eval", artifact, "--device", "cuda"), "CUDA is not available")


def test_bad_data_folders(make_folder: MakeFolder) -> None:
    base = ["convert", "resnet20_cifar", "--budget", "0.4", "--no-pretrained", "--workers", "0", "--data"]
    Path("empty").mkdir()
    refused(run(*base, "empty"), "no train/")
    refused(run(*base, make_folder("one", classes=1)), "one class")
    refused(run(*base, make_folder("three", classes=3)), "3 classes")
    assert written() == []


def test_bad_files(artifact: Path) -> None:
    whole = artifact.read_bytes()
    Path("cut.safetensors").write_bytes(whole[: len(whole) // 2])
    Path("changed.safetensors").write_bytes(whole[:-4] + b"\x01\x02\x03\x04")
    Path("pickle.pth").write_bytes(pickle.dumps({"a": object}))
    for command in ("eval", "profile"):
        refused(run(command, "cut.safetensors"), "not an intact safetensors file")
        refused(run(command, "none.safetensors"), "does not exist")
        refused(run(command, "pickle.pth"), "not an intact safetensors file")
        refused(run(command, "changed.safetensors"), "checksum")
    base = ["convert", "resnet20_cifar", "--budget", "0.4", "--data", ".", "--checkpoint"]
    refused(run(*base, "pickle.pth"), "cannot be read as weights")
    refused(run(*base, "cut.safetensors"), "cannot be read as weights")
    refused(run(*base, artifact), "does not fit")


def test_existing_output_is_kept(artifact: Path) -> None:
    shutil.copy(artifact, "model.safetensors")
    Path("model.report.md").write_text("mine")
    refused(run("convert", "resnet20_digits", "--budget", "0.4"), "--force")
    Path("model.safetensors").unlink()
    refused(run("convert", "resnet20_digits", "--budget", "0.4"), "model.report.md exists already")
    assert Path("model.report.md").read_text() == "mine" and written() == ["model.report.md"]


def test_unwritable_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    refused(run("convert", "resnet20_digits", "--budget", "0.4"), "cannot be written: Permission denied")


def test_unreadable_images(make_folder: MakeFolder, artifact: Path) -> None:
    data = make_folder(per_class=14)
    images = sorted((data / "val").rglob("*.jpg"))
    images[0].write_bytes(b"not an image")
    result = run("eval", artifact, "--data", data, "--json", "--workers", "0")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["images"] == 139 and record["unreadable"] == [f"0/{images[0].name}"]
    assert images[0].name in result.stderr
    images[1].write_bytes(images[1].read_bytes()[:200])
    refused(run("eval", artifact, "--data", data, "--workers", "0"), "more than 1%")


def test_nan_loss_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import dfs_cli.tuning.step as step

    monkeypatch.setattr(step, "distillation_loss", lambda *_: torch.tensor(float("nan"), requires_grad=True))
    result = run("convert", "resnet20_digits", "--budget", "0.4", *SHORT)
    assert result.exit_code == 2 and written() == []
    assert "nan at step 1, learning rate" in result.stderr.splitlines()[-1]


def test_eval_moves_a_file_to_another_budget(artifact: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved.safetensors"
    arguments = ["eval", str(artifact), "--json", "--spend", "--budget"]
    costs = []
    for budget, more in (("0.3", ["--output", str(moved)]), ("0.2", [])):
        result = CliRunner().invoke(app, [*arguments, budget, *more])
        assert result.exit_code == 0, result.stderr
        record = json.loads(result.stdout)
        assert record["budget"] == float(budget)
        assert 0.9 * float(budget) <= record["cost"] <= 1.01 * float(budget)
        assert {"policies", "choice_entropy", "variance_between_images", "common_top1"} <= set(record["dynamics"])
        costs.append(record["cost"])
    result = CliRunner().invoke(app, ["eval", str(moved), "--json"])
    again = json.loads(result.stdout)
    assert again["cost"] == costs[0] and again["budget"] == 0.3
    result = CliRunner().invoke(app, ["eval", str(moved), "--json", "--spend", "--budget", "0.2"])
    converted = read_manifest(artifact).validation
    assert converted is not None
    assert json.loads(result.stdout)["cost"] == costs[1] == converted.cost, "the way to a budget does not matter"
    result = CliRunner().invoke(app, [*arguments, "0.001"])
    assert result.exit_code == 2 and "outside what this network can be moved to" in result.stderr
    result = CliRunner().invoke(app, ["eval", str(artifact), "--output", str(moved)])
    assert result.exit_code == 2 and "--budget" in result.stderr


def test_a_limit_for_every_image(artifact: Path, tmp_path: Path) -> None:
    limited = tmp_path / "limited.safetensors"
    before = json.loads(run("eval", artifact, "--json", "--workers", "0").stdout)
    assert before["limit"] is None and before["keeps_limit"] is None
    movable = dfs_cli.load(artifact).manifest.movable
    assert movable is not None
    limit = (movable[0] + before["cost_max"]) / 2
    arguments = ["eval", artifact, "--json", "--workers", "0", "--limit", limit]
    result = run(*arguments, "--output", limited)
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert record["cost_max"] <= limit < before["cost_max"] and record["limit"] == limit and record["keeps_limit"]
    again = json.loads(run("eval", limited, "--json", "--workers", "0").stdout)
    assert again["cost_max"] == record["cost_max"] and again["limit"] == limit
    assert f"limit {limit:g}" in run("eval", limited, "--workers", "0").stdout
    both = json.loads(run(*arguments, "--budget", limit).stdout)
    assert both["cost_max"] <= limit and both["budget"] == limit

    refused(run("eval", artifact, "--limit", "1e-5"), "pass --limit")
    refused(run("eval", artifact, "--limit", "0"), "limit 0 is not above 0")
    refused(run("eval", artifact, "--output", "other.safetensors"), "--budget or --limit")
    base = ["convert", "resnet20_digits", "--budget", "0.4", "--limit"]
    refused(run(*base, "1e-5"), "limit 1e-05 cannot be kept")
    refused(run(*base, "nan"), "limit nan is not above 0")
    refused(run(*base, "0.3", "--spend"), "cannot be spent where no image may cost more than 0.3")
    assert written() == ["limited.safetensors"] and Path.cwd() == tmp_path


def test_a_missed_limit_is_exit_code_1(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dfs_cli.Manifest, "keeps_limit", property(lambda manifest: manifest.limit is None))
    result = run("eval", artifact, "--limit", "0.9", "--workers", "0")
    assert result.exit_code == 1 and "the limit was missed" in result.stderr.splitlines()[-1]


def test_convert_says_the_limit() -> None:
    result = run("convert", "resnet20_digits", "--budget", "0.05", "--limit", "0.06", "--steps", "2", *SHORT[2:])
    assert result.exit_code == 0, result.output
    report = json.loads(Path("model.report.json").read_text())
    assert report["limit"] == 0.06 and report["cost_max"] <= 0.06
    assert "0.06 for every image" in result.stderr and "limit   0.06; the dearest image costs" in result.stdout
    assert "at most 0.06 whatever is shown" in Path("model.report.md").read_text()
