"""tunix's trainers and sampler at the shapes of ``benchmarks.speed``; needs google-tunix, no TPU.

    <python with google-tunix==0.1.7> benchmarks/tunix_steps.py --task dpo --batch 4 --seq 256 --steps 5

Its Llama 3 with random float32 weights, on CPU. A step lasts from one request for a batch to the next, with one
computation in flight; one of GRPO or PPO is a whole iteration, sampling included. There is no trainer of reward models.
Prints one JSON line, in which tokens are counted as ``benchmarks.speed`` counts.
"""

import importlib.metadata
import os
import pathlib
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import tokenizers  # noqa: E402
import transformers  # noqa: E402
from flax import nnx  # noqa: E402
from tunix.generate import sampler as samplers  # noqa: E402
from tunix.models.llama3 import model as llama  # noqa: E402
from tunix.rl import rl_cluster as clusters  # noqa: E402
from tunix.rl.grpo import grpo_learner  # noqa: E402
from tunix.rl.ppo import ppo_learner  # noqa: E402
from tunix.rl.rollout import base_rollout  # noqa: E402
from tunix.sft import peft_trainer  # noqa: E402
from tunix.sft.dpo import dpo_trainer  # noqa: E402

from benchmarks import peer  # noqa: E402
from benchmarks.shapes import SIZES  # noqa: E402

GROUP = 8


class Clock:
    """Gives batches one at a time and notes when each is asked for."""

    def __init__(self, batches):
        self.batches, self.asked = batches, []

    def __iter__(self):
        for batch in self.batches:
            self.asked.append(time.perf_counter())
            yield batch
        self.asked.append(time.perf_counter())

    @property
    def seconds(self):
        return [end - start for start, end in zip(self.asked, self.asked[1:], strict=False)]


class Scorer(nnx.Module):
    """The same trunk with one number a token instead of logits."""

    def __init__(self, trunk, width, rngs):
        self.trunk, self.head = trunk, nnx.Linear(width, 1, use_bias=False, rngs=rngs)

    def __call__(self, input_tokens, positions, cache, attention_mask, segment_ids=None):
        trunk = self.trunk
        x = trunk.embedder.encode(input_tokens)
        for layer in trunk.layers:
            _, x = layer(x, positions, None, attention_mask)
        return self.head(trunk.final_norm(x)), None


def make_model(size, seed=0):
    config = llama.ModelConfig(
        num_layers=size["num_layers"],
        vocab_size=size["vocab_size"],
        embed_dim=size["width"],
        hidden_dim=size["mlp_width"],
        num_heads=size["num_heads"],
        head_dim=size["width"] // size["num_heads"],
        num_kv_heads=size["num_kv_heads"],
        rope_theta=10_000,
        norm_eps=1e-5,
        weight_tying=True,
    )
    return llama.Llama3(config, rngs=nnx.Rngs(seed))


def make_tokenizer(size):
    """One token a word: "w17" is 17."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, size["vocab_size"])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", bos_token="<s>"
    )


def ids(size, rows, length, seed):
    return np.random.default_rng(seed).integers(3, size["vocab_size"], (rows, length), dtype=np.int32)


def texts(size, rows, length, seed):
    """One word less than ``length``: BOS comes in front."""
    return [" ".join(f"w{i}" for i in row) for row in ids(size, rows, length - 1, seed)]


def sft(size, batch, seq, new, steps):
    def inputs(batch_of):
        tokens = batch_of.input_tokens
        causal = jnp.tril(jnp.ones((seq, seq), bool))
        return {
            "input_tokens": tokens,
            "input_mask": batch_of.input_mask,
            "positions": jnp.broadcast_to(jnp.arange(seq), tokens.shape),
            "attention_mask": jnp.broadcast_to(causal, (tokens.shape[0], seq, seq)),
        }

    config = peft_trainer.TrainingConfig(
        eval_every_n_steps=10**6, max_steps=steps, max_inflight_computations=1
    )
    trainer = peft_trainer.PeftTrainer(make_model(size), optax.adamw(1e-5), config)
    clock = Clock(
        peft_trainer.TrainingInput(
            input_tokens=ids(size, batch, seq, step), input_mask=np.ones((batch, seq), bool)
        )
        for step in range(steps + 1)
    )
    trainer.with_gen_model_input_fn(inputs).train(clock)
    return clock.seconds, batch * seq


def dpo(size, batch, seq, new, steps):
    half, ones = seq // 2, np.ones((batch, seq // 2), np.int32)
    config = dpo_trainer.DPOTrainingConfig(
        eval_every_n_steps=10**6, max_steps=steps, max_inflight_computations=1
    )
    trainer = dpo_trainer.DPOTrainer(make_model(size), make_model(size), optax.adamw(1e-5), config)
    clock = Clock(
        dpo_trainer.TrainingInput(
            prompt_ids=ids(size, batch, half, 3 * step),
            prompt_mask=ones,
            chosen_ids=ids(size, batch, half, 3 * step + 1),
            chosen_mask=ones,
            rejected_ids=ids(size, batch, half, 3 * step + 2),
            rejected_mask=ones,
        )
        for step in range(steps + 1)
    )
    trainer.train(clock)
    return clock.seconds, 2 * batch * seq


def make_cluster(size, seq, new, steps, batch, *, epochs, with_critic):
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    roles = [clusters.Role.ACTOR, clusters.Role.REFERENCE, clusters.Role.ROLLOUT]
    roles += [clusters.Role.CRITIC, clusters.Role.REWARD] if with_critic else []
    config = clusters.ClusterConfig(
        role_to_mesh={role: mesh for role in roles},
        rollout_engine="vanilla",
        training_config=clusters.RLTrainingConfig(
            actor_optimizer=optax.adamw(1e-5),
            critic_optimizer=optax.adamw(1e-5) if with_critic else None,
            eval_every_n_steps=10**6,
            max_steps=steps * epochs,
            max_inflight_computations=1,
            mini_batch_size=batch,
            train_micro_batch_size=batch,
            rollout_micro_batch_size=batch,
            compute_logps_micro_batch_size=batch,
        ),
        rollout_config=base_rollout.RolloutConfig(
            max_tokens_to_generate=new,
            max_prompt_length=seq - new,
            kv_cache_size=seq,
            temperature=1.0,
            top_p=None,
            eos_tokens=[size["vocab_size"] - 1],
        ),
    )
    critics = {}
    if with_critic:
        for seed, role in enumerate(("critic", "reward"), 1):
            critics[role] = Scorer(make_model(size, seed), size["width"], nnx.Rngs(seed))
    return clusters.RLCluster(
        actor=make_model(size),
        reference=make_model(size),
        tokenizer=make_tokenizer(size),
        cluster_config=config,
        **critics,
    ), mesh


def prompts_of(size, batch, length, steps):
    return Clock({"prompts": np.array(texts(size, batch, length, step))} for step in range(steps + 1))


def grpo(size, batch, seq, new, steps):
    cluster, mesh = make_cluster(size, seq, new, steps, batch // GROUP, epochs=1, with_critic=False)
    learner = grpo_learner.GRPOLearner(
        rl_cluster=cluster,
        algo_config=grpo_learner.GRPOConfig(num_generations=GROUP, num_iterations=1, beta=0.04),
        reward_fns=lambda prompts, completions, **rest: [float(len(set(c)) % 7) for c in completions],
    )
    clock = prompts_of(size, batch // GROUP, seq - new, steps)
    with mesh:
        learner.train(clock)
    return clock.seconds, batch * seq


def ppo(size, batch, seq, new, steps):
    cluster, mesh = make_cluster(size, seq, new, steps, batch, epochs=4, with_critic=True)
    learner = ppo_learner.PPOLearner(cluster, ppo_learner.PPOConfig(num_iterations=4))
    clock = prompts_of(size, batch, seq - new, steps)
    with mesh:
        learner.train(clock)
    return clock.seconds, batch * seq


def gen(size, batch, seq, new, steps):
    cache = samplers.CacheConfig(
        cache_size=seq,
        num_layers=size["num_layers"],
        num_kv_heads=size["num_kv_heads"],
        head_dim=size["width"] // size["num_heads"],
    )
    sampler = samplers.Sampler(make_model(size), make_tokenizer(size), cache)
    seconds = []
    for step in range(steps):
        prompts = texts(size, batch, seq - new, step)
        started = time.perf_counter()
        sampler(
            prompts,
            max_generation_steps=new,
            max_prompt_length=seq - new,
            temperature=1.0,
            top_p=1.0,
            seed=step,
            eos_tokens=[size["vocab_size"] - 1],
        )
        seconds.append(time.perf_counter() - started)
    return seconds, batch * new


def main():
    tasks = {"sft": sft, "dpo": dpo, "grpo": grpo, "ppo": ppo, "gen": gen}
    arguments = peer.arguments_of(__doc__, tasks)
    steps = peer.WARM_UP + arguments.steps
    shape = SIZES[arguments.size], arguments.batch, arguments.seq, arguments.new, steps
    seconds, tokens = tasks[arguments.task](*shape)
    version = importlib.metadata.version("google-tunix")
    peer.print_result("tunix", arguments, seconds, tokens, tunix=version, jax=jax.__version__)


if __name__ == "__main__":
    main()
