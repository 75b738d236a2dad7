import pytest
import timm
import torch
from common import tiny_resnet
from torch import nn

import dfs_cli.models  # noqa: F401  # registers the CIFAR and digits ResNets
from dfs_cli.artifact.manifest import ModelArgs
from dfs_cli.config import DataConfig, GateKind, TuningConfig
from dfs_cli.conversion.defaults import (
    default_data,
    default_dynamic,
    default_options,
    default_tuning,
    describe_model,
    describe_source,
    resolve_device,
)
from dfs_cli.errors import ConfigError, DataError, UnsupportedModelError
from dfs_cli.presets import PRESETS, Preset


@pytest.mark.parametrize(
    ("gate", "budget", "spend", "preset"),
    [
        ("probe", 0.03, False, "lowbit"),
        ("probe", 0.9, False, "lowbit"),
        # Two passes at 8 bits cost 1/8, of which 0.9 of a budget of 0.138 is just not more.
        ("probe", 0.138, True, "lowbit"),
        ("probe", 0.14, True, "hardware"),
        ("rnn", 0.069, True, "lowbit"),
        ("rnn", 0.07, True, "hardware"),
        ("static", 0.069, True, "lowbit"),
        ("static", 0.07, True, "static"),
        ("static", 0.9, False, "lowbit"),
    ],
)
def test_options_are_those_that_a_budget_can_be_used_for(
    gate: GateKind, budget: float, spend: bool, preset: str
) -> None:
    assert default_options(gate, budget, spend) is PRESETS[preset]
    assert default_dynamic(budget, TuningConfig(), gate, spend=spend).bits == PRESETS[preset].bits


@pytest.mark.parametrize(
    ("known", "chosen"), [((0, 4, 8, 32), (0, 4, 8)), ((8, 32), (8, 32)), ((0, 16, 32), (0, 16, 32))]
)
def test_where_a_budget_counts_a_devices_costs_options_are_those_that_have_some(
    known: tuple[int, ...], chosen: tuple[int, ...]
) -> None:
    assert default_dynamic(0.9, TuningConfig(), spend=True, known=known).bits == chosen


def test_fixed_layers_have_the_bits_that_belong_to_the_options_unless_others_are_named() -> None:
    tuning = TuningConfig()
    assert default_dynamic(0.1, tuning, "rnn", PRESETS["paper"]).fixed_bits == 32
    assert default_dynamic(0.1, tuning, "rnn", PRESETS["paper"], fixed_bits=4).fixed_bits == 4
    assert default_dynamic(0.1, tuning, "rnn", Preset((0, 8))).fixed_bits == 8


def test_images_are_mirrored_where_they_are_in_tuning() -> None:
    flips, none = TuningConfig(), TuningConfig(hflip=0.0)
    assert default_dynamic(0.1, flips).mirror and not default_dynamic(0.1, none).mirror
    assert default_dynamic(0.1, none, mirror=True).mirror and not default_dynamic(0.1, flips, mirror=False).mirror
    assert (
        not default_dynamic(0.1, flips, "static").mirror and default_dynamic(0.1, flips, "static", mirror=True).mirror
    )
    with pytest.raises(ConfigError, match="--mirror is for a second pass"):
        default_dynamic(0.1, flips, "rnn", mirror=False)


def test_data_and_tuning() -> None:
    assert default_data("resnet20_digits").dataset == "digits"
    assert default_data("resnet20_digits", DataConfig(num_samples=9)) == DataConfig(dataset="digits", num_samples=9)
    named = DataConfig(data_dir="x")
    assert default_data("resnet20_digits", named) is named
    with pytest.raises(DataError, match="resnet18 needs images: pass --data"):
        default_data("resnet18")
    assert default_tuning(DataConfig(dataset="digits")) == TuningConfig(batch_size=64, hflip=0.0)
    assert default_tuning(named) == default_tuning() == TuningConfig()


def test_a_model_is_described_so_that_timm_builds_it_again() -> None:
    assert describe_model(timm.create_model("resnet20_cifar", num_classes=7)) == ("resnet20_cifar", ModelArgs(7, 3))
    assert describe_model(timm.create_model("resnet18", in_chans=1)) == ("resnet18", ModelArgs(1000, 1))
    with pytest.raises(UnsupportedModelError, match="not made by timm"):
        describe_model(tiny_resnet())
    with pytest.raises(UnsupportedModelError, match="no classifier"):
        describe_model(timm.create_model("resnet18", num_classes=0))
    changed = timm.create_model("resnet18")
    changed.maxpool = nn.Identity()
    with pytest.raises(UnsupportedModelError, match="differs in structure"):
        describe_model(changed)


def test_where_weights_come_from() -> None:
    source = describe_source(timm.create_model("resnet18.a1_in1k"))
    assert (source.weights, source.license, source.origin) == (
        "resnet18.a1_in1k",
        "apache-2.0",
        "timm/resnet18.a1_in1k",
    )
    mine = describe_source(timm.create_model("resnet18"), "mine.pth")
    assert (mine.weights, mine.license, mine.origin) == ("mine.pth", None, None)


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        assert resolve_device("auto") == torch.device("cpu")
        with pytest.raises(ConfigError, match="CUDA is not available"):
            resolve_device("cuda")
