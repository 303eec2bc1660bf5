"""Online and iterative DPO: sample, label best and worst of a group, take DPO's step. A stage; imports all below.

Online (Guo et al. 2024): every iteration samples from the policy of the moment, a reward model or a verifier labels,
and the pairs train it once against the SFT policy. Iterative (Xiong et al. 2024; Pang et al. 2024): many prompts an
iteration, several minibatches or passes, and, with ``reference="iteration"``, the policy that sampled as reference.
"""

from __future__ import annotations

import dataclasses
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
from rlhf_jax.stages.preference_objectives import PreferenceLoss, make_pair_objective
from rlhf_jax.training.forward import response_log_probs
from rlhf_jax.training.interrupt import StopRequest
from rlhf_jax.training.loop import Schedule
from rlhf_jax.training.optimizer import OptimizerConfig
from rlhf_jax.types import DemonstrationBatch, PreferenceBatch, Rollout, ScoredRollout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run; ``schedule`` counts iterations (one batch of rollouts each).

    batch_size: rollouts an iteration, ``group_size`` to a prompt, which give one pair. num_epochs,
    num_minibatches: passes over the pairs, and updates a pass. num_microbatches: parts of one update. reward,
    scoring, constraint, judge, answer_weight: what labels, see ``stages.grpo``. loss: which loss on pairs, any
    but KTO; its temperature is that of sampling too. reference: "start" is the SFT policy throughout, "iteration"
    the policy that sampled. stop_when: what ends the run before its schedule. lora: whether the policy is an
    adapter on the reference. missing_eos_score: replaces the reward of a response that never ended; None keeps
    it. slots: see ``stages.grpo``. num_eval_prompts: held-out prompts sampled at every evaluation;
    eval_responses_per_prompt: responses to each.
    """

    seed: int = 0
    data: inputs.DataConfig = dataclasses.field(default_factory=inputs.DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    schedule: Schedule = dataclasses.field(default_factory=lambda: Schedule(num_steps=100, eval_every=10))
    batch_size: int = 128
    group_size: int = 2
    num_epochs: int = 1
    num_minibatches: int = 1
    num_microbatches: int = 1
    reward: rewards.RewardKind = "model"
    scoring: rewards.Scoring = dataclasses.field(default_factory=rewards.Scoring)
    constraint: several_rewards.Constraint = dataclasses.field(default_factory=several_rewards.Constraint)
    judge: judged_rewards.JudgeOptions = dataclasses.field(default_factory=judged_rewards.JudgeOptions)
    answer_weight: float = 0.0
    loss: PreferenceLoss = dataclasses.field(default_factory=PreferenceLoss)
    reference: Literal["start", "iteration"] = "start"
    missing_eos_score: float | None = None
    stop_when: evaluations.StopWhen = dataclasses.field(default_factory=evaluations.StopWhen)
    lora: adapters.LoraOptions = dataclasses.field(default_factory=adapters.LoraOptions)
    slots: int = 0
    num_eval_prompts: int = 256
    eval_responses_per_prompt: int = 1

    def __post_init__(self) -> None:
        counts = ("batch_size", "num_epochs", "num_minibatches", "num_microbatches", "num_eval_prompts")
        check_range(self, "slots", at_least=0)
        check_range(self, *counts, "eval_responses_per_prompt", at_least=1)
        check_range(self, "group_size", at_least=2)
        if self.loss.kind == "kto":
            raise InputError("config.loss.kind is 'kto', which is not for pairs sampled anew; give any other")

    @property
    def sampling(self) -> SamplingConfig:
        return SamplingConfig(max_new_tokens=self.data.response_length, temperature=self.loss.temperature)


def pairs_of(rollout: Rollout, scores: jax.Array, group_size: int) -> tuple[PreferenceBatch, jax.Array]:
    """The best and the worst response to each prompt, and which prompts have both, [N] bool.

    Where all scores of a group are equal there is no preference: both sides lose their response tokens, which is how
    ``make_pair_objective`` is told of a tie.
    """
    groups = scores.reshape(-1, group_size)
    first = jnp.arange(groups.shape[0]) * group_size
    apart = jnp.any(groups != groups[:, :1], axis=1)

    def side(rows: jax.Array) -> DemonstrationBatch:
        return DemonstrationBatch(
            tokens=rollout.tokens[rows],
            token_mask=rollout.token_mask[rows],
            response_mask=rollout.response_mask[rows] & apart[:, None],
        )

    best, worst = jnp.argmax(groups, axis=1), jnp.argmin(groups, axis=1)
    return PreferenceBatch(chosen=side(first + best), rejected=side(first + worst)), apart


def make_prepare(model: ModelConfig, config: Config):
    """``prepare(params, reference, scored, beta) -> (PreferenceBatch, metrics)``."""

    def prepare(params: Any, reference: Any, scored: ScoredRollout, beta: jax.Array):
        del beta
        rollout = scored.rollout
        temperature = config.loss.temperature
        log_probs, ref_log_probs = (
            response_log_probs(model, weights, rollout, temperature=temperature)[0]
            for weights in (params, reference)
        )
        scores = reward_model.replace_unfinished(scored.scores, rollout.terminated, config.missing_eos_score)
        batch, apart = pairs_of(rollout, scores, config.group_size)
        kl = masking.masked_sum(losses.kl_k1(log_probs, ref_log_probs), rollout.response_mask, axis=1)
        return batch, {
            "score": mean_over_rows(scores, rollout.response_mask),
            "kl": mean_over_rows(kl, rollout.response_mask),
            "ties": mean_over_rows(~apart, rollout.response_mask.any(axis=1).reshape(-1, config.group_size)),
        }

    return prepare


def make_method(model: ModelConfig, config: Config) -> online.Method:
    """Online DPO as ``online`` runs it."""

    return online.Method(
        prepare=make_prepare(model, config),
        objective=make_pair_objective(model, config.loss),
        group_size=config.group_size,
        rows_of_group=1,
        reads_reference=config.reference,
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
        "online_dpo", config, workdir, make_method, **where, parallelism=parallelism, mesh=mesh, stop=stop
    )
