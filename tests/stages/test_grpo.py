"""GRPO and its relatives: advantages against loops, dynamic sampling by hand, and the stage on a tiny ladder."""

import dataclasses
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import checkpoints
from rlhf_jax.errors import InputError
from rlhf_jax.metrics import read_metrics
from rlhf_jax.stages import grpo, rollouts
from rlhf_jax.stages.handoffs import load_handoff_model
from rlhf_jax.training.interrupt import Interrupted, StopRequest
from rlhf_jax.training.loop import Schedule
from rlhf_jax.training.optimizer import OptimizerConfig
from rlhf_jax.types import Rollout

from .conftest import SHARED, StopAfter

STOP = StopRequest()
CONFIG = grpo.Config(**(SHARED | {"batch_size": 32}), group_size=4, temperature=0.7, num_eval_prompts=12)
RLOO = {
    "baseline": "leave_one_out",
    "scale_advantages": False,
    "kl_in": "reward",
    "reduction": "sequence_mean_of_token_sums",
}


def params_of(workdir):
    return checkpoints.restore_params(checkpoints.handoff_path(pathlib.Path(workdir)))


def rows_of(workdir):
    return list(read_metrics(pathlib.Path(workdir) / "metrics.jsonl"))


REWARDS = [[1.0, 4.0, 4.0, 3.0], [2.0, 2.0, 2.0, 2.0], [0.0, -1.0, 0.0, 0.0]]


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("baseline", ["group", "leave_one_out", "batch"])
def test_advantages_against_loops(baseline, scale):
    if baseline == "leave_one_out" and scale:
        pytest.skip("refused")
    config = dataclasses.replace(CONFIG, baseline=baseline, scale_advantages=scale)
    everything = [reward for group in REWARDS for reward in group]
    expected = []
    for group in REWARDS:
        for i, reward in enumerate(group):
            others = group[:i] + group[i + 1 :]
            mean = {"group": np.mean(group), "leave_one_out": np.mean(others), "batch": np.mean(everything)}
            spread = np.std(everything) if baseline == "batch" else np.std(group, ddof=1)
            expected.append((reward - mean[baseline]) / (spread + 1e-4 if scale and spread else 1.0))
    found = grpo.advantages_of(jnp.array(REWARDS), config).reshape(-1)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-6)


def make_rollout_of(scores):
    """Rollouts whose first token names the prompt and whose step counts the calls, and a reward that looks it up."""

    def rollout(params, prompts, key, step):
        rows = len(prompts["index"])
        return Rollout(
            tokens=jnp.asarray(prompts["index"])[:, None],
            token_mask=jnp.ones((rows, 1), bool),
            response_mask=jnp.ones((rows, 1), bool),
            log_probs=jnp.zeros((rows, 1)),
            terminated=jnp.ones((rows,), bool),
            policy_step=jnp.int32(step),
        )

    def reward(rollout, index):
        np.testing.assert_array_equal(rollout.tokens[:, 0], index)
        return np.array([scores[i][place % 2] for place, i in enumerate(index)], np.float32)

    return rollout, reward


EQUAL, APART = (1.0, 1.0), (0.0, 1.0)


@pytest.mark.parametrize(
    ("scores", "kept", "rounds", "spread"),
    [
        # Two prompts a round. All with a spread: one round is enough.
        ([APART, APART, EQUAL, EQUAL, EQUAL, EQUAL], [0, 1], 1, 1.0),
        ([APART, EQUAL, EQUAL, APART, EQUAL, EQUAL], [0, 3], 2, 1.0),
        ([EQUAL, EQUAL, EQUAL, APART, APART, APART], [3, 4], 3, 1.0),
        # Prompts run out: what has no spread fills up, in the order in which it was sampled.
        ([EQUAL, EQUAL, EQUAL, APART, EQUAL, EQUAL], [3, 0], 3, 0.5),
    ],
)
def test_dynamic_sampling_goes_on_until_every_group_has_a_spread(scores, kept, rounds, spread):
    rollout, reward = make_rollout_of(scores)
    collect = rollouts.make_collect(rollout, reward, group_size=2, rounds=3)
    prompts = {
        "tokens": np.zeros((6, 1), np.int32),
        "token_mask": np.ones((6, 1), bool),
        "index": np.arange(6),
    }
    scored, index, metrics = collect(None, prompts, jax.random.key(0), 7)
    assert index.tolist() == [i for i in kept for _ in range(2)]
    assert scored.rollout.tokens[:, 0].tolist() == index.tolist()
    assert scored.scores.tolist() == [score for i in kept for score in scores[i]]
    assert int(scored.rollout.policy_step) == 7
    assert float(metrics["rounds"].mean()) == rounds
    assert float(metrics["groups_with_spread"].mean()) == spread


def test_the_spread_that_counts_is_the_one_after_missing_ends_are_scored():
    """By hand: prompt 0 scores 1 and 1, but the second response never ended; prompt 1 scores 0 and 1, neither ended."""
    rollout, reward = make_rollout_of([EQUAL, APART, EQUAL, EQUAL])
    ended = {0: [True, False], 1: [False, False], 2: [True, True], 3: [True, True]}

    def unfinished(params, prompts, key, step):
        found = rollout(params, prompts, key, step)
        terminated = [ended[i][place % 2] for place, i in enumerate(prompts["index"])]
        return dataclasses.replace(found, terminated=jnp.array(terminated))

    prompts = {
        "tokens": np.zeros((4, 1), np.int32),
        "token_mask": np.ones((4, 1), bool),
        "index": np.arange(4),
    }
    for missing, kept in ((-1.0, [0]), (None, [1])):
        collect = rollouts.make_collect(unfinished, reward, group_size=2, rounds=4, missing_eos_score=missing)
        scored, index, metrics = collect(None, prompts, jax.random.key(0), 0)
        assert index.tolist() == kept * 2 and float(metrics["groups_with_spread"].mean()) == 1.0
        assert scored.scores.tolist() == [reward_of for i in kept for reward_of in (EQUAL, APART)[i]], (
            "handed on as they are"
        )


def test_grpo_tells_dynamic_sampling_of_its_missing_ends(ladder):
    config = dataclasses.replace(CONFIG, missing_eos_score=-2.0, rounds=2)
    method = grpo.make_method(load_handoff_model(ladder.sft).config, config)
    assert (method.missing_eos_score, method.rounds) == (-2.0, 2)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        RLOO,
        {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
        {"reduction": "fixed_length_mean", "scale_advantages": False, "kl_in": "loss_k2", "rounds": 2},
    ],
    ids=["grpo", "rloo", "gspo", "dr-grpo-with-rounds"],
)
def test_kl_is_zero_before_the_first_update_and_the_policy_moves(changes, ladder, tmp_path):
    config = dataclasses.replace(CONFIG, schedule=Schedule(num_steps=2), **changes)
    grpo.run(config, tmp_path, init_from=ladder.sft, reward_from=ladder.reward_model, stop=STOP)
    start, first, second = rows_of(tmp_path)
    assert abs(first["kl"]) < 1e-5 and abs(start["eval/kl"]) < 1e-5
    assert first["approx_kl"] < 1e-9, "the first update is on-policy"
    assert first["sampler_gap"] < 1e-5
    assert second["eval/kl"] > 1e-6
    if "loss/kl" in first:
        assert abs(first["loss/kl"]) < 1e-9 and second["loss/kl"] > 0


@pytest.mark.slow
def test_micro_batches_and_pmap_give_the_update_of_jit(ladder, tmp_path):
    found = {}
    for arguments in (("jit", 1), ("pmap", 1), ("jit", 2)):
        config = dataclasses.replace(
            CONFIG,
            schedule=Schedule(num_steps=3),
            optimizer=OptimizerConfig(learning_rate=1e-3, schedule="constant"),
            num_microbatches=arguments[1],
        )
        where = {"init_from": ladder.sft, "reward_from": ladder.reward_model, "parallelism": arguments[0]}
        grpo.run(config, tmp_path / f"{arguments}", stop=STOP, **where)
        found[arguments] = params_of(tmp_path / f"{arguments}")
    for arguments in (("pmap", 1), ("jit", 2)):
        far = jax.tree.map(
            lambda a, b: float(np.linalg.norm(a - b) / np.linalg.norm(a)), found["jit", 1], found[arguments]
        )
        assert max(jax.tree.leaves(far)) < 1e-5, far


def test_a_stopped_run_ends_in_the_bits_of_an_undisturbed_one(ladder, tmp_path):
    config = dataclasses.replace(CONFIG, rounds=2)
    where = {"init_from": ladder.sft, "reward_from": ladder.reward_model}
    grpo.run(config, tmp_path / "whole", stop=STOP, **where)
    with pytest.raises(Interrupted):
        grpo.run(config, tmp_path / "stopped", stop=StopAfter(2), **where)
    grpo.run(config, tmp_path / "stopped", stop=STOP, **where)
    jax.tree.map(
        np.testing.assert_array_equal, params_of(tmp_path / "whole"), params_of(tmp_path / "stopped")
    )
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "stopped")


@pytest.mark.slow
def test_the_penalty_in_the_reward_keeps_the_policy_near(ladder, tmp_path):
    kl = {}
    for beta in (0.0, 5.0):
        config = dataclasses.replace(
            CONFIG,
            schedule=Schedule(num_steps=30),
            optimizer=OptimizerConfig(learning_rate=2e-3, schedule="constant"),
            beta=beta,
            **RLOO,
        )
        grpo.run(
            config, tmp_path / f"{beta}", init_from=ladder.sft, reward_from=ladder.reward_model, stop=STOP
        )
        kl[beta] = rows_of(tmp_path / f"{beta}")[-1]["eval/kl"]
    assert kl[5.0] < 0.5 * kl[0.0] and math.isfinite(kl[0.0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"group_size": 1},
            "group_size is 1: a group of one is its own baseline and teaches nothing; give 2",
        ),
        ({"baseline": "leave_one_out"}, "scale_advantages is True, which baseline=leave_one_out does not do"),
        ({"beta": -1.0}, "beta is -1.0; it must be at least 0"),
    ],
)
def test_what_cannot_work_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_a_batch_that_does_not_divide_into_groups_is_refused(ladder, tmp_path):
    config = dataclasses.replace(CONFIG, group_size=3)
    with pytest.raises(InputError, match="batch_size is 32, which does not divide into groups of 3; change"):
        grpo.run(config, tmp_path, init_from=ladder.sft, reward_from=ladder.reward_model, stop=STOP)


def test_rewards_that_are_not_there_are_refused(ladder, tmp_path):
    with pytest.raises(InputError, match="config.reward is 'model', which needs --reward_from"):
        grpo.run(CONFIG, tmp_path / "a", init_from=ladder.sft, stop=STOP)
    with pytest.raises(
        InputError, match="world:prompts/train/0 has no answer, which config.reward=answer needs"
    ):
        grpo.run(
            dataclasses.replace(CONFIG, reward="answer"), tmp_path / "b", init_from=ladder.sft, stop=STOP
        )
