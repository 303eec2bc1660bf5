"""Several reward models in a stage: one scale for a sum, a multiplier that follows its rule, what is refused."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import checkpoints
from rlhf_jax.data import batches, world
from rlhf_jax.errors import InputError
from rlhf_jax.metrics import read_metrics
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.stages import grpo, online_dpo, ppo, rejection, reward_model, rewards, search, several_rewards
from rlhf_jax.stages.handoffs import load_handoff_model
from rlhf_jax.stages.run_directory import Run
from rlhf_jax.stages.several_rewards import Constraint
from rlhf_jax.training.interrupt import Interrupted, StopRequest
from rlhf_jax.training.loop import Schedule

from .conftest import DATA, PPO, REWARD, SHARED, WORLD, StopAfter

STOP = StopRequest()
BATCH = SHARED | {"batch_size": 32, "schedule": Schedule(num_steps=3)}
BOUND = {"constraint": Constraint(at_least=0.5, rate=0.4, limit=0.7), "num_eval_prompts": 12}
STAGES = {
    "grpo": (grpo, grpo.Config(**BATCH, **BOUND, group_size=4)),
    "online_dpo": (online_dpo, online_dpo.Config(**BATCH, **BOUND)),
    "rejection": (rejection, rejection.Config(**BATCH, **BOUND, group_size=4)),
}


def rows_of(workdir):
    return list(read_metrics(pathlib.Path(workdir) / "metrics.jsonl"))


@pytest.fixture(scope="module")
def both(ladder, tmp_path_factory) -> str:
    """The ladder's reward model, and one of labellers who prefer the shorter response."""
    brief = dataclasses.replace(DATA, world=dataclasses.replace(WORLD, length_bias=-1.0))
    workdir = tmp_path_factory.mktemp("brief")
    reward_model.run(dataclasses.replace(REWARD, data=brief), workdir, init_from=ladder.sft, stop=STOP)
    return f"{ladder.reward_model},{workdir}"


@pytest.mark.parametrize(
    "stage", ["grpo", *(pytest.param(stage, marks=pytest.mark.slow) for stage in ("online_dpo", "rejection"))]
)
def test_the_multiplier_follows_the_shortfall_and_the_reward_the_multiplier(stage, both, ladder, tmp_path):
    """The Lagrangian is linear in the two rewards, so that it holds of the means that are written."""
    module, config = STAGES[stage]
    module.run(config, tmp_path, init_from=ladder.sft, reward_from=both, stop=STOP)
    rows, multiplier = rows_of(tmp_path), 0.0
    assert rows[0]["eval/proxy"] == rows[0]["eval/proxy_1"] != rows[0]["eval/proxy_2"]
    for row in rows[1:]:
        assert row["multiplier"] == pytest.approx(multiplier, rel=1e-6)
        expected = (row["proxy_1"] + multiplier * (row["proxy_2"] - 0.5)) / (1 + multiplier)
        # Terms of the scores' unit, 1, that may cancel.
        assert row["proxy"] == pytest.approx(expected, rel=1e-5, abs=1e-6)
        multiplier = min(max(multiplier + 0.4 * (0.5 - row["proxy_2"]), 0.0), 0.7)
    assert multiplier > 0, "the constraint is broken at the start, or this test says nothing"


@pytest.mark.slow
def test_a_multiplier_survives_two_interruptions_bitwise(both, ladder, tmp_path):
    config = dataclasses.replace(PPO, constraint=Constraint(at_least=0.5))
    run = functools.partial(ppo.run, config, init_from=ladder.sft, reward_from=both)
    run(tmp_path / "whole", stop=STOP)
    for _ in range(2):
        with pytest.raises(Interrupted):
            run(tmp_path / "halves", stop=StopAfter(1))
    run(tmp_path / "halves", stop=STOP)
    whole, halves = (tmp_path / name for name in ("whole", "halves"))
    assert (halves / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    jax.tree.map(
        np.testing.assert_array_equal,
        *(checkpoints.restore_params(checkpoints.handoff_path(path)) for path in (whole, halves)),
    )
    assert rows_of(whole)[-1]["multiplier"] > 0


def run_on(tmp_path):
    return Run(workdir=tmp_path, stage="grpo", mesh=meshes.data_mesh(), parallelism="jit", stop=STOP)


def encoded_prompts(model, count):
    rows = world.prompts(dataclasses.replace(WORLD, num_eval_prompts=count), "eval")
    encoded, _ = batches.encode_prompts(
        rows, model.tokenizer, prompt_length=DATA.prompt_length, truncation=DATA.truncation
    )
    return encoded


def test_weights_are_of_rewards_in_the_unit_of_the_initial_policy(ladder, tmp_path):
    """A reward in other units, from another zero, changes nothing; 20 prompts leave a batch half filled up."""
    model, seen = load_handoff_model(ladder.sft, meshes.data_mesh()), []

    def each(rollout, rows):
        lengths = rollout.response_mask.sum(axis=1).astype(jnp.float32)
        seen.append(np.asarray(jnp.stack([lengths, rollout.tokens[:, -20] * 1.0])))
        return jnp.asarray(seen[-1] * np.array([[1000.0], [-0.01]]) + 7.0, jnp.float32)

    config = dataclasses.replace(
        STAGES["grpo"][1], constraint=Constraint(), scoring=rewards.Scoring(weights=(2.0, 3.0))
    )
    combine = several_rewards.combined(config, each, run_on(tmp_path), model, encoded_prompts(model, 40))
    initial = np.concatenate(seen, axis=1)[:, :40].astype(np.float64)
    standard = (initial - initial.mean(axis=1, keepdims=True)) / initial.std(axis=1, keepdims=True)
    found = combine(jnp.asarray(initial * np.array([[1000.0], [-0.01]]) + 7.0, jnp.float32), None)
    np.testing.assert_allclose(found, 2 * standard[0] - 3 * standard[1], atol=2e-4)
    with pytest.raises(InputError, match=r"reward 2 of --reward_from gives each of 40 responses .* \(4\)"):
        constant = lambda rollout, rows: each(rollout, rows) * jnp.array([[1.0], [0.0]]) + 4.0  # noqa: E731
        several_rewards.combined(config, constant, run_on(tmp_path), model, encoded_prompts(model, 40))


def test_a_stage_optimises_the_weighted_sum_and_reports_each(both, ladder, tmp_path):
    """Twice the same reward model, weights w and 1 - w: the standard score, whatever w; and -w and w: nothing."""
    one = ladder.reward_model
    config = dataclasses.replace(STAGES["grpo"][1], constraint=Constraint(), schedule=Schedule(num_steps=1))
    found = {}
    for weights in ((0.25, 0.75), (1.0, 0.0), (-1.0, 1.0)):
        weighted = dataclasses.replace(config, scoring=rewards.Scoring(weights=weights))
        workdir = tmp_path / str(weights)
        grpo.run(weighted, workdir, init_from=ladder.sft, reward_from=f"{one},{one}", stop=STOP)
        found[weights] = rows_of(workdir)[-1]
        assert found[weights]["proxy_1"] == found[weights]["proxy_2"]
    assert found[0.25, 0.75]["proxy"] == pytest.approx(found[1.0, 0.0]["proxy"], abs=1e-5)
    assert found[-1.0, 1.0]["proxy"] == pytest.approx(0.0, abs=1e-5)
    assert found[-1.0, 1.0]["no_spread"] == 1.0
    assert found[1.0, 0.0]["proxy"] != pytest.approx(found[1.0, 0.0]["proxy_1"], abs=1e-2)


WEIGHTS = rewards.Scoring(weights=(1.0, 2.0))
REFUSED = [
    ({}, "a,b", "config.scoring.weights has 0 numbers, and --reward_from names 2 rewards"),
    ({"scoring": WEIGHTS}, "a,b,c", "weights has 2 numbers, and --reward_from names 3 rewards"),
    ({"scoring": WEIGHTS}, "a", "weights is given, which needs several rewards, .*=model has 1"),
    ({"scoring": WEIGHTS, "reward": "sentiment"}, "", "=sentiment has none of them"),
    ({"constraint": Constraint(at_least=0.0)}, "a,b,c", "binds the second of two .* names 3"),
    ({"constraint": Constraint(at_least=0.0)}, "a", "at_least is given, which needs several"),
    ({"constraint": Constraint(at_least=0.0), "scoring": WEIGHTS}, "a,b", "are both given"),
    ({"scoring": WEIGHTS, "answer_weight": 1.0}, "a,b", "answer_weight is 1.0, and --reward_from names 2"),
    ({"reward": "process"}, "a,b", "names 2 rewards, and config.reward=process takes one"),
    ({}, "a,,b", "has a comma with no run before or after it"),
]


@pytest.mark.parametrize(("change", "reward_from", "message"), REFUSED)
def test_what_nothing_combines_is_refused(change, reward_from, message):
    config = dataclasses.replace(STAGES["grpo"][1], constraint=Constraint())
    with pytest.raises(InputError, match=message):
        several_rewards.check(dataclasses.replace(config, **change), several_rewards.rewards_of(reward_from))


def test_options_that_would_do_nothing_are_refused():
    with pytest.raises(InputError, match="constraint.rate is 0.5, which nothing reads without one"):
        Constraint(rate=0.5)
    with pytest.raises(InputError, match=r"weights is \(0.0, 0.0\), which rewards nothing"):
        rewards.Scoring(weights=(0.0, 0.0))
    with pytest.raises(InputError, match="a search asks one process reward model; leave it out"):
        search.Config(scoring=WEIGHTS)
