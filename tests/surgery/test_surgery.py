import copy

import pytest
import timm
import torch
from common import RNN, SIZE, preactivated_resnet, se_resnet, tiny_resnet
from timm.models.resnet import Bottleneck
from torch import nn

from dfs_cli.config import DynamicConfig
from dfs_cli.cost.decisions import Decisions
from dfs_cli.errors import UnsupportedModelError
from dfs_cli.nn.layers import FractionalConv2d
from dfs_cli.nn.linear import FractionalLinear
from dfs_cli.nn.normalisation import FractionalBatchNorm2d, moments
from dfs_cli.nn.pooling import MaxPool2d
from dfs_cli.surgery.initialise import fit_float_statistics, fit_steps, hooked
from dfs_cli.surgery.plan import find_blocks, plan_costs, plan_surgery
from dfs_cli.surgery.swap import make_dynamic, verify_conversion

BLOCKS = ("layer1.0", "layer1.1", "layer2.0", "layer3.0", "layer4.0")


def test_the_plan_finds_every_role_once() -> None:
    plan = plan_surgery(tiny_resnet(Bottleneck))
    assert plan.blocks == BLOCKS == tuple(find_blocks(tiny_resnet(Bottleneck)))
    # Width of what enters: the stem's 8 after pooling, then four times each stage's width.
    assert plan.channels == (16, 32, 32, 64, 64) and plan.features == 96
    branch = {f"{path}.conv{i}": b for b, path in enumerate(BLOCKS) for i in (1, 2, 3)}
    assert plan.branch == branch
    shortcuts = [f"{path}.downsample.0" for path in BLOCKS if path != "layer1.1"]
    assert set(plan.fixed) == {"conv1.0", "conv1.3", "conv1.6", "fc", *shortcuts} and len(set(plan.fixed)) == len(
        plan.fixed
    )
    assert plan.norms == {f"{path}.bn{i}": f"{path}.conv{i}" for path in BLOCKS for i in (1, 2, 3)}


def test_norms_before_their_convolution_follow_the_one_behind_and_attention_is_left_alone() -> None:
    plan = plan_surgery(preactivated_resnet())
    first = plan.blocks[0]
    # The first norm of a block sees what was not quantized in it; later ones see the convolution in front of them.
    assert f"{first}.norm1" not in plan.norms
    assert plan.norms[f"{first}.norm2"] == f"{first}.conv1" and plan.norms[f"{first}.norm3"] == f"{first}.conv2"
    attention = plan_surgery(se_resnet())
    assert not any(".se." in name for name in (*attention.branch, *attention.fixed, *attention.norms))


def test_what_was_replaced_by_what_is_told() -> None:
    model = tiny_resnet()
    plan = plan_surgery(model)
    surgery = make_dynamic(model, RNN, plan_costs(model, RNN, SIZE, plan), plan)
    expected: dict[str, tuple[type[nn.Module], type[nn.Module]]] = dict.fromkeys(
        (*plan.branch, *plan.fixed), (nn.Conv2d, FractionalConv2d)
    )
    expected["fc"] = nn.Linear, FractionalLinear
    expected |= dict.fromkeys(plan.norms, (nn.BatchNorm2d, FractionalBatchNorm2d))
    expected["maxpool"] = nn.MaxPool2d, MaxPool2d
    assert surgery.replaced == expected
    for name, (old, new) in expected.items():
        assert type(model.get_submodule(name)) is old and type(surgery.network.backbone.get_submodule(name)) is new
    assert set(surgery.network.backbone.state_dict()) >= set(model.state_dict()), "parameters keep their names"
    assert [block.name for block in surgery.network.blocks] == list(BLOCKS)


def test_in_floating_point_alone_no_norm_is_replaced() -> None:
    model = tiny_resnet()
    config = RNN.replace(bits=(0, 32))
    replaced = make_dynamic(model, config, plan_costs(model, config, SIZE)).replaced
    assert not any(old is nn.BatchNorm2d for old, _ in replaced.values())


def test_a_model_in_which_nothing_would_follow_a_bitwidth_is_refused() -> None:
    model = tiny_resnet()
    table = plan_costs(model, RNN, SIZE)
    for block in find_blocks(model).values():
        for name in ("conv1", "conv2"):
            layer = block.get_submodule(name)
            block.set_submodule(name, nn.Sequential(layer))
            layer.__class__ = type("OtherConv2d", (nn.Conv2d,), {})
            block.get_submodule(name).in_channels = layer.in_channels
    with pytest.raises(UnsupportedModelError, match="nothing was replaced"):
        make_dynamic(model, RNN, table)


def test_unknown_models_tables_and_sizes_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="Sequential cannot be converted: supported are ResNet"):
        plan_surgery(nn.Sequential(nn.Conv2d(3, 3, 3)))
    model = tiny_resnet()
    with pytest.raises(UnsupportedModelError, match="belongs to another model"):
        make_dynamic(model, RNN, plan_costs(se_resnet(), RNN, SIZE))
    with pytest.raises(UnsupportedModelError, match=r"cannot run on images of size \(1, 32, 32\)"):
        plan_costs(model, RNN, (1, 32, 32))


def test_a_forward_that_is_not_the_expected_one_is_noticed() -> None:
    model = tiny_resnet()
    network = make_dynamic(model, RNN, plan_costs(model, RNN, SIZE)).network
    images = torch.randn(4, *SIZE)
    verify_conversion(model, network, images)
    other = copy.deepcopy(model)
    nn.init.ones_(other.get_submodule("fc").weight)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match="computes something else"):
        verify_conversion(other, network, images)


def test_step_sizes_and_statistics_are_those_of_the_sample() -> None:
    model = tiny_resnet()
    network = make_dynamic(model, RNN, plan_costs(model, RNN, SIZE)).network
    sample = torch.randn(16, *SIZE)
    network.train()
    fit_steps(network, sample)
    assert network.training, "the mode is left as it was"
    network.eval()
    stem, inside = (network.backbone.get_submodule(name) for name in ("conv1.0", "layer1.0.conv1"))
    assert isinstance(stem, FractionalConv2d) and isinstance(inside, FractionalConv2d)
    assert stem.is_signed() and not inside.is_signed(), "images have negative values, what ReLU gives has none"
    norm = network.backbone.get_submodule("layer1.0.bn1")
    assert isinstance(norm, FractionalBatchNorm2d)
    seen: list[torch.Tensor] = []
    norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    inside.gives_codes = False  # the norm sees what the convolution gives
    with torch.no_grad():
        network.run_in_full(sample)
        network.run(sample, Decisions.alike(torch.full((5,), 1), 16))
    # What 4 bits shift and spread, normalisation takes back.
    assert norm.running_mean is not None and norm.running_var is not None
    (mean, variance), (mean_4, variance_4) = ((x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)) for x in seen)
    torch.testing.assert_close(norm.bit_mean[0], norm.running_mean + mean_4 - mean)
    torch.testing.assert_close(norm.bit_var[0], norm.running_var * (variance_4 + norm.eps) / (variance + norm.eps))


def test_each_batch_norm_of_a_res2net_follows_its_own_convolution() -> None:
    """Both lie in lists: the convolution before a norm in the list of modules is another one's."""
    norms = plan_surgery(timm.create_model("res2net50_26w_4s")).norms
    for i in range(3):
        assert norms[f"layer1.0.bns.{i}"] == f"layer1.0.convs.{i}"
    assert norms["layer1.0.bn1"] == "layer1.0.conv1" and norms["layer1.0.bn3"] == "layer1.0.conv3"


def test_statistics_in_floating_point_follow_what_tuning_begins_to_skip() -> None:
    config, images = DynamicConfig(bits=(0, 32), fixed_bits=32, gate="static"), torch.randn(64, *SIZE)
    model = tiny_resnet()
    network = make_dynamic(model, config, plan_costs(model, config, SIZE)).network.eval()
    norms = [m for m in network.backbone.modules() if isinstance(m, nn.BatchNorm2d)]

    def seen(policy: torch.Tensor) -> dict[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
        found = {}
        with hooked(network.backbone, nn.BatchNorm2d, lambda norm, inputs: found.update({norm: moments(inputs[0])})):
            network.follow(images, policy.expand(len(images), -1))
        return found

    with torch.no_grad():
        for _ in norms:  # those of the sample itself, from the first layer on
            for norm, (mean, variance) in seen(torch.ones(5, dtype=torch.long)).items():
                norm.running_mean, norm.running_var = mean, variance
        dense = seen(torch.ones(5, dtype=torch.long))
        skipping = torch.tensor([1, 0, 1, 0, 1])
        fit_float_statistics(network, images, skipping)
        after = seen(skipping)
    assert 0 < len(after) < len(norms) and any(not torch.equal(after[norm][0], dense[norm][0]) for norm in after)
    for norm, (mean, variance) in after.items():
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(norm.running_var, variance, rtol=1e-3, atol=1e-3)
