"""PPO against a learned reward, on a per-token KL leash to the SFT policy. A stage; imports all below.

One iteration: sample a response to each prompt; score it with the frozen reward model; charge beta * log(pi /
pi_ref) at every token (Ziegler et al. 2019, equation 2); estimate advantages with GAE from a value model; take
a few epochs of clipped-surrogate updates (Schulman et al. 2017, equation 7). Four roles: policy and value are
trained, reference (the SFT policy) and reward are frozen. The value model starts as a copy of the reward model.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import losses, masking
from rlhf_jax.data import batches
from rlhf_jax.data import tokenizer as tokenizers
from rlhf_jax.errors import InputError, check_range
from rlhf_jax.evaluation import policies
from rlhf_jax.masking import WeightedSum
from rlhf_jax.metrics import Maximum, count, mean_of, merge
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.rewards import reward_model
from rlhf_jax.sampling.generate import SamplingConfig, generate
from rlhf_jax.stages import inputs
from rlhf_jax.stages.run_directory import (
    Model,
    Progress,
    Run,
    check_context,
    check_same_family,
    check_scores,
    leave_handoff,
    load_model,
    open_run,
    write_data_report,
)
from rlhf_jax.stages.supervised import EVALUATION_PURPOSE, TRAIN_PURPOSE
from rlhf_jax.training.forward import response_log_probs, response_values
from rlhf_jax.training.interrupt import StopRequest
from rlhf_jax.training.loop import Schedule, fit
from rlhf_jax.training.optimizer import OptimizerConfig, make_optimizer
from rlhf_jax.training.step import TrainState, init_train_state, make_train_step
from rlhf_jax.types import PolicyBatch, Rollout

ROLLOUT_PURPOSE, SHUFFLE_PURPOSE = 3, 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One PPO run; ``schedule`` counts iterations (one batch of rollouts each).

    batch_size: rollouts an iteration. num_epochs, num_minibatches: passes over them, and updates a pass.
    num_microbatches: parts of one update, for memory. beta: KL penalty per nat; 0 cuts the leash.
    adaptive_kl_target: the KL (nats a response) that beta is steered to; 0 keeps beta fixed.
    adaptive_kl_horizon: rollouts over which it adapts. gamma, lam: discount and trace decay of GAE. clip_low,
    clip_high: the ratio stays in [1 - low, 1 + high]. value_clip: the same for values, in reward units.
    value_coefficient: weight of the value loss. entropy_coefficient: weight of an entropy bonus.
    missing_eos_score: replaces the reward of a response that never ended; None keeps it. early_stop_kl: an
    iteration's updates end once KL(old || new) per token exceeds it; 0 never. temperature: of sampling, and of every
    log-prob; nothing is truncated, so that samples come from the very policy that is scored. num_eval_prompts:
    held-out prompts sampled at every evaluation. eval_responses_per_prompt: responses to each of them; more than
    one where prompts are few.
    """

    seed: int = 0
    data: inputs.DataConfig = dataclasses.field(default_factory=inputs.DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    schedule: Schedule = dataclasses.field(default_factory=lambda: Schedule(num_steps=100, eval_every=10))
    batch_size: int = 128
    num_epochs: int = 4
    num_minibatches: int = 1
    num_microbatches: int = 1
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
    num_eval_prompts: int = 256
    eval_responses_per_prompt: int = 1

    def __post_init__(self) -> None:
        counts = ("batch_size", "num_epochs", "num_minibatches", "num_microbatches", "num_eval_prompts")
        check_range(self, *counts, "eval_responses_per_prompt", "adaptive_kl_horizon", at_least=1)
        check_range(self, "beta", "adaptive_kl_target", "early_stop_kl", "clip_high", at_least=0)
        check_range(self, "gamma", "lam", "clip_low", at_least=0, at_most=1)
        check_range(self, "value_coefficient", at_least=0)
        check_range(self, "value_clip", above=0)
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOState:
    """train: TrainState over {"policy", "value"}. beta: [] float32. iteration: [] int32, finished iterations."""

    train: TrainState
    beta: jax.Array
    iteration: jax.Array


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


def make_prepare(model: ModelConfig, reward_config: ModelConfig, reward_offset: float, config: Config):
    """``prepare(params, frozen, rollout, beta) -> (PolicyBatch, metrics)``: everything an update holds constant.

    ``frozen``: {"reference", "reward"}. Advantages are whitened here, over the whole batch of rollouts, once.
    """

    def prepare(params: Any, frozen: Any, rollout: Rollout, beta: jax.Array):
        mask = rollout.response_mask
        log_probs, _ = response_log_probs(model, params["policy"], rollout, temperature=config.temperature)
        reference, _ = response_log_probs(model, frozen["reference"], rollout, temperature=config.temperature)
        values = response_values(reward_config, params["value"], rollout)
        proxy = reward_model.score(reward_config, frozen["reward"], rollout, offset=reward_offset)
        scores = reward_model.replace_unfinished(proxy, rollout.terminated, config.missing_eos_score)
        kl = losses.kl_k1(log_probs, reference)
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
        lengths = mask.sum(axis=1)
        metrics = {
            "proxy": mean_of(proxy),
            "score": mean_of(scores),
            "kl": mean_of(masking.masked_sum(kl, mask, axis=1)),
            "length": mean_of(lengths),
            "terminated": mean_of(rollout.terminated),
            "beta": mean_of(beta),
            "value_explained_variance": mean_of(1.0 - unexplained / jnp.maximum(variance, 1e-8)),
            # The sampler and the trainer are two programs; this is how far they disagree on the same tokens.
            "sampler_gap": Maximum(jnp.max(jnp.where(mask, jnp.abs(rollout.log_probs - log_probs), 0.0))),
            "tokens": count(rollout.token_mask),
        }
        return batch, metrics

    return prepare


def make_iteration(
    *,
    config: Config,
    rollout: Callable[[Any, Any, jax.Array, jax.Array], Rollout],
    prepare: Callable,
    train_step: Callable,
    frozen: Any,
    gold: Callable[[Rollout, np.ndarray], np.ndarray] | None,
) -> Callable[[PPOState, Mapping[str, np.ndarray]], tuple[PPOState, dict]]:
    """``iterate(state, prompts) -> (state, metrics)``: sample, score, and update; runs on the host over compiled parts.

    ``gold(rollout, prompt rows) -> [B]`` is measured and never trained on.
    """

    def iterate(state: PPOState, prompts: Mapping[str, np.ndarray]):
        key = jax.random.fold_in(state.train.key, state.iteration)
        sampled = rollout(
            state.train.params["policy"], prompts, jax.random.fold_in(key, ROLLOUT_PURPOSE), state.train.step
        )
        batch, metrics = prepare(state.train.params, frozen, sampled, state.beta)
        if gold is not None:
            metrics = metrics | {"gold": mean_of(gold(sampled, prompts["index"]))}
        observed_kl = metrics["kl"]
        train, updates = _update(
            state.train, batch, jax.random.fold_in(key, SHUFFLE_PURPOSE), train_step, config
        )
        beta = state.beta
        if config.adaptive_kl_target:
            beta = losses.adaptive_beta(
                beta,
                observed_kl.total / observed_kl.weight,
                target=config.adaptive_kl_target,
                horizon=config.adaptive_kl_horizon,
                batch_size=config.batch_size,
            )
        state = PPOState(train=train, beta=jnp.asarray(beta, jnp.float32), iteration=state.iteration + 1)
        return state, metrics | updates

    return iterate


def _update(train: TrainState, batch: PolicyBatch, key: jax.Array, train_step: Callable, config: Config):
    """``num_epochs`` passes over the rollouts in fresh orders; ends early once the policy has moved too far."""
    rows, metrics = config.batch_size // config.num_minibatches, {}
    for epoch in range(config.num_epochs):
        order = np.asarray(jax.random.permutation(jax.random.fold_in(key, epoch), config.batch_size))
        for part in order.reshape(config.num_minibatches, rows):
            minibatch = batch if config.num_minibatches == 1 else jax.tree.map(lambda x: x[part], batch)  # noqa: B023
            train, found = train_step(train, {}, minibatch)
            metrics = merge(metrics, found)
            if config.early_stop_kl and found["approx_kl"].mean() > config.early_stop_kl:
                return train, metrics | {"early_stops": mean_of(1.0)}
    return train, metrics | ({"early_stops": mean_of(0.0)} if config.early_stop_kl else {})


def run(
    config: Config,
    workdir: str | os.PathLike,
    *,
    init_from: str,
    reward_from: str,
    parallelism: meshes.Parallelism = "jit",
    stop: StopRequest,
) -> None:
    """Runs the stage to its hand-off; returns at once if it is there.

    Args:
      config: see ``Config``.
      workdir: the run's directory.
      init_from: the SFT run (or a Hugging Face directory): initial policy, and the frozen reference.
      reward_from: the reward-model run: frozen reward, and initial value model.
      parallelism: how the update runs; sampling and scoring are always ``jit`` over the mesh.
      stop: looked at between iterations.

    Raises:
      InputError: anything the user gave that cannot be used, before any training.
      Interrupted: stopped on request, after saving.
    """
    where = {"init_from": init_from, "reward_from": reward_from}
    run_ = open_run(workdir, "ppo", config, inputs=where, parallelism=parallelism, stop=stop)
    if run_.finished:
        return
    _check_split(config, run_)
    model, reward = load_model(init_from, run_), load_model(reward_from, run_)
    check_same_family(model, reward)
    check_scores(reward)
    for role in (model, reward):
        check_context(role, config.data.prompt_length + config.data.response_length)
    split = inputs.load_prompts(config.data)
    encode = lambda rows: batches.encode_prompts(rows, model.tokenizer, **_prompt_widths(config.data))  # noqa: E731
    encoded, report = encode(split.train)
    held_out, held_out_report = encode(split.held_out[: config.num_eval_prompts])
    write_data_report(run_, split.left_out, train=report, held_out=held_out_report)
    texts = [prompt.row.prompt for prompt in encoded.rows]

    offset = float(reward.facts["reward_offset"])
    frozen = {"reference": {"decoder": model.params["decoder"]}, "reward": reward.params}
    # Whole rounds over the prompts; a row's noise depends on its place, so a prompt's responses differ.
    held_out = dataclasses.replace(held_out, rows=held_out.rows * config.eval_responses_per_prompt)
    evaluate = _make_evaluate(config, run_, model, reward, offset, held_out)
    optimizer = make_optimizer(
        config.optimizer, config.schedule.num_steps * config.num_epochs * config.num_minibatches
    )
    objective = make_objective(model.config, reward.config, config)
    iterate = make_iteration(
        config=config,
        rollout=_make_rollout(config, run_, model),
        prepare=jax.jit(make_prepare(model.config, reward.config, offset, config)),
        train_step=meshes.compile_step(
            lambda axis: make_train_step(
                objective, optimizer, num_microbatches=config.num_microbatches, axis_name=axis
            ),
            run_.mesh,
            parallelism,
        ),
        frozen=frozen,
        gold=_make_gold(config, model, texts),
    )
    progress = Progress("ppo", config.schedule.num_steps, ("proxy", "gold", "kl", "length"), line_every=10)
    try:
        state = fit(
            state=jax.device_put(
                _init_state(config, model, reward, offset, optimizer), meshes.replicated(run_.mesh)
            ),
            step=iterate,
            batches=batches.prompt_batches(encoded, batch_size=config.batch_size, seed=config.seed),
            schedule=config.schedule,
            workdir=run_.workdir,
            progress=progress,
            stop=stop,
            evaluate=evaluate,
            skipped_updates=lambda state: state.train.skipped,
        )
    finally:
        progress.close()
    leave_handoff(
        run_,
        config,
        model,
        state.train.params["policy"],
        made_from=[init_from, reward_from],
        facts={"beta": float(state.beta)},
    )


def _scaled(term: WeightedSum, factor: float) -> WeightedSum:
    return WeightedSum(factor * term.total, term.weight)


def _check_split(config: Config, run: Run) -> None:
    parts = config.num_minibatches * config.num_microbatches
    if config.batch_size % parts:
        raise InputError(
            f"config.batch_size is {config.batch_size}, which does not divide into "
            f"num_minibatches={config.num_minibatches} times num_microbatches={config.num_microbatches}"
        )
    meshes.check_rows(
        run.mesh, config.batch_size // parts, "config.batch_size / (minibatches x microbatches)"
    )


def _prompt_widths(data: inputs.DataConfig) -> dict[str, Any]:
    return {"prompt_length": data.prompt_length, "truncation": data.truncation}


def _init_state(config: Config, model: Model, reward: Model, offset: float, optimizer: Any) -> PPOState:
    """Copies, because an update donates its params and the frozen roles keep theirs."""
    value_head = {"kernel": reward.params["head"]["kernel"], "bias": reward.params["head"]["bias"] - offset}
    params = {
        "policy": {"decoder": model.params["decoder"]},
        "value": {"decoder": reward.params["decoder"], "head": value_head},
    }
    key = jax.random.fold_in(jax.random.key(config.seed), TRAIN_PURPOSE)
    return PPOState(
        train=init_train_state(jax.tree.map(jnp.copy, params), optimizer, key),
        beta=jnp.float32(config.beta),
        iteration=jnp.zeros((), jnp.int32),
    )


def _make_rollout(config: Config, run: Run, model: Model):
    eos_id, pad_id = tokenizers.eos_id(model.tokenizer), tokenizers.pad_id(model.tokenizer)

    @jax.jit
    def sample(params, tokens, token_mask, key, step):
        return generate(
            model.config,
            params,
            tokens,
            token_mask,
            key,
            sampling=config.sampling,
            eos_id=eos_id,
            pad_id=pad_id,
            policy_step=step,
        )

    def rollout(params, prompts, key, step):
        tokens, token_mask = meshes.put_rows(run.mesh, (prompts["tokens"], prompts["token_mask"]))
        return sample(params, tokens, token_mask, key, step)

    return rollout


def _make_gold(config: Config, model: Model, texts: list[str]):
    gold = inputs.gold_reward(config.data)
    if gold is None:
        return None

    def measure(rollout: Rollout, rows: np.ndarray) -> np.ndarray:
        rollout = jax.device_get(rollout)
        responses = policies.response_texts(model.tokenizer, rollout)
        return np.array(
            [
                gold(texts[row], response, bool(ended))
                for row, response, ended in zip(rows, responses, rollout.terminated, strict=True)
            ],
            np.float32,
        )

    return measure


def _make_evaluate(
    config: Config, run: Run, model: Model, reward: Model, offset: float, held_out: batches.Encoded
):
    """The same held-out prompts with the same noise every time, so that evaluations differ by the policy alone."""
    judge = policies.Judge(
        model=model.config,
        reference={"decoder": model.params["decoder"]},
        reward_config=reward.config,
        reward=reward.params,
        reward_offset=offset,
        gold=inputs.gold_reward(config.data),
        tokenizer=model.tokenizer,
    )
    sample = policies.make_sampler(judge, config.sampling, run.mesh, batch_size=config.batch_size)
    key = jax.random.fold_in(jax.random.key(config.seed), EVALUATION_PURPOSE)

    def evaluate(state: PPOState) -> dict[str, float]:
        found = policies.summarize(sample(state.train.params["policy"], held_out, key))
        return {f"eval/{name}": value for name, value in found.items()}

    return evaluate
