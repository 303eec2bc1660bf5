"""The final answer in a text, as an exact number; imports nothing of the project.

Everything here takes time linear in the text, whatever the text. A number that cannot be read without guessing
(a date, an unevaluated sum, a nested fraction, 10^5) is refused with a reason, not read in part.
"""

from __future__ import annotations

import re
from fractions import Fraction

# A number with more characters than this answers nobody's question, and int() of a megabyte of digits takes minutes.
MAX_NUMBER_LENGTH = 50
MAX_EXPONENT = 50
# The last sentence, a box and a marked line are read within so many characters.
WINDOW = 4000

_CURRENCY = r"\\?[$€£¥₹₩]"
# Digits with everything that could belong to the same number, so that a date or 1.2.3 is seen whole. A sign after a
# digit, a letter or a closing bracket subtracts; digits after a letter or ^ belong to a name, a unit or a power.
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)\]}}%])[-+])?(?:{_CURRENCY}\s?)?"
    r"(?<![\w^.])(?P<digits>\.?[0-9](?:[0-9,./:]*[0-9])?)(?P<exponent>[eE][-+]?[0-9]+(?!\w))?"
    r"(?P<part>\s[0-9]{1,9}/[0-9]{1,9}(?![0-9]|[,./:][0-9]))?"
)
_DECIMAL = re.compile(r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]+)?")
_UNEVALUATED = re.compile(
    r"\s?(?:\^(?!\\?circ|\{?\\circ)|\*\*\s?[0-9(]|[²³¹⁰⁴-⁹¼-¾⅐-⅞π√]|\\(?:pi|sqrt|frac)\b)"
    r"|\s*(?:[-+*/×÷·]|x\b|\\(?:times|div|cdot)\b)\s*[-(]*\\?[$€£]?[0-9]"
)
# "118 000", which may be one number or two.
_SPACED_AFTER = re.compile(r"[ \u00a0\u202f][0-9]{3}(?![0-9])")
_SPACED_BEFORE = re.compile(r"(?<![0-9])[0-9]{1,3}[ \u00a0\u202f]\Z")
_ANOTHER = re.compile(rf"[\sa-zA-Z%*]{{0,24}}?(?:[,;|/]|\bor\b|\band\b)(?:[-(*\s]|{_CURRENCY})*[0-9]")
_MARK = re.compile(
    r"(?P<hashes>####)|(?P<box>\\boxed\s?\{)"
    r"|(?<![^\s*_(>])(?:(?:A|[Aa]nswer|ANSWER)[*_]{0,2}\s?:|[Aa]nswer\s(?:is|was)\b)"
)
_FRACTION = re.compile(
    r"(?P<whole>[0-9]?)\\[dtc]?frac\s?"
    r"(?:\{\s?(-?[0-9,.]{1,50})\s?\}\s?\{\s?([0-9,.]{1,50})\s?\}|([0-9])([0-9]))"
)
_SENTENCE_END = re.compile(r"\n|[.!?][\"')\]*}]{0,4}\s+(?![a-z\s])")
_NEXT_QUESTION = re.compile(r"\n\s{0,9}(?:Q|Question)\s?:")
_BEFORE_ANSWER = re.compile(
    rf"(?:[\s*_:>#(\[{{~≈\"'`]|\\[(\[]|{_CURRENCY}|\\approx\b|about\b|approximately\b)*"
)


class NoAnswer(Exception):
    """A text holds no final answer that can be read; the message says why."""


def final_number(text: str) -> Fraction:
    r"""The final answer of a solution, exactly.

    Of the marks ``####``, ``\boxed{}``, and ``A:``, "Answer:" or "answer is" with a digit somewhere after, the last
    one counts. After ``####`` and in a box the answer is the number at once, or after the last "=" of the line.
    After ``A:`` and the like it is a number at once if the sentence has no other; else, and where there is no mark,
    the last number of the last sentence (before a next "Q:").

    Thousands' commas, currency signs, "%", units and final punctuation are left out ("50%" is 50); "3/4", "1 1/2",
    ``\frac{3}{4}`` and "1.2e3" are understood.

    Raises:
      NoAnswer: no number is there, or none that can be read without guessing.
    """
    last_digit = max(text.rfind(digit) for digit in "0123456789")
    mark = None
    for found in _MARK.finditer(text):
        if found["hashes"] or found["box"] or found.start() < last_digit:
            mark = found
    if mark is None:
        return _last_number(_last_sentence(text))
    if mark["box"]:
        return _marked_number(_braced(text[mark.end() : mark.end() + WINDOW]), mark[0])
    if mark["hashes"]:
        return _marked_number(text[mark.end() : mark.end() + WINDOW].lstrip().split("\n", 1)[0], mark[0])
    return _number_in_prose(_NEXT_QUESTION.split(text[mark.end() :], maxsplit=1)[0])


def _marked_number(text: str, mark: str) -> Fraction:
    """The number that ``text`` begins with, after its last "=" where it has one."""
    text = _plain(text).rsplit("=", 1)[-1]
    match = _NUMBER.match(text, _BEFORE_ANSWER.match(text).end())
    if match is None:
        raise NoAnswer(f"no number follows {mark}")
    if _ANOTHER.match(text, match.end()):
        raise NoAnswer(f"more than one number follows {mark}")
    return _value(match)


def _number_in_prose(text: str) -> Fraction:
    first = _plain(_SENTENCE_END.split(text.lstrip()[:WINDOW], maxsplit=1)[0])
    match = _NUMBER.match(first, _BEFORE_ANSWER.match(first).end())
    if match and not _NUMBER.search(first, match.end()):
        return _value(match)
    return _last_number(_last_sentence(text))


def _last_number(sentence: str) -> Fraction:
    text = _plain(sentence)
    match = None
    for match in _NUMBER.finditer(text):  # noqa: B007 - the last one is wanted
        pass
    if match is None:
        raise NoAnswer("the last sentence holds no number")
    if "\\frac" in text or text[: match.start()].endswith(("\\sqrt{", "√")):
        raise NoAnswer("the last sentence holds a nested or symbolic fraction or a root")
    return _value(match)


def _last_sentence(text: str) -> str:
    """The last sentence, or line, that has a letter or a digit."""
    for sentence in reversed(_SENTENCE_END.split(text.rstrip()[-WINDOW:])):
        if any(character.isalnum() for character in sentence):
            return sentence
    raise NoAnswer("the text holds no words")


def _braced(text: str) -> str:
    """What stands before the brace that closes the one before ``text``."""
    depth = 1
    for place, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:place]
    raise NoAnswer("\\boxed{ is not closed")


def _plain(text: str) -> str:
    """``text`` with LaTeX's spacing, text, exponents and simple fractions as plain characters; one kind of minus."""
    text = text.replace("−", "-").replace("–", "-").replace("{,}", ",")
    text = re.sub(r"\\[!,]", "", text)
    text = re.sub(r"\\[;: ]|\\(?:left|right|displaystyle|text|mathrm|mbox|textbf|mathbf)(?![a-z])", " ", text)
    text = re.sub(r"\^\{([^{}]{0,20})\}", r"^\1", text)
    return _FRACTION.sub(_plain_fraction, text)


def _plain_fraction(match: re.Match[str]) -> str:
    fraction = f"{match[2] or match[4]}/{match[3] or match[5]}"
    return f"{match['whole']} {fraction}" if match["whole"] else fraction


def _value(match: re.Match[str]) -> Fraction:
    if len(match[0]) > MAX_NUMBER_LENGTH:
        raise NoAnswer(f"the number has more than {MAX_NUMBER_LENGTH} characters")
    if _UNEVALUATED.match(match.string, match.end()):
        raise NoAnswer(f"{match[0].strip()} is a part of something not worked out")
    before, after = match.string[max(match.start() - 5, 0) : match.start()], match.end()
    if (len(match[0]) == 3 and _SPACED_BEFORE.search(before)) or (
        len(match["digits"]) <= 3 and _SPACED_AFTER.match(match.string, after)
    ):
        raise NoAnswer(f"{match[0]} stands beside another number with a mere space between")
    value = _ratio(match["digits"])
    if match["exponent"]:
        exponent = int(match["exponent"][1:])
        if abs(exponent) > MAX_EXPONENT or "/" in match["digits"]:
            raise NoAnswer(f"{match[0].strip()} is out of range")
        value *= Fraction(10) ** exponent
    if match["part"]:
        part = _ratio(match["part"].strip())
        if not match["digits"].isdigit() or match["exponent"] or part >= 1:
            raise NoAnswer(f"{match[0].strip()} is not one number")
        value += part
    return -value if match["sign"] == "-" else value


def _ratio(digits: str) -> Fraction:
    """The value of "1,234.5" or of "3/4"."""
    top, slash, bottom = digits.partition("/")
    if not _DECIMAL.fullmatch(top) or (slash and not _DECIMAL.fullmatch(bottom)):
        raise NoAnswer(f"{digits} is not one number")
    numerator = Fraction(top.replace(",", ""))
    if not slash:
        return numerator
    denominator = Fraction(bottom.replace(",", ""))
    if denominator == 0:
        raise NoAnswer(f"{digits} divides by zero")
    return numerator / denominator
