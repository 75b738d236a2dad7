import json
from typing import Any

import pytest
from common import SIZE, tiny_resnet

from dfs_cli.artifact.manifest import FORMAT_VERSION, Manifest, ModelArgs
from dfs_cli.config import Configuration, DynamicConfig, Preprocessing, TuningConfig
from dfs_cli.errors import ArtifactError, ConfigError
from dfs_cli.records import Dynamics, Evaluation, Source, Tuned
from dfs_cli.surgery.plan import plan_costs

PREPROCESSING = Preprocessing(SIZE, SIZE, "bicubic", 1.0, "center", (0.5,) * 3, (0.5,) * 3)
DYNAMIC = DynamicConfig(bits=(0, 8), gate="rnn")
CONFIGURATION = Configuration(
    model="tiny",
    budget=0.1,
    spend=True,
    dynamic=DYNAMIC,
    tuning=TuningConfig(steps=3, workers=0),
    data=None,
    preprocessing=PREPROCESSING,
    device="cpu",
    steps=3,
    images={"train": 10, "calibration": 2, "validation": 5},
    versions={"torch": "2"},
    threads=1,
)
EVALUATION = Evaluation(
    images=5,
    top1=80.0,
    top5=100.0,
    cost=0.1,
    cost_p50=0.1,
    cost_p95=0.1,
    cost_max=0.1,
    choices=(((2, 3),) * 5,),
    images_per_second=9.0,
    dynamics=Dynamics(3, 0.5, 0.1, 0.4, 60.0, 0.09),
)
MANIFEST = Manifest(
    architecture="tiny",
    model_args=ModelArgs(5),
    class_names=tuple("abcde"),
    preprocessing=PREPROCESSING,
    dynamic=DYNAMIC,
    table=plan_costs(tiny_resnet(), DYNAMIC, SIZE),
    budget=0.1,
    operating_point=3.5,
    configuration=CONFIGURATION,
    source=Source("weights.pth", top1=90.0),
    held_out=Tuned(0.1, 81.0),
    validation=EVALUATION,
)


def test_a_manifest_goes_to_json_and_back() -> None:
    text = MANIFEST.to_json()
    assert json.loads(text)["format_version"] == FORMAT_VERSION
    assert Manifest.from_json(text) == MANIFEST
    bare = MANIFEST.replace(configuration=None, held_out=None, validation=None, budget=None, class_names=())
    assert Manifest.from_json(bare.to_json()) == bare


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("operating_point",), "high"),
        (("operating_point",), None),
        (("budget",), 1.5),
        (("budget",), 0),
        (("architecture",), 7),
        (("unknown",), 1),
        (("model_args", "num_classes"), 1),
        (("model_args", "num_classes"), "5"),
        (("model_args", "checkpoint_path"), "/x"),
        (("preprocessing", "std"), [0.5, 0.0, 0.5]),
        (("preprocessing", "input_size"), [3, 32]),
        (("dynamic", "bits"), [0, 1]),
        (("dynamic", "gate"), "oracle"),
        (("table", "controller_macs"), [[1]]),
        (("table", "layers", 0, "macs"), -1),
        (("configuration", "threads"), "1"),
        (("configuration", "tuning", "lr"), 0.0),
        (("held_out", "top1"), 101.0),
        (("validation", "images"), 0),
        (("validation", "dynamics", "common_share"), 1.5),
        (("source", "colour"), "red"),
        (("class_names",), ["a", "b"]),
        (("class_names",), ["a", "b", "c", "d", 5]),
    ],
)
def test_every_value_is_checked_and_the_message_is_one_line(place: tuple[Any, ...], value: object) -> None:
    values = json.loads(MANIFEST.to_json())
    inner = values
    for part in place[:-1]:
        inner = inner[part]
    inner[place[-1]] = value
    with pytest.raises(ArtifactError, match="the manifest is damaged: ") as caught:
        Manifest.from_json(json.dumps(values))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["architecture", "table", "dynamic", "operating_point", "format_version"])
def test_nothing_may_be_missing(name: str) -> None:
    values = json.loads(MANIFEST.to_json())
    del values[name]
    with pytest.raises(ArtifactError, match="damaged"):
        Manifest.from_json(json.dumps(values))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"text"', "[" * 100_000])
def test_what_is_no_manifest_is_refused(text: str) -> None:
    with pytest.raises(ArtifactError, match="damaged"):
        Manifest.from_json(text)


@pytest.mark.parametrize("version", [FORMAT_VERSION - 1, FORMAT_VERSION + 1, str(FORMAT_VERSION), None])
def test_other_versions_say_so(version: object) -> None:
    values = json.loads(MANIFEST.to_json()) | {"format_version": version, "of_another_kind": True}
    with pytest.raises(ArtifactError, match=f"format version .* is not {FORMAT_VERSION}"):
        Manifest.from_json(json.dumps(values))


def test_contradictions_are_refused() -> None:
    with pytest.raises(ConfigError, match="other options"):
        MANIFEST.replace(dynamic=DYNAMIC.replace(bits=(0, 4)))
    with pytest.raises(ConfigError, match="2 class names for 5 classes"):
        MANIFEST.replace(class_names=("a", "b"))


@pytest.mark.parametrize(
    ("cost", "spend", "kept"), [(0.1, True, True), (0.08, True, False), (0.08, False, True), (0.102, False, False)]
)
def test_whether_the_budget_is_kept(cost: float, spend: bool, kept: bool) -> None:
    changed = MANIFEST.replace(
        validation=EVALUATION.replace(cost=cost), configuration=CONFIGURATION.replace(spend=spend)
    )
    assert changed.keeps_budget is kept
    assert changed.replace(validation=None).keeps_budget is None and changed.replace(budget=None).keeps_budget is None
