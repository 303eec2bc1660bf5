"""GRPO and its relatives: policy gradients with a group of responses as baseline. A stage; imports all below.

One iteration: sample a group of responses to each prompt; score them with a verifier or a frozen reward model; the
advantage of a response is what it scored beyond its group (Shao et al. 2024, section 4.1.2; Ahmadian et al. 2024);
update on the clipped surrogate. No value model. The KL to the SFT policy is charged in the reward or in the loss.
Which fields make which method: ``Config``.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any, Literal

import jax
import jax.numpy as jnp

from rlhf_jax import losses, masking
from rlhf_jax.errors import InputError, check_range
from rlhf_jax.masking import WeightedSum
from rlhf_jax.metrics import mean_over_rows
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.rewards import process, reward_model
from rlhf_jax.sampling.generate import SamplingConfig
from rlhf_jax.stages import adapters, evaluations, inputs, judged_rewards, online, rewards, several_rewards
from rlhf_jax.training.forward import response_log_probs
from rlhf_jax.training.interrupt import StopRequest
from rlhf_jax.training.loop import Schedule
from rlhf_jax.training.optimizer import OptimizerConfig
from rlhf_jax.types import PolicyBatch, ScoredRollout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run; ``schedule`` counts iterations (one batch of rollouts each).

    batch_size: rollouts an iteration, ``group_size`` to a prompt. num_epochs, num_minibatches: passes over them,
    and updates a pass. num_microbatches: parts of one update, for memory. reward: what is optimised: "model",
    a reward model, or "process", one of steps (``--reward_from``), or "answer", 1 where the response's final
    number is the prompt's answer and 0 elsewhere, or "sentiment", how happy it sounds (``rewards.sentiment``),
    or "judge", what a judge says. scoring: how the scores of an ensemble, of steps, or of several reward models
    (``--reward_from=<run>,<run>``) become one. constraint: of two reward models the first is maximised while the
    second is kept up. judge: whoever judges. answer_weight: so many times what "answer" gives are added to the
    reward of a model or a process, at the last step where steps get credit; 0: none. credit: who gets it: the whole
    "response", or each "step" of a process reward model, and what was written before its end. baseline: what a
    reward is held against: the mean of its group, of the others of its group, or of the batch. scale_advantages:
    whether they are divided by the standard deviation (of the group, or of the batch). ratio: one importance
    ratio a token, or one a sequence. clip_low, clip_high: it stays in [1 - low, 1 + high]. reduction: how token
    losses become one number; see ``masking``. beta: KL penalty per nat. kl_in: where it is charged: "reward",
    the k1 estimate of the whole response before the baseline; "loss", k3 a token (its gradient is the forward
    KL's), or "loss_k2", k2 a token (its gradient is the reverse KL's). missing_eos_score: replaces the reward
    of a response that never ended; None keeps it. early_stop_kl: an iteration's updates end once KL(old || new)
    per token exceeds it; 0 never. rounds: up to so many times the prompts are sampled until every group has a
    spread (DAPO); 1 takes groups as they come. temperature: of sampling, and of every log-prob. stop_when: what
    ends the run before its schedule. lora: whether the policy is an adapter on the reference. slots: rows of the
    cache that samples are drawn through, so that none waits for the longest; 0: one a response
    (``rollouts.make_rollout``). num_eval_prompts: held-out prompts sampled at every evaluation;
    eval_responses_per_prompt: responses to each.

    GRPO is the default. RLOO: baseline "leave_one_out", scale_advantages False, kl_in "reward", reduction
    "sequence_mean_of_token_sums". REINFORCE: the same with baseline "batch". Dr. GRPO: scale_advantages False,
    reduction "fixed_length_mean". DAPO: clip_high 0.28, reduction "token_mean", rounds above 1, beta 0. GSPO: ratio
    "sequence", clip_low 3e-4, clip_high 4e-4.
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
    credit: Literal["response", "step"] = "response"
    baseline: Literal["group", "leave_one_out", "batch"] = "group"
    scale_advantages: bool = True
    ratio: Literal["token", "sequence"] = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    reduction: Literal[
        "token_mean", "sequence_mean_of_token_means", "sequence_mean_of_token_sums", "fixed_length_mean"
    ] = "sequence_mean_of_token_means"
    beta: float = 0.04
    kl_in: Literal["loss", "loss_k2", "reward"] = "loss"
    missing_eos_score: float | None = None
    early_stop_kl: float = 0.0
    rounds: int = 1
    temperature: float = 1.0
    stop_when: evaluations.StopWhen = dataclasses.field(default_factory=evaluations.StopWhen)
    lora: adapters.LoraOptions = dataclasses.field(default_factory=adapters.LoraOptions)
    slots: int = 0
    num_eval_prompts: int = 256
    eval_responses_per_prompt: int = 1

    def __post_init__(self) -> None:
        counts = ("batch_size", "num_epochs", "num_minibatches", "num_microbatches", "num_eval_prompts")
        check_range(self, "slots", at_least=0)
        check_range(self, *counts, "eval_responses_per_prompt", "rounds", "group_size", at_least=1)
        check_range(self, "beta", "early_stop_kl", "clip_high", at_least=0)
        check_range(self, "clip_low", at_least=0, at_most=1)
        if self.group_size == 1 and self.baseline != "batch":
            raise InputError(
                "config.group_size is 1: a group of one is its own baseline and teaches nothing; "
                "give 2 or more, or baseline=batch"
            )
        if self.baseline == "leave_one_out" and self.scale_advantages:
            raise InputError(
                "config.scale_advantages is True, which baseline=leave_one_out does not do; give False"
            )
        if self.credit == "step":
            needed = {"reward": "process", "baseline": "group", "missing_eos_score": None}
            for name, value in needed.items():
                if getattr(self, name) != value:
                    raise InputError(
                        f"config.{name} is {getattr(self, name)!r}, with which credit=step does not go; give {value!r}"
                    )
            if self.kl_in == "reward" and self.beta:
                raise InputError(
                    "config.kl_in is 'reward', with which credit=step does not go; give 'loss' or 'loss_k2', or beta=0"
                )

    @property
    def sampling(self) -> SamplingConfig:
        return SamplingConfig(max_new_tokens=self.data.response_length, temperature=self.temperature)


def advantages_of(rewards: jax.Array, config: Config, judged: jax.Array | bool = True) -> jax.Array:
    """[N, G] rewards -> [N, G] advantages, by ``config.baseline`` and ``config.scale_advantages``.

    judged: [N, G] bool, those that have a reward; a group has all of them or none.
    """
    if config.baseline == "group":
        return losses.group_relative_advantages(rewards, scale=config.scale_advantages)
    if config.baseline == "leave_one_out":
        return losses.leave_one_out_advantages(rewards)
    judged = jnp.broadcast_to(judged, rewards.shape)
    if config.scale_advantages:
        return masking.masked_whiten(rewards, judged)
    return rewards - masking.masked_mean(rewards, judged)


def reduce(x: jax.Array, mask: jax.Array, config: Config) -> WeightedSum:
    """[B, R] token losses to one total and its weight, by ``config.reduction``."""
    if config.reduction == "fixed_length_mean":
        return masking.fixed_length_mean(x, mask, length=config.data.response_length)
    reductions = {
        "token_mean": masking.token_mean,
        "sequence_mean_of_token_means": masking.sequence_mean_of_token_means,
        "sequence_mean_of_token_sums": masking.sequence_mean_of_token_sums,
    }
    return reductions[config.reduction](x, mask)


def make_objective(model: ModelConfig, config: Config):
    """(policy params, {}, PolicyBatch) -> clipped surrogate, KL term where the loss has one, and metrics."""
    surrogate_of = {
        "token": losses.clipped_surrogate_loss,
        # With an advantage a token this is GSPO-token, whose gradient equals GSPO's where they are all the same.
        "sequence": losses.sequence_clipped_surrogate_loss,
    }[config.ratio]
    clips = {"clip_low": config.clip_low, "clip_high": config.clip_high}

    def objective(params: Any, frozen: Any, batch: PolicyBatch):
        del frozen
        mask = batch.response_mask
        log_probs, entropy = response_log_probs(model, params, batch, temperature=config.temperature)
        masks = (mask,) if config.ratio == "sequence" else ()
        surrogate = surrogate_of(log_probs, batch.old_log_probs, batch.advantages, *masks, **clips)
        terms = {"policy": reduce(surrogate, mask, config)}
        if batch.ref_log_probs is not None:
            estimator = losses.kl_k3 if config.kl_in == "loss" else losses.kl_k2
            kl = reduce(estimator(log_probs, batch.ref_log_probs), mask, config)
            terms["kl"] = WeightedSum(config.beta * kl.total, kl.weight)
        log_ratio = jnp.where(mask, log_probs - batch.old_log_probs, 0.0)
        if config.ratio == "sequence":
            log_ratio = masking.masked_mean(log_ratio, mask, axis=1)[:, None]
        ratio = jnp.broadcast_to(jnp.exp(log_ratio), mask.shape)
        clipped = (ratio < 1.0 - config.clip_low) | (ratio > 1.0 + config.clip_high)
        metrics = {
            "entropy": masking.token_mean(entropy, mask),
            "clip_fraction": masking.token_mean(clipped.astype(jnp.float32), mask),
            # Samples come from the old policy: k3 of the reversed ratio estimates KL(old || new) (Schulman 2020).
            "approx_kl": masking.token_mean(losses.kl_k3(batch.old_log_probs, log_probs), mask),
        }
        return terms, metrics

    return objective


def make_prepare(model: ModelConfig, config: Config):
    """``prepare(params, reference, scored, beta) -> (PolicyBatch, metrics)``: everything an update holds constant.

    ``scored``: a ScoredRollout whose rows are groups one after another. Baselines are over the whole batch of rollouts.
    """

    def prepare(params: Any, reference: Any, scored: ScoredRollout, beta: jax.Array):
        rollout = scored.rollout
        mask = rollout.response_mask
        log_probs, _ = response_log_probs(model, params, rollout, temperature=config.temperature)
        ref_log_probs, _ = response_log_probs(model, reference, rollout, temperature=config.temperature)
        scores = reward_model.replace_unfinished(scored.scores, rollout.terminated, config.missing_eos_score)
        kl = masking.masked_sum(losses.kl_k1(log_probs, ref_log_probs), mask, axis=1)
        rewards = scores - beta * kl if config.kl_in == "reward" else scores
        if config.credit == "step":
            advantages = process.group_step_advantages(
                scored.step_scores,
                scored.step_mask,
                mask,
                group_size=config.group_size,
                scale=config.scale_advantages,
            )
        else:
            judged = mask.any(axis=1).reshape(-1, config.group_size)
            advantages = advantages_of(rewards.reshape(-1, config.group_size), config, judged)
            advantages = advantages.reshape(-1, 1)
        batch = PolicyBatch(
            tokens=rollout.tokens,
            token_mask=rollout.token_mask,
            response_mask=mask,
            old_log_probs=log_probs,
            advantages=jnp.where(mask, advantages, 0.0),
            ref_log_probs=ref_log_probs if config.beta and config.kl_in != "reward" else None,
        )
        groups = scores.reshape(-1, config.group_size)
        judged_groups = mask.any(axis=1).reshape(-1, config.group_size)
        metrics = {
            "score": mean_over_rows(scores, mask),
            "kl": mean_over_rows(kl, mask),
            "group_std": mean_over_rows(jnp.std(groups, axis=1), judged_groups),
            "no_spread": mean_over_rows(jnp.all(groups == groups[:, :1], axis=1), judged_groups),
            "sampler_gap": online.sampler_gap(rollout, log_probs),
        }
        return batch, metrics

    return prepare


def make_method(model: ModelConfig, config: Config) -> online.Method:
    """GRPO as ``online`` runs it."""
    return online.Method(
        prepare=make_prepare(model, config),
        objective=make_objective(model, config),
        group_size=config.group_size,
        rounds=config.rounds,
        missing_eos_score=config.missing_eos_score,
        beta=config.beta,
        early_stop_kl=config.early_stop_kl,
        by_steps=config.credit == "step",
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
    online.run("grpo", config, workdir, make_method, **where, parallelism=parallelism, mesh=mesh, stop=stop)
