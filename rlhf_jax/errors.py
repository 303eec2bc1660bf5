"""The one error that is the user's to mend; imports nothing of the project.

A command line shows the message alone, without a traceback, and exits with status 2.
"""

from __future__ import annotations

import math


class InputError(ValueError):
    """Something the user gave (a file, a flag, a directory) cannot be used.

    The message is one sentence that names the thing, the value, and the remedy.
    """


def check_range(
    config: object,
    *names: str,
    at_least: float = -math.inf,
    above: float = -math.inf,
    at_most: float = math.inf,
    below: float = math.inf,
) -> None:
    """Raises InputError, naming the field and the bounds, where a field of ``config`` is outside of them or NaN."""
    for name in names:
        value = getattr(config, name)
        if not (at_least <= value <= at_most and above < value < below):
            bounds = {"at least": at_least, "above": above, "at most": at_most, "below": below}
            said = " and ".join(f"{words} {bound}" for words, bound in bounds.items() if math.isfinite(bound))
            raise InputError(f"{name} is {value}; it must be {said or 'finite'}")
