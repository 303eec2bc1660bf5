"""What is measured on held-out prompts while a policy is trained, and what ends the run there. Imports all below."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data import batches
from rlhf_jax.errors import InputError, check_range
from rlhf_jax.evaluation import policies
from rlhf_jax.evaluation.policies import RowReward
from rlhf_jax.parallel import hosts
from rlhf_jax.rewards import ensembles
from rlhf_jax.stages.handoffs import Model
from rlhf_jax.stages.rewards import Reward
from rlhf_jax.stages.rollouts import answers, make_rollout
from rlhf_jax.stages.run_directory import Purpose, Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class StopWhen:
    """What ends a run at an evaluation, before its schedule does; the policy of that evaluation is what it leaves.

    kl_above: nats a response to the initial policy; 0: never. alarm: the members of the ensemble that is optimised
    disagree more than on the initial policy's responses (``ensembles.is_raised``); needs 100 held-out responses.
    patience: so many evaluations in a row that bring no new best of ``measure``; 0: never. With it the run leaves the
    policy of the best evaluation, the initial policy's among them, whatever ended it; that policy is kept in memory
    and in checkpoints beside the one in training. measure: "gold", what the embedded data are really after, or
    "held_out", the reward model of ``--held_out_reward_from``, which nothing optimises.
    """

    kl_above: float = 0.0
    alarm: bool = False
    patience: int = 0
    measure: Literal["gold", "held_out"] = "gold"

    def __post_init__(self) -> None:
        check_range(self, "kl_above", "patience", at_least=0)
        if self.measure != "gold" and not self.patience:
            raise InputError(
                f"stop_when.measure is {self.measure!r}, which nothing reads without patience; give "
                "stop_when.patience, or leave it out"
            )

    def __call__(self, found: Mapping[str, float]) -> bool:
        """Whether the numbers of one evaluation end the run, whatever came before."""
        too_far = self.kl_above > 0 and found["eval/kl"] > self.kl_above
        return too_far or (self.alarm and found["eval/alarm"] > 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Best:
    """The best evaluation so far.

    params: what the run leaves of what it trains, as it was then. value: [] float32. step: [] int32, the iteration
    after which it was. since: [] int32, evaluations since then.
    """

    params: Any
    value: jax.Array
    step: jax.Array
    since: jax.Array


def nothing_yet(params: Any) -> Best:
    """Before the first evaluation; ``params`` are those that nobody trains, and are not copied."""
    return Best(
        params=params,
        value=jnp.float32(-math.inf),
        step=jnp.int32(0),
        since=jnp.int32(0),
    )


def follow(best: Best, params: Any, value: float, step: jax.Array) -> Best:
    """``best`` after one more evaluation, of ``params`` after iteration ``step``; a NaN is never the best."""
    value = np.float32(value)
    is_better = bool(value > hosts.fetch(best.value))

    def put(number: Any, like: jax.Array) -> jax.Array:
        return jax.device_put(np.asarray(number, like.dtype), like.sharding)

    if is_better:
        # An update donates what it trains.
        return Best(
            params=jax.tree.map(jnp.copy, params),
            value=put(value, best.value),
            step=put(hosts.fetch(step), best.step),
            since=put(0, best.since),
        )
    return dataclasses.replace(best, since=put(hosts.fetch(best.since) + 1, best.since))


def after(
    stop_when: StopWhen, best: Best | None, params: Any, found: Mapping[str, float], step: jax.Array
) -> tuple[Best | None, bool]:
    """(the best evaluation after one more, whether the run ends there); ``best`` is None without patience.

    params: see `Best`. found: the numbers of the evaluation. step: the iteration after which it is.
    """
    ended = stop_when(found)
    if best is None:
        return None, ended
    best = follow(best, params, found[f"eval/{stop_when.measure}"], step)
    return best, ended or int(best.since) >= stop_when.patience


def left(trained: Any, best: Best | None) -> Any:
    """What a run leaves of what it trained: that of the best evaluation, where it has patience."""
    return trained if best is None else best.params


def facts_of(best: Best | None) -> dict[str, float]:
    """Of a run that leaves its best evaluation: after which iteration that was, and what it measured."""
    return {} if best is None else {"best_iteration": int(best.step), "best_value": float(best.value)}


def check_stop_when(config: Any, *, gold: RowReward | None, held_out: RowReward | None) -> None:
    """Refuses a patience with evaluations that never come, or with a measure that nobody takes.

    ``config``: a stage's; ``stop_when``, ``schedule`` and ``data`` are read.

    Raises:
      InputError: names the option.
    """
    stop_when = config.stop_when
    if not stop_when.patience:
        return
    every, last = config.schedule.eval_every, config.schedule.num_steps
    if not 0 < every < last:
        raise InputError(
            f"config.stop_when.patience is {stop_when.patience} evaluations, and config.schedule.eval_every is {every} "
            f"of {last} iterations, which evaluates the first and the last policy alone; give fewer iterations between "
            "evaluations, above 0"
        )
    if stop_when.measure == "gold" and gold is None:
        raise InputError(
            f"config.stop_when.measure is 'gold', which nobody knows of {config.data.path}; give 'held_out' and "
            "--held_out_reward_from=<run of experiments.reward_model>"
        )
    if stop_when.measure == "held_out" and held_out is None:
        raise InputError(
            "config.stop_when.measure is 'held_out', which needs --held_out_reward_from=<run of "
            "experiments.reward_model>, one that is not optimised"
        )


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
    beside = {f"proxy_{number}": of_rows for number, of_rows in enumerate(reward.each, 1)}
    if reward.held_out is not None:
        beside["held_out"] = reward.held_out
    judge = policies.Judge(
        model=model.config,
        reference={"decoder": model.params["decoder"]},
        reward=reward.of_rows,
        gold=gold,
        tokenizer=model.tokenizer,
        beside=beside,
    )
    sample = policies.make_sampler(judge, config.sampling, run.mesh, batch_size=config.batch_size)
    key = run.key(config.seed, Purpose.EVALUATION)
    alarm_of = (
        make_alarm(run, config, model, held_out, reward.of_members)
        if config.stop_when.alarm
        else lambda _: {}
    )

    def evaluate(params: Any) -> dict[str, float]:
        samples = sample(params, held_out, key)
        found = policies.summarize(samples) | alarm_of(params)
        if reward.judged is not None:
            found |= _of_verdicts(samples)
        return {f"eval/{name}": value for name, value in found.items()}

    return evaluate


def _of_verdicts(samples: Sequence[policies.Sample]) -> dict[str, float]:
    """The mean of the verdicts that there are (of none 0, as of every metric), and the share of what has none."""
    verdicts = [s.proxy for s in samples if not math.isnan(s.proxy)]
    return {
        "proxy": float(np.mean(verdicts)) if verdicts else 0.0,
        "no_verdict": 1.0 - len(verdicts) / len(samples),
    }


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
        said = answers(rollout, params, held_out, key, batch_size=config.batch_size)
        return np.concatenate([hosts.fetch(of_members(part))[:, real] for part, _, real in said], axis=1)

    reference = {"decoder": model.params["decoder"]}
    alarm = ensembles.calibrate_alarm(scores_of(reference, jax.random.fold_in(key, 0)))

    def alarm_of(params: Any) -> dict[str, float]:
        scores = scores_of(params, jax.random.fold_in(key, 1))
        raised = ensembles.is_raised(alarm, scores)
        return {"disagreeing": ensembles.share_above(alarm, scores), "alarm": float(raised)}

    return alarm_of
