"""The objectives of the reward-model stage: pairs, whole rankings, and what holds length back. Imports all below.

Which formula each is, and from which paper: ``rlhf_jax.losses``. A pair is a ranking of two: every objective sees
rewards [N, K] of N prompts with up to K responses each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from rlhf_jax import losses, masking
from rlhf_jax.losses import bradley_terry_loss
from rlhf_jax.masking import WeightedSum
from rlhf_jax.metrics import Total, mean_of
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.rewards import reward_model
from rlhf_jax.training.forward import concatenate_pairs
from rlhf_jax.types import PreferenceBatch, RankingBatch

Kind = Literal["pairs", "all_pairs", "plackett_luce"]
Comparisons = PreferenceBatch | RankingBatch


def rewards_and_lengths(
    model: ModelConfig, params: Any, batch: Comparisons
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of every response its reward, its tokens, and whether there is one: [N, K] float32, float32 and bool.

    The chosen response of a pair comes first.
    """
    if isinstance(batch, PreferenceBatch):
        rows = concatenate_pairs(batch.chosen, batch.rejected)
        per_prompt = lambda x: x.reshape(2, -1).T  # noqa: E731
        mask = jnp.ones((batch.chosen.tokens.shape[0], 2), bool)
    else:
        rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch.responses)
        per_prompt = lambda x: x.reshape(batch.mask.shape)  # noqa: E731
        mask = batch.mask
    lengths = rows.response_mask.sum(axis=1).astype(jnp.float32)
    return per_prompt(reward_model.score(model, params, rows)), per_prompt(lengths), mask


def make_objective(
    model: ModelConfig,
    *,
    kind: Kind = "pairs",
    margin: float = 0.0,
    label_smoothing: float = 0.0,
    centering: float = 0.0,
    length_penalty: float = 0.0,
):
    """(params, frozen, batch) -> the mean loss over prompts, and metrics.

    Args:
      model: its shape.
      kind: "pairs", of a PreferenceBatch; "all_pairs" or "plackett_luce", of a RankingBatch.
      margin, label_smoothing, centering: of "pairs"; see ``losses.bradley_terry_loss``.
      length_penalty: what the squared correlation of rewards with lengths is multiplied by; where it is not 0, a batch
        is what `make_length_moments` makes of it.
    """

    def objective(params: Any, frozen: Any, batch: Any):
        del frozen
        batch, moments = batch if length_penalty else (batch, None)
        rewards, lengths, mask = rewards_and_lengths(model, params, batch)
        if kind == "pairs":
            how = {"margin": margin, "label_smoothing": label_smoothing, "centering": centering}
            term, metrics = _of_pairs(rewards, batch.probability, how)
            terms = {"bradley_terry": term}
            tokens = batch.chosen.token_mask.sum() + batch.rejected.token_mask.sum()
        else:
            term, metrics = _of_rankings(rewards, batch, kind)
            terms = {kind: term}
            tokens = (batch.responses.token_mask & mask[..., None]).sum()
        if length_penalty:
            # The mean over prompts, as the moments are.
            squares = losses.length_penalty_loss(rewards, lengths, mask, *moments.T)
            terms["length"] = mean_of(length_penalty * squares)
        return terms, metrics | {"tokens": Total(tokens.astype(jnp.float32))}

    return objective


def make_heads_objective(model: ModelConfig, objectives: Sequence[str], **how: float):
    """`make_objective` of "pairs" for a head on one trunk for each of K objectives, each with labels of its own.

    The loss is the sum over objectives of each one's mean over the pairs that it judged. Metrics: ``accuracy_<name>``,
    of pairs with a decided label, and ``margin_<name>``, of the reward on the side of the label.

    Args:
      model: its shape.
      objectives: their names, in the order of the heads and of the columns of a batch's ``probability``.
      how: margin, label_smoothing, centering; see ``losses.bradley_terry_loss``.
    """

    def objective(params: Any, frozen: Any, batch: PreferenceBatch):
        del frozen
        rows = concatenate_pairs(batch.chosen, batch.rejected)
        chosen, rejected = jnp.split(reward_model.score_by_objectives(model, params, rows), 2, axis=1)
        terms, metrics = {}, {}
        for place, name in enumerate(objectives):
            probability, judged = batch.probability[:, place], batch.judged[:, place]
            values = _cross_entropy(chosen[place], rejected[place], probability, how)
            terms[name] = masking.token_mean(values[:, None], judged[:, None])
            side = jnp.sign(probability - 0.5)
            margins, decided = side * (chosen[place] - rejected[place]), judged & (side != 0)
            of_decided = decided[:, None]
            metrics[f"accuracy_{name}"] = masking.token_mean(
                (margins > 0).astype(jnp.float32)[:, None], of_decided
            )
            metrics[f"margin_{name}"] = masking.token_mean(margins[:, None], of_decided)
        tokens = batch.chosen.token_mask.sum() + batch.rejected.token_mask.sum()
        return terms, metrics | {"tokens": Total(tokens.astype(jnp.float32))}

    return objective


def _of_pairs(
    rewards: jax.Array, probability: jax.Array | None, how: dict[str, float]
) -> tuple[WeightedSum, dict[str, Any]]:
    chosen, rejected = rewards.T
    values = _cross_entropy(chosen, rejected, probability, how)
    metrics = {"accuracy": mean_of(chosen > rejected), "margin": mean_of(chosen - rejected)}
    return mean_of(values), metrics


def _cross_entropy(
    chosen: jax.Array, rejected: jax.Array, probability: jax.Array | None, how: dict[str, float]
) -> jax.Array:
    """The Bradley-Terry loss [B], to a soft label where there is one."""
    values = bradley_terry_loss(chosen, rejected, **how)
    if probability is None:
        return values
    # The cross-entropy to a soft label is the mean over which of the two was preferred.
    return probability * values + (1.0 - probability) * bradley_terry_loss(rejected, chosen, **how)


def _of_rankings(rewards: jax.Array, batch: RankingBatch, kind: Kind) -> tuple[WeightedSum, dict[str, Any]]:
    """The mean over prompts that have responses of different ranks; metrics weigh each pair the same."""
    ranks, mask = batch.ranks, batch.mask
    is_pair = mask[:, :, None] & mask[:, None, :] & (ranks[:, :, None] < ranks[:, None, :])
    is_pair = is_pair.reshape(len(ranks), -1)
    margins = (rewards[:, :, None] - rewards[:, None, :]).reshape(is_pair.shape)
    if kind == "all_pairs":
        values = losses.pairwise_ranking_loss(rewards, ranks, mask, batch.probability)
    else:
        values = losses.plackett_luce_loss(rewards, ranks, mask)
    ranked = jnp.any(is_pair, axis=1)
    term = WeightedSum(jnp.where(ranked, values, 0.0).sum(), ranked.sum().astype(jnp.float32))
    metrics = {
        "accuracy": masking.token_mean((margins > 0).astype(jnp.float32), is_pair),
        "margin": masking.token_mean(margins, is_pair),
    }
    return term, metrics


def make_ensemble_objective(model: ModelConfig, members: int, **how: Any):
    """`make_objective` of every member on its own prompts: row i of a batch belongs to member i modulo ``members``.

    Any run of rows that ``members`` divides, as a device or a micro-batch has, holds as many prompts of each.
    """
    of_one = make_objective(model, **how)

    def objective(params: Any, frozen: Any, batch: Any):
        terms, metrics = jax.vmap(lambda member, own: of_one(member, frozen, own))(
            params, _of_members(batch, members)
        )
        # Totals and weights add up: the mean over members, whose gradient is a multiple of each member's own.
        return jax.tree.map(jnp.sum, (terms, metrics))

    return objective


def make_length_moments(model: ModelConfig, members: int = 1):
    """``attach(params, frozen, batch) -> (batch, moments)``: what a correlation needs to know of a whole batch.

    moments: [N, 3] float32, in each row the mean over the batch's prompts of `losses.length_moments`, under the
    parameters before the update; of an ensemble the mean over the prompts of the row's own member. A correlation is no
    sum over rows, so that neither a micro-batch nor a device could find it by itself.
    """

    def mean_moments(params: Any, batch: Comparisons) -> jax.Array:
        return losses.length_moments(*rewards_and_lengths(model, params, batch)).mean(axis=0)

    def attach(params: Any, frozen: Any, batch: Comparisons) -> tuple[Comparisons, jax.Array]:
        del frozen
        rows = jax.tree.leaves(batch)[0].shape[0]
        if members == 1:
            return batch, jnp.tile(mean_moments(params, batch)[None], (rows, 1))
        of_each = jax.vmap(mean_moments)(params, _of_members(batch, members))
        return batch, jnp.tile(of_each, (rows // members, 1))

    return attach


def _of_members(batch: Any, members: int) -> Any:
    """Arrays [N, ...] as [members, N / members, ...]."""
    return jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, members, *x.shape[1:]), 0, 1), batch)
