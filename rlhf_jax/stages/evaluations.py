"""What is measured on held-out prompts while a policy is trained, and what ends the run there. Imports all below."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from rlhf_jax.data import batches
from rlhf_jax.errors import InputError, check_range
from rlhf_jax.evaluation import policies
from rlhf_jax.evaluation.policies import RowReward
from rlhf_jax.parallel import hosts
from rlhf_jax.rewards import ensembles
from rlhf_jax.stages.rewards import Reward
from rlhf_jax.stages.rollouts import make_rollout
from rlhf_jax.stages.run_directory import Model, Purpose, Run


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
