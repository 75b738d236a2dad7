"""The classes of a dataset: their names and their order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.data.readers.class_map import load_class_map

from dfs_cli.config import DataConfig
from dfs_cli.errors import DataError, first_line


def check_class_count(class_names: tuple[str, ...], num_classes: int) -> None:
    """Raises DataError unless the data has as many classes as the network."""
    if len(class_names) != num_classes:
        raise DataError(
            f"the data has {len(class_names)} classes ({_shorten(class_names)}) and the model's classifier has "
            f"{num_classes}: they must agree"
        )


def check_class_names(names: tuple[str, ...], expected: tuple[str, ...], where: str) -> None:
    """Raises DataError unless both name the same classes."""
    if unknown := sorted(set(names) - set(expected)):
        raise DataError(f"{where} has a class {unknown[0]!r} that is not among {_shorten(expected)}")
    if missing := sorted(set(expected) - set(names)):
        raise DataError(f"{where} has no images of class {missing[0]!r}, one of {len(expected)}: {_shorten(expected)}")


def class_names_of(source: Any) -> tuple[str, ...]:
    """Names of the classes of a dataset, in the order of their indices.

    Raises:
        DataError: there are fewer than two.
    """
    reader = getattr(source, "reader", source)
    if isinstance(mapping := getattr(reader, "class_to_idx", None), dict):
        names: tuple[str, ...] = tuple(str(name) for name, _ in sorted(mapping.items(), key=lambda item: item[1]))
    elif classes := getattr(source, "classes", None):
        names = tuple(map(str, classes))
    else:
        features = getattr(getattr(reader, "dataset", None), "features", {})
        label = features.get(getattr(reader, "label_key", ""), None)
        names = tuple(getattr(label, "names", None) or ())
    if len(names) < 2:
        raise DataError(f"the data has {'one class' if names else 'no classes'}: at least two are needed")
    return names


def read_class_map(config: DataConfig) -> dict[str, int] | None:
    """Class indices by name, from the file that the settings name.

    Raises:
        DataError: it cannot be read, or does not give every index from 0 on one name.
    """
    if config.class_map is None:
        return None
    try:
        class_map = load_class_map(config.class_map, config.data_dir or "")
    except Exception as error:  # assertions, and whatever unpickling raises
        raise DataError(f"class map {config.class_map} cannot be read: {first_line(error)[:200]}") from None
    if class_map.get("") == len(class_map) - 1:
        del class_map[""]  # an empty last line
    if sorted(map(str, class_map.values())) != sorted(map(str, range(len(class_map)))) or len(class_map) < 2:
        given = _shorten([f"{name} is {index}" for name, index in class_map.items()])
        raise DataError(
            f"class map {config.class_map} does not give each index from 0 on one name: {given or 'it is empty'}"
        )
    return {str(name): int(index) for name, index in class_map.items()}


def _shorten(names: Sequence[str], limit: int = 12) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
