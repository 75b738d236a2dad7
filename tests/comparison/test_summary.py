import csv
import io
from itertools import combinations
from typing import Any

import pytest
from rich.console import Console

from dfs_cli.comparison.summary import summarise, verdicts
from dfs_cli.report.sweep import plot_sweep, points_csv, print_sweep, verdict_line


def judged(results: dict[str, Any]) -> dict[str, Any]:
    """Results with summary and verdicts, as their file holds them."""
    return results | {"summary": summarise(results), "verdicts": verdicts(results)}


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
    dfs = next(row for row in summarise(RESULTS) if row["method"] == "dfs")
    assert dfs["top1"] == pytest.approx(88.2) and dfs["spread"] == pytest.approx(0.4) and dfs["seeds"] == 2
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
    print_sweep(console, judged(RESULTS))
    shown = console.export_text()
    assert "\u2026" not in shown
    for row in summarise(RESULTS):
        assert f"{row['cost']:.4f}" in shown and f"{row['top1']:.2f}" in shown
    assert verdicts({**RESULTS, "points": RESULTS["points"][2:]}) == []


def test_csv_and_plot_have_every_point() -> None:
    pytest.importorskip("matplotlib")
    rows = list(csv.DictReader(points_csv(RESULTS).splitlines()))
    assert len(rows) == 6 and rows[0]["method"] == "dfs" and float(rows[0]["cost"]) == 0.029
    axes = plot_sweep(judged(RESULTS)).axes[0]
    assert axes.get_xscale() == "log"
    labels = [t.get_text() for t in axes.texts]
    assert "dense 90.00" in labels and "5 bit" in labels and labels.count("0.03") == 3
    boxes = [t.get_window_extent() for t in axes.texts if t.get_text() != "dense 90.00"]
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    plot_sweep(judged({**RESULTS, "points": RESULTS["points"][2:]}))  # a sweep whose own networks all diverged
