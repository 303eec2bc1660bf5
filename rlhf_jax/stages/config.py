"""Frozen config dataclasses to plain dicts and back, with errors that name the field. Imports errors only."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from rlhf_jax.errors import InputError

T = TypeVar("T")


def from_dict(cls: type[T], values: Mapping[str, Any], prefix: str = "config") -> T:
    """Builds the dataclass ``cls`` (nested ones too) from nested mappings; missing fields take their defaults.

    Raises:
      InputError: an unknown or a missing field, or a value of the wrong type or out of range; the message names it.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{prefix} is {values!r}; set its fields, {prefix}.<field>=<value>")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            raise InputError(
                f"{prefix}.{name} does not exist; {cls.__name__} has {', '.join(sorted(fields))}"
            )
    for name, field in fields.items():
        if name not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise InputError(f"{prefix}.{name} is missing; give it a value")
    built = {name: _convert(hints[name], value, f"{prefix}.{name}") for name, value in values.items()}
    try:
        return cls(**built)
    except InputError as error:
        raise InputError(f"{prefix}: {error}") from None


def _convert(hint: Any, value: Any, name: str) -> Any:
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, name)
    if origin is typing.Literal:
        allowed = typing.get_args(hint)
        if value not in allowed:
            raise InputError(f"{name} is {value!r}; use one of {', '.join(map(repr, allowed))}")
        return value
    if origin in (types.UnionType, typing.Union):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        return _convert(next(option for option in options if option is not type(None)), value, name)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise InputError(f"{name} is {value}; it must be a finite number")
        return float(value)
    if origin is tuple:
        of = typing.get_args(hint)[0]
        if isinstance(value, str) or not isinstance(value, list | tuple):
            raise InputError(f"{name} is {value!r}; it must be a list, as in --{name}=\"('query','value')\"")
        return tuple(_convert(of, item, name) for item in value)
    if isinstance(hint, type) and (not isinstance(value, hint) or (hint is int and isinstance(value, bool))):
        raise InputError(f"{name} is {value!r}; it must be of type {hint.__name__}")
    return value


def differences(first: Mapping[str, Any], second: Mapping[str, Any], prefix: str = "") -> list[str]:
    """``name: first -> second`` for every leaf in which two nested dicts differ."""
    found = []
    for name in sorted(set(first) | set(second)):
        a, b = first.get(name), second.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found.append(f"{prefix}{name}: {a!r} -> {b!r}")
    return found
