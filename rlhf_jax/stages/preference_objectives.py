"""The objectives of the DPO stage and its online form: DPO, IPO, SLiC, SimPO, ORPO, KTO on pairs. Imports all below.

Which formula each is, and from which paper: ``rlhf_jax.losses``. Log-probabilities are summed over a response, except
for SimPO and ORPO, which take the mean a token and need no reference.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from rlhf_jax import losses, masking
from rlhf_jax.errors import InputError, check_range
from rlhf_jax.masking import WeightedSum
from rlhf_jax.metrics import count
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.training.forward import concatenate_pairs, response_log_probs
from rlhf_jax.types import DemonstrationBatch, PreferenceBatch, UnpairedBatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceLoss:
    """Which loss on pairs, and its numbers.

    kind: "dpo"; "robust" (DPO unbiased under flipped labels); "ipo"; "hinge" (SLiC); "simpo"; "orpo" (with the
    likelihood of the chosen response); "kto" (every response by itself, chosen ones desirable). beta: the strength
    of the leash to the reference, per nat; of SimPO the scale, of ORPO the weight of the odds ratio.
    label_smoothing: probability that a label is flipped ("dpo" and "robust"). margin: SimPO's gamma.
    desirable_weight, undesirable_weight: KTO's. temperature: divides the logits; that of sampling, when online.
    """

    kind: Literal["dpo", "robust", "ipo", "hinge", "simpo", "orpo", "kto"] = "dpo"
    beta: float = 0.1
    label_smoothing: float = 0.0
    margin: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_range(self, "beta", "temperature", above=0)
        check_range(self, "label_smoothing", at_least=0, below=0.5)
        check_range(self, "desirable_weight", "undesirable_weight", at_least=0)
        if self.kind == "robust" and not self.label_smoothing:
            raise InputError(
                "label_smoothing is 0, for which kind=robust is kind=dpo; give the rate of flipped labels"
            )
        for name, readers in _READERS.items():
            default = type(self).__dataclass_fields__[name].default
            if self.kind not in readers and getattr(self, name) != default:
                raise InputError(
                    f"{name} is {getattr(self, name)}, which kind={self.kind} does not read; leave it at "
                    f"{default}, or use kind={' or '.join(readers)}"
                )

    @property
    def needs_reference(self) -> bool:
        return self.kind not in ("simpo", "orpo")


# Numbers that not every loss reads.
_READERS = {
    "label_smoothing": ("dpo", "robust"),
    "margin": ("simpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
}


def response_sums(
    model: ModelConfig, params: Any, batch: DemonstrationBatch, loss: PreferenceLoss
) -> tuple[jax.Array, jax.Array]:
    """Summed log-probability of each response and the mean a token, both [B] float32 nats."""
    log_probs, _ = response_log_probs(model, params, batch, temperature=loss.temperature)
    sums = losses.sequence_log_probs(log_probs, batch.response_mask)
    return sums, sums / jnp.maximum(batch.response_mask.sum(axis=1), 1)


def pair_scores(
    model: ModelConfig, params: Any, reference: Any, batch: PreferenceBatch, loss: PreferenceLoss
) -> tuple[jax.Array, jax.Array]:
    """What the loss would have differ between chosen and rejected, [B] each: implicit rewards, or beta times the mean
    log-probability a token where there is no reference."""
    both = concatenate_pairs(batch.chosen, batch.rejected)
    sums, means = response_sums(model, params, both, loss)
    if not loss.needs_reference:
        return tuple(loss.beta * half for half in jnp.split(means, 2))
    ref_sums, _ = response_sums(model, reference, both, loss)
    return tuple(jnp.split(losses.implicit_rewards(sums, ref_sums, beta=loss.beta), 2))


def make_pair_objective(model: ModelConfig, loss: PreferenceLoss):
    """(policy params, {"reference": params}, PreferenceBatch) -> the mean loss over pairs, and metrics; not for KTO.

    A pair without response tokens, which is how a tie is marked, does not count.
    """

    def objective(params: Any, frozen: Any, batch: PreferenceBatch):
        both = concatenate_pairs(batch.chosen, batch.rejected)
        present = jnp.any(batch.chosen.response_mask, axis=1)
        mean = lambda x: WeightedSum(  # noqa: E731
            jnp.where(present, x, 0.0).sum(), present.sum().astype(jnp.float32)
        )
        log_probs, _ = response_log_probs(model, params, both, temperature=loss.temperature)
        sums = losses.sequence_log_probs(log_probs, both.response_mask)
        chosen_mean, rejected_mean = jnp.split(sums / jnp.maximum(both.response_mask.sum(axis=1), 1), 2)
        chosen, rejected = jnp.split(sums, 2)
        terms = {}
        if loss.needs_reference:
            ref_chosen, ref_rejected = jnp.split(response_sums(model, frozen["reference"], both, loss)[0], 2)
            terms[loss.kind] = mean(_with_reference(loss, chosen, rejected, ref_chosen, ref_rejected))
            scores = [
                losses.implicit_rewards(policy, ref, beta=loss.beta)
                for policy, ref in ((chosen, ref_chosen), (rejected, ref_rejected))
            ]
        else:
            scores = [loss.beta * chosen_mean, loss.beta * rejected_mean]
            if loss.kind == "simpo":
                values = losses.simpo_loss(chosen_mean, rejected_mean, beta=loss.beta, margin=loss.margin)
            else:
                values = losses.orpo_loss(chosen_mean, rejected_mean, weight=loss.beta)
                terms["likelihood"] = masking.token_mean(
                    -jnp.split(log_probs, 2)[0], batch.chosen.response_mask
                )
            terms[loss.kind] = mean(values)
        metrics = {
            "accuracy": mean((scores[0] > scores[1]).astype(jnp.float32)),
            "margin": mean(scores[0] - scores[1]),
            "reward_chosen": mean(scores[0]),
            "reward_rejected": mean(scores[1]),
            "tokens": count(both.token_mask),
        }
        return terms, metrics

    return objective


def _with_reference(loss: PreferenceLoss, *sums: jax.Array) -> jax.Array:
    if loss.kind == "dpo":
        return losses.dpo_loss(*sums, beta=loss.beta, label_smoothing=loss.label_smoothing)
    if loss.kind == "robust":
        return losses.robust_dpo_loss(*sums, beta=loss.beta, label_smoothing=loss.label_smoothing)
    if loss.kind == "ipo":
        return losses.ipo_loss(*sums, beta=loss.beta)
    return losses.hinge_loss(*sums, beta=loss.beta)


def make_unpaired_objective(model: ModelConfig, loss: PreferenceLoss):
    """(policy params, {"reference": params}, UnpairedBatch) -> the mean KTO loss over responses, and metrics."""

    def objective(params: Any, frozen: Any, batch: UnpairedBatch):
        rows, good = batch.responses, batch.desirable
        sums, _ = response_sums(model, params, rows, loss)
        ref_sums, _ = response_sums(model, frozen["reference"], rows, loss)
        values = losses.kto_loss(
            sums,
            ref_sums,
            good,
            batch.kl_baseline,
            beta=loss.beta,
            desirable_weight=loss.desirable_weight,
            undesirable_weight=loss.undesirable_weight,
        )
        rewards = losses.implicit_rewards(sums, ref_sums, beta=loss.beta)
        mean = lambda x, which: WeightedSum(  # noqa: E731
            jnp.where(which, x, 0.0).sum(), which.sum().astype(jnp.float32)
        )
        everyone = jnp.ones_like(good)
        metrics = {
            "reward_chosen": mean(rewards, good),
            "reward_rejected": mean(rewards, ~good),
            "kl_baseline": mean(batch.kl_baseline, everyone),
            "tokens": count(rows.token_mask),
        }
        return {"kto": mean(values, everyone)}, metrics

    return objective


def make_unpair(model: ModelConfig, loss: PreferenceLoss):
    """``unpair(params, {"reference"}, PreferenceBatch) -> UnpairedBatch``: both sides of every pair, with a baseline.

    The baseline is the mean log-ratio of the prompts with responses to *other* prompts (each row's next), over the
    whole batch: an estimate of KL(policy || reference) that the loss holds constant (Ethayarajh et al. 2024).
    """

    def unpair(params: Any, frozen: Any, batch: PreferenceBatch) -> UnpairedBatch:
        rows = concatenate_pairs(batch.chosen, batch.rejected)
        width = rows.response_mask.shape[1]
        swap = lambda x: jnp.concatenate([x[:, :-width], jnp.roll(x[:, -width:], -1, axis=0)], axis=1)  # noqa: E731
        mismatched = DemonstrationBatch(
            tokens=swap(rows.tokens),
            token_mask=swap(rows.token_mask),
            response_mask=jnp.roll(rows.response_mask, -1, axis=0),
        )
        sums, _ = response_sums(model, params, mismatched, loss)
        ref_sums, _ = response_sums(model, frozen["reference"], mismatched, loss)
        pairs = batch.chosen.tokens.shape[0]
        return UnpairedBatch(
            responses=rows,
            desirable=jnp.arange(2 * pairs) < pairs,
            kl_baseline=jnp.full((2 * pairs,), jnp.mean(sums - ref_sums)),
        )

    return unpair
