import json

import pytest

from dfs_cli.config import PRESETS, DataConfig, DynamicConfig, Preprocessing, TuningConfig, check_budget, parse_bits
from dfs_cli.errors import ConfigError


@pytest.mark.parametrize("budget", [0.0, -0.1, 1.0001, float("nan"), float("inf")])
def test_budget_outside_is_refused(budget: float) -> None:
    with pytest.raises(ConfigError, match=r"\(0, 1\]"):
        check_budget(budget)


@pytest.mark.parametrize("bits", [(0,), (8,), (0, 8, 8), (0, 1), (0, 17), (0, 33), (0, -4), ()])
def test_bad_options_are_refused(bits: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError):
        DynamicConfig(bits=bits)


def test_options_are_sorted() -> None:
    assert DynamicConfig(bits=(32, 0, 8)).bits == (0, 8, 32)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_parse_and_are_valid(name: str) -> None:
    assert DynamicConfig(bits=parse_bits(name)).bits == PRESETS[name]


@pytest.mark.parametrize("text", ["", "a,b", "0;8", "0,8,"])
def test_unparsable_options_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--bits"):
        parse_bits(text)


@pytest.mark.parametrize(
    "settings",
    [
        {"epochs": 0}, {"batch_size": 0}, {"lr": 0.0}, {"lr": float("nan")}, {"workers": -1}, {"device": "tpu"},
        {"hflip": 1.5}, {"min_crop": 0.0}, {"temperature": 0.0}, {"distillation": -1.0},
    ],
)  # fmt: skip
def test_bad_tuning_is_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        TuningConfig(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "config",
    [
        DynamicConfig(bits=(0, 3, 5), edge_bits=32, gate="ff"),
        TuningConfig(epochs=3, lr=0.1, amp=True),
        DataConfig(data_dir="x", num_samples=5),
        Preprocessing((3, 8, 8), (3, 8, 8), "bicubic", 0.9, "center", (0.1, 0.2, 0.3), (1.0, 1.0, 1.0)),
    ],
)
def test_settings_go_to_json_and_back(config: DynamicConfig) -> None:
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="colour"):
        DynamicConfig.from_dict({"colour": 1})
