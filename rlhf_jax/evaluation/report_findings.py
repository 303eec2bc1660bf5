"""What the numbers of a ladder say, in figures and sentences of plain text. Imports report_files only."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax.evaluation.report_files import Point, is_number

# A fall smaller than this share of the gain is the noise of an evaluation, and is called staying.
NOTABLE_FALL = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Course:
    """How gold went while a policy was trained: where it started, was highest, and ended.

    gained: peak - start, gold units. lost: the share of ``gained`` that the end lies below the peak; None where nothing
    was gained. 1 means back at the start, more than 1 worse than the start.
    """

    start: Point
    peak: Point
    last: Point
    gained: float
    lost: float | None


def gold_course(points: Sequence[Point]) -> Course | None:
    """The course of gold over evaluations in step order; None without gold or with fewer than two evaluations."""
    if len(points) < 2 or any(point.gold is None for point in points):
        return None
    start, last = points[0], points[-1]
    peak = max(points, key=lambda point: point.gold)
    gained = peak.gold - start.gold
    lost = (peak.gold - last.gold) / gained if gained > 0 else None
    return Course(start=start, peak=peak, last=last, gained=gained, lost=lost)


def describe_course(course: Course) -> str:
    """One sentence on what became of gold, and of the proxy meanwhile."""
    start, peak, last = course.start, course.peak, course.last
    if course.lost is None:
        return (
            f"Gold never rose above the {start.gold:.2f} it started from and ended at {last.gold:.2f}, while the proxy "
            f"{_moved(start.proxy, last.proxy)}."
        )
    rise = f"Gold rose from {start.gold:.2f} to {peak.gold:.2f} (step {peak.step}, KL {peak.kl:.1f} nats)"
    if course.lost == 0:
        return f"{rise}, its highest at the last evaluation; the proxy {_moved(start.proxy, last.proxy)}."
    if course.lost < NOTABLE_FALL:
        return (
            f"{rise} and stayed near it, ending at {last.gold:.2f} ({course.lost:.0%} of what had been gained was "
            f"lost); the proxy {_moved(start.proxy, last.proxy)}."
        )
    worse = ", and it ended worse than it had begun" if course.lost > 1 else ""
    return (
        f"{rise}, then fell to {last.gold:.2f} at KL {last.kl:.1f} nats: {course.lost:.0%} of what had been gained was "
        f"lost{worse}. Meanwhile the proxy {_moved(peak.proxy, last.proxy)}."
    )


def _moved(before: float, after: float) -> str:
    if f"{before:.2f}" == f"{after:.2f}":
        return f"stayed at {after:.2f}"
    return f"{'rose' if after > before else 'fell'} from {before:.2f} to {after:.2f}"


def gold_gain(policies: Mapping[str, Mapping[str, Any]], name: str) -> tuple[float, float] | None:
    """Gold of a policy above that of SFT: (gold units, standard deviations of SFT's gold); None where not known."""
    start, end = policies.get("sft", {}), policies.get(name, {})
    known = (start.get("gold"), start.get("gold_std"), end.get("gold"))
    if not all(map(is_number, known)) or start["gold_std"] <= 0:
        return None
    gain = end["gold"] - start["gold"]
    return gain, gain / start["gold_std"]


def describe_reward_model(facts: Mapping[str, Any], num_pairs: int) -> str:
    """Accuracy against its ceiling and against "the longer one wins"; "" where accuracy is not known."""
    if "accuracy" not in facts:
        return ""
    pairs = f" of {num_pairs:,} pairs it had not seen" if num_pairs else " of pairs it had not seen"
    text = f"It picks the preferred reply in {facts['accuracy']:.1%}{pairs}."
    if "bayes_accuracy" in facts:
        gap = 100 * (facts["bayes_accuracy"] - facts["accuracy"])
        side = "below" if gap >= 0 else "above"
        text += (
            f" Nobody can do better than {facts['bayes_accuracy']:.1%} on average, because labels are noisy: it is "
            f"{abs(gap):.1f} points {side} that ceiling."
        )
    if "longer_wins" in facts:
        gap = 100 * (facts["accuracy"] - facts["longer_wins"])
        text += (
            f" Always picking the longer reply is right in {facts['longer_wins']:.1%}, "
            f"{abs(gap):.1f} points {'less' if gap >= 0 else 'more'}."
        )
    return text
