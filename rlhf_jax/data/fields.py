"""Checks of one record's fields, each failure a `BadRow` that finishes a sentence; imports rows only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_jax.data.rows import Messages


class BadRow(Exception):
    """What is wrong with one row, as the end of a sentence that begins with the row's place."""


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value"}
    return names.get(type(value), "a number")


def object_of(record: Any) -> dict[str, Any]:
    """The record itself, which must have named fields."""
    if not isinstance(record, dict):
        raise BadRow(f"is {kind_of(record)} where an object with named fields is expected")
    return record


def checked(value: Any, name: str, *, may_be_empty: bool = False) -> str:
    """A text that can be stored as UTF-8 and, unless it may be empty, says something."""
    if not isinstance(value, str):
        raise BadRow(f"has {kind_of(value)} in '{name}' where a string is expected")
    if "\0" in value:
        raise BadRow(f"has a NUL character in '{name}' (character {value.index(chr(0)) + 1})")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow(f"has half of a surrogate pair in '{name}', which no UTF-8 text can hold") from None
    if not may_be_empty and not value.strip():
        raise BadRow(f"has an empty '{name}'")
    return value


def value_of(record: Mapping[str, Any], name: str) -> Any:
    """A field that must be there."""
    if name not in record:
        had = ", ".join(repr(key) for key in list(record)[:8]) or "none"
        raise BadRow(f"has no field '{name}' (its fields: {had})")
    return record[name]


def text(record: Mapping[str, Any], name: str) -> str:
    """The text of a field that must be there and must say something."""
    return checked(value_of(record, name), name)


def response(record: Mapping[str, Any], name: str) -> str:
    """The text of a response: a string, or a conversation's one message of the assistant, without blanks around it."""
    value = value_of(record, name)
    if isinstance(value, list):
        turns = messages_of(value, name)
        if len(turns) != 1 or turns[0][0] != "assistant":
            said = ", ".join(role for role, _ in turns)
            raise BadRow(f"has messages of {said} in '{name}' where one message of the assistant is expected")
        value = turns[0][1]
    return checked(value, name).strip()


def prompt(record: Mapping[str, Any], name: str = "prompt") -> tuple[str | None, Messages]:
    """(text, no messages) of a prompt that is a string, (None, messages) of a conversational one."""
    value = value_of(record, name)
    if isinstance(value, list):
        return None, messages_of(value, name)
    return checked(value, name), ()


def messages_of(value: Any, name: str) -> Messages:
    """Turns as (role, content); at least one."""
    if not isinstance(value, list) or not value:
        raise BadRow(
            f"has {kind_of(value) if value != [] else 'an empty list'} in '{name}' where messages are expected"
        )
    turns = []
    for number, turn in enumerate(value, start=1):
        where = f"{name}[{number}]"
        if not isinstance(turn, dict):
            raise BadRow(
                f"has {kind_of(turn)} in '{where}' where a message with role and content is expected"
            )
        role = checked(turn.get("role"), f"{where}.role")
        content = checked(turn.get("content"), f"{where}.content", may_be_empty=role == "system")
        turns.append((role, content))
    return tuple(turns)


def list_of(record: Mapping[str, Any], name: str) -> list[Any]:
    """The list of a field that must be there and must hold something."""
    value = value_of(record, name)
    if not isinstance(value, list):
        raise BadRow(f"has {kind_of(value)} in '{name}' where a list is expected")
    if not value:
        raise BadRow(f"has an empty list in '{name}'")
    return value


def count(record: Mapping[str, Any], name: str) -> int:
    """A whole number of at least 0."""
    value = value_of(record, name)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # Parquet knows no whole numbers in a column with gaps
    if isinstance(value, bool) or not isinstance(value, int) or value < 0 or value >= 2**31:
        shown = repr(value) if isinstance(value, int | float) else kind_of(value)
        raise BadRow(f"has {shown} in '{name}' where a count of at least 0 is expected")
    return value


def truth(record: Mapping[str, Any], name: str) -> bool:
    """True or False; 1 and 0 count as such."""
    value = value_of(record, name)
    if value not in (True, False) or not isinstance(value, bool | int):
        shown = repr(value) if isinstance(value, int | float) else kind_of(value)
        raise BadRow(f"has {shown} in '{name}' where true or false is expected")
    return bool(value)


def probability(value: Any, name: str) -> float:
    """A number in [0, 1]; true is 1."""
    if not isinstance(value, bool | int | float) or not 0 <= value <= 1:
        shown = repr(value) if isinstance(value, int | float) else kind_of(value)
        raise BadRow(f"has {shown} in '{name}' where a number from 0 to 1 is expected")
    return float(value)


def labels(record: Mapping[str, Any], name: str) -> tuple[tuple[str, float], ...]:
    """(objective, number in [0, 1]) of each entry of an object; null is left out, and so is a field of another kind,
    which means something else."""
    given = record.get(name)
    if not isinstance(given, dict):
        return ()
    return tuple(
        (objective, probability(value, f"{name}.{objective}"))
        for objective, value in given.items()
        if value is not None
    )


def optional_text(record: Mapping[str, Any], *names: str) -> str:
    """The text of the first of ``names`` that is there and not null, numbers as they are written; "" if none is."""
    for name in names:
        value = record.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        if value is not None:
            return checked(value, name, may_be_empty=True)
    return ""
