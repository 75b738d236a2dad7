"""Weights in the files of others: found within their wrappers, and compared with the architecture before it is allocated."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from timm.models import clean_state_dict
from torch import Tensor, nn

from dfs_cli.errors import WeightsError, first_line

_DEPTH = 3
_AVERAGED = re.compile(r"(^|[._])(ema|averaged|swa)([._]|$)")


class Weights(NamedTuple):
    """The tensors of one network.

    Args:
        tensors: by name, as the network's own.
        entry: the key of the file under which they were, empty where they are all that it holds.
        others: keys of other networks' weights in the file.
    """

    tensors: dict[str, Tensor]
    entry: str
    others: tuple[str, ...] = ()

    @property
    def note(self) -> str:
        """What to say about the choice; empty where there was none."""
        return f"{self.entry}, not {', '.join(self.others)}" if self.others else ""


def read_weights(path: Path, outline: nn.Module | None = None) -> Weights:
    """The weights in a checkpoint file. No code in it is run.

    Wrappers are opened where there is only one reading: a single dictionary of tensors under whatever key, and prefixes that
    all names have (``module.``, ``_orig_mod.``, ``model.``). Of plain and averaged weights (EMA) the averaged ones are taken,
    as timm does.

    Args:
        outline: the network that they are for, which may be on the meta device; None: the names are kept.

    Raises:
        WeightsError: the file is missing, unreadable, holds no named tensors, or several sets of them.
    """
    names = set() if outline is None else set(outline.state_dict())
    found = {key: _own_names(state, names) for key, state in _states(_read(path))}
    if not found:
        raise WeightsError(f"checkpoint {path} holds no plain dictionary of tensors: save model.state_dict()")
    keys = [key for key in found if found[key].keys() == names] or list(found)
    averaged = [key for key in keys if _AVERAGED.search(key)]
    if len(keys) > 1 and len(averaged) != 1:
        shown = ", ".join(repr(key) for key in keys[:5])
        raise WeightsError(
            f"checkpoint {path} holds several sets of weights ({shown}): save the one that is meant alone"
        )
    (key,) = averaged if len(keys) > 1 else keys
    return Weights(found[key], key, tuple(other for other in keys if other != key))


def _read(path: Path) -> Any:
    if path.is_dir():
        raise WeightsError(f"checkpoint {path} is a folder: pass the file of weights in it")
    if not path.is_file():
        raise WeightsError(f"checkpoint {path} {'is not a file' if path.exists() else 'does not exist'}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the file's age, to its author
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise WeightsError(
            f"checkpoint {path} cannot be read as weights: it is damaged, or holds Python objects, which could run code; save "
            "model.state_dict()"
        ) from None
    except Exception as error:  # unpickling hostile or truncated bytes can raise anything
        raise WeightsError(f"checkpoint {path} cannot be read as weights: {first_line(error)[:160]}") from None


def _check_archive(path: Path) -> None:
    """Raises ValueError for a compressed archive: torch writes none, and a small one may expand to any size."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                raise ValueError("it is a compressed archive")


def _states(content: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The dictionaries of tensors within ``content``, with the keys that lead to them."""
    if not isinstance(content, Mapping) or not content or depth > _DEPTH:
        return
    if all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        yield key, dict(content)
        return
    for name, value in content.items():
        if isinstance(name, str) and len(content) < 1000:
            yield from _states(value, f"{key}.{name}" if key else name, depth + 1)


def _own_names(state: dict[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    """``state`` without the prefixes of wrappers; ``names`` are those of the network, or none."""
    if all(name.startswith("module.") for name in state if name != "n_averaged"):
        state = {name: tensor for name, tensor in state.items() if name != "n_averaged"}  # torch's AveragedModel
    state = clean_state_dict(state)
    while names and not names & state.keys():
        first, dot, _ = next(iter(state), "").partition(".")
        if not dot or not all(name.startswith(first + dot) for name in state):
            break
        state = clean_state_dict({name[len(first + dot) :]: tensor for name, tensor in state.items()})
    return state


def check_fit(
    path: Path, name: str, weights: Mapping[str, Tensor], outline: nn.Module, apart: str | None = None
) -> None:
    """Compare ``weights`` with the network ``outline``, which may be on the meta device.

    Args:
        path, name: of checkpoint and architecture, for messages.
        apart: the path of a module that gets other weights.

    Raises:
        WeightsError: a tensor is missing, unknown, of another shape or kind, not finite, or a negative variance; the message
            names it.
    """
    expected = {k: v for k, v in outline.state_dict().items() if not apart or not k.startswith(f"{apart}.")}
    given = {k: v for k, v in weights.items() if not apart or not k.startswith(f"{apart}.")}
    optional = {k for k in expected if k.endswith("num_batches_tracked")}  # as in PyTorch, of old checkpoints

    def refuse(reason: str) -> WeightsError:
        return WeightsError(f"checkpoint {path} does not fit {name}: {reason}")

    for kind, keys in (
        ("lacks", expected.keys() - given.keys() - optional),
        ("has unknown", given.keys() - expected.keys()),
    ):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise refuse(f"it {kind} {min(keys)[:80]}{more}")
    for key, tensor in given.items():
        if tensor.shape != expected[key].shape:
            raise refuse(f"{key} has shape {tuple(tensor.shape)} where {tuple(expected[key].shape)} was expected")
        is_number = tensor.is_floating_point() or (
            tensor.dtype == torch.int64 and not expected[key].is_floating_point()
        )
        if not is_number or tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise refuse(
                f"{key} is of {tensor.dtype}, {tensor.layout}, where plain floating point numbers were expected"
            )
        if not bool(tensor.float().isfinite().all()):
            raise refuse(f"{key} holds infinite or undefined numbers")
        if key.endswith("running_var") and bool((tensor < 0).any()):
            raise refuse(f"{key} holds negative variances")
