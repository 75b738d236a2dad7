import numpy as np
import pytest
import torch

from dfs_cli.bench.cost_fit import BlockCosts, Deciding, largest_error
from dfs_cli.cost.decisions import NOT_RUN, Decisions

KINDS, OPTIONS = ["wide", "wide", "narrow", "wide", "narrow"], (0, 4, 8)
# What the parts take, in seconds: all that always runs, and each option of each kind.
FIXED, TRUE = 0.5, {"wide": (0.0, 0.3, 0.2), "narrow": (0.0, 0.05, 0.1)}


def seconds_of(policies: torch.Tensor) -> list[float]:
    return [
        FIXED + sum(TRUE[kind][option] for kind, option in zip(KINDS, policy, strict=True))
        for policy in policies.tolist()
    ]


@pytest.fixture
def costs() -> BlockCosts:
    made = BlockCosts(KINDS, OPTIONS)
    policies = made.draw(15, seed=0)
    made.fit(policies, seconds_of(policies))
    return made


def test_a_known_table_is_found_again(costs: BlockCosts) -> None:
    assert costs.unknowns == 1 + 2 * 2
    assert costs.fixed == pytest.approx(FIXED)
    assert np.array(costs.of_blocks()) == pytest.approx(np.array([TRUE[kind] for kind in KINDS]))


def test_noise_is_averaged() -> None:
    made, noise = BlockCosts(KINDS, OPTIONS), np.random.default_rng(0)
    policies = made.draw(60, seed=0)
    made.fit(policies, np.array(seconds_of(policies)) * noise.normal(1, 0.02, 60))  # type: ignore[arg-type]
    others = made.draw(20, seed=1)
    predicted = made.predict(Decisions.of_pass(others)).sum(axis=1).tolist()
    assert largest_error(predicted, seconds_of(others)) < 0.03


def test_nothing_costs_less_than_nothing() -> None:
    made = BlockCosts(["a"], (0, 8))
    made.fit(torch.tensor([[0], [1]]), [1.0, 0.9])  # the runtime was faster by chance where more was run
    assert made.of_blocks() == [[0.0, 0.0]] and 0.9 < made.fixed < 1


def test_policies_tell_kinds_and_options_apart() -> None:
    policies = BlockCosts(KINDS, OPTIONS).draw(12, seed=3)
    assert policies.shape == (12, 5) and policies[:3].tolist() == [[0] * 5, [1] * 5, [2] * 5]
    assert set(policies[3:].flatten().tolist()) == {0, 1, 2}
    assert torch.equal(policies, BlockCosts(KINDS, OPTIONS).draw(12, seed=3))


def test_some_of_the_options(costs: BlockCosts) -> None:
    narrowed = costs.narrowed((0, 8))
    assert np.array(narrowed.of_blocks()) == pytest.approx(np.array([[0, TRUE[kind][2]] for kind in KINDS]))
    decisions = Decisions.of_pass(torch.tensor([[1, 0, 0, 0, 0]]))
    assert narrowed.predict(decisions).tolist() == [[pytest.approx(0.7)]]


def test_deciding_is_what_is_left(costs: BlockCosts) -> None:
    """In the first pass 0.1 and nothing for each block that runs, in the second one 0.2 and 0.01, and a quarter more for what
    the first one ran, too."""
    passes = [
        [[1, 2, 0, 0, 1], [NOT_RUN] * 5],
        [[0] * 5, [NOT_RUN] * 5],
        [[2] * 5, [0, 1, 0, 1, 0]],
        [[0] * 5, [2] * 5],
        [[1, 0, 0, 0, 2], [2, 1, 0, 0, 1]],
    ]
    decisions = Decisions(torch.tensor(passes))
    again = np.array([0, 0, 0.3 + 0.3, 0, 0.2 + 0.05])
    deciding = np.array([0.1, 0.1, 0.1 + 0.2 + 0.02, 0.1 + 0.2 + 0.05, 0.1 + 0.2 + 0.03]) + 0.25 * again
    seconds = (costs.predict(decisions).sum(axis=1) + deciding).tolist()
    found = Deciding(costs, decisions, seconds)
    assert np.array(found.passes) == pytest.approx(np.array([[0.1, 0.0], [0.2, 0.01]]), abs=1e-9)
    assert found.crowding == pytest.approx(0.25)
    assert found.predict(decisions) == pytest.approx(np.array(seconds))
    assert costs.predict(decisions)[0, 1] == 0  # a pass that is not run takes no time


def test_the_largest_error_by_hand() -> None:
    assert largest_error([1.0, 2.2, 2.7], [1.0, 2.0, 3.0]) == pytest.approx(0.1)
