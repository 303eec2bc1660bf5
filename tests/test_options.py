"""Every option of every config is read somewhere: an option that no code reads is a lie."""

import ast
import dataclasses
import pathlib

import pytest

from rlhf_jax.data.arithmetic import ArithmeticConfig
from rlhf_jax.data.world import WorldConfig
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.lora import LoraConfig
from rlhf_jax.sampling.generate import SamplingConfig
from rlhf_jax.stages import (
    best_of_n,
    dpo,
    evaluate,
    evaluations,
    grpo,
    inputs,
    judged_rewards,
    online_dpo,
    ppo,
    process_reward,
    rejection,
    reward_model,
    rewards,
    search,
    several_rewards,
    sft,
    steering,
)
from rlhf_jax.stages.adapters import LoraOptions
from rlhf_jax.stages.preference_objectives import PreferenceLoss
from rlhf_jax.training.loop import Schedule
from rlhf_jax.training.optimizer import OptimizerConfig

PACKAGE = pathlib.Path(__file__).parents[1] / "rlhf_jax"
# Config class -> where its fields must be read.
READERS = {
    sft.Config: ("stages/sft.py", "stages/supervised.py"),
    sft.ModelSource: ("stages/sft.py",),
    reward_model.Config: ("stages/reward_model.py", "stages/supervised.py"),
    dpo.Config: ("stages/dpo.py", "stages/supervised.py"),
    PreferenceLoss: ("stages/preference_objectives.py",),
    ppo.Config: ("stages/ppo.py", "stages/rewards.py", "stages/evaluations.py", "stages/online.py"),
    grpo.Config: ("stages/grpo.py", "stages/rewards.py", "stages/evaluations.py", "stages/online.py"),
    online_dpo.Config: (
        "stages/online_dpo.py",
        "stages/rewards.py",
        "stages/evaluations.py",
        "stages/online.py",
    ),
    rejection.Config: (
        "stages/rejection.py",
        "stages/rewards.py",
        "stages/evaluations.py",
        "stages/online.py",
    ),
    process_reward.Config: ("stages/process_reward.py", "stages/supervised.py"),
    evaluate.Config: ("stages/evaluate.py",),
    best_of_n.Config: ("stages/best_of_n.py",),
    search.Config: ("stages/search.py",),
    steering.Config: ("stages/steering.py",),
    rewards.Scoring: ("stages/rewards.py",),
    several_rewards.Constraint: ("stages/several_rewards.py",),
    judged_rewards.JudgeOptions: ("stages/judged_rewards.py", "stages/rewards.py"),
    evaluations.StopWhen: ("stages/evaluations.py",),
    inputs.DataConfig: ("stages/inputs.py",),
    inputs.BatchConfig: ("stages/inputs.py",),
    Schedule: ("training/loop.py",),
    OptimizerConfig: ("training/optimizer.py",),
    WorldConfig: ("data/world.py",),
    ArithmeticConfig: ("data/arithmetic.py",),
    SamplingConfig: ("sampling/generate.py", "sampling/logits.py"),
    ModelConfig: ("models",),
    LoraConfig: ("models/lora.py",),
    LoraOptions: ("stages/adapters.py",),
}


def attributes_read(path: pathlib.Path) -> set[str]:
    files = path.rglob("*.py") if path.is_dir() else [path]
    return {
        node.attr
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }


@pytest.mark.parametrize("config", READERS, ids=lambda config: f"{config.__module__}.{config.__name__}")
def test_every_field_is_read(config):
    read = set().union(*(attributes_read(PACKAGE / name) for name in READERS[config]))
    unread = {field.name for field in dataclasses.fields(config)} - read
    assert not unread, f"{config.__name__} has fields that nothing reads: {sorted(unread)}"


@pytest.mark.parametrize("config", READERS, ids=lambda config: f"{config.__module__}.{config.__name__}")
def test_every_field_is_documented(config):
    undocumented = [f.name for f in dataclasses.fields(config) if f.name not in config.__doc__]
    inherited = {
        "seed",
        "data",
        "optimizer",
        "schedule",
        "batch_size",
        "num_microbatches",
        "model",
        "temperature",
    }
    assert not set(undocumented) - inherited, undocumented
