"""The manifest of an artifact."""

from __future__ import annotations

import dataclasses
import json
import reprlib
from typing import Annotated

import pydantic
from pydantic import Field

from dfs_cli.config import Budget, Configuration, DynamicConfig, Limit, Preprocessing
from dfs_cli.cost.operating_point import keeps_budget
from dfs_cli.cost.table import CostTable
from dfs_cli.errors import ArtifactError, ConfigError
from dfs_cli.records import Agreement, Cost, Evaluation, Source, Tuned
from dfs_cli.validation import Json, first_problem, parse_json, validated

FORMAT_VERSION = 9
_LONGEST = 2**24
"""Characters of a manifest at most: those of the largest networks have a hundredth of that."""


@validated
class ModelArgs(Json):
    """Arguments of ``timm.create_model`` besides the name."""

    num_classes: Annotated[int, Field(ge=2, le=2**20)]
    in_chans: Annotated[int, Field(ge=1, le=2**12)] = 3


@validated
class Manifest(Json):
    """Everything besides the tensors that rebuilds and describes a converted network.

    Args:
        architecture: timm name, without a weight tag.
        model_args: arguments of ``timm.create_model`` besides the name.
        class_names: in the order of the logits; empty where unknown.
        preprocessing: of the images.
        dynamic: options and controller.
        table: the cost table, from which every cost is derived.
        budget: the budget asked for; None for a network that was never tuned.
        operating_point: of the controller, see :class:`dfs_cli.control.base.Controller`.
        limit: what no image may cost more than; None: there is no limit.
        configuration: the resolved settings of the conversion; None where there was none.
        source: the original weights.
        agreement: of the network at 8 bits, before tuning, with the original; None: not compared.
        held_out: what the network achieves on the held-out images, where its operating point was set.
        movable: the least and the largest mean cost that it can be moved to without tuning; None: never tuned.
        bound: the largest cost of an image, whatever it shows; None: the operating point was set on real images.
        validation: what the network achieves on the validation split; None if it was not evaluated.

    Raises:
        ConfigError: a value has the wrong type or is out of range, or two values contradict each other.

    Example:
        >>> import dfs_cli
        >>> tuning = dfs_cli.TuningConfig(steps=1, batch_size=64, hflip=0.0)
        >>> manifest = dfs_cli.convert("resnet20_digits", 0.1, tuning=tuning).manifest
        >>> dfs_cli.Manifest.from_json(manifest.to_json()) == manifest
        True
    """

    architecture: str
    model_args: ModelArgs
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    dynamic: DynamicConfig
    table: CostTable
    budget: Budget | None
    operating_point: Annotated[float, Field(ge=-1e12, le=1e12)]
    limit: Limit | None = None
    configuration: Configuration | None = None
    source: Source = dataclasses.field(default_factory=Source)
    agreement: Agreement | None = None
    held_out: Tuned | None = None
    movable: tuple[Cost, Cost] | None = None
    bound: Cost | None = None
    validation: Evaluation | None = None

    def __post_init__(self) -> None:
        if self.table.options != self.dynamic.bits:
            raise ConfigError("the cost table has other options than the network")
        if self.class_names and len(self.class_names) != self.model_args.num_classes:
            raise ConfigError(f"{len(self.class_names)} class names for {self.model_args.num_classes} classes")
        if self.preprocessing.input_size[0] != self.model_args.in_chans:
            channels = self.preprocessing.input_size[0]
            raise ConfigError(f"images of {channels} channels for a network of {self.model_args.in_chans}")

    @property
    def spend(self) -> bool:
        """Whether the whole budget was to be spent."""
        return self.configuration is not None and self.configuration.spend

    @property
    def is_data_free(self) -> bool:
        """Whether the conversion had no real images."""
        return self.configuration is not None and self.configuration.synthesis is not None

    @property
    def classes(self) -> tuple[str, ...] | int:
        """The names of the classes, or how many there are."""
        return self.class_names or self.model_args.num_classes

    @property
    def keeps_budget(self) -> bool | None:
        """Whether the cost on the validation split keeps the promise: at most 1.01 of the budget, and at least 0.9 of it
        where it was to be spent; without real images, whether no image can cost more than the budget. None: there is no budget
        or no evaluation."""
        if self.budget is None or self.validation is None:
            return None
        if self.bound is not None and self.validation.is_synthetic:
            return self.bound <= self.budget * (1 + 1e-9)
        return keeps_budget(self.validation.cost, self.budget, self.spend)

    @property
    def keeps_limit(self) -> bool | None:
        """Whether no image of the validation split cost more than the limit; None: there is no limit or no evaluation."""
        return None if self.limit is None or self.validation is None else self.validation.cost_max <= self.limit

    def to_json(self) -> str:
        return json.dumps({"format_version": FORMAT_VERSION} | self.to_dict(), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """The manifest that :meth:`to_json` wrote.

        Raises:
            ArtifactError: the text is not a manifest of this format version.
        """
        if len(text) > _LONGEST:
            raise ArtifactError(f"the manifest is damaged: it is longer than {_LONGEST} characters")
        try:
            values = parse_json(text)
        except ValueError as error:
            raise ArtifactError(f"the manifest is damaged: {error}") from None
        if not isinstance(values, dict) or "format_version" not in values:
            raise ArtifactError("the manifest is damaged: it has no format version")
        version = values.pop("format_version")
        if type(version) is not int or version != FORMAT_VERSION:
            shown = reprlib.repr(version)
            raise ArtifactError(f"format version {shown} is not {FORMAT_VERSION}: use the dfs that wrote the file")
        try:
            return pydantic.TypeAdapter(cls).validate_json(json.dumps(values))
        except pydantic.ValidationError as error:
            raise ArtifactError(f"the manifest is damaged: {first_problem(error)}") from None
