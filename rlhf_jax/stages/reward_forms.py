"""One reward model, an ensemble, or several heads on one trunk: what the stage does differently. Imports all below.

Every objective of a model with several heads has labels of its own, which need not agree on the better response of a
pair, nor be there for every pair: each head is judged by the pairs that its objective decides, seen from its side.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from rlhf_jax.data import mixtures
from rlhf_jax.data.encoded import EncodedPreference
from rlhf_jax.data.rows import Preference, label_of, swapped
from rlhf_jax.errors import InputError
from rlhf_jax.models import heads
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.rewards import ensembles, reward_model
from rlhf_jax.stages import reward_objectives
from rlhf_jax.stages.reward_measures import PairScores, Score, View, agreement
from rlhf_jax.training import interrupt
from rlhf_jax.training.interrupt import StopRequest
from rlhf_jax.training.step import Objective

# Rows of a prepared set that are read together.
_CHUNK = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """What the stage asks of a kind of reward model.

    init: ``init(decoders, key) -> params``; of an ensemble each member may start from a decoder of its own. score:
    rewards of rows. objective: see ``training.step``. shown: metrics of the progress bar. views: ``views(scores,
    rows)``, what it is judged by. zero: ``zero(scores, rows)`` of reference pairs, the facts by which later stages take
    off what such a response is worth. more: ``more(scores, zero)``, of held-out pairs, what else is to be said of it.
    """

    init: Callable[[Sequence[Any], jax.Array], Any]
    score: Score
    objective: Objective
    shown: tuple[str, ...]
    views: Callable[[PairScores, Sequence[Preference]], list[View]]
    zero: Callable[[PairScores, Sequence[Preference]], dict[str, Any]]
    more: Callable[[PairScores, dict[str, Any]], dict[str, Any]] = lambda scores, zero: {}


def one(model: ModelConfig, how: dict[str, Any]) -> Form:
    """One head on one trunk; ``how``: arguments of `reward_objectives.make_objective`."""
    return Form(
        init=lambda decoders, key: {"decoder": decoders[0], "head": heads.init_scalar_head(model, key)},
        score=reward_model.score,
        objective=reward_objectives.make_objective(model, **how),
        shown=("accuracy", "margin"),
        views=lambda scores, rows: [("", scores, rows)],
        zero=lambda scores, rows: {"reward_offset": float(scores.chosen.mean())},
    )


def ensemble(model: ModelConfig, members: int, how: dict[str, Any]) -> Form:
    """``members`` of `one`, stacked; judged by the mean of their rewards."""
    return Form(
        init=functools.partial(ensembles.init_ensemble, model, size=members),
        score=ensembles.score,
        objective=reward_objectives.make_ensemble_objective(model, members, **how),
        shown=("accuracy", "margin"),
        views=lambda scores, rows: [("", _mean_member(scores), rows)],
        zero=lambda scores, rows: {"ensemble_offsets": scores.chosen.mean(axis=-1).tolist()},
        more=_of_members,
    )


def of_objectives(model: ModelConfig, objectives: tuple[str, ...], how: dict[str, Any]) -> Form:
    """A head for each objective on one trunk; ``how``: arguments of `losses.bradley_terry_loss`."""
    return Form(
        init=lambda decoders, key: {
            "decoder": decoders[0],
            "head": reward_model.init_heads(model, key, number=len(objectives)),
        },
        score=reward_model.score_by_objectives,
        objective=reward_objectives.make_heads_objective(model, objectives, **how),
        shown=tuple(f"accuracy_{name}" for name in objectives),
        views=functools.partial(_views_of_heads, objectives),
        zero=lambda scores, rows: {
            "objectives": list(objectives),
            "reward_offsets": [
                float(own.chosen.mean()) for _, own, _ in _views_of_heads(objectives, scores, rows)
            ],
        },
    )


def _mean_member(scores: PairScores) -> PairScores:
    return dataclasses.replace(
        scores, chosen=scores.chosen.mean(axis=0), rejected=scores.rejected.mean(axis=0)
    )


def _of_members(scores: PairScores, zero: dict[str, Any]) -> dict[str, Any]:
    """Each member's accuracy, and how far members are apart on a response, from rewards [E, N]."""
    both = np.concatenate([scores.chosen, scores.rejected], axis=1)
    both = both - np.asarray(zero["ensemble_offsets"])[:, None]
    return {
        "member_accuracy": [
            agreement(*pair)["eval/accuracy"] for pair in zip(scores.chosen, scores.rejected, strict=True)
        ],
        "disagreement": float(both.std(axis=0).mean()),
    }


def _views_of_heads(objectives: Sequence[str], scores: PairScores, rows: Sequence[Preference]) -> list[View]:
    """Of each head the pairs that its objective decides, the side that it prefers being the chosen one."""
    views = []
    for place, name in enumerate(objectives):
        kept = np.array([_decides(name, row) for row in rows])
        is_chosen = np.array([(label_of(row, name) or 0.0) > 0.5 for row in rows])
        chosen, rejected = scores.chosen[place], scores.rejected[place]
        own = PairScores(
            chosen=np.where(is_chosen, chosen, rejected)[kept],
            rejected=np.where(is_chosen, rejected, chosen)[kept],
            extra_tokens=np.where(is_chosen, scores.extra_tokens, -scores.extra_tokens)[kept],
        )
        # How likely the row's own label was says nothing of this one.
        unlabelled = (dataclasses.replace(row, probability=None) for row in rows)
        sides = [
            row if is_first else swapped(row) for row, is_first in zip(unlabelled, is_chosen, strict=True)
        ]
        views.append((name, own, [row for row, keep in zip(sides, kept, strict=True) if keep]))
    return views


def first_decided(
    objectives: Sequence[str],
    rows: Sequence[EncodedPreference],
    count: int,
    *,
    which: str,
    stop: StopRequest,
) -> tuple[EncodedPreference, ...]:
    """The first rows of which each objective decides ``count``, or as many as there are.

    Args:
      objectives: names of labels.
      rows: encoded pairs, read until there are enough.
      count: at least 1.
      which: what the rows are there for, for error messages.
      stop: looked at while rows are read.

    Raises:
      InputError: an objective that decides none.
      Interrupted: stopped on request.
    """
    missing, kept, seen = dict.fromkeys(objectives, count), [], {}
    for start in range(0, len(rows), _CHUNK):
        interrupt.check(stop, "nothing was trained yet")
        for row in mixtures.fetch(rows, np.arange(start, min(start + _CHUNK, len(rows)))):
            own = [name for name in objectives if missing[name] and _decides(name, row.row)]
            missing |= {name: missing[name] - 1 for name in own}
            kept += [row] if own else []
            seen |= dict(row.row.labels)
        if not any(missing.values()):
            break
    for name in (name for name in objectives if missing[name] == count):
        ties = "all of them ties" if name in seen else "none by that"
        labels = f"labels by {', '.join(map(repr, seen))}, {ties}" if seen else "no labels by objectives"
        raise InputError(
            f"no row {which} says which of its responses is better by {name!r} (they have {labels}); give "
            "--config.objectives that they are judged by, rows with such 'labels', or another --config.data.split_seed"
        )
    return tuple(kept)


def _decides(objective: str, row: Preference) -> bool:
    return label_of(row, objective) not in (None, 0.5)
