"""The way through a conversion, on the digits, with next to no tuning."""

import math
import random
from functools import cache

import pytest
import torch
from torch.utils.data import TensorDataset

from dfs_cli.config import Configuration, DataConfig, DynamicConfig, GateKind, TuningConfig
from dfs_cli.control.base import controller_of
from dfs_cli.conversion.convert import run
from dfs_cli.conversion.converted import Converted
from dfs_cli.conversion.recalibrate import recalibrate
from dfs_cli.conversion.setup import hard_crops, prepare
from dfs_cli.conversion.stages import held_out_images, own_generators
from dfs_cli.cost.decisions import Decisions
from dfs_cli.cost.table import CostTable
from dfs_cli.data.images import Images, UnreadableLog
from dfs_cli.data.splits import Splits
from dfs_cli.errors import ConfigError, DataError
from dfs_cli.observer import Observer
from dfs_cli.records import StepRecord

TUNING = TuningConfig(steps=3, batch_size=64, hflip=0.0, workers=0)
DATA = DataConfig(dataset="digits", num_samples=200)
MODEL = "resnet20_digits"


class Log(Observer):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.steps: list[StepRecord] = []
        self.tried_costs: list[float] = []
        self.tables: list[CostTable] = []

    def configured(self, configuration: Configuration, table: CostTable) -> None:  # noqa: ARG002
        self.tables.append(table)

    def stage(self, name: str, total: int | None) -> None:  # noqa: ARG002
        self.told.append(name)

    def step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def tried(self, value: float, cost: float) -> None:  # noqa: ARG002
        self.tried_costs.append(cost)


@cache
def converted(gate: GateKind, budget: float = 0.04) -> tuple[Converted, Log]:
    log = Log()
    dynamic = DynamicConfig(gate=gate)
    return run(prepare(MODEL, budget, DATA, dynamic=dynamic, tuning=TUNING), log), log


def test_everything_is_resolved_before_anything_runs() -> None:
    setup = prepare(MODEL, 0.04, DataConfig(num_samples=200), tuning=TuningConfig(hflip=0.5), spend=True)
    assert setup.architecture == MODEL and setup.source.weights == "resnet20_digits.sklearn"
    assert setup.dynamic == DynamicConfig(mirror=True)
    assert setup.data is not None and setup.data.dataset == "digits"
    sizes = {name: len(getattr(setup.splits, name)) for name in ("train", "calibration", "validation")}
    assert setup.configuration.images == sizes and max(sizes.values()) <= 200
    assert (setup.request.held_out, setup.request.images) == (sizes["calibration"], sizes["validation"])
    assert setup.steps_per_epoch == sizes["train"] // 128 and setup.tuning.workers == 0
    assert setup.steps == setup.configuration.steps == setup.tuning.total_steps(setup.steps_per_epoch)
    assert Configuration.from_dict(setup.configuration.to_dict()) == setup.configuration
    small = prepare(MODEL, 0.04, DATA, tuning=TUNING.replace(batch_size=1000))
    assert small.tuning.batch_size == len(small.splits.train) and small.steps_per_epoch == 1


@pytest.mark.parametrize(
    ("budget", "spend", "message"),
    [(0.0, False, r"\(0, 1\]"), (0.00001, False, "smallest reachable one"), (0.9, True, "cannot be spent")],
)
def test_budgets_are_checked_before_data_is_opened(budget: float, spend: bool, message: str) -> None:
    nowhere = DataConfig(data_dir="/does/not/exist")
    with pytest.raises(ConfigError, match=message):
        prepare(MODEL, budget, nowhere, dynamic=DynamicConfig(), spend=spend)
    with pytest.raises(DataError, match="does not exist"):
        prepare(MODEL, 0.1, nowhere, dynamic=DynamicConfig())


def test_splits_of_other_classes_are_refused() -> None:
    images = Images(TensorDataset(torch.zeros(8, 1, 8, 8), torch.arange(8) % 3))
    with pytest.raises(DataError, match="3 classes"):
        prepare(MODEL, 0.1, Splits(images, images, images, ("a", "b", "c")))


@pytest.mark.medium
@pytest.mark.parametrize("gate", ["probe", *(pytest.param(gate, marks=pytest.mark.slow) for gate in ("static", "rnn"))])
def test_a_conversion_tells_what_it_does_and_keeps_the_budget(gate: GateKind) -> None:
    (network, manifest), log = converted(gate)
    expected = ["loading held-out images", "measuring", "original", "tuning", "loading held-out images"]
    assert log.told == [*expected, "setting the operating point", "validation"]
    assert [record.step for record in log.steps] == [1, 2, 3]
    assert log.tried_costs and len(log.tables) == 1
    assert manifest.validation is not None and manifest.held_out is not None and manifest.source.top1 is not None
    assert manifest.keeps_budget and manifest.validation.cost <= 1.01 * 0.04
    assert manifest.held_out.cost <= 0.04 and network.controller.operating_point == manifest.operating_point
    assert not network.training
    # Of a static network the table says what was chosen for each layer.
    assert bool(manifest.table.layer_bits) == (gate == "static")
    assert log.tables[0].layer_bits == {}


@pytest.mark.medium
def test_a_static_network_costs_what_its_table_says() -> None:
    (network, manifest), _ = converted("static")
    decisions = network.run(torch.rand(3, 1, 8, 8)).decisions
    cost = manifest.table.cost(decisions)
    assert manifest.validation is not None and manifest.held_out is not None
    assert cost.tolist() == pytest.approx([manifest.validation.cost] * 3)
    assert manifest.validation.cost_max == pytest.approx(manifest.validation.cost)
    assert manifest.held_out.cost == pytest.approx(manifest.validation.cost)
    assert manifest.validation.dynamics.policies == 1
    low, high = controller_of(network).movable(manifest.table)
    assert low == high == pytest.approx(manifest.validation.cost)


@pytest.mark.medium
def test_a_tuned_network_moves_to_other_budgets_and_is_left_as_it_was() -> None:
    original, _ = converted("probe")
    before = original.network.controller.operating_point
    low, high = controller_of(original.network).movable(original.manifest.table)
    for budget, spend in ((1.1 * low, True), (1.3 * low, True), (1.3 * low, False)):
        moved = recalibrate(original, budget, DATA, spend=spend)
        assert moved.manifest.budget == budget and moved.manifest.spend == spend
        assert moved.manifest.validation is None and moved.keeps_budget is None
        assert moved.manifest.held_out is not None
        least = 0.9 * budget if spend else low
        assert least * (1 - 1e-9) <= moved.manifest.held_out.cost <= budget
        assert moved.network.controller.operating_point == moved.manifest.operating_point
    assert original.network.controller.operating_point == before
    with pytest.raises(ConfigError, match=f"can be moved to: {math.ceil(1e4 * low) / 1e4:.4f} to {high:.4f}"):
        recalibrate(original, 0.9 * low, DATA)
    with pytest.raises(ConfigError, match="can be moved to"):
        recalibrate(original, 1.0, DATA, spend=True)
    assert recalibrate(original, 1.0, DATA).manifest.budget == 1.0, "it need not be spent"


@pytest.mark.medium
def test_held_out_images_themselves_will_do() -> None:
    original, _ = converted("static")
    low, _ = controller_of(original.network).movable(original.manifest.table)
    pixels = torch.rand(6, 1, 8, 8)
    images = Images(TensorDataset(pixels, torch.arange(6)))
    moved = recalibrate(original, 2 * low, images)
    assert moved.manifest.held_out is not None and moved.manifest.held_out.cost == pytest.approx(low)
    with torch.no_grad():
        answers = original.network(pixels).argmax(dim=1)
    assert moved.manifest.held_out.top1 == pytest.approx(100 * (answers == torch.arange(6)).double().mean().item())


def test_hard_crops_are_the_same_at_every_call_and_those_of_the_seed() -> None:
    setup = prepare(MODEL, 0.1, DATA, tuning=TUNING)
    held_out = setup.splits.calibration

    def shown(tuning: TuningConfig, use_hard_crops: bool) -> torch.Tensor:
        log = UnreadableLog("held-out", len(held_out))
        arguments = (setup.preprocessing, tuning, 0, torch.device("cpu"), log, Observer())
        found = held_out_images(held_out, use_hard_crops, *arguments)
        assert len(found) == len(held_out) and found.targets is not None
        return torch.cat(list(found.batches))

    assert torch.equal(shown(TUNING, True), shown(TUNING, True))
    assert not torch.equal(shown(TUNING, True), shown(TUNING.replace(seed=1), True))
    assert not torch.equal(shown(TUNING, True), shown(TUNING, False))
    plain = Images(TensorDataset(torch.zeros(2, 1, 8, 8), torch.zeros(2)))
    assert hard_crops(plain, setup.preprocessing, TUNING) is plain, "without a transform there is nothing to crop"


def test_the_callers_generators_are_left_as_they_were() -> None:
    random.seed(3)
    torch.manual_seed(3)
    expected = random.random(), torch.rand(1).item()
    random.seed(3)
    torch.manual_seed(3)
    drawn = []
    for _ in range(2):
        with own_generators(7):
            drawn.append((random.random(), torch.rand(1).item()))
    assert drawn[0] == drawn[1] != expected
    assert (random.random(), torch.rand(1).item()) == expected


@pytest.mark.medium
def test_one_policy_for_all_has_one_pass() -> None:
    (network, _), _ = converted("probe")
    policy = torch.zeros(9, dtype=torch.long)
    assert network.run(torch.rand(2, 1, 8, 8), Decisions.alike(policy, 2)).decisions.passes == 1
