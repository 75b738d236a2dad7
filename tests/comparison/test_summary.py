import csv
import io
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from dfs_cli.comparison.intervals import answers_record
from dfs_cli.comparison.summary import overall, rivals, summarise, telling_budgets, verdicts
from dfs_cli.report.sweep import overall_line, plot_sweep, points_csv, print_sweep, verdict_line

IMAGES = 10_000


def judged(results: dict[str, Any]) -> dict[str, Any]:
    """Results with summary and verdicts, as their file holds them."""
    return results | {"summary": summarise(results), "verdicts": verdicts(results), "overall": overall([results])}


def point(method: str, cost: float, top1: float, **kwargs: Any) -> dict[str, Any]:
    """A network that answers the first images right, and no others."""
    values: dict[str, Any] = {"budget": None, "bits": None, "views": 1, "seed": 0, "steps": 10, "top5": 99.0}
    values["held_out_top1"] = top1
    answers = answers_record(np.arange(IMAGES) < round(top1 * IMAGES / 100), [])
    return {"method": method, "cost": cost, "top1": top1, **values, **answers, **kwargs}


def without_answers(results: dict[str, Any]) -> dict[str, Any]:
    return {**results, "points": [{k: v for k, v in p.items() if k != "right"} for p in results["points"]]}


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
    # 10 images are right in the one method alone, 40 in half of the seeds: a standard error of 0.045 points.
    assert verdict["outcome"] == "loss" and verdict["interval"] == pytest.approx([-0.39, -0.21], abs=0.02)
    assert verdict["outcome_to_static"] == "win"
    assert verdict["interval_to_static"] == pytest.approx([0.21, 0.39], abs=0.02)
    line = verdict_line(verdict)
    assert "(mean of 2 seeds)" in line and "(4 bit + 6 bit) 88.50 at 0.0295: DFS loses by 0.30 (95%: 0.2" in line
    assert "best static one mixed 87.90 at 0.0299: DFS wins by 0.30 (95%: 0.2" in line
    equal = {
        **RESULTS,
        "points": [point("dfs", 0.02, 88.0, budget=0.03), point("mixed", 0.02, 88.0 - 1e-9, budget=0.03)],
    }
    (verdict,) = verdicts(equal)
    assert verdict["outcome"] == "draw" and verdict["interval"] == pytest.approx([-0.03, 0.03], abs=0.01)
    assert ": draw: +0.00 (95%: -0.03 to 0.03)" in verdict_line(verdict)
    tied = [point("mixed", 0.029, 88.0 + 1e-7, budget=0.03), point("uniform", 0.01, 88.0, bits=3)]
    (verdict,) = verdicts({**RESULTS, "points": [*RESULTS["points"][:1], *tied]})
    assert verdict["best"]["bits"] == 3, "of equally accurate ones the cheapest"
    alone = {**RESULTS, "points": RESULTS["points"][:1]}
    assert "no baseline" in verdict_line(verdicts(alone)[0])


def test_without_answers_nobody_wins() -> None:
    for results in (without_answers(RESULTS), {**RESULTS, "points": [*RESULTS["points"][:5], cascade_of_others()]}):
        (verdict,) = verdicts(results)
        assert verdict["best"]["method"] == "cascade" and verdict["difference"] == pytest.approx(-0.3)
        assert verdict["interval"] is None and verdict["outcome"] is None
        line = verdict_line(verdict)
        assert "difference -0.30, which may be chance (no interval" in line and "loses" not in line
    console = Console(width=80, record=True, file=io.StringIO())
    print_sweep(console, judged(without_answers(RESULTS)))
    assert "wins" not in console.export_text()


def cascade_of_others() -> dict[str, Any]:
    return {**RESULTS["points"][5], "unreadable": ["a.jpg"]}


def test_the_mean_over_budgets_is_surer_than_one_of_them() -> None:
    rng = np.random.default_rng(0)

    def results(budgets: tuple[float, ...]) -> dict[str, Any]:
        """DFS is wrong on 50 of 1,000 images, others at each budget; of equal baselines, wrong on 70, the cheapest counts."""
        found = []
        for budget in budgets:
            place = rng.permutation(1000)
            right = {"dfs": place >= 50, "mixed": ~((place >= 50) & (place < 120))}
            for method, answers in right.items():
                top1 = 100 * float(answers.mean())
                found.append(point(method, budget, top1, budget=budget) | answers_record(answers, []))
        return {**RESULTS, "points": found}

    one = results((0.03,))
    assert overall([one]) is None and overall([without_answers(RESULTS)]) is None
    four = results((0.4, 0.1, 0.03, 0.015))
    mean = overall([four])
    assert mean is not None and mean["budgets"] == 4 and mean["difference"] == pytest.approx(2.0)
    single = [verdict["interval"] for verdict in verdicts(four)]
    assert mean["outcome"] == "win" and {verdict["outcome"] for verdict in verdicts(four)} == {"draw"}
    # Its answers are in all four differences, so that the mean is not twice as sure.
    assert 0.5 < (mean["interval"][1] - mean["interval"][0]) / min(high - low for low, high in single) < 0.9
    assert overall_line(mean).startswith("mean over 4 budgets, beside the best baselines: DFS wins by 2.00 (95%: ")
    networks = overall([one, four])
    assert networks is not None and networks["budgets"] == 5
    unknown = overall([without_answers(four)])
    assert unknown is not None and unknown["outcome"] is None and "may be chance" in overall_line(unknown)


def test_the_table_keeps_its_figures_on_narrow_terminals() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    print_sweep(console, judged(RESULTS))
    shown = console.export_text()
    assert "\u2026" not in shown
    for row in summarise(RESULTS):
        assert f"{row['cost']:.4f}" in shown and f"{row['top1']:.2f}" in shown
    assert "0.59" in shown, "1.96 standard errors of 90% of 10,000 images"
    assert verdicts({**RESULTS, "points": RESULTS["points"][2:]}) == []


def test_two_views_are_another_network() -> None:
    both = {**RESULTS, "points": [*RESULTS["points"], point("mixed", 0.0298, 88.7, budget=0.03, views=2)]}
    (verdict,) = verdicts(both)
    assert verdict["best"] == verdict["best_static"] and verdict["best"]["views"] == 2
    assert verdict["difference"] == pytest.approx(-0.5)
    assert "best baseline mixed, 2 views 88.70" in verdict_line(verdict)
    assert [row["views"] for row in csv.DictReader(points_csv(both).splitlines())] == ["1"] * 6 + ["2"]
    labels = [line.get_label() for line in plot_sweep(judged(both)).axes[0].get_lines()]
    assert "static, mixed" in labels and "static, mixed, 2 views" in labels


def test_csv_and_plot_have_every_point() -> None:
    pytest.importorskip("matplotlib")
    rows = list(csv.DictReader(points_csv(RESULTS).splitlines()))
    assert len(rows) == 6 and rows[0]["method"] == "dfs" and float(rows[0]["cost"]) == 0.029
    axes = plot_sweep(judged(RESULTS)).axes[0]
    assert axes.get_xscale() == "log"
    labels = [t.get_text() for t in axes.texts]
    assert "dense 90.00" in labels and "5 bit" in labels and labels.count("0.03") == 2 and "0.03 loss" in labels
    assert "(loss: DFS beside the best baseline" in axes.get_title()
    plain = plot_sweep(judged(without_answers(RESULTS))).axes[0]
    assert [t.get_text() for t in plain.texts].count("0.03") == 3 and len(plain.collections) == len(
        axes.collections
    ) - 5
    boxes = [t.get_window_extent() for t in axes.texts if t.get_text() != "dense 90.00"]
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    plot_sweep(judged({**RESULTS, "points": RESULTS["points"][2:]}))  # a sweep whose own networks all diverged


def test_with_several_seeds_held_out_images_choose_the_rivals() -> None:
    lucky = point("uniform", 0.0244, 89.5, bits=5, held_out_top1=80.0)
    others = [point("mixed", 0.0299, 87.9, budget=0.03, views=views) for views in (1, 2)]
    dynamic = [p for p in RESULTS["points"] if p["method"] == "dfs"]
    results = {**RESULTS, "points": [*dynamic, lucky, *others]}
    assert rivals(results, 0.03) == others
    (verdict,) = verdicts(results)
    assert verdict["best"]["method"] == "mixed" and verdict["best_static"]["method"] == "uniform", "the other is there"
    (verdict,) = verdicts({**results, "points": [dynamic[0], lucky, *others]})
    assert verdict["best"]["method"] == "uniform", "all have one seed"


def test_the_telling_budgets_are_where_uniform_networks_have_lost_something() -> None:
    curve = [(8, 1 / 16, 89.9), (6, 0.0352, 89.5), (4, 0.0156, 88.5), (3, 0.0088, 86.5), (2, 0.0039, 87.0)]
    points = [point("uniform", cost, top1, bits=bits) for bits, cost, top1 in curve]
    others = [point("uniform", 0.1, 50.0, bits=6, views=2), point("uniform", 0.0352, 80.0, bits=6, seed=1)]
    results = {**RESULTS, "points": [*points, *others]}
    # 0.5 was lost at 6 bits, 1 half-way to 4 bits in the logarithm, 2 a quarter of the way from 4 to 3 bits, 4 nowhere.
    assert telling_budgets(results) == (0.035, 0.023, 0.014)
    assert telling_budgets({**results, "points": points[:1]}) == ()
