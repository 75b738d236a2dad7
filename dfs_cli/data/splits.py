"""Opening datasets: a folder, a reader of timm, or the embedded digits, divided into train, calibration, validation."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.data import create_dataset
from torch.utils.data import IterableDataset
from torchvision.datasets import DatasetFolder

from dfs_cli.config import DataConfig, Preprocessing
from dfs_cli.data import digits
from dfs_cli.data.classes import check_class_count, check_class_names, class_names_of, read_class_map
from dfs_cli.data.decode import read_image
from dfs_cli.data.folder import ImageFolder
from dfs_cli.data.images import Images
from dfs_cli.data.preprocessing import eval_transform
from dfs_cli.errors import ConfigError, DataError, first_line, printable

DIGITS = "digits"
_TRAIN_FOLDERS = ("train", "training")
_VALIDATION_FOLDERS = ("val", "valid", "validation", "eval", "evaluation", "test")
_VALIDATION_SEED = 0  # the same images for every run, and for dfs eval, which has no seed
_CALIBRATION_SHARE, _CALIBRATION_LIMIT, _CALIBRATION_BYTES = 0.1, 5000, 1 << 30


@dataclass(frozen=True)
class Splits:
    """The images of a conversion.

    Args:
        train: what the network is tuned on.
        calibration: held out of ``train``; the operating point is set on it.
        validation: used once, for the reported figures.
        class_names: in the order of the class indices.

    Example:
        >>> import torch
        >>> import dfs_cli
        >>> def images(count):
        ...     return dfs_cli.Images(torch.utils.data.TensorDataset(torch.zeros(count, 1, 8, 8), torch.arange(count) % 2))
        >>> splits = dfs_cli.Splits(images(90), images(10), images(30), ("cat", "dog"))
        >>> len(splits.train), splits.class_names[1]
        (90, 'dog')
    """

    train: Images
    calibration: Images
    validation: Images
    class_names: tuple[str, ...]


def open_splits(
    config: DataConfig,
    preprocessing: Preprocessing,
    seed: int = 0,
    class_names: tuple[str, ...] | None = None,
) -> Splits:
    """Open train and validation split, and hold out about a tenth of the training images (at most about 5,000 and 1 GiB).

    An image is held out, or not, by its name and the seed alone: that does not change when others come or go. All three splits
    have the evaluation transform. The notes of ``train`` and ``validation`` say what was opened.

    Args:
        class_names: of the network, in the order of its answers; None: those of the training images.

    Raises:
        ConfigError: the model takes neither 1 nor 3 channels.
        DataError: a split is missing, empty, has one class, or the splits' classes differ.
    """
    transform = eval_transform(preprocessing)
    mode = image_mode(preprocessing)
    if config.dataset == DIGITS:
        validation = open_validation(config, preprocessing, digits.CLASS_NAMES)
        train = _limit(Images(digits.Digits("train"), transform, mode=mode), config, seed)
        calibration = Images(digits.Digits("calibration"), transform, mode=mode)
        return Splits(train, calibration, validation, digits.CLASS_NAMES)
    source, class_names = _open(config, "train", config.train_split, mode, class_names)
    validation = open_validation(config, preprocessing, class_names)
    opened = _limit(Images(source, transform, mode=mode), config, seed)
    # Held-out images stay in memory, as 32-bit numbers.
    fitting = _CALIBRATION_BYTES // (4 * math.prod(preprocessing.input_size))
    held_out = _held_out(opened, min(_CALIBRATION_LIMIT, fitting), seed)
    train = opened.subset(sorted(set(range(len(opened))) - set(held_out)))
    train.note = _describe("training", opened, class_names, config)
    return Splits(train, opened.subset(held_out), validation, class_names)


def open_validation(config: DataConfig, preprocessing: Preprocessing, class_names: tuple[str, ...] | int) -> Images:
    """The validation split alone, its classes mapped by name to the indices of ``class_names``; its note says what was opened.

    Args:
        class_names: of the network; or only how many, which are then in the data's own order.

    Raises:
        ConfigError: the model takes neither 1 nor 3 channels.
        DataError: the split is missing or empty, or its classes differ from ``class_names``.
    """
    mode = image_mode(preprocessing)
    if config.dataset == DIGITS:
        if config.class_map is not None:
            raise ConfigError("--class-map has no meaning for the embedded digits")
        source: Any = digits.Digits("validation")
        names = digits.CLASS_NAMES
        if not isinstance(class_names, int):
            check_class_names(names, class_names, "the embedded digits")
    else:
        known = None if isinstance(class_names, int) else class_names
        source, names = _open(config, "validation", config.val_split, mode, known)
    if isinstance(class_names, int):
        check_class_count(names, class_names)
    images = _limit(Images(source, eval_transform(preprocessing), mode=mode), config, _VALIDATION_SEED)
    if config.dataset != DIGITS:
        images.note = _describe("validation", images, names, config)
    return images


def _describe(name: str, images: Images, class_names: tuple[str, ...], config: DataConfig) -> str:
    """What was opened, in one line."""
    source = images.source
    of_all = "" if len(images) == len(source) else f" of {len(source)}"
    where = f"in {source.root}" if isinstance(source, ImageFolder) else f"of dataset {config.dataset}"
    left_out = source.left_out_text() if isinstance(source, ImageFolder) else ""
    return printable(f"{name}: {len(images)}{of_all} images of {len(class_names)} classes {where}{left_out}")


def image_mode(preprocessing: Preprocessing) -> str:
    channels = preprocessing.input_size[0]
    if channels not in (1, 3):
        raise ConfigError(f"the model takes {channels} channels: image files have 1 or 3")
    return "L" if channels == 1 else "RGB"


def _limit(images: Images, config: DataConfig, seed: int) -> Images:
    if config.num_samples is None or config.num_samples >= len(images):
        return images
    lots = _lots(images, f"sample {seed}")
    return images.subset(sorted(sorted(range(len(images)), key=lots.__getitem__)[: config.num_samples]))


def _held_out(images: Images, limit: int, seed: int) -> list[int]:
    """Positions of about a tenth of the images, one at least.

    Args:
        limit: about so many at most.

    Raises:
        DataError: there are too few images.
    """
    if len(images) * _CALIBRATION_SHARE < 1:
        raise DataError(f"{len(images)} training images are too few: a tenth of them is held out for calibration")
    lots = _lots(images, f"held out {seed}")
    share = min(_CALIBRATION_SHARE, limit / len(images))
    return [i for i, lot in enumerate(lots) if lot < share] or [min(range(len(images)), key=lots.__getitem__)]


def _lots(images: Images, purpose: str) -> list[float]:
    """A number in [0, 1) for each image, drawn from ``purpose`` and its name alone; the name stays when others come or go."""
    digests = (
        hashlib.blake2b(f"{purpose}/{name}".encode(errors="surrogateescape"), digest_size=8) for name in images.names()
    )
    return [int.from_bytes(digest.digest(), "big") / 2**64 for digest in digests]


def _open(
    config: DataConfig, role: str, split: str | None, mode: str, class_names: tuple[str, ...] | None
) -> tuple[Any, tuple[str, ...]]:
    """A split, and its classes in the order of their indices.

    Args:
        class_names: those that it must have, in the order that it must have; None: any.
    """
    class_map = read_class_map(config)
    if not config.dataset:
        return _open_folder(config, role, split, class_names, class_map)
    where = f"dataset {config.dataset!r}"
    try:
        source = create_dataset(
            config.dataset,
            root=config.data_dir,
            split=split or role,
            is_training=False,
            download=config.download,
            class_map=class_map,  # type: ignore[arg-type]  # None means none
            input_img_mode=mode,
        )
    except Exception as error:  # readers come from many libraries, each with different errors
        raise DataError(f"{where} could not be opened: {first_line(error)[:200]}") from None
    if isinstance(source, IterableDataset):
        raise DataError(f"{where} is a stream: held-out images need a reader with random access")
    if isinstance(source, DatasetFolder):
        source.loader = read_image
    names = class_names_of(source)
    if class_names is not None:
        check_class_names(names, class_names, where)
        if names != class_names:
            raise DataError(f"{where} orders its classes differently from the model")
    return source, names


def _open_folder(
    config: DataConfig,
    role: str,
    split: str | None,
    class_names: tuple[str, ...] | None,
    class_map: dict[str, int] | None,
) -> tuple[ImageFolder, tuple[str, ...]]:
    assert config.data_dir is not None, "checked by the caller"
    folder = _split_folder(Path(config.data_dir), role, split)
    if class_map is not None:
        names = tuple(sorted(class_map, key=class_map.__getitem__))
        if class_names is not None:
            check_class_count(names, len(class_names))
        return ImageFolder(folder, class_map), names
    source = ImageFolder(folder)
    names = class_names_of(source)
    if class_names is None or names == class_names:
        return source, names
    check_class_names(names, class_names, str(folder))
    source.set_classes({name: i for i, name in enumerate(class_names)})
    return source, class_names


def _split_folder(root: Path, role: str, split: str | None) -> Path:
    try:
        if not root.is_dir():
            raise DataError(
                f"data folder {root} is not a folder" if root.exists() else f"data folder {root} does not exist"
            )
        if split is not None:
            if not (root / split).is_dir():
                raise DataError(f"data folder {root} has no split {split!r}")
            return root / split
        candidates = _TRAIN_FOLDERS if role == "train" else _VALIDATION_FOLDERS
        for name in candidates:
            if (root / name).is_dir():
                return root / name
        if role != "train" and not any((root / name).is_dir() for name in _TRAIN_FOLDERS):
            return root  # the folder of a split was given
    except OSError as error:
        raise DataError(f"data folder {root} cannot be read: {error.strerror or error}") from None
    raise DataError(f"data folder {root} has no {', '.join(c + '/' for c in candidates)} with a folder per class")
