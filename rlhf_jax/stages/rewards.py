"""What a stage that samples optimises, and the gold reward that it never sees. Imports all below.

`load_reward` makes one `Reward` of what a config and the command line name; ``rollouts`` and ``evaluations`` ask it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data import batches
from rlhf_jax.data import tokenizer as tokenizers
from rlhf_jax.errors import InputError, check_range
from rlhf_jax.evaluation import policies
from rlhf_jax.evaluation.policies import RowReward
from rlhf_jax.rewards import ensembles, judges, objectives, process, process_model, sentiment, verifiers
from rlhf_jax.rewards import reward_model as reward_models
from rlhf_jax.stages import inputs, judged_rewards, several_rewards
from rlhf_jax.stages.handoffs import (
    Model,
    check_context,
    check_same_family,
    check_scores,
    load_beside,
    load_model,
    place_of,
)
from rlhf_jax.stages.rollouts import Combine
from rlhf_jax.stages.run_directory import Run, inputs_of, runs_of, split_objective
from rlhf_jax.types import Rollout

RewardKind = Literal["model", "answer", "process", "sentiment", "judge"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scoring:
    """How several scores become the one that is optimised; see ``rewards.ensembles`` and ``rewards.process``.

    members: of the reward models of an ensemble, the mean, the lowest, or the mean less ``penalty`` times the variance.
    steps: of a process reward model's P(right), the lowest, the product, or the last.
    weights: of several reward models, one each (``several_rewards``): what is optimised is their weighted sum, each
    reward less its mean and over its standard deviation on what the initial policy says to the held-out prompts.
    """

    members: Literal["mean", "worst_case", "mean_minus_variance"] = "mean"
    penalty: float = 0.5
    steps: Literal["minimum", "product", "last"] = "minimum"
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_range(self, "penalty", at_least=0)
        if self.weights and not any(self.weights):
            raise InputError(
                f"config.scoring.weights is {self.weights}, which rewards nothing; give one that is not 0"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reward:
    """What a stage optimises.

    of_rows: one number a response. of_steps: of a process reward model ``of_steps(rollout, data rows) -> (scores [B, R]
    float32 at the tokens that end steps, where they end [B, R])``; None for every other reward. of_members: of an
    ensemble, the scores of each member [E, B]; None for every other reward. model: the reward model of responses, where
    it is the only one. each, of_each: of several reward models one number a response by each, and of all [K, B];
    combine: what is optimised of the latter, which ``of_rows`` is but for a constraint: there it is the first reward.
    judged: of a judge, what it says of samples (``of_rows`` is NaN where it has no verdict); judge: its process.
    held_out: another reward model of responses, which is measured and not optimised.
    """

    of_rows: RowReward
    of_steps: Callable[[Rollout, Sequence[Any]], tuple[jax.Array, jax.Array]] | None = None
    of_members: Callable[[Rollout], jax.Array] | None = None
    model: Model | None = None
    each: tuple[RowReward, ...] = ()
    of_each: Callable[[Rollout, Sequence[Any]], jax.Array] | None = None
    combine: Combine | None = None
    judged: Callable[[Rollout, Sequence[Any]], judges.Judged] | None = None
    judge: judges.CommandJudge | None = None
    held_out: RowReward | None = None

    @property
    def of_samples(self) -> Callable[[Rollout, Sequence[Any]], Any]:
        """What ``rollouts.make_collect`` asks."""
        return self.judged or self.of_each or self.of_rows

    def close(self) -> None:
        """Ends what was started for it."""
        if self.judge is not None:
            self.judge.close()


def model_reward(reward: Model, scoring: Scoring) -> Reward:
    """The frozen reward model of a run, or an ensemble, its scores shifted by the offset that the run stored."""
    if "ensemble_offsets" not in reward.facts:
        _check_members(reward, scoring)
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


def _check_members(reward: Model, scoring: Scoring) -> None:
    """Refuses a way to join members where there are none."""
    if scoring.members != "mean":
        raise InputError(
            f"config.scoring.members is {scoring.members!r}, and --reward_from={reward.origin} is no ensemble; give "
            "one (experiments.reward_model --config.members=4), or leave it at 'mean'"
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sources:
    """Where rewards come from, by the flags that name them.

    reward_from: runs of reward models, with commas between them, or of a process reward model. held_out_reward_from:
    the run of a reward model that is measured at evaluations and not optimised. judge_from: the run of a language model
    that judges, or a Hugging Face directory.
    """

    reward_from: str = ""
    held_out_reward_from: str = ""
    judge_from: str = ""

    @property
    def inputs(self) -> dict[str, str]:
        """Name -> directory, as ``config.json`` keeps them among a run's inputs."""
        others = {"held_out_reward_from": self.held_out_reward_from, "judge_from": self.judge_from}
        runs = runs_of(self.reward_from, flag="reward_from")
        return inputs_of("reward_from", runs) | {k: v for k, v in others.items() if v}


def load_reward(
    config: Any,
    sources: Sources,
    run: Run,
    model: Model,
    encoded: batches.Encoded,
    held_out: batches.Encoded,
) -> Reward:
    """What a stage optimises, by ``config.reward``, ``scoring``, ``constraint``, ``judge`` and ``answer_weight``.

    Args:
      config: the stage's.
      sources: which runs.
      run: gives the mesh.
      model: the initial policy.
      encoded: training prompts.
      held_out: held-out prompts, on which rewards that are added find their scale.

    Raises:
      InputError: no reward model where one is needed, one of another kind or tokenizer, or prompts without answers.
    """
    names = several_rewards.rewards_of(sources.reward_from)
    several_rewards.check(config, names)
    judged_rewards.check(config, sources.judge_from)
    if config.reward in ("answer", "sentiment", "judge") and names:
        raise InputError(
            f"--reward_from={sources.reward_from} is given, which config.reward={config.reward} does not read; leave "
            "one out"
        )
    if config.reward == "answer" or config.answer_weight:
        _check_answers(config, encoded)
    if config.reward == "judge":
        reward = _judged(config, sources.judge_from, run, model, held_out)
    else:
        reward = _optimised(config, names, run, model, held_out)
    if config.answer_weight:
        reward = with_answer(reward, _answer_reward(model.tokenizer), config.answer_weight)
    if sources.held_out_reward_from:
        # Beside the policy, and not on its base: what it was trained on does not matter.
        beside = load_model(sources.held_out_reward_from, run)
        _check_fits(beside, config, model, flag="held_out_reward_from")
        reward = dataclasses.replace(reward, held_out=model_reward(beside, Scoring()).of_rows)
    return reward


def _optimised(
    config: Any, names: Sequence[str], run: Run, model: Model, held_out: batches.Encoded
) -> Reward:
    if config.reward == "answer":
        return Reward(of_rows=_answer_reward(model.tokenizer))
    if config.reward == "sentiment":
        return Reward(of_rows=sentiment_reward(model.tokenizer))
    is_process = config.reward == "process"
    if not names:
        stage = "process_reward" if is_process else "reward_model"
        raise InputError(
            f"config.reward is {config.reward!r}, which needs --reward_from=<run of experiments.{stage}>"
        )
    if is_process:
        return process_reward(_load(config, names[0], run, model, steps=True), config.scoring)
    if len(names) == 1:
        return model_reward(_load(config, names[0], run, model), config.scoring)
    return _several(config, _parts(config, names, run, model), run, model, held_out)


# Scores of rows by one reward model or by the heads of one trunk, [K, B], and K.
Part = tuple[Callable[[Rollout, Sequence[Any]], jax.Array], int]


def _parts(config: Any, names: Sequence[str], run: Run, model: Model) -> list[Part]:
    """The reward models of ``names``, in order; neighbours that are heads of one run share its trunk."""
    parts: list[Part] = []
    for directory, group in itertools.groupby(names, key=lambda name: split_objective(name)[0]):
        objectives = [split_objective(name)[1] for name in group]
        if objectives[0] and len(objectives) > 1:
            reward = _load(config, directory, run, model, several=True)
            _check_members(reward, config.scoring)
            parts.append((_once(heads_reward(reward, objectives)), len(objectives)))
            continue
        for objective in objectives:
            name = f"{directory}:{objective}" if objective else directory
            of_rows = model_reward(_load(config, name, run, model), config.scoring).of_rows
            parts.append((_once(lambda rollout, rows, of_rows=of_rows: of_rows(rollout, rows)[None]), 1))
    return parts


def _once(
    score: Callable[[Rollout, Sequence[Any]], jax.Array],
) -> Callable[[Rollout, Sequence[Any]], jax.Array]:
    """``score`` that remembers its last answer: an evaluation asks for every reward of a rollout, and for their sum."""
    last: list[Any] = [None, None]

    def of_last(rollout: Rollout, rows: Sequence[Any]) -> jax.Array:
        if last[0] is not rollout:
            last[:] = rollout, score(rollout, rows)
        return last[1]

    return of_last


def heads_reward(reward: Model, objectives: Sequence[str]) -> Callable[[Rollout, Sequence[Any]], jax.Array]:
    """``of_heads(rollout, data rows) -> [K, B]``: the frozen heads of a run that ``objectives`` name, in one pass."""
    places = jnp.array([place_of(reward, name) for name in objectives])
    offsets = jnp.asarray(reward.facts["reward_offsets"], jnp.float32)

    @jax.jit
    def of_heads(params, rollout):
        return reward_models.score_by_objectives(reward.config, params, rollout, offsets=offsets)[places]

    return lambda rollout, rows: of_heads(reward.params, rollout)


def _judged(config: Any, judge_from: str, run: Run, model: Model, held_out: batches.Encoded) -> Reward:
    options = config.judge
    if not judge_from:
        command = judges.CommandJudge(options.command, seconds=options.seconds, failures=options.failures)
        ask = functools.partial(judged_rewards.ask_command, command, model.tokenizer)
        # An evaluation has one response to each prompt, and rows of the same prompt beside one another by chance.
        alone, in_groups = ask(group_size=1), ask(group_size=getattr(config, "group_size", 1))
        return Reward(of_rows=judged_rewards.or_nan(alone), judged=in_groups, judge=command)
    judge = load_model(judge_from, run)
    sizes = {"batch_size": config.batch_size, "group_size": config.group_size}
    return Reward(
        # Within a group some win what others lose: how good a policy is shows against another one.
        of_rows=judged_rewards.beats_initial(judge, options, config, run, model, held_out),
        judged=judged_rewards.ask_model(judge, options, model.tokenizer, run, **sizes),
    )


def _several(config: Any, parts: Sequence[Part], run: Run, model: Model, held_out: batches.Encoded) -> Reward:
    def of_each(rollout: Rollout, rows: Sequence[Any]) -> jax.Array:
        return jnp.concatenate([of_part(rollout, rows) for of_part, _ in parts])

    each = tuple(
        lambda rollout, rows, of_part=of_part, place=place: of_part(rollout, rows)[place]
        for of_part, number in parts
        for place in range(number)
    )

    combine = several_rewards.combined(config, of_each, run, model, held_out)
    constrained = config.constraint.at_least is not None
    return Reward(
        # A multiplier that moves is no measure to compare policies by.
        of_rows=each[0] if constrained else lambda rollout, rows: combine(of_each(rollout, rows), None),
        each=each,
        of_each=of_each,
        combine=combine,
    )


def _load(
    config: Any, origin: str, run: Run, model: Model, *, steps: bool = False, several: bool = False
) -> Model:
    """A reward model of responses, of ``steps``, or with ``several`` heads, that fits the policy's tokenizer and the
    rows' widths."""
    reward = load_beside(origin, run, model, config.lora)
    _check_fits(reward, config, model, steps=steps, several=several)
    return reward


def _check_fits(
    reward: Model,
    config: Any,
    model: Model,
    *,
    steps: bool = False,
    several: bool = False,
    flag: str = "reward_from",
) -> None:
    check_same_family(model, reward)
    check_scores(reward, steps=steps, several=several, flag=flag)
    check_context(reward, config.data.prompt_length + config.data.response_length)


def _check_answers(config: Any, encoded: batches.Encoded) -> None:
    if config.reward == "answer" and config.answer_weight:
        raise InputError(
            f"config.answer_weight is {config.answer_weight}, which config.reward=answer does not read: the answer is "
            "all of that reward; give 0, or another config.reward"
        )
    missing = next((row.row.source for row in encoded.rows if not row.row.answer), None)
    if missing is not None:
        needs = "reward=answer" if config.reward == "answer" else f"answer_weight={config.answer_weight}"
        raise InputError(
            f"{missing} has no answer, which config.{needs} needs; give rows with one, or config.reward=model "
            "and config.answer_weight=0"
        )


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
