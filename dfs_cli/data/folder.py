"""Images in a folder per class."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from timm.utils.misc import natural_key
from torch.utils.data import Dataset

from dfs_cli.data.decode import image_suffixes, read_image
from dfs_cli.errors import DataError


class LeftOut(NamedTuple):
    """A file or folder that is not read, by its path below the root, and why."""

    path: Path
    reason: str


class ImageFolder(Dataset[tuple[Image.Image, int]]):
    """Every image below a folder, once. Its class is the name of the folder that holds it.

    Links are followed. What is hidden is not looked at. Only regular files are ever opened.

    Args:
        root: the folder.
        class_to_idx: class indices by name; images of other classes are left out. None: the names in natural order, as timm
            has it.

    ``samples`` holds the path below ``root`` and the class index of each image, in natural order; ``left_out`` what was not
    taken.

    Raises:
        DataError: a folder cannot be read, there is no image, or a class folder is inside another one.
    """

    def __init__(self, root: Path, class_to_idx: Mapping[str, int] | None = None) -> None:
        self.root = root
        images, self.left_out = _find_images(root)
        _check_nesting(root, {path.parent for path in images})
        if class_to_idx is None:
            names = sorted({path.parent.name for path in images}, key=_natural)
            class_to_idx = {name: index for index, name in enumerate(names)}
        images.sort(key=lambda path: _natural(str(path)))
        self.samples = [(p, class_to_idx[p.parent.name]) for p in images if p.parent.name in class_to_idx]
        self.left_out += [
            LeftOut(p, f"of class {p.parent.name!r}") for p in images if p.parent.name not in class_to_idx
        ]
        if not self.samples:
            raise DataError(f"{root} has no images in class folders{self.left_out_text()}")
        self.set_classes(class_to_idx)

    def set_classes(self, class_to_idx: Mapping[str, int]) -> None:
        """Give the classes, all of which are named, other indices."""
        self.class_to_idx = dict(class_to_idx)
        self.samples = [(path, class_to_idx[path.parent.name]) for path, _ in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, target = self.samples[index]
        return read_image(self.root / path), target

    def filename(self, index: int) -> str:
        """Path of an image below the folder."""
        return str(self.samples[index][0])

    def left_out_text(self) -> str:
        """What was left out, counted by reason, with an example of each; empty where everything was taken."""
        counts = Counter(reason for _, reason in self.left_out)
        examples = {reason: path for path, reason in reversed(self.left_out)}
        parts = (f"{count} {reason}, as {examples[reason]}" for reason, count in counts.most_common())
        return f"; left out: {'; '.join(parts)}" if counts else ""


def _natural(name: str) -> tuple[list[str | int], str]:
    """Natural order; names that differ only in case or leading zeros have an order, too."""
    return natural_key(name), name


def _find_images(root: Path) -> tuple[list[Path], list[LeftOut]]:
    """Paths below ``root`` of all images in folders, and of what is left out.

    Raises:
        DataError: a folder cannot be read.
    """
    suffixes = image_suffixes()
    images: list[Path] = []
    linked: list[Path] = []
    left_out: list[LeftOut] = []
    top: set[Path] = set()
    for entry in _walk(root, left_out):
        path = Path(entry.path).relative_to(root)
        if _is_dir(entry):
            top |= {path} if path.parent == Path() else set()
        elif not _is_file(entry):
            left_out.append(LeftOut(path, "links to no file" if entry.is_symlink() else "no regular files"))
        elif path.suffix.lower() not in suffixes:
            left_out.append(LeftOut(path, f"with suffix {path.suffix}" if path.suffix else "without suffix"))
        elif path.parent == Path():
            left_out.append(LeftOut(path, "beside the class folders"))
        else:
            (linked if entry.is_symlink() else images).append(path)
    if linked:
        known = {root.joinpath(path.parent).resolve() / path.name for path in images}
        for path in linked:
            if (file := root.joinpath(path).resolve()) in known:
                left_out.append(LeftOut(path, "links to images that are read already"))
            else:
                known.add(file)
                images.append(path)
    for folder in sorted(top - {Path(path.parts[0]) for path in images}):
        left_out.append(LeftOut(folder, "folders without images"))
    return images, left_out


def _walk(root: Path, left_out: list[LeftOut]) -> Iterator[os.DirEntry[str]]:
    """What is below ``root`` and not hidden, each folder once: folders before links to them.

    Raises:
        DataError: a folder cannot be read.
    """
    entered: set[Path] = set()
    folders: list[Path] = [root]
    links: list[Path] = []
    while folders or links:
        folder = folders.pop(0) if folders else links.pop(0)
        real = folder.resolve()
        # A folder above the root would lead to images of other splits.
        if real in entered or (folder != root and real in root.resolve().parents):
            left_out.append(LeftOut(folder.relative_to(root), "links to folders that are read already"))
            continue
        entered.add(real)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"folder {folder} cannot be read: {error.strerror or error}") from None
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if _is_dir(entry):
                (links if entry.is_symlink() else folders).append(folder / entry.name)
            yield entry


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links in a circle
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def _check_nesting(root: Path, classes: set[Path]) -> None:
    """Raises DataError where a folder with images is inside another one: it might be a class, or a part of one."""
    for folder in sorted(classes):
        if outer := next((parent for parent in folder.parents if parent in classes), None):
            raise DataError(
                f"folder {root / folder} has images inside class folder {outer}: move them so that "
                "every class is one folder of images"
            )
