"""Sums written out in text, worked out exactly by a parser of its own; imports nothing of the project.

Expression := Term (("+" | "-") Term)*; Term := Factor (("*" | "/") Factor)*; Factor := whole number |
"(" Expression ")". There is no sign, no power and no name, so that neither time nor size can grow beyond the limits.
"""

from __future__ import annotations

import dataclasses
import re
from fractions import Fraction

MAX_CHARACTERS = 200
MAX_DEPTH = 16
MAX_DIGITS = 9

_TOKEN = re.compile(r"\s*(?:([0-9]+)|([-+*/()]))")
_SPELLINGS = str.maketrans(
    {"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "[": "(", "]": ")", "{": "(", "}": ")"}
)


class NotAnExpression(Exception):
    """A text is not a sum that can be worked out; the message says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Worked:
    """What a sum comes to, and the whole numbers in it from left to right."""

    value: Fraction
    numbers: tuple[int, ...]


def work_out(text: str) -> Worked:
    """The exact value of a sum such as ``4 / (1 - 5/6)``.

    Raises:
      NotAnExpression: it is none, divides by zero, or has over 200 characters, brackets over 16 deep, or numbers of
        over 9 digits.
    """
    if len(text) > MAX_CHARACTERS:
        raise NotAnExpression(f"the sum has {len(text)} characters, more than {MAX_CHARACTERS}")
    tokens = _tokens(text)
    value, place = _expression(tokens, 0, 0)
    if place != len(tokens):
        raise NotAnExpression(f"{tokens[place]!r} is where an operation should be")
    return Worked(value=value, numbers=tuple(int(token) for token in tokens if token.isdigit()))


def _tokens(text: str) -> list[str]:
    text = text.translate(_SPELLINGS).strip()
    tokens, place = [], 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise NotAnExpression(f"{text[place:].lstrip()[0]!r} is no part of a sum")
        token = match[1] or match[2]
        if len(token) > MAX_DIGITS:
            raise NotAnExpression(f"a number has {len(token)} digits, more than {MAX_DIGITS}")
        tokens.append(token)
        place = match.end()
    return tokens


def _expression(tokens: list[str], place: int, depth: int) -> tuple[Fraction, int]:
    value, place = _term(tokens, place, depth)
    while place < len(tokens) and tokens[place] in "+-":
        other, after = _term(tokens, place + 1, depth)
        value, place = (value + other if tokens[place] == "+" else value - other), after
    return value, place


def _term(tokens: list[str], place: int, depth: int) -> tuple[Fraction, int]:
    value, place = _factor(tokens, place, depth)
    while place < len(tokens) and tokens[place] in "*/":
        other, after = _factor(tokens, place + 1, depth)
        if tokens[place] == "/" and other == 0:
            raise NotAnExpression("the sum divides by zero")
        value, place = (value * other if tokens[place] == "*" else value / other), after
    return value, place


def _factor(tokens: list[str], place: int, depth: int) -> tuple[Fraction, int]:
    if place >= len(tokens):
        raise NotAnExpression("the sum ends where a number should be")
    if tokens[place].isdigit():
        return Fraction(int(tokens[place])), place + 1
    if tokens[place] != "(":
        raise NotAnExpression(f"{tokens[place]!r} is where a number should be")
    if depth == MAX_DEPTH:
        raise NotAnExpression(f"the brackets are more than {MAX_DEPTH} deep")
    value, place = _expression(tokens, place + 1, depth + 1)
    if place >= len(tokens) or tokens[place] != ")":
        raise NotAnExpression("a bracket is not closed")
    return value, place + 1
