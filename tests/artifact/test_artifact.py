import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common import make_dynamic, tiny_resnet
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models.resnet import BasicBlock

import dfs_cli
from dfs_cli.artifact.artifact import load_artifact, read_manifest
from dfs_cli.atomic import check_writable, write_atomically
from dfs_cli.control.probe import EVERYBODY_IS_SURE
from dfs_cli.errors import ArtifactError, DfsError, OutputError


def rewrite(source: Path, target: Path, **changes: object) -> Path:
    """Copy an artifact with another manifest value, the checksum left as it was."""
    with safe_open(str(source), framework="pt") as file:
        metadata = dict(file.metadata())
    manifest = json.loads(metadata["dfs_manifest"]) | changes
    metadata["dfs_manifest"] = json.dumps(manifest, sort_keys=True)
    save_file(load_file(source), target, metadata=metadata)
    return target


def test_saved_and_loaded_is_bit_identical(artifact: Path, tmp_path: Path) -> None:
    first, manifest = load_artifact(artifact)
    again = tmp_path / "again.safetensors"
    dfs_cli.save(dfs_cli.Converted(first, manifest), again)
    second, other = load_artifact(again)
    images = torch.rand(32, 1, 8, 8)
    with torch.no_grad():
        a, b = first.run(images), second.run(images)
    assert torch.equal(a.logits, b.logits) and torch.equal(a.decisions, b.decisions)
    assert other == manifest and other.operating_point == first.operating_point


def test_manifest_says_everything(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    assert manifest.architecture == "resnet20_digits"
    assert manifest.model_args == {"num_classes": 10, "in_chans": 1}
    assert manifest.class_names == tuple("0123456789")
    assert manifest.dynamic == dfs_cli.DynamicConfig()
    assert manifest.budget == 0.2
    assert manifest.source["weights"] == "resnet20_digits.sklearn" and manifest.source["license"] == "mit"
    assert manifest.configuration["tuning"]["batch_size"] == 64
    assert manifest.validation is not None and manifest.validation.images == 450
    assert all(sum(row) == 450 * manifest.validation.passes >= 450 for row in manifest.validation.choices)


def test_saving_that_does_not_load_back_leaves_nothing(artifact: Path, tmp_path: Path) -> None:
    network, manifest = load_artifact(artifact)
    path = tmp_path / "model.safetensors"
    wrong = dataclasses.replace(manifest, operating_point=EVERYBODY_IS_SURE)
    with pytest.raises(ArtifactError, match="other logits"):
        dfs_cli.save(dfs_cli.Converted(network, wrong), path)
    stranger = make_dynamic(tiny_resnet(BasicBlock))
    with pytest.raises(DfsError):
        dfs_cli.save(dfs_cli.Converted(stranger, manifest), path)
    assert list(tmp_path.iterdir()) == []


def test_damaged_and_foreign_files_are_refused(artifact: Path, tmp_path: Path) -> None:
    whole = artifact.read_bytes()
    path = tmp_path / "x.safetensors"
    for content, reason in (
        (b"", "not an intact"),
        (whole[:100], "not an intact"),
        (whole[:-10], "not an intact"),
        (b"PK\x03\x04" + whole, "not an intact"),
        (whole[:-4] + bytes(b ^ 1 for b in whole[-4:]), "checksum"),
    ):
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match=reason):
            load_artifact(path)
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(ArtifactError, match="no manifest"):
        load_artifact(path)
    with pytest.raises(ArtifactError, match="does not exist"):
        load_artifact(tmp_path / "none.safetensors")
    with pytest.raises(ArtifactError, match="not a file"):
        load_artifact(tmp_path)


def test_files_load_where_nothing_else_was_imported(artifact: Path) -> None:
    code = (
        f"from dfs_cli.artifact.artifact import load_artifact; load_artifact(__import__('pathlib').Path({str(artifact)!r}))"
    )
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "changes",
    [{"operating_point": 3.0}, {"architecture": "resnet32_cifar"}, {"class_names": []}, {"budget": 0.01}],
)
def test_tampered_manifests_are_refused(changes: dict[str, object], artifact: Path, tmp_path: Path) -> None:
    changed = rewrite(artifact, tmp_path / "x.safetensors", **changes)
    for read in (load_artifact, read_manifest):
        with pytest.raises(ArtifactError, match="checksum"):
            read(changed)


def test_a_consistent_forgery_still_runs_no_code(artifact: Path, tmp_path: Path) -> None:
    """With a matching checksum, an architecture that names code or a path elsewhere is refused."""
    network, manifest = load_artifact(artifact)
    tensors = {k: v.contiguous() for k, v in network.state_dict().items()}
    for changes in (
        {"architecture": "hf-hub:someone/model"},
        {"architecture": "local-dir:/tmp"},
        {"model_args": {"num_classes": 10, "in_chans": 1, "checkpoint_path": "/tmp/x.pth"}},
        {"model_args": {"num_classes": 11, "in_chans": 1}},
        {"model_args": {"num_classes": "ten", "in_chans": 1}},
    ):
        text = dataclasses.replace(manifest, **changes).to_json()  # type: ignore[arg-type]
        with pytest.raises(ArtifactError):
            load_artifact(forge(tmp_path, text, tensors))


def test_other_format_versions_are_refused(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="format version 6"):
        read_manifest(rewrite(artifact, tmp_path / "x.safetensors", format_version=6))
    with pytest.raises(ArtifactError, match="damaged"):
        read_manifest(rewrite(artifact, tmp_path / "x.safetensors", dynamic={"bits": [1, 2]}))


def test_missing_and_extra_tensors_are_refused(artifact: Path, tmp_path: Path) -> None:
    """With a matching checksum too: loading is strict."""
    network, manifest = load_artifact(artifact)
    tensors = {k: v.contiguous() for k, v in network.state_dict().items()}
    assert not any("prices" in k for k in tensors), "what can be derived is not stored"
    fewer = {k: v for k, v in tensors.items() if k != "gate.head.weight"}
    wrong_shape = tensors | {"gate.head.weight": torch.zeros(5, 3)}
    for changed in (fewer, tensors | {"extra": torch.zeros(1)}, wrong_shape):
        with pytest.raises(ArtifactError, match="does not fit"):
            load_artifact(forge(tmp_path, manifest.to_json(), changed))


def forge(folder: Path, manifest: str, tensors: dict[str, torch.Tensor]) -> Path:
    """A file with a checksum that matches whatever is in it."""
    from dfs_cli.artifact.artifact import _DIGEST, _MANIFEST, tensor_digest

    path = folder / "forged.safetensors"
    save_file(tensors, path, metadata={_MANIFEST: manifest, _DIGEST: tensor_digest(tensors, manifest)})
    return path


def test_existing_files_need_force(artifact: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(artifact, tmp_path / "model.safetensors"))
    converted = dfs_cli.load(path)
    with pytest.raises(OutputError, match="--force"):
        dfs_cli.save(converted, path)
    dfs_cli.save(converted, path, force=True)
    with pytest.raises(OutputError, match="is a folder"):
        check_writable([tmp_path], force=True)
    with pytest.raises(OutputError, match="does not exist"):
        check_writable([tmp_path / "none" / "x"], force=True)


def test_atomic_writing_leaves_no_trace_of_a_failure(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    write_atomically(path, "one")

    def refuse(_: Path) -> None:
        raise ArtifactError("no")

    with pytest.raises(ArtifactError):
        write_atomically(path, "two", check=refuse)
    assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(OutputError):
        write_atomically(tmp_path / "none" / "x", "three")
