"""Plain-text tables for a terminal. Imports nothing."""

from __future__ import annotations

from collections.abc import Mapping

_COLUMNS = ("proxy", "gold", "kl", "length", "distinct_2")
_HEADINGS = {"kl": "KL to SFT", "distinct_2": "distinct-2"}


def policies(summary: Mapping[str, Mapping[str, float]]) -> str:
    """One line a policy; columns that no policy has are left out."""
    columns = [name for name in _COLUMNS if any(name in values for values in summary.values())]
    width = max(map(len, summary)) + 2
    lines = [" " * width + "".join(f"{_HEADINGS.get(name, name):>12}" for name in columns)]
    for policy, values in summary.items():
        cells = "".join(f"{values[name]:12.2f}" if name in values else f"{'':12}" for name in columns)
        lines.append(f"{policy:<{width}}{cells}")
    return "\n".join(lines)


def ladder(summary: Mapping[str, Mapping]) -> str:
    """The reward model against what it can be held against, then the policies."""
    reward = summary["reward_model"]
    line = f"reward model: accuracy {reward['accuracy']:.3f} on held-out pairs"
    if "bayes_accuracy" in reward:
        line += f", Bayes ceiling {reward['bayes_accuracy']:.3f}"
    return f"{line}, 'the longer one wins' {reward['longer_wins']:.3f}\n\n{policies(summary['policies'])}"
