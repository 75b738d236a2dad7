import os
import tempfile
from pathlib import Path

import pytest

from dfs_cli.atomic import File
from dfs_cli.errors import OutputError, WriteError
from dfs_cli.outputs import check_writable, reserve


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
    with pytest.raises(OutputError, match=r"x\.txt is not a folder"):
        check_writable([path / "y"], force=True)


@pytest.mark.parametrize("kind", ["fifo", "device", "link to a device", "loop", "link to no folder"])
def test_only_files_are_replaced_also_with_force(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path = Path(os.devnull)
    else:
        path.symlink_to({"link to a device": os.devnull, "loop": "x", "link to no folder": "none/y"}[kind])
    before = path.lstat()
    reason = {"loop": "cannot be written", "link to no folder": "none does not exist"}.get(kind, "is a device, a pipe")
    with pytest.raises(OutputError, match=reason) as failure, reserve([path], force=True):
        pytest.fail("reserved")
    assert failure.value.exit_code == 2
    after = path.lstat()
    assert (after.st_mode, after.st_ino, after.st_mtime) == (before.st_mode, before.st_ino, before.st_mtime)


def test_a_link_to_no_file_yet_makes_the_file(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("x")
    with reserve([tmp_path / "link"], force=False) as outputs:
        outputs.write([File(tmp_path / "link", "new")])
    assert (tmp_path / "x").read_text() == "new" and (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("link", ["same", "symbolic", "hard"])
def test_an_output_that_is_an_input_is_refused_and_force_is_not_advised(tmp_path: Path, link: str) -> None:
    source, path = tmp_path / "in", tmp_path / ("in" if link == "same" else "out")
    source.write_text("mine")
    if link == "symbolic":
        path.symlink_to(source)
    elif link == "hard":
        os.link(source, path)
    for force in (False, True):
        with pytest.raises(OutputError, match="is an input, too") as failure, reserve([path], force, [None, source]):
            pytest.fail("reserved")
        assert "--force" not in str(failure.value)


def test_outputs_differ_from_each_other_and_from_the_output_of_the_program(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("x")
    with pytest.raises(OutputError, match="are the same file"):
        check_writable([tmp_path / "x", tmp_path / "link"], force=True)
    kept = os.dup(1)
    try:
        with (tmp_path / "log").open("w") as log:
            os.dup2(log.fileno(), 1)
            with pytest.raises(OutputError, match="the output of the program"):
                check_writable([tmp_path / "log"], force=True)
    finally:
        os.dup2(kept, 1)
        os.close(kept)


@pytest.mark.medium
def test_a_reserved_name_is_refused_to_others_also_with_force(tmp_path: Path) -> None:
    with reserve([tmp_path / "a", tmp_path / "b"], force=False) as outputs:
        with pytest.raises(OutputError, match="another run of dfs") as failure, reserve([tmp_path / "b"], force=True):
            pytest.fail("reserved twice")
        assert failure.value.exit_code == 2
        outputs.write([File(tmp_path / "a", "1"), File(tmp_path / "b", "2")])
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}
    with reserve([tmp_path / "b"], force=True):
        pass


def test_finished_work_is_kept_under_another_name(tmp_path: Path) -> None:
    names = ("m.v1.safetensors", "m.v1.report.md")
    files = [File(tmp_path / name, "mine") for name in names]
    with reserve([file.path for file in files], force=False) as outputs:
        (tmp_path / names[1]).write_text("a stranger's")
        (tmp_path / "m.v1-1.safetensors").write_text("a stranger's")
        paths, failure = outputs.keep(files)
    assert [path.name for path in paths] == ["m.v1-2.safetensors", "m.v1-2.report.md"]
    assert failure is not None and failure.exit_code == 1 and "m.v1-2.safetensors" in str(failure)
    assert all(path.read_text() == "mine" for path in paths)
    assert (tmp_path / names[1]).read_text() == "a stranger's" and not (tmp_path / names[0]).exists()


def test_finished_work_goes_to_the_temporary_folder_where_its_own_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, temporary = tmp_path / "folder", tmp_path / "temporary"
    folder.mkdir()
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    file = File(folder / "x", "mine")
    with reserve([file.path], force=False) as outputs:
        for left in folder.iterdir():
            left.unlink()
        folder.rmdir()
        (path,), failure = outputs.keep([file])
        assert path.read_text() == "mine" and temporary in path.parents
        assert failure is not None and failure.exit_code == 1 and str(path) in str(failure)
        path.unlink()
        path.parent.rmdir()
        temporary.rmdir()
        paths, failure = outputs.keep([file])
    assert paths == () and "not in the temporary folder either" in str(failure)


def test_a_disk_that_is_full_from_the_start_is_no_mistake_in_the_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, kind in ((28, WriteError), (30, WriteError), (13, OutputError)):  # full, read-only, not permitted

        def refuse(*_: object, number: int = number, **__: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
        with pytest.raises(OutputError, match=os.strerror(number)) as failure:
            check_writable([tmp_path / "x"], force=False)
        assert type(failure.value) is kind
