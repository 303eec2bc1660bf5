"""Four roles on one mesh: each lies on it by its own shape, and what comes out does not depend on where they lie."""

import dataclasses

import jax
import numpy as np
import pytest

from rlhf_jax import checkpoints
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.stages import evaluations, online, ppo, reward_model, sft
from rlhf_jax.training.interrupt import StopRequest
from rlhf_jax.training.loop import Schedule
from rlhf_jax.training.optimizer import OptimizerConfig

from .conftest import PPO, REWARD, SFT


@pytest.fixture(scope="module")
def narrow_reward(tmp_path_factory) -> str:
    """A reward model of half the policy's width and one head, which two devices of the tensor axis cannot share."""
    root = tmp_path_factory.mktemp("narrow")
    shape = sft.ModelSource(width=8, num_layers=1, num_heads=1, num_kv_heads=1, mlp_width=24)
    sft.run(dataclasses.replace(SFT, model=shape), root / "sft", stop=StopRequest())
    reward_model.run(REWARD, root / "reward", init_from=str(root / "sft"), stop=StopRequest())
    return str(root / "reward")


def spec(tree, *names):
    for name in names:
        tree = tree[name]
    return {
        axis for part in tree.sharding.spec if part for axis in ([part] if isinstance(part, str) else part)
    }


@pytest.mark.slow
def test_each_role_is_laid_out_by_its_own_shape(ladder, narrow_reward, tmp_path, monkeypatch):
    """Policy and reference split heads over tensor; the reward model and the value model made of it have one head,
    and keep their queries whole; a step on that mesh is the step on one device."""
    monkeypatch.setattr(evaluations, "make_evaluate", lambda *args, **kwargs: lambda params: {})
    roles, train = [], online.train

    def watched(run, config, method, *, model, params, reward, **rest):
        if run.mesh.size > 1:
            roles.append((params, model.params, reward.model.params))
        return train(run, config, method, model=model, params=params, reward=reward, **rest)

    monkeypatch.setattr(online, "train", watched)
    config = dataclasses.replace(
        PPO,
        num_epochs=1,
        num_minibatches=1,
        schedule=Schedule(num_steps=2, save_every=2),
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="constant"),
    )
    found = []
    for name, mesh in (("one", meshes.data_mesh(1)), ("many", meshes.make_mesh("data:2,fsdp:2,tensor:2"))):
        where = {"init_from": ladder.sft, "reward_from": narrow_reward}
        ppo.run(config, tmp_path / name, **where, mesh=mesh, stop=StopRequest())
        found.append(checkpoints.restore_params(checkpoints.handoff_path(tmp_path / name)))
    trained, reference, reward = roles[0]
    query = ("decoder", "layers", "query")
    assert spec(trained["policy"], *query) == spec(reference, *query) == {"fsdp", "tensor"}
    assert spec(trained["value"], *query) == spec(reward, *query) == {"fsdp"}
    assert spec(reward, "decoder", "layers", "up") == {"fsdp", "tensor"}
    one, many = jax.device_get(found)
    far = jax.tree.map(lambda a, b: float(np.linalg.norm(a - b) / np.linalg.norm(a)), one, many)
    assert max(jax.tree.leaves(far)) < 1e-5
