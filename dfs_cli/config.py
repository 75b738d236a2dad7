"""Settings: frozen, validated, to and from JSON. Nothing here imports torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dfs_cli.errors import ConfigError
from dfs_cli.presets import FULL_BITS, PRESETS
from dfs_cli.ranges import LARGEST_BATCH, LARGEST_LIMIT, LARGEST_SEED, MOST_WORKERS
from dfs_cli.validation import Json, validated

QUANTIZED_BITS = range(2, 17)
"""Bitwidths that a quantizer can have."""

GateKind = Literal["probe", "rnn", "ff", "static"]
"""What decides; see :mod:`dfs_cli.control`."""
DeviceKind = Literal["auto", "cpu", "cuda"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]
"""timm's names."""
Kind = Literal["distilled", "noise"]
"""Of synthetic images."""
RECIPE_STEPS = 350
"""Tuning steps of the recipe."""
SYNTHESIS_STEPS = 150
"""Optimisation steps of a synthetic image."""
LONGEST_EPOCH = 1.5
"""An epoch of more than so many times the recipe's steps is not run to its end unless that is asked for."""

CHECKPOINT_MINUTES = 5.0
"""A run that can be interrupted is saved as often, at least."""
COMPARED_IMAGES = 1000
"""Real images on which a graph is compared with its network, by default."""


def _check_bitwidth(bits: int) -> int:
    if bits not in QUANTIZED_BITS and bits != FULL_BITS:
        raise ConfigError(f"bitwidth {bits} is not supported: use 2..16 or 32")
    return bits


@validated
class DynamicConfig(Json):
    """What the converted network is made of.

    Args:
        bits: bitwidth options of a block (K of them); 0 skips it, 32 runs it in floating point. Kept in ascending order.
        fixed_bits: bitwidth of the fixed layers, which always run: stem, shortcut convolutions and classifier.
        gate: ``probe``, a cheap first pass that decides which images take a second; ``rnn``, the recurrent gate of DFS
            (Shen et al., 2020); ``ff``, a feed-forward gate per block; or ``static``, the same bitwidths for all images.
        embedding: width of the gate's input.
        hidden: width of the gate's hidden state.
        mirror: with the probe gate, show the second pass the mirrored image; with ``static``, show every image a second
            time, mirrored.
        alike: with the probe gate, the second pass has the same bitwidths for all images that take it: nothing is decided.
        first_view: with the probe gate, height and width of the images that the first pass sees, as a share of the full ones;
            None: the full ones, or what is best by the costs on a device.

    Raises:
        ConfigError: a value is of another type or out of range, or two contradict each other.

    Example:
        >>> import dfs_cli
        >>> dfs_cli.DynamicConfig(bits=(8, 0, 4), gate="rnn").bits
        (0, 4, 8)
    """

    bits: tuple[int, ...] = PRESETS["lowbit"].bits
    fixed_bits: int = PRESETS["lowbit"].fixed_bits
    gate: GateKind = "probe"
    embedding: Annotated[int, Field(ge=1, le=4096)] = 10
    hidden: Annotated[int, Field(ge=1, le=4096)] = 10
    mirror: bool = False
    alike: bool = False
    first_view: Annotated[float, Field(ge=0.25, le=1)] | None = None

    def __post_init__(self) -> None:
        for bits in self.bits:
            if bits != 0:
                _check_bitwidth(bits)
        if len(set(self.bits)) != len(self.bits):
            raise ConfigError(f"bits {','.join(map(str, self.bits))}: a bitwidth is repeated")
        if self.bits in ((), (0,)) or (len(self.bits) < 2 and self.gate != "static"):
            raise ConfigError("bits: at least two options are needed for a choice")
        object.__setattr__(self, "bits", tuple(sorted(self.bits)))
        _check_bitwidth(self.fixed_bits)
        if self.mirror and self.gate not in ("probe", "static"):
            raise ConfigError(f"mirror is for a second pass, which the gate {self.gate} does not have")
        if self.first_view is not None and self.gate != "probe":
            raise ConfigError(f"first-view is for the first pass of the probe gate, not for {self.gate}")
        if self.alike and self.gate != "probe":
            raise ConfigError(f"alike is for the second pass of the probe gate, not for {self.gate}")
        if self.first_scale != 1 and FULL_BITS in (*self.bits, self.fixed_bits):
            raise ConfigError(f"first-view {self.first_scale:g} needs --bits and --fixed-bits below {FULL_BITS}")

    @property
    def first_scale(self) -> float:
        """Of what the first pass sees."""
        return 1.0 if self.first_view is None else self.first_view


@validated
class TuningConfig(Json):
    """How the converted network is tuned.

    Args:
        epochs: passes over the training images; see :meth:`total_steps` for what happens where nothing is given.
        steps: tuning steps, in place of epochs.
        batch_size: images per step, of all processes together.
        lr: learning rate of the quantizers' step sizes; the gate's and the backbone's follow from it.
        freeze_backbone: train gates and quantizers only.
        grad_accum_steps: pieces into which a batch is divided, whose gradients are added up: less memory, more time.
        amp: run the forward pass under automatic mixed precision (bfloat16).
        channels_last: tune in the channels-last memory layout.
        device: ``auto`` takes CUDA where it is available.
        workers: processes that load images; None: none for embedded data, else up to two.
        seed: random seed.
        label_weight: weight of the cross-entropy with the labels; 0: there are none, and the original is the only teacher.
        distillation: weight of the distillation loss against the original network; of images that the second pass sees mirrored
            the original sees both views.
        temperature: softmax temperature of the distillation (Hinton et al., 2015).
        hflip: probability of a horizontal flip in training.
        min_crop: smallest share of the image's area that a random training crop keeps.

    Raises:
        ConfigError: a value is of another type or out of range, or both epochs and steps are given.

    Example:
        >>> import dfs_cli
        >>> tuning = dfs_cli.TuningConfig(batch_size=64)
        >>> tuning.total_steps(steps_per_epoch=100), tuning.total_steps(steps_per_epoch=5000)
        (400, 350)
    """

    epochs: Annotated[int, Field(ge=1, le=10**6)] | None = None
    steps: Annotated[int, Field(ge=1, le=10**9)] | None = None
    batch_size: Annotated[int, Field(ge=1, le=LARGEST_BATCH)] = 128
    lr: Annotated[float, Field(ge=1e-12, le=1e38)] = 1e-3
    freeze_backbone: bool = False
    grad_accum_steps: Annotated[int, Field(ge=1, le=LARGEST_BATCH)] = 1
    amp: bool = False
    channels_last: bool = True
    device: DeviceKind = "auto"
    workers: Annotated[int, Field(ge=0, le=MOST_WORKERS)] | None = None
    seed: Annotated[int, Field(ge=0, le=LARGEST_SEED)] = 0
    label_weight: Annotated[float, Field(ge=0, le=1e6)] = 1.0
    distillation: Annotated[float, Field(ge=0, le=1e6)] = 1.0
    temperature: Annotated[float, Field(ge=1e-3, le=1e3)] = 2.0
    hflip: Annotated[float, Field(ge=0, le=1)] = 0.5
    min_crop: Annotated[float, Field(ge=0.01, le=1)] = 0.9

    def __post_init__(self) -> None:
        if self.epochs is not None and self.steps is not None:
            raise ConfigError("epochs and steps are two ways to say how long to tune: give one of them")
        if not self.label_weight and not self.distillation:
            raise ConfigError("label-weight and distillation are both 0: there is nothing to learn from")

    def total_steps(self, steps_per_epoch: int) -> int:
        """Tuning steps in all: as many as were asked for, or else whole epochs that give the recipe's steps at least; where one
        epoch alone is more than 1.5 times the recipe's steps, exactly these."""
        if self.steps is not None:
            return self.steps
        if self.epochs is not None:
            return self.epochs * steps_per_epoch
        if steps_per_epoch > LONGEST_EPOCH * RECIPE_STEPS:
            return RECIPE_STEPS
        return -(-RECIPE_STEPS // steps_per_epoch) * steps_per_epoch


Budget = Annotated[float, Field(gt=0, le=1)]
Limit = Annotated[float, Field(gt=0, le=LARGEST_LIMIT)]
Side = Annotated[int, Field(ge=1, le=2**12)]


@validated
class Preprocessing(Json):
    """How an image becomes the network's input, in timm's terms.

    Args:
        input_size: (C, H, W) at evaluation.
        train_size: (C, H, W) in training.
        interpolation, crop_pct, crop_mode, mean, std: as in ``timm.data.resolve_data_config``.

    Raises:
        ConfigError: a value is of another type or out of range.

    Example:
        >>> import dfs_cli
        >>> grey = dfs_cli.Preprocessing((1, 8, 8), (1, 8, 8), "bilinear", 1.0, "center", mean=(0.5,), std=(0.25,))
        >>> grey.replace(input_size=(1, 16, 16)).input_size
        (1, 16, 16)
    """

    input_size: tuple[Side, Side, Side]
    train_size: tuple[Side, Side, Side]
    interpolation: Interpolation
    crop_pct: Annotated[float, Field(ge=0.1, le=1)]
    crop_mode: Literal["center", "squash", "border"]
    mean: tuple[Annotated[float, Field(ge=-1e4, le=1e4)], ...]
    std: tuple[Annotated[float, Field(ge=1e-4, le=1e4)], ...]

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            if len(getattr(self, name)) != self.input_size[0]:
                raise ConfigError(f"{name} has {len(getattr(self, name))} values for {self.input_size[0]} channels")
        if self.train_size[0] != self.input_size[0]:
            raise ConfigError(f"train-size has {self.train_size[0]} channels and input-size {self.input_size[0]}")


@validated
class DataConfig(Json):
    """Where images come from.

    Args:
        data_dir: root folder; in ImageFolder layout where ``dataset`` is empty.
        dataset: a reader of ``timm.data.create_dataset``, as ``torch/cifar10``; ``digits`` for the embedded data.
        train_split, val_split: split names; None: the usual names are tried.
        class_map: file with the classes in the order of their indices, as timm reads it; None: the data's own order.
        num_samples: at most so many images of each split, drawn once by the seed.
        download: let the reader download the dataset where it supports that.

    Raises:
        ConfigError: a value is of another type or out of range.

    Example:
        >>> import dfs_cli
        >>> dfs_cli.DataConfig(data_dir="photos", num_samples=1000).names_data
        True
    """

    data_dir: str | None = None
    dataset: str = ""
    train_split: str | None = None
    val_split: str | None = None
    class_map: str | None = None
    num_samples: Annotated[int, Field(ge=1, lt=2**63)] | None = None
    download: bool = False

    @property
    def names_data(self) -> bool:
        """Whether a folder or a reader is given."""
        return self.data_dir is not None or bool(self.dataset)


@validated
class SynthesisConfig(Json):
    """How images are made from the pretrained network, where there are none.

    Args:
        kind: ``distilled``: noise, optimised until the network's batch-norm layers see what they remember; ``noise``: as it is.
        images: how many; None: what the machine can do in minutes.
        steps: optimisation steps of each image; None: :data:`SYNTHESIS_STEPS`.

    Raises:
        ConfigError: a value is of another type or out of range.

    Example:
        >>> import dfs_cli
        >>> dfs_cli.SynthesisConfig(images=64).kind
        'distilled'
    """

    kind: Kind = "distilled"
    images: Annotated[int, Field(ge=1, le=10**6)] | None = None
    steps: Annotated[int, Field(ge=1, le=10**6)] | None = None


@validated
class Configuration(Json):
    """The resolved settings of a conversion.

    Args:
        model: architecture.
        budget: what was asked for.
        spend: whether the budget itself was to be reached.
        dynamic, tuning, preprocessing: settings, nothing left open.
        data: None: splits that the caller opened, or synthetic images.
        synthesis: how many images were made, and how; None: they are real.
        device: where it ran.
        steps: tuning steps.
        images: how many of them are in each split.
        versions: of libraries.
        threads: of PyTorch.
        unreadable_training_images: names of images that were left out.
        limit: what no image may cost more than; None: there is no limit.
    """

    model: str
    budget: Budget
    spend: bool
    dynamic: DynamicConfig
    tuning: TuningConfig
    data: DataConfig | None
    preprocessing: Preprocessing
    device: str
    steps: Annotated[int, Field(ge=0, lt=2**63)]
    images: dict[str, Annotated[int, Field(ge=0, lt=2**63)]]
    versions: dict[str, str]
    threads: Annotated[int, Field(ge=0, lt=2**31)]
    synthesis: SynthesisConfig | None = None
    unreadable_training_images: tuple[str, ...] = ()
    limit: Limit | None = None
