"""What the stages that sample share: prompts, rollouts, rewards, evaluation. Imports all below."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data import batches
from rlhf_jax.data import tokenizer as tokenizers
from rlhf_jax.errors import InputError
from rlhf_jax.evaluation import policies
from rlhf_jax.evaluation.policies import RowReward
from rlhf_jax.metrics import mean_of
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.parallel import sharding
from rlhf_jax.rewards import verifiers
from rlhf_jax.sampling.generate import SamplingConfig, generate
from rlhf_jax.stages import inputs
from rlhf_jax.stages.run_directory import (
    Model,
    Purpose,
    Run,
    check_context,
    check_same_family,
    check_scores,
    load_model,
    write_data_report,
)
from rlhf_jax.types import Rollout, ScoredRollout


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


# (policy params, batch of prompts, key, optimiser step) -> (what was sampled and scored, each row's prompt, metrics).
Collect = Callable[
    [Any, Mapping[str, np.ndarray], jax.Array, jax.Array], tuple[ScoredRollout, np.ndarray, dict]
]


def make_collect(
    rollout: Callable[..., Rollout],
    reward: Callable[[Rollout, np.ndarray], Any],
    *,
    group_size: int = 1,
    rounds: int = 1,
) -> Collect:
    """Samples ``group_size`` responses to each prompt and scores them, one group after another along the rows.

    Args:
      rollout: see ``make_rollout``.
      reward: ``reward(rollout, index of each row's prompt) -> [B]``: what is optimised.
      group_size: responses a prompt.
      rounds: with more than one, a batch holds that many times the prompts: groups whose rewards are all equal are
        sampled anew from further prompts until all groups have a spread or the prompts run out (DAPO's dynamic
        sampling, Yu et al. 2025, section 3.2). Groups without spread fill what is then still missing.
    """

    def collect(params, prompts, key, step):
        count_of_prompts = len(prompts["index"]) // rounds
        found: list[ScoredRollout] = []
        spread: list[np.ndarray] = []
        for number in range(rounds):
            part = slice(number * count_of_prompts, (number + 1) * count_of_prompts)
            repeated = {name: np.repeat(x[part], group_size, axis=0) for name, x in prompts.items()}
            sampled = rollout(params, repeated, jax.random.fold_in(key, number), step)
            scores = jnp.asarray(reward(sampled, repeated["index"]))
            found.append(ScoredRollout(rollout=sampled, scores=scores))
            if rounds == 1:
                return found[0], repeated["index"], {}
            groups = np.asarray(scores).reshape(-1, group_size)
            spread.append((groups != groups[:, :1]).any(axis=1))
            if sum(kept.sum() for kept in spread) >= count_of_prompts:
                break
        whether = np.concatenate(spread)
        # Those with a spread first, in the order in which they were sampled.
        chosen = np.argsort(~whether, kind="stable")[:count_of_prompts]
        rows = (chosen[:, None] * group_size + np.arange(group_size)).reshape(-1)
        # policy_step is one number for all rows.
        scored = jax.tree.map(
            lambda *parts: jnp.concatenate(parts)[rows] if parts[0].ndim else parts[0], *found
        )
        metrics = {"rounds": mean_of(float(len(found))), "groups_with_spread": mean_of(whether[chosen])}
        return scored, np.repeat(prompts["index"][chosen], group_size), metrics

    return collect


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

    within_mesh = sharding.within(run.mesh, sample)

    def rollout(params, prompts, key, step):
        tokens, token_mask = meshes.put_rows(run.mesh, (prompts["tokens"], prompts["token_mask"]))
        return within_mesh(params, tokens, token_mask, key, step)

    return rollout


def model_reward(reward: Model) -> RowReward:
    """The frozen reward model of a run, its scores shifted by the offset that the run stored."""
    return policies.model_reward(reward.config, reward.params, float(reward.facts["reward_offset"]))


def load_reward(
    kind: Literal["model", "answer"],
    reward_from: str,
    run: Run,
    data: inputs.DataConfig,
    model: Model,
    encoded: Any,
) -> RowReward:
    """What a stage optimises: the reward model of ``reward_from``, or whether a response gives its prompt's answer.

    Raises:
      InputError: no reward model where one is needed, one of another tokenizer, or prompts without answers.
    """
    if kind == "answer":
        missing = next((row.row.source for row in encoded.rows if not row.row.answer), None)
        if missing is not None:
            raise InputError(
                f"{missing} has no answer, which config.reward=answer needs; give rows with one, or config.reward=model"
            )
        return policies.text_reward(
            model.tokenizer,
            lambda row, response, ended: float(verifiers.gsm8k_reward([response], [row.answer])[0]),
        )
    if not reward_from:
        raise InputError(
            "config.reward is 'model', which needs --reward_from=<run of experiments.reward_model>"
        )
    reward = load_model(reward_from, run)
    check_same_family(model, reward)
    check_scores(reward)
    check_context(reward, data.prompt_length + data.response_length)
    return model_reward(reward)


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


def of_prompts(reward: RowReward, encoded: batches.Encoded) -> Callable[[Rollout, np.ndarray], Any]:
    """A reward of data rows as one of indices into ``encoded``, which is what a batch of prompts carries."""
    return lambda rollout, index: reward(rollout, [encoded.rows[i].row for i in np.asarray(index)])
