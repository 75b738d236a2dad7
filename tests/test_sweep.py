import csv
import dataclasses
import io
import json
import shutil
from collections.abc import Callable
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_dynamic, preactivated_resnet, tiny_resnet
from dfs_cli.surgery.convert import plan_costs
from rich.console import Console
from timm.models.resnet import BasicBlock
from torch import nn
from typer.testing import CliRunner

from dfs_cli.cli.app import app
from dfs_cli.comparison.cascade import StaticNetwork, best_cascade, confident_answers
from dfs_cli.comparison.sweep import answers_folder, sweep
from dfs_cli.config import DataConfig, DynamicConfig, SweepConfig
from dfs_cli.control.static import best_layer_mix, best_static_mix, set_layer_bits
from dfs_cli.conversion.convert import convert
from dfs_cli.conversion.defaults import default_tuning
from dfs_cli.cost.table import CostTable, LayerCost
from dfs_cli.errors import ConfigError, OutputError
from dfs_cli.evaluation.dynamics import (
    choice_entropy,
    distinct_policies,
    most_common_policy,
    variance_between_images,
)
from dfs_cli.freeze.biases import round_biases
from dfs_cli.nn.layers import FractionalLayer
from dfs_cli.report.sweep import plot_sweep, points_csv, print_sweep, summarise, verdict_line, verdicts
from dfs_cli.tuning.sensitivity import measure_layer_damage

TWO_BLOCKS = CostTable((0, 8, 32), ("a", "b"), (LayerCost("a", 100, 0), LayerCost("b", 300, 1)), (0, 0), {})


def test_the_static_mix_is_the_best_of_all() -> None:
    table = plan_costs(tiny_resnet(BasicBlock), DynamicConfig(bits=(2, 4, 8, 32), edge_bits=2), (3, 32, 32))
    damage = torch.rand(5, 4, generator=torch.Generator().manual_seed(3)).sort(dim=1, descending=True).values
    for cost in (0.005, 0.02, 0.1, 0.5):
        found = best_static_mix(table, damage, cost)
        affordable = {
            mix: sum(damage[i, k].item() for i, k in enumerate(mix))
            for mix in product(range(4), repeat=5)
            if table.edges_cost + sum(table.prices[i, k].item() for i, k in enumerate(mix)) <= cost
        }
        assert sum(damage[i, k].item() for i, k in enumerate(found.tolist())) == pytest.approx(min(affordable.values()))
        assert tuple(found.tolist()) in affordable
    with pytest.raises(ConfigError, match="no static mix"):
        best_static_mix(table, damage, 0.0001)


def test_the_layer_mix_is_the_best_of_all_and_may_skip_blocks() -> None:
    layers = [
        LayerCost("stem", 50, bits=8),
        *(LayerCost(f"{b}{i}", 100 + 30 * i, b) for b, i in product((0, 1), (0, 1, 2))),
    ]
    table = CostTable((0, 2, 4, 8, 32), ("a", "b"), tuple(layers), (0, 0), {}, passes=2)
    generator = torch.Generator().manual_seed(1)
    damage = torch.rand(6, 5, generator=generator).sort(dim=1, descending=True).values
    damage[:, 0] = torch.inf
    skips = []
    for cost, skipping in product((0.008, 0.02, 0.1, 0.5), (torch.tensor([9.0, 0.5]), torch.tensor([9.0, 9.0]))):
        found = best_layer_mix(table, damage, skipping, cost)
        assert float(table.with_layer_bits(found).cost(torch.zeros(1, 2, dtype=torch.long))) <= cost
        of_block = [[(0, 0, 0), *product(range(1, 5), repeat=3)] for _ in range(2)]

        def harm(mix: tuple[int, ...], skipping: torch.Tensor = skipping) -> float:
            per_block = (mix[:3], mix[3:])
            return sum(
                float(skipping[b]) if not any(own) else sum(float(damage[3 * b + i, k]) for i, k in enumerate(own))
                for b, own in enumerate(per_block)
            )

        prices = [[layer.macs / table.dense_macs * (bits / 32) ** 2 for bits in table.options] for layer in layers[1:]]
        least = min(
            harm(a + b)
            for a, b in product(*of_block)
            if table.edges_cost + sum(prices[i][k] for i, k in enumerate(a + b)) <= cost
        )
        assert harm(tuple(table.options.index(found[layer.name]) for layer in layers[1:])) == pytest.approx(least)
        skips.append(found["10"] == 0)
    assert any(skips) and not all(skips)
    with pytest.raises(ConfigError, match="no static mix"):
        best_layer_mix(table, damage, torch.ones(2), 0.0001)


@pytest.mark.parametrize("create", [tiny_resnet, preactivated_resnet])
def test_layers_may_have_bitwidths_of_their_own(create: Callable[[], nn.Module]) -> None:
    model, config = create(), DynamicConfig(bits=(0, 4, 8, 32), gate="rnn")
    network, table = make_dynamic(model, config), plan_costs(model, config, (3, 32, 32))
    names = [layer.name for layer in table.layers if layer.block is not None]
    images = torch.randn(4, 3, 32, 32)

    def logits(option: int) -> torch.Tensor:
        return network.run(images, torch.full((4, len(network.blocks)), option)).logits

    with torch.no_grad():
        at_8, in_full = logits(2), network.run_in_full(images)
        set_layer_bits(network, dict.fromkeys(names, 8))
        assert torch.equal(logits(3), at_8) and torch.equal(network.run_in_full(images), in_full)
        costs = table.with_layer_bits(dict.fromkeys(names, 8)).cost(torch.zeros(1, len(table.blocks), dtype=torch.long))
        assert float(costs) == pytest.approx(float(table.cost(torch.full((1, len(table.blocks)), 2))))
        # Blocks that a mix leaves out may be run all the same, when something is measured.
        set_layer_bits(network, {name: 0 if name.startswith(network.blocks[-1].name) else 8 for name in names})
        assert torch.equal(logits(2), at_8)
        round_biases(network, (3, 32, 32))
        set_layer_bits(network, {})
        at_8, in_full = logits(2), network.run_in_full(images)
        set_layer_bits(network, {names[0]: 4})
        first = network.backbone.get_submodule(names[0])
        assert isinstance(first, FractionalLayer) and first.precision.bits == 4
        assert not torch.equal(logits(3), in_full)
        set_layer_bits(network, {})
        assert torch.equal(logits(2), at_8)

    damage, skipping = measure_layer_damage(network, table, images)
    assert damage.shape == (len(names), 4) and skipping.shape == (len(table.blocks),)
    assert (damage[:, 0] == torch.inf).all() and (damage[:, -1] == 0).all() and (skipping > 0).all()
    assert damage[:, 1].mean() > damage[:, 2].mean() > 0
    assert torch.equal(logits(2), at_8)


def test_dynamics_by_hand() -> None:
    decisions = torch.tensor([[0, 1], [0, 1], [2, 1], [2, 2]])
    assert distinct_policies(decisions) == 3
    assert most_common_policy(decisions).tolist() == [0, 1]
    # Block a: two halves, one bit; block b: 3 to 1.
    entropy = -(0.75 * torch.tensor(0.75).log2() + 0.25 * torch.tensor(0.25).log2()).item()
    assert choice_entropy(decisions) == pytest.approx((1 + entropy) / 2)
    prices = TWO_BLOCKS.prices
    costs = torch.stack([prices[[0, 1], row] for row in decisions])
    expected = (costs.mean(1).var(correction=0) / costs.var(correction=0)).item()
    assert variance_between_images(TWO_BLOCKS, decisions) == pytest.approx(expected)
    assert variance_between_images(TWO_BLOCKS, decisions[:1].repeat(4, 1)) == 0


def test_a_cascade_by_hand() -> None:
    # The cheap network is wrong, and unsure, on the last of four images; the dear one is always right.
    targets = torch.tensor([0, 1, 0, 1])
    cheap = torch.tensor([[5.0, 0.0], [0.0, 4.0], [3.0, 0.0], [0.2, 0.0]])
    dear = torch.tensor([[5.0, 0.0], [0.0, 5.0], [5.0, 0.0], [0.0, 5.0]])
    many = [t.repeat(1000, 1) for t in (cheap, dear)]
    cheap, dear = (confident_answers(logits.split(700)) for logits in many)
    networks = [StaticNetwork(0.01, cheap, cheap), StaticNetwork(0.04, dear, dear)]
    found = best_cascade(networks, 0.023, targets.repeat(1000), targets.repeat(1000))
    assert found is not None and (found.cheap, found.dear) == (0, 1)
    assert found.top1 == 100 and found.share == 0.25 and found.cost == pytest.approx(0.02)
    assert best_cascade(networks, 0.009, targets.repeat(1000), targets.repeat(1000)) is None


def point(method: str, cost: float, top1: float, **kwargs: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"budget": None, "bits": None, "seed": 0, "steps": 10, "top5": 99.0}
    return {"method": method, "cost": cost, "top1": top1, **values, **kwargs}


DYNAMICS = {"policies": 3, "common_top1": 80.0, "common_cost": 0.02}
RESULTS: dict[str, Any] = {
    "model": "net",
    "original": {"top1": 90.0, "top5": 99.0},
    "skipped": [],
    "points": [
        point("dfs", 0.029, 88.0, budget=0.03, dynamics=DYNAMICS),
        point("dfs", 0.0285, 88.4, budget=0.03, seed=1, dynamics=DYNAMICS),
        point("uniform", 0.0244, 87.5, bits=5),
        point("uniform", 0.0626, 90.0, bits=8),
        point("mixed", 0.0299, 87.9, budget=0.03),
        point("cascade", 0.0295, 88.5, budget=0.03, members=["uniform 4 bit", "uniform 6 bit"]),
    ],
}


def test_the_verdict_counts_baselines_up_to_the_budget_and_says_when_one_wins() -> None:
    own = next(row for row in summarise(RESULTS) if row["method"] == "dfs")
    assert own["top1"] == pytest.approx(88.2) and own["spread"] == pytest.approx(0.4) and own["seeds"] == 2
    (verdict,) = verdicts(RESULTS)
    assert verdict["best"]["method"] == "cascade" and verdict["difference"] == pytest.approx(-0.3)
    assert verdict["best_static"]["method"] == "mixed" and verdict["difference_to_static"] == pytest.approx(0.3)
    line = verdict_line(verdict)
    assert "(mean of 2 seeds)" in line and "(4 bit + 6 bit) 88.50 at 0.0295: DFS loses by 0.30" in line
    assert line.endswith("best static one mixed 87.90 at 0.0299: DFS wins by 0.30")
    equal = {
        **RESULTS,
        "points": [point("dfs", 0.02, 88.0, budget=0.03), point("mixed", 0.02, 88.0 - 1e-9, budget=0.03)],
    }
    assert verdict_line(verdicts(equal)[0]).endswith("DFS draws")
    tied = [point("mixed", 0.029, 88.0 + 1e-7, budget=0.03), point("uniform", 0.01, 88.0, bits=3)]
    (verdict,) = verdicts({**RESULTS, "points": [*RESULTS["points"][:1], *tied]})
    assert verdict["best"]["bits"] == 3, "of equally accurate ones the cheapest"
    alone = {**RESULTS, "points": RESULTS["points"][:1]}
    assert "no baseline" in verdict_line(verdicts(alone)[0])


def test_the_table_keeps_its_figures_on_narrow_terminals() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    print_sweep(console, RESULTS)
    shown = console.export_text()
    assert "\u2026" not in shown
    for row in summarise(RESULTS):
        assert f"{row['cost']:.4f}" in shown and f"{row['top1']:.2f}" in shown
    assert verdicts({**RESULTS, "points": RESULTS["points"][2:]}) == []


def test_csv_and_plot_have_every_point() -> None:
    pytest.importorskip("matplotlib")
    rows = list(csv.DictReader(points_csv(RESULTS).splitlines()))
    assert len(rows) == 6 and rows[0]["method"] == "dfs" and float(rows[0]["cost"]) == 0.029
    axes = plot_sweep(RESULTS).axes[0]
    assert axes.get_xscale() == "log"
    labels = [t.get_text() for t in axes.texts]
    assert "dense 90.00" in labels and "5 bit" in labels and labels.count("0.03") == 3
    boxes = [t.get_window_extent() for t in axes.texts if t.get_text() != "dense 90.00"]
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    plot_sweep({**RESULTS, "points": RESULTS["points"][2:]})  # a sweep whose own networks all diverged


def test_settings_are_checked() -> None:
    for kwargs in ({"budgets": ()}, {"budgets": (0.1, 0.1)}, {"budgets": (0.1,), "seeds": 0}):
        with pytest.raises(ConfigError):
            SweepConfig(**kwargs)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="'unifrom' is not one of"):
        SweepConfig((0.1,), baselines=("unifrom",))  # type: ignore[arg-type]


def sweep_digits(path: Path, *more: str) -> str:
    arguments = [
        "sweep",
        "resnet20_digits",
        "--budgets",
        "0.05",
        "--epochs",
        "1",
        "--num-samples",
        "192",
        "-o",
        str(path),
        *more,
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_sweep_measures_every_method_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    shown = sweep_digits(path)
    assert "budget 0.05: DFS" in shown and "best baseline" in shown
    results = json.loads(path.read_text())
    methods = [p["method"] for p in results["points"]]
    assert {"dfs", "uniform", "mixed", "cascade"} <= set(methods) and methods.count("uniform") == 6
    assert {s["method"] for s in results["skipped"]} | set(methods) >= {"skipnet"}
    steps = {p["steps"] for p in results["points"]}
    assert steps == {3}
    for p in results["points"]:
        assert {"method", "budget", "bits", "cost", "top1", "seed", "steps"} <= set(p)
    uniform = {p["bits"]: p["cost"] for p in results["points"] if p["method"] == "uniform"}
    assert uniform[8] == pytest.approx(1 / 16) and uniform[4] < 0.02
    mixed = next(p for p in results["points"] if p["method"] == "mixed")
    assert 0.04 < mixed["cost"] <= 0.05 and len(set(mixed["layer_bits"].values())) > 1
    assert (tmp_path / "s.csv").is_file() and (tmp_path / "s.png").is_file()

    # The first network of a sweep is tuned after the original was evaluated, a network of a later run is not.
    own = next(p for p in results["points"] if p["method"] == "dfs")
    results["points"] = [p for p in results["points"] if p["method"] not in ("dfs", "mixed")]
    path.write_text(json.dumps(results))
    kept = [p for p in results["points"] if p["method"] != "cascade"]
    sweep_digits(path)
    again = json.loads(path.read_text())["points"]
    assert [p["method"] for p in again][-3:] == ["dfs", "mixed", "cascade"] and len(again) == len(methods)
    assert next(p for p in again if p["method"] == "mixed") == mixed, "a seed gives the same network again"
    assert next(p for p in again if p["method"] == "dfs") == own
    assert [p for p in again if p["method"] not in ("dfs", "mixed", "cascade")] == kept

    # Without all answers no cascade is made, and none is given up.
    next(answers_folder(path).glob("uniform-*")).unlink()
    sweep_digits(path)
    assert json.loads(path.read_text())["points"] == again
    shutil.rmtree(answers_folder(path))
    results = json.loads(path.read_text())
    results["points"] = [p for p in again if p["method"] != "cascade"]
    path.write_text(json.dumps(results))
    results = json.loads(sweep_digits(path, "--json"))
    assert results == json.loads(path.read_text())
    assert any(s["method"] == "cascade" and "answers of 7 static networks" in s["reason"] for s in results["skipped"])
    assert results["verdicts"][0]["budget"] == 0.05 and len(results["summary"]) == 9


def test_nothing_is_deleted_before_the_settings_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    sweep_digits(path, "--baselines", "none")
    kept = path.read_text()
    answers_folder(path).mkdir()
    arguments = ["sweep", "resnet20_digits", "--force", "-o", str(path)]
    for wrong in (["--budgets", "0.0001"], ["--data", str(tmp_path / "nowhere")]):
        assert CliRunner().invoke(app, [*arguments, *wrong]).exit_code == 2
        assert path.read_text() == kept and answers_folder(path).is_dir()
    sweep_digits(path, "--baselines", "none", "--force")
    assert not answers_folder(path).exists() and path.is_file()


def test_budgets_can_be_added_to_a_sweep(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    sweep_digits(path, "--baselines", "none")
    first = json.loads(path.read_text())["points"]
    arguments = ["--budgets", "0.1", "--baselines", "none"]
    sweep_digits(path, *arguments)
    points = json.loads(path.read_text())["points"]
    assert points[:1] == first and [p["budget"] for p in points] == [0.05, 0.1]


def test_what_cannot_be_reached_is_said_before_anything_is_tuned(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    arguments = ["sweep", "resnet20_digits", "--budgets", "0.4,0.015", "--edge-bits", "32", "-o", str(path)]
    result = CliRunner().invoke(app, [*arguments, "--bits", "16,32"])
    assert result.exit_code == 2 and "budget 0.015" in result.stderr
    assert not path.exists()


def test_the_librarys_sweep_tunes_as_a_conversion_does_and_keeps_apart_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    data = DataConfig(dataset="digits", num_samples=192)
    tuning = dataclasses.replace(default_tuning(data), epochs=1)
    config = SweepConfig((0.05,), baselines=())
    results = sweep("resnet20_digits", config, str(path), data, tuning=tuning)
    assert results["tuning"]["batch_size"] == 64 and results["tuning"]["hflip"] == 0
    dynamic = results["dynamic"]["0.05"]
    assert tuple(dynamic["bits"]) == (0, 2, 3, 4, 5, 6, 8) and not dynamic["mirror"]
    converted = convert("resnet20_digits", 0.05, data, tuning=tuning)
    assert converted.manifest.validation is not None
    assert results["points"][0]["cost"] == converted.manifest.validation.cost
    for other in (
        SweepConfig((0.05,), baselines=(), dynamic={0.05: DynamicConfig((0, 4, 8), gate="rnn")}),
        SweepConfig((0.03,), baselines=(), dynamic={0.03: DynamicConfig((0, 4, 8), edge_bits=4)}),
    ):
        with pytest.raises(OutputError, match="other settings"):
            sweep("resnet20_digits", other, path, data, tuning=tuning)
    with pytest.raises(OutputError, match="other settings"):
        sweep("resnet20_digits", config, path, dataclasses.replace(data, num_samples=100), tuning=tuning)


def test_a_sweep_of_other_settings_is_not_mixed_in(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    sweep_digits(path, "--baselines", "none")
    arguments = [
        "sweep",
        "resnet20_digits",
        "--budgets",
        "0.05",
        "--epochs",
        "2",
        "--baselines",
        "none",
        "-o",
        str(path),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "other settings" in result.stderr
    path.write_text("[]")
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "not the result of a sweep" in result.stderr
