import random
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies
from mutations import draw
from torch import nn
from verdicts import judge, watch

pytestmark = pytest.mark.medium

# Without a database nothing is left in the checkout, and without randomness a failure comes back.
PLAN = hypothesis.settings(
    database=None, deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
)


@pytest.mark.parametrize("cases", [30, pytest.param(300, marks=pytest.mark.slow)])
def test_every_changed_file_ends_in_one_line_or_loads(
    cases: int, artifact: Path, digits_model: nn.Module, tmp_path: Path
) -> None:
    watch()
    whole, state = artifact.read_bytes(), dict(digits_model.state_dict())

    @hypothesis.settings(PLAN, max_examples=cases)
    @hypothesis.given(strategies.randoms(use_true_random=False))
    def holds(rng: random.Random) -> None:
        case = draw(rng, [whole], state)
        verdict = judge(case, tmp_path)
        assert verdict.fault is None, (case.what, case.command, verdict)

    holds()
