"""What the stages that sample share: rollouts, and scores of them. Imports all below."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data import batches, mixtures
from rlhf_jax.data import tokenizer as tokenizers
from rlhf_jax.evaluation.policies import RowReward
from rlhf_jax.metrics import mean_of
from rlhf_jax.parallel import hosts, sharding
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.rewards import reward_model
from rlhf_jax.sampling.generate import SamplingConfig, generate
from rlhf_jax.stages.run_directory import (
    Model,
    Run,
)
from rlhf_jax.types import Rollout, ScoredRollout

# (policy params, batch of prompts, key, optimiser step) -> (what was sampled and scored, each row's prompt, metrics).
Collect = Callable[
    [Any, Mapping[str, np.ndarray], jax.Array, jax.Array], tuple[ScoredRollout, np.ndarray, dict]
]


def make_collect(
    rollout: Callable[..., Rollout],
    reward: Callable[[Rollout, np.ndarray], Any],
    *,
    step_scores: Callable[[Rollout, np.ndarray], tuple[jax.Array, jax.Array]] | None = None,
    group_size: int = 1,
    rounds: int = 1,
    missing_eos_score: float | None = None,
) -> Collect:
    """Samples ``group_size`` responses to each prompt and scores them, one group after another along the rows.

    Args:
      rollout: see ``make_rollout``.
      reward: ``reward(rollout, index of each row's prompt) -> [B]``: what is optimised.
      step_scores: of the same arguments, what each step is worth and where steps end, for methods that give credit by
        steps.
      group_size: responses a prompt.
      rounds: with more than one, a batch holds that many times the prompts: groups whose rewards are all equal are
        sampled anew from further prompts until all groups have a spread or the prompts run out (DAPO's dynamic
        sampling, Yu et al. 2025, section 3.2). Groups without spread fill what is then still missing.
      missing_eos_score: what the method will put in place of the score of a response that never ended; the spread that
        counts is the one after that. Scores are handed on as they are.
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
            steps, ends = (None, None) if step_scores is None else step_scores(sampled, repeated["index"])
            found.append(ScoredRollout(rollout=sampled, scores=scores, step_scores=steps, step_mask=ends))
            if rounds == 1:
                return found[0], repeated["index"], {}
            learned_from = reward_model.replace_unfinished(scores, sampled.terminated, missing_eos_score)
            groups = hosts.fetch(learned_from).reshape(-1, group_size)
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


def of_prompts(reward: RowReward, encoded: batches.Encoded) -> Callable[[Rollout, np.ndarray], Any]:
    """A reward of data rows as one of indices into ``encoded``, which is what a batch of prompts carries."""
    return lambda rollout, index: reward(
        rollout, [row.row for row in mixtures.fetch(encoded.rows, np.asarray(index))]
    )
