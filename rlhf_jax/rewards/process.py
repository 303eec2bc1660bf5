"""Scores of the steps of a solution: as one score for the whole, and as rewards at tokens; imports jax and checks only.

Shapes: B rows, S steps at most, R response columns. A step score is the probability that the step is right, or any
float where the product is not taken. Everything can be jitted.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax.losses import checks


def minimum_over_steps(step_scores: jax.typing.ArrayLike, step_mask: jax.typing.ArrayLike) -> jax.Array:
    """A solution is as good as its worst step: [B, S], [B, S] bool -> [B] float32; 0 where there is no step.

    Lightman et al. (2023) compare it with the product; Wang et al. (2024, Math-Shepherd) rank solutions by it.
    """
    scores, mask = _checked(step_scores, step_mask)
    smallest = jnp.min(jnp.where(mask, scores, jnp.inf), axis=1)
    return jnp.where(jnp.any(mask, axis=1), smallest, 0.0)


def product_over_steps(step_scores: jax.typing.ArrayLike, step_mask: jax.typing.ArrayLike) -> jax.Array:
    """The probability that every step is right, were they independent: [B, S] -> [B] float32; 0 without a step.

    Lightman et al. (2023). It falls with every further step, right or not.
    """
    scores, mask = _checked(step_scores, step_mask)
    return jnp.where(jnp.any(mask, axis=1), jnp.prod(jnp.where(mask, scores, 1.0), axis=1), 0.0)


def last_step(step_scores: jax.typing.ArrayLike, step_mask: jax.typing.ArrayLike) -> jax.Array:
    """The score of the last step alone, which has seen all others: [B, S] -> [B] float32; 0 without a step.

    Snell et al. (2024) find it better than the minimum and the product where steps are labelled by how
    often their continuations were right.
    """
    scores, mask = _checked(step_scores, step_mask)
    last = scores.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    return jnp.where(jnp.any(mask, axis=1), jnp.take_along_axis(scores, last[:, None], axis=1)[:, 0], 0.0)


def step_gains(step_scores: jax.typing.ArrayLike, step_mask: jax.typing.ArrayLike) -> jax.Array:
    """What each step added: its score less that of the step before it (0 for the first), [B, S] float32, 0 off-mask.

    The gains of a row sum to `last_step`, so that a policy earns nothing by adding steps, as it does with the scores
    themselves: potential-based shaping (Ng, Harada & Russell 1999); without discount it leaves the optimum of the last
    score where it is.
    """
    scores, mask = _checked(step_scores, step_mask)

    def forward(before: jax.Array, step: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        score, here = step
        return jnp.where(here, score, before), jnp.where(here, score - before, 0.0)

    _, gains = jax.lax.scan(forward, jnp.zeros(scores.shape[0], scores.dtype), (scores.T, mask.T))
    return gains.T


def token_rewards(
    step_scores: jax.typing.ArrayLike,
    step_mask: jax.typing.ArrayLike,
    step_ends: jax.typing.ArrayLike,
    response_mask: jax.typing.ArrayLike,
) -> jax.Array:
    """Dense rewards: the score of each step at the token that ends it, [B, R] float32, 0 elsewhere.

    Add them to the KL rewards of ``losses.kl_penalized_rewards`` before advantages are taken.

    Args:
      step_scores: [B, S] float, scores or `step_gains`.
      step_mask: [B, S] bool, True where there is a step.
      step_ends: [B, S] int, the response column of the last token of each step. One outside of the response, cut off
        for example, rewards nothing. Steps that end at one column add up.
      response_mask: [B, R] bool.
    """
    scores, mask = _checked(step_scores, step_mask)
    ends = checks.integral("step_ends", step_ends, shape=scores.shape)
    response = jnp.asarray(response_mask)
    checks.rows("response_mask", response, ("step_scores", scores))
    width = response.shape[1]
    # A negative index would count from the end.
    ends = jnp.where(mask & (ends >= 0), ends, width)
    rows = jnp.arange(scores.shape[0])[:, None]
    placed = (
        jnp.zeros(response.shape, jnp.float32).at[rows, ends].add(jnp.where(mask, scores, 0.0), mode="drop")
    )
    return jnp.where(response, placed, 0.0)


def group_step_advantages(
    step_scores: jax.typing.ArrayLike,
    step_mask: jax.typing.ArrayLike,
    response_mask: jax.typing.ArrayLike,
    *,
    group_size: int,
    scale: bool = True,
    epsilon: float = 1e-4,
) -> jax.Array:
    """Credit by steps without a critic: how much better than its group's steps are those still to end, [B, R] float32.

    Step scores are centred on the mean over all steps of the group, and divided by their standard deviation (over the
    number of steps) + epsilon; a token's advantage is the sum over the steps that end at it or later: Shao et al.
    (2024), section 4.1.3. 0 off ``response_mask``, and after the last step. Nothing is differentiable.

    Args:
      step_scores: [B, R] float, at the column of the token that ends a step. Rows are groups one after another.
      step_mask: [B, R] bool, where steps end.
      response_mask: [B, R] bool.
      group_size: responses a prompt.
      scale: whether to divide.
      epsilon: keeps the quotient finite where all scores of a group are equal.
    """
    scores, mask = _checked(step_scores, step_mask)
    response = checks.boolean("response_mask", response_mask, ("step_scores", scores))
    groups, here = (x.reshape(-1, group_size * scores.shape[1]) for x in (scores, mask))
    steps = jnp.maximum(jnp.sum(here, axis=1, keepdims=True), 1)
    centred = jnp.where(
        here, groups - jnp.sum(jnp.where(here, groups, 0.0), axis=1, keepdims=True) / steps, 0.0
    )
    if scale:
        centred /= jnp.sqrt(jnp.sum(centred**2, axis=1, keepdims=True) / steps) + epsilon
    centred = centred.reshape(scores.shape)
    to_come = jnp.cumsum(centred[:, ::-1], axis=1)[:, ::-1]
    return jax.lax.stop_gradient(jnp.where(response, to_come, 0.0))


def find_step_ends(ends_step: jax.typing.ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Where steps end, from one flag a token: [B, R] bool -> (``step_ends`` [B, R] int32, ``step_mask`` [B, R] bool).

    Step k of a row ends at column ``step_ends[:, k]`` where ``step_mask[:, k]``; the rest is 0. As many steps fit as
    there are tokens, so that none is left out.
    """
    flags = jnp.asarray(ends_step)
    if flags.dtype != jnp.bool_ or flags.ndim != 2:
        raise TypeError(
            f"ends_step must be bool [B, R], got {flags.dtype} {list(flags.shape)}; compare it first"
        )
    order = jnp.argsort(~flags, axis=1, stable=True).astype(jnp.int32)
    mask = jnp.arange(flags.shape[1])[None] < jnp.sum(flags, axis=1, keepdims=True)
    return jnp.where(mask, order, 0), mask


def _checked(
    step_scores: jax.typing.ArrayLike, step_mask: jax.typing.ArrayLike
) -> tuple[jax.Array, jax.Array]:
    scores = checks.floating("step_scores", step_scores, "B S")
    mask = checks.boolean("step_mask", step_mask, ("step_scores", scores))
    return scores, mask
