"""What a reward model is measured by: its rewards of both sides of pairs. Imports all below, and run_directory.

A tie is half right wherever something is counted.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import storage
from rlhf_jax.data import batches, readers, world
from rlhf_jax.data.rows import Preference
from rlhf_jax.evaluation import calibration
from rlhf_jax.metrics import written
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.parallel import hosts, sharding
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.stages.run_directory import Run
from rlhf_jax.training.forward import concatenate_pairs

# (config, params, batch) -> rewards [B], or with an axis in front where there are several.
Score = Callable[[ModelConfig, Any, Any], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairScores:
    """Of encoded pairs in order: rewards of both sides, float32 [N], [E, N] of an ensemble, [K, N] of several heads;
    and how many tokens the chosen response has more than the rejected one, [N]."""

    chosen: np.ndarray
    rejected: np.ndarray
    extra_tokens: np.ndarray


# What held-out pairs say of a reward model: of each thing that it is judged by the name ("" where there is one alone),
# its rewards [N], and the pairs, whose ``chosen`` is what it should prefer.
View = tuple[str, PairScores, Sequence[Preference]]


def make_pair_scorer(model: ModelConfig, encoded: Any, batch_size: int, run: Run, score_rows: Score):
    """``score_pairs(params) -> PairScores`` over all encoded pairs."""

    def score_both(params, batch):
        both = concatenate_pairs(batch.chosen, batch.rejected)
        return jnp.split(score_rows(model, params, both), 2, axis=-1)

    score = sharding.within(run.mesh, jax.jit(score_both))

    def score_pairs(params) -> PairScores:
        chosen, rejected, extra_tokens = [], [], []
        for batch, rows in batches.eval_batches(encoded, batch_size):
            first, second = hosts.fetch(score(params, meshes.put_rows(run.mesh, batch)))
            chosen.append(first[..., rows])
            rejected.append(second[..., rows])
            lengths = [side.response_mask.sum(axis=1) for side in (batch.chosen, batch.rejected)]
            extra_tokens.append((lengths[0] - lengths[1])[rows])
        return PairScores(
            chosen=np.concatenate(chosen, axis=-1),
            rejected=np.concatenate(rejected, axis=-1),
            extra_tokens=np.concatenate(extra_tokens),
        )

    return score_pairs


def measure(views: Sequence[View]) -> dict[str, float]:
    """Agreement with the labels, and the correlation of rewards with lengths between the two sides of a pair."""
    return _named(
        {
            name: agreement(scores.chosen, scores.rejected)
            | {"eval/length_correlation": length_correlation(scores)}
            for name, scores, _ in views
        }
    )


def agreement(chosen: np.ndarray, rejected: np.ndarray) -> dict[str, float]:
    """Accuracy and loss of rewards [N] of both sides."""
    return {
        "eval/accuracy": float(np.mean((1 + np.sign(chosen - rejected)) / 2)),
        "eval/loss": float(np.mean(np.logaddexp(0.0, rejected - chosen))),
    }


def length_correlation(scores: PairScores) -> float:
    """Of rewards [N] with lengths among the two responses to one prompt, in [-1, 1]; 0 where either never differs.

    What `losses.length_moments` of the pairs add up to: a pair's differences, about 0 and not about their mean, as
    which of the two is called the first says nothing.
    """
    margins, extra = (
        (scores.chosen - scores.rejected).astype(np.float64),
        scores.extra_tokens.astype(np.float64),
    )
    spread = np.sqrt(np.mean(margins**2) * np.mean(extra**2))
    return float(np.mean(margins * extra) / spread) if spread else 0.0


def gold_accuracy(rows, margins: np.ndarray) -> float:
    """How often reward margins [N] have the sign of gold's, on the pairs whose two sides differ in gold; a tie is half.

    What a labeller likes beside gold, as length, makes it lower than agreement with the labels allows.
    """
    better = np.sign([row.chosen_gold - row.rejected_gold for row in rows])
    return float(np.mean((1 + np.sign(margins) * better)[better != 0] / 2))


def compare(views: Sequence[View]) -> dict[str, float]:
    """What accuracy is to be held against, "the longer one wins" and where known the Bayes ceiling; how often rewards
    agree with gold, where that is known; and how far they are from calibrated."""
    return _named({name: _comparison(scores, rows) for name, scores, rows in views})


def _comparison(scores: PairScores, rows: Sequence[Preference]) -> dict[str, float]:
    margins = scores.chosen - scores.rejected
    facts = {"longer_wins": readers.longer_wins(rows)}
    if all(row.probability is not None for row in rows):
        facts["bayes_accuracy"] = world.bayes_accuracy(rows)
    if all(row.chosen_gold is not None and row.rejected_gold is not None for row in rows):
        facts["gold_accuracy"] = gold_accuracy(rows, margins)
    return facts | {
        "calibration_error": calibration.expected_calibration_error(calibration.reliability(margins))
    }


def _named(of_views: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The first view's numbers by their own names, and all with the view's behind them where it has one."""
    found = dict(next(iter(of_views.values())))
    for view, numbers in of_views.items():
        if view:
            found |= {f"{name}_{view}": value for name, value in numbers.items()}
    return found


def write_margins(view: View, run: Run) -> None:
    """Leaves ``margins.json`` for the report: by how much the chosen response is preferred, and how reliably."""
    if not hosts.is_main():
        return
    margins = view[1].chosen - view[1].rejected
    path = run.workdir / "margins.json"
    content = {
        "margins": [round(float(margin), 4) for margin in margins],
        "reliability": calibration.reliability(margins),
    }
    with written(path):
        storage.replace(path, json.dumps(content))
