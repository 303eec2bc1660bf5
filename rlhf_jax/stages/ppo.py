"""PPO against a reward, on a per-token KL leash to the SFT policy. A stage; imports all below.

One iteration: sample a response to each prompt; score it, most often with a frozen reward model; charge beta * log(pi /
pi_ref) at every token (Ziegler et al. 2019, equation 2); estimate advantages with GAE from a value model; take
a few epochs of clipped-surrogate updates (Schulman et al. 2017, equation 7). Four roles: policy and value are
trained, reference (the SFT policy) and reward are frozen. The value model starts as a copy of the reward model,
where there is one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from typing import Any, Literal

import jax
import jax.numpy as jnp

from rlhf_jax import losses, masking
from rlhf_jax.errors import InputError, check_range
from rlhf_jax.masking import WeightedSum
from rlhf_jax.metrics import mean_of, mean_over_rows
from rlhf_jax.models import heads
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.parallel import sharding
from rlhf_jax.rewards import process, reward_model
from rlhf_jax.sampling.generate import SamplingConfig
from rlhf_jax.stages import (
    adapters,
    evaluations,
    inputs,
    judged_rewards,
    online,
    prompts,
    rewards,
    several_rewards,
)
from rlhf_jax.stages.handoffs import Model, leave_handoff, load_start
from rlhf_jax.stages.run_directory import Run, open_run
from rlhf_jax.training.forward import response_log_probs, response_values
from rlhf_jax.training.interrupt import StopRequest
from rlhf_jax.training.loop import Schedule
from rlhf_jax.training.optimizer import OptimizerConfig
from rlhf_jax.types import PolicyBatch, ScoredRollout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One PPO run; ``schedule`` counts iterations (one batch of rollouts each).

    batch_size: rollouts an iteration. num_epochs, num_minibatches: passes over them, and updates a pass.
    num_microbatches: parts of one update, for memory. reward, scoring, constraint, judge, answer_weight:
    what is optimised, see ``stages.grpo``; the value model starts from a reward model of responses, if it is
    the only one (of an ensemble the first member), else from the policy, with a head that answers 0. credit:
    when it is paid: at the end of the whole "response", or each "step" of a process reward model what it
    added to the score of the one before (``rewards.process.step_gains``), and for an answer at the end of
    the last. beta: KL penalty per nat; 0 cuts the leash. adaptive_kl_target: the KL (nats a response) that
    beta is steered to; 0 keeps beta fixed. adaptive_kl_horizon: rollouts over which it adapts. gamma, lam:
    discount and trace decay of GAE. clip_low, clip_high: the ratio stays in [1 - low, 1 + high]. value_clip:
    the same for values, in reward units. value_coefficient: weight of the value loss. entropy_coefficient:
    weight of an entropy bonus. missing_eos_score: replaces the reward of a response that never ended; None keeps
    it. early_stop_kl: an iteration's updates end once KL(old || new) per token exceeds it; 0 never. temperature:
    of sampling, and of every log-prob; nothing is truncated, so that samples come from the very policy that is
    scored. stop_when: what ends the run before its schedule. lora: whether policy and value model are adapters
    on the one base, which reference and reward model share. slots: see ``stages.grpo``. num_eval_prompts: held-out
    prompts sampled at every evaluation. eval_responses_per_prompt: responses to each of them; more than one where
    prompts are few.
    """

    seed: int = 0
    data: inputs.DataConfig = dataclasses.field(default_factory=inputs.DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    schedule: Schedule = dataclasses.field(default_factory=lambda: Schedule(num_steps=100, eval_every=10))
    batch_size: int = 128
    num_epochs: int = 4
    num_minibatches: int = 1
    num_microbatches: int = 1
    reward: rewards.RewardKind = "model"
    scoring: rewards.Scoring = dataclasses.field(default_factory=rewards.Scoring)
    constraint: several_rewards.Constraint = dataclasses.field(default_factory=several_rewards.Constraint)
    judge: judged_rewards.JudgeOptions = dataclasses.field(default_factory=judged_rewards.JudgeOptions)
    answer_weight: float = 0.0
    credit: Literal["response", "step"] = "response"
    beta: float = 0.05
    adaptive_kl_target: float = 0.0
    adaptive_kl_horizon: int = 10_000
    gamma: float = 1.0
    lam: float = 0.95
    clip_low: float = 0.2
    clip_high: float = 0.2
    value_clip: float = 0.2
    value_coefficient: float = 0.1
    entropy_coefficient: float = 0.0
    missing_eos_score: float | None = None
    early_stop_kl: float = 0.0
    temperature: float = 1.0
    stop_when: evaluations.StopWhen = dataclasses.field(default_factory=evaluations.StopWhen)
    lora: adapters.LoraOptions = dataclasses.field(default_factory=adapters.LoraOptions)
    slots: int = 0
    num_eval_prompts: int = 256
    eval_responses_per_prompt: int = 1

    def __post_init__(self) -> None:
        counts = ("batch_size", "num_epochs", "num_minibatches", "num_microbatches", "num_eval_prompts")
        check_range(self, "slots", at_least=0)
        check_range(self, *counts, "eval_responses_per_prompt", "adaptive_kl_horizon", at_least=1)
        check_range(self, "beta", "adaptive_kl_target", "early_stop_kl", "clip_high", at_least=0)
        check_range(self, "gamma", "lam", "clip_low", at_least=0, at_most=1)
        check_range(self, "value_coefficient", at_least=0)
        check_range(self, "value_clip", above=0)
        if self.credit == "step":
            for name, value in {"reward": "process", "missing_eos_score": None}.items():
                if getattr(self, name) != value:
                    raise InputError(
                        f"config.{name} is {getattr(self, name)!r}, with which credit=step does not go; give {value!r}"
                    )
            if self.scoring.steps != "last":
                raise InputError(
                    f"config.scoring.steps is {self.scoring.steps!r}, and what credit=step pays adds up to the last "
                    "score; give 'last', so that the score that is shown is the one that is optimised"
                )
        if self.adaptive_kl_target and not self.beta:
            raise InputError(
                "config.beta is 0, which adaptive_kl_target cannot steer; start from a beta above 0"
            )
        if self.adaptive_kl_target and self.adaptive_kl_horizon <= 0.2 * self.batch_size:
            raise InputError(
                f"config.adaptive_kl_horizon is {self.adaptive_kl_horizon}; one step could take beta to 0: "
                f"give more than 0.2 * batch_size ({0.2 * self.batch_size:g})"
            )

    @property
    def sampling(self) -> SamplingConfig:
        return SamplingConfig(
            max_new_tokens=self.data.response_length,
            temperature=self.temperature,
        )


def make_objective(model: ModelConfig, value_model: ModelConfig, config: Config):
    """({"policy", "value"}, {}, PolicyBatch) -> clipped surrogate, clipped value loss, entropy bonus, and metrics."""

    def objective(params: Any, frozen: Any, batch: PolicyBatch):
        del frozen
        mask = batch.response_mask
        log_probs, entropy = response_log_probs(
            model, params["policy"], batch, temperature=config.temperature
        )
        values = response_values(value_model, params["value"], batch)
        surrogate = losses.clipped_surrogate_loss(
            log_probs,
            batch.old_log_probs,
            batch.advantages,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
        )
        value_loss = losses.clipped_value_loss(
            values, batch.old_values, batch.returns, clip=config.value_clip
        )
        terms = {
            "policy": masking.token_mean(surrogate, mask),
            "value": _scaled(masking.token_mean(value_loss, mask), config.value_coefficient),
        }
        if config.entropy_coefficient:
            terms["entropy"] = _scaled(masking.token_mean(entropy, mask), -config.entropy_coefficient)
        ratio = jnp.exp(jnp.where(mask, log_probs - batch.old_log_probs, 0.0))
        clipped = (ratio < 1.0 - config.clip_low) | (ratio > 1.0 + config.clip_high)
        metrics = {
            "entropy": masking.token_mean(entropy, mask),
            "clip_fraction": masking.token_mean(clipped.astype(jnp.float32), mask),
            # Samples come from the old policy: k3 of the reversed ratio estimates KL(old || new) (Schulman 2020).
            "approx_kl": masking.token_mean(losses.kl_k3(batch.old_log_probs, log_probs), mask),
        }
        return terms, metrics

    return objective


def make_prepare(model: ModelConfig, value_model: ModelConfig, config: Config):
    """``prepare(params, reference, scored, beta) -> (PolicyBatch, metrics)``: everything an update holds constant.

    ``scored``: a ScoredRollout. Advantages are whitened here, over the whole batch of rollouts, once.
    """

    def prepare(params: Any, reference: Any, scored: ScoredRollout, beta: jax.Array):
        rollout = scored.rollout
        mask = rollout.response_mask
        log_probs, _ = response_log_probs(model, params["policy"], rollout, temperature=config.temperature)
        ref_log_probs, _ = response_log_probs(model, reference, rollout, temperature=config.temperature)
        values = response_values(value_model, params["value"], rollout)
        scores = reward_model.replace_unfinished(scored.scores, rollout.terminated, config.missing_eos_score)
        kl = losses.kl_k1(log_probs, ref_log_probs)
        if config.credit == "step":
            gains = process.step_gains(scored.step_scores, scored.step_mask)
            rewards = losses.kl_penalized_rewards(jnp.zeros_like(scores), kl, mask, beta=beta) + gains
        else:
            rewards = losses.kl_penalized_rewards(scores, kl, mask, beta=beta)
        advantages, returns = losses.generalized_advantage_estimation(
            rewards, values, mask, gamma=config.gamma, lam=config.lam
        )
        batch = PolicyBatch(
            tokens=rollout.tokens,
            token_mask=rollout.token_mask,
            response_mask=mask,
            old_log_probs=log_probs,
            old_values=values,
            advantages=masking.masked_whiten(advantages, mask),
            returns=returns,
        )
        unexplained = masking.masked_mean((returns - values) ** 2, mask)
        variance = masking.masked_mean((returns - masking.masked_mean(returns, mask)) ** 2, mask)
        metrics = {
            "score": mean_over_rows(scores, mask),
            "kl": mean_over_rows(masking.masked_sum(kl, mask, axis=1), mask),
            "beta": mean_of(beta),
            "value_explained_variance": mean_of(1.0 - unexplained / jnp.maximum(variance, 1e-8)),
            # The sampler and the trainer are two programs; this is how far they disagree on the same tokens.
            "sampler_gap": online.sampler_gap(rollout, log_probs),
        }
        return batch, metrics

    return prepare


def make_method(model: ModelConfig, value_model: ModelConfig, config: Config) -> online.Method:
    """PPO as ``online`` runs it."""
    return online.Method(
        prepare=make_prepare(model, value_model, config),
        objective=make_objective(model, value_model, config),
        policy_of=lambda params: params["policy"],
        kept=lambda params: {"policy": params["policy"]},
        beta=config.beta,
        next_beta=functools.partial(_adapt, config) if config.adaptive_kl_target else None,
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
    parallelism: meshes.Parallelism = "jit",
    mesh: jax.sharding.Mesh | None = None,
    stop: StopRequest,
) -> None:
    """Runs the stage to its hand-off; returns at once if it is there.

    Args:
      config: see ``Config``.
      workdir: the run's directory.
      init_from: the SFT run (or a Hugging Face directory): initial policy, and the frozen reference.
      reward_from, held_out_reward_from: see ``rewards.Sources``.
      parallelism: how the update runs; sampling and scoring are always ``jit`` over the mesh.
      mesh: see ``parallel.mesh``; None puts all devices on its data axis.
      stop: looked at between iterations.

    Raises:
      InputError: anything the user gave that cannot be used, before any training.
      Interrupted: stopped on request, after saving.
    """
    sources = rewards.Sources(reward_from=reward_from, held_out_reward_from=held_out_reward_from)
    where = {"init_from": init_from} | sources.inputs
    run_ = open_run(workdir, "ppo", config, inputs=where, parallelism=parallelism, mesh=mesh, stop=stop)
    if run_.finished:
        return
    model = load_start(init_from, run_)
    encoded, held_out = prompts.encode_prompts(
        run_,
        config.data,
        model,
        num_eval_prompts=config.num_eval_prompts,
        responses_per_prompt=config.eval_responses_per_prompt,
    )
    reward = rewards.load_reward(config, sources, run_, model, encoded, held_out)
    value_config, value = _initial_value(config, reward, run_, model)
    with contextlib.closing(reward):
        state = online.train(
            run_,
            config,
            make_method(model.config, value_config, config),
            model=model,
            params={"policy": {"decoder": model.params["decoder"]}, "value": value},
            encoded=encoded,
            held_out=held_out,
            reward=reward,
        )
    leave_handoff(
        run_,
        config,
        model,
        adapters.result(
            evaluations.left(state.train.params, state.best)["policy"], model.params, config.lora.settings
        ),
        made_from=list(where.values()),
        facts={"beta": float(state.beta)} | evaluations.facts_of(state.best),
    )


def _initial_value(
    config: Config, reward: rewards.Reward, run_: Run, model: Model
) -> tuple[ModelConfig, Any]:
    """The value model's shape and params: the reward model's, less its offset, or the policy's that answers 0.

    Raises:
      InputError: adapters, and a reward model that is none on the same base.
    """
    source = reward.model
    if config.reward != "model" or source is None:
        head = heads.zero_scalar_head(model.config)
        head = jax.device_put(
            head, sharding.parameter_sharding(run_.mesh, model.config, {"head": head})["head"]
        )
        return model.config, {"decoder": model.params["decoder"], "head": head}
    if config.lora.rank and "ensemble_offsets" in source.facts:
        raise InputError(
            f"config.lora.rank is {config.lora.rank}, and --reward_from={source.origin} is an ensemble, which has no "
            "adapters; give rank 0, or a single reward model"
        )
    if config.lora.rank and source.adapter is None:
        raise InputError(
            f"config.lora.rank is {config.lora.rank}, which keeps one base for all four roles, and "
            f"--reward_from={source.origin} was trained whole; train it from {model.origin} with the same "
            "--config.lora.*, or give rank 0"
        )
    value, offset = rewards.first_member(source)
    head = {"kernel": value["head"]["kernel"], "bias": value["head"]["bias"] - offset}
    if source.adapter is not None:
        return source.config, {"adapter": source.adapter["adapter"], "head": head}
    return source.config, {"decoder": value["decoder"], "head": head}


def _scaled(term: WeightedSum, factor: float) -> WeightedSum:
    return WeightedSum(factor * term.total, term.weight)


def _adapt(config: Config, beta: jax.Array, observed_kl: jax.Array) -> jax.Array:
    return losses.adaptive_beta(
        beta,
        observed_kl,
        target=config.adaptive_kl_target,
        horizon=config.adaptive_kl_horizon,
        batch_size=config.batch_size,
    )
