from pathlib import Path

import pytest
import torch
from common import RNN, SIZE, MakeFolder, make_dynamic, tiny_resnet

import dfs_cli
from dfs_cli.bench.workload import default_mix, draw_policies, workload_of_file, workload_of_model
from dfs_cli.config import DataConfig, DynamicConfig, GateKind
from dfs_cli.control.base import controller_of
from dfs_cli.cost.decisions import NOT_RUN
from dfs_cli.errors import ConfigError
from dfs_cli.presets import DEFAULT_MIX, parse_mix

pytestmark = pytest.mark.medium


def test_the_mix_of_a_network_has_its_options() -> None:
    assert default_mix((0, 2, 3, 4, 5, 6, 8)) == parse_mix(DEFAULT_MIX)
    assert default_mix((0, 4)) == {0: 0.5, 4: 0.5} and default_mix((0, 8, 32)) == {0: 0.5, 8: 0.5}
    assert default_mix((0, 32)) == {0: 0.5, 32: 0.5} and default_mix((16, 32)) == {16: 0.5, 32: 0.5}
    assert default_mix((8,)) == {8: 1.0}


def test_shares_of_blocks_by_hand() -> None:
    mix = parse_mix("0:0.5,4:0.25,8:0.25")
    policies = draw_policies(mix, (0, 4, 8), 10, seed=3, images=6)
    for policy in policies.tolist():
        assert policy.count(0) == 5 and {policy.count(1), policy.count(2)} == {2, 3}
    assert len(policies.unique(dim=0)) > 3
    assert torch.equal(policies, draw_policies(mix, (0, 4, 8), 10, seed=3, images=6))
    assert torch.equal(policies[:1], draw_policies(mix, (0, 4, 8), 10, seed=3))
    assert not torch.equal(policies, draw_policies(mix, (0, 4, 8), 10, seed=4, images=6))
    with pytest.raises(ConfigError, match="16 bits is none of the options 0,4,8"):
        draw_policies({16: 1.0}, (0, 4, 8), 10, seed=0)


POLICIES = torch.tensor([[0, 2, 1, 1, 0], [1, 1, 1, 2, 0], [2, 0, 0, 0, 1]])


@pytest.mark.parametrize("gate", ["rnn", "ff", "probe", "static"])
def test_every_controller_decides_as_it_is_forced_to(gate: GateKind) -> None:
    network = make_dynamic(tiny_resnet(), DynamicConfig(bits=(0, 4, 8), gate=gate))
    controller = controller_of(network)
    images = torch.randn(4, *SIZE)
    controller.force(POLICIES[1])
    taken = network.run(images).decisions
    assert taken.in_pass(0).tolist() == [[1, 1, 1, 2, 0]] * 4
    assert (taken.options[:, 1:] == NOT_RUN).all()
    controller.force(POLICIES)
    differ = gate in ("rnn", "ff")
    expected = [POLICIES[i if differ else 0].tolist() for i in (0, 1, 2, 0)]
    assert network.run(images).decisions.in_pass(0).tolist() == expected
    assert network.run(images[3:]).decisions.in_pass(0).tolist() == [POLICIES[0].tolist()]


def test_a_forced_gate_still_works_and_alone_decides_for_the_first_policy() -> None:
    network = make_dynamic(tiny_resnet(), DynamicConfig(bits=(0, 4, 8), gate="rnn"))
    scored: list[int] = []
    controller = controller_of(network)
    controller.force(POLICIES)
    gate = controller.get_submodule("gate")
    handle = gate.register_forward_hook(lambda module, inputs, output: scored.extend(output[0].argmax(dim=1).tolist()))
    network.run(torch.randn(2, *SIZE))
    handle.remove()
    assert scored == [0, 0, 2, 2, 1, 1, 1, 1, 0, 0]  # five blocks, two images each


@pytest.mark.parametrize("gate", ["rnn", "probe", "static"])
def test_the_workload_of_a_model_by_hand(gate: GateKind) -> None:
    dynamic = DynamicConfig(bits=(0, 8), gate=gate)
    workload = workload_of_model(tiny_resnet(), dynamic, SIZE, {0: 0.4, 8: 0.6}, seed=1)
    alone, batch = (workload.network.run(images).decisions for images in (workload.images[:1], workload.images))
    assert alone.in_pass(0).sum() == 3 and (batch.in_pass(0).sum(dim=1) == 3).all()
    assert workload.cost == pytest.approx(workload.table.cost(alone).item())
    assert workload.batch_cost == pytest.approx(workload.table.cost(batch).mean().item())
    assert workload.targets is None and len(workload.images) == 64
    differ = ", in batches anew for each image" if gate == "rnn" else ""
    only = ", 0% of the images in both passes" if gate == "probe" else ""
    assert workload.decisions == f"0:0.4,8:0.6 of the blocks, drawn by seed 1{differ}{only}"


def test_a_share_of_random_images_takes_both_passes() -> None:
    dynamic = DynamicConfig(bits=(0, 8), gate="probe", mirror=True, alike=True, first_view=0.625)
    workload = workload_of_model(tiny_resnet(), dynamic, SIZE, {8: 1.0}, refined=0.25)
    decisions = workload.network.run(workload.images).decisions
    assert decisions.ran[:, 1].sum() == 16 and (decisions.in_pass(0) == 1).all()
    assert workload.cost == workload.batch_cost == workload.table.cost(decisions).mean().item()
    assert workload.decisions == "8:1 of the blocks, drawn by seed 0, 25% of the images in both passes"
    refused: tuple[tuple[GateKind, float], ...] = (("probe", 1.5), ("rnn", 0.5))
    for gate, refined in refused:
        with pytest.raises(ConfigError, match=f"--refined {refined}: expected a share"):
            workload_of_model(tiny_resnet(), DynamicConfig(bits=(0, 8), gate=gate), SIZE, refined=refined)


def test_the_original_is_left_unchanged() -> None:
    model = tiny_resnet()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    workload = workload_of_model(model, RNN, SIZE)
    assert workload.dense is model and workload.decisions.startswith("0:0.5,8:0.5")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_file_on_real_images_decides_for_itself(artifact: Path, make_folder: MakeFolder) -> None:
    data = DataConfig(data_dir=str(make_folder()))
    workload = workload_of_file(artifact, data=data)
    network, manifest = dfs_cli.load(artifact)
    decisions = network.run(workload.images).decisions
    assert workload.targets is not None and len(workload.targets) == len(workload.images) == 40
    # The digits' own weights are at hand, and static int8 is calibrated on training images, of which a tenth is held out.
    assert workload.is_original and not torch.equal(workload.calibration[:1], workload.images[:1])
    assert 30 <= len(workload.calibration) < 40
    right = workload.dense(workload.images).argmax(dim=1) == workload.targets
    assert right.double().mean() > 0.9
    assert workload.cost == workload.batch_cost == pytest.approx(manifest.table.cost(decisions).mean().item())
    assert workload.file_size == artifact.stat().st_size
    with pytest.raises(ConfigError, match="--mix forces decisions, --data measures real ones"):
        workload_of_file(artifact, {0: 1.0}, data)


@pytest.fixture(scope="module")
def static_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A static digits network of 4 and 8 bits, tuned for one step."""
    path = tmp_path_factory.mktemp("static") / "static.safetensors"
    tuning = dfs_cli.TuningConfig(steps=1, batch_size=64, hflip=0.0)
    dynamic = DynamicConfig(bits=(0, 4, 8), gate="static")
    dfs_cli.save(dfs_cli.convert("resnet20_digits", 0.03, dynamic=dynamic, tuning=tuning), path)
    return path


def test_a_static_file_has_its_own_decisions_on_random_images(static_file: Path) -> None:
    workload = workload_of_file(static_file)
    network, manifest = dfs_cli.load(static_file)
    expected = network.run(workload.images[:1]).decisions
    assert bool(workload.network.run(workload.images).decisions.equal(expected).all())
    assert workload.cost == workload.batch_cost == pytest.approx(manifest.table.cost(expected).item())
    assert workload.cost <= 0.03 and "the same for every image" in workload.decisions
    with pytest.raises(ConfigError, match="the same for every image, leave it out"):
        workload_of_file(static_file, {0: 0.5, 8: 0.5})


def test_the_graph_of_a_static_file_is_plain(static_file: Path) -> None:
    onnx = pytest.importorskip("onnx")
    from dfs_cli.bench.candidates import list_candidates

    candidates, graph = list_candidates(workload_of_file(static_file), threads=1)
    assert graph is not None and graph["features"] == "int8"
    own = next(candidate for candidate in candidates if candidate.name == "ort-dfs")
    (model,) = own.build.args[:1]  # type: ignore[attr-defined]  # a functools.partial
    assert "If" not in {node.op_type for node in onnx.load_from_string(model).graph.node}
