"""The rows that readers and the embedded world produce, before any tokenizer; imports nothing.

``source`` says where a row came from ("pairs.jsonl:7" or "world:preferences/12"); error messages quote it.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demonstration:
    """A prompt and one response worth imitating."""

    prompt: str
    response: str
    source: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preference:
    """A prompt and two responses, of which ``chosen`` was preferred.

    group: rows of one group share texts or a topic, and are never divided between training and held-out
      rows; "" means that the prompt is the group.
    probability: P(this label) where it is known (the embedded world), else None.
    chosen_gold, rejected_gold: gold reward of either side where it is known, else None; for analysis only.
    """

    prompt: str
    chosen: str
    rejected: str
    source: str
    group: str = ""
    probability: float | None = None
    chosen_gold: float | None = None
    rejected_gold: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """Something to respond to; ``answer`` is what a verifier holds the response to, "" where there is none."""

    prompt: str
    source: str
    answer: str = ""
