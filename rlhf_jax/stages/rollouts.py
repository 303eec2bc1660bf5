"""What the stages that sample share: prompts, rollouts, rewards, evaluation, updates. Imports all below."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from rlhf_jax.data import batches
from rlhf_jax.data import tokenizer as tokenizers
from rlhf_jax.errors import InputError
from rlhf_jax.evaluation import policies
from rlhf_jax.evaluation.policies import RowReward
from rlhf_jax.metrics import mean_of, merge
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.sampling.generate import SamplingConfig, generate
from rlhf_jax.stages import inputs
from rlhf_jax.stages.run_directory import Model, Purpose, Run, check_context, write_data_report
from rlhf_jax.training.step import TrainState
from rlhf_jax.types import PolicyBatch, Rollout


def encode_prompts(
    run: Run, data: inputs.DataConfig, model: Model, *, num_eval_prompts: int, responses_per_prompt: int
) -> tuple[batches.Encoded, batches.Encoded]:
    """Training prompts, and held-out ones repeated for as many responses each; what was left out is kept on file.

    Raises:
      InputError: a prompt that cannot be used, or widths beyond the model's context.
    """
    check_context(model, data.prompt_length + data.response_length)
    split = inputs.load_prompts(data)
    widths = {"prompt_length": data.prompt_length, "truncation": data.truncation}
    train, report = batches.encode_prompts(split.train, model.tokenizer, **widths)
    held_out, held_out_report = batches.encode_prompts(
        split.held_out[:num_eval_prompts], model.tokenizer, **widths
    )
    write_data_report(run, split.left_out, train=report, held_out=held_out_report)
    # Whole rounds over the prompts; a row's noise depends on its place, so a prompt's responses differ.
    return train, dataclasses.replace(held_out, rows=held_out.rows * responses_per_prompt)


def make_rollout(run: Run, model: Model, sampling: SamplingConfig) -> Callable[..., Rollout]:
    """``rollout(params, prompts, key, step) -> Rollout``; ``prompts`` is a batch of ``batches.prompt_batches``."""
    eos_id, pad_id = tokenizers.eos_id(model.tokenizer), tokenizers.pad_id(model.tokenizer)

    @jax.jit
    def sample(params, tokens, token_mask, key, step):
        return generate(
            model.config,
            params,
            tokens,
            token_mask,
            key,
            sampling=sampling,
            eos_id=eos_id,
            pad_id=pad_id,
            policy_step=step,
        )

    def rollout(params, prompts, key, step):
        tokens, token_mask = meshes.put_rows(run.mesh, (prompts["tokens"], prompts["token_mask"]))
        return sample(params, tokens, token_mask, key, step)

    return rollout


def model_reward(reward: Model) -> RowReward:
    """The frozen reward model of a run, its scores shifted by the offset that the run stored."""
    return policies.model_reward(reward.config, reward.params, float(reward.facts["reward_offset"]))


def gold_reward(data: inputs.DataConfig, tokenizer: Any) -> RowReward | None:
    """The embedded world's gold reward, to measure and never to train on; None for files, which have none."""
    gold = inputs.gold_reward(data)
    if gold is None:
        return None
    return policies.text_reward(tokenizer, lambda row, response, ended: gold(row.prompt, response, ended))


def make_evaluate(
    run: Run,
    config: Any,
    model: Model,
    held_out: batches.Encoded,
    *,
    reward: RowReward,
    gold: RowReward | None,
) -> Callable[[Any], dict[str, float]]:
    """``evaluate(policy params)``: held-out prompts with the same noise every time, so that only policies differ.

    ``config``: the stage's; ``seed``, ``sampling`` and ``batch_size`` are read.
    """
    judge = policies.Judge(
        model=model.config,
        reference={"decoder": model.params["decoder"]},
        reward=reward,
        gold=gold,
        tokenizer=model.tokenizer,
    )
    sample = policies.make_sampler(judge, config.sampling, run.mesh, batch_size=config.batch_size)
    key = run.key(config.seed, Purpose.EVALUATION)

    def evaluate(params: Any) -> dict[str, float]:
        found = policies.summarize(sample(params, held_out, key))
        return {f"eval/{name}": value for name, value in found.items()}

    return evaluate


def check_split(config: Any, mesh: jax.sharding.Mesh) -> None:
    """Refuses a batch of rollouts that does not divide into minibatches, micro-batches and devices.

    Raises:
      InputError: names the fields.
    """
    parts = config.num_minibatches * config.num_microbatches
    if config.batch_size % parts:
        raise InputError(
            f"config.batch_size is {config.batch_size}, which does not divide into "
            f"num_minibatches={config.num_minibatches} times num_microbatches={config.num_microbatches}"
        )
    meshes.check_rows(mesh, config.batch_size // parts, "config.batch_size / (minibatches x microbatches)")


def rows_of(encoded: batches.Encoded, index: np.ndarray) -> Sequence[Any]:
    """The data rows that a batch of prompts was made from."""
    return [encoded.rows[i].row for i in np.asarray(index)]


def update(
    train: TrainState, batch: PolicyBatch, key: jax.Array, train_step: Callable, config: Any
) -> tuple[TrainState, dict]:
    """``num_epochs`` passes over the rollouts in fresh orders; ends early once the policy has moved too far.

    ``config``: ``batch_size``, ``num_epochs``, ``num_minibatches`` and ``early_stop_kl`` are read; the last is held
    against the step's metric ``approx_kl``, nats a token.
    """
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
