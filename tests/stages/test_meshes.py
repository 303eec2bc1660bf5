"""The update does not depend on where it is computed: on one device, on meshes of eight, on replicas."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from rlhf_jax import checkpoints
from rlhf_jax.data import batches
from rlhf_jax.data import tokenizer as tokenizers
from rlhf_jax.errors import InputError
from rlhf_jax.models import heads, huggingface
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.parallel import sharding
from rlhf_jax.stages import dpo, inputs, ppo, reward_objectives, rollouts, sft, supervised
from rlhf_jax.stages.preference_objectives import make_pair_objective
from rlhf_jax.stages.run_directory import Purpose, load_model, open_run
from rlhf_jax.training.interrupt import Interrupted, StopRequest
from rlhf_jax.training.loop import Schedule
from rlhf_jax.training.optimizer import OptimizerConfig

from .conftest import DPO, PPO, REWARD, SFT, StopAfter

CHANGES = {
    "schedule": Schedule(num_steps=3, save_every=2),
    "optimizer": OptimizerConfig(learning_rate=1e-3, schedule="constant"),
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


def fixed_rows(stage, ladder, workdir, layout, stop=None):
    """Three steps of a stage on fixed rows, as the stage takes them, without its evaluation (compiled apart)."""
    config = dataclasses.replace(
        {"sft": SFT, "reward_model": REWARD, "dpo": DPO}[stage], num_microbatches=layout[2], **CHANGES
    )
    run = open_run(workdir, stage, config, inputs={}, **how(layout, stop))
    model = load_model(ladder.sft, run)
    params, frozen = model.params, {}
    if stage == "sft":
        split, encode, cut = (
            inputs.load_demonstrations,
            batches.encode_demonstrations,
            batches.demonstration_batches,
        )
        objective = sft.make_objective(model.config)
    else:
        split, encode, cut = inputs.load_preferences, batches.encode_preferences, batches.preference_batches
        objective = reward_objectives.make_objective(model.config)
    if stage == "dpo":
        frozen = {"reference": jax.tree.map(jax.numpy.copy, params)}
        objective = make_pair_objective(model.config, config.loss)
    if stage == "reward_model":
        params = params | {"head": heads.init_scalar_head(model.config, run.key(0, Purpose.INIT))}
        params = jax.device_put(params, sharding.parameter_sharding(run.mesh, model.config, params))
    rows, _ = supervised.encode_split(run, config.data, model, split(config.data), encode)
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


def distance(expected, found):
    """The largest relative difference of a parameter, in norm."""
    expected, found = jax.device_get((expected, found))
    far = jax.tree.map(lambda a, b: float(np.linalg.norm(a - b) / np.linalg.norm(a)), expected, found)
    return max(jax.tree.leaves(far))


@pytest.mark.parametrize("stage", ["sft", "reward_model", "dpo"])
def test_three_steps_on_fixed_rows_are_the_same_everywhere(stage, ladder, tmp_path):
    expected, *others = (
        fixed_rows(stage, ladder, tmp_path / str(number), layout) for number, layout in enumerate(LAYOUTS)
    )
    if stage == "reward_model":
        # A difference of scores does not see the head's bias: its gradient is the rounding of 0, which Adam, dividing
        # by that same rounding, makes a step of 1e-6. So beside a score's unit, not beside itself.
        biases = [params["head"].pop("bias") for params in (expected, *others)]
        np.testing.assert_allclose(np.stack(biases), 0.0, atol=1e-5)
    for layout, found in zip(LAYOUTS[1:], others, strict=True):
        assert distance(expected, found) < 1e-5, layout


@pytest.mark.slow
def test_three_iterations_of_ppo_are_the_same_everywhere(ladder, tmp_path, monkeypatch):
    """Sampling, scoring, advantages and updates; evaluation is left out, which compiles sampling once more."""
    monkeypatch.setattr(rollouts, "make_evaluate", lambda *args, **kwargs: lambda params: {})
    found = []
    for number, layout in enumerate(LAYOUTS):
        config = dataclasses.replace(
            PPO, num_epochs=1, num_minibatches=1, num_microbatches=layout[2], **CHANGES
        )
        workdir = tmp_path / str(number)
        ppo.run(config, workdir, init_from=ladder.sft, reward_from=ladder.reward_model, **how(layout))
        found.append(checkpoints.restore_params(checkpoints.handoff_path(workdir)))
    for layout, params in zip(LAYOUTS[1:], found[1:], strict=True):
        assert distance(found[0], params) < 1e-5, layout


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
