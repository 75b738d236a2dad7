"""Finding and loading models: timm's names, timm's weights, or a checkpoint."""

from __future__ import annotations

import difflib
import os
import socket
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import timm
import torch
from huggingface_hub import constants, try_to_load_from_cache
from timm.models import (
    get_deprecated_models,
    get_pretrained_cfg,
    get_pretrained_cfg_value,
    is_model_in_modules,
    is_model_pretrained,
    split_model_name_tag,
)
from torch import nn

from dfs_cli.errors import UnsupportedModelError, WeightsError, first_line
from dfs_cli.models.checkpoints import Weights, check_fit, read_weights
from dfs_cli.ranges import LARGEST_SEED, check_range
from dfs_cli.surgery.families import FAMILIES, LAYOUTS
from dfs_cli.surgery.plan import find_blocks

_MODULES = sorted({cls.__module__.rpartition(".")[2] for cls in (*LAYOUTS, *FAMILIES)} | {"cifar"})
"""Registry modules that are searched for convertible models: those that define a supported class."""


class Loaded(NamedTuple):
    """A model in evaluation mode.

    Args:
        model: the model.
        weights: what to record about its weights: the checkpoint, and which weights in it were taken where there is a choice;
            ``random``; None: they are timm's.
    """

    model: nn.Module
    weights: str | None


def candidate_names() -> list[str]:
    """Every architecture registered by a module that defines a supported class."""
    return sorted({name for module in _MODULES for name in timm.list_models(module=module)})


def is_candidate(name: str) -> bool:
    """Whether ``name``, which has no weight tag, is among :func:`candidate_names`."""
    return "." not in name and is_model_in_modules(name, _MODULES)


def close_matches(name: str) -> str:
    """A hint that names convertible models spelt like ``name``; empty where there are none."""
    matches = difflib.get_close_matches(split_model_name_tag(name)[0], candidate_names(), n=3, cutoff=0.5)
    return f"; close matches: {', '.join(matches)}" if matches else "; see dfs list"


def current_name(name: str) -> str:
    """What timm calls today what it called ``name`` before; any other name as it is.

    Raises:
        UnsupportedModelError: timm has it no longer.
    """
    current = get_deprecated_models().get(name, name)
    if current is None:
        raise UnsupportedModelError(f"{name} was removed from timm{close_matches(name)}")
    return current


def check_name(name: str) -> None:
    """Raises UnsupportedModelError unless ``name`` is a registered timm architecture, with a valid weight tag if any."""
    if not timm.is_model(name):
        raise UnsupportedModelError(f"unknown model {name!r}{close_matches(name)}")
    try:
        get_pretrained_cfg(name)
    except RuntimeError:
        arch = split_model_name_tag(name)[0]
        tags = ", ".join(t for t in timm.list_pretrained(arch + ".*")) or "none"
        raise UnsupportedModelError(f"unknown weights {name!r}: {arch} has {tags}") from None


def _arguments(num_classes: int | None, in_chans: int | None) -> dict[str, int]:
    """The arguments of ``timm.create_model`` that are given.

    Raises:
        ConfigError: one is out of range.
    """
    check_range("num-classes", num_classes, 2, 2**20)
    check_range("in-chans", in_chans, 1, 2**12)
    return {k: v for k, v in (("num_classes", num_classes), ("in_chans", in_chans)) if v is not None}


def _build(name: str, **kwargs: Any) -> nn.Module:
    model: nn.Module = timm.create_model(name, **kwargs)
    return model


def check_convertible(name: str) -> str:
    """The current name of an architecture that can be converted.

    Raises:
        UnsupportedModelError: it is unknown or cannot be converted; the message says why.
    """
    name = current_name(name)
    check_name(name)
    with torch.device("meta"):
        model = _build(name)
    try:
        find_blocks(model)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{name}: {error}{close_matches(name)}") from None
    return name


def load_outline(
    name: str, checkpoint: Path | None = None, num_classes: int | None = None, in_chans: int | None = None
) -> nn.Module:
    """The architecture of :func:`load_model`, without meaningful weights, for counting: fast, and small in memory.

    Raises:
        UnsupportedModelError: the architecture is unknown or cannot be converted.
        WeightsError: ``checkpoint`` cannot be read or does not fit.
    """
    name, kwargs = check_convertible(name), _arguments(num_classes, in_chans)
    if checkpoint is not None:
        _read_checkpoint(name, checkpoint, kwargs)
    with torch.device("meta"):
        model = _build(name, **kwargs)
    return model.to_empty(device="cpu").eval()


def load_model(
    name: str,
    pretrained: bool = True,
    checkpoint: Path | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    seed: int = 0,
) -> nn.Module:
    """A convertible timm model in evaluation mode.

    Args:
        name: a timm architecture, with or without a weight tag.
        pretrained: load timm's weights, unless ``checkpoint`` is given.
        checkpoint: a file of weights (.safetensors, .pth, .pt, .tar) that match the architecture strictly.
        num_classes: number of classes; where the weights have another number, the classifier is new and random.
        in_chans: input channels other than the model's own.
        seed: of random weights; the caller's generators are left as they were.

    Raises:
        UnsupportedModelError: the architecture is unknown or cannot be converted.
        WeightsError: weights are missing, unreachable, unreadable or do not match.
        ConfigError: a number is out of range.

    Example:
        >>> import dfs_cli
        >>> model = dfs_cli.load_model("resnet18", pretrained=False, num_classes=50)
        >>> model.fc.out_features
        50
    """
    return load_described(name, pretrained, checkpoint, num_classes, in_chans, seed).model


def load_described(
    name: str, pretrained: bool, checkpoint: Path | None, num_classes: int | None, in_chans: int | None, seed: int
) -> Loaded:
    """As :func:`load_model`, with where the weights come from."""
    check_range("seed", seed, 0, LARGEST_SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        name, kwargs = check_convertible(name), _arguments(num_classes, in_chans)
        if checkpoint is not None:
            return _load_checkpoint(name, checkpoint, kwargs)
        if not pretrained:
            return Loaded(_build(name, **kwargs).eval(), "random")
        return Loaded(_load_pretrained(name, kwargs), None)


def _load_pretrained(name: str, kwargs: dict[str, Any]) -> nn.Module:
    if not is_model_pretrained(name):
        raise WeightsError(f"timm has no pretrained weights for {name}: pass --checkpoint FILE (or --no-pretrained)")
    _check_hub(name)
    try:
        return _build(name, pretrained=True, **kwargs).eval()
    except Exception as error:  # the hub's client raises many kinds of errors, and documents no complete list
        raise WeightsError(
            f"the weights of {name} could not be loaded ({first_line(error)[:120]}): pass --checkpoint FILE, "
            "or --no-pretrained for random weights"
        ) from None


def _check_hub(name: str) -> None:
    """Raises WeightsError at once where the hub cannot be reached: its client would retry for a minute first."""
    cfg = get_pretrained_cfg(name)
    if cfg is None or not cfg.hf_hub_id or cfg.file or any(k.lower().endswith("_proxy") for k in os.environ):
        return
    files = ("model.safetensors", "pytorch_model.bin")
    if any(isinstance(try_to_load_from_cache(cfg.hf_hub_id, file), str) for file in files):
        return
    hub = urlsplit(constants.ENDPOINT)
    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        socket.create_connection((hub.hostname or "", hub.port or 443), timeout=10).close()
    except OSError as error:
        raise WeightsError(
            f"the weights of {name} are not on this machine and the hub {constants.ENDPOINT} cannot be reached "
            f"({error.strerror or error}): pass --checkpoint FILE, or --no-pretrained for random weights"
        ) from None


def _read_checkpoint(name: str, path: Path, kwargs: dict[str, Any]) -> tuple[Weights, str | None]:
    """The weights in ``path``, compared with the architecture, and the path of its classifier where that needs new ones.

    Raises:
        WeightsError: they do not fit, or have another number of classes than the architecture and none was asked for.
    """
    classifier, num_classes = str(get_pretrained_cfg_value(name, "classifier")), kwargs.get("num_classes")
    with torch.device("meta"):
        outline = _build(name, **kwargs)
    weights = read_weights(path, outline)
    state = weights.tensors
    weight = state.get(f"{classifier}.weight")
    classes = weight.shape[0] if weight is not None and weight.dim() else None
    expected = outline.state_dict()[f"{classifier}.weight"].shape[0]
    is_another = classes is not None and classes != expected
    check_fit(path, name, state, outline, classifier if is_another else None)
    if is_another and num_classes is None:
        raise WeightsError(
            f"checkpoint {path} has {classes} classes and {name} has {expected}: pass --num-classes {classes} to keep its "
            "classifier, or another number for a new one"
        )
    return weights, classifier if is_another else None


def _load_checkpoint(name: str, path: Path, kwargs: dict[str, Any]) -> Loaded:
    weights, new_classifier = _read_checkpoint(name, path, kwargs)
    state, model = weights.tensors, _build(name, **kwargs)
    if new_classifier:
        state = {k: v for k, v in state.items() if not k.startswith(f"{new_classifier}.")}
        state |= model.get_submodule(new_classifier).state_dict(prefix=f"{new_classifier}.")
    optional = {k: v for k, v in model.state_dict().items() if k.endswith("num_batches_tracked")}
    model.load_state_dict(optional | state, strict=True)
    return Loaded(model.eval(), f"{path} ({weights.note})" if weights.note else str(path))
