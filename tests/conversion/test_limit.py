"""Conversions and tuned networks under a limit for every image, on the digits, with next to no tuning."""

import copy
from functools import cache
from pathlib import Path

import pytest
import torch
from common import spread_gate

import dfs_cli
from dfs_cli.checkpoint import Checkpoint
from dfs_cli.config import DataConfig, DynamicConfig, GateKind, TuningConfig
from dfs_cli.control.base import controller_of
from dfs_cli.conversion.converted import Converted
from dfs_cli.errors import ConfigError, OutputError
from dfs_cli.report.cost import evaluation_record

pytestmark = pytest.mark.medium

TUNING = TuningConfig(steps=3, batch_size=64, hflip=0.0, workers=0)
DATA = DataConfig(dataset="digits", num_samples=200)
MODEL = "resnet20_digits"
LIMIT = 0.045


@cache
def converted(gate: GateKind, limit: float | None = LIMIT) -> Converted:
    dynamic = DynamicConfig(gate=gate)
    return dfs_cli.convert(MODEL, 0.04, DATA, dynamic=dynamic, tuning=TUNING, limit=limit)


@pytest.mark.parametrize("gate", ["rnn", "probe", "static"])
def test_a_conversion_keeps_budget_and_limit_and_remembers_both(gate: GateKind, tmp_path: Path) -> None:
    network, manifest = converted(gate)
    assert manifest.validation is not None and manifest.validation.cost_max <= LIMIT
    assert manifest.keeps_limit is True and manifest.keeps_budget is True
    assert manifest.limit == LIMIT and manifest.configuration is not None and manifest.configuration.limit == LIMIT
    assert network.controller.limit == LIMIT and controller_of(network).largest_cost(manifest.table) <= LIMIT
    report = dfs_cli.cost_report(converted(gate))
    assert (report["limit"], report["keeps_limit"]) == (LIMIT, True)
    dfs_cli.save(converted(gate), tmp_path / "model.safetensors")
    loaded = dfs_cli.load(tmp_path / "model.safetensors")
    assert loaded.manifest == manifest and loaded.network.controller.limit == LIMIT
    images = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 4
    assert float(manifest.table.cost(loaded.network.run(images).decisions).max()) <= LIMIT


def test_a_limit_lowers_the_dearest_image_of_a_tuned_network_which_is_left_as_it_was() -> None:
    free = copy.deepcopy(converted("rnn", None))
    spread_gate(free.network)
    before = dfs_cli.evaluate(free, DATA)
    assert free.manifest.limit is None and free.manifest.keeps_limit is None and before.cost_p50 < before.cost_max
    low = controller_of(free.network).movable(free.manifest.table)[0]
    limit = (low + before.cost_max) / 2
    limited = dfs_cli.recalibrate(free, limit=limit)
    after = dfs_cli.evaluate(limited, DATA)
    assert after.cost_max <= limit < before.cost_max
    assert limited.network.controller.operating_point == free.network.controller.operating_point
    assert limited.manifest.budget == free.manifest.budget and limited.manifest.held_out is None
    assert limited.manifest.movable == (low, limit) and free.network.controller.limit == float("inf")
    record = evaluation_record(limited.manifest.replace(validation=after), after, 0.1)
    assert record["limit"] == limit and record["keeps_limit"] and record["cost_max"] == after.cost_max
    # Moved to a budget, it keeps the limit that it has; another one may be given with the budget.
    moved = dfs_cli.recalibrate(limited, 0.9 * limit, DATA)
    assert moved.manifest.limit == limit and dfs_cli.evaluate(moved, DATA).cost_max <= limit
    both = dfs_cli.recalibrate(limited, 0.04, DATA, limit=1.0)
    assert both.manifest.limit == 1.0 and both.manifest.budget == 0.04 and both.manifest.held_out is not None


def test_limits_that_cannot_be_kept_say_what_to_try() -> None:
    with pytest.raises(ConfigError, match=r"limit 0.0001 cannot be kept with options .*; pass --limit 0\.\d+ or more"):
        dfs_cli.convert(MODEL, 0.04, DATA, tuning=TUNING, limit=0.0001)
    with pytest.raises(ConfigError, match="limit -1 is not above 0"):
        dfs_cli.convert(MODEL, 0.04, DATA, tuning=TUNING, limit=-1.0)
    with pytest.raises(ConfigError, match=r"budget 0\.04 cannot be spent where no image may cost more than 0\.03"):
        dfs_cli.convert(MODEL, 0.04, DATA, tuning=TUNING, spend=True, limit=0.03)
    static = converted("static")
    assert static.manifest.validation is not None
    cost = static.manifest.validation.cost_max
    assert dfs_cli.recalibrate(static, limit=cost).manifest.limit == cost
    with pytest.raises(ConfigError, match="is below the cheapest that this network can decide for an image"):
        dfs_cli.recalibrate(static, limit=cost * 0.999)


def test_a_run_with_another_limit_is_another_run(tmp_path: Path) -> None:
    def begin(limit: float | None, resume: bool) -> Converted:
        checkpoint = Checkpoint(tmp_path / "c", resume)
        return dfs_cli.convert(
            MODEL, 0.04, DATA, dynamic=DynamicConfig(gate="ff"), tuning=TUNING, limit=limit, checkpoint=checkpoint
        )

    first = begin(LIMIT, resume=False)
    again = begin(LIMIT, resume=True)
    assert again.network.controller.limit == LIMIT
    assert again.manifest.validation is not None and first.manifest.validation is not None
    assert again.manifest.validation.choices == first.manifest.validation.choices
    with pytest.raises(OutputError, match="limit"):
        begin(None, resume=True)
