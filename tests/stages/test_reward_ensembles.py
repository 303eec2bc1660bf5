"""Ensembles of reward models as an option of the stage: each member is a reward model, and how they are used."""

import dataclasses
import functools
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import checkpoints
from rlhf_jax.errors import InputError
from rlhf_jax.metrics import read_metrics
from rlhf_jax.models import heads
from rlhf_jax.rewards import ensembles
from rlhf_jax.rewards import reward_model as scorer
from rlhf_jax.stages import evaluate, evaluations, grpo, ppo, reward_model, reward_objectives, rewards, sft
from rlhf_jax.stages.handoffs import load_handoff_model
from rlhf_jax.stages.run_directory import changed_inputs
from rlhf_jax.training.interrupt import StopRequest
from rlhf_jax.training.loop import Schedule
from rlhf_jax.training.optimizer import OptimizerConfig
from rlhf_jax.types import DemonstrationBatch, PreferenceBatch, Rollout

from .conftest import DATA, PPO, REWARD, SFT, SHARED

STOP = StopRequest()


def rows_of(workdir):
    return list(read_metrics(pathlib.Path(workdir) / "metrics.jsonl"))


@pytest.fixture(scope="module")
def ensemble(ladder, tmp_path_factory):
    """Three members, trained long enough to disagree."""
    path = tmp_path_factory.mktemp("ensemble")
    config = dataclasses.replace(REWARD, members=3, batch_size=8, schedule=Schedule(num_steps=20))
    reward_model.run(config, path, init_from=ladder.sft, stop=STOP)
    return str(path)


@pytest.fixture(scope="module")
def model(ladder):
    return load_handoff_model(ladder.sft)


def side(rng, rows, vocab):
    response = np.arange(6)[None] < rng.integers(1, 7, (rows, 1))
    return DemonstrationBatch(
        tokens=jnp.asarray(rng.integers(4, vocab, (rows, 9))),
        token_mask=jnp.asarray(np.concatenate([np.ones((rows, 3), bool), response], axis=1)),
        response_mask=jnp.asarray(response),
    )


def test_an_ensemble_of_one_is_the_single_model_and_members_keep_to_their_own_pairs(model):
    """Value and gradient; with three members, member i is trained on pairs i, i + 3, ... and on no others."""
    rng = np.random.default_rng(0)
    pairs = PreferenceBatch(
        chosen=side(rng, 6, model.config.vocab_size), rejected=side(rng, 6, model.config.vocab_size)
    )
    single = {
        number: {
            "decoder": jax.tree.map(lambda x, scale=1 + 0.1 * number: x * scale, model.params["decoder"]),
            "head": heads.init_scalar_head(model.config, jax.random.key(number)),
        }
        for number in range(3)
    }

    def value_of(objective):
        def value(params, batch):
            terms, _ = objective(params, {}, batch)
            return terms["bradley_terry"].total / terms["bradley_terry"].weight

        return jax.jit(jax.value_and_grad(value))

    alone = value_of(reward_objectives.make_objective(model.config, margin=0.1))
    for members in (1, 3):
        together = value_of(reward_objectives.make_ensemble_objective(model.config, members, margin=0.1))
        found, gradients = together(ensembles.stack_members([single[i] for i in range(members)]), pairs)
        values = []
        for i in range(members):
            own = jax.tree.map(lambda x: x[i::members], pairs)  # noqa: B023
            value, gradient = alone(single[i], own)
            values.append(value)
            far = jax.tree.map(
                lambda a, b: float(np.abs(members * a - b).max() / (1e-3 + np.abs(b).max())),  # noqa: B023
                ensembles.member(gradients, i),
                gradient,
            )
            assert max(jax.tree.leaves(far)) < 1e-4, far
        np.testing.assert_allclose(found, np.mean(values), rtol=1e-5)


def test_members_differ_and_the_run_says_by_how_much(ensemble):
    facts = checkpoints.load_handoff(ensemble)[0].facts
    trained = load_handoff_model(ensemble)
    kernels = trained.params["head"]["kernel"]
    assert kernels.shape[0] == 3 and np.abs(np.diff(kernels, axis=0)).max(axis=1).min() > 0.01
    assert len(set(facts["ensemble_offsets"])) == len(facts["member_accuracy"]) == 3
    assert facts["disagreement"] > 0.01 and "reward_offset" not in facts
    # Wide trunks that started as one have parted: each saw other pairs.
    embedding = jax.tree.leaves(trained.params["decoder"])[0]
    assert np.abs(np.diff(embedding, axis=0)).max() > 1e-4


@pytest.mark.parametrize("members", ["mean", "worst_case", "mean_minus_variance"])
def test_the_aggregation_asked_for_is_what_scores(members, ensemble):
    trained = load_handoff_model(ensemble)
    batch = side(np.random.default_rng(1), 4, trained.config.vocab_size)
    rollout = Rollout(
        tokens=batch.tokens,
        token_mask=batch.token_mask,
        response_mask=batch.response_mask,
        log_probs=jnp.zeros((4, 6)),
        terminated=jnp.ones(4, bool),
        policy_step=jnp.int32(0),
    )
    offsets = trained.facts["ensemble_offsets"]
    score = jax.jit(lambda params: scorer.score(trained.config, params, batch))
    each = np.array([score(ensembles.member(trained.params, i)) - offsets[i] for i in range(3)])
    expected = {
        "mean": each.mean(0),
        "worst_case": each.min(0),
        "mean_minus_variance": each.mean(0) - 2.0 * ((each - each.mean(0)) ** 2).mean(0),
    }[members]
    scoring = rewards.Scoring(members=members, penalty=2.0)
    found = rewards.model_reward(trained, scoring).of_rows(rollout, [None] * 4)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_ppo_grpo_and_the_evaluation_take_an_ensemble(ensemble, ladder, tmp_path):
    where = {"init_from": ladder.sft, "reward_from": ensemble}
    proxies = {}
    for members in ("mean", "worst_case"):
        config = dataclasses.replace(
            PPO, scoring=rewards.Scoring(members=members), schedule=Schedule(num_steps=1)
        )
        ppo.run(config, tmp_path / members, stop=STOP, **where)
        proxies[members] = rows_of(tmp_path / members)[0]["eval/proxy"]
    assert proxies["worst_case"] < proxies["mean"] - 1e-3
    config = grpo.Config(
        **(SHARED | {"batch_size": 32, "schedule": Schedule(num_steps=1)}), group_size=4, num_eval_prompts=12
    )
    grpo.run(config, tmp_path / "grpo", stop=STOP, **where)
    summary = evaluate.run(
        evaluate.Config(data=DATA, num_prompts=12, batch_size=16, best_of=2),
        tmp_path / "evaluate",
        reference_from=ladder.sft,
        reward_from=ensemble,
        policies_from={"grpo": str(tmp_path / "grpo")},
        stop=STOP,
    )
    assert summary["best_of_n"]["proxy"] > summary["sft"]["proxy"]


@pytest.mark.slow
def test_pmap_and_micro_batches_give_the_update_of_jit(ladder, tmp_path):
    found = {}
    for parallelism, parts in (("jit", 1), ("pmap", 1), ("jit", 2)):
        config = dataclasses.replace(
            REWARD,
            members=3,
            num_microbatches=parts,
            schedule=Schedule(num_steps=2),
            optimizer=OptimizerConfig(learning_rate=1e-3, schedule="constant"),
        )
        path = tmp_path / f"{parallelism}{parts}"
        reward_model.run(config, path, init_from=ladder.sft, parallelism=parallelism, stop=STOP)
        found[parallelism, parts] = checkpoints.restore_params(checkpoints.handoff_path(path))
    for other in (("pmap", 1), ("jit", 2)):
        # The head's bias cancels in every pair: its gradient is rounding and nothing else.
        far = jax.tree.map(
            lambda a, b: float(np.linalg.norm(a - b) / (1e-2 + np.linalg.norm(a))),
            *(
                {"decoder": params["decoder"], "kernel": params["head"]["kernel"]}
                for params in (found["jit", 1], found[other])
            ),
        )
        assert max(jax.tree.leaves(far)) < 1e-5, far


STOPPING = grpo.Config(
    **(
        SHARED
        | {"batch_size": 32, "schedule": Schedule(num_steps=40, eval_every=2, save_every=40, log_every=3)}
    ),
    group_size=4,
    num_eval_prompts=12,
    eval_responses_per_prompt=10,
    beta=0.0,
)


@pytest.mark.parametrize(
    "stop_when", [evaluations.StopWhen(kl_above=1.0), evaluations.StopWhen(alarm=True)], ids=["kl", "alarm"]
)
def test_a_run_ends_at_the_first_evaluation_that_is_too_much(stop_when, ensemble, ladder, tmp_path):
    """And the same command again ends in the same place, from the checkpoint it left."""
    config = dataclasses.replace(
        STOPPING, stop_when=stop_when, optimizer=OptimizerConfig(learning_rate=2e-2, schedule="constant")
    )
    where = {"init_from": ladder.sft, "reward_from": ensemble}
    grpo.run(config, tmp_path, stop=STOP, **where)
    rows = [row for row in rows_of(tmp_path) if "eval/kl" in row]
    assert rows[-1]["step"] < 40
    if stop_when.alarm:
        assert [row["eval/alarm"] for row in rows] == [0.0] * (len(rows) - 1) + [1.0]
        assert rows[-1]["eval/disagreeing"] > rows[0]["eval/disagreeing"]
    else:
        assert [row["eval/kl"] > 1.0 for row in rows] == [False] * (len(rows) - 1) + [True]
    left, lines = checkpoints.restore_params(checkpoints.handoff_path(tmp_path)), rows_of(tmp_path)
    shutil.rmtree(tmp_path / "handoff")  # as if it had been killed between the checkpoint and the hand-off
    grpo.run(config, tmp_path, stop=STOP, **where)
    assert rows_of(tmp_path) == lines
    jax.tree.map(
        np.testing.assert_array_equal, left, checkpoints.restore_params(checkpoints.handoff_path(tmp_path))
    )


def test_an_alarm_needs_an_ensemble_and_enough_responses(ensemble, ladder, tmp_path):
    config = dataclasses.replace(STOPPING, stop_when=evaluations.StopWhen(alarm=True))
    with pytest.raises(
        InputError, match="config.stop_when.alarm is on, which needs an ensemble; give --reward_from"
    ):
        grpo.run(config, tmp_path / "a", init_from=ladder.sft, reward_from=ladder.reward_model, stop=STOP)
    few = dataclasses.replace(config, eval_responses_per_prompt=1)
    with pytest.raises(
        InputError, match="12 reference rows put fewer than 5 above a share of 0.05: give at least 100"
    ):
        grpo.run(few, tmp_path / "b", init_from=ladder.sft, reward_from=ensemble, stop=STOP)


def test_what_an_ensemble_cannot_do_is_refused():
    with pytest.raises(
        InputError, match="weight_decay is 0.1, which would decay the norm scales of an ensemble too"
    ):
        dataclasses.replace(REWARD, members=2, optimizer=OptimizerConfig(weight_decay=0.1))
    with pytest.raises(InputError, match="penalty is -1.0; it must be at least 0"):
        rewards.Scoring(penalty=-1.0)


def test_members_from_trunks_of_their_own(ladder, tmp_path):
    """At a learning rate of 0 each member is left with the trunk that --init_from names in its place."""
    other = str(tmp_path / "other")
    sft.run(dataclasses.replace(SFT, seed=1), other, stop=STOP)
    frozen = OptimizerConfig(learning_rate=0.0, schedule="constant")
    config = dataclasses.replace(REWARD, members=2, optimizer=frozen, schedule=Schedule(num_steps=1))
    workdir = tmp_path / "both"
    reward_model.run(config, workdir, init_from=f"{other},{ladder.sft}", stop=STOP)
    found = load_handoff_model(workdir).params
    for number, path in enumerate((other, ladder.sft)):
        decoder = load_handoff_model(path).params["decoder"]
        jax.tree.map(np.testing.assert_array_equal, ensembles.member(found, number)["decoder"], decoder)
    handoff, _ = checkpoints.load_handoff(workdir)
    assert handoff.made_from == [other, ladder.sft] and changed_inputs(workdir) == []


def test_trunks_that_fit_no_ensemble_are_refused(ladder, ensemble, tmp_path):
    run = functools.partial(reward_model.run, workdir=tmp_path / "run", stop=STOP)
    three = dataclasses.replace(REWARD, members=3)
    with pytest.raises(
        InputError, match="--init_from names 2 trunks, and config.members is 3; give one trunk"
    ):
        run(three, init_from=f"{ladder.sft},{ladder.sft}")
    with pytest.raises(InputError, match="--init_from names 2 trunks, and config.members is 1"):
        run(REWARD, init_from=f"{ladder.sft},{ladder.sft}")
    with pytest.raises(InputError, match="has a comma with no run before or after it"):
        run(three, init_from=f"{ladder.sft},,{ladder.sft}")
    with pytest.raises(
        InputError, match="is an ensemble of 3 reward models, which has no one decoder to start from"
    ):
        run(dataclasses.replace(REWARD, members=2), init_from=f"{ladder.sft},{ensemble}")
    wide = str(tmp_path / "wide")
    sft.run(dataclasses.replace(SFT, model=dataclasses.replace(SFT.model, mlp_width=48)), wide, stop=STOP)
    with pytest.raises(InputError, match="the models of .* and .*wide differ .*mlp_width: 32 -> 48"):
        run(dataclasses.replace(REWARD, members=2), init_from=f"{ladder.sft},{wide}")
