"""What was measured: plain records that go to and from JSON."""

from __future__ import annotations

from typing import Annotated, NamedTuple

from pydantic import Field

from dfs_cli.validation import Json, validated

Percent = Annotated[float, Field(ge=0, le=100.001)]
Share = Annotated[float, Field(ge=-1e-9, le=1 + 1e-9)]
Cost = Annotated[float, Field(ge=0, le=1e6)]
Count = Annotated[int, Field(ge=0, lt=2**63)]


@validated
class Dynamics(Json):
    """How much the decisions on a split depended on the image.

    Args:
        policies: number of distinct decision vectors.
        choice_entropy: mean over blocks and passes of the entropy of the choice over images, in bits.
        variance_between_images: share of the variance of block costs that lies between images.
        common_share: share of the images that got the most common decisions.
        common_top1, common_cost: top-1 (percent) and cost when every image is given these.
    """

    policies: Count
    choice_entropy: Annotated[float, Field(ge=-1e-9, le=64)]
    variance_between_images: Share
    common_share: Share
    common_top1: Percent
    common_cost: Cost


@validated
class Evaluation(Json):
    """What was measured on a split.

    Args:
        images: how many were classified.
        top1, top5: percent.
        cost, cost_p50, cost_p95, cost_max: mean, median, 95th percentile and maximum over images, as fractions of the
            dense 32-bit network's MACs.
        choices: (P, L, K), how often each block took each option in each pass.
        images_per_second: of the network, without loading.
        dynamics: how much the decisions depended on the image.
        unreadable: names of the images that were left out.
        is_synthetic: the images are synthetic, and their classes are the original network's answers.

    Example:
        >>> import dfs_cli
        >>> tuning = dfs_cli.TuningConfig(steps=1, batch_size=64, hflip=0.0)
        >>> evaluation = dfs_cli.convert("resnet20_digits", 0.1, tuning=tuning).manifest.validation
        >>> evaluation.images, evaluation.pass_shares[0], len(evaluation.choices[0])
        (450, 1.0, 9)
    """

    images: Annotated[int, Field(ge=1, lt=2**63)]
    top1: Percent
    top5: Percent
    cost: Cost
    cost_p50: Cost
    cost_p95: Cost
    cost_max: Cost
    choices: tuple[tuple[tuple[Count, ...], ...], ...]
    images_per_second: Annotated[float, Field(ge=0, le=1e15)]
    dynamics: Dynamics
    unreadable: tuple[str, ...] = ()
    is_synthetic: bool = False

    @property
    def pass_shares(self) -> tuple[float, ...]:
        """Share of the images that took each pass, (P,)."""
        return tuple(sum(blocks[0]) / self.images for blocks in self.choices)

    @property
    def passes(self) -> float:
        """Passes through the network per image, in the mean."""
        return sum(self.pass_shares)


@validated
class Source(Json):
    """Where the original weights come from, and what they achieve.

    Args:
        weights: tag or file; None: not known.
        license, origin: as timm knows them.
        top1, top5: percent on the validation split; None: not measured.

    Example:
        >>> import dfs_cli
        >>> dfs_cli.Source("mine.safetensors", license="mit").to_dict()["license"]
        'mit'
    """

    weights: str | None = None
    license: str | None = None
    origin: str | None = None
    top1: Percent | None = None
    top5: Percent | None = None


@validated
class Tuned(Json):
    """What tuning ended with on the held-out images.

    Args:
        cost: mean cost of an image.
        top1: percent; None: their classes were not known.
    """

    cost: Cost
    top1: Percent | None = None


@validated
class Agreement(Json):
    """How often the network at 8 bits, before tuning, answers as the original does.

    Args:
        images: how many were compared.
        before, after: share of them with the same most likely class, before and after layers were refitted.
        refitted: names of the layers whose inputs were given a gain for each channel.
    """

    images: Annotated[int, Field(ge=1, lt=2**63)]
    before: Share
    after: Share
    refitted: tuple[str, ...] = ()


class StepRecord(NamedTuple):
    """One tuning step's figures; ``cost`` and ``target`` are fractions of the dense network's cost, of the pass for which
    something decides block by block (else of the whole network)."""

    step: int
    total_steps: int
    loss: float
    accuracy: float
    cost: float
    target: float
    multiplier: float
    lr: float
