import errno
import os
from pathlib import Path

import pytest

from dfs_cli.atomic import File, write_atomically, write_files
from dfs_cli.errors import ArtifactError, OutputError, TakenError, WriteError


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


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


def test_a_name_that_is_taken_is_not_replaced_unasked(tmp_path: Path) -> None:
    files = [File(tmp_path / "a", "1"), File(tmp_path / "b", "2")]
    (tmp_path / "b").write_text("mine")
    with pytest.raises(TakenError, match="b was taken"):
        write_files(files, replace=False)
    assert contents(tmp_path) == {"b": "mine"}
    write_files(files, replace=True)
    assert contents(tmp_path) == {"a": "1", "b": "2"}


@pytest.mark.parametrize("has_links", [True, False])
def test_all_files_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool) -> None:
    (tmp_path / "a").write_text("old")
    (tmp_path / "c").mkdir()  # a file cannot take its place: found when a and b have been renamed
    if not has_links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    files = [File(tmp_path / name, "new") for name in "abc"]
    with pytest.raises(WriteError, match="c cannot be written") as failure:
        write_files(files, replace=True)
    assert not (tmp_path / "b").exists() and (tmp_path / "c").is_dir()
    # Where nothing can be kept aside, the message says what stands.
    assert (tmp_path / "a").read_text() == ("old" if has_links else "new")
    assert ("except" in str(failure.value)) is not has_links
    assert len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_is_noticed_before_anything_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("old")
    written: list[int] = []

    def full(descriptor: int) -> None:
        written.append(descriptor)
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match="b cannot be written: No space left on device; nothing was written"):
        write_files([File(tmp_path / "a", "new"), File(tmp_path / "b", "new")], replace=True)
    assert contents(tmp_path) == {"a": "old"}


def test_a_file_system_without_hard_links_never_replaces_unasked_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    write_files([File(tmp_path / "a", "1")], replace=False)
    with pytest.raises(TakenError):
        write_files([File(tmp_path / "a", "2")], replace=False)
    assert contents(tmp_path) == {"a": "1"}


def test_modes_are_those_of_new_files_or_of_the_file_replaced_and_a_nicety(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = tmp_path / "x", tmp_path / "y"
    other.touch()
    write_atomically(path, "1")
    assert path.stat().st_mode == other.stat().st_mode
    path.chmod(0o600)
    write_atomically(path, "2")
    assert path.stat().st_mode & 0o777 == 0o600

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", refuse)
    write_atomically(path, "3")
    assert path.read_text() == "3"


def test_links_are_followed_and_names_may_be_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(Path("folder") / "x")
    for text in ("new", "replaced"):
        write_atomically(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink() and contents(tmp_path / "folder") == {"x": text}
    write_atomically(tmp_path / ("n" * 255), "long")
    assert (tmp_path / ("n" * 255)).read_text() == "long"


def test_a_name_that_is_no_text_does_not_keep_a_report_from_being_written(tmp_path: Path) -> None:
    write_atomically(tmp_path / "x", os.fsdecode(b"weights \xff"))
    assert (tmp_path / "x").read_bytes() == b"weights \\udcff"
