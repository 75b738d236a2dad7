import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dfs_cli.control.base import Ceiling
from dfs_cli.cost.decisions import NOT_RUN, Decisions
from dfs_cli.cost.device import DeviceCosts, read_costs
from dfs_cli.cost.layer import LayerCost
from dfs_cli.cost.table import CostTable
from dfs_cli.errors import ConfigError

WRITTEN: dict[str, Any] = {
    "model": "two blocks", "image_size": [3, 8, 8], "unit": "mJ", "measured": False, "machine": {"processor": "abacus"},
    "options": [0, 4, 8], "blocks": {"b": [0, 3, 4.0], "a": [0, 2, 2]}, "fixed": 1, "dense": 20, "static_int8": 7,
    "deciding": {"rnn": [[0.5, 0.25]], "probe": [[0, 0], [1, 0.5]]},
}  # fmt: skip
COSTS = DeviceCosts.from_dict(WRITTEN)
LAYERS = (LayerCost("stem", 200, bits=8), LayerCost("a", 100, 0), LayerCost("b", 400, 1))
PLANNED = CostTable((0, 4, 8), ("a", "b"), LAYERS, ((0, 0), (10, 20)))


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "costs.json"
    path.write_text(json.dumps(WRITTEN | changes))
    return path


def test_costs_are_read_as_they_were_written(tmp_path: Path) -> None:
    costs = read_costs(written(tmp_path))
    assert costs == COSTS and list(costs.blocks["b"]) == [0, 3, 4] and costs.error is None
    assert DeviceCosts.from_dict(json.loads(json.dumps(costs.to_dict()))) == costs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unit": ""}, "unit ''"),
        ({"dense": 0}, "dense 0"),
        ({"fixed": -1}, "fixed -1"),
        ({"fixed": "much"}, "fixed 'much'"),
        ({"blocks": {}}, "blocks"),
        ({"blocks": {"a": [0, 1]}}, "blocks.a: 2 costs for 3 options"),
        ({"blocks": {"a": [0, -1, 1]}}, "blocks.a.1 -1"),
        ({"options": [0, 8, 4]}, "ascending order"),
        ({"deciding": {"rnn": []}}, "deciding.rnn"),
        ({"deciding": {"lstm": [[0, 0]]}}, "lstm"),
        ({"energy": 1}, "energy"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=r"costs\.json") as raised:
        read_costs(written(tmp_path, **changes))
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_files_that_hold_no_costs(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    for text in ("[1, 2]", "{", '{"unit": NaN}', "{}"):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"costs\.json"):
            read_costs(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"costs\.json"):
        read_costs(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_costs(tmp_path)


def test_dominated_options_are_not_useful() -> None:
    # 4 bits cost 5 over both blocks, 8 bits 6.
    assert COSTS.useful((0, 4, 8)) == (0, 4, 8)
    dearer = COSTS.replace(blocks={"a": (0.0, 3.0, 2.0), "b": (0.0, 3.0, 4.0)})
    assert dearer.useful((0, 4, 8)) == (0, 8) and dearer.useful((0, 4)) == (0, 4)
    nearly = COSTS.replace(blocks={"a": (0.0, 2.0, 2.03), "b": (0.0, 3.0, 3.04)})
    assert nearly.useful((0, 4, 8)) == (0, 8)  # 1.4% more: within what times are off
    with pytest.raises(ConfigError, match="no option of 6 bits, only 0,4,8"):
        COSTS.useful((0, 6))


def test_a_table_on_a_device_by_hand() -> None:
    table = PLANNED.on_device(COSTS, "probe")
    # Blocks in the order of the network, as fractions of the dense 20 mJ; the second pass pays half a mJ for each that runs.
    by_hand = [0, 0.1, 0.1, 0, 0.15, 0.2, 0, 0.125, 0.125, 0, 0.175, 0.225]
    assert table.option_costs.flatten().tolist() == pytest.approx(by_hand)
    assert [table.fixed_layers_costs[-1], *table.controller_costs] == pytest.approx([0.05, 0, 0.05])
    assert (table.cheapest, table.dearest) == pytest.approx((0.05, 0.35 + 0.45))
    decisions = Decisions(torch.tensor([[[2, 1], [NOT_RUN, NOT_RUN]], [[2, 1], [0, 2]]]))
    assert table.cost(decisions).tolist() == pytest.approx([0.3, 0.3 + 0.1 + 0.225])
    assert table.uniform_cost(8) == 7 / 20 and table.uniform_cost(4) == pytest.approx(0.05 + 0.25)
    assert "mJ" in table.unit and "mJ" in table.scale and PLANNED.scale == "dense 32-bit"
    assert CostTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table


def test_what_runs_in_both_passes_costs_more_in_the_second() -> None:
    table = PLANNED.on_device(COSTS.replace(crowding=0.5), "probe")
    # Until the first pass is known, it may run all blocks.
    assert table.option_costs[0].flatten().tolist() == pytest.approx([0, 0.1, 0.1, 0, 0.15, 0.2])
    crowded, alone = [0, 0.175, 0.175], [0, 0.125, 0.125]
    assert table.option_costs[1].flatten().tolist() == pytest.approx([*crowded, 0, 0.25, 0.325])
    assert table.after(torch.tensor([1, 2])) == table
    after = table.after(torch.tensor([0, 2]))
    assert after.option_costs[1].flatten().tolist() == pytest.approx([*alone, 0, 0.25, 0.325])
    assert after.after(torch.tensor([2, 2])) == table and PLANNED.after(torch.tensor([0, 2])) == PLANNED
    assert CostTable.from_dict(json.loads(json.dumps(after.to_dict()))) == after
    with pytest.raises(ConfigError, match="another number of blocks than its first pass"):
        dataclasses.replace(after, first_runs=(True,))


def test_without_deciding_a_table_is_that_of_a_static_network() -> None:
    static = CostTable((0, 4, 8), ("a", "b"), LAYERS, ((0, 0),))
    after = PLANNED.on_device(COSTS, "probe").after(torch.tensor([0, 2]))
    assert after.without_deciding() == static.on_device(COSTS, "static")
    assert PLANNED.without_deciding() == static
    # Measured costs are no more exact than what a budget may be exceeded by.
    assert PLANNED.most_in_one_pass(0.5) == after.most_in_one_pass(0.5) == 0.5
    measured = PLANNED.on_device(COSTS.replace(measured=True), "probe")
    assert measured.most_in_one_pass(0.5) == pytest.approx(0.505)


def test_two_views_of_a_static_network_cost_both_passes_and_no_deciding() -> None:
    one = CostTable((0, 4, 8), ("a", "b"), LAYERS, ((0, 0),))
    two = dataclasses.replace(one, controller_macs=one.controller_macs * 2, compulsory_passes=2)
    alone, both = (table.on_device(COSTS.replace(crowding=0.0), "static") for table in (one, two))
    assert both.always == pytest.approx(2 * alone.always) and both.cheapest == pytest.approx(2 * alone.cheapest)
    assert both.dearest == pytest.approx(2 * alone.dearest) and list(both.controller_costs) == [0, 0]
    with pytest.raises(ConfigError, match="not those of one gate with 2 passes"):
        dataclasses.replace(both, compulsory_passes=1)


def test_a_static_network_decides_nothing() -> None:
    planned = CostTable((0, 8), ("a", "b"), LAYERS, ((0, 0),))
    table = planned.on_device(COSTS, "static")
    assert list(table.controller_costs) == [0] and table.device is not None and table.device.deciding == {}
    assert table.uniform_cost(8) == 0.35
    unknown = planned.on_device(COSTS.replace(static_int8=None), "static")
    assert unknown.uniform_cost(8) == pytest.approx(0.05 + 0.3)


def test_costs_of_another_network_are_refused() -> None:
    with pytest.raises(ConfigError, match="other blocks than the network's, which are a, b"):
        PLANNED.on_device(COSTS.replace(blocks={"a": (0.0, 1.0, 1.0)}), "probe")
    with pytest.raises(ConfigError, match="nothing about --gate ff, only about static, rnn, probe"):
        PLANNED.on_device(COSTS, "ff")
    with pytest.raises(ConfigError, match="2 passes"):
        PLANNED.on_device(COSTS, "rnn")
    with pytest.raises(ConfigError, match="all zero"):
        PLANNED.on_device(COSTS.replace(fixed=0.0, blocks=dict.fromkeys("ab", (0.0, 0.0, 0.0))), "probe")


def test_a_ceiling_counts_a_narrow_option_that_costs_more() -> None:
    dearer = COSTS.replace(blocks={"a": (0.0, 3.0, 2.0), "b": (0.0, 3.0, 4.0)})
    table, ceiling = CostTable((0, 4, 8), ("a", "b"), LAYERS, ((0, 0),)).on_device(dearer, "static"), Ceiling(2, 3)
    assert ceiling.cost(table, 0) == pytest.approx((1 + 3 + 4) / 20)
    ceiling.highest.copy_(torch.tensor([2, 0]))
    assert ceiling.cost(table, 0) == pytest.approx((1 + 3) / 20)
