"""Opening datasets: a folder, a reader of timm, or the embedded digits, divided into train, calibration, validation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageDataset, create_dataset
from torch.utils.data import IterableDataset

from dfs_cli.config import DataConfig, Preprocessing
from dfs_cli.data import digits
from dfs_cli.data.images import Images
from dfs_cli.data.preprocessing import eval_transform
from dfs_cli.errors import ConfigError, DataError

DIGITS = "digits"
_TRAIN_FOLDERS = ("train",)
_VALIDATION_FOLDERS = ("val", "validation", "test")
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


def open_splits(config: DataConfig, preprocessing: Preprocessing, seed: int = 0) -> Splits:
    """Open train and validation split, and hold out a tenth of the training images (at most 5,000 and at most 1 GiB).

    All three splits have the evaluation transform.

    Raises:
        ConfigError: the model takes neither 1 nor 3 channels.
        DataError: a split is missing, empty, has one class, or the splits' classes differ.
    """
    transform = eval_transform(preprocessing)
    if config.dataset == DIGITS:
        mode = _image_mode(preprocessing)
        opened = {
            split: _limit(Images(digits.Digits(split), transform, mode=mode), config, split_seed)
            for split, split_seed in (("train", seed), ("validation", _VALIDATION_SEED))
        }
        calibration = Images(digits.Digits("calibration"), transform, mode=mode)
        return Splits(opened["train"], calibration, opened["validation"], digits.CLASS_NAMES)
    mode = _image_mode(preprocessing)
    train_source = _open(config, "train", config.train_split, mode, None)
    class_names = _class_names(train_source)
    validation_source = _open(config, "validation", config.val_split, mode, class_names)
    train = _limit(Images(train_source, transform, mode=mode), config, seed)
    validation = _limit(Images(validation_source, transform, mode=mode), config, _VALIDATION_SEED)
    # Held-out images stay in memory, as 32-bit numbers.
    fitting = _CALIBRATION_BYTES // (4 * math.prod(preprocessing.input_size))
    held_out = min(int(len(train) * _CALIBRATION_SHARE), _CALIBRATION_LIMIT, fitting)
    if held_out < 1:
        raise DataError(f"{len(train)} training images are too few: a tenth of them is held out for calibration")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    return Splits(
        train.subset(sorted(order[held_out:])), train.subset(sorted(order[:held_out])), validation, class_names
    )


def open_validation(config: DataConfig, preprocessing: Preprocessing, class_names: tuple[str, ...]) -> Images:
    """The validation split alone, its classes mapped by name to the indices of ``class_names``.

    Raises:
        ConfigError: the model takes neither 1 nor 3 channels.
        DataError: the split is missing or empty, or its classes differ from ``class_names``.
    """
    mode = _image_mode(preprocessing)
    if config.dataset == DIGITS:
        _check_class_names(digits.CLASS_NAMES, class_names, "the embedded digits")
        source: Any = digits.Digits("validation")
    else:
        source = _open(config, "validation", config.val_split, mode, class_names)
    return _limit(Images(source, eval_transform(preprocessing), mode=mode), config, _VALIDATION_SEED)


def check_class_count(class_names: tuple[str, ...], num_classes: int) -> None:
    """Raises DataError unless the data has as many classes as the network."""
    if len(class_names) != num_classes:
        raise DataError(
            f"the data has {len(class_names)} classes and the model's classifier has {num_classes}: they must agree"
        )


def _image_mode(preprocessing: Preprocessing) -> str:
    channels = preprocessing.input_size[0]
    if channels not in (1, 3):
        raise ConfigError(f"the model takes {channels} channels: image files have 1 or 3")
    return "L" if channels == 1 else "RGB"


def _limit(images: Images, config: DataConfig, seed: int) -> Images:
    if config.num_samples is None or config.num_samples >= len(images):
        return images
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    return images.subset(sorted(order[: config.num_samples]))


def _open(config: DataConfig, role: str, split: str | None, mode: str, class_names: tuple[str, ...] | None) -> Any:
    if not config.dataset:
        return _open_folder(config, role, split, mode, class_names)
    try:
        source = create_dataset(
            config.dataset,
            root=config.data_dir,
            split=split or role,
            is_training=False,
            download=config.download,
            input_img_mode=mode,
        )
    except Exception as error:  # readers come from many libraries, each with different errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"dataset {config.dataset!r} could not be opened: {reason[:200]}") from None
    if isinstance(source, IterableDataset):
        raise DataError(f"dataset {config.dataset!r} is a stream: held-out images need a reader with random access")
    if class_names is not None:
        names = _class_names(source)
        _check_class_names(names, class_names, f"dataset {config.dataset!r}")
        if names != class_names:
            raise DataError(f"dataset {config.dataset!r} orders its classes differently from the model")
    return source


def _check_class_names(names: tuple[str, ...], expected: tuple[str, ...], where: str) -> None:
    """Raises DataError unless both name the same classes."""
    check_class_count(names, len(expected))
    if unknown := sorted(set(names) - set(expected)):
        raise DataError(f"{where} has a class {unknown[0]!r} that is not among {_shorten(expected)}")


def _open_folder(
    config: DataConfig, role: str, split: str | None, mode: str, class_names: tuple[str, ...] | None
) -> ImageDataset:
    assert config.data_dir is not None, "checked by the caller"
    folder = _split_folder(Path(config.data_dir), role, split)
    if not any(p.is_dir() for p in folder.iterdir()):
        raise DataError(f"{folder} has no class folders: expected one folder of images per class")
    try:
        source = ImageDataset(str(folder), input_img_mode=mode)
    except RuntimeError:
        raise DataError(f"{folder} has no images in its class folders") from None
    names = _class_names(source)
    if class_names is None or names == class_names:
        return source
    _check_class_names(names, class_names, str(folder))
    return ImageDataset(str(folder), class_map={name: i for i, name in enumerate(class_names)}, input_img_mode=mode)


def _split_folder(root: Path, role: str, split: str | None) -> Path:
    if not root.is_dir():
        raise DataError(f"data folder {root} does not exist")
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
    raise DataError(f"data folder {root} has no {', '.join(c + '/' for c in candidates)} with a folder per class")


def _class_names(source: Any) -> tuple[str, ...]:
    reader = getattr(source, "reader", source)
    if isinstance(mapping := getattr(reader, "class_to_idx", None), dict):
        names = tuple(str(name) for name, _ in sorted(mapping.items(), key=lambda item: item[1]))
    elif classes := getattr(source, "classes", None):
        names = tuple(map(str, classes))
    else:
        features = getattr(getattr(reader, "dataset", None), "features", {})
        label = features.get(getattr(reader, "label_key", ""), None)
        names = tuple(getattr(label, "names", None) or ())
    if len(names) < 2:
        raise DataError(f"the data has {'one class' if names else 'no classes'}: at least two are needed")
    return names


def _shorten(names: tuple[str, ...], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
