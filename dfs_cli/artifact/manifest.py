"""What an artifact says about itself."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from dfs_cli.config import DynamicConfig, Preprocessing
from dfs_cli.cost.table import CostTable
from dfs_cli.errors import ArtifactError, ConfigError

FORMAT_VERSION = 5


@dataclass(frozen=True)
class Dynamics:
    """How much the decisions on a split depended on the image.

    Args:
        policies: number of distinct decision vectors.
        choice_entropy: mean over blocks of the entropy of the choice over images, in bits.
        variance_between_images: share of the variance of block costs that lies between images.
        common_share: share of the images that got the most common decision vector.
        common_top1, common_cost: top-1 (percent) and cost when every image is given that one.
    """

    policies: int
    choice_entropy: float
    variance_between_images: float
    common_share: float
    common_top1: float
    common_cost: float


@dataclass(frozen=True)
class Evaluation:
    """What was measured on a split.

    Args:
        images: how many were classified.
        top1, top5: percent.
        cost, cost_p50, cost_p95, cost_max: mean, median, 95th percentile and maximum over images, as fractions of the
            dense 32-bit network's MACs.
        choices: how often each block (L) took each option (K), over all passes.
        images_per_second: of the network, without loading.
        dynamics: how much the decisions depended on the image.
        unreadable: names of the images that were skipped.
    """

    images: int
    top1: float
    top5: float
    cost: float
    cost_p50: float
    cost_p95: float
    cost_max: float
    choices: tuple[tuple[int, ...], ...]
    images_per_second: float
    dynamics: Dynamics
    unreadable: tuple[str, ...] = ()

    @property
    def passes(self) -> float:
        """Passes through the network per image, in the mean."""
        return sum(self.choices[0]) / self.images

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Evaluation:
        choices = tuple(tuple(row) for row in values["choices"])
        own = {"choices": choices, "dynamics": Dynamics(**values["dynamics"])}
        return cls(**values | own | {"unreadable": tuple(values["unreadable"])})


@dataclass(frozen=True)
class Manifest:
    """Everything besides the tensors that rebuilds and describes a converted network.

    Args:
        architecture: timm name, without a weight tag.
        model_args: arguments of ``timm.create_model`` besides the name.
        class_names: in the order of the logits; empty where unknown.
        preprocessing: of the images.
        dynamic: options, gate, edge bits.
        table: the cost table, from which every cost is derived.
        budget: what was asked for; None for a network that was never tuned.
        operating_point: price of cost, see :class:`dfs_cli.nn.network.DynamicResNet`, or threshold of doubt, see
            :class:`dfs_cli.nn.probe.ProbedResNet`.
        configuration: the resolved settings of the conversion, for the record.
        source: tag, licence, origin and top-1 of the original weights.
        validation: what the converted network achieved on the validation split; None if it was not evaluated.
    """

    architecture: str
    model_args: dict[str, Any]
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    dynamic: DynamicConfig
    table: CostTable
    budget: float | None
    operating_point: float
    configuration: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    validation: Evaluation | None = None

    @property
    def num_classes(self) -> int:
        return int(self.model_args["num_classes"])

    def to_json(self) -> str:
        return json.dumps(
            {
                "format_version": FORMAT_VERSION,
                "architecture": self.architecture,
                "model_args": self.model_args,
                "class_names": list(self.class_names),
                "preprocessing": self.preprocessing.to_dict(),
                "dynamic": self.dynamic.to_dict(),
                "cost": self.table.to_dict(),
                "budget": self.budget,
                "operating_point": self.operating_point,
                "configuration": self.configuration,
                "source": self.source,
                "validation": self.validation.to_dict() if self.validation else None,
            },
            sort_keys=True,
            separators=(",", ":"),
        )

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Raises ArtifactError where the text is no manifest of this format version."""
        try:
            values = json.loads(text)
            version = values["format_version"]
            if version != FORMAT_VERSION:
                raise ArtifactError(
                    f"format version {version} is not {FORMAT_VERSION}: use the dfs that wrote the file"
                )
            manifest = cls(
                architecture=str(values["architecture"]),
                model_args=dict(values["model_args"]),
                class_names=tuple(values["class_names"]),
                preprocessing=Preprocessing.from_dict(values["preprocessing"]),
                dynamic=DynamicConfig.from_dict(values["dynamic"]),
                table=CostTable.from_dict(values["cost"]),
                budget=values["budget"],
                operating_point=float(values["operating_point"]),
                configuration=values["configuration"],
                source=values["source"],
                validation=Evaluation.from_dict(values["validation"]) if values["validation"] else None,
            )
            if manifest.table.options != manifest.dynamic.bits:
                raise ArtifactError("the manifest is damaged: the cost table is of other options")
            return manifest
        except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
            raise ArtifactError(f"the manifest is damaged: {type(error).__name__} {error}") from None
