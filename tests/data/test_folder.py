import os
from pathlib import Path

import pytest
from common import solid_image

from dfs_cli.data.folder import ImageFolder
from dfs_cli.errors import DataError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes of two images each."""
    root = tmp_path / "val"
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        for i in range(2):
            solid_image(root / name / f"{i}.png", 40 * i)
    return root


def names(folder: ImageFolder) -> list[str]:
    return [folder.filename(i) for i in range(len(folder))]


PLAIN = ["a/0.png", "a/1.png", "b/0.png", "b/1.png"]


def test_images_and_classes(root: Path) -> None:
    folder = ImageFolder(root)
    assert names(folder) == PLAIN and folder.class_to_idx == {"a": 0, "b": 1}
    assert folder[3][0].getpixel((0, 0)) == 40 and folder[3][1] == 1
    assert folder.left_out_text() == ""


def test_order_is_natural_and_total(tmp_path: Path) -> None:
    for name in ("10", "2", "a", "A", "02", "b"):
        (tmp_path / name).mkdir()
        solid_image(tmp_path / name / "x.png")
    assert list(ImageFolder(tmp_path).class_to_idx) == ["02", "2", "10", "A", "a", "b"]


def test_given_classes(root: Path) -> None:
    folder = ImageFolder(root, {"b": 0, "c": 1})
    assert [folder[i][1] for i in range(2)] == [0, 0]
    assert folder.left_out_text() == "; left out: 2 of class 'a', as a/0.png"
    with pytest.raises(DataError, match="no images in class folders"):
        ImageFolder(root, {"c": 0, "d": 1})


def test_what_is_hidden_is_not_looked_at(root: Path) -> None:
    for folder in (root / ".cache", root / "a" / ".ipynb_checkpoints"):
        folder.mkdir()
        solid_image(folder / "x.png")
    solid_image(root / "a" / "._0.png")
    assert names(ImageFolder(root)) == PLAIN and not ImageFolder(root).left_out


def test_what_is_left_out_is_counted_and_named(root: Path) -> None:
    solid_image(root / "preview.png")
    (root / "labels.CSV").write_text("")
    (root / "a" / "notes").write_text("")
    (root / "b" / "0.npy").write_bytes(b"")
    (root / "b" / "1.npy").write_bytes(b"")
    (root / "empty").mkdir()
    os.mkfifo(root / "a" / "pipe.png")
    (root / "a" / "dangling.png").symlink_to(root / "nothing.png")
    folder = ImageFolder(root)
    assert names(folder) == PLAIN
    assert folder.left_out_text() == (
        "; left out: 2 with suffix .npy, as b/0.npy; 1 with suffix .CSV, as labels.CSV; 1 beside the class folders, as "
        "preview.png; 1 links to no file, as a/dangling.png; 1 without suffix, as a/notes; 1 no regular files, as "
        "a/pipe.png; 1 folders without images, as empty"
    )


def test_every_file_and_folder_is_read_once(root: Path, tmp_path: Path) -> None:
    (root / "b" / "up").symlink_to(root)
    (root / "a" / "higher").symlink_to(tmp_path)
    (root / "a" / "circle").symlink_to(root / "a" / "circle")
    (root / "b" / "same.png").symlink_to(root / "a" / "0.png")
    (tmp_path / "train").mkdir()
    solid_image(tmp_path / "train" / "x.png")
    folder = ImageFolder(root)
    assert names(folder) == PLAIN
    assert sorted(path.name for path, _ in folder.left_out) == ["circle", "higher", "same.png", "up"]


def test_links_are_followed(root: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    solid_image(elsewhere / "x.png", 7)
    solid_image(tmp_path / "y.png", 9)
    (root / "c").symlink_to(elsewhere)
    (root / "a" / "y.png").symlink_to(tmp_path / "y.png")
    (tmp_path / "linked").symlink_to(root)
    folder = ImageFolder(tmp_path / "linked")
    assert names(folder) == ["a/0.png", "a/1.png", "a/y.png", "b/0.png", "b/1.png", "c/x.png"]
    assert folder[5][0].getpixel((0, 0)) == 7 and not folder.left_out


def test_nested_class_folders_are_refused(root: Path) -> None:
    (root / "a" / "more").mkdir()
    solid_image(root / "a" / "more" / "x.png")
    with pytest.raises(DataError, match=r"val/a/more has images inside class folder a:"):
        ImageFolder(root)


def test_deeper_class_folders_are_read(root: Path) -> None:
    (root / "sub").mkdir()
    (root / "a").rename(root / "sub" / "a")
    assert names(ImageFolder(root)) == ["b/0.png", "b/1.png", "sub/a/0.png", "sub/a/1.png"]


def test_a_folder_that_cannot_be_read_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def denied(path: Path) -> object:
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(DataError, match=r"val/b cannot be read: Permission denied"):
        ImageFolder(root)


def test_names_stay_in_one_line(root: Path) -> None:
    (root / "b").rename(root / "b\n\x1b[31mc")
    (root / "b\n\x1b[31mc" / "inner").mkdir()
    solid_image(root / "b\n\x1b[31mc" / "inner" / "x.png")
    with pytest.raises(DataError) as error:
        ImageFolder(root)
    assert str(error.value).isprintable() and r"b\n\x1b[31mc" in str(error.value)
