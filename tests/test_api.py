import copy
import random
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from common import MakeFolder, timm_model
from torch import nn
from torch.utils.data import TensorDataset

import dfs_cli
from dfs_cli.errors import ConfigError, DataError, UnsupportedModelError
from dfs_cli.evaluation.evaluate import evaluate_accuracy
from dfs_cli.report.markdown import render_markdown

pytestmark = pytest.mark.medium

SHORT = dfs_cli.TuningConfig(steps=12, batch_size=64, hflip=0.0, workers=0)


def colour_splits(classes: int = 10) -> dfs_cli.Splits:
    def images(count: int, seed: int) -> dfs_cli.Images:
        generator = torch.Generator().manual_seed(seed)
        targets = torch.arange(count) % classes
        return dfs_cli.Images(TensorDataset(torch.randn(count, 3, 32, 32, generator=generator), targets))

    return dfs_cli.Splits(images(64, 0), images(60, 1), images(90, 2), tuple(map(str, range(classes))))


class Recorder(dfs_cli.Observer):
    def __init__(self) -> None:
        self.stages: list[str] = []
        self.steps = 0

    def stage(self, name: str, total: int | None) -> None:  # noqa: ARG002
        self.stages.append(name)

    def step(self, record: object) -> None:  # noqa: ARG002
        self.steps += 1


def test_convert_keeps_the_budget_and_leaves_the_model(digits_model: nn.Module) -> None:
    before = copy.deepcopy(digits_model.state_dict())
    recorder = Recorder()
    converted = dfs_cli.convert(digits_model, 0.3, tuning=SHORT, spend=True, observer=recorder)
    assert all(torch.equal(v, before[k]) for k, v in digits_model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in digits_model.parameters())
    validation = converted.manifest.validation
    assert validation is not None and converted.keeps_budget is True
    assert 0.27 <= validation.cost <= 0.303
    assert validation.top1 > 97
    load = "loading held-out images"
    assert recorder.stages == [
        load,
        "measuring",
        "original",
        "tuning",
        load,
        "setting the operating point",
        "validation",
    ]
    assert converted.manifest.configuration is not None
    assert recorder.steps == 12 == converted.manifest.configuration.steps


@pytest.mark.slow
def test_a_budget_is_an_upper_bound(digits_model: nn.Module) -> None:
    """More budget than 8 bits in two passes cost is left alone, and what is not evaluated has not missed its budget."""
    small, large = (dfs_cli.convert(digits_model, budget, tuning=SHORT) for budget in (0.12, 0.9))
    for converted in (small, large):
        assert converted.manifest.validation is not None and converted.manifest.validation.cost < 0.12
        assert converted.keeps_budget is True and converted.manifest.dynamic.bits == (0, 2, 3, 4, 5, 6, 8)
    assert small.manifest.held_out is not None and large.manifest.held_out is not None
    assert small.manifest.held_out.top1 is not None and large.manifest.held_out.top1 is not None
    assert large.manifest.held_out.top1 >= small.manifest.held_out.top1
    assert dfs_cli.recalibrate(small, 0.05).keeps_budget is None


def test_a_static_network_is_converted_saved_moved_nowhere_and_exported(tmp_path: Path) -> None:
    dynamic = dfs_cli.DynamicConfig(gate="static", fixed_bits=4)
    converted = dfs_cli.convert("resnet20_digits", 0.02, dynamic=dynamic, tuning=SHORT)
    manifest = converted.manifest
    assert manifest.validation is not None and manifest.table.layer_bits
    by_hand = sum(layer.macs * ((layer.bits or 0) / 32) ** 2 for layer in manifest.table.layers) / sum(
        layer.macs for layer in manifest.table.layers
    )
    assert manifest.validation.cost == pytest.approx(by_hand) and by_hand <= 0.02
    assert manifest.validation.dynamics.policies == 1
    dfs_cli.save(converted, tmp_path / "static.safetensors")
    loaded = dfs_cli.load(tmp_path / "static.safetensors")
    assert dfs_cli.evaluate(loaded).top1 == pytest.approx(manifest.validation.top1)
    with pytest.raises(ConfigError, match="outside what this network can be moved to"):
        dfs_cli.recalibrate(loaded, 0.9 * by_hand)
    comparison = dfs_cli.export_onnx(loaded, tmp_path / "static.onnx")
    assert comparison.same_answers >= 0.995
    # Codes of at most 8 bits, less than a byte for each weight, and what is kept for each channel.
    weights = sum(p.numel() for name, p in loaded.network.named_parameters() if name.endswith(".weight"))
    assert (tmp_path / "static.safetensors").stat().st_size < weights


def test_convert_leaves_the_callers_generators(digits_model: nn.Module) -> None:
    torch.manual_seed(5)
    random.seed(5)
    expected = torch.rand(1), random.random()
    torch.manual_seed(5)
    random.seed(5)
    dfs_cli.convert(digits_model, 0.3, tuning=SHORT.replace(steps=2))
    assert (torch.rand(1), random.random()) == expected


def test_unreadable_training_images_are_counted_over_the_whole_split(make_folder: MakeFolder) -> None:
    data = make_folder(per_class=40, classes=4)
    root = dfs_cli.DataConfig(data_dir=str(data))
    bad = sorted((data / "train").rglob("*.jpg"))[0]
    bad.write_bytes(b"no image")  # one of 160; more than 1% of the 16 that are held out, if it is among them
    model = timm.create_model("resnet20_digits", num_classes=4)
    tuning = SHORT.replace(steps=2, batch_size=160)  # every step sees every image
    converted = dfs_cli.convert(model, 0.3, root, tuning=tuning)
    assert converted.manifest.configuration is not None
    assert converted.manifest.configuration.unreadable_training_images == (f"0/{bad.name}",)
    assert converted.manifest.source.license is None, "weights given by the caller have no known licence"
    bad.with_name("x.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match="more than 1% of the 161 training images"):
        dfs_cli.convert(model, 0.3, root, tuning=tuning)


@pytest.mark.slow
def test_examples_run(tmp_path: Path) -> None:
    examples = Path(__file__).parents[1] / "examples"
    for script in (
        ["train_digits.py", "--epochs", "1", "--output", "w.safetensors"],
        ["python_api.py", "--steps", "8"],
    ):
        command = [sys.executable, "-W", "ignore", str(examples / script[0]), *script[1:]]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "w.safetensors").stat().st_size > 1_000_000
    assert "budget kept: True" in done.stdout


@pytest.mark.slow
def test_convert_is_reproducible(digits_model: nn.Module) -> None:
    first, second = (dfs_cli.convert(digits_model, 0.1, tuning=SHORT) for _ in range(2))
    assert first.manifest.operating_point == second.manifest.operating_point
    assert all(torch.equal(v, second.network.state_dict()[k]) for k, v in first.network.state_dict().items())


@pytest.mark.slow
def test_convert_takes_splits_of_the_caller_and_other_gates() -> None:
    model = timm_model("resnet20_cifar")
    converted = dfs_cli.convert(
        model,
        0.1,
        colour_splits(),
        dynamic=dfs_cli.DynamicConfig(bits=(0, 2, 8, 32), fixed_bits=32, gate="ff"),
        tuning=dfs_cli.TuningConfig(steps=3, batch_size=32, workers=0, amp=True),
    )
    validation = converted.manifest.validation
    assert validation is not None and validation.images == 90
    assert converted.manifest.configuration is not None
    assert converted.manifest.configuration.data is None
    assert validation.cost == pytest.approx(
        dfs_cli.cost_report(converted)["gmacs_bitweighted"] * 1e9 / converted.manifest.table.dense_macs
    )


def test_evaluation_agrees_with_a_plain_loop(artifact: Path) -> None:
    converted = dfs_cli.load(artifact)
    evaluation = dfs_cli.evaluate(converted, batch_size=37)
    stored = converted.manifest.validation
    assert stored is not None
    assert evaluation.choices == stored.choices and evaluation.cost == stored.cost
    assert evaluation.top1 == pytest.approx(stored.top1, abs=1e-4)
    data = dfs_cli.Images(
        TensorDataset(torch.rand(50, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 10)
    )
    quick = dfs_cli.evaluate(converted, amp=True, channels_last=True)
    assert abs(quick.top1 - stored.top1) < 1 and abs(quick.cost - stored.cost) < 0.1 * stored.cost
    assert all(p.is_contiguous() for p in converted.network.parameters())
    found = dfs_cli.evaluate(converted, data)
    with torch.no_grad():
        output = converted.network.run(torch.stack([data[i][0] for i in range(50)]))  # type: ignore[misc]
    cost = converted.manifest.table.cost(output.decisions)
    assert found.top1 == pytest.approx((output.logits.argmax(1) == torch.arange(50) % 10).float().mean().item() * 100)
    top5 = (output.logits.topk(5).indices == (torch.arange(50) % 10)[:, None]).any(1).float().mean().item() * 100
    assert found.top5 == pytest.approx(top5)
    assert found.cost == pytest.approx(cost.mean().item()) and found.cost_max == cost.max().item()
    assert found.cost_p50 == pytest.approx(cost.median().item(), rel=0.05)
    options = output.decisions.options
    assert [sum(block) for block in found.choices[0]] == [50] * 9
    assert [sum(block) for block in found.choices[1]] == [int((options[:, 1, 0] >= 0).sum())] * 9
    assert found.choices[1][3][3] == int((options[:, 1, 3] == 3).sum())


def test_report_adds_up(artifact: Path) -> None:
    converted = dfs_cli.load(artifact)
    report = dfs_cli.cost_report(converted)
    rows = dfs_cli.profile(converted)
    assert report["layers"] == rows
    assert sum(r["mean_cost"] for r in rows) == pytest.approx(report["cost"])
    assert sum(r["dense_share"] for r in rows) == pytest.approx(1)
    assert sum(r["mean_bitweighted_macs"] for r in rows) == pytest.approx(report["gmacs_bitweighted"] * 1e9)
    assert sum(report["option_shares"].values()) == pytest.approx(1)
    assert all(sum(r["histogram"].values()) == pytest.approx(1) for r in rows)
    assert report["cost_all_8_bit"] == 0.0625
    assert report["top1_before"] == pytest.approx(99.56, abs=0.01)
    assert {r["name"] for r in rows} >= {"conv1", "layer1.0.conv1", "layer2.0.downsample.0", "fc", "gate"}
    text = render_markdown(report)
    assert "0.0625" in text and "layer3.2.conv2" in text and "batch_norm" in text


def test_accuracy_of_the_original(digits_model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    data = dfs_cli.Images(TensorDataset(torch.rand(20, 1, 8, 8, generator=generator), torch.arange(20) % 10))
    from dfs_cli.data.images import UnreadableLog
    from dfs_cli.data.loading import eval_loader

    top1, top5 = evaluate_accuracy(digits_model, eval_loader(data, 8, 0), torch.device("cpu"), UnreadableLog("x", 20))
    with torch.no_grad():
        logits = digits_model(torch.stack([data[i][0] for i in range(20)]))  # type: ignore[misc]
    assert top1 == pytest.approx((logits.argmax(1) == torch.arange(20) % 10).float().mean().item() * 100)
    in_five = (logits.topk(5).indices == (torch.arange(20) % 10)[:, None]).any(1).float().mean().item() * 100
    assert top5 == pytest.approx(in_five)


def test_bad_calls_are_refused(digits_model: nn.Module) -> None:
    with pytest.raises(ConfigError):
        dfs_cli.convert(digits_model, 1.5)
    with pytest.raises(ConfigError, match="smallest reachable"):
        dfs_cli.convert(digits_model, 0.0005)
    with pytest.raises(ConfigError, match="--spend needs images"):
        dfs_cli.convert(timm.create_model("resnet20_cifar"), 0.1, spend=True)
    with pytest.raises(DataError, match="3 classes"):
        dfs_cli.convert(timm.create_model("resnet20_cifar"), 0.4, colour_splits(classes=3))
    with pytest.raises(UnsupportedModelError, match=r"timm\.create_model"):
        dfs_cli.convert(nn.Linear(2, 2), 0.4, colour_splits())
    with pytest.raises(UnsupportedModelError, match="differs in structure"):
        dfs_cli.convert(timm.create_model("resnet18", output_stride=16), 0.4, colour_splits())
    with pytest.raises(UnsupportedModelError, match="no classifier"):
        dfs_cli.convert(timm.create_model("resnet18", num_classes=0), 0.4, colour_splits())


def test_plan_needs_no_data(digits_model: nn.Module) -> None:
    table = dfs_cli.plan(digits_model, dfs_cli.DynamicConfig(bits=(0, 32), fixed_bits=32, gate="rnn"))
    assert table.dearest == pytest.approx(1 + sum(table.controller_macs[0]) / table.dense_macs)
