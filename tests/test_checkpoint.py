"""What is saved, when, and what is not gone on with."""

import signal
from pathlib import Path

import pytest
import torch

from dfs_cli.atomic import File
from dfs_cli.checkpoint import Checkpoint, Checkpoints, StopRequest
from dfs_cli.errors import DivergedError, OutputError, Stopped

IDENTITY = {"budget": 0.1, "tuning": {"lr": 0.001, "steps": 20}}


def saved(path: Path) -> Checkpoint:
    checkpoint = Checkpoint(path)
    checkpoint.identify(IDENTITY)
    checkpoint.keep("found", [1, 2.5, "x"])
    checkpoint.save("state", {"weights": torch.arange(3.0)})
    return checkpoint


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    saved(tmp_path / "c")
    again = Checkpoint(tmp_path / "c", resume=True)
    again.identify(IDENTITY)
    assert again.get("found") == [1, 2.5, "x"] and torch.equal(again.take("state")["weights"], torch.arange(3.0))
    assert again.get("state") is None, "a state is given away: the next one takes its place"
    again.save("state", {"weights": torch.ones(1)})
    third = Checkpoint(tmp_path / "c", resume=True)
    assert third.get("found") == [1, 2.5, "x"] and torch.equal(third.get("state")["weights"], torch.ones(1))
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    third.remove()
    assert Checkpoint(tmp_path / "c", resume=True).get("found") is None


def test_another_run_is_refused_by_what_differs(tmp_path: Path) -> None:
    saved(tmp_path / "c")
    other = {"budget": 0.1, "tuning": {"lr": 0.01, "steps": 20}, "model": "resnet18"}
    with pytest.raises(
        OutputError, match=r"model is null there, resnet18 here; tuning\.lr is 0\.001 there, 0\.01 here"
    ):
        Checkpoint(tmp_path / "c", resume=True).identify(other)
    Checkpoint(tmp_path / "c").identify(other)  # nothing was read


@pytest.mark.parametrize("content", [b"", b"\x80\x02", b"PK\x03\x04 not a zip"])
def test_a_damaged_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "c").write_bytes(content)
    with pytest.raises(OutputError, match="not an intact checkpoint"):
        Checkpoint(tmp_path / "c", resume=True)


def test_a_file_that_was_cut_off_and_one_of_something_else_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "c")
    whole = (tmp_path / "c").read_bytes()
    (tmp_path / "c").write_bytes(whole[: len(whole) // 2])
    torch.save({"weights": torch.ones(1)}, tmp_path / "d")
    for name in ("c", "d"):
        with pytest.raises(OutputError, match="not an intact checkpoint"):
            Checkpoint(tmp_path / name, resume=True)


def test_steps_are_saved_when_it_is_time(tmp_path: Path) -> None:
    made: list[int] = []

    def state(number: int) -> int:
        made.append(number)
        return number

    rarely = Checkpoint(tmp_path / "c", minutes=60.0)
    rarely.reached("state", lambda: state(1))
    assert made == []
    rarely.reached("state", lambda: state(2), milestone=True)
    always = Checkpoint(tmp_path / "c", minutes=0.0)
    always.reached("state", lambda: state(3))
    assert made == [2, 3] and Checkpoint(tmp_path / "c", resume=True).get("state") == 3


def test_a_run_that_is_asked_to_end_saves_first(tmp_path: Path) -> None:
    stop = StopRequest()
    checkpoint = Checkpoint(tmp_path / "c", minutes=60.0, stop=stop)
    assert not stop.ask(signal.SIGTERM), "outside of steps it ends at once"
    with stop.waited_for():
        assert stop.ask(signal.SIGTERM) and not stop.ask(signal.SIGTERM), "the second time it ends at once"
        with pytest.raises(Stopped) as end:
            checkpoint.reached("state", lambda: 7)
    assert end.value.number == signal.SIGTERM and Checkpoint(tmp_path / "c", resume=True).get("state") == 7


def test_a_run_goes_on_where_it_cannot_be_saved(tmp_path: Path) -> None:
    said: list[str] = []
    Checkpoint(tmp_path / "nowhere" / "c", say=said.append).save("state", 1)
    assert len(said) == 1 and "cannot be saved" in said[0]


def test_results_of_the_run_itself_are_known(tmp_path: Path) -> None:
    files = [File(tmp_path / "a", b"first"), File(tmp_path / "b", "second")]
    names = [file.path for file in files]
    saved(tmp_path / "c").about_to_write(files)
    again = Checkpoint(tmp_path / "c", resume=True)
    assert not again.wrote(names), "there are none"
    (tmp_path / "a").write_bytes(b"first")
    assert again.wrote(names), "killed before the second one was there"
    (tmp_path / "b").write_text("a stranger's")
    assert not again.wrote(names)
    assert torch.equal(again.get("state")["weights"], torch.arange(3.0))


def test_checkpoints_of_several_runs_end_with_them(tmp_path: Path) -> None:
    several = Checkpoints(minutes=0.0)
    with pytest.raises(Stopped), several.at(tmp_path / "a") as checkpoint:
        checkpoint.save("state", 1)
        raise Stopped
    with several.at(tmp_path / "a") as checkpoint:
        assert checkpoint.get("state") == 1
        with several.at(tmp_path / "a") as other:  # while it is held
            other.save("state", 2)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DivergedError), several.at(tmp_path / "a") as checkpoint:
        checkpoint.save("state", 1)
        raise DivergedError("it would do so again")
    assert list(tmp_path.iterdir()) == []
    saved(tmp_path / "a")
    with Checkpoints(resume=False).at(tmp_path / "a") as checkpoint:
        assert checkpoint.get("state") is None
