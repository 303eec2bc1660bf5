"""Sampling through slots as an option of the stages that sample: the same run, and nobody waits for the longest."""

import dataclasses

import jax
import numpy as np
import pytest

from rlhf_jax.data import batches
from rlhf_jax.errors import InputError
from rlhf_jax.metrics import read_metrics
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.stages import grpo, inputs, rollouts
from rlhf_jax.stages.handoffs import load_handoff_model
from rlhf_jax.stages.run_directory import Run
from rlhf_jax.training.interrupt import StopRequest
from rlhf_jax.training.loop import Schedule

from .conftest import DATA, SHARED

STOP = StopRequest()
CONFIG = grpo.Config(
    **SHARED | {"batch_size": 32, "schedule": Schedule(num_steps=2)},
    group_size=2,
    reward="sentiment",
    num_eval_prompts=12,
    rounds=2,
)


def run_on(mesh, tmp_path):
    return Run(workdir=tmp_path, stage="grpo", mesh=mesh, parallelism="jit", stop=STOP)


@pytest.mark.parametrize(("devices", "slots"), [(1, 3), (8, 16)])
def test_slots_draw_what_a_batch_draws(devices, slots, ladder, tmp_path):
    """On one device, and with a queue on each of eight: the rows keep their places, and their numbers their noise."""
    mesh = meshes.data_mesh(devices)
    model = load_handoff_model(ladder.sft, mesh)
    encoded, _ = batches.encode_prompts(
        inputs.load_prompts(DATA).train[:40], model.tokenizer, prompt_length=DATA.prompt_length
    )
    (batch, _), *_ = batches.eval_batches(encoded, 40)
    params, key = {"decoder": model.params["decoder"]}, jax.random.key(5)
    at_once, refilled = (
        rollouts.make_rollout(run_on(mesh, tmp_path), model, CONFIG.sampling, slots=n)(params, batch, key, 7)
        for n in (0, slots)
    )
    lengths = at_once.response_mask.sum(axis=1)
    assert lengths.max() > 2 * lengths.min(), "responses of one length wait for nobody"
    for name in ("tokens", "token_mask", "response_mask", "terminated", "policy_step"):
        np.testing.assert_array_equal(getattr(refilled, name), getattr(at_once, name), err_msg=name)
    for name in ("log_probs", "policy_log_probs"):
        np.testing.assert_allclose(getattr(refilled, name), getattr(at_once, name), atol=1e-5)
    assert refilled.tokens.sharding.is_equivalent_to(at_once.tokens.sharding, 2)


@pytest.mark.slow
def test_a_stage_with_slots_is_the_same_run(ladder, tmp_path):
    """Dynamic sampling too: every round is a queue."""
    found = {}
    for slots in (0, 8):
        grpo.run(
            dataclasses.replace(CONFIG, slots=slots), tmp_path / str(slots), init_from=ladder.sft, stop=STOP
        )
        found[slots] = list(read_metrics(tmp_path / str(slots) / "metrics.jsonl"))
    for at_once, refilled in zip(found[0], found[8], strict=True):
        assert set(at_once) == set(refilled)
        for name in ("proxy", "length", "rounds", "groups_with_spread", "eval/proxy"):
            if name in at_once:
                assert refilled[name] == pytest.approx(at_once[name], abs=1e-5), name
    assert found[8][-1]["rounds"] > 1, "or nothing was sampled anew"


@pytest.mark.parametrize(
    ("mesh", "slots", "message"),
    [
        (
            "data:4,fsdp:2",
            8,
            r"slots is 8, for which each device holds whole parameters.*\(fsdp:2\); give slots=0",
        ),
        ("data:8", 12, "slots is 12, which does not divide over 8 devices"),
    ],
)
def test_slots_that_no_mesh_could_have_are_refused(mesh, slots, message, ladder, tmp_path):
    config = dataclasses.replace(CONFIG, slots=slots)
    with pytest.raises(InputError, match=message):
        grpo.run(config, tmp_path, init_from=ladder.sft, mesh=meshes.make_mesh(mesh), stop=STOP)
    with pytest.raises(InputError, match="slots is -1; it must be at least 0"):
        dataclasses.replace(CONFIG, slots=-1)
