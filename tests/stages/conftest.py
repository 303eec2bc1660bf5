"""A ladder small enough for tests: one layer of width 16, a few steps a stage, eight devices."""

import dataclasses
import pathlib

import pytest

from rlhf_jax.data.world import WorldConfig
from rlhf_jax.stages import dpo, ppo, reward_model, sft
from rlhf_jax.stages.inputs import DataConfig
from rlhf_jax.training.interrupt import StopRequest
from rlhf_jax.training.loop import Schedule
from rlhf_jax.training.optimizer import OptimizerConfig

WORLD = WorldConfig(
    num_demonstrations=64, num_preferences=64, num_prompts=64, num_eval_prompts=12, num_eval_preferences=20
)
DATA = DataConfig(world=WORLD)
SHARED = {
    "data": DATA,
    "optimizer": OptimizerConfig(learning_rate=1e-2, schedule="constant"),
    "schedule": Schedule(num_steps=4, save_every=2, log_every=2),
    "batch_size": 16,
}
SFT = sft.Config(
    model=sft.ModelSource(width=16, num_layers=1, num_heads=2, num_kv_heads=1, mlp_width=32), **SHARED
)
REWARD = reward_model.Config(**SHARED)
DPO = dpo.Config(**SHARED)
PPO = ppo.Config(
    num_epochs=2, num_minibatches=2, num_eval_prompts=12, temperature=0.7, adaptive_kl_target=1.0, **SHARED
)


@dataclasses.dataclass
class Ladder:
    """Finished runs of SFT and the reward model, from which others start."""

    sft: str
    reward_model: str


@pytest.fixture(scope="session")
def ladder(tmp_path_factory) -> Ladder:
    root: pathlib.Path = tmp_path_factory.mktemp("ladder")
    sft.run(SFT, root / "sft", stop=StopRequest())
    reward_model.run(REWARD, root / "reward_model", init_from=str(root / "sft"), stop=StopRequest())
    return Ladder(sft=str(root / "sft"), reward_model=str(root / "reward_model"))


class StopAfter:
    """Asks to stop once ``steps`` steps have begun."""

    def __init__(self, steps: int):
        self._left = steps

    @property
    def requested(self) -> str | None:
        self._left -= 1
        return "SIGTERM" if self._left < 0 else None
