"""The rows a stage trains on, from a file or from the embedded world. Imports data and errors."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

from rlhf_jax.data import arithmetic, readers, world
from rlhf_jax.data.rows import Demonstration, Preference, Prompt
from rlhf_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where rows come from and how they become fixed shapes.

    path: a file of preferences or demonstrations; empty: what is embedded here. embedded: which of the two, the film
    reviews of ``world`` or the sums of ``arithmetic``; the latter have no preferences. world, arithmetic: their
    settings. format: what the file holds; SFT on a file of preferences learns the chosen responses.
    prompt_length, response_length: padded widths in tokens. truncation: what happens to a row that is longer.
    on_bad_row: whether an unusable row stops the run or is left out, counted and listed. held_out_fraction,
    split_seed: a file is split by group (topic, prompt), never by row; the world draws its held-out rows apart.
    """

    path: str = ""
    format: Literal["preferences", "demonstrations"] = "preferences"
    embedded: Literal["reviews", "arithmetic"] = "reviews"
    world: world.WorldConfig = dataclasses.field(default_factory=world.WorldConfig)
    arithmetic: arithmetic.ArithmeticConfig = dataclasses.field(default_factory=arithmetic.ArithmeticConfig)
    prompt_length: int = 16
    response_length: int = 48
    truncation: Literal["error", "drop", "keep_start", "keep_end"] = "error"
    on_bad_row: Literal["error", "skip"] = "error"
    held_out_fraction: float = 0.1
    split_seed: int = 0

    @property
    def widths(self) -> dict[str, Any]:
        """The keyword arguments that every encoder takes."""
        return {
            "prompt_length": self.prompt_length,
            "response_length": self.response_length,
            "truncation": self.truncation,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """Training and held-out rows, and what was left out on request: (source, reason) each.

    Raises:
      InputError: either is empty; every stage trains on the one and is judged by the other.
    """

    train: Sequence
    held_out: Sequence
    left_out: Sequence[tuple[str, str]] = ()

    def __post_init__(self) -> None:
        if not self.train or not self.held_out:
            raise InputError(
                f"the data gives {len(self.train)} rows to train on and {len(self.held_out)} held out for evaluation: "
                "raise --config.data.held_out_fraction (of a file) or the counts of --config.data.world"
            )


def load_demonstrations(config: DataConfig) -> Split:
    """Rows of ``Demonstration``; of what is embedded the first tenth is held out."""
    if not config.path:
        reviews = config.embedded == "reviews"
        rows = world.demonstrations(config.world) if reviews else arithmetic.demonstrations(config.arithmetic)
        cut = max(1, len(rows) // 10)
        return Split(train=rows[cut:], held_out=rows[:cut])
    if config.format == "demonstrations":
        rows, report = readers.read_demonstrations(pathlib.Path(config.path), on_bad_row=config.on_bad_row)
        train, held_out = _split(rows, config)
        return Split(train=train, held_out=held_out, left_out=report.skipped)
    split = load_preferences(config)
    return Split(
        train=[_chosen(row) for row in split.train],
        held_out=[_chosen(row) for row in split.held_out],
        left_out=split.left_out,
    )


def load_preferences(config: DataConfig) -> Split:
    """Rows of ``Preference``.

    Raises:
      InputError: the embedded arithmetic was asked for, which has none.
    """
    if not config.path and config.embedded == "arithmetic":
        raise InputError(
            "--config.data.embedded=arithmetic has no preferences; give --config.data.path=<file>, or 'reviews'"
        )
    if not config.path:
        return Split(
            train=world.preferences(config.world, "train"), held_out=world.preferences(config.world, "eval")
        )
    rows, report = readers.read_preferences(pathlib.Path(config.path), on_bad_row=config.on_bad_row)
    train, held_out = _split(rows, config)
    return Split(train=train, held_out=held_out, left_out=report.skipped)


def load_process_steps(config: DataConfig) -> Split:
    """Rows of ``ProcessSteps``; ``config.format`` is not read.

    Raises:
      InputError: the embedded reviews were asked for, which have no steps.
    """
    if config.path:
        rows, report = readers.read_process_steps(pathlib.Path(config.path), on_bad_row=config.on_bad_row)
        train, held_out = _split(rows, config)
        return Split(train=train, held_out=held_out, left_out=report.skipped)
    if config.embedded == "reviews":
        raise InputError(
            "--config.data.embedded=reviews has no steps to judge; give --config.data.path=<file>, or 'arithmetic'"
        )
    train, held_out = (arithmetic.process_steps(config.arithmetic, split) for split in ("train", "eval"))
    return Split(train=train, held_out=held_out)


def load_prompts(config: DataConfig) -> Split:
    """Rows of ``Prompt``, each prompt once; those of a preference file are split as its pairs are."""
    if not config.path and config.embedded == "arithmetic":
        train, held_out = (arithmetic.prompts(config.arithmetic, split) for split in ("train", "eval"))
        return Split(train=train, held_out=held_out)
    if not config.path:
        return Split(train=world.prompts(config.world, "train"), held_out=world.prompts(config.world, "eval"))
    split = load_demonstrations(config)
    return Split(train=_prompts(split.train), held_out=_prompts(split.held_out), left_out=split.left_out)


def gold_reward(config: DataConfig) -> Callable[[str, str, bool], float] | None:
    """The reviews' gold reward (prompt, response, terminated) -> float; None for anything else, which has none."""
    return None if config.path or config.embedded != "reviews" else world.gold_reward


def embedded_tokenizer(config: DataConfig) -> Any:
    """The tokenizer of what is embedded, for fresh weights."""
    return world.world_tokenizer() if config.embedded == "reviews" else arithmetic.arithmetic_tokenizer()


def _split(rows: Sequence, config: DataConfig) -> tuple[Sequence, Sequence]:
    return readers.split_by_group(rows, held_out_fraction=config.held_out_fraction, seed=config.split_seed)


def _chosen(row: Preference) -> Demonstration:
    return Demonstration(prompt=row.prompt, response=row.chosen, source=row.source)


def _prompts(rows: Sequence[Demonstration]) -> list[Prompt]:
    first = {}
    for row in rows:
        first.setdefault(row.prompt, Prompt(prompt=row.prompt, source=row.source))
    return list(first.values())
