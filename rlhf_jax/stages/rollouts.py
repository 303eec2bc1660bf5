"""What the stages that sample share: rollouts, rewards, evaluation. Imports all below."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data import batches, mixtures
from rlhf_jax.data import tokenizer as tokenizers
from rlhf_jax.errors import InputError, check_range
from rlhf_jax.evaluation import policies
from rlhf_jax.evaluation.policies import RowReward
from rlhf_jax.metrics import mean_of
from rlhf_jax.parallel import hosts, sharding
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.rewards import ensembles, objectives, process, process_model, reward_model, sentiment, verifiers
from rlhf_jax.sampling.generate import SamplingConfig, generate
from rlhf_jax.stages import inputs
from rlhf_jax.stages.run_directory import (
    Model,
    Purpose,
    Run,
    check_context,
    check_same_family,
    check_scores,
    load_beside,
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class StopWhen:
    """What ends a run at an evaluation, before its schedule does; the policy of that evaluation is what it leaves.

    kl_above: nats a response to the initial policy; 0: never. alarm: the members of the ensemble that is optimised
    disagree more than on the initial policy's responses (``ensembles.is_raised``); needs 100 held-out responses.
    """

    kl_above: float = 0.0
    alarm: bool = False

    def __post_init__(self) -> None:
        check_range(self, "kl_above", at_least=0)

    def __call__(self, found: Mapping[str, float]) -> bool:
        """Whether the numbers of an evaluation end the run."""
        too_far = self.kl_above > 0 and found["eval/kl"] > self.kl_above
        return too_far or (self.alarm and found["eval/alarm"] > 0)


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


def make_evaluate(
    run: Run,
    config: Any,
    model: Model,
    held_out: batches.Encoded,
    *,
    reward: Reward,
    gold: RowReward | None,
) -> Callable[[Any], dict[str, float]]:
    """``evaluate(policy params)``: held-out prompts with the same noise every time, so that only policies differ.

    ``config``: the stage's; ``seed``, ``sampling``, ``batch_size`` and ``stop_when`` are read.
    """
    judge = policies.Judge(
        model=model.config,
        reference={"decoder": model.params["decoder"]},
        reward=reward.of_rows,
        gold=gold,
        tokenizer=model.tokenizer,
    )
    sample = policies.make_sampler(judge, config.sampling, run.mesh, batch_size=config.batch_size)
    key = run.key(config.seed, Purpose.EVALUATION)
    alarm_of = (
        make_alarm(run, config, model, held_out, reward.of_members)
        if config.stop_when.alarm
        else lambda _: {}
    )

    def evaluate(params: Any) -> dict[str, float]:
        found = policies.summarize(sample(params, held_out, key)) | alarm_of(params)
        return {f"eval/{name}": value for name, value in found.items()}

    return evaluate


def make_alarm(
    run: Run, config: Any, model: Model, held_out: batches.Encoded, of_members: Callable | None
) -> Callable[[Any], dict[str, float]]:
    """``alarm_of(policy params)``: the share of responses on which an ensemble disagrees, and whether that is too many.

    Calibrated on the initial policy's responses, which it samples anew, so that a resumed run has the same alarm; later
    policies answer the same prompts with other noise.

    Raises:
      InputError: the reward is no ensemble, or there are too few held-out responses.
    """
    if of_members is None:
        raise InputError(
            "config.stop_when.alarm is on, which needs an ensemble; give --reward_from=<run of "
            "experiments.reward_model with config.members of 2 or more>"
        )
    rollout = make_rollout(run, model, config.sampling)
    key = run.key(config.seed, Purpose.ALARM)

    def scores_of(params: Any, key: jax.Array) -> np.ndarray:
        parts = []
        for number, (batch, real) in enumerate(batches.eval_batches(held_out, config.batch_size)):
            found = hosts.fetch(of_members(rollout(params, batch, jax.random.fold_in(key, number), 0)))
            parts.append(found[:, real])
        return np.concatenate(parts, axis=1)

    reference = {"decoder": model.params["decoder"]}
    alarm = ensembles.calibrate_alarm(scores_of(reference, jax.random.fold_in(key, 0)))

    def alarm_of(params: Any) -> dict[str, float]:
        scores = scores_of(params, jax.random.fold_in(key, 1))
        raised = ensembles.is_raised(alarm, scores)
        return {"disagreeing": ensembles.share_above(alarm, scores), "alarm": float(raised)}

    return alarm_of


def of_prompts(reward: RowReward, encoded: batches.Encoded) -> Callable[[Rollout, np.ndarray], Any]:
    """A reward of data rows as one of indices into ``encoded``, which is what a batch of prompts carries."""
    return lambda rollout, index: reward(
        rollout, [row.row for row in mixtures.fetch(encoded.rows, np.asarray(index))]
    )
