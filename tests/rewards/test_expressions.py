"""The parser of sums against Python's own, over Fractions, on random sums; and its limits."""

import ast
import operator
import random
from fractions import Fraction

import pytest

from rlhf_jax.rewards.expressions import NotAnExpression, work_out

OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def by_python(text):
    """The value by Python's grammar."""

    def value(node):
        if isinstance(node, ast.Constant):
            return Fraction(node.value)
        return OPERATIONS[type(node.op)](value(node.left), value(node.right))

    return value(ast.parse(text, mode="eval").body)


def random_sum(rng, depth):
    if depth == 0 or rng.random() < 0.2:
        return str(rng.randint(0, 13))
    inner = (
        f"{random_sum(rng, depth - 1)}{rng.choice([' ', ''])}{rng.choice('+-*/')}{random_sum(rng, depth - 1)}"
    )
    return f"({inner})" if rng.random() < 0.5 else inner


def test_random_sums_are_worked_out_as_python_does():
    rng = random.Random(3)
    refused = 0
    for _ in range(600):
        text = random_sum(rng, 4)
        if len(text) > 200:
            continue
        try:
            expected = by_python(text)
        except ZeroDivisionError:
            refused += 1
            with pytest.raises(NotAnExpression, match="divides by zero"):
                work_out(text)
            continue
        assert work_out(text).value == expected, text
    assert refused > 10


def test_thirds_are_exact_and_numbers_are_listed():
    worked = work_out("8 ÷ (3 − 8/3)")
    assert worked.value == 24 and worked.numbers == (8, 3, 8, 3)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "ends where a number"),
        ("1 +", "ends where a number"),
        ("-1", "where a number should be"),
        ("1 - -1", "where a number should be"),
        ("1 2", "where an operation should be"),
        ("(1", "not closed"),
        ("1)", "where an operation should be"),
        ("()", "where a number should be"),
        ("2**3", "where a number should be"),
        ("2^3", "no part of a sum"),
        ("1.5+1", "no part of a sum"),
        ("__import__('os')", "no part of a sum"),
        ("nan", "no part of a sum"),
        ("1e400", "no part of a sum"),
        ("٣", "no part of a sum"),
        ("1/(2-2)", "divides by zero"),
        ("1234567890", "digits"),
        ("(" * 17 + "1" + ")" * 17, "deep"),
        ("(" * 1_000_000, "characters"),
        ("1\x00", "no part of a sum"),
    ],
)
def test_what_is_no_sum_is_refused(text, reason):
    with pytest.raises(NotAnExpression, match=reason):
        work_out(text)


def test_the_limits_are_inside():
    assert work_out("(" * 16 + "1" + ")" * 16).value == 1
    assert work_out("+".join(["1"] * 100)).value == 100
    assert work_out("999999999").value == 999999999
