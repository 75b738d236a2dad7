from typing import Any

from dfs_cli.comparison.config import SweepConfig
from dfs_cli.comparison.jobs import Job, jobs, repeated_jobs


def point(job: Job, cost: float, held_out: float, **more: Any) -> dict[str, Any]:
    return {**vars(job), "cost": cost, "held_out_top1": held_out, **more}


def test_the_first_seed_has_every_rival_and_cascades_come_last() -> None:
    planned = jobs(SweepConfig((0.03, 0.015), views=2), 4)
    assert [job.method for job in planned][:2] == ["dfs"] * 2 and [job.method for job in planned][-2:] == [
        "cascade"
    ] * 2
    assert len(planned) == 2 + 2 * 6 + 2 * 2 + 2 + 2 and {job.seed for job in planned} == {4}
    assert jobs(SweepConfig((0.03,), ("mixed",)), 0) == [Job("dfs", 0, 0.03), Job("mixed", 0, 0.03)]
    curve = jobs(SweepConfig(), 0)
    assert [(job.method, job.bits) for job in curve[:6]] == [("uniform", bits) for bits in (8, 6, 5, 4, 3, 2)]


def test_other_seeds_have_the_two_rivals_that_were_best_on_held_out_images_within_the_budget() -> None:
    mixed, two = Job("mixed", 0, 0.03), Job("mixed", 0, 0.03, views=2)
    cascade, skipnet = Job("cascade", 0, 0.03), Job("skipnet", 0, 0.03)
    uniform = [Job("uniform", 0, bits=bits) for bits in (3, 5, 8)]
    results = {
        "points": [
            point(Job("dfs", 0, 0.03), 0.03, 99.0),
            point(mixed, 0.03, 90.0),
            point(two, 0.03, 91.0, top1=50.0),
            point(uniform[0], 0.01, 80.0),
            point(uniform[1], 0.025, 89.0),
            point(uniform[2], 0.0625, 95.0),
            point(skipnet, 0.03, 70.0),
            point(cascade, 0.0295, 92.0, members=["uniform 3 bit", "uniform 8 bit"]),
            point(Job("mixed", 1, 0.03), 0.03, 99.0),
        ]
    }
    config = SweepConfig((0.03,), seeds=3)
    assert repeated_jobs(config, results, 1) == [
        Job("dfs", 1, 0.03),
        *(Job("uniform", 1, bits=bits) for bits in (3, 8)),
        Job("mixed", 1, 0.03, views=2),
        Job("cascade", 1, 0.03),
    ]
