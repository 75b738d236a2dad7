import json
from typing import Any

import pytest

from dfs_cli.comparison.config import SweepConfig
from dfs_cli.config import DataConfig, DynamicConfig, Preprocessing, TuningConfig
from dfs_cli.errors import ConfigError
from dfs_cli.presets import PRESETS, parse_bits, parse_mix
from dfs_cli.ranges import check_budget, check_loading, check_range
from dfs_cli.validation import Json, parse_json


@pytest.mark.parametrize("budget", [0.0, -0.1, 1.0001, float("nan"), float("inf")])
def test_budget_outside_is_refused(budget: float) -> None:
    with pytest.raises(ConfigError, match=r"\(0, 1\]"):
        check_budget(budget)


@pytest.mark.parametrize("bits", [(0,), (8,), (0, 8, 8), (0, 1), (0, 17), (0, 33), (0, -4), ()])
def test_bad_options_are_refused(bits: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError):
        DynamicConfig(bits=bits)


def test_a_static_network_may_have_one_option() -> None:
    assert DynamicConfig(bits=(8,), gate="static").bits == (8,)
    with pytest.raises(ConfigError, match="at least two"):
        DynamicConfig(bits=(0,), gate="static")


def test_options_are_sorted() -> None:
    assert DynamicConfig(bits=(32, 0, 8)).bits == (0, 8, 32)


def test_the_defaults() -> None:
    default = DynamicConfig()
    assert (default.bits, default.fixed_bits, default.gate) == ((0, 2, 3, 4, 5, 6, 8), 8, "probe")
    assert not default.mirror


def test_presets_have_the_bitwidth_of_the_fixed_layers_that_belongs_to_them() -> None:
    fixed = {"lowbit": 8, "hardware": 8, "static": 8, "paper": 32, "skipnet": 32}
    assert {name: preset.fixed_bits for name, preset in PRESETS.items()} == fixed
    for name, preset in PRESETS.items():
        assert parse_bits(name) is preset
        assert DynamicConfig(bits=preset.bits, fixed_bits=preset.fixed_bits).bits == preset.bits


def test_bitwidths_are_parsed() -> None:
    assert (parse_bits("0,4,32").bits, parse_bits("0,4,32").fixed_bits) == ((0, 4, 32), 8)
    assert parse_mix("0:0.25,8:0.75") == {0: 0.25, 8: 0.75}


@pytest.mark.parametrize("text", ["", "a,b", "0;8", "0,8,"])
def test_unparsable_options_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--bits"):
        parse_bits(text)


@pytest.mark.parametrize(
    "text", ["", "8", "0:0.5", "0:0.5,8:0.6", "0:0.5,0:0.5", "0:-0.5,8:1.5", "0:x,8:1", "0:nan,8:1"]
)
def test_unparsable_mixes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--mix"):
        parse_mix(text)


@pytest.mark.parametrize(
    "settings",
    [
        {"epochs": 0}, {"batch_size": 0}, {"lr": 0.0}, {"lr": float("nan")}, {"workers": -1}, {"device": "tpu"},
        {"hflip": 1.5}, {"min_crop": 0.0}, {"temperature": 0.0}, {"distillation": -1.0}, {"steps": 0}, {"seed": -1},
        {"amp": "yes"}, {"amp": 1}, {"epochs": 2.0}, {"epochs": "2"}, {"epochs": True}, {"lr": "0.1"}, {"device": None},
    ],
)  # fmt: skip
def test_values_out_of_range_or_of_another_type_are_refused(settings: dict[str, Any]) -> None:
    ((name, _),) = settings.items()
    with pytest.raises(ConfigError, match=rf"^{name.replace(chr(95), chr(45))} ") as caught:
        TuningConfig(**settings)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError):
        TuningConfig().replace(**settings)
    if settings[name] == settings[name]:  # NaN is no JSON
        with pytest.raises(ConfigError):
            TuningConfig.from_dict(settings)


@pytest.mark.parametrize(
    "settings", [{"bits": [0, 8]}, {"bits": (0, "8")}, {"bits": 8}, {"gate": "lstm"}, {"mirror": 1}, {"hidden": 0}]
)
def test_wrong_dynamic_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        DynamicConfig(**settings)


def test_what_contradicts_is_refused() -> None:
    with pytest.raises(ConfigError, match="give one of them"):
        TuningConfig(epochs=1, steps=10)
    with pytest.raises(ConfigError, match="mirror is for a second pass"):
        DynamicConfig(gate="rnn", mirror=True)
    with pytest.raises(ConfigError, match="std has 1 values for 3 channels"):
        Preprocessing((3, 8, 8), (3, 8, 8), "bicubic", 0.9, "center", (0.5,) * 3, (1.0,))
    with pytest.raises(ConfigError, match="given twice"):
        SweepConfig(budgets=(0.1, 0.1))


@pytest.mark.parametrize(
    ("settings", "steps_per_epoch", "expected"),
    [
        ({}, 100, 400),  # four epochs give 350 steps at least
        ({}, 350, 350),
        ({}, 351, 351),
        ({}, 525, 525),  # 1.5 times 350: still a whole epoch
        ({}, 526, 350),
        ({}, 5000, 350),
        ({}, 1, 350),
        ({"epochs": 3}, 5000, 15000),
        ({"steps": 7}, 5000, 7),
        ({"steps": 7}, 2, 7),
    ],
)
def test_tuning_steps_in_all(settings: dict[str, Any], steps_per_epoch: int, expected: int) -> None:
    assert TuningConfig(**settings).total_steps(steps_per_epoch) == expected


@pytest.mark.parametrize(
    "config",
    [
        DynamicConfig(bits=(0, 3, 5), fixed_bits=32, gate="ff"),
        TuningConfig(epochs=3, lr=0.1, amp=True),
        DataConfig(data_dir="x", num_samples=5),
        Preprocessing((3, 8, 8), (3, 8, 8), "bicubic", 0.9, "center", (0.1, 0.2, 0.3), (1.0, 1.0, 1.0)),
        SweepConfig((0.1, 0.05), ("uniform",), 2, 2, spend=True),
        PRESETS["paper"],
    ],
)
def test_settings_go_to_json_and_back(config: Json) -> None:
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="colour"):
        DynamicConfig.from_dict({"colour": 1})
    with pytest.raises(ConfigError, match="colour"):
        DynamicConfig(colour=1)  # type: ignore[call-arg]


def test_settings_do_not_change() -> None:
    config = TuningConfig()
    with pytest.raises(AttributeError):
        config.epochs = 3  # type: ignore[misc]
    assert config.replace(epochs=3).epochs == 3 and config.epochs is None


@pytest.mark.parametrize(
    "settings",
    [
        {"crop_pct": 1e-9}, {"crop_pct": float("inf")}, {"crop_pct": 1.5}, {"std": (1e-320,)}, {"std": (float("inf"),)},
        {"mean": (float("nan"),)}, {"mean": (1e308,)}, {"mean": ("0.5",)}, {"interpolation": "cubic"}, {"crop_mode": "left"},
        {"input_size": (1, 8.0, 8)}, {"input_size": (1, 2**13, 8)}, {"input_size": (1, 8)}, {"train_size": (3, 8, 8)},
    ],
)  # fmt: skip
def test_preprocessing_out_of_range_is_refused(settings: dict[str, Any]) -> None:
    valid = Preprocessing((1, 8, 8), (1, 8, 8), "bicubic", 0.9, "center", (0.5,), (1.0,))
    ((name, _),) = settings.items()
    with pytest.raises(ConfigError, match=f"^{name.replace('_', '-')}") as caught:
        valid.replace(**settings)
    assert "\n" not in str(caught.value)


def test_huge_numbers_are_refused_in_one_line() -> None:
    for value in (10**400, 10**5000, -(10**400), [10**400]):
        with pytest.raises(ConfigError, match=r"^lr ") as caught:
            TuningConfig(lr=value)  # type: ignore[arg-type]
        assert len(str(caught.value)) < 200


@pytest.mark.parametrize("text", ["[" * 300 + "]" * 300, "NaN", '{"a": Infinity}', "1" * 5000, "{"])
def test_json_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="line 1 column"):
        parse_json(text)


def test_batches_workers_and_seeds_have_a_range() -> None:
    check_loading(1, 0)
    refused = ((0, 0, "batch-size 0"), (2**30, 0, "batch-size"), (1, -1, "workers -1"), (1, 10**9, "workers"))
    for batch_size, workers, message in refused:
        with pytest.raises(ConfigError, match=message):
            check_loading(batch_size, workers)
    with pytest.raises(ConfigError, match="seed of so many digits: expected 0 to 9"):
        check_range("seed", 10**5000, 0, 9)
