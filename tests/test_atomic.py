from pathlib import Path

import pytest

from dfs_cli.atomic import write_atomically
from dfs_cli.errors import ArtifactError, OutputError
from dfs_cli.outputs import check_writable


def test_atomic_writing_leaves_no_trace_of_a_failure(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    write_atomically(path, "one")

    def refuse(temporary: Path) -> None:
        assert temporary.read_text() == "two" and path.read_text() == "one"
        raise ArtifactError("no")

    with pytest.raises(ArtifactError):
        write_atomically(path, "two", check=refuse)
    assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(OutputError, match="cannot be written"):
        write_atomically(tmp_path / "none" / "x", "three")


def test_what_could_not_be_written_is_said_before(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    check_writable([path], force=False)
    path.touch()
    check_writable([path], force=True)
    with pytest.raises(OutputError, match="--force"):
        check_writable([path], force=False)
    with pytest.raises(OutputError, match="is a folder"):
        check_writable([tmp_path], force=True)
    with pytest.raises(OutputError, match="does not exist"):
        check_writable([tmp_path / "none" / "x"], force=True)
