import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from dfs_cli.cli.app import app
from dfs_cli.comparison.cascade import load_answers, save_answers
from dfs_cli.comparison.config import SweepConfig
from dfs_cli.comparison.intervals import right_answers
from dfs_cli.comparison.jobs import Job
from dfs_cli.comparison.results import answers_folder
from dfs_cli.comparison.summary import telling_budgets
from dfs_cli.comparison.sweep import sweep
from dfs_cli.comparison.tuner import least_sure
from dfs_cli.config import DataConfig, DynamicConfig
from dfs_cli.conversion.convert import convert
from dfs_cli.conversion.defaults import default_tuning
from dfs_cli.conversion.setup import hard_crops, prepare
from dfs_cli.errors import OutputError
from dfs_cli.observer import Observer

pytestmark = pytest.mark.medium


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


def assert_answers_are_those_of_top1(results: dict[str, Any]) -> None:
    for point in results["points"]:
        right = right_answers(point)
        assert right is not None and len(right) == results["images"]["validation"] and point["unreadable"] == []
        assert 100 * right.mean() == pytest.approx(point["top1"])


@pytest.mark.slow
def test_static_networks_of_two_views_pay_for_both_and_count(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    shown = sweep_digits(path, "--baselines", "uniform,mixed", "--views", "2")
    assert "uniform 8 bit, 2 views" in shown
    results = json.loads(path.read_text())
    costs = {
        views: {p["bits"]: p["cost"] for p in results["points"] if p["method"] == "uniform" and p["views"] == views}
        for views in (1, 2)
    }
    assert len(costs[1]) == 6 and costs[2] == pytest.approx({bits: 2 * cost for bits, cost in costs[1].items()})
    mixed = {p["views"]: p for p in results["points"] if p["method"] == "mixed"}
    assert all(0.04 < p["cost"] <= 0.05 for p in mixed.values()) and mixed[1]["layer_bits"] != mixed[2]["layer_bits"]
    assert len([row for row in results["summary"] if row["method"] == "uniform"]) == 12
    assert_answers_are_those_of_top1(results)


@pytest.mark.slow
def test_a_sweep_measures_every_method_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    shown = sweep_digits(path)
    assert "budget 0.05: DFS" in shown and "best baseline" in shown
    results = json.loads(path.read_text())
    methods = [p["method"] for p in results["points"]]
    assert {"dfs", "uniform", "mixed", "cascade"} <= set(methods) and methods.count("uniform") == 6
    assert {s["method"] for s in results["skipped"]} | set(methods) >= {"skipnet"}
    assert {p["steps"] for p in results["points"] if p["method"] != "skipnet"} == {3}
    assert {p["steps"] for p in results["points"]} <= {3, 6, 12, 24, 48}, "SkipNet's gate may need more"
    for p in results["points"]:
        assert {"method", "budget", "bits", "cost", "top1", "seed", "steps"} <= set(p)
    assert_answers_are_those_of_top1(results)
    cascade = next(p for p in results["points"] if p["method"] == "cascade")
    assert len(cascade["members"]) == 2 and 0 < cascade["second_share"] <= 1
    names = [Job.of(p).network for p in results["points"] if p["method"] in ("uniform", "mixed")]
    assert set(cascade["members"]) <= set(names) and isinstance(cascade["second_is_tuned_for_it"], bool)
    verdict = results["verdicts"][0]
    assert verdict["outcome"] in ("win", "draw", "loss") and verdict["interval"][0] <= verdict["difference"]
    assert all(row["top1_interval"] is not None for row in results["summary"]) and results["overall"] is None
    uniform = {p["bits"]: p["cost"] for p in results["points"] if p["method"] == "uniform"}
    assert uniform[8] == pytest.approx(1 / 16) and uniform[4] < 0.02
    mixed = next(p for p in results["points"] if p["method"] == "mixed")
    assert 0.04 < mixed["cost"] <= 0.05 and len(set(mixed["layer_bits"].values())) > 1
    assert (tmp_path / "s.csv").is_file() and (tmp_path / "s.png").is_file()

    # The first network of a sweep is tuned after the original was evaluated, a network of a later run is not.
    dfs = next(p for p in results["points"] if p["method"] == "dfs")
    results["points"] = [p for p in results["points"] if p["method"] not in ("dfs", "mixed")]
    path.write_text(json.dumps(results))
    kept = [p for p in results["points"] if p["method"] != "cascade"]
    sweep_digits(path)
    again = json.loads(path.read_text())["points"]
    assert [p["method"] for p in again][-2:] == ["dfs", "mixed"] and len(again) == len(methods)
    assert next(p for p in again if p["method"] == "cascade") == cascade, "of the same two networks as before"
    assert next(p for p in again if p["method"] == "mixed") == mixed, "a seed gives the same network again"
    assert next(p for p in again if p["method"] == "dfs") == dfs
    assert [p for p in again if p["method"] not in ("dfs", "mixed", "cascade")] == kept

    # Nor is one made of answers to different images.
    other = next(answers_folder(path).glob("uniform-*-seed-0.safetensors"))
    static = load_answers(other)
    rolled = static.validation._replace(targets=static.validation.targets.roll(1))
    save_answers(other, static._replace(validation=rolled))
    sweep_digits(path)
    assert json.loads(path.read_text())["points"] == again
    path.write_text(json.dumps({**results, "points": [p for p in again if p["method"] != "cascade"]}))
    sweep_digits(path)
    reasons = [s["reason"] for s in json.loads(path.read_text())["skipped"] if s["method"] == "cascade"]
    assert len(reasons) == 1 and "answered different images" in reasons[0]
    path.write_text(json.dumps({**results, "points": again}))

    # Without all answers no cascade is made, and none is given up.
    next(answers_folder(path).glob("uniform-*-seed-0.safetensors")).unlink()
    sweep_digits(path)
    assert json.loads(path.read_text())["points"] == again
    shutil.rmtree(answers_folder(path))
    results = json.loads(path.read_text())
    results["points"] = [p for p in again if p["method"] != "cascade"]
    path.write_text(json.dumps(results))
    results = json.loads(sweep_digits(path, "--json"))
    assert results == json.loads(path.read_text())
    assert any(
        s["method"] == "cascade" and "7 of 7 static networks are not in" in s["reason"] for s in results["skipped"]
    )
    assert results["verdicts"][0]["budget"] == 0.05 and len(results["summary"]) == 9


@pytest.mark.slow
def test_skipnet_is_tuned_until_that_gains_nothing_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    shown = sweep_digits(path, "--baselines", "skipnet", "--budgets", "0.6")
    skipnet = next(p for p in json.loads(path.read_text())["points"] if p["method"] == "skipnet")
    tried = skipnet["tried"]
    assert [(t["gate"], t["longer"], t["steps"]) for t in tried[:3]] == [("static", 1, 3), ("rnn", 1, 3), ("rnn", 2, 6)]
    found = [t["held_out_top1"] for t in tried]
    assert f"skipnet 0.6, top-1 on held-out images: static {found[0]:.2f} after 3 steps, gated {found[1]:.2f}" in shown
    assert skipnet["held_out_top1"] == max(found), "never below the static choice of skipped blocks"
    rounds = found[1:]
    assert all(later > earlier for earlier, later in pairwise(rounds[:-1])), "it stops at the first that gains nothing"
    assert rounds[-1] <= rounds[-2] or tried[-1]["longer"] == 16
    assert all(t["cost"] <= 0.6 * 1.02 for t in tried)

    results = json.loads(path.read_text())
    unfinished = skipnet | {"tried": tried[:2], "unfinished": True}
    results["points"] = [unfinished if p["method"] == "skipnet" else p for p in results["points"]]
    path.write_text(json.dumps(results))
    sweep_digits(path, "--baselines", "skipnet", "--budgets", "0.6")
    again = next(p for p in json.loads(path.read_text())["points"] if p["method"] == "skipnet")
    assert again["tried"] == tried and again["held_out_top1"] == skipnet["held_out_top1"]


@pytest.mark.slow
def test_the_static_choice_is_kept_where_no_gate_can_be_had(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    sweep_digits(path, "--baselines", "skipnet", "--budgets", "0.0125")
    skipnet = next(p for p in json.loads(path.read_text())["points"] if p["method"] == "skipnet")
    assert [t["gate"] for t in skipnet["tried"]] == ["static"] and skipnet["cost"] <= 0.0125
    assert "unfinished" not in skipnet


def test_what_a_network_is_least_sure_of_is_found() -> None:
    data = DataConfig(dataset="digits", num_samples=192)
    dynamic = DynamicConfig(bits=(3,), gate="static")
    setup = prepare("resnet20_digits", 1.0, data, dynamic, default_tuning(data))
    network, _ = convert("resnet20_digits", 1.0, data, dynamic=dynamic, tuning=default_tuning(data).replace(steps=1))
    chosen = least_sure(network, setup, 0.5, Observer()).indices
    assert len(chosen) == 96 and list(chosen) == sorted(set(chosen))
    shown = hard_crops(setup.splits.train, setup.preprocessing, setup.tuning)
    with torch.inference_mode():
        logits = network.run(torch.stack([shown[i][0] for i in range(192)])).logits  # type: ignore[misc]
    confidence = dict(zip(shown.indices, logits.double().softmax(dim=1).amax(dim=1).tolist(), strict=True))
    others = confidence.keys() - set(chosen)
    assert max(confidence[i] for i in chosen) <= min(confidence[i] for i in others)
    assert len(least_sure(network, setup, 0.01, Observer())) == 64, "a batch at least"


@pytest.mark.slow
def test_budgets_can_be_left_to_the_curve_of_static_networks_and_seeds_to_the_best_rivals(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    arguments = ["--budgets", "auto", "--baselines", "mixed,cascade", "--seeds", "2"]
    sweep_digits(path, *arguments)
    results = json.loads(path.read_text())
    budgets = telling_budgets(results)
    assert len(budgets) > 1 and [v["budget"] for v in results["verdicts"]] == list(budgets)
    for verdict in results["verdicts"]:
        assert verdict["dfs"]["seeds"] == 2
        assert verdict["best"] is None or verdict["best"]["seeds"] == 2
    again = [p for p in results["points"] if p["seed"] == 1 and p["method"] != "dfs"]
    assert again and len(again) < len([p for p in results["points"] if p["seed"] == 0 and p["method"] != "dfs"])
    sweep_digits(path, *arguments)
    assert json.loads(path.read_text()) == results


@pytest.mark.slow
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


@pytest.mark.slow
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
    arguments = ["sweep", "resnet20_digits", "--budgets", "0.4,0.015", "--fixed-bits", "32", "-o", str(path)]
    result = CliRunner().invoke(app, [*arguments, "--bits", "16,32"])
    assert result.exit_code == 2 and "budget 0.015" in result.stderr
    assert not path.exists()


def test_the_librarys_sweep_tunes_as_a_conversion_does_and_keeps_apart_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    data = DataConfig(dataset="digits", num_samples=192)
    tuning = default_tuning(data).replace(epochs=1)
    config = SweepConfig((0.05,), baselines=())
    results = sweep("resnet20_digits", config, str(path), data, tuning=tuning)
    assert results["tuning"]["batch_size"] == 64 and results["tuning"]["hflip"] == 0
    dynamic = results["dynamic"]["0.05"]
    assert tuple(dynamic["bits"]) == (0, 2, 3, 4, 5, 6, 8) and not dynamic["mirror"]
    converted = convert("resnet20_digits", 0.05, data, tuning=tuning)
    assert converted.manifest.validation is not None
    assert results["points"][0]["cost"] == converted.manifest.validation.cost
    assert_answers_are_those_of_top1(results)
    for budget, other in ((0.05, DynamicConfig((0, 4, 8), gate="rnn")), (0.03, DynamicConfig((0, 4, 8), fixed_bits=4))):
        of_budget = {budget: other}.__getitem__
        with pytest.raises(OutputError, match="other settings"):
            sweep("resnet20_digits", config.replace(budgets=(budget,)), path, data, tuning=tuning, dynamic=of_budget)
    with pytest.raises(OutputError, match="other settings"):
        sweep("resnet20_digits", config, path, data.replace(num_samples=100), tuning=tuning)


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


def test_a_sweep_in_which_nothing_could_be_tuned_says_so(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    shown = sweep_digits(path, "--baselines", "none", "--lr", "1e30")
    results = json.loads(path.read_text())
    assert results["points"] == [] and results["original"]["top1"] > 99
    assert "without dfs 0.05: the loss is" in shown
