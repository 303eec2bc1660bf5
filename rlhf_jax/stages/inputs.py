"""The rows a stage trains on, of files, prepared sets or embedded worlds, and their batches. Imports data, storage."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np

from rlhf_jax import storage
from rlhf_jax.data import arithmetic, batches, mixtures, pipeline, prepared, readers, world
from rlhf_jax.data.mixtures import Mixture
from rlhf_jax.data.prepared import PreparedRows
from rlhf_jax.data.rows import (
    Demonstration,
    Preference,
    Prompt,
    group_of,
    pairs,
    with_objectives,
    with_soft_label,
)
from rlhf_jax.errors import InputError, check_range


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where rows come from and how they become fixed shapes.

    path: a file, a directory of such files, or a prepared set (experiments.prepare_data); several, with commas between
    them, are mixed. Empty: what is embedded here. weights: with several paths, how often each is drawn, as numbers with
    commas between them; empty: each as often as the others. embedded: which of the two, the film reviews of ``world``
    or the sums of ``arithmetic``; the latter have no preferences. world, arithmetic: their settings. format: what files
    hold; a prepared set knows. SFT on preferences learns the chosen responses.
    soft_labels: whether the reward model learns how likely a label is, from annotators' votes, instead of the label.
    vote_prior: votes added to either side then.
    ranking_size: responses a row has room for where a stage learns whole rankings; the reviews draw as many, a file's
    rankings may have fewer.
    prompt_length, response_length: padded widths in tokens. truncation: what happens to a row that is longer.
    on_bad_row: whether an unusable row stops the run or is left out, counted and listed. held_out_fraction,
    split_seed: files are split by group (topic, prompt), never by row, all of them at once, so that no group is trained
    on in one and held out in another; the world draws its held-out rows apart.
    """

    path: str = ""
    weights: str = ""
    format: Literal["preferences", "demonstrations", "prompts"] = "preferences"
    embedded: Literal["reviews", "arithmetic"] = "reviews"
    world: world.WorldConfig = dataclasses.field(default_factory=world.WorldConfig)
    arithmetic: arithmetic.ArithmeticConfig = dataclasses.field(default_factory=arithmetic.ArithmeticConfig)
    prompt_length: int = 16
    response_length: int = 48
    truncation: Literal["error", "drop", "keep_start", "keep_end"] = "error"
    on_bad_row: Literal["error", "skip"] = "error"
    held_out_fraction: float = 0.1
    split_seed: int = 0
    soft_labels: bool = False
    vote_prior: float = 0.0
    ranking_size: int = 4

    def __post_init__(self) -> None:
        check_range(self, "vote_prior", at_least=0)
        check_range(self, "ranking_size", at_least=2)

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

    repeated: how many further rows of either side had a prompt that had come before, where each prompt is used once.

    Raises:
      InputError: either is empty; every stage trains on the one and is judged by the other.
    """

    train: Sequence
    held_out: Sequence
    left_out: Sequence[tuple[str, str]] = ()
    repeated: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        if not self.train or not self.held_out:
            raise InputError(
                f"the data gives {len(self.train)} rows to train on and {len(self.held_out)} held out for evaluation: "
                "raise --config.data.held_out_fraction (of a file) or the counts of --config.data.world"
            )

    def first_held_out(self, count: int) -> list:
        """So many held-out rows, or as many as there are, in memory; of several sources each in turn."""
        return mixtures.in_turn(self.held_out, count)


def load_demonstrations(config: DataConfig) -> Split:
    """Rows of ``Demonstration``; of what is embedded the first tenth is held out."""
    if not config.path:
        reviews = config.embedded == "reviews"
        rows = world.demonstrations(config.world) if reviews else arithmetic.demonstrations(config.arithmetic)
        cut = max(1, len(rows) // 10)
        return Split(train=rows[cut:], held_out=rows[:cut])
    return _split_of(config, _as_demonstrations)


def load_preferences(config: DataConfig, objectives: tuple[str, ...] = ()) -> Split:
    """Rows of ``Preference``.

    Args:
      config: see ``DataConfig``.
      objectives: of labels that a loss aims at in the place of the one that ``chosen`` has.

    Raises:
      InputError: the embedded arithmetic was asked for, which has none.
    """
    if not config.path and config.embedded == "arithmetic":
        raise InputError(
            "--config.data.embedded=arithmetic has no preferences; give --config.data.path=<file>, or 'reviews'"
        )
    if not config.path:
        split = Split(
            train=world.preferences(config.world, "train"), held_out=world.preferences(config.world, "eval")
        )
    else:
        split = _split_of(config, _as_preferences)
    train, held_out = (_softened(config, rows) for rows in (split.train, split.held_out))
    if objectives:
        aim, view = functools.partial(with_objectives, names=objectives), f"objectives {objectives}"
        train, held_out = (_each(rows, aim, view) for rows in (train, held_out))
    return dataclasses.replace(split, train=train, held_out=held_out)


def load_rankings(config: DataConfig) -> Split:
    """Rows of ``Ranking`` to train on, and held-out pairs, rows of ``Preference``, to be judged by; files hold rankings
    whatever ``config.format`` says, and the pairs of a held-out ranking, which are kept in memory, are those that its
    votes decide.

    Raises:
      InputError: the embedded arithmetic was asked for, which has none; soft labels of the reviews, which have one
        vote a pair; or a prepared set of another kind.
    """
    if config.path:
        split = _split_of(config, _as_rankings, "rankings")
        held_out = [pair for ranking in split.held_out for pair in pairs(ranking)]
        return dataclasses.replace(split, train=_softened(config, split.train), held_out=held_out)
    if config.embedded == "arithmetic":
        raise InputError(
            "--config.data.embedded=arithmetic has no rankings; give --config.data.path=<file>, or 'reviews'"
        )
    if config.soft_labels:
        raise InputError(
            "--config.data.soft_labels is on, and a ranking of the embedded reviews is by one labeller, without votes; "
            "turn it off, give --config.data.path=<file>, or --config.kind=pairs"
        )
    return Split(
        train=world.rankings(config.world, size=config.ranking_size),
        held_out=world.preferences(config.world, "eval"),
    )


def _softened(config: DataConfig, rows: Sequence) -> Sequence:
    """The rows, with soft labels where the config asks for them."""
    if not config.soft_labels:
        return rows
    soften = functools.partial(with_soft_label, prior=config.vote_prior)
    return _each(rows, soften, f"soft {config.vote_prior}")


def load_process_steps(config: DataConfig) -> Split:
    """Rows of ``ProcessSteps``; files hold them, whatever ``config.format`` says.

    Raises:
      InputError: the embedded reviews were asked for, which have no steps, or a prepared set of another kind.
    """
    if config.path:
        return _split_of(config, _as_steps, "steps")
    if config.embedded == "reviews":
        raise InputError(
            "--config.data.embedded=reviews has no steps to judge; give --config.data.path=<file>, or 'arithmetic'"
        )
    train, held_out = (arithmetic.process_steps(config.arithmetic, split) for split in ("train", "eval"))
    return Split(train=train, held_out=held_out)


def load_prompts(config: DataConfig) -> Split:
    """Rows of ``Prompt``, each prompt of a source once; those of preferences are split as the pairs are."""
    if not config.path and config.embedded == "arithmetic":
        train, held_out = (arithmetic.prompts(config.arithmetic, split) for split in ("train", "eval"))
        return Split(train=train, held_out=held_out)
    if not config.path:
        return Split(train=world.prompts(config.world, "train"), held_out=world.prompts(config.world, "eval"))
    return _split_of(config, _as_prompts)


def gold_reward(config: DataConfig) -> Callable[[str, str, bool], float] | None:
    """The reviews' gold reward (prompt, response, terminated) -> float; None for anything else, which has none."""
    return None if config.path or config.embedded != "reviews" else world.gold_reward


def embedded_tokenizer(config: DataConfig) -> Any:
    """The tokenizer of what is embedded, for fresh weights."""
    return world.world_tokenizer() if config.embedded == "reviews" else arithmetic.arithmetic_tokenizer()


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How rows become batches.

    num_buckets: rows of about the same length to a batch, which is as wide as they are, in so many widths; 1: rows of
    any length, padded to the full width. num_workers: processes that read and tokenise ahead; 0: none, everything is
    done when a batch is asked for. Batches are the same with any number of them.
    """

    num_buckets: int = 1
    num_workers: int = 0

    def __post_init__(self) -> None:
        check_range(self, "num_buckets", at_least=1)
        check_range(self, "num_workers", at_least=0)

    @property
    def share(self) -> pipeline.Share:
        """What this process reads of every batch."""
        return pipeline.Share(
            process_index=jax.process_index(), process_count=jax.process_count(), num_workers=self.num_workers
        )


def demonstration_batches(
    config: BatchConfig, encoded: batches.Encoded, *, batch_size: int, seed: int, pack: bool = False
) -> pipeline.BatchIterator:
    """Endless batches for SFT; ``batch_size`` counts the rows of all processes.

    pack: several short demonstrations to a row, none of which sees another; not with ``config.num_buckets``.
    """
    how = {"batch_size": batch_size, "seed": seed, "share": config.share}
    if pack:
        return batches.packed_batches(encoded, **how)
    return batches.demonstration_batches(encoded, num_buckets=config.num_buckets, **how)


def preference_batches(
    config: BatchConfig, encoded: batches.Encoded, *, batch_size: int, seed: int
) -> pipeline.BatchIterator:
    """Endless batches of pairs, or of rankings; ``batch_size`` counts those of all processes."""
    return batches.preference_batches(
        encoded, batch_size=batch_size, seed=seed, share=config.share, num_buckets=config.num_buckets
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Source:
    """What one path holds: rows of a kind, and digests of their groups, [N] uint64. opened: the set, if prepared."""

    path: pathlib.Path
    kind: str
    rows: Sequence
    groups: np.ndarray
    left_out: Sequence[tuple[str, str]]
    opened: prepared.Prepared | None = None


def _split_of(
    config: DataConfig, convert: Callable[[_Source, Sequence], Sequence], kind: str | None = None
) -> Split:
    """Every path of the config as the rows that ``convert`` makes of it, mixed where there are several.

    kind: what files hold; None: what ``config.format`` says.
    """
    paths = [config.path] if pathlib.Path(config.path).exists() else config.path.split(",")
    weights = _weights(config, len(paths))
    sources = [_read(storage.local_path(path), config, kind or config.format) for path in paths]
    sides, repeated = [], []
    for side in _divided(config, sources):
        parts = [convert(source, rows) for source, rows in zip(sources, side, strict=True)]
        sides.append(_mixed(parts, weights))
        repeated.append(sum(map(len, side)) - sum(map(len, parts)))
    train, held_out = sides
    left_out = [entry for source in sources for entry in source.left_out]
    return Split(train=train, held_out=held_out, left_out=left_out, repeated=tuple(repeated))


def _divided(config: DataConfig, sources: Sequence[_Source]) -> tuple[list[Sequence], list[Sequence]]:
    """Training rows of each source, and held-out rows of each; a group that several have is on one side in all."""
    held_out = readers.is_held_out(
        np.concatenate([source.groups for source in sources]),
        held_out_fraction=config.held_out_fraction,
        seed=config.split_seed,
    )
    ends = np.cumsum([len(source.groups) for source in sources])
    of_each = list(zip(sources, np.split(held_out, ends[:-1]), strict=True))
    for source, out in of_each:
        if out.all():
            raise InputError(
                f"{source.path} has nothing to train on: all its {len(out)} rows are of groups that are held out; "
                "lower --config.data.held_out_fraction, or give another --config.data.split_seed"
            )
    return tuple(
        [_select(source.rows, np.flatnonzero(out == side)) for source, out in of_each]
        for side in (False, True)
    )


def _select(rows: Sequence, places: np.ndarray) -> Sequence:
    return rows.select(places) if isinstance(rows, PreparedRows) else [rows[int(place)] for place in places]


def _mixed(parts: Sequence[Sequence], weights: Sequence[float]) -> Sequence:
    """The parts that have rows as one."""
    kept = [(part, weight) for part, weight in zip(parts, weights, strict=True) if part]
    if len(kept) < 2:
        return kept[0][0] if kept else []
    return Mixture(parts=tuple(part for part, _ in kept), weights=tuple(weight for _, weight in kept))


def _weights(config: DataConfig, count: int) -> tuple[float, ...]:
    try:
        given = tuple(float(text) for text in config.weights.split(",")) if config.weights else (1.0,) * count
    except ValueError:
        raise InputError(
            f"--config.data.weights={config.weights} are not numbers with commas between them"
        ) from None
    if len(given) != count:
        raise InputError(
            f"--config.data.weights={config.weights} has {len(given)} numbers for the {count} paths of "
            "--config.data.path; give one for each"
        )
    return given


def _read(path: pathlib.Path, config: DataConfig, kind: str) -> _Source:
    if prepared.is_prepared(path):
        opened = prepared.open_prepared(path)
        return _Source(
            path=path,
            kind=opened.manifest.kind,
            rows=opened.rows,
            groups=opened.groups,
            left_out=opened.manifest.skipped,
            opened=opened,
        )
    read = {
        "preferences": readers.read_preferences,
        "demonstrations": readers.read_demonstrations,
        "prompts": readers.read_prompts,
        "steps": readers.read_process_steps,
        "rankings": readers.read_rankings,
    }[kind]
    rows, report = read(path, on_bad_row=config.on_bad_row)
    groups = readers.digests([group_of(row) for row in rows])
    return _Source(path=path, kind=kind, rows=rows, groups=groups, left_out=report.skipped)


def _only(kind: str, what: str, remedy: str) -> Callable[[_Source, Sequence], Sequence]:
    """Rows as they are, of one kind alone; others are refused in a sentence."""

    def convert(source: _Source, rows: Sequence) -> Sequence:
        if source.kind != kind:
            raise InputError(f"{source.path} holds {source.kind} where {what} are needed; {remedy}")
        return rows

    return convert


_as_steps = _only("steps", "solutions in judged steps", "prepare a set with --kind=steps")
_as_rankings = _only(
    "rankings", "rankings", "prepare a set with --kind=rankings, or give --config.kind=pairs"
)
_as_preferences = _only(
    "preferences", "preferences", "give files of preferences, or prepare a set with --kind=preferences"
)


def _as_demonstrations(source: _Source, rows: Sequence) -> Sequence:
    if source.kind == "demonstrations":
        return rows
    if source.kind == "preferences":
        return _each(rows, _chosen, "chosen")
    raise InputError(
        f"{source.path} holds {source.kind} where demonstrations or preferences are needed; give files of those "
        "(--config.data.format says which), or prepare a set with --kind=demonstrations"
    )


def _as_prompts(source: _Source, rows: Sequence) -> Sequence:
    if source.kind not in ("prompts", "demonstrations", "preferences"):
        raise InputError(
            f"{source.path} holds {source.kind} where prompts are needed; prepare a set with --kind=prompts"
        )
    if source.opened is not None:
        once = prepared.first_of_each_prompt(source.opened, rows)
    else:
        first: dict[str, Any] = {}
        for row in rows:
            first.setdefault(row.prompt, row)
        once = list(first.values())
    return once if source.kind == "prompts" else _each(once, _prompt, "prompt")


def _each(rows: Sequence, function: Callable[[Any], Any], view: str) -> Sequence:
    """What ``function`` makes of every row; of a prepared set, when the row is read."""
    if isinstance(rows, Mixture):
        return rows.map(lambda part: _each(part, function, view))
    if isinstance(rows, PreparedRows):
        return rows.convert(function, view)
    return [function(row) for row in rows]


def _chosen(row: Preference) -> Demonstration:
    return Demonstration(
        prompt=row.prompt, response=row.chosen, source=row.source, group=row.group, messages=row.messages
    )


def _prompt(row: Demonstration | Preference) -> Prompt:
    return Prompt(prompt=row.prompt, source=row.source, group=row.group, messages=row.messages)
