"""The final number of a text: what it is by a person's reading, and what is refused rather than guessed."""

import random
from fractions import Fraction

import pytest

from rlhf_jax.rewards.answers import NoAnswer, final_number

READ = {
    "#### 18": 18,
    "16 - 3 = 13 eggs.\n#### $1,234.50.": Fraction("1234.5"),
    "####50%": 50,
    "#### −5": -5,
    "#### -$5": -5,
    "#### $-5": -5,
    "#### **18**": 18,
    "#### 2+3=5": 5,
    "#### 18\nThat was 1 question.": 18,
    "#### 9*2 = 3*6 = 18": 18,
    "#### 18\n\nA: thank you": 18,
    "A: 18": 18,
    "A: 5 and 13 make 18.\nQ: Tom has 6 pears": 18,
    "A: **18**": 18,
    "A: 18. She has 3 left.": 18,
    "A: 5 apples and 3 more give 8.": 8,
    "Answer: 70,000\n\nQ: what is 5 + 6?": 70000,
    "The answer is: 13520 ки": 13520,
    "the answer is $\\boxed{18\\text{ dollars}}$.": 18,
    "\\boxed{5} is wrong, \\boxed{x = -18}": -18,
    "\\boxed{\\frac{3}{4}}": Fraction(3, 4),
    "\\boxed{-\\dfrac{1}{2}}": Fraction(-1, 2),
    "\\boxed{1\\frac12}": Fraction(3, 2),
    "\\boxed{90^\\circ}": 90,
    "\\boxed{1{,}000}": 1000,
    "\\boxed{1\\,000}": 1000,
    "She has 9 eggs. So she makes $18 per day!": 18,
    "that is 72 clips": 72,
    "she gets 9 . so she makes 18 .": 18,
    "The area is 18 m^2.": 18,
    "The area is 18 cm² or 18 cm^{2}.": 18,
    "The lot measures 18 sq. ft.": 18,
    "It takes 1 1/2 cups": Fraction(3, 2),
    "x = .5": Fraction(1, 2),
    "He is left with 16-3": 3,
    "1.2e3": 1200,
    "**18**": 18,
    "it's (18).\n\n```": 18,
    "in 2010 500 people came": 500,
    "\x00\x01 5 \x02": 5,
}
REFUSED = {
    "": "no words",
    "   \n\t": "no words",
    "eighteen": "no number",
    "She has 18. I hope that helps!": "no number",
    "nan": "no number",
    "#### nan": "no number follows",
    "#### -inf": "no number follows",
    "18\n####": "no number follows",
    "\\boxed{}": "no number follows",
    "\\boxed{18": "not closed",
    "#### 1e400": "out of range",
    "1e999999999999": "out of range",
    "3/4e2": "out of range",
    "1e3 1/2": "not one number",
    "1" * 51: "more than 50",
    "#### 12/25/2020": "not one number",
    "1.2.3": "not one number",
    "3:30": "not one number",
    "1,23": "not one number",
    "1/2/3": "not one number",
    "1/0": "divides by zero",
    "2 3/2": "not one number",
    "#### 18 or 19": "more than one",
    "#### 18, 19": "more than one",
    "#### 18 dollars and 50 cents": "more than one",
    "#### 2+3": "not worked out",
    "#### 3 x 10^5": "not worked out",
    "10^5": "not worked out",
    "18²": "not worked out",
    "2½": "not worked out",
    "\\boxed{2\\sqrt{3}}": "not worked out",
    "\\boxed{3\\pi}": "not worked out",
    "\\sqrt{2}": "root",
    "\\frac{\\frac{1}{2}}{3}": "nested",
    "\\boxed{\\frac{\\frac{1}{2}}{3}}": "no number follows",
    "#### $118 000": "mere space",
    "which is $118 000.": "mere space",
    "#### ٣": "no number follows",
}


@pytest.mark.parametrize("text", READ)
def test_it_is_read_as_a_person_reads_it(text):
    assert final_number(text) == READ[text]


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: repr(text)[:40])
def test_what_cannot_be_read_is_refused_with_a_reason(text):
    with pytest.raises(NoAnswer, match=REFUSED[text]):
        final_number(text)


def test_arithmetic_is_exact():
    assert final_number("0.1") == Fraction(1, 10) != Fraction(0.1)
    assert final_number("12345678901234567890.5") * 2 == 24691357802469135781
    assert final_number("2/6") == final_number("\\frac{1}{3}") != final_number("0.3333333333")


def test_any_number_comes_back_however_it_is_dressed():
    rng = random.Random(0)
    for _ in range(400):
        value = Fraction(rng.randint(-(10**9), 10**9), rng.choice([1, 1, 10, 100]))
        digits = f"{abs(value.numerator) * (100 // value.denominator) / 100:,.2f}".removesuffix(".00")
        sign = "-" if value < 0 else ""
        dress = rng.choice(
            [
                "#### {}{}",
                "#### {}${}",
                "A: {}{}.",
                "3 times 4.\nIt is {}{} km.",
                "\\boxed{{{}{}}}",
                "x = {}€{}",
            ]
        )
        assert final_number(dress.format(sign, digits)) == value, dress.format(sign, digits)


HOSTILE = [
    "9", "A: ", "1,", "####", "\\boxed{", ". ", "-", "\\frac{", "1 ", "$", "answer is ", "\n", "Q:\n ", "x.", "#### (",
    "1/", "\\", "= 5 ", "{,}", "1e", "a\n", "^{", "\u00a0", "\x00",
]  # fmt: skip


def test_a_megabyte_of_anything_is_read_in_linear_time():
    # Were any step quadratic, one of these would take minutes and the suite's time limit would say so.
    for piece in HOSTILE:
        for text in (piece * (1_000_000 // len(piece)), piece * (1_000_000 // len(piece)) + " 5"):
            try:
                value = final_number(text)
            except NoAnswer as error:
                assert str(error)
            else:
                assert value in {1, 5, Fraction(1, 5)}, (piece, value)
