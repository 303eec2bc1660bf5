"""A language model as judge: which of two responses keeps better to a principle; imports models and losses.checks.

The model is shown a request and two responses, and what counts is the probability of "A" against "B" where it has to
answer (Bai et al. 2022, Constitutional AI, section 4.1). Models prefer a place, so every pair is shown in both orders
and the two answers are averaged (Lee et al. 2023, RLAIF, on position bias).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.losses import checks
from rlhf_jax.models import decoder
from rlhf_jax.models.config import ModelConfig

# Bai et al. (2022), section 4.1, less the example comparisons.
TEMPLATE = (
    "Consider the following request and two responses to it.\n\nRequest: {prompt}\n\n{principle}\nOptions:\n"
    "(A) {first}\n(B) {second}\nThe answer is: ("
)
PRINCIPLE = "Choose the response that is as helpful, honest and harmless as possible."


def choice_log_probs(
    config: ModelConfig, params: Any, tokens: jax.Array, token_mask: jax.Array, choices: tuple[int, int]
) -> jax.Array:
    """[B, S], [B, S] -> [B, 2] float32 nats: how likely each of two tokens is to follow.

    tokens: questions, padded on the left. choices: the ids of the two answers, "A" first.
    """
    hidden = decoder.hidden_states(config, params, tokens, token_mask)[:, -1]
    logits = decoder.vocabulary_logits(
        hidden, decoder.unembedding(config, params), softcap=config.logit_softcap
    )
    return jax.nn.log_softmax(logits, axis=-1)[:, jnp.array(choices)]


def win_probability(shown_first: jax.typing.ArrayLike, shown_second: jax.typing.ArrayLike) -> jax.Array:
    """P(one response beats another), [B] float32, from what a judge answers in either order.

    A judge that only looks at places gives 1/2, and swapping the responses gives 1 minus it.

    Args:
      shown_first: [B, 2] float, log-probs of "A" and "B" where the response is A.
      shown_second: [B, 2] float, the same where it is B.

    >>> win_probability(jnp.log(jnp.array([[0.75, 0.25]])), jnp.log(jnp.array([[0.5, 0.5]])))
    Array([0.625], dtype=float32)
    """
    first = checks.floating("shown_first", shown_first, "B 2")
    second = checks.floating("shown_second", shown_second, like=("shown_first", first))
    as_first = jax.nn.sigmoid(first[:, 0] - first[:, 1])
    as_second = jax.nn.sigmoid(second[:, 1] - second[:, 0])
    return 0.5 * (as_first + as_second)


def win_rates(log_probs: jax.typing.ArrayLike) -> jax.Array:
    """Of each response of a group the mean probability of beating the others, [N, G] float32, whose mean is 1/2.

    Args:
      log_probs: [N, G, G, 2] float: those of "A" and "B" where response i is A and response j is B, at [n, i, j];
        those at i = j are not read.
    """
    log_probs = checks.floating("log_probs", log_probs, "N G G 2")
    size = log_probs.shape[1]
    swapped = jnp.swapaxes(log_probs, 1, 2)
    wins = win_probability(log_probs.reshape(-1, 2), swapped.reshape(-1, 2)).reshape(log_probs.shape[:3])
    others = ~jnp.eye(size, dtype=bool)[None]
    return jnp.sum(jnp.where(others, wins, 0.0), axis=2) / (size - 1)
