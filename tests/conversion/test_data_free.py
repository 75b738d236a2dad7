"""Conversions without images: what they promise, and what they say of themselves."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import dfs_cli
from dfs_cli.cli.app import app
from dfs_cli.config import GateKind

pytestmark = pytest.mark.medium

FEW = ["--synthetic-images", "32", "--synthetic-steps", "4", "--steps", "3", "--workers", "0", "--device", "cpu"]


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("gate", ["probe", "rnn", pytest.param("ff", marks=pytest.mark.slow), "static"])
def test_no_real_image_costs_more_than_the_budget(gate: GateKind) -> None:
    """Networks are tuned on 32 synthetic digits and see real ones."""
    made = dfs_cli.SynthesisConfig(images=32, steps=4)
    tuning = dfs_cli.TuningConfig(steps=3, hflip=0.0, workers=0)
    dynamic = dfs_cli.DynamicConfig(gate=gate)
    converted = dfs_cli.convert("resnet20_digits", 0.06, made, dynamic=dynamic, tuning=tuning)
    manifest = converted.manifest
    assert manifest.bound is not None and manifest.bound <= 0.06
    assert converted.keeps_budget
    evaluation = dfs_cli.evaluate(converted)
    assert evaluation.cost_max <= manifest.bound + 1e-9
    assert evaluation.top1 > 90  # the original's is 99.6, and 8 bits hardly change a thing
    assert manifest.configuration is not None and manifest.configuration.synthesis == made
    assert manifest.configuration.tuning.label_weight == 0 and manifest.class_names == ()


def test_the_file_says_that_it_was_made_without_images(tmp_path: Path) -> None:
    result = run("convert", "resnet20_digits", "-b", 0.1, *FEW, "--save-synthetic", "looked-at")
    assert result.exit_code == 0, result.output
    names = {p.name for p in tmp_path.iterdir() if p.is_file()}
    assert names == {"model.safetensors", "model.report.json", "model.report.md", "model.images.png"}
    assert len(list(Path("looked-at").glob("*/*.png"))) == 32
    report = json.loads(Path("model.report.json").read_text())
    assert report["data_free"] and report["top1_after"] is None and report["top1_before"] is None
    assert 0 < report["cost"] <= report["bound"] <= 0.1 and report["keeps_budget"]
    assert 20 < report["same_answers"] <= 100  # by chance it would be 10
    assert report["configuration"]["synthesis"] == {"kind": "distilled", "images": 32, "steps": 4}
    text = Path("model.report.md").read_text()
    assert "Without real images" in text and "(model.images.png)" in text and "top-1 (%)" not in text
    assert "top-1 is not known" in result.stdout and "a bound" in result.stdout
    for said in ("no images are given: 32", "on this machine", "--no-mirror"):
        assert said in result.stderr
    shown = run("profile", "model.safetensors")
    assert "synthetic images" in shown.stdout and "same answers as the original" in shown.stdout
    again = run(
        "convert", "resnet20_digits", "-b", 0.1, *FEW, "--save-synthetic", "looked-at", "-o", "other.safetensors"
    )
    assert again.exit_code == 2 and "looked-at is there already" in again.stderr


def test_real_images_tell_what_a_file_made_without_them_is_worth() -> None:
    weights = dfs_cli.load_model("resnet20_digits").state_dict()
    torch.save(weights, "weights.pt")
    done = run("convert", "resnet20_digits", "-b", 0.1, *FEW, "--checkpoint", "weights.pt")
    assert done.exit_code == 0, done.output
    result = run("eval", "model.safetensors", "--dataset", "digits", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["data_free"] and record["original_top1"] == pytest.approx(99.56, abs=0.01)
    assert record["keeps_budget"] and record["cost_max"] <= 0.1
    text = run("eval", "model.safetensors", "--dataset", "digits").stdout
    assert "the original has 99.56" in text and "tuned without images: the budget is kept" in " ".join(text.split())
    Path("weights.pt").unlink()
    without = run("eval", "model.safetensors", "--dataset", "digits", "--json")
    assert json.loads(without.stdout)["original_top1"] is None
    moved = run("eval", "model.safetensors", "-b", 0.05, "--dataset", "digits", "-o", "moved.safetensors")
    assert moved.exit_code == 0, moved.output
    manifest = dfs_cli.load("moved.safetensors").manifest
    assert manifest.bound is None and manifest.is_data_free
    assert manifest.validation is not None and not manifest.validation.is_synthetic


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["resnet20_digits", "--synthetic", "noise", "--data", "."], "--synthetic is for conversions without images"),
        (["resnet20_digits", "--synthetic-steps", "3", "--dataset", "digits"], "--synthetic-steps is for"),
        (["resnet18", "--no-pretrained", "--spend"], "--spend needs images"),
        (["resnet18", "--no-pretrained", "--synthetic-images", "0"], "--synthetic-images 0"),
        (["resnet50_gn", "--no-pretrained", "--img-size", "32", "--synthetic-images", "4"], "pass --data DIR"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(args: list[str], said: str) -> None:
    result = run("convert", *args, "-b", 0.4)
    assert result.exit_code == 2
    assert said in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.output and not list(Path().glob("model*"))


def test_the_first_line_that_anybody_types() -> None:
    """``dfs convert resnet18 --budget 0.4``, on small images with little work."""
    size = ["--img-size", "32", "--synthetic-images", "4", "--synthetic-steps", "2", "--steps", "1"]
    result = run("convert", "resnet18", "--budget", "0.4", "--no-pretrained", *size, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    # Of both passes at most, with 8 bits each; random weights may need less.
    assert report["cost_max"] <= report["bound"] <= 1.01 * 0.125 and report["keeps_budget"]


def test_noise_is_quick_and_says_so() -> None:
    result = run("convert", "resnet20_digits", "-b", 0.1, "--synthetic", "noise", *FEW, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["configuration"]["synthesis"] == {"kind": "noise", "images": 32, "steps": None}
    assert "Gaussian noise" in result.stderr and "Gaussian noise" in Path("model.report.md").read_text()
