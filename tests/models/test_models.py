import http.server
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import get_deprecated_models
from torch import nn

from dfs_cli.catalogue import list_convertible
from dfs_cli.cli.options import ModelOptions
from dfs_cli.errors import ConfigError, UnsupportedModelError, WeightsError
from dfs_cli.models.checkpoints import read_weights
from dfs_cli.models.cifar import DEPTHS
from dfs_cli.models.zoo import check_convertible, current_name, load_model, load_outline


@pytest.mark.parametrize("depth", DEPTHS)
def test_cifar_networks_have_their_depth(depth: int) -> None:
    model = timm.create_model(f"resnet{depth}_cifar")
    convolutions = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and "downsample" not in n]
    assert len(convolutions) + 1 == depth
    assert model.get_submodule("layer2.0.downsample.0").kernel_size == (1, 1)
    assert model.num_classes == 10


def test_cifar_resnet20_has_the_parameters_of_the_paper() -> None:
    model = timm.create_model("resnet20_cifar")
    # 269,722 with parameter-free shortcuts (He et al., 2016), and two 1x1 convolutions with batch-norm.
    assert sum(p.numel() for p in model.parameters()) == 269722 + 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_embedded_weights_are_loaded(digits_model: nn.Module) -> None:
    assert not digits_model.training
    fresh = load_model("resnet20_digits", pretrained=False)
    assert not torch.equal(fresh.get_submodule("conv1").weight, digits_model.get_submodule("conv1").weight)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("resnt50", "close matches: resnet50"),
        ("resnet50.nonsense", "unknown weights"),
        ("vit_tiny_patch16_224", "VisionTransformer cannot be converted"),
        ("resnet32ts", "ByobNet cannot be converted"),
        ("nf_resnet50", "NormFreeNet cannot be converted"),
        ("legacy_seresnet18", "SENet cannot be converted"),
        ("cspresnet50", "CspNet cannot be converted"),
        ("tresnet_m", "TResNet cannot be converted"),
        ("inception_resnet_v2", "InceptionResnetV2 cannot be converted"),
        ("hf-hub:someone/resnet50", "unknown model"),
        ("local-dir:/tmp", "unknown model"),
    ],
)
def test_what_cannot_be_converted_is_refused_with_the_reason(name: str, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        check_convertible(name)


def test_list_filters_and_describes() -> None:
    found = {m.name: m for m in list_convertible("resnet5?")}
    assert set(found) == {"resnet50"}
    resnet50 = found["resnet50"]
    assert (resnet50.family, resnet50.blocks, resnet50.image_size) == ("Bottleneck", 16, 288)
    assert "resnet50.a1_in1k" in resnet50.weights
    # 4.09 GMACs at 224 pixels, of which all but the classifier grow with the area.
    assert resnet50.macs == pytest.approx(4.0872e9 * (288 / 224) ** 2 + 2.048e6, rel=1e-3)


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return dict(timm.create_model("resnet20_cifar").state_dict())


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model.", "model.module."])
@pytest.mark.parametrize("key", [None, "state_dict", "model_state_dict", "net", "whatever it is called"])
def test_checkpoints_in_wrappers_are_understood(
    prefix: str, key: str | None, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    content: dict[str, object] = {prefix + k: v for k, v in state.items()}
    optimizer = {"state": {0: {"momentum": torch.ones(3)}}}
    torch.save({key: content, "epoch": 3, "optimizer": optimizer} if key else content, tmp_path / "c.pth")
    model = load_model("resnet20_cifar", checkpoint=tmp_path / "c.pth")
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".tar", ".safetensors"])
def test_checkpoint_formats(suffix: str, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / f"c{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    assert torch.equal(load_model("resnet20_cifar", checkpoint=path).state_dict()["fc.weight"], state["fc.weight"])


def test_checkpoints_are_strict(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    torch.save({k: v for k, v in state.items() if k != "layer1.0.conv1.weight"}, path)
    with pytest.raises(WeightsError, match=r"does not fit resnet20_cifar: it lacks layer1\.0\.conv1\.weight$"):
        load_model("resnet20_cifar", checkpoint=path)
    torch.save(state | {"extra": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match=r"has unknown extra$"):
        load_model("resnet20_cifar", checkpoint=path)
    torch.save(state, path)
    with pytest.raises(WeightsError, match="does not fit"):
        load_model("resnet32_cifar", checkpoint=path)


def test_another_number_of_classes_is_refused_unless_asked_for(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    torch.save(state | {"fc.weight": torch.ones(7, 64), "fc.bias": torch.ones(7)}, path)
    for load in (load_model, load_outline):
        with pytest.raises(WeightsError, match="has 7 classes and resnet20_cifar has 10: pass --num-classes 7"):
            load("resnet20_cifar", checkpoint=path)
    kept = load_model("resnet20_cifar", checkpoint=path, num_classes=7)
    assert kept.num_classes == 7 and torch.equal(kept.state_dict()["fc.weight"], torch.ones(7, 64))
    model = load_model("resnet20_cifar", checkpoint=path, num_classes=4)
    assert model.get_submodule("fc").weight.shape == (4, 64)
    assert torch.equal(model.state_dict()["conv1.weight"], state["conv1.weight"])


class _Dangerous:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("code in a pickle ran",))


def test_of_plain_and_averaged_weights_the_averaged_ones_are_taken_and_named(
    state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path, plain = tmp_path / "c.pth", {k: torch.zeros_like(v) for k, v in state.items()}
    for key, averaged in (("state_dict_ema", state), ("ema", {f"module.{k}": v for k, v in state.items()})):
        torch.save({"state_dict": plain, key: averaged}, path)
        assert torch.equal(
            load_model("resnet20_cifar", checkpoint=path).state_dict()["conv1.weight"], state["conv1.weight"]
        )
        assert ModelOptions(path).load("resnet20_cifar", seed=0).weights == f"{path} ({key}, not state_dict)"
    torch.save({"n_averaged": torch.tensor(3)} | {f"module.{k}": v for k, v in state.items()}, path)
    assert ModelOptions(path).load("resnet20_cifar", seed=0).weights == str(path)
    torch.save({"generator": state, "discriminator": {"conv1.weight": torch.ones(1)}}, path)
    assert read_weights(path, load_outline("resnet20_cifar")).entry == "generator", "the only one that fits"
    torch.save({"student": state, "teacher": plain}, path)
    with pytest.raises(WeightsError, match="several sets of weights \\('student', 'teacher'\\): save the one"):
        load_model("resnet20_cifar", checkpoint=path)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("fc.bias", torch.tensor(1.0), r"fc.bias has shape \(\) where \(10,\) was expected"),
        ("conv1.weight", torch.full((16, 3, 3, 3), float("nan")), "conv1.weight holds infinite or undefined numbers"),
        ("bn1.bias", torch.full((16,), float("inf")), "bn1.bias holds infinite or undefined numbers"),
        ("bn1.running_var", torch.full((16,), -1.0), "bn1.running_var holds negative variances"),
        ("bn1.weight", torch.ones(16, dtype=torch.complex64), "bn1.weight is of torch.complex64"),
        ("bn1.weight", torch.ones(16).to_sparse(), "bn1.weight is of torch.float32, torch.sparse_coo"),
        ("layer9.weight", torch.ones(1), "it has unknown layer9.weight"),
    ],
)
def test_the_tensor_that_does_not_fit_is_named(
    name: str, value: torch.Tensor, reason: str, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "c.pth"
    torch.save(state | {name: value}, path)
    for load in (load_model, load_outline):
        with pytest.raises(WeightsError, match=f"does not fit resnet20_cifar: {reason}"):
            load("resnet20_cifar", checkpoint=path)


def test_a_checkpoint_that_is_no_file_is_called_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="is a folder: pass the file"):
        read_weights(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(WeightsError, match="is not a file"):
        read_weights(tmp_path / "pipe")


def test_a_compressed_archive_is_not_expanded(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save(state, tmp_path / "c.pth")
    with (
        zipfile.ZipFile(tmp_path / "c.pth") as archive,
        zipfile.ZipFile(tmp_path / "small.pth", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for entry in archive.infolist():
            small.writestr(entry.filename, archive.read(entry))
    with pytest.raises(WeightsError, match="compressed archive"):
        read_weights(tmp_path / "small.pth")


@pytest.mark.medium
def test_names_that_timm_gave_up_work_as_in_timm(tmp_path: Path) -> None:
    for old, new in get_deprecated_models("resnet").items():
        assert current_name(old) == new
    assert check_convertible("tv_resnet50") == "resnet50.tv_in1k" and check_convertible("resnet50") == "resnet50"
    torch.manual_seed(1)
    weights = timm.create_model("resnet18").state_dict()
    torch.save(weights, tmp_path / "c.pth")
    model = load_model("swsl_resnet18", checkpoint=tmp_path / "c.pth")
    assert torch.equal(model.state_dict()["fc.bias"], weights["fc.bias"])
    assert model.pretrained_cfg["architecture"] == "resnet18" and model.pretrained_cfg["tag"] == "fb_swsl_ig1b_ft_in1k"  # type: ignore[index]
    assert load_outline("swsl_resnet18").num_classes == 1000
    with pytest.raises(WeightsError, match=r"weights of resnet50\.tv_in1k"):
        load_model("tv_resnet50")


@pytest.mark.parametrize("settings", [{"num_classes": 1}, {"num_classes": 10**30}, {"in_chans": 0}, {"seed": -1}])
def test_numbers_out_of_range_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(settings)).replace('_', '-')} .*: expected"):
        load_model("resnet20_cifar", pretrained=False, **settings)  # type: ignore[arg-type]


def test_pickles_that_are_not_weights_are_refused_and_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.pth"
    for content in (_Dangerous(), [1, 2], {"a": 3}, {"state_dict": {"a": "text"}}):
        torch.save(content, path)
        with pytest.raises(WeightsError):
            read_weights(path)
    path.write_bytes(b"not a pickle at all")
    with pytest.raises(WeightsError):
        read_weights(path)
    assert "ran" not in capsys.readouterr().out


def test_missing_weights_name_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="--checkpoint"):
        load_model("resnet20_cifar")
    with pytest.raises(WeightsError, match="does not exist"):
        load_model("resnet20_cifar", checkpoint=tmp_path / "none.pth")


class _Hub(http.server.BaseHTTPRequestHandler):
    """What huggingface_hub asks of a hub to download one file."""

    content = b""

    def do_HEAD(self) -> None:
        found = self.path.endswith("model.safetensors")
        self.send_response(200 if found else 404)
        self.send_header("ETag", '"an-etag"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(self.content) if found else 0))
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(self.content)

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def hub() -> Iterator[str]:
    """A hub on loopback."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.medium
def test_pretrained_weights_come_from_the_hub(hub: str, tmp_path: Path) -> None:
    torch.manual_seed(5)
    original = timm.create_model("resnet10t")
    save_file(dict(original.state_dict()), tmp_path / "weights.safetensors")
    _Hub.content = (tmp_path / "weights.safetensors").read_bytes()
    code = (
        "import sys, torch; from dfs_cli.models.zoo import load_model;"
        "torch.save(load_model('resnet10t.c3_in1k').state_dict(), sys.argv[1])"
    )
    # The client reads its settings once, when it is imported: it needs a process of its own.
    settings = {"HF_ENDPOINT": hub, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "loaded.pth")]
    subprocess.run(command, check=True, env=os.environ | settings, timeout=120)
    loaded = torch.load(tmp_path / "loaded.pth", weights_only=True)
    assert all(torch.equal(v, loaded[k]) for k, v in original.state_dict().items())


def test_unreachable_hub_is_one_line_that_names_the_checkpoint_option(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match=r"cannot be reached.*--checkpoint") as caught:
        load_model("resnet18")
    assert "\n" not in str(caught.value)
