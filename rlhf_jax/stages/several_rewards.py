"""Several reward models in one stage: a weighted sum, or one maximised while another is kept up. Imports all below.

Two reward models have no common unit: a score is 0 where a response is as good as those its model was trained to
prefer, and how much a unit is worth depends on how long it was trained. So a weighted sum is taken of standard scores,
and a constraint is stated in the unit of the one reward that it binds.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data import batches
from rlhf_jax.errors import InputError, check_range
from rlhf_jax.evaluation.policies import RowReward
from rlhf_jax.parallel import hosts, sharding
from rlhf_jax.rewards import objectives
from rlhf_jax.stages.handoffs import Model, objectives_of
from rlhf_jax.stages.rollouts import Combine, answers, make_rollout
from rlhf_jax.stages.run_directory import Purpose, Run, runs_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constraint:
    """Maximise the first of two reward models while the mean of the second is at least so much.

    at_least: c, in the unit of the second reward model (0: as good as the responses that it was trained to prefer);
    None: no constraint. rate: how much the multiplier, which begins at 0, moves an iteration for each unit that the
    mean is below c. limit: where the multiplier of a constraint that cannot be met stops. See
    ``rewards.objectives.lagrangian_reward`` and ``dual_ascent`` (Dai et al. 2024, Safe RLHF).
    """

    at_least: float | None = None
    rate: float = 0.03
    limit: float = 10.0

    def __post_init__(self) -> None:
        check_range(self, "rate", "limit", above=0)
        for name in ("rate", "limit"):
            default = type(self).__dataclass_fields__[name].default
            if self.at_least is None and getattr(self, name) != default:
                raise InputError(
                    f"config.constraint.{name} is {getattr(self, name)}, which nothing reads without one; give "
                    f"config.constraint.at_least, or leave it at {default}"
                )


def rewards_of(reward_from: str) -> list[str]:
    """The rewards that ``--reward_from`` names: its runs, ``<run>:<objective>`` for each head of one with several."""
    return [
        name
        for run in runs_of(reward_from, flag="reward_from")
        for name in [f"{run}:{objective}" for objective in objectives_of(run)] or [run]
    ]


def check(config: Any, names: Sequence[str]) -> None:
    """Refuses rewards that nothing combines, and a combination without the rewards for it.

    ``config``: a stage's; ``reward``, ``scoring``, ``constraint`` and ``answer_weight`` are read. ``names``: of
    `rewards_of`.

    Raises:
      InputError: names the option.
    """
    weights, constraint, number = config.scoring.weights, config.constraint.at_least, len(names)
    if weights and constraint is not None:
        raise InputError(
            "config.scoring.weights and config.constraint.at_least are both given: under a constraint the multiplier "
            "is the weight; leave one of them out"
        )
    combined = "scoring.weights" if weights else "constraint.at_least"
    if (weights or constraint is not None) and (config.reward != "model" or number < 2):
        raise InputError(
            f"config.{combined} is given, which needs several rewards, and config.reward={config.reward} has "
            f"{number if config.reward == 'model' else 'none of them'}; give --reward_from=<run>,<run>, or a run with "
            "several objectives, and config.reward=model, or leave it out"
        )
    if number < 2:
        return
    if config.reward != "model":
        raise InputError(
            f"--reward_from names {number} rewards, and config.reward={config.reward} takes one; give one of them"
        )
    if config.answer_weight:
        raise InputError(
            f"config.answer_weight is {config.answer_weight}, and --reward_from names {number} rewards: answers are "
            "added to one; give 0, or one reward"
        )
    if constraint is not None and number != 2:
        raise InputError(
            f"config.constraint.at_least is {constraint}, which binds the second of two rewards, and --reward_from "
            f"names {number} ({', '.join(names)}); give two, or config.scoring.weights"
        )
    if constraint is None and len(weights) != number:
        raise InputError(
            f"config.scoring.weights has {len(weights)} numbers, and --reward_from names {number} rewards "
            f"({', '.join(names)}); give one weight a reward, or config.constraint.at_least for two"
        )


def combined(config: Any, each: RowReward, run: Run, model: Model, held_out: batches.Encoded) -> Combine:
    """``combine(scores [K, B], multiplier) -> [B]`` float32, as ``config.scoring`` or ``config.constraint`` says.

    Args:
      config: the stage's; see `check`.
      each: the scores of all K reward models, [K, B].
      run: gives mesh and key.
      model: the initial policy; under a weighted sum it answers ``held_out``, and the mean and the standard deviation
        of each reward over what it says are its zero and its unit. A resumed run samples the same anew.
      held_out: prompts.

    Raises:
      InputError: a reward model that gives all of those responses the same score.
    """
    at_least = config.constraint.at_least
    if at_least is not None:
        return lambda scores, multiplier: objectives.lagrangian_reward(
            scores[0], scores[1], multiplier, at_least=at_least
        )
    scores = _of_initial_policy(config, each, run, model, held_out)
    zero, unit = scores.mean(axis=1), scores.std(axis=1)
    if not (unit > 0).all():
        number = int(np.argmin(unit > 0)) + 1
        raise InputError(
            f"reward {number} of --reward_from gives each of {scores.shape[1]} responses of the initial policy "
            f"the same score ({zero[number - 1]:g}), or none that is finite, which no weight can scale; leave it out"
        )
    zero, unit, weights = (jnp.asarray(x, jnp.float32) for x in (zero, unit, config.scoring.weights))
    return lambda scores, multiplier: objectives.weighted_sum(
        (scores - zero[:, None]) / unit[:, None], weights
    )


def _of_initial_policy(
    config: Any, each: RowReward, run: Run, model: Model, held_out: batches.Encoded
) -> np.ndarray:
    """The scores [K, N] float64 of one response of the initial policy to each of N held-out prompts."""
    rollout, key = make_rollout(run, model, config.sampling), run.key(config.seed, Purpose.SCALE)
    params, within_mesh = {"decoder": model.params["decoder"]}, sharding.within(run.mesh, each)
    said = answers(rollout, params, held_out, key, batch_size=config.batch_size)
    parts = [hosts.fetch(within_mesh(part, rows))[:, real] for part, rows, real in said]
    return np.concatenate(parts, axis=1).astype(np.float64)


def next_multiplier(constraint: Constraint) -> Callable[[jax.Array, jax.Array], jax.Array] | None:
    """``next(multiplier, mean of the second reward) -> multiplier``, both [] float32; None without a constraint."""
    if constraint.at_least is None:
        return None
    how = {"at_least": constraint.at_least, "rate": constraint.rate, "limit": constraint.limit}
    return functools.partial(_ascend, **how)


def _ascend(multiplier: jax.Array, mean: jax.Array, **how: float) -> jax.Array:
    return objectives.dual_ascent(multiplier, jnp.reshape(mean, (1,)), **how)
