"""Several rewards as one: by fixed weights, or one maximised while another is kept up; imports jax and checks only.

Shapes: K rewards, B rows. Scores of different origin are brought to one scale before they are added.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax.losses import checks


def weighted_sum(scores: jax.typing.ArrayLike, weights: jax.typing.ArrayLike) -> jax.Array:
    """sum_k w_k r_k: [K, B] float, [K] float -> [B] float32. A weight of 0 takes its reward out, whatever it is."""
    scores = checks.floating("scores", scores, "K B")
    weights = checks.floating("weights", weights, "K")
    checks.rows("weights", weights, ("scores", scores))
    return jnp.sum(jnp.where(weights[:, None] == 0, 0.0, weights[:, None] * scores), axis=0)


def lagrangian_reward(
    maximised: jax.typing.ArrayLike,
    constrained: jax.typing.ArrayLike,
    multiplier: float | jax.Array,
    *,
    at_least: float | jax.Array,
) -> jax.Array:
    """(r + lambda (s - c)) / (1 + lambda), [B], [B] -> [B] float32: what the policy maximises at one multiplier.

    The Lagrangian of: maximise the mean of ``maximised`` (helpfulness) subject to a mean of ``constrained``
    (harmlessness) of ``at_least``: Dai et al. (2024, Safe RLHF), whose cost is c - s, divided as theirs is by
    1 + lambda, which keeps the scale of the reward as the multiplier grows. The division changes
    no optimum by itself; beside a KL penalty it acts as a penalty (1 + lambda) times as large.

    Args:
      maximised: [B] float, r.
      constrained: [B] float, s.
      multiplier: lambda, 0 or above; `dual_ascent` moves it. Held constant.
      at_least: c, in the unit of s.
    """
    maximised = checks.floating("maximised", maximised, "B")
    constrained = checks.floating("constrained", constrained, like=("maximised", maximised))
    checks.non_negative("multiplier", multiplier)
    multiplier = jax.lax.stop_gradient(jnp.asarray(multiplier, jnp.float32))
    return (maximised + multiplier * (constrained - at_least)) / (1.0 + multiplier)


def dual_ascent(
    multiplier: float | jax.Array,
    constrained: jax.typing.ArrayLike,
    *,
    at_least: float | jax.Array,
    rate: float,
    limit: float,
) -> jax.Array:
    """The next multiplier: lambda + rate (c - mean(s)), kept within [0, limit]; [] float32.

    Projected gradient ascent on the dual (Boyd & Vandenberghe 2004, section 5.2; for policies Tessler et al. 2019). It
    grows while the constraint is broken and falls to 0 where it does not bind. Dai et al. (2024, equation 31) step in
    log lambda, which cannot reach 0.

    Args:
      multiplier: lambda, 0 or above.
      constrained: [B] float, s of responses of the present policy.
      at_least: c.
      rate: above 0, multiplier per unit of s; slower than the policy, whose answer to the last multiplier it judges.
      limit: above 0, where a constraint that cannot be met stops pushing.
    """
    constrained = checks.floating("constrained", constrained, "B")
    checks.non_negative("multiplier", multiplier)
    checks.positive("rate", rate)
    checks.positive("limit", limit)
    shortfall = at_least - jax.lax.stop_gradient(jnp.mean(constrained))
    return jnp.clip(jnp.asarray(multiplier, jnp.float32) + rate * shortfall, 0.0, limit)
