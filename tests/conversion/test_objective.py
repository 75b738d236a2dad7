"""A budget in another unit than bit-weighted MACs."""

import dataclasses
from functools import cache
from pathlib import Path

import pytest
import torch

import dfs_cli
from dfs_cli.checkpoint import Checkpoint
from dfs_cli.config import DataConfig, DynamicConfig, GateKind, TuningConfig
from dfs_cli.control.base import controller_of
from dfs_cli.conversion.convert import convert
from dfs_cli.conversion.converted import Converted
from dfs_cli.cost.count import count_macs
from dfs_cli.cost.device import DeviceCosts, ViewCosts
from dfs_cli.errors import ArtifactError, ConfigError
from dfs_cli.observer import Observer
from dfs_cli.report.cost import cost_report, layer_rows
from dfs_cli.report.markdown import render_markdown

pytestmark = pytest.mark.medium

TUNING = TuningConfig(steps=3, batch_size=64, hflip=0.0, workers=0)
DATA = DataConfig(dataset="digits", num_samples=200)
BLOCKS = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(3)]
# On this device 2 to 8 bits cost the same: 2 for each block, of 30 for the dense network.
COSTS = DeviceCosts(
    model="resnet20_digits",
    image_size=(1, 8, 8),
    unit="ms",
    measured=True,
    machine={"processor": "abacus"},
    options=(0, 2, 4, 8),
    blocks=dict.fromkeys(BLOCKS, (0.0, 2.0, 2.0, 2.0)),
    fixed=2.0,
    dense=30.0,
    static_int8=18.0,
    deciding={"rnn": ((0.5, 0.1),), "ff": ((0.5, 0.1),), "probe": ((0.1, 0.0), (0.4, 0.1))},
)
# What always runs takes 6 there, and with images of 0.75 of the size 1, and a block 0.5.
WITH_VIEWS = COSTS.replace(fixed=6.0, smaller=(ViewCosts(0.75, dict.fromkeys(BLOCKS, (0.0, 0.5, 0.5, 0.5)), 1.0),))


class Notes(Observer):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, text: str) -> None:
        self.told.append(text)


@cache
def converted(gate: GateKind, budget: float, has_views: bool = False) -> tuple[Converted, tuple[str, ...]]:
    notes, costs = Notes(), WITH_VIEWS if has_views else COSTS
    made = convert(
        "resnet20_digits", budget, DATA, dynamic=DynamicConfig((0, 2, 4, 8), gate=gate), tuning=TUNING, costs=costs,
        observer=notes,
    )  # fmt: skip
    return made, tuple(notes.told)


@pytest.mark.parametrize("gate", ["rnn", "ff", "static"])
def test_the_budget_is_kept_in_the_unit_of_the_costs(gate: GateKind) -> None:
    (_, manifest), told = converted(gate, 0.5)
    table, evaluation = manifest.table, manifest.validation
    assert evaluation is not None and manifest.keeps_budget
    # Narrower options cost as much as 8 bits and are left out.
    assert manifest.dynamic.bits == table.options == (0, 8)
    assert "options of 2,4 bits are left out: 0,8 bits cost no more there" in told
    # The mean cost by hand, from how often blocks ran.
    runs = [sum(block[1] for block in blocks) for blocks in evaluation.choices]
    took = [sum(blocks[0]) for blocks in evaluation.choices]
    deciding = COSTS.deciding.get(gate, ((0.0, 0.0),))
    milliseconds = sum(
        2 * ran + 2 * images + always * images + block * ran
        for ran, images, (always, block) in zip(runs, took, deciding, strict=True)
    )
    assert evaluation.cost == pytest.approx(milliseconds / evaluation.images / 30)
    assert evaluation.cost <= 0.505


def test_a_first_pass_of_smaller_images_is_chosen_where_it_saves_enough_and_paid_as_such() -> None:
    # 7.5 ms pay for no full image at 8 bits.
    (network, manifest), told = converted("probe", 0.25, True)
    evaluation, dynamic = manifest.validation, manifest.dynamic
    assert evaluation is not None and dynamic.first_view == manifest.table.first_view == 0.75 and dynamic.alike
    assert "the first pass sees images of 0.75 of their height and width" in told
    assert any("two passes with a first view of 0.75" in text and "one pass" in text for text in told)
    assert [view.scale for view in controller_of(network).views] == [0.75, 1.0]
    (first, again), (images, refined) = (
        [sum(block[1] for block in blocks) for blocks in evaluation.choices],
        [sum(blocks[0]) for blocks in evaluation.choices],
    )
    milliseconds = 0.5 * first + (1 + 0.1) * images + (2 + 0.1) * again + (6 + 0.4) * refined
    assert evaluation.cost == pytest.approx(milliseconds / evaluation.images / 30) and manifest.keeps_budget
    # The second pass has one policy, for all images that take it.
    assert 0 < refined < images and all(set(block) <= {0, refined} for block in evaluation.choices[1])
    rows = layer_rows(manifest.table, evaluation)
    assert sum(row["mean_cost"] for row in rows) == pytest.approx(evaluation.cost)
    stem = rows[0]
    small = count_macs(dfs_cli.load_model("resnet20_digits"), (1, 6, 6)).layers["conv1"]
    expected = (small * images + stem["macs"] * refined) / evaluation.images / 16  # at 8 bits
    assert stem["name"] == "conv1" and stem["mean_bitweighted_macs"] == pytest.approx(expected)


def test_a_network_of_two_sizes_is_saved_and_can_be_moved_and_limited(tmp_path: Path) -> None:
    made, _ = converted("probe", 0.25, True)
    path = tmp_path / "model.safetensors"
    dfs_cli.save(made, path)
    network, manifest = dfs_cli.load(path)
    images = torch.rand(40, 1, 8, 8)
    assert manifest == made.manifest and torch.equal(network(images), made.network(images))
    least, most = controller_of(network).movable(manifest.table)
    assert manifest.validation is not None
    running = sum(block[1] > 0 for block in manifest.validation.choices[0])
    assert least == pytest.approx((1 + 0.1 + 0.5 * running) / 30) and most > least + 6 / 30
    # Of what it costs, both passes or one: a limit below both pays for the first one alone.
    limited = dfs_cli.recalibrate(dfs_cli.Converted(network, manifest), limit=0.99 * most)
    decisions = limited.network.run(images).decisions
    assert not decisions.ran[:, 1].any() and manifest.table.cost(decisions).max() <= 0.99 * most
    other = dataclasses.replace(manifest.table, first_view=1.0)
    with pytest.raises(ArtifactError, match="first view of the cost table"):
        dfs_cli.save(made._replace(manifest=manifest.replace(table=other)), tmp_path / "other.safetensors")


def test_a_first_view_can_be_asked_for_but_must_have_costs() -> None:
    dynamic = DynamicConfig((0, 2, 4, 8), first_view=0.625)
    with pytest.raises(ConfigError, match=r"nothing about a first view of 0\.625, only of 1, 0\.75"):
        convert("resnet20_digits", 0.25, DATA, dynamic=dynamic, tuning=TUNING, costs=WITH_VIEWS)


def test_the_static_rival_obeys_the_same_table() -> None:
    (_, manifest), _ = converted("static", 0.5)
    # 15 ms pay for what always runs and six blocks of 2 ms; the seventh would need 16 ms.
    assert manifest.validation is not None and manifest.validation.cost <= 14 / 30 + 1e-9
    assert set(manifest.table.layer_bits.values()) <= {0, 8}


def test_where_one_pass_is_best_the_network_is_a_static_one(tmp_path: Path) -> None:
    # 20 ms pay for all blocks at 8 bits, and not for the 0.1 ms of being unsure.
    made, told = converted("probe", 20 / 30)
    assert sum("one pass for all images is better" in text for text in told) == 1
    manifest = made.manifest
    assert manifest.dynamic.gate == "static" and manifest.table.passes == 1 and not manifest.dynamic.mirror
    assert set(manifest.table.layer_bits.values()) == {8}
    assert manifest.validation is not None and manifest.validation.cost == pytest.approx(20 / 30)
    assert manifest.configuration is not None and manifest.configuration.dynamic == manifest.dynamic
    dfs_cli.save(made, tmp_path / "model.safetensors")
    assert dfs_cli.load(tmp_path / "model.safetensors").manifest == manifest


def test_a_run_that_became_static_goes_on_as_such(tmp_path: Path) -> None:
    def run(checkpoint: Checkpoint) -> Converted:
        dynamic = DynamicConfig((0, 8), gate="probe")
        return convert(
            "resnet20_digits", 20 / 30, DATA, dynamic=dynamic, tuning=TUNING, costs=COSTS, checkpoint=checkpoint
        )

    path = tmp_path / "c"
    whole = run(Checkpoint(path, minutes=0.0))
    again = run(Checkpoint(path, resume=True))
    first, second = (made.manifest.replace(validation=None) for made in (whole, again))  # it has a speed, too
    assert first == second and first.dynamic.gate == "static"
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, again.network.state_dict()[name]), name


def test_report_and_profile_read_the_same_table() -> None:
    (_, manifest), _ = converted("probe", 0.5)
    report, evaluation = cost_report(manifest), manifest.validation
    assert evaluation is not None
    assert sum(row["mean_cost"] for row in layer_rows(manifest.table, evaluation)) == pytest.approx(evaluation.cost)
    assert report["cost_all_8_bit"] == 18 / 30 and report["unit"].startswith("ms, as a fraction")
    assert report["device"] == {
        "unit": "ms", "measured": True, "machine": {"processor": "abacus"}, "dense": 30.0, "static_int8": 18.0, "error": None,
    }  # fmt: skip
    text = render_markdown(report)
    assert "fraction of dense 32-bit in ms" in text and "processor abacus, measured" in text
    # Bit-weighted MACs stand beside it, as they are.
    assert 0 < report["gmacs_bitweighted"] < report["gmacs_dense"] / 8


def test_the_table_lies_in_the_file(tmp_path: Path) -> None:
    made, _ = converted("probe", 0.5)
    dfs_cli.save(made, tmp_path / "model.safetensors")
    loaded = dfs_cli.load(tmp_path / "model.safetensors")
    assert loaded.manifest == made.manifest
    device = loaded.manifest.table.device
    assert device is not None and device.measured and device.machine == {"processor": "abacus"}
    moved = dfs_cli.recalibrate(loaded, 0.49, DATA)
    assert moved.manifest.held_out is not None and moved.manifest.held_out.cost <= 0.49


def test_budgets_out_of_reach_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"smallest reachable one is 0\.0667"):
        convert("resnet20_digits", 0.05, DATA, dynamic=DynamicConfig((0, 8), gate="static"), tuning=TUNING, costs=COSTS)
    with pytest.raises(ConfigError, match="no option of 6 bits"):
        convert("resnet20_digits", 0.5, DATA, dynamic=DynamicConfig((0, 6), gate="static"), tuning=TUNING, costs=COSTS)


def test_without_images_the_cost_is_a_bound_in_that_unit() -> None:
    for gate in ("probe", "rnn"):
        made = convert(
            "resnet20_digits", 0.5, dfs_cli.SynthesisConfig("noise", images=32),
            dynamic=DynamicConfig((0, 8), gate=gate), tuning=TUNING.replace(batch_size=16), costs=COSTS,
        )  # fmt: skip
        assert made.manifest.bound is not None and made.manifest.bound <= 0.5 and made.keeps_budget
