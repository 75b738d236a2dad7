import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

import dfs_cli
from dfs_cli.artifact.artifact import load_artifact, read_manifest, tensor_digest
from dfs_cli.artifact.packing import pack, packed_tensors
from dfs_cli.errors import ArtifactError
from dfs_cli.nn.network import DynamicResNet

pytestmark = pytest.mark.medium

Forge = Callable[..., Path]


@pytest.fixture(scope="module")
def loaded(artifact: Path) -> tuple[DynamicResNet, dfs_cli.Manifest]:
    return load_artifact(artifact)


@pytest.fixture
def forge(loaded: tuple[DynamicResNet, dfs_cli.Manifest], tmp_path: Path) -> Forge:
    """Writes the artifact with other values and tensors, and a checksum that matches them."""

    def make(values: dict[tuple[Any, ...], Any] | None = None, tensors: dict[str, torch.Tensor] | None = None) -> Path:
        network, manifest = loaded
        written = json.loads(manifest.to_json())
        for place, value in (values or {}).items():
            inner = written
            for part in place[:-1]:
                inner = inner[part]
            inner[place[-1]] = value
        text, path = json.dumps(written), tmp_path / "forged.safetensors"
        content = packed_tensors(network) | (tensors or {})
        save_file(content, path, metadata={"dfs_manifest": text, "dfs_sha256": tensor_digest(content, text)})
        return path

    return make


def test_what_is_forged_without_a_change_loads(forge: Forge, loaded: tuple[DynamicResNet, dfs_cli.Manifest]) -> None:
    assert read_manifest(forge()) == loaded[1]


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (("table", "layers", 0, "macs"), 1, "the layers of the cost table are not those of the network"),
        (("table", "layers", 3, "bits"), 8, "individual bitwidths for some layers only"),
        (("table", "layers", 0, "bits"), 4, "the layers of the cost table"),
        (("table", "blocks", 0), "[red]x[/nope]", "the blocks of the cost table"),
        (("table", "controller_macs", 0), [0] * 8 + [10**9], "the controller macs of the cost table"),
        (("preprocessing", "input_size"), [1, 16, 16], "the layers of the cost table"),
        (("architecture",), "resnet32_cifar", "the blocks of the cost table"),
        (("architecture",), "[red]x[/nope]", "none of those that dfs list lists"),
        (("architecture",), "vit_base_patch16_224", "none of those that dfs list lists"),
        (("architecture",), "hf-hub:timm/resnet18.a1_in1k", "none of those that dfs list lists"),
        (("configuration", "model"), "resnet18", "configuration"),
        (("movable",), [0.0, 0.1], "movable"),
        (("held_out", "cost"), 5.0, "held_out.cost"),
        (("agreement", "refitted"), ["layer9.conv1"], "'layer9.conv1' is no layer whose input could have a gain"),
        (("agreement", "refitted"), ["fc", "fc"], "named twice"),
        (("agreement", "refitted"), ["fc"], "backbone.fc.input_gain is missing"),
        (("agreement", "after"), 2.0, "agreement.after"),
        (("validation", "cost"), 0.001, "validation.cost 0.001 is not that of its choices"),
        (("validation", "cost_max"), 5.0, "cheapest and the dearest"),
        (("validation", "images"), 449, "do not add up"),
        (("validation", "choices"), [], "a count for each pass, block and option"),
        (("validation", "choices", 0), [], "a count for each pass, block and option"),
        (("validation", "choices", 0, 0), [450], "a count for each pass, block and option"),
        (("validation", "choices", 0, 0), [449, 0, 0, 0, 0], "for different numbers of images"),
        (("validation", "dynamics", "policies"), 10**6, "policies"),
        (("validation", "top5"), 0.0, "top5"),
    ],
)
def test_false_figures_are_refused_whatever_reads_them(
    place: tuple[Any, ...], value: object, reason: str, forge: Forge
) -> None:
    path = forge({place: value})
    for read in (read_manifest, load_artifact):
        with pytest.raises(ArtifactError, match=reason) as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_a_range_that_the_network_does_not_have_is_refused(
    forge: Forge, loaded: tuple[DynamicResNet, dfs_cli.Manifest]
) -> None:
    least, most = loaded[1].movable or (0.0, 0.0)
    with pytest.raises(ArtifactError, match="movable: not the costs that the network can be moved to"):
        load_artifact(forge({("movable",): [least, (least + most) / 2]}))


def test_a_limit_that_the_network_does_not_keep_is_refused(
    forge: Forge, loaded: tuple[DynamicResNet, dfs_cli.Manifest]
) -> None:
    least, most = loaded[1].movable or (0.0, 0.0)
    wide = {("limit",): most, ("configuration", "limit"): most}
    assert load_artifact(forge(wide))[0].controller.limit == most
    with pytest.raises(ArtifactError, match="configuration: not that of this network"):
        load_artifact(forge({("limit",): 1.0}))
    given = {("limit",): 0.9 * least, ("configuration", "limit"): 0.9 * least, ("movable",): None}
    with pytest.raises(ArtifactError, match="cost_max is above the limit"):
        load_artifact(forge(given))
    with pytest.raises(ArtifactError, match="limit: below the cost of the cheapest decision"):
        load_artifact(forge(given | {("validation",): None}))


NAN = float("nan")


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("backbone.fc.bias", lambda t: t * NAN, "backbone.fc.bias holds infinite or undefined numbers"),
        ("controller.logit_weights", lambda t: t + float("inf"), "controller.logit_weights holds infinite"),
        ("backbone.bn1.running_var", lambda t: -t, "backbone.bn1.running_var holds negative variances"),
        ("controller.policy", lambda t: t + 5, "controller.policy: an option is none of the 5"),
        ("controller.policy", lambda t: t - 5, "controller.policy: an option is none of the 5"),
        ("controller.policy", lambda t: t.float(), "controller.policy is of torch.float"),
        ("controller.policy", lambda t: t[:-1], r"controller.policy has shape \(8,\) where \(9,\) was expected"),
        ("backbone.fc.bias", lambda t: t.to(torch.int32), "backbone.fc.bias is of torch.int32"),
        ("weight_codes.8", lambda t: t[:50], "weight_codes.8 has shape"),
        ("bit_bias", lambda t: t.float(), "bit_bias is of torch.float32"),
    ],
)
def test_tensors_that_no_network_has_are_named(
    name: str,
    change: Callable[[torch.Tensor], torch.Tensor],
    reason: str,
    forge: Forge,
    loaded: tuple[DynamicResNet, dfs_cli.Manifest],
) -> None:
    tensors = packed_tensors(loaded[0])
    with pytest.raises(ArtifactError, match=reason):
        load_artifact(forge(tensors={name: change(tensors[name]).contiguous()}))


def test_packed_numbers_are_looked_at_too(forge: Forge, loaded: tuple[DynamicResNet, dfs_cli.Manifest]) -> None:
    state = loaded[0].state_dict()
    for kind, value, reason in (("bit_bias", NAN, "bit_bias holds infinite"), ("log_input_steps", 1e3, "logarithms")):
        parts = [torch.full_like(state[name], value) for name in sorted(state) if name.endswith(f".{kind}")]
        with pytest.raises(ArtifactError, match=reason):
            load_artifact(forge(tensors={kind: pack(parts, "<f4")}))


@pytest.mark.parametrize(
    ("gain", "reason"),
    [
        (torch.zeros(64), "backbone.fc.input_gain holds gains that are not positive"),
        (torch.ones(63), r"backbone.fc.input_gain has shape \(63,\)"),
        (torch.full((64,), NAN), "backbone.fc.input_gain holds infinite or undefined"),
        (torch.ones(64), None),
    ],
)
def test_gains_are_looked_at_too(gain: torch.Tensor, reason: str | None, forge: Forge) -> None:
    path = forge({("agreement", "refitted"): ["fc"]}, {"backbone.fc.input_gain": gain})
    if reason is None:
        assert read_manifest(path).agreement and load_artifact(path)
        return
    with pytest.raises(ArtifactError, match=reason):
        load_artifact(path)


@pytest.mark.parametrize(
    ("architecture", "classes"),
    [
        ("resnetv2_152x4_bit", 1000),
        ("resnet20_digits", 2**20),
        ("resnet18", 2**20),
    ],
)
@pytest.mark.slow
def test_a_small_file_cannot_name_a_large_network(
    architecture: str, classes: int, forge: Forge, loaded: tuple[DynamicResNet, dfs_cli.Manifest]
) -> None:
    """The costs are those of the network that is named: only the tensors do not fit."""
    preprocessing = loaded[1].preprocessing
    channels = 1 if architecture == "resnet20_digits" else 3
    if channels == 3:
        size = (3, 32, 32)
        preprocessing = preprocessing.replace(input_size=size, train_size=size, mean=(0.5,) * 3, std=(0.5,) * 3)
    code = (
        "import sys, pathlib; from dfs_cli.artifact.artifact import load_artifact;"
        "from dfs_cli.errors import ArtifactError\n"
        "try: load_artifact(pathlib.Path(sys.argv[1]))\n"
        "except ArtifactError as error: print(error)\n"
        "else: sys.exit('loaded')\n"
        # Not ru_maxrss, which starts with that of the process that started this one.
        "print(int(pathlib.Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0]) // 1024)"
    )
    values: dict[tuple[Any, ...], Any] = {
        ("architecture",): architecture,
        ("model_args",): {"num_classes": classes, "in_chans": channels},
        ("class_names",): [],
        ("preprocessing",): preprocessing.to_dict(),
        ("table",): outline_table(architecture, classes, loaded[1], preprocessing).to_dict(),
        ("configuration",): None,
        ("held_out",): None,
        ("movable",): None,
        ("validation",): None,
    }
    path = forge(values)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said, mebibytes = done.stdout.splitlines()
    assert "does not fit the network it describes" in said
    assert int(mebibytes) < 2048 + path.stat().st_size / 2**20


def outline_table(
    architecture: str, classes: int, manifest: dfs_cli.Manifest, preprocessing: dfs_cli.Preprocessing
) -> dfs_cli.CostTable:
    """The true cost table of a network, which is never allocated."""
    with torch.device("meta"):
        model = timm.create_model(architecture, num_classes=classes, in_chans=preprocessing.input_size[0])
    return dfs_cli.plan(model, manifest.dynamic, preprocessing)
