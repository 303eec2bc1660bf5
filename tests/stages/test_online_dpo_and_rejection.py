"""Online DPO and learning from one's own samples: pairs and weights by hand, the stages on a tiny ladder."""

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
from rlhf_jax.stages import online_dpo, rejection
from rlhf_jax.stages.preference_objectives import PreferenceLoss
from rlhf_jax.training.interrupt import StopRequest
from rlhf_jax.training.loop import Schedule
from rlhf_jax.training.optimizer import OptimizerConfig
from rlhf_jax.types import Rollout, ScoredBatch

from .conftest import SHARED

STOP = StopRequest()
BATCH = SHARED | {"batch_size": 32}
ONLINE = online_dpo.Config(**BATCH, group_size=2, num_eval_prompts=12, loss=PreferenceLoss(temperature=0.7))
REJECTION = rejection.Config(**BATCH, group_size=4, num_eval_prompts=12, temperature=0.7)


def params_of(workdir):
    return checkpoints.restore_params(checkpoints.handoff_path(pathlib.Path(workdir)))


def rows_of(workdir):
    return list(read_metrics(pathlib.Path(workdir) / "metrics.jsonl"))


def rollout_of(rows, width=2):
    """Row i holds the token i everywhere."""
    tokens = jnp.broadcast_to(jnp.arange(rows)[:, None], (rows, 1 + width))
    return Rollout(
        tokens=tokens,
        token_mask=jnp.ones((rows, 1 + width), bool),
        response_mask=jnp.ones((rows, width), bool),
        log_probs=jnp.zeros((rows, width)),
        terminated=jnp.ones((rows,), bool),
        policy_step=jnp.int32(0),
    )


def test_a_pair_is_the_best_and_the_worst_of_a_group_and_a_tie_is_marked():
    scores = jnp.array([1.0, 3.0, -2.0, 5.0, 5.0, 5.0, 0.0, 0.0, 2.0])
    pairs, apart = online_dpo.pairs_of(rollout_of(9), scores, 3)
    assert apart.tolist() == [True, False, True]
    assert pairs.chosen.tokens[:, 0].tolist() == [1, 3, 8]
    assert pairs.rejected.tokens[:, 0].tolist() == [2, 3, 6]
    for side in (pairs.chosen, pairs.rejected):
        assert side.response_mask.any(axis=1).tolist() == [True, False, True]


def test_the_first_of_the_best_is_kept_unless_it_is_too_bad():
    scores = jnp.array([1.0, 3.0, 3.0, -1.0, 0.0, 0.0, 0.0, 0.0])
    assert rejection.kept(scores, REJECTION).tolist() == [0, 1, 0, 0, 1, 0, 0, 0]
    picky = dataclasses.replace(REJECTION, min_score=0.5)
    assert rejection.kept(scores, picky).tolist() == [0, 1, 0, 0, 0, 0, 0, 0]


def test_what_a_row_counts_for_by_hand():
    scores = np.array([1.0, 3.0, 0.0, 0.0, 2.0, 2.0, 2.0, 6.0])
    log_probs, ref = np.linspace(-3, -1, 8), np.linspace(-2, -2.5, 8)
    row_scores = lambda kind, **more: rejection.row_scores(  # noqa: E731
        jnp.array(scores),
        jnp.array(log_probs),
        jnp.array(ref),
        dataclasses.replace(REJECTION, kind=kind, **more),
    )
    np.testing.assert_allclose(row_scores("advantage"), [0, 2, -1, -1, -1, -1, -1, 3], atol=1e-6)
    np.testing.assert_allclose(row_scores("reward"), scores)
    target = np.exp(ref + scores / 2.0)
    expected = target / np.mean(target / np.exp(log_probs))
    np.testing.assert_allclose(
        np.exp(row_scores("distribution", weight_temperature=2.0)), expected, rtol=1e-5
    )


def test_weights_that_the_cap_makes_equal_are_counted():
    """By hand: r / T of regressions; log P(y) / q(y) of distribution matching, where rewards are not read again."""
    batch = ScoredBatch(
        responses=None, scores=jnp.array([5.0, 7.0]), behaviour_log_probs=jnp.array([3.0, 3.5])
    )
    for kind, expected in (("reward", [2.5, 3.5]), ("advantage", [2.5, 3.5]), ("distribution", [2.0, 3.5])):
        config = dataclasses.replace(REJECTION, kind=kind, weight_temperature=2.0)
        assert rejection.uncapped_log_weights(batch, config).tolist() == expected


@pytest.mark.parametrize("max_weight", [1e-3, 1e9])
def test_a_run_whose_weights_are_all_capped_says_so(max_weight, ladder, tmp_path):
    config = dataclasses.replace(
        REJECTION, kind="reward", max_weight=max_weight, schedule=Schedule(num_steps=1)
    )
    rejection.run(config, tmp_path, init_from=ladder.sft, reward_from=ladder.reward_model, stop=STOP)
    assert rows_of(tmp_path)[-1]["capped"] == (max_weight < 1)


@pytest.mark.parametrize("reference", ["start", "iteration"])
def test_online_dpo_starts_at_log_two_and_its_reference_is_the_one_asked_for(reference, ladder, tmp_path):
    config = dataclasses.replace(ONLINE, reference=reference, schedule=Schedule(num_steps=3))
    online_dpo.run(config, tmp_path, init_from=ladder.sft, reward_from=ladder.reward_model, stop=STOP)
    rows = rows_of(tmp_path)
    assert abs(rows[1]["kl"]) < 1e-5 and math.isclose(rows[1]["loss"], math.log(2), abs_tol=1e-6)
    # Against the policy that sampled, every first update of an iteration starts at log 2 again.
    again = [math.isclose(row["loss"], math.log(2), abs_tol=1e-6) for row in rows[2:]]
    assert again == [reference == "iteration"] * 2
    assert rows[-1]["eval/kl"] > 1e-4


@pytest.mark.parametrize(
    "kind",
    [
        "best",
        pytest.param("advantage", marks=pytest.mark.slow),
        pytest.param("reward", marks=pytest.mark.slow),
        pytest.param("distribution", marks=pytest.mark.slow),
    ],
)
def test_learning_from_the_better_samples_raises_the_reward(kind, ladder, tmp_path):
    config = dataclasses.replace(
        REJECTION,
        kind=kind,
        schedule=Schedule(num_steps=60),
        optimizer=OptimizerConfig(learning_rate=2e-3, schedule="constant"),
        eval_responses_per_prompt=16,
        batch_size=128,
        **({} if kind == "best" else {"weight_temperature": 0.2}),
    )
    rejection.run(config, tmp_path, init_from=ladder.sft, reward_from=ladder.reward_model, stop=STOP)
    rows = rows_of(tmp_path)
    assert abs(rows[1]["kl"]) < 1e-5
    if kind == "best":
        assert rows[1]["kept"] == 0.25
    assert rows[-1]["eval/proxy"] > rows[0]["eval/proxy"] + 0.2


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["online_dpo", "best", "distribution"])
def test_micro_batches_and_pmap_give_the_update_of_jit(stage, ladder, tmp_path):
    found = {}
    for arguments in (("jit", 1), ("pmap", 1), ("jit", 2)):
        changes = {
            "schedule": Schedule(num_steps=3),
            "optimizer": OptimizerConfig(learning_rate=1e-3, schedule="constant"),
            "num_microbatches": arguments[1],
        }
        where = {"init_from": ladder.sft, "reward_from": ladder.reward_model, "parallelism": arguments[0]}
        if stage == "online_dpo":
            online_dpo.run(
                dataclasses.replace(ONLINE, **changes), tmp_path / f"{arguments}", stop=STOP, **where
            )
        else:
            config = dataclasses.replace(REJECTION, kind=stage, **changes)
            rejection.run(config, tmp_path / f"{arguments}", stop=STOP, **where)
        found[arguments] = params_of(tmp_path / f"{arguments}")
    for arguments in (("pmap", 1), ("jit", 2)):
        far = jax.tree.map(
            lambda a, b: float(np.linalg.norm(a - b) / np.linalg.norm(a)), found["jit", 1], found[arguments]
        )
        assert max(jax.tree.leaves(far)) < 1e-5, far


def test_pairs_and_not_rollouts_are_what_an_update_splits(ladder, tmp_path):
    message = r"config.batch_size / group_size / \(minibatches x microbatches\) is 4, which does not divide over 8 dev"
    with pytest.raises(InputError, match=message):
        config = dataclasses.replace(ONLINE, num_minibatches=4)
        online_dpo.run(config, tmp_path, init_from=ladder.sft, reward_from=ladder.reward_model, stop=STOP)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (ONLINE, {"group_size": 1}, "group_size is 1; it must be at least 2"),
        (
            ONLINE,
            {"loss": PreferenceLoss(kind="kto")},
            "loss.kind is 'kto', which is not for pairs sampled anew",
        ),
        (
            REJECTION,
            {"kind": "reward", "min_score": 0.0},
            "min_score is 0.0, which kind=reward does not read",
        ),
        (REJECTION, {"weight_temperature": 0.0}, "weight_temperature is 0.0; it must be above 0"),
        (REJECTION, {"max_weight": 3.0}, "config.max_weight is 3.0, which kind=best does not read"),
        (
            REJECTION,
            {"kind": "advantage", "group_size": 1},
            "group_size is 1, among which kind=advantage has nothing",
        ),
    ],
)
def test_what_cannot_work_is_refused(config, change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(config, **change)
