import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dfs_cli.locks import beside, clean, locked

HOLD = """
import sys, time
from pathlib import Path
from dfs_cli.locks import beside, locked
with locked(Path(sys.argv[1])):
    beside(Path(sys.argv[1]), "0.new").touch()
    print("held", flush=True)
    time.sleep(60)
"""


def holder(path: Path) -> subprocess.Popen[str]:
    """A process that holds a name, and has written half a file."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str], number: signal.Signals) -> None:
    process.send_signal(number)
    process.wait(timeout=30)
    assert process.stdout is not None
    process.stdout.close()


@pytest.mark.medium
def test_a_name_is_held_by_one_until_it_lets_go(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with locked(path):
        with pytest.raises(BlockingIOError), locked(path):
            pytest.fail("held twice")
        with locked(tmp_path / "y"):
            pass
    assert list(tmp_path.iterdir()) == []
    with locked(path):
        pass


@pytest.mark.medium
def test_a_link_and_what_it_leads_to_are_one_name(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "x")
    with locked(tmp_path / "link"), pytest.raises(BlockingIOError), locked(tmp_path / "folder" / "x"):
        pytest.fail("held twice")


@pytest.mark.medium
def test_a_lock_ends_with_its_process_and_only_then_is_cleaned(tmp_path: Path) -> None:
    path = tmp_path / "x"
    process = holder(path)
    left = {beside(path, "0.new"), beside(path, "lock")}
    with pytest.raises(BlockingIOError), locked(path):
        pytest.fail("held twice")
    clean(tmp_path)
    assert set(tmp_path.iterdir()) == left, "of a running process"
    end(process, signal.SIGKILL)
    assert set(tmp_path.iterdir()) == left
    with locked(path):
        assert list(tmp_path.iterdir()) == [beside(path, "lock")]


def test_what_killed_processes_left_under_other_names_is_cleaned_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".dfs-notes").touch()
    end(holder(tmp_path / "x"), signal.SIGKILL)
    clean(tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / ".dfs-notes"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_process_that_was_forked_off_does_not_keep_the_lock(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with locked(tmp_path / "x"):
        child = os.fork()
        if child == 0:
            os.close(writer)
            os.read(reader, 1)  # until the parent is done
            os._exit(0)
    with locked(tmp_path / "x"):
        pass
    os.close(writer)
    os.waitpid(child, 0)
    os.close(reader)


def test_without_locks_in_the_file_system_work_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path / "x"), locked(tmp_path / "x"):
        pass
    assert list(tmp_path.iterdir()) == []
