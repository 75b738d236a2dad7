import time

import pytest
import torch

from dfs_cli.bench import clock
from dfs_cli.bench.clock import Lap, Timing, in_turns, on_threads, percentiles, quartiles, seconds_of
from dfs_cli.errors import ConfigError


def test_all_take_turns_in_every_round() -> None:
    order: list[str] = []
    rounds: list[int] = []

    def measure(name: str, turn: int) -> str:
        order.append(f"{name}{turn}")
        return f"{name}{turn}"

    measures = [lambda turn: measure("a", turn), lambda turn: measure("b", turn)]
    found = in_turns(measures, repeats=2, warm_up=1, on_round=rounds.append)
    assert order == ["a-1", "b-1", "a0", "b0", "a1", "b1"]
    assert found == [["a0", "a1"], ["b0", "b1"]]
    assert rounds == [1, 1, 1]


def test_there_must_be_a_round() -> None:
    with pytest.raises(ConfigError, match="repeats 0: expected 1 to"):
        in_turns([lambda turn: turn], repeats=0, warm_up=1)


def test_percentiles_by_hand() -> None:
    assert quartiles([5.0, 1.0, 3.0, 2.0, 4.0]) == Timing(median=3.0, low=2.0, high=4.0)
    assert quartiles([0.5]) == Timing(0.5, 0.5, 0.5)
    found = percentiles([float(i) for i in range(101)])
    assert found[49] == pytest.approx(50) and found[94] == pytest.approx(95) and len(found) == 99


def test_an_interrupted_run_of_one_thread_counts_with_the_time_that_it_had_a_core(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts, waiting = iter([0, 1, 1, 2, 2, 2]), 0.02
    monkeypatch.setattr(clock, "interruptions", lambda: next(counts))
    alone, several, quiet = (Lap(lambda: time.sleep(waiting), threads) for threads in (1, 2, 1))
    assert (alone.interrupted, several.interrupted, quiet.interrupted) == (True, True, False)
    # While it sleeps, the thread has no core.
    assert alone.seconds < waiting / 2 and several.seconds >= waiting and quiet.seconds >= waiting


def test_a_step_is_run_once_for_its_time() -> None:
    calls: list[int] = []
    seconds_of(lambda: calls.append(1), torch.device("cpu"))
    assert calls == [1]


def test_threads_are_set_and_set_back() -> None:
    before = torch.get_num_threads()
    with on_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with pytest.raises(ConfigError, match="threads 0: expected 1 to"), on_threads(0):
        pass
