"""Seconds a step, tokens a second and peak memory of one task, as one JSON line.

    python -m benchmarks.speed --task=sft --size=tiny --batch=8 --seq=256 --steps=5

Tasks: sft (batch rows of seq tokens), rm and dpo (batch pairs of two rows of seq tokens; for dpo the first half
is prompt), ppo (batch prompts of seq - new tokens, new sampled tokens, 4 epochs), grpo (batch rollouts of the
same shape, groups of 8, one update, KL in the loss), gen (the same prompts, sampling alone). Weights are random,
float32, and the steps are the very ones that the stages run. tokens_per_s counts every token of a row, prompt
included, once a step; for gen it counts sampled tokens only. Two steps of warm-up (compilation) come first.
"""

from __future__ import annotations

import json
import platform
import resource
import statistics
import time

import jax
import numpy as np
from absl import app, flags, logging

from benchmarks.shapes import SIZES
from rlhf_jax.models import decoder, heads
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.rewards import reward_model as rewards
from rlhf_jax.sampling.generate import SamplingConfig, generate
from rlhf_jax.stages import grpo, online, ppo, reward_objectives, rollouts, sft
from rlhf_jax.stages.inputs import DataConfig
from rlhf_jax.stages.preference_objectives import PreferenceLoss, make_pair_objective
from rlhf_jax.training.optimizer import OptimizerConfig, make_optimizer
from rlhf_jax.training.step import init_train_state, make_train_step
from rlhf_jax.types import DemonstrationBatch, PreferenceBatch

TASK = flags.DEFINE_enum("task", "sft", ["sft", "rm", "dpo", "ppo", "grpo", "gen"], "What to measure.")
SIZE = flags.DEFINE_enum("size", "tiny", sorted(SIZES), "The model's shape.")
BATCH = flags.DEFINE_integer("batch", 8, "Rows, pairs or prompts a step.")
SEQ = flags.DEFINE_integer("seq", 256, "Tokens a row, prompt and response together.")
NEW = flags.DEFINE_integer("new", 64, "Sampled tokens a row, of seq; for ppo and gen.")
STEPS = flags.DEFINE_integer("steps", 5, "Measured steps.")
DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Compute dtype; parameters stay float32."
)

WARM_UP = 2


def random_rows(rng, rows: int, seq: int, vocabulary: int, *, response: int) -> DemonstrationBatch:
    """Full rows of random tokens; the last ``response`` columns are what the loss is about."""
    return DemonstrationBatch(
        tokens=rng.integers(3, vocabulary, (rows, seq), dtype=np.int32),
        token_mask=np.ones((rows, seq), bool),
        response_mask=np.ones((rows, response), bool),
    )


def supervised_step(objective, params, frozen, batch):
    """(``take(state) -> state``, which takes one real train step and waits for it, and the first state)."""
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-5), 100)
    mesh = meshes.data_mesh()
    step = meshes.compile_step(
        lambda axis: make_train_step(objective, optimizer, axis_name=axis), mesh, "jit"
    )

    def take(state):
        state, metrics = step(state, frozen, batch)
        jax.block_until_ready((state.params, metrics))
        return state

    return take, init_train_state(params, optimizer, jax.random.key(1))


def supervised(objective, params, frozen, batch):
    """A callable that takes one real train step and waits for it."""
    take, state = supervised_step(objective, params, frozen, batch)
    holder = {"state": state}

    def run():
        holder["state"] = take(holder["state"])

    return run


def build(task: str, model: ModelConfig, batch: int, seq: int, new: int):
    """(step, tokens a step) of a task."""
    rng = np.random.default_rng(0)
    params = decoder.init_params(model, jax.random.key(0))
    scored = {**params, "head": heads.init_scalar_head(model, jax.random.key(2))}
    row = lambda response: random_rows(rng, batch, seq, model.vocab_size, response=response)  # noqa: E731
    if task == "sft":
        return supervised(sft.make_objective(model), params, {}, row(seq - 1)), batch * seq
    if task == "rm":
        pairs = PreferenceBatch(chosen=row(seq // 2), rejected=row(seq // 2))
        return supervised(reward_objectives.make_objective(model), scored, {}, pairs), 2 * batch * seq
    if task == "dpo":
        pairs = PreferenceBatch(chosen=row(seq // 2), rejected=row(seq // 2))
        frozen = {"reference": jax.tree.map(lambda x: x + 0, params)}
        return supervised(
            make_pair_objective(model, PreferenceLoss()), params, frozen, pairs
        ), 2 * batch * seq
    prompts = {
        "tokens": rng.integers(3, model.vocab_size, (batch, seq - new), dtype=np.int32),
        "token_mask": np.ones((batch, seq - new), bool),
        "index": np.arange(batch),
    }
    sampling = SamplingConfig(max_new_tokens=new, min_new_tokens=new)

    @jax.jit
    def sample(params, tokens, token_mask, key):
        return generate(model, params, tokens, token_mask, key, sampling=sampling, eos_id=2, pad_id=0)

    if task == "gen":
        keys = iter(jax.random.split(jax.random.key(3), 1000))
        args = prompts["tokens"], prompts["token_mask"]
        return lambda: jax.block_until_ready(sample(params, *args, next(keys))), batch * new
    iteration = grpo_iteration if task == "grpo" else ppo_iteration
    return iteration(model, params, scored, prompts, sample, batch, seq, new), batch * seq


def ppo_iteration(model, params, scored, prompts, sample, batch, seq, new):
    """A callable that takes one real PPO iteration: rollout, scoring by four roles, four epochs."""
    config = ppo.Config(data=DataConfig(prompt_length=seq - new, response_length=new), batch_size=batch)
    score = jax.jit(lambda params, rollout: rewards.score(model, params, rollout))
    return online_iteration(
        ppo.make_method(model, model, config),
        {"policy": params, "value": scored},
        params,
        prompts,
        sample,
        lambda rollout, index: score(scored, rollout),
        config,
    )


def grpo_iteration(model, params, scored, prompts, sample, batch, seq, new):
    """A callable that takes one real GRPO iteration with a reward computed on the host."""
    del scored
    config = grpo.Config(data=DataConfig(prompt_length=seq - new, response_length=new), batch_size=batch)
    reward = lambda rollout, index: np.asarray(rollout.tokens).sum(axis=1).astype(np.float32) % 7  # noqa: E731
    fewer = {name: x[: batch // config.group_size] for name, x in prompts.items()}
    return online_iteration(grpo.make_method(model, config), params, params, fewer, sample, reward, config)


def online_iteration(method, trained, reference, prompts, sample, reward, config):
    """A callable that takes one iteration of a method and waits for it."""
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-5), 100)
    state = online.OnlineState(
        train=init_train_state(jax.tree.map(lambda x: x + 0, trained), optimizer, jax.random.key(1)),
        beta=jax.numpy.float32(config.beta),
        iteration=jax.numpy.zeros((), jax.numpy.int32),
    )
    iterate = online.make_iteration(
        method,
        collect=rollouts.make_collect(
            lambda policy, rows, key, step: sample(policy, rows["tokens"], rows["token_mask"], key),
            reward,
            group_size=method.group_size,
        ),
        prepare=jax.jit(method.prepare),
        train_step=meshes.compile_step(
            lambda axis: make_train_step(method.objective, optimizer, axis_name=axis),
            meshes.data_mesh(),
            "jit",
        ),
        reference=reference,
        num_epochs=config.num_epochs,
        num_minibatches=config.num_minibatches,
    )
    holder = {"state": state}

    def run():
        holder["state"], metrics = iterate(holder["state"], prompts)
        jax.block_until_ready((holder["state"].train.params, metrics))

    return run


def main(_):
    logging.set_verbosity(logging.WARNING)
    model = ModelConfig(**SIZES[SIZE.value], max_length=SEQ.value, compute_dtype=DTYPE.value)
    step, tokens = build(TASK.value, model, BATCH.value, SEQ.value, NEW.value)
    for _ in range(WARM_UP):
        step()
    seconds = []
    for _ in range(STEPS.value):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds)
    print(
        json.dumps(
            {
                "library": "rlhf_jax",
                "task": TASK.value,
                "size": SIZE.value,
                "batch": BATCH.value,
                "seq": SEQ.value,
                "new": NEW.value,
                "median_s": round(median, 4),
                "tokens_per_s": round(tokens / median, 1),
                "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
                "device": jax.devices()[0].device_kind,
                "jax": jax.__version__,
                "python": platform.python_version(),
            }
        )
    )


if __name__ == "__main__":
    app.run(main)
