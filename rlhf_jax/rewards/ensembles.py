"""Several reward models as one, and how far they disagree; imports models, types, losses.checks and numpy.

The parameters of the E members are stacked: every array has a leading axis [E], and one vmapped call scores with all.
Members are trained apart, so that their zero points differ: scores are compared after ``offsets`` [E], the mean reward
of reference responses by each member, is taken off.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.errors import InputError
from rlhf_jax.losses import checks
from rlhf_jax.models import heads
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.rewards import reward_model
from rlhf_jax.types import DemonstrationBatch, Rollout


def init_ensemble(config: ModelConfig, decoders: Sequence[Any], key: jax.Array, *, size: int) -> Any:
    """Stacked parameters of ``size`` reward models, each with a head of its own.

    ``decoders``: one, from which all start, or as many as there are members, of one architecture. From one, heads and
    the order of the data in training make members differ as little as a fine-tuning seed does (Coste et al. 2024);
    members from different pre-trained decoders disagree more where all are wrong (Eisenstein et al. 2023).

    Raises:
      ValueError: another number of decoders.
    """
    if len(decoders) not in (1, size):
        raise ValueError(f"{len(decoders)} decoders for {size} members: give one, or one for each")
    head = jax.vmap(lambda key: heads.init_scalar_head(config, key))(jax.random.split(key, size))
    if len(decoders) == 1:
        decoder = jax.tree.map(lambda x: jnp.broadcast_to(x, (size, *jnp.shape(x))), decoders[0])
    else:
        decoder = stack_members(decoders)
    return {"decoder": decoder, "head": head}


def stack_members(members: Sequence[Any]) -> Any:
    """Stacked parameters from those of each member, which are trees of one structure and the same shapes."""
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *members)


def member(params: Any, index: int) -> Any:
    """The parameters of one member of a stack."""
    return jax.tree.map(lambda array: array[index], params)


def score(
    config: ModelConfig,
    params: Any,
    batch: Rollout | DemonstrationBatch,
    *,
    offsets: jax.Array | float = 0.0,
) -> jax.Array:
    """The reward of each row by each member, [E, B] float32, minus the member's offset ([E], or one number)."""
    scores = jax.vmap(lambda member: reward_model.score(config, member, batch))(params)
    return scores - jnp.broadcast_to(jnp.asarray(offsets, jnp.float32), scores.shape[:1])[:, None]


def mean_score(scores: jax.typing.ArrayLike) -> jax.Array:
    """The members' mean, [E, B] -> [B] float32."""
    return jnp.mean(checks.floating("scores", scores, "E B"), axis=0)


def worst_case_score(scores: jax.typing.ArrayLike) -> jax.Array:
    """The lowest member's reward, [E, B] -> [B] float32: worst-case optimisation, Coste et al. (2024)."""
    return jnp.min(checks.floating("scores", scores, "E B"), axis=0)


def mean_minus_variance(scores: jax.typing.ArrayLike, *, penalty: float | jax.Array) -> jax.Array:
    """mean - penalty * variance over members, [E, B] -> [B] float32: UWO of Coste et al. (2024).

    The variance is theirs, over E (not E - 1), so that one member is its own mean. They use penalties of 0.1 to 1 for
    rewards of unit spread; the variance is in the square of the rewards' unit.

    Raises:
      ValueError: ``penalty`` is below 0.
    """
    scores = checks.floating("scores", scores, "E B")
    checks.non_negative("penalty", penalty)
    return jnp.mean(scores, axis=0) - penalty * jnp.var(scores, axis=0)


def disagreement(scores: jax.typing.ArrayLike) -> jax.Array:
    """The standard deviation over members (over E), [E, B] -> [B] float32, in the rewards' unit."""
    return jnp.std(checks.floating("scores", scores, "E B"), axis=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DisagreementAlarm:
    """When members disagree more than they do on reference responses.

    offsets: each member's mean reward of the reference, a tuple of E. threshold: the disagreement that a share
    ``expected_share`` of the reference exceeds. num_reference: rows of the reference.
    """

    offsets: tuple[float, ...]
    threshold: float
    expected_share: float
    num_reference: int


def calibrate_alarm(reference_scores: np.ndarray, *, share: float = 0.05) -> DisagreementAlarm:
    """An alarm from the rewards of responses that are known to be ordinary: those of the SFT policy, held out.

    Args:
      reference_scores: [E, N] float, no offsets taken off.
      share: of the reference rows that lie above the threshold, in (0, 0.5].

    Raises:
      InputError: fewer than 2 members, too few rows for the share, or a reward that is not finite.
    """
    scores = _finite(reference_scores)
    if not 0.0 < share <= 0.5:
        raise InputError(
            f"the alarm's share is {share}: give a share of reference rows above 0 and at most 0.5"
        )
    if scores.shape[1] * share < 5:
        raise InputError(
            f"{scores.shape[1]} reference rows put fewer than 5 above a share of {share}: give at least "
            f"{math.ceil(5 / share)} rows, or a larger share"
        )
    offsets = scores.mean(axis=1)
    spread = (scores - offsets[:, None]).std(axis=0)
    threshold = float(np.quantile(spread, 1.0 - share))
    return DisagreementAlarm(
        offsets=tuple(offsets.tolist()),
        threshold=threshold,
        expected_share=float(np.mean(spread > threshold)),
        num_reference=scores.shape[1],
    )


def share_above(alarm: DisagreementAlarm, scores: np.ndarray) -> float:
    """The share of the rows of ``scores`` [E, B] on which members disagree more than the threshold."""
    scores = _finite(scores)
    if scores.shape[0] != len(alarm.offsets):
        raise InputError(
            f"the alarm was calibrated on {len(alarm.offsets)} members and got {scores.shape[0]}: give the scores "
            "of the same ensemble"
        )
    spread = (scores - np.array(alarm.offsets)[:, None]).std(axis=0)
    return float(np.mean(spread > alarm.threshold))


def is_raised(alarm: DisagreementAlarm, scores: np.ndarray, *, sigmas: float = 4.0) -> bool:
    """Whether the share of rows above the threshold is more than chance: ``sigmas`` standard errors over the expected.

    Both shares are counts (binomial), of the rows here and of the reference, so that a small batch needs more of them.
    At 4 standard errors a batch that is like the reference raises the alarm about once in 10,000.
    """
    p, rows = alarm.expected_share, np.shape(scores)[1]
    standard_error = math.sqrt(p * (1.0 - p) * (1.0 / rows + 1.0 / alarm.num_reference))
    return share_above(alarm, scores) > p + sigmas * standard_error


def _finite(scores: np.ndarray) -> np.ndarray:
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 2 or scores.shape[0] < 2 or scores.shape[1] < 1:
        raise InputError(
            f"ensemble scores have shape {list(scores.shape)}: give [E, B] with at least 2 members"
        )
    if not np.isfinite(scores).all():
        where = np.argwhere(~np.isfinite(scores))[0]
        raise InputError(
            f"the reward of row {where[1]} by member {where[0]} is {scores[tuple(where)]}: leave that member out, or "
            "train it again"
        )
    return scores
