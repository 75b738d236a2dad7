"""Before it is tuned, the network is compared with the original, and refitted where they differ."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import KINDS, hostile, spare
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import dfs_cli
from dfs_cli.config import DataConfig, DynamicConfig, TuningConfig
from dfs_cli.conversion import planning, stages
from dfs_cli.conversion.agreement import Refitted, ensure_agreement
from dfs_cli.conversion.convert import run
from dfs_cli.conversion.converted import Converted
from dfs_cli.conversion.setup import Setup, prepare
from dfs_cli.data.images import Images
from dfs_cli.data.splits import Splits
from dfs_cli.nn.layers import FractionalLayer
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.observer import Observer
from dfs_cli.report.markdown import render_markdown
from dfs_cli.surgery.initialise import fit_steps
from dfs_cli.surgery.swap import make_dynamic

pytestmark = pytest.mark.medium

DATA = DataConfig(dataset="digits", num_samples=200)
TUNING = TuningConfig(steps=2, batch_size=64, hflip=0.0, workers=0)


class Notes(Observer):
    """Writes down what the user is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, text: str) -> None:
        self.told.append(text)


def compare(model: nn.Module, bits: tuple[int, ...], fixed_bits: int = 8) -> tuple[Refitted, Notes]:
    """The agreement of a fresh network with ``model``, and what was said."""
    dynamic, notes = DynamicConfig(bits=bits, fixed_bits=fixed_bits, gate="static"), Notes()
    setup = prepare(model, 1.0, DATA, dynamic=dynamic, tuning=TUNING)
    network, sample = fresh(setup)
    return ensure_agreement(network, setup, model, sample, notes), notes


def fresh(setup: Setup) -> tuple[DynamicResNet, Tensor]:
    """A network whose step sizes are set, and the images they were set on."""
    network = make_dynamic(setup.model, setup.dynamic, setup.table, setup.plan).network
    sample = next(iter(stages.validation_loader(setup))).images
    fit_steps(network, sample)
    return network, sample


def gained(network: DynamicResNet) -> list[str]:
    """Names of the layers whose inputs have a gain."""
    layers = network.backbone.named_modules()
    return [name for name, m in layers if isinstance(m, FractionalLayer) and m.input_gain is not None]


@pytest.mark.parametrize("bits", [(0, 4, 8), (0, 2)])
def test_an_ordinary_network_stays_as_it_is(bits: tuple[int, ...], digits_model: nn.Module) -> None:
    (network, agreement, gains), notes = compare(digits_model, bits)
    assert agreement is not None and agreement.before == agreement.after >= 0.98 and agreement.images == 200
    assert not agreement.refitted and not gains and not gained(network) and not notes.told


@pytest.mark.parametrize(
    "kind", [*(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "tiny variances"), None]
)
def test_a_hostile_network_is_refitted(kind: str | None, digits_model: nn.Module) -> None:
    model = hostile(digits_model, *([kind] if kind else []))
    (network, agreement, gains), notes = compare(model, (0, 4, 8))
    assert agreement is not None and agreement.before < 0.95 and agreement.after >= 0.98
    assert set(gained(network)) == set(agreement.refitted) == set(gains) != set()
    (note,) = notes.told
    assert (
        f"for {agreement.before:.1%} of 200 images" in note and any(name in note for name in gains) and "\n" not in note
    )
    assert f"{len(gains)} layers equalised: {agreement.after:.1%}" in note


def test_tiny_variances_alone_do_no_harm(digits_model: nn.Module) -> None:
    (_, agreement, gains), _ = compare(hostile(digits_model, "tiny variances"), (0, 8))
    assert agreement is not None and agreement.before >= 0.98 and not gains


def test_other_networks_are_judged_by_one_of_8_bits(digits_model: nn.Module) -> None:
    model = hostile(digits_model)
    at_8 = compare(model, (0, 8))[0]
    for bits, fixed_bits in (((0, 4), 8), ((0, 8), 4), ((0, 3, 16), 4)):
        (network, agreement, gains), _ = compare(model, bits, fixed_bits)
        assert agreement == at_8.agreement
        assert all(torch.equal(gains[name], gain) for name, gain in at_8.gains.items())
        assert set(gained(network)) == set(gains)


@pytest.mark.parametrize("bits", [(0, 32), (0, 16)])
def test_without_8_bits_or_fewer_nothing_is_compared(bits: tuple[int, ...], digits_model: nn.Module) -> None:
    (network, agreement, gains), notes = compare(hostile(digits_model), bits)
    assert agreement is None and not gains and not gained(network) and not notes.told


def test_what_does_not_help_leaves_the_network_as_it_is(digits_model: nn.Module) -> None:
    setup = prepare(spare(digits_model), 1.0, DATA, dynamic=DynamicConfig((0, 8), gate="static"), tuning=TUNING)
    network, sample = fresh(setup)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    other = dfs_cli.load_model("resnet20_digits")
    nn.init.normal_(other.get_submodule("fc").get_parameter("weight"))
    notes = Notes()
    kept, agreement, gains = ensure_agreement(network, setup, other, sample, notes)
    assert agreement is not None and agreement.before == agreement.after < 0.95 and not agreement.refitted and not gains
    after = kept.state_dict()
    assert (
        kept is network
        and before.keys() == after.keys()
        and all(torch.equal(before[key], after[key]) for key in before)
    )
    assert "equalising them changes nothing for the better" in notes.told[0]


@cache
def converted(gate: str) -> Converted:
    """A hostile network, converted with next to no tuning."""
    model = hostile(dfs_cli.load_model("resnet20_digits"))
    bits = (0, 4, 8, 32) if gate == "rnn" else (0, 4, 8)
    return run(prepare(model, 0.06, DATA, DynamicConfig(bits, gate=gate), TUNING), Observer())  # type: ignore[arg-type]


@pytest.mark.parametrize("gate", ["static", "probe", "rnn"])
def test_a_refitted_network_is_saved_and_loaded(gate: str, tmp_path: Path) -> None:
    made, path = converted(gate), tmp_path / "model.safetensors"
    dfs_cli.save(made, path)
    network, manifest = dfs_cli.load(path)
    assert manifest == made.manifest and manifest.agreement is not None
    assert set(gained(network)) == set(manifest.agreement.refitted) != set()
    images = torch.rand(20, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(network.run(images).logits, made.network.run(images).logits)
    evaluation = dfs_cli.evaluate(dfs_cli.Converted(network, manifest), DATA)
    assert made.manifest.validation is not None and evaluation.top1 == made.manifest.validation.top1 > 90


def test_agreement_is_in_every_report() -> None:
    manifest = converted("static").manifest
    report = dfs_cli.cost_report(converted("static"))
    assert manifest.agreement is not None and report["agreement"] == manifest.agreement.to_dict()
    text = render_markdown(report)
    assert f"same answer as the original for {manifest.agreement.after:.1%} of" in text
    assert all(f"`{name}`" in text for name in manifest.agreement.refitted)


class Recorded(TensorDataset):
    """Images of a random colour, which remember which of them were looked at."""

    def __init__(self, count: int) -> None:
        super().__init__(torch.rand(count, 1, 8, 8), torch.arange(count) * 10 // count)
        self.seen: list[int] = []

    def __getitem__(self, index: int) -> Any:
        self.seen.append(index)
        return super().__getitem__(index)


def test_the_sample_comes_from_all_classes_of_a_folder(digits_model: nn.Module) -> None:
    others, held_out = Images(TensorDataset(torch.rand(64, 1, 8, 8), torch.arange(64) % 10)), Recorded(600)
    splits = Splits(others, Images(held_out), others, tuple("0123456789"))
    dynamic = DynamicConfig((0, 8), gate="static")
    planning.make_network(prepare(digits_model, 0.1, splits, dynamic, TUNING), Observer())
    assert len(held_out.seen) == len(set(held_out.seen)) == 256
    counts = torch.tensor([held_out.tensors[1][i] for i in held_out.seen]).bincount(minlength=10)
    assert 25 <= counts.min() <= counts.max() <= 26
