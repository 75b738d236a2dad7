import copy
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

import dfs_cli
from dfs_cli.artifact.artifact import load_artifact, read_manifest, save_artifact, tensor_digest
from dfs_cli.artifact.manifest import ModelArgs
from dfs_cli.artifact.packing import packed_tensors
from dfs_cli.control.threshold import NEVER_REFINE
from dfs_cli.errors import ArtifactError, DfsError, OutputError

pytestmark = pytest.mark.medium


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
    assert torch.equal(a.logits, b.logits) and bool(a.decisions.equal(b.decisions).all())
    assert other == manifest and other.operating_point == first.controller.operating_point


def test_manifest_says_everything(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    assert manifest.architecture == "resnet20_digits"
    assert manifest.model_args == ModelArgs(num_classes=10, in_chans=1)
    assert manifest.class_names == tuple("0123456789")
    assert manifest.dynamic.gate == "probe" and manifest.table.options == manifest.dynamic.bits
    assert manifest.budget == 0.2 and manifest.spend
    assert manifest.source.weights == "resnet20_digits.sklearn" and manifest.source.license == "mit"
    configuration, validation, held_out = manifest.configuration, manifest.validation, manifest.held_out
    assert configuration is not None and validation is not None and held_out is not None
    assert configuration.tuning.batch_size == 64 and configuration.steps == 2 * (1167 // 64)
    assert configuration.images == {"train": 1167, "calibration": 180, "validation": 450}
    assert validation.images == 450 and all(sum(block) == 450 for block in validation.choices[0])
    second = validation.choices[1]
    assert all(sum(block) == round(450 * (validation.passes - 1)) for block in second)
    # 180 held-out images: the accuracy is a multiple of one of them.
    assert held_out.cost <= 0.2 and held_out.top1 is not None
    assert held_out.top1 * 1.8 == pytest.approx(round(held_out.top1 * 1.8))


def test_saving_that_does_not_load_back_leaves_nothing(artifact: Path, tmp_path: Path) -> None:
    network, manifest = load_artifact(artifact)
    path = tmp_path / "model.safetensors"
    moved = copy.deepcopy(network)
    moved.controller.operating_point = -1e6
    with pytest.raises(ArtifactError, match="other logits"):
        save_artifact(path, moved, manifest.replace(operating_point=NEVER_REFINE))
    with pytest.raises(DfsError):
        save_artifact(path, make_dynamic(tiny_resnet()), manifest)
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


@pytest.mark.medium
def test_files_load_where_nothing_else_was_imported(artifact: Path) -> None:
    code = f"from dfs_cli.artifact.artifact import load_artifact; load_artifact(__import__('pathlib').Path({str(artifact)!r}))"
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


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "hf-hub:someone/model"},
        {"architecture": "local-dir:/tmp"},
        {"model_args": {"num_classes": 10, "in_chans": 1, "checkpoint_path": "/tmp/x.pth"}},
        {"model_args": {"num_classes": 11, "in_chans": 1}},
        {"model_args": {"num_classes": "ten", "in_chans": 1}},
    ],
)
def test_a_consistent_forgery_still_runs_no_code(changes: dict[str, object], artifact: Path, tmp_path: Path) -> None:
    """With a matching checksum, an architecture that names code or a path elsewhere is refused."""
    network, manifest = load_artifact(artifact)
    text = json.dumps(json.loads(manifest.to_json()) | changes)
    with pytest.raises(ArtifactError):
        load_artifact(forge(tmp_path, text, packed_tensors(network)))


def test_the_forger_can_forge(artifact: Path, tmp_path: Path) -> None:
    network, manifest = load_artifact(artifact)
    load_artifact(forge(tmp_path, manifest.to_json(), packed_tensors(network)))


def test_missing_and_extra_tensors_are_refused(artifact: Path, tmp_path: Path) -> None:
    """With a matching checksum too: loading is strict."""
    network, manifest = load_artifact(artifact)
    tensors = packed_tensors(network)
    fewer = {k: v for k, v in tensors.items() if k != "controller.gate.head.weight"}
    wrong_shape = tensors | {"controller.gate.head.weight": torch.zeros(5, 3)}
    for changed in (fewer, tensors | {"extra": torch.zeros(1)}, wrong_shape):
        with pytest.raises(ArtifactError, match="does not fit"):
            load_artifact(forge(tmp_path, manifest.to_json(), changed))


def forge(folder: Path, manifest: str, tensors: dict[str, torch.Tensor]) -> Path:
    """A file with a checksum that matches whatever is in it."""
    path = folder / "forged.safetensors"
    save_file(tensors, path, metadata={"dfs_manifest": manifest, "dfs_sha256": tensor_digest(tensors, manifest)})
    return path


def test_existing_files_need_force(artifact: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(artifact, tmp_path / "model.safetensors"))
    network, manifest = load_artifact(path)
    with pytest.raises(OutputError, match="--force"):
        save_artifact(path, network, manifest)
    save_artifact(path, network, manifest, force=True)
