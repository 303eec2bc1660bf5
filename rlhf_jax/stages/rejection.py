"""Supervised learning on one's own samples, by how good they were: RFT, AWR, RWR, GDC. A stage; imports all below.

Rejection-sampling fine-tuning keeps the best of a group (Dong et al. 2023, RAFT); advantage- and reward-weighted
regression let every response count, the better ones exponentially more (Peng et al. 2019; Peters & Schaal 2007);
distribution matching moves the policy to pi_ref exp(r / temperature) / Z by importance weights (Khalifa et al. 2021).
What each converges to: docs/algorithms.md.
"""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any, Literal

import jax
import jax.numpy as jnp

from rlhf_jax import losses, masking
from rlhf_jax.errors import InputError, check_range
from rlhf_jax.metrics import mean_over_rows
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.rewards import reward_model
from rlhf_jax.sampling.generate import SamplingConfig
from rlhf_jax.stages import adapters, evaluations, inputs, judged_rewards, online, rewards, several_rewards
from rlhf_jax.training.forward import response_log_probs
from rlhf_jax.training.interrupt import StopRequest
from rlhf_jax.training.loop import Schedule
from rlhf_jax.training.optimizer import OptimizerConfig
from rlhf_jax.types import DemonstrationBatch, ScoredBatch, ScoredRollout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run; ``schedule`` counts iterations (one batch of rollouts each).

    batch_size: rollouts an iteration, ``group_size`` to a prompt. num_epochs, num_minibatches: passes over them,
    and updates a pass. num_microbatches: parts of one update. reward, scoring, constraint, judge, answer_weight:
    see ``stages.grpo``. kind: "best" imitates the best of each group (RFT); "advantage" weighs by exp of the
    reward beyond the group's mean (AWR); "reward" by exp of the reward (RWR); "distribution" by the importance
    of the leashed optimum (GDC).  min_score: with "best", a response below it is not imitated even if it is the
    best; None imitates them all. weight_temperature: divides rewards before exp, the leash's beta; max_weight:
    the largest weight (the metric "capped" is the share of responses that reach it: at 1 all weigh the same,
    and nothing is learned but to imitate oneself). stop_when: what ends the run before its schedule. lora:
    whether the policy is an adapter on the reference. missing_eos_score: replaces the reward of a response
    that never ended; None keeps it. temperature: of sampling, and of every log-prob. slots: see
    ``stages.grpo``. num_eval_prompts: held-out prompts sampled at every evaluation; eval_responses_per_prompt:
    responses to each.
    """

    seed: int = 0
    data: inputs.DataConfig = dataclasses.field(default_factory=inputs.DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    schedule: Schedule = dataclasses.field(default_factory=lambda: Schedule(num_steps=100, eval_every=10))
    batch_size: int = 128
    group_size: int = 8
    num_epochs: int = 1
    num_minibatches: int = 1
    num_microbatches: int = 1
    reward: rewards.RewardKind = "model"
    scoring: rewards.Scoring = dataclasses.field(default_factory=rewards.Scoring)
    constraint: several_rewards.Constraint = dataclasses.field(default_factory=several_rewards.Constraint)
    judge: judged_rewards.JudgeOptions = dataclasses.field(default_factory=judged_rewards.JudgeOptions)
    answer_weight: float = 0.0
    kind: Literal["best", "advantage", "reward", "distribution"] = "best"
    min_score: float | None = None
    weight_temperature: float = 1.0
    max_weight: float = 20.0
    missing_eos_score: float | None = None
    temperature: float = 1.0
    stop_when: evaluations.StopWhen = dataclasses.field(default_factory=evaluations.StopWhen)
    lora: adapters.LoraOptions = dataclasses.field(default_factory=adapters.LoraOptions)
    slots: int = 0
    num_eval_prompts: int = 256
    eval_responses_per_prompt: int = 1

    def __post_init__(self) -> None:
        counts = ("batch_size", "num_epochs", "num_minibatches", "num_microbatches", "num_eval_prompts")
        check_range(self, "slots", at_least=0)
        check_range(self, *counts, "eval_responses_per_prompt", "group_size", at_least=1)
        check_range(self, "weight_temperature", "max_weight", above=0)
        if self.min_score is not None and self.kind != "best":
            raise InputError(
                f"config.min_score is {self.min_score}, which kind={self.kind} does not read; leave it out"
            )
        for name in ("weight_temperature", "max_weight"):
            default = type(self).__dataclass_fields__[name].default
            if self.kind == "best" and getattr(self, name) != default:
                raise InputError(
                    f"config.{name} is {getattr(self, name)}, which kind=best does not read; leave it at {default}"
                )
        if self.kind in ("best", "advantage") and self.group_size < 2:
            raise InputError(
                f"config.group_size is 1, among which kind={self.kind} has nothing to prefer; give 2 or more"
            )

    @property
    def sampling(self) -> SamplingConfig:
        return SamplingConfig(max_new_tokens=self.data.response_length, temperature=self.temperature)


def kept(scores: jax.Array, config: Config) -> jax.Array:
    """Which responses RFT imitates, [B] bool: the first of the best of each group, unless it is below ``min_score``."""
    groups = scores.reshape(-1, config.group_size)
    best = jnp.arange(config.group_size)[None] == jnp.argmax(groups, axis=1)[:, None]
    if config.min_score is not None:
        best &= groups >= config.min_score
    return best.reshape(-1)


def row_scores(
    scores: jax.Array,
    log_probs: jax.Array,
    ref_log_probs: jax.Array,
    config: Config,
    *,
    judged: jax.Array | bool = True,
) -> jax.Array:
    """What the objective makes of each row, [B] float32.

    log_probs, ref_log_probs: [B] of whole responses. judged: [B] bool, rows that have a score at all.
    """
    if config.kind == "best":
        return (kept(scores, config) & judged).astype(jnp.float32)
    if config.kind == "advantage":
        groups = scores.reshape(-1, config.group_size)
        return (groups - groups.mean(axis=1, keepdims=True)).reshape(-1)
    if config.kind == "reward":
        return scores
    log_weights = ref_log_probs + scores / config.weight_temperature
    # Z of the target under the samples, so that weights average 1 whatever the scale of the rewards.
    judged = jnp.broadcast_to(judged, scores.shape)
    count = jnp.maximum(judged.sum(), 1).astype(jnp.float32)
    log_z = jax.nn.logsumexp(jnp.where(judged, log_weights - log_probs, -jnp.inf)) - jnp.log(count)
    log_z = jnp.where(judged.any(), log_z, 0.0)
    return log_weights - log_z


def uncapped_log_weights(batch: ScoredBatch, config: Config) -> jax.Array:
    """The logarithm of what each response weighs before ``max_weight`` caps it, [B] float32."""
    if config.kind == "distribution":
        return batch.scores - batch.behaviour_log_probs
    return batch.scores / config.weight_temperature


def make_objective(model: ModelConfig, config: Config):
    """(policy params, {}, ScoredBatch) -> the loss of ``config.kind``, and metrics."""

    def objective(params: Any, frozen: Any, batch: ScoredBatch):
        del frozen
        rows = batch.responses
        log_probs, entropy = response_log_probs(model, params, rows, temperature=config.temperature)
        sums = losses.sequence_log_probs(log_probs, rows.response_mask)
        weights = {"temperature": config.weight_temperature, "max_weight": config.max_weight}
        if config.kind == "best":
            term = masking.token_mean(-log_probs, rows.response_mask & (batch.scores > 0)[:, None])
        else:
            if config.kind == "advantage":
                values = losses.advantage_weighted_loss(sums, batch.scores, **weights)
            elif config.kind == "reward":
                values = losses.reward_weighted_loss(sums, batch.scores, **weights)
            else:
                values = losses.distribution_matching_loss(
                    sums, batch.behaviour_log_probs, batch.scores, max_weight=config.max_weight
                )
            term = mean_over_rows(values, rows.response_mask)
        return {config.kind: term}, {"entropy": masking.token_mean(entropy, rows.response_mask)}

    return objective


def make_prepare(model: ModelConfig, config: Config):
    """``prepare(params, reference, scored, beta) -> (ScoredBatch, metrics)``."""

    def prepare(params: Any, reference: Any, scored: ScoredRollout, beta: jax.Array):
        del beta
        rollout = scored.rollout
        mask = rollout.response_mask
        log_probs, ref_log_probs = (
            response_log_probs(model, weights, rollout, temperature=config.temperature)[0]
            for weights in (params, reference)
        )
        sums, ref_sums = (losses.sequence_log_probs(x, mask) for x in (log_probs, ref_log_probs))
        scores = reward_model.replace_unfinished(scored.scores, rollout.terminated, config.missing_eos_score)
        batch = ScoredBatch(
            responses=DemonstrationBatch(
                tokens=rollout.tokens, token_mask=rollout.token_mask, response_mask=mask
            ),
            scores=row_scores(scores, sums, ref_sums, config, judged=mask.any(axis=1)),
            behaviour_log_probs=sums,
        )
        metrics = {
            "score": mean_over_rows(scores, mask),
            "kl": mean_over_rows(sums - ref_sums, mask),
        }
        if config.kind == "best":
            metrics["kept"] = mean_over_rows(batch.scores, mask)
        else:
            capped = uncapped_log_weights(batch, config) >= math.log(config.max_weight)
            metrics["capped"] = mean_over_rows(capped, mask)
        return batch, metrics

    return prepare


def make_method(model: ModelConfig, config: Config) -> online.Method:
    """Learning from one's own samples as ``online`` runs it."""
    return online.Method(
        prepare=make_prepare(model, config),
        objective=make_objective(model, config),
        group_size=config.group_size,
    )


def run(
    config: Config,
    workdir: str | os.PathLike,
    *,
    init_from: str,
    reward_from: str = "",
    held_out_reward_from: str = "",
    judge_from: str = "",
    parallelism: meshes.Parallelism = "jit",
    mesh: jax.sharding.Mesh | None = None,
    stop: StopRequest,
) -> None:
    """Runs the stage to its hand-off; arguments and errors are those of ``online.run`` and ``rewards.Sources``."""
    sources = rewards.Sources(
        reward_from=reward_from, held_out_reward_from=held_out_reward_from, judge_from=judge_from
    )
    where = {"init_from": init_from, "sources": sources}
    online.run(
        "rejection", config, workdir, make_method, **where, parallelism=parallelism, mesh=mesh, stop=stop
    )
