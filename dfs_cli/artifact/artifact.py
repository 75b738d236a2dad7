"""Saving and loading converted networks, strictly."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save as serialise
from torch import Tensor

from dfs_cli.artifact.manifest import Manifest
from dfs_cli.artifact.packing import check_shapes, load_packed, packed_tensors
from dfs_cli.artifact.verify import check_figures, check_values, convert_model, create_model
from dfs_cli.atomic import File
from dfs_cli.errors import ArtifactError, DfsError, is_out_of_memory
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.outputs import reserve

_MANIFEST, _DIGEST = "dfs_manifest", "dfs_sha256"


def save_artifact(path: Path, network: DynamicResNet, manifest: Manifest, force: bool = False) -> None:
    """Write ``network`` and ``manifest`` to one safetensors file, atomically, after a check that it loads.

    Raises:
        OutputError: the file exists (unless ``force``) or cannot be written.
        ArtifactError: the loaded file gives other logits or decisions than ``network``.
    """
    with reserve([path], force) as outputs:
        outputs.write([artifact_file(path, network, manifest)])


def artifact_file(path: Path, network: DynamicResNet, manifest: Manifest) -> File:
    """The file of ``network`` and ``manifest``, ready to be written to ``path``.

    Its check raises ArtifactError where the loaded file gives other logits or decisions than ``network``.
    """
    tensors = packed_tensors(network)
    text = manifest.to_json()
    metadata = {"format": "pt", _MANIFEST: text, _DIGEST: tensor_digest(tensors, text)}
    content = serialise(tensors, metadata=metadata)
    return File(path, content, check=lambda temporary: _check_identical(temporary, network, manifest))


@torch.no_grad()
def _check_identical(path: Path, network: DynamicResNet, manifest: Manifest) -> None:
    """Raises ArtifactError unless the file gives bit-identical logits and decisions on random images."""
    device = network.device
    loaded, _ = load_artifact(path, device)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, *manifest.preprocessing.input_size, generator=generator).to(device)
    was_training = network.training
    expected, actual = network.eval().run(images), loaded.run(images)
    network.train(was_training)
    same = torch.equal(expected.logits, actual.logits) and bool(expected.decisions.equal(actual.decisions).all())
    if not same:
        raise ArtifactError("the written file gives other logits than the network: it was not kept")


def read_manifest(path: Path) -> Manifest:
    """The manifest alone, checked as for :func:`load_artifact`; the network is not allocated.

    Raises:
        ArtifactError: as :func:`load_artifact`.
    """
    return _read(path)[0]


def load_artifact(path: Path, device: torch.device | str = "cpu") -> tuple[DynamicResNet, Manifest]:
    """The network, in evaluation mode, and its manifest. Nothing in the file is executed.

    Raises:
        ArtifactError: the file is missing, truncated, not written by dfs, or was changed after it was written; its figures
            are not those of the network; or it holds numbers that no tuned network has.
    """
    manifest, tensors = _read(path)
    with _fitting(path):
        network = convert_model(create_model(manifest, "cpu"), manifest)
        load_packed(network, tensors)
        check_values(network, manifest)
    return network.to(device).eval(), manifest


@contextmanager
def _fitting(path: Path) -> Iterator[None]:
    """Whatever does not fit within the context is an ArtifactError."""
    try:
        yield
    except (DfsError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise ArtifactError(f"{path} does not fit the network it describes: {reason}") from None


def _read(path: Path) -> tuple[Manifest, dict[str, Tensor]]:
    """Manifest and tensors of an intact file, compared with the network that the manifest describes."""
    if not path.is_file():
        raise ArtifactError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"{path} is not an intact safetensors file: {' '.join(str(error).split())[:160]}") from None
    if _MANIFEST not in metadata:
        raise ArtifactError(f"{path} is a safetensors file, but not one that dfs convert wrote: it has no manifest")
    # The format version is checked before the checksum: another version may compute it differently.
    manifest = Manifest.from_json(metadata[_MANIFEST])
    if metadata.get(_DIGEST) != tensor_digest(tensors, metadata[_MANIFEST]):
        raise ArtifactError(f"{path} was changed after it was written: its checksum does not match")
    with _fitting(path):
        outline = create_model(manifest, "meta")
        check_figures(manifest, outline)
        check_shapes(convert_model(outline, manifest), tensors)
    return manifest, tensors


def tensor_digest(tensors: dict[str, Tensor], text: str = "") -> str:
    """SHA-256 over ``text`` and every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
