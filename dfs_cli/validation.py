"""Frozen dataclasses whose values are checked by pydantic, and which go to and from JSON."""

from __future__ import annotations

import dataclasses
import json
import reprlib
import sys
from typing import TYPE_CHECKING, Any, TypeVar

import pydantic
import pydantic_core
from pydantic.dataclasses import dataclass as pydantic_dataclass
from typing_extensions import dataclass_transform

from dfs_cli.errors import ConfigError

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")


def first_problem(error: pydantic.ValidationError) -> str:
    """The first problem that pydantic names, in one line: where, what was given, and what was expected."""
    problem = error.errors()[0]
    reason = problem.get("ctx", {}).get("error")
    if isinstance(reason, Exception):
        return str(reason)
    place = ".".join(str(part) for part in problem["loc"]) or error.title
    if problem["type"] == "missing":
        return f"{place} is missing"
    message = problem["msg"]
    return f"{place} {_shown(problem['input'])}: {message[:1].lower()}{message[1:]}"


def _shown(value: Any) -> str:
    """A value of any type, briefly."""
    if type(value) is float or (type(value) is int and abs(value) < sys.float_info.max):
        return f"{value:g}"
    return "a huge number" if type(value) is int else reprlib.repr(value)


def parse_json(text: str) -> Any:
    """The plain values that ``text`` stands for.

    Raises:
        ValueError: it is no JSON, is nested deeper than 200 levels, or has an infinite or undefined number.
    """
    return pydantic_core.from_json(text, allow_inf_nan=False)


class Json:
    """To and from JSON, for the dataclasses below and for records."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        values: dict[str, Any] = pydantic.TypeAdapter(type(self)).dump_python(self, mode="json")
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The object that :meth:`to_dict` described.

        Raises:
            ConfigError: a key is unknown or missing, or a value is of another type or out of range.
        """
        try:
            return pydantic.TypeAdapter(cls).validate_json(json.dumps(values))
        except pydantic.ValidationError as error:
            raise ConfigError(f"{cls.__name__}: {first_problem(error)}") from None

    def replace(self, **changes: Any) -> Self:
        """A copy with some values changed, validated as any."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def validated(cls: type[T]) -> type[T]:
    """A frozen dataclass whose values must be of the declared types and ranges, or ConfigError is raised in one line."""
    made: Any = pydantic_dataclass(
        cls, frozen=True, config=pydantic.ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    )
    create = made.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        try:
            create(self, *args, **kwargs)
        except pydantic.ValidationError as error:
            # A setting is an option, which is spelt with hyphens.
            place, colon, rest = first_problem(error).partition(": ")
            raise ConfigError(place.replace("_", "-") + colon + rest) from None

    # Nested values are validated by pydantic itself, which does not come this way: it then names the place.
    __init__.__wrapped__ = create  # type: ignore[attr-defined]
    made.__init__ = __init__
    return made  # type: ignore[no-any-return]
