"""The update does not depend on where it is computed: on one device, on meshes of eight, on replicas."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import checkpoints
from rlhf_jax.data import batches, world
from rlhf_jax.data import tokenizer as tokenizers
from rlhf_jax.data.rows import Demonstration, ProcessSteps
from rlhf_jax.errors import InputError
from rlhf_jax.models import heads, huggingface
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.parallel import sharding
from rlhf_jax.stages import (
    dpo,
    evaluations,
    grpo,
    inputs,
    online_dpo,
    ppo,
    process_reward,
    rejection,
    reward_objectives,
    rollouts,
    sft,
    supervised,
)
from rlhf_jax.stages.handoffs import load_model
from rlhf_jax.stages.preference_objectives import PreferenceLoss, make_pair_objective
from rlhf_jax.stages.run_directory import Purpose, open_run
from rlhf_jax.training.interrupt import Interrupted, StopRequest
from rlhf_jax.training.loop import Schedule
from rlhf_jax.training.optimizer import OptimizerConfig
from rlhf_jax.types import Rollout, ScoredRollout

from .conftest import DPO, PPO, REWARD, SFT, SHARED, StopAfter

CHANGES = {
    "schedule": Schedule(num_steps=3, save_every=2),
    "optimizer": OptimizerConfig(learning_rate=1e-3, schedule="constant"),
}
HEADS = dataclasses.replace(REWARD, objectives=("preferred", "brief"))
PROCESS = process_reward.Config(**SHARED, step_mark=".")
# Two passes, so that the second one's importance ratios are not all 1.
ROLLOUTS = SHARED | CHANGES | {"batch_size": 32, "group_size": 4, "num_epochs": 2}
ONLINE = {
    "grpo": (grpo, grpo.Config(**ROLLOUTS, temperature=0.7)),
    "online_dpo": (
        online_dpo,
        online_dpo.Config(**ROLLOUTS | {"group_size": 2}, loss=PreferenceLoss(temperature=0.7)),
    ),
    "rejection": (rejection, rejection.Config(**ROLLOUTS, temperature=0.7)),
}
# (mesh, path, micro-batches); the first is what the others are held against.
LAYOUTS = (
    ("one", "jit", 1),
    ("data:8", "jit", 2),
    ("fsdp:8", "jit", 1),
    ("data:2,fsdp:2,tensor:2", "jit", 2),
    ("data:8", "pmap", 2),
)


def mesh_of(name):
    return meshes.data_mesh(1) if name == "one" else meshes.make_mesh(name)


def how(layout, stop=None):
    return {"mesh": mesh_of(layout[0]), "parallelism": layout[1], "stop": stop or StopRequest()}


def judged(row: Demonstration) -> ProcessSteps:
    """Its sentences as steps: right, wrong, or judged by nobody."""
    steps = tuple(row.response.strip(" .").split("."))
    labels = tuple((1.0, 0.0, None)[len(step) % 3] for step in steps)
    return ProcessSteps(prompt=row.prompt, steps=steps, labels=labels, source=row.source)


def rows_of(stage, data):
    """(the rows of a stage, how they are encoded, how they are cut into batches)."""
    if stage == "sft":
        return inputs.load_demonstrations(data), batches.encode_demonstrations, batches.demonstration_batches
    if stage == "process_reward":
        split = inputs.load_demonstrations(data)
        split = inputs.Split(train=[*map(judged, split.train)], held_out=[*map(judged, split.held_out)])
        encode = functools.partial(batches.encode_process_steps, step_mark=PROCESS.step_mark)
        return split, encode, batches.steps_batches
    names = HEADS.objectives if stage == "reward_heads" else ()
    return inputs.load_preferences(data, names), batches.encode_preferences, batches.preference_batches


def fixed_rows(stage, ladder, workdir, layout, stop=None):
    """Three steps of a stage on fixed rows, as the stage takes them, without its evaluation (compiled apart)."""
    config = {
        "sft": SFT,
        "reward_model": REWARD,
        "reward_heads": HEADS,
        "dpo": DPO,
        "process_reward": PROCESS,
    }[stage]
    config = dataclasses.replace(config, num_microbatches=layout[2], **CHANGES)
    run = open_run(workdir, stage, config, inputs={}, **how(layout, stop))
    model = load_model(ladder.sft, run)
    params, frozen = model.params, {}
    objective = {
        "sft": sft.make_objective,
        "reward_model": reward_objectives.make_objective,
        "reward_heads": lambda model: HEADS.form(model).objective,
        "process_reward": process_reward.make_objective,
        "dpo": functools.partial(make_pair_objective, loss=DPO.loss),
    }[stage](model.config)
    if stage == "dpo":
        frozen = {"reference": jax.tree.map(jnp.copy, params)}
    if stage in ("reward_model", "process_reward"):
        params = params | {"head": heads.init_scalar_head(model.config, run.key(0, Purpose.INIT))}
        params = jax.device_put(params, sharding.parameter_sharding(run.mesh, model.config, params))
    if stage == "reward_heads":
        params = HEADS.form(model.config).init([params["decoder"]], run.key(0, Purpose.INIT))
        params = jax.device_put(params, sharding.parameter_sharding(run.mesh, model.config, params))
    split, encode, cut = rows_of(stage, config.data)
    rows, _ = supervised.encode_split(run, config.data, model, split, encode)
    return supervised.train(
        run,
        config,
        model=model.config,
        objective=objective,
        params=params,
        frozen=frozen,
        iterator=cut(rows, batch_size=config.batch_size, seed=run.data_seed(0)),
        evaluate=lambda params: {},
        shown=(),
    ).params


def fixed_rollouts(config, mesh):
    """``collect`` of ``rollouts.make_collect`` that samples nothing: ragged random words, scored at random.

    The first group of every iteration has no spread.
    """
    rows, widths = config.batch_size, (config.data.prompt_length, config.data.response_length)
    vocab_size = len(world.world_tokenizer())

    def collect(params, prompts, key, step, multiplier):
        rng = np.random.default_rng(int(step))
        tokens = rng.integers(4, vocab_size, (rows, sum(widths))).astype(np.int32)
        prompt_mask = np.arange(widths[0])[None] >= rng.integers(0, widths[0], (rows, 1))
        response_mask = np.arange(widths[1])[None] < rng.integers(1, widths[1] + 1, (rows, 1))
        scores = rng.normal(size=rows).astype(np.float32)
        scores[: config.group_size] = 0.5
        placed = {
            "tokens": tokens,
            "token_mask": np.concatenate([prompt_mask, response_mask], axis=1),
            "response_mask": response_mask,
            "log_probs": np.zeros(response_mask.shape, np.float32),
            "terminated": rng.random(rows) < 0.8,
        }
        rollout = Rollout(**meshes.put_rows(mesh, placed), policy_step=jnp.int32(step))
        index = np.repeat(prompts["index"], config.group_size)
        return ScoredRollout(rollout=rollout, scores=meshes.put_rows(mesh, scores)), index, {}

    return collect


def distance(expected, found):
    """The largest relative difference of a parameter, in norm."""
    expected, found = jax.device_get((expected, found))
    far = jax.tree.map(lambda a, b: float(np.linalg.norm(a - b) / np.linalg.norm(a)), expected, found)
    return max(jax.tree.leaves(far))


@pytest.mark.parametrize(
    "stage",
    [
        "reward_model",
        "dpo",
        *(pytest.param(stage, marks=pytest.mark.slow) for stage in ("sft", "reward_heads", "process_reward")),
    ],
)
def test_three_steps_on_fixed_rows_are_the_same_everywhere(stage, ladder, tmp_path):
    expected, *others = (
        fixed_rows(stage, ladder, tmp_path / str(number), layout) for number, layout in enumerate(LAYOUTS)
    )
    if stage in ("reward_model", "reward_heads"):
        # A difference of scores does not see the head's bias: its gradient is the rounding of 0, which Adam, dividing
        # by that same rounding, makes a step of 1e-6. So beside a score's unit, not beside itself.
        biases = [params["head"].pop("bias") for params in (expected, *others)]
        np.testing.assert_allclose(np.stack(biases), 0.0, atol=1e-5)
    for layout, found in zip(LAYOUTS[1:], others, strict=True):
        assert distance(expected, found) < 1e-5, layout


def check_everywhere(stage, config, ladder, root, before=lambda mesh: None):
    """Runs a stage that samples in every layout and compares what it leaves; ``before(mesh)`` comes before each."""
    found = []
    for number, layout in enumerate(LAYOUTS):
        before(mesh_of(layout[0]))
        config, workdir = dataclasses.replace(config, num_microbatches=layout[2]), root / str(number)
        stage.run(config, workdir, init_from=ladder.sft, reward_from=ladder.reward_model, **how(layout))
        found.append(checkpoints.restore_params(checkpoints.handoff_path(workdir)))
    start = checkpoints.restore_params(checkpoints.handoff_path(ladder.sft))
    assert distance(start["decoder"], found[0]["decoder"]) > 1e-2, "updates that are all skipped agree too"
    for layout, params in zip(LAYOUTS[1:], found[1:], strict=True):
        assert distance(found[0], params) < 1e-5, layout


@pytest.fixture
def no_evaluation(monkeypatch):
    """Evaluation is left out, which compiles sampling once more."""
    monkeypatch.setattr(evaluations, "make_evaluate", lambda *args, **kwargs: lambda params: {})


@pytest.mark.slow
@pytest.mark.parametrize("name", ONLINE)
def test_three_iterations_on_fixed_rollouts_are_the_same_everywhere(
    name, ladder, tmp_path, monkeypatch, no_evaluation
):
    """What a stage makes of rollouts, and its updates, apart from what it would sample itself."""
    stage, config = ONLINE[name]

    def fix(mesh):
        collect = fixed_rollouts(config, mesh)
        monkeypatch.setattr(rollouts, "make_collect", lambda *args, **kwargs: collect)

    check_everywhere(stage, config, ladder, tmp_path, fix)


@pytest.mark.slow
def test_three_iterations_of_ppo_are_the_same_everywhere(ladder, tmp_path, no_evaluation):
    """Sampling, scoring, advantages and updates."""
    config = dataclasses.replace(PPO, num_epochs=1, num_minibatches=1, **CHANGES)
    check_everywhere(ppo, config, ladder, tmp_path)


def test_a_run_goes_on_with_another_mesh(ladder, tmp_path):
    expected = fixed_rows("sft", ladder, tmp_path / "whole", LAYOUTS[0])
    with pytest.raises(Interrupted, match="saved step 2 of 3"):
        fixed_rows("sft", ladder, tmp_path / "moved", LAYOUTS[1], stop=StopAfter(2))
    found = fixed_rows("sft", ladder, tmp_path / "moved", LAYOUTS[3])
    assert found["decoder"]["layers"]["up"].sharding.mesh.shape["tensor"] == 2
    assert distance(expected, found) < 1e-5


def test_a_model_is_read_straight_onto_its_mesh(ladder, tmp_path):
    """From a hand-off and from a Hugging Face directory: no device ever holds more than its part."""
    run = open_run(tmp_path / "run", "sft", SFT, inputs={}, **how(("fsdp:8", "jit", 1)))
    model = load_model(ladder.sft, run)
    exported = tmp_path / "exported"
    ids = {"bos_id": 1, "eos_id": tokenizers.eos_id(model.tokenizer), "pad_id": 0}
    huggingface.save_pretrained(exported, model.config, jax.device_get(model.params), **ids)
    tokenizers.save_tokenizer(model.tokenizer, exported)
    for params in (model.params, load_model(str(exported), run).params):
        assert params["decoder"]["layers"]["up"].addressable_shards[3].data.shape == (1, 2, 32)
        assert distance(checkpoints.restore_params(pathlib.Path(ladder.sft) / "handoff"), params) == 0


def test_replicas_take_no_mesh_that_splits_parameters(tmp_path):
    with pytest.raises(InputError, match="pmap holds whole parameters.*fsdp:8.*use jit, or leave --mesh out"):
        dpo.run(DPO, tmp_path, init_from="", **how(("fsdp:8", "pmap", 1)))
