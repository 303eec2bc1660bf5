"""What flows between the rooms of the house: batches and rollouts, as frozen pytrees. Imports jax only.

One layout serves every stage. ``tokens`` is [B, S]; the response (what the loss is about) lives in the *last R
columns*, so ``response_mask`` is [B, R] and everything per response token (log-probs, values, advantages) is
[B, R] too. The hidden state at column ``S - R - 1 + t`` predicts response column ``t``. Prompts are padded on the
left and responses on the right, so that column ``S - R`` is the first response token of every row. A batch without
a fixed boundary (packed demonstrations) takes R = S - 1. Masks are made from lengths, never from token ids.
"""

from __future__ import annotations

import dataclasses

import jax


def _pytree(cls: type) -> type:
    """Makes ``cls`` a frozen, keyword-only dataclass that JAX transformations see through."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True, kw_only=True)(cls))


@_pytree
class DemonstrationBatch:
    """Prompts with one response each.

    tokens: [B, S] int32. token_mask: [B, S] bool, False on padding.
    response_mask: [B, R] bool over the last R columns, True on response tokens, EOS included.
    segment_ids: [B, S] int32 where rows are packed, several demonstrations one after the other: 1 for the tokens of
    the first, 2 for those of the second, 0 on padding. Tokens see their own segment only. None elsewhere.
    """

    tokens: jax.Array
    token_mask: jax.Array
    response_mask: jax.Array
    segment_ids: jax.Array | None = None


@_pytree
class PreferenceBatch:
    """Pairs: row i of ``chosen`` and of ``rejected`` answer the same prompt, and ``chosen`` was preferred.

    probability: [B] float32, how likely it is that ``chosen`` is the better one, where labels are soft; None where
    they are hard. Of K objectives [B, K], and which of them somebody judged: judged, [B, K] bool; else None.
    """

    chosen: DemonstrationBatch
    rejected: DemonstrationBatch
    probability: jax.Array | None = None
    judged: jax.Array | None = None


@_pytree
class RankingBatch:
    """Prompts with up to K ranked responses each; the arrays of ``responses`` are [N, K, ...].

    ranks: [N, K] int32, smaller is better, equal for ties. mask: [N, K] bool, True where there is a response.
    probability: [N, K, K] float32, how likely it is that response i is better than response j, where labels are soft;
    None where they are hard.
    """

    responses: DemonstrationBatch
    ranks: jax.Array
    mask: jax.Array
    probability: jax.Array | None = None


@_pytree
class UnpairedBatch:
    """Responses by themselves, each good or bad.

    desirable: [B] bool. kl_baseline: [B] float32 nats, the same number for every row: what KTO compares with.
    """

    responses: DemonstrationBatch
    desirable: jax.Array
    kl_baseline: jax.Array


@_pytree
class StepsBatch:
    """Solutions whose steps are judged. A step is known by the response column of the token that ends it.

    step_labels: [B, R] float32, P(the step that ends here is right), 0 off-mask. step_mask: [B, R] bool, True where a
    judged step ends.
    """

    responses: DemonstrationBatch
    step_labels: jax.Array
    step_mask: jax.Array


@_pytree
class Rollout:
    """What a policy said, and how likely it found it.

    tokens: [B, P+R] int32. token_mask: [B, P+R] bool. response_mask: [B, R] bool, EOS included.
    log_probs: [B, R] float32 nats under the *behaviour* distribution (temperature and truncation applied), 0 off-mask.
    policy_log_probs: the same under the whole distribution (temperature applied, nothing left out); None in rollouts
    made by other means than sampling.
    terminated: [B] bool: ended by EOS or a stop string; False where the response was cut by length.
    policy_step: [] int32, the optimiser step of the parameters that sampled.
    """

    tokens: jax.Array
    token_mask: jax.Array
    response_mask: jax.Array
    log_probs: jax.Array
    terminated: jax.Array
    policy_step: jax.Array
    policy_log_probs: jax.Array | None = None


@_pytree
class ScoredRollout:
    """A rollout with one reward a row: ``scores`` [B] float32.

    step_scores, step_mask: [B, R] float32 and bool, the reward of each step at the token that ends it, where a method
    gives credit by steps.
    """

    rollout: Rollout
    scores: jax.Array
    step_scores: jax.Array | None = None
    step_mask: jax.Array | None = None


@_pytree
class ScoredBatch:
    """A policy's own responses, to learn from by how good they were; constants of the objective but for the first.

    scores: [B] float32, what a loss makes of a row (whether to keep it, an advantage, a reward, a log target weight).
    behaviour_log_probs: [B] float32 nats, of the whole response under the policy that sampled it.
    """

    responses: DemonstrationBatch
    scores: jax.Array
    behaviour_log_probs: jax.Array


@_pytree
class PolicyBatch:
    """What a policy-gradient update consumes; every array beside the first three is a constant of the objective.

    tokens [B, P+R], token_mask [B, P+R], response_mask [B, R]; old_log_probs, advantages: [B, R] float32, 0 off-mask.
    Of the same shape, where a method has them: old_values, returns (those with a value model), ref_log_probs (those
    with a KL term in the loss).
    """

    tokens: jax.Array
    token_mask: jax.Array
    response_mask: jax.Array
    old_log_probs: jax.Array
    advantages: jax.Array
    old_values: jax.Array | None = None
    returns: jax.Array | None = None
    ref_log_probs: jax.Array | None = None
