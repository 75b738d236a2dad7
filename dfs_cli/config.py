"""Frozen, validated settings that go to and from JSON."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from dfs_cli.errors import ConfigError

if TYPE_CHECKING:
    from typing_extensions import Self

FULL_BITS = 32
"""The bitwidth that stands for running in floating point."""

QUANTIZED_BITS = range(2, 17)
"""Bitwidths that a quantizer can have."""

PRESETS: dict[str, tuple[int, ...]] = {
    "hardware": (0, 4, 8, 16, 32),
    "paper": (0, 8, 10, 12, 14, 16, 32),
    "skipnet": (0, 32),
    "lowbit": (0, 2, 3, 4, 5, 6, 8),
}
"""Named option lists. ``paper`` is that of DFS (Shen et al., 2020), ``skipnet`` that of SkipNet (Wang et al., 2018)."""

LOWBIT_BUDGET = 0.06
"""The largest budget per pass that ``lowbit`` is the default for: a pass at 8 bits costs 0.0625. Above it ``hardware`` is."""

DEFAULT_EDGE_BITS = 8
PRESET_EDGE_BITS = {"paper": FULL_BITS, "skipnet": FULL_BITS}

GateKind = Literal["probe", "rnn", "ff"]
DeviceKind = Literal["auto", "cpu", "cuda"]
Baseline = Literal["uniform", "mixed", "skipnet", "cascade"]

BASELINES: tuple[Baseline, ...] = get_args(Baseline)
"""What a sweep can compare dynamic networks with."""


class _Settings:
    """JSON conversion shared by the frozen settings below."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload,no-any-return]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Raises ConfigError where a key is unknown or missing, or a value is out of range."""
        names = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        if unknown := sorted(set(values) - names):
            raise ConfigError(f"unknown setting {unknown[0]!r} for {cls.__name__}")
        try:
            return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
        except TypeError as error:
            raise ConfigError(f"{cls.__name__}: {error}") from None


def default_preset(budget: float, gate: GateKind) -> str:
    """The option list for a budget: bitwidths far from what it pays for only fight over the weights."""
    passes = 2 if gate == "probe" else 1
    return "lowbit" if budget <= passes * LOWBIT_BUDGET else "hardware"


DEFAULT_MIX = "0:0.5,8:0.5"
"""Of the blocks of a network whose options nobody named."""
COMPARED_IMAGES = 1000
"""Real images on which a graph is compared with its network where nobody says how many."""
LARGE_BATCH = 64
"""What ``dfs bench`` measures: decisions where none are real, and images per batch besides single ones."""


def parse_bits(text: str) -> tuple[int, ...]:
    """The option list that ``text`` names: a preset, or bitwidths separated by commas."""
    if text in PRESETS:
        return PRESETS[text]
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f"--bits {text!r}: expected bitwidths separated by commas, as 0,4,8,32, or one of {', '.join(PRESETS)}"
        ) from None


def parse_mix(text: str) -> dict[int, float]:
    """Shares of the blocks by bitwidth, from text such as ``0:0.5,8:0.5``.

    Raises:
        ConfigError: it is no such text, or the shares do not add up to one.
    """
    try:
        pairs = [part.split(":") for part in text.split(",")]
        mix = {int(bits): float(share) for bits, share in pairs}
    except ValueError:
        raise ConfigError(f"--mix {text!r}: expected bitwidth:share pairs, as 0:0.5,8:0.5") from None
    if len(mix) < len(pairs) or not min(mix.values()) >= 0 or abs(sum(mix.values()) - 1) > 1e-6:
        raise ConfigError(f"--mix {text!r}: expected each bitwidth once, with shares that add up to 1")
    return mix


def check_budget(budget: float) -> None:
    """Raises ConfigError unless 0 < ``budget`` <= 1."""
    if not (0 < budget <= 1):
        raise ConfigError(f"budget {budget:g} is not in (0, 1]: it is a fraction of the dense 32-bit network's cost")


def check_bitwidth(bits: int) -> None:
    """Raises ConfigError unless ``bits`` is 2..16 or 32."""
    if bits not in QUANTIZED_BITS and bits != FULL_BITS:
        raise ConfigError(f"bitwidth {bits} is not supported: use 2..16 or 32")


@dataclass(frozen=True)
class DynamicConfig(_Settings):
    """What the converted network is made of.

    Args:
        bits: bitwidth options of a block (K of them); 0 skips it, 32 runs it in floating point. Kept in ascending order.
        edge_bits: bitwidth of what always runs: stem, shortcut convolutions and classifier.
        gate: ``probe``, a cheap first pass that decides who needs a second; ``rnn``, the recurrent gate of DFS
            (Shen et al., 2020); or ``ff``, a feed-forward gate per block.
        embedding: width of the gate's input.
        hidden: width of the gate's hidden state.
        mirror: with the probe gate, show the second pass the mirrored image.
    """

    bits: tuple[int, ...] = PRESETS["hardware"]
    edge_bits: int = DEFAULT_EDGE_BITS
    gate: GateKind = "probe"
    embedding: int = 10
    hidden: int = 10
    mirror: bool = False

    def __post_init__(self) -> None:
        for bits in self.bits:
            if bits != 0:
                check_bitwidth(bits)
        if len(set(self.bits)) != len(self.bits):
            raise ConfigError(f"bits {','.join(map(str, self.bits))}: a bitwidth is repeated")
        if len(self.bits) < 2:
            raise ConfigError("bits: at least two options are needed for a choice")
        object.__setattr__(self, "bits", tuple(sorted(self.bits)))
        check_bitwidth(self.edge_bits)
        if self.gate not in get_args(GateKind):
            raise ConfigError(f"gate {self.gate!r} is not one of {', '.join(get_args(GateKind))}")
        if self.mirror and self.gate != "probe":
            raise ConfigError(f"mirror is for the second pass of the probe gate, not for {self.gate}")
        if self.embedding < 1 or self.hidden < 1:
            raise ConfigError("the gate's embedding and hidden widths must be at least 1")


@dataclass(frozen=True)
class TuningConfig(_Settings):
    """How the converted network is tuned.

    Args:
        epochs: passes over the training images; None: as many as give ``MIN_STEPS`` steps.
        batch_size: images per step.
        lr: learning rate of the quantizers' step sizes; the gate's and the backbone's follow from it.
        freeze_backbone: train gates and quantizers only.
        amp: run the forward pass under automatic mixed precision (bfloat16).
        device: ``auto`` takes CUDA where it is available.
        workers: processes that load images; None: none for embedded data, else up to two.
        seed: of everything random.
        warmup: share of the steps in which only the gate is trained.
        ramp: share of the steps over which the target cost falls from full execution to the budget.
        distillation: weight of the distillation loss against the original network; of images that the second pass sees mirrored
            the original sees both views.
        temperature: softmax temperature of the distillation (Hinton et al., 2015).
        hflip: probability of a horizontal flip in training.
        min_crop: smallest share of the image's area that a random training crop keeps.
    """

    epochs: int | None = None
    batch_size: int = 128
    lr: float = 1e-3
    freeze_backbone: bool = False
    amp: bool = False
    device: DeviceKind = "auto"
    workers: int | None = None
    seed: int = 0
    warmup: float = 0.15
    ramp: float = 0.3
    distillation: float = 1.0
    temperature: float = 2.0
    hflip: float = 0.5
    min_crop: float = 0.9

    MIN_STEPS = 350

    def __post_init__(self) -> None:
        for name, low in (("epochs", 1), ("batch_size", 1), ("workers", 0)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"{name.replace('_', '-')} {value} is below {low}")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed {self.seed} is not in [0, 2**32)")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ConfigError(f"lr {self.lr:g} is not a positive number")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"device {self.device!r} is not one of auto, cpu, cuda")
        for name in ("warmup", "ramp", "hflip"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} {getattr(self, name):g} is not in [0, 1]")
        if not 0 < self.min_crop <= 1:
            raise ConfigError(f"min-crop {self.min_crop:g} is not in (0, 1]")
        if self.distillation < 0 or self.temperature <= 0:
            raise ConfigError("distillation must not be negative and temperature must be positive")


@dataclass(frozen=True)
class Preprocessing(_Settings):
    """How an image becomes the network's input, in timm's terms.

    Args:
        input_size: (C, H, W) at evaluation.
        train_size: (C, H, W) in training.
        interpolation, crop_pct, crop_mode, mean, std: as in ``timm.data.resolve_data_config``.
    """

    input_size: tuple[int, int, int]
    train_size: tuple[int, int, int]
    interpolation: str
    crop_pct: float
    crop_mode: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        for size in (self.input_size, self.train_size):
            if len(size) != 3 or min(size) < 1:
                raise ConfigError(f"image size {size} is not (channels, height, width)")
        if not self.crop_pct > 0:
            raise ConfigError(f"crop-pct {self.crop_pct:g} is not positive")
        for name in ("mean", "std"):
            if len(getattr(self, name)) != self.input_size[0]:
                raise ConfigError(f"{name} has {len(getattr(self, name))} values for {self.input_size[0]} channels")
        if min(self.std) <= 0:
            raise ConfigError("std must be positive")


@dataclass(frozen=True)
class DataConfig(_Settings):
    """Where images come from.

    Args:
        data_dir: root folder; in ImageFolder layout where ``dataset`` is empty.
        dataset: a reader of ``timm.data.create_dataset``, as ``torch/cifar10``; ``digits`` for the embedded data.
        train_split, val_split: split names; None: the usual names are tried.
        num_samples: at most so many images of each split, drawn once by the seed.
        download: let the reader download the dataset where it supports that.
    """

    data_dir: str | None = None
    dataset: str = ""
    train_split: str | None = None
    val_split: str | None = None
    num_samples: int | None = None
    download: bool = False

    def __post_init__(self) -> None:
        if self.num_samples is not None and self.num_samples < 1:
            raise ConfigError(f"num-samples {self.num_samples} is below 1")


@dataclass(frozen=True)
class SweepConfig:
    """What a sweep compares.

    Args:
        budgets: of the dynamic networks, and of the baselines that have one.
        baselines: some of ``uniform``, ``mixed``, ``skipnet``, ``cascade``.
        seeds: how many repetitions, from the tuning settings' seed on.
        dynamic: options and gate of the dynamic network for a budget; where there is none, those that a conversion uses.
    """

    budgets: tuple[float, ...]
    baselines: tuple[Baseline, ...] = BASELINES
    seeds: int = 1
    dynamic: dict[float, DynamicConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.budgets:
            raise ConfigError("a sweep needs at least one budget")
        if len(set(self.budgets)) != len(self.budgets):
            raise ConfigError("a budget is given twice")
        if self.seeds < 1:
            raise ConfigError(f"seeds {self.seeds} is below 1")
        for name in self.baselines:
            if name not in BASELINES:
                raise ConfigError(f"baseline {name!r} is not one of {', '.join(BASELINES)}")
