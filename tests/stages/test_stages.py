"""Each stage does what its algorithm says, on a ladder small enough for tests."""

import dataclasses
import json
import math
import pathlib
import shutil

import jax
import numpy as np
import pytest

from rlhf_jax import checkpoints
from rlhf_jax.errors import InputError
from rlhf_jax.metrics import mean_of, read_metrics
from rlhf_jax.stages import dpo, evaluate, online, ppo, reward_model, reward_objectives, sft
from rlhf_jax.stages.preference_objectives import PreferenceLoss
from rlhf_jax.stages.run_directory import changed_inputs
from rlhf_jax.training.interrupt import StopRequest
from rlhf_jax.training.loop import Schedule
from rlhf_jax.training.optimizer import OptimizerConfig

from .conftest import DATA, DPO, PPO, REWARD, SFT, WORLD

STOP = StopRequest()
ONE_STEP = Schedule(num_steps=1)


def params_of(workdir):
    return checkpoints.restore_params(checkpoints.handoff_path(pathlib.Path(workdir)))


def rows_of(workdir):
    return list(read_metrics(pathlib.Path(workdir) / "metrics.jsonl"))


def test_kl_is_zero_before_the_first_update_at_any_temperature(ladder, tmp_path):
    assert PPO.temperature != 1
    config = dataclasses.replace(PPO, schedule=ONE_STEP)
    ppo.run(config, tmp_path, init_from=ladder.sft, reward_from=ladder.reward_model, stop=STOP)
    start, first = rows_of(tmp_path)
    assert abs(first["kl"]) < 1e-5
    assert abs(start["eval/kl"]) < 1e-5
    assert first["sampler_gap"] < 1e-5
    # The first of the four updates is on-policy, so the mean over them moves only by the other three.
    assert first["approx_kl"] > 0


def test_dpo_starts_at_log_two_and_learns_the_training_pairs(ladder, tmp_path):
    config = dataclasses.replace(DPO, schedule=Schedule(num_steps=20), loss=PreferenceLoss(beta=1.0))
    dpo.run(config, tmp_path, init_from=ladder.sft, stop=STOP)
    rows = rows_of(tmp_path)
    assert rows[0]["eval/margin"] == 0
    assert math.isclose(rows[1]["loss"], math.log(2), abs_tol=1e-6)
    assert np.mean([row["loss"] for row in rows[-4:]]) < 0.5


def test_sft_learns(ladder, tmp_path):
    config = dataclasses.replace(SFT, schedule=Schedule(num_steps=30))
    sft.run(config, tmp_path, stop=STOP)
    rows = rows_of(tmp_path)
    assert abs(rows[0]["eval/nll"] - math.log(WORLD_VOCABULARY)) < 0.2, "fresh weights are nearly uniform"
    assert rows[-1]["eval/nll"] < rows[0]["eval/nll"] - 1.2


def test_reward_model_learns_length_where_the_labeller_likes_it(ladder, tmp_path):
    world = dataclasses.replace(
        WORLD, length_bias=20.0, noise=0.0, num_preferences=512, num_eval_preferences=64
    )
    config = dataclasses.replace(
        REWARD, data=dataclasses.replace(DATA, world=world), schedule=Schedule(num_steps=60), batch_size=32
    )
    reward_model.run(config, tmp_path, init_from=ladder.sft, stop=STOP)
    facts = checkpoints.load_handoff(tmp_path)[0].facts
    assert facts["longer_wins"] > 0.9
    assert facts["eval/accuracy"] > 0.8
    assert facts["bayes_accuracy"] > 0.97


def test_a_soft_label_is_the_cross_entropy_to_it(ladder):
    """Against the formula on the scores of either side, one number a pair; a certain label is a hard one."""
    from rlhf_jax.data import batches, world
    from rlhf_jax.models.config import ModelConfig
    from rlhf_jax.rewards import reward_model as rewards

    model = ModelConfig.from_dict(checkpoints.load_handoff(ladder.reward_model)[0].model)
    params = params_of(ladder.reward_model)
    encoded, _ = batches.encode_preferences(
        world.preferences(WORLD, "train"), world.world_tokenizer(), **DATA.widths
    )
    batch, _ = next(iter(batches.eval_batches(encoded, 8)))
    hard = dataclasses.replace(batch, probability=None)
    soft = np.array([0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 0.75, 0.55], np.float32)
    objective = jax.jit(
        lambda b: reward_objectives.make_objective(model)(params, {}, b)[0]["bradley_terry"].mean()
    )
    chosen, rejected = (
        np.asarray(rewards.score(model, params, side)) for side in (batch.chosen, batch.rejected)
    )
    right = 1 / (1 + np.exp(rejected - chosen))
    expected = -(soft * np.log(right) + (1 - soft) * np.log(1 - right)).mean()
    assert math.isclose(objective(dataclasses.replace(hard, probability=soft)), expected, rel_tol=1e-5)
    certain = dataclasses.replace(hard, probability=np.ones(8, np.float32))
    assert math.isclose(objective(certain), objective(hard), rel_tol=1e-6)


def test_the_offset_makes_reference_responses_average_zero(ladder):
    """Recomputed from the hand-off alone, against chosen training responses scored one by one."""
    from rlhf_jax.data import batches, world
    from rlhf_jax.models.config import ModelConfig
    from rlhf_jax.rewards import reward_model as rewards

    handoff, _ = checkpoints.load_handoff(ladder.reward_model)
    encoded, _ = batches.encode_preferences(
        world.preferences(WORLD, "train"), world.world_tokenizer(), **DATA.widths
    )
    scores = [
        rewards.score(
            ModelConfig.from_dict(handoff.model),
            params_of(ladder.reward_model),
            batch.chosen,
            offset=handoff.facts["reward_offset"],
        )
        for batch, _ in batches.eval_batches(encoded, 16)
    ]
    assert abs(float(np.mean(scores))) < 1e-5


def test_a_tiny_learning_rate_moves_policies_and_never_the_frozen_roles(ladder, tmp_path):
    before = jax.device_get(params_of(ladder.sft)), jax.device_get(params_of(ladder.reward_model))
    config = dataclasses.replace(PPO, schedule=ONE_STEP)
    ppo.run(config, tmp_path / "ppo", init_from=ladder.sft, reward_from=ladder.reward_model, stop=STOP)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before[0], params_of(tmp_path / "ppo"))
    assert all(change > 0 for change in jax.tree.leaves(moved))
    after = params_of(ladder.sft), params_of(ladder.reward_model)
    jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.parametrize("stage", ["sft", "dpo", pytest.param("ppo", marks=pytest.mark.slow)])
def test_pmap_and_micro_batches_give_the_update_of_jit(stage, ladder, tmp_path):
    """Over eight devices; micro-batches of the PPO minibatches too."""

    def run(name, parallelism, parts):
        optimizer = OptimizerConfig(learning_rate=1e-3, schedule="constant")
        changes = {"schedule": Schedule(num_steps=3), "num_microbatches": parts, "optimizer": optimizer}
        start = {"stop": STOP, "parallelism": parallelism}
        if stage == "sft":
            sft.run(dataclasses.replace(SFT, **changes), tmp_path / name, **start)
        elif stage == "dpo":
            dpo.run(dataclasses.replace(DPO, **changes), tmp_path / name, init_from=ladder.sft, **start)
        else:
            config = dataclasses.replace(PPO, num_minibatches=1, **changes)
            where = {"init_from": ladder.sft, "reward_from": ladder.reward_model}
            ppo.run(config, tmp_path / name, **where, **start)
        return params_of(tmp_path / name)

    expected = run("jit", "jit", 1)
    for arguments in (("pmap", 1), ("jit", 2)):
        found = run(f"{arguments}", *arguments)
        far = jax.tree.map(lambda a, b: float(np.linalg.norm(a - b) / np.linalg.norm(a)), expected, found)
        # Adam divides a gradient by its own size: where one is nearly 0, rounding shows in single elements.
        assert max(jax.tree.leaves(far)) < 1e-5, far


def test_adaptive_beta_follows_the_observed_kl(ladder, tmp_path):
    config = dataclasses.replace(PPO, schedule=Schedule(num_steps=3), adaptive_kl_horizon=100)
    ppo.run(config, tmp_path, init_from=ladder.sft, reward_from=ladder.reward_model, stop=STOP)
    betas = [row["beta"] for row in rows_of(tmp_path)[1:]]
    kls = [row["kl"] for row in rows_of(tmp_path)[1:]]
    for i in range(2):
        error = min(max(kls[i] / PPO.adaptive_kl_target - 1, -0.2), 0.2)
        assert math.isclose(betas[i + 1], betas[i] * (1 + error * PPO.batch_size / 100), rel_tol=1e-5)


@pytest.mark.parametrize(("limit", "updates"), [(0.25, 3), (10.0, 4)])
def test_early_stop_on_kl_ends_the_updates_of_an_iteration(limit, updates):
    """A step whose KL grows by 0.1 an update: with a limit of 0.25 the third is the last of four."""
    taken = []

    def train_step(state, frozen, batch):
        taken.append(batch)
        return state, {"approx_kl": mean_of(0.1 * len(taken))}

    how = {"num_epochs": 4, "num_minibatches": 1, "early_stop_kl": limit}
    _, metrics = online.update(None, {}, np.zeros(16), jax.random.key(0), train_step, **how)
    assert len(taken) == updates
    assert float(metrics["early_stops"].total) == (updates == 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adaptive_kl_horizon": 3}, "adaptive_kl_horizon is 3.*give more than 0.2 \\* batch_size"),
        ({"beta": 0.0}, "beta is 0, which adaptive_kl_target cannot steer"),
    ],
)
def test_a_controller_that_could_not_control_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(PPO, **change)


def test_a_run_made_from_another_start_is_refused(ladder, tmp_path):
    """The start was trained anew in the same place: what was made from the old one is not resumed from the new."""
    shutil.copytree(ladder.sft, tmp_path / "sft")
    config = dataclasses.replace(DPO, schedule=ONE_STEP)
    dpo.run(config, tmp_path / "dpo", init_from=str(tmp_path / "sft"), stop=STOP)
    assert changed_inputs(tmp_path / "dpo") == []
    shutil.rmtree(tmp_path / "sft")
    sft.run(dataclasses.replace(SFT, seed=1, schedule=ONE_STEP), tmp_path / "sft", stop=STOP)
    assert changed_inputs(tmp_path / "dpo") == ["init_from"]
    with pytest.raises(InputError, match=r"another config \(inputs.init_from.handoff"):
        dpo.run(config, tmp_path / "dpo", init_from=str(tmp_path / "sft"), stop=STOP)


def test_metrics_do_not_depend_on_the_split(ladder, tmp_path):
    rows = []
    for parts in (1, 2):
        config = dataclasses.replace(SFT, schedule=ONE_STEP, num_microbatches=parts)
        sft.run(config, tmp_path / str(parts), stop=STOP)
        rows.append(rows_of(tmp_path / str(parts))[1])
    assert set(rows[0]) == set(rows[1])
    for name in rows[0]:
        assert math.isclose(rows[0][name], rows[1][name], rel_tol=1e-5), name


def test_an_unfinished_response_gets_the_score_that_the_config_says(ladder, tmp_path):
    config = dataclasses.replace(PPO, schedule=ONE_STEP, missing_eos_score=-7.0)
    ppo.run(config, tmp_path, init_from=ladder.sft, reward_from=ladder.reward_model, stop=STOP)
    row = rows_of(tmp_path)[1]
    unfinished = 1 - row["terminated"]
    assert 0 < unfinished < 1
    expected_range = (-7.0 * unfinished - 4 * row["terminated"], -7.0 * unfinished + 4 * row["terminated"])
    assert expected_range[0] < row["score"] < expected_range[1] and row["score"] < row["proxy"]


def test_evaluate_measures_every_policy_the_same_way(ladder, tmp_path):
    config = evaluate.Config(data=DATA, num_prompts=12, batch_size=8, best_of=4, num_shown=2)
    summary = evaluate.run(
        config,
        tmp_path,
        reference_from=ladder.sft,
        reward_from=ladder.reward_model,
        policies_from={"twin": ladder.sft},
        stop=STOP,
    )
    assert summary["twin"] == summary["sft"], "the same params under the same key"
    assert abs(summary["sft"]["kl"]) < 1e-6
    assert summary["best_of_n"]["proxy"] > summary["sft"]["proxy"]
    assert math.isclose(summary["best_of_n"]["kl"], math.log(4) - 3 / 4)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    samples = json.loads((tmp_path / "samples.json").read_text())
    assert set(samples) == {"sft", "twin", "best_of_n"} and all(len(rows) == 2 for rows in samples.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"batch_size": 12},
            r"batch_size .* is 12, which does not divide over 8 devices; use a multiple of 8",
        ),
        ({"num_microbatches": 3}, r"batch_size is 16, which does not divide into num_microbatches=3"),
        (
            {"data": dataclasses.replace(DATA, response_length=8)},
            r"world:preferences/train/\d+ has a response of \d+ tokens .* response_length is 8: raise --config",
        ),
        (
            {"data": dataclasses.replace(DATA, response_length=480)},
            r"prompt_length \+ response_length is 496, beyond the context of .*sft \(64 tokens\)",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_training(change, message, ladder, tmp_path):
    with pytest.raises(InputError, match=message):
        dpo.run(dataclasses.replace(DPO, **change), tmp_path / "dpo", init_from=ladder.sft, stop=STOP)
    assert not (tmp_path / "dpo" / "metrics.jsonl").exists()


def test_a_workdir_of_another_config_is_refused_and_kept(ladder, tmp_path):
    dpo.run(dataclasses.replace(DPO, schedule=ONE_STEP), tmp_path, init_from=ladder.sft, stop=STOP)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(
        InputError, match=r"another config \(config.loss.beta: 0.1 -> 0.7\); give another --workdir"
    ):
        dpo.run(
            dataclasses.replace(DPO, schedule=ONE_STEP, loss=PreferenceLoss(beta=0.7)),
            tmp_path,
            init_from=ladder.sft,
            stop=STOP,
        )
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ("nowhere", "nowhere"),
        ("unfinished", "has left no hand-off yet; run its stage to the end first"),
    ],
)
def test_a_start_that_is_not_there_is_refused(start, message, ladder, tmp_path):
    (tmp_path / "unfinished" / "checkpoints").mkdir(parents=True)
    with pytest.raises(InputError, match=message):
        dpo.run(DPO, tmp_path / "dpo", init_from=str(tmp_path / start), stop=STOP)


def test_a_policy_is_no_reward_model(ladder, tmp_path):
    with pytest.raises(InputError, match=r"has no reward head; give a run of experiments.reward_model"):
        ppo.run(PPO, tmp_path, init_from=ladder.sft, reward_from=ladder.sft, stop=STOP)


WORLD_VOCABULARY = 135
