"""What a stage that samples optimises, and the gold reward that it never sees. Imports all below.

`load_reward` makes one `Reward` of what a config and the command line name; ``rollouts`` and ``evaluations`` ask it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data import tokenizer as tokenizers
from rlhf_jax.errors import InputError, check_range
from rlhf_jax.evaluation import policies
from rlhf_jax.evaluation.policies import RowReward
from rlhf_jax.rewards import ensembles, objectives, process, process_model, sentiment, verifiers
from rlhf_jax.stages import inputs
from rlhf_jax.stages.run_directory import (
    Model,
    Run,
    check_context,
    check_same_family,
    check_scores,
    load_beside,
)
from rlhf_jax.types import Rollout

RewardKind = Literal["model", "answer", "process", "sentiment"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scoring:
    """How several scores become the one that is optimised; see ``rewards.ensembles`` and ``rewards.process``.

    members: of the reward models of an ensemble, the mean, the lowest, or the mean less ``penalty`` times the variance.
    steps: of a process reward model's P(right), the lowest, the product, or the last.
    """

    members: Literal["mean", "worst_case", "mean_minus_variance"] = "mean"
    penalty: float = 0.5
    steps: Literal["minimum", "product", "last"] = "minimum"

    def __post_init__(self) -> None:
        check_range(self, "penalty", at_least=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reward:
    """What a stage optimises.

    of_rows: one number a response. of_steps: of a process reward model ``of_steps(rollout, data rows) -> (scores [B, R]
    float32 at the tokens that end steps, where they end [B, R])``; None for every other reward. of_members: of an
    ensemble, the scores of each member [E, B]; None for every other reward. model: the reward model of responses, where
    it is one.
    """

    of_rows: RowReward
    of_steps: Callable[[Rollout, Sequence[Any]], tuple[jax.Array, jax.Array]] | None = None
    of_members: Callable[[Rollout], jax.Array] | None = None
    model: Model | None = None


def model_reward(reward: Model, scoring: Scoring) -> Reward:
    """The frozen reward model of a run, or an ensemble, its scores shifted by the offset that the run stored."""
    if "ensemble_offsets" not in reward.facts:
        if scoring.members != "mean":
            raise InputError(
                f"config.scoring.members is {scoring.members!r}, and --reward_from={reward.origin} is one reward "
                "model; give an ensemble (experiments.reward_model --config.members=4), or leave it at 'mean'"
            )
        offset = float(reward.facts["reward_offset"])
        of_rows = policies.model_reward(reward.config, reward.params, offset)
        return Reward(of_rows=of_rows, model=reward)
    aggregate = {
        "mean": ensembles.mean_score,
        "worst_case": ensembles.worst_case_score,
        "mean_minus_variance": functools.partial(ensembles.mean_minus_variance, penalty=scoring.penalty),
    }[scoring.members]
    offsets = jnp.asarray(reward.facts["ensemble_offsets"], jnp.float32)

    @jax.jit
    def of_members(params, rollout):
        return ensembles.score(reward.config, params, rollout, offsets=offsets)

    @jax.jit
    def of_rows(params, rollout):
        return aggregate(of_members(params, rollout))

    return Reward(
        of_rows=lambda rollout, rows: of_rows(reward.params, rollout),
        of_members=lambda rollout: of_members(reward.params, rollout),
        model=reward,
    )


def first_member(reward: Model) -> tuple[Any, float]:
    """Params and offset of a reward model, or of the first of an ensemble."""
    offsets = reward.facts.get("ensemble_offsets")
    if offsets is None:
        return reward.params, float(reward.facts["reward_offset"])
    return ensembles.member(reward.params, 0), float(offsets[0])


def process_reward(reward: Model, scoring: Scoring) -> Reward:
    """The frozen process reward model of a run: P(right) of every step, and one number for the response."""
    marks = tokenizers.tokens_with(reward.tokenizer, reward.facts["step_mark"])
    marks = jnp.asarray(np.pad(marks, (0, reward.config.vocab_size - len(marks))))
    aggregate = {
        "minimum": process.minimum_over_steps,
        "product": process.product_over_steps,
        "last": process.last_step,
    }[scoring.steps]

    @jax.jit
    def of_steps(params, rollout):
        return process_model.step_scores(reward.config, params, rollout, marks)

    @jax.jit
    def of_rows(params, rollout):
        return aggregate(*process_model.step_scores(reward.config, params, rollout, marks))

    return Reward(
        of_rows=lambda rollout, rows: of_rows(reward.params, rollout),
        of_steps=lambda rollout, rows: of_steps(reward.params, rollout),
    )


def with_answer(reward: Reward, answer: RowReward, weight: float) -> Reward:
    """``reward`` plus ``weight`` times ``answer``, which is one number a response; of steps the last one gets it.

    What judges steps alone can be pleased by a good step and an early end; the answer cannot.
    """

    def of_rows(rollout: Rollout, rows: Sequence[Any]) -> jax.Array:
        scores = jnp.stack([jnp.asarray(part(rollout, rows)) for part in (reward.of_rows, answer)])
        return objectives.weighted_sum(scores, jnp.array([1.0, weight]))

    def of_steps(rollout: Rollout, rows: Sequence[Any]) -> tuple[jax.Array, jax.Array]:
        scores, ends = reward.of_steps(rollout, rows)
        last = ends & (jnp.cumsum(ends[:, ::-1], axis=1)[:, ::-1] == 1)
        return scores + jnp.where(last, weight * jnp.asarray(answer(rollout, rows))[:, None], 0.0), ends

    return dataclasses.replace(reward, of_rows=of_rows, of_steps=of_steps if reward.of_steps else None)


def load_reward(config: Any, reward_from: str, run: Run, model: Model, encoded: Any) -> Reward:
    """What a stage optimises, by ``config.reward``, ``config.scoring`` and ``config.answer_weight``.

    Raises:
      InputError: no reward model where one is needed, one of another kind or tokenizer, or prompts without answers.
    """
    if config.reward in ("answer", "sentiment") and reward_from:
        raise InputError(
            f"--reward_from={reward_from} is given, which config.reward={config.reward} does not read; leave one out"
        )
    if config.reward == "answer" and config.answer_weight:
        raise InputError(
            f"config.answer_weight is {config.answer_weight}, which config.reward=answer does not read: the answer is "
            "all of that reward; give 0, or another config.reward"
        )
    if config.reward == "answer" or config.answer_weight:
        missing = next((row.row.source for row in encoded.rows if not row.row.answer), None)
        if missing is not None:
            needs = "reward=answer" if config.reward == "answer" else f"answer_weight={config.answer_weight}"
            raise InputError(
                f"{missing} has no answer, which config.{needs} needs; give rows with one, or config.reward=model "
                "and config.answer_weight=0"
            )
    if config.reward == "answer":
        return Reward(of_rows=_answer_reward(model.tokenizer))
    if config.reward == "sentiment":
        reward = Reward(of_rows=sentiment_reward(model.tokenizer))
    else:
        reward = _load_model_reward(config, reward_from, run, model)
    if not config.answer_weight:
        return reward
    return with_answer(reward, _answer_reward(model.tokenizer), config.answer_weight)


def _load_model_reward(config: Any, reward_from: str, run: Run, model: Model) -> Reward:
    is_process = config.reward == "process"
    if not reward_from:
        stage = "process_reward" if is_process else "reward_model"
        raise InputError(
            f"config.reward is {config.reward!r}, which needs --reward_from=<run of experiments.{stage}>"
        )
    reward = load_beside(reward_from, run, model, config.lora)
    check_same_family(model, reward)
    check_scores(reward, steps=is_process)
    check_context(reward, config.data.prompt_length + config.data.response_length)
    if is_process:
        return process_reward(reward, config.scoring)
    return model_reward(reward, config.scoring)


def _answer_reward(tokenizer: Any) -> RowReward:
    return policies.text_reward(
        tokenizer, lambda row, response, ended: float(verifiers.gsm8k_reward([response], [row.answer])[0])
    )


def sentiment_reward(tokenizer: Any) -> RowReward:
    """How happy a response sounds (``rewards.sentiment``)."""
    return policies.text_reward(
        tokenizer, lambda row, response, ended: float(sentiment.sentiment_reward([response])[0])
    )


def gold_reward(data: inputs.DataConfig, tokenizer: Any) -> RowReward | None:
    """What the embedded data are really after, to measure whatever is trained on; None for files, where nobody knows.

    The reviews' gold reward; of the sums, whether the answer is right.
    """
    if not data.path and data.embedded == "arithmetic":
        return _answer_reward(tokenizer)
    gold = inputs.gold_reward(data)
    if gold is None:
        return None
    return policies.text_reward(tokenizer, lambda row, response, ended: gold(row.prompt, response, ended))
