"""Records of options as parameters of a command, for typer."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable
from typing import Any, TypeVar

R = TypeVar("R")


def expand(command: Callable[..., R]) -> Callable[..., R]:
    """The command with the fields of its records as parameters of its own, for typer."""
    hints = typing.get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    records: dict[str, tuple[type, list[str]]] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        if not dataclasses.is_dataclass(kind := hints[name]):
            parameters.append(parameter.replace(annotation=kind, kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        of_fields = typing.get_type_hints(kind, include_extras=True)
        fields = dataclasses.fields(kind)
        records[name] = typing.cast(type, kind), [field.name for field in fields]
        parameters += [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=of_fields[f.name])
            for f in fields
        ]

    def expanded(**given: Any) -> R:
        made = {name: kind(**{f: given.pop(f) for f in fields}) for name, (kind, fields) in records.items()}
        return command(**given, **made)

    expanded.__doc__, expanded.__name__ = command.__doc__, command.__name__
    expanded.__annotations__ = {p.name: p.annotation for p in parameters}
    vars(expanded)["__signature__"] = inspect.Signature(parameters)
    return expanded
