"""Sampling from a policy and measuring what it says: proxy, gold, KL to the reference, length, diversity.

Imports models, sampling, rewards, losses, data and types.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data import batches
from rlhf_jax.data import tokenizer as tokenizers
from rlhf_jax.evaluation.diversity import distinct_n
from rlhf_jax.losses import full_kl
from rlhf_jax.models import decoder
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.parallel import hosts
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.rewards import reward_model
from rlhf_jax.sampling.generate import SamplingConfig, generate
from rlhf_jax.training.forward import CHUNK_SIZE, response_hidden_states
from rlhf_jax.types import Rollout

# (rollout of B rows, the data row that each answers) -> rewards [B] float32.
RowReward = Callable[[Rollout, Sequence[Any]], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One response and what was measured of it; ``gold`` is None where there is no gold reward, ``kl`` is in nats.

    beside: name -> another reward.
    """

    prompt: str
    response: str
    proxy: float
    gold: float | None
    kl: float
    length: int
    terminated: bool
    beside: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judge:
    """What every policy of a run is measured with.

    model: the shape shared by policy and reference. reference: params that KL is taken to. reward: the proxy.
    gold: the gold reward, or None. tokenizer: turns ids into text. beside: name -> a reward that is measured besides.
    """

    model: ModelConfig
    reference: Any
    reward: RowReward
    gold: RowReward | None
    tokenizer: Any
    beside: Mapping[str, RowReward] = dataclasses.field(default_factory=dict)


def response_texts(tokenizer: Any, rollout: Rollout) -> list[str]:
    """The decoded responses of a rollout; the EOS that ends one is left out, special tokens inside stay visible."""
    mask = np.asarray(rollout.response_mask)
    return tokenizers.decode_rows(tokenizer, np.asarray(rollout.tokens)[:, -mask.shape[1] :], mask)


def model_reward(config: ModelConfig, params: Any, offset: float) -> RowReward:
    """The scores of a frozen reward model, minus ``offset``."""
    score = jax.jit(lambda params, rollout: reward_model.score(config, params, rollout, offset=offset))
    return lambda rollout, rows: score(params, rollout)


def text_reward(tokenizer: Any, reward: Callable[[Any, str, bool], float]) -> RowReward:
    """A reward of text, on the host: ``reward(data row, response, whether it ended by itself)`` -> float."""

    def measure(rollout: Rollout, rows: Sequence[Any]) -> np.ndarray:
        rollout = hosts.fetch(rollout)

        def judge(numbers: Sequence[int]) -> np.ndarray:
            part = jax.tree.map(lambda x: x[np.asarray(numbers)] if np.ndim(x) else x, rollout)
            texts = zip(numbers, response_texts(tokenizer, part), part.terminated, strict=True)
            return np.array(
                [reward(rows[i], response, bool(ended)) for i, response, ended in texts], np.float32
            )

        return hosts.judge_rows(judge, len(rows))

    return measure


def sequence_full_kl(
    model: ModelConfig, policy: Any, reference: Any, rollout: Rollout, temperature: float
) -> jax.Array:
    """KL(policy || reference) of whole responses, [B] float32 nats, along sampled prefixes.

    The sum over positions of the exact KL between next-token distributions: the Rao-Blackwellised form of the
    sum of log ratios, with the same expectation, less variance, and never negative. Logits of ``CHUNK_SIZE``
    positions are alive at once.
    """
    hidden = [response_hidden_states(model, params, rollout) for params in (policy, reference)]
    unembeddings = [decoder.unembedding(model, params) for params in (policy, reference)]
    rows, length, width = hidden[0].shape
    chunk = min(CHUNK_SIZE, rows * length)
    pad = -(rows * length) % chunk
    chunks = [jnp.pad(x.reshape(-1, width), ((0, pad), (0, 0))).reshape(-1, chunk, width) for x in hidden]

    def kl(states: tuple[jax.Array, jax.Array]) -> jax.Array:
        logits = [
            decoder.vocabulary_logits(x, head, softcap=model.logit_softcap)
            for x, head in zip(states, unembeddings, strict=True)
        ]
        return full_kl(logits[0][None] / temperature, logits[1][None] / temperature)[0]

    per_token = jax.lax.map(kl, tuple(chunks)).reshape(-1)[: rows * length].reshape(rows, length)
    return jnp.where(rollout.response_mask, per_token, 0.0).sum(axis=1)


def make_sampler(judge: Judge, sampling: SamplingConfig, mesh: jax.sharding.Mesh, *, batch_size: int):
    """``sample(params, encoded prompts, key) -> list[Sample]``, prompts in order, any number of them.

    The key is folded with the batch's index; a row's sample depends on its place and the key, not on its neighbours.
    """
    eos_id, pad_id = tokenizers.eos_id(judge.tokenizer), tokenizers.pad_id(judge.tokenizer)

    @jax.jit
    def rollout_and_measure(params, reference, tokens, token_mask, key):
        rollout = generate(
            judge.model, params, tokens, token_mask, key, sampling=sampling, eos_id=eos_id, pad_id=pad_id
        )
        return rollout, sequence_full_kl(judge.model, params, reference, rollout, sampling.temperature)

    def sample(params: Any, encoded: batches.Encoded, key: jax.Array) -> list[Sample]:
        samples = []
        for index, (batch, real) in enumerate(batches.eval_batches(encoded, batch_size)):
            tokens, token_mask = meshes.put_rows(mesh, (batch["tokens"], batch["token_mask"]))
            rollout, kl = rollout_and_measure(
                params, judge.reference, tokens, token_mask, jax.random.fold_in(key, index)
            )
            rows = [encoded.rows[i].row for i in batch["index"]]
            proxy = hosts.fetch(judge.reward(rollout, rows))
            gold = None if judge.gold is None else judge.gold(rollout, rows)
            beside = {name: hosts.fetch(of(rollout, rows)) for name, of in judge.beside.items()}
            rollout, kl = hosts.fetch((rollout, kl))
            responses = response_texts(judge.tokenizer, rollout)
            samples += [
                Sample(
                    prompt=rows[i].prompt,
                    response=responses[i],
                    proxy=float(proxy[i]),
                    gold=None if gold is None else float(gold[i]),
                    kl=float(kl[i]),
                    length=int(rollout.response_mask[i].sum()),
                    terminated=bool(rollout.terminated[i]),
                    beside={name: float(scores[i]) for name, scores in beside.items()},
                )
                for i in np.flatnonzero(real)
            ]
        return samples

    return sample


def summarize(samples: Sequence[Sample]) -> dict[str, float]:
    """Means over samples: proxy, gold (with its standard deviation, where there is one), kl, length, distinct_2,
    terminated, and what was measured beside."""
    values = {
        "proxy": float(np.mean([s.proxy for s in samples])),
        "kl": float(np.mean([s.kl for s in samples])),
        "length": float(np.mean([s.length for s in samples])),
        "distinct_2": distinct_n((s.response for s in samples), 2),
        "terminated": float(np.mean([s.terminated for s in samples])),
    }
    values |= {name: float(np.mean([s.beside[name] for s in samples])) for name in samples[0].beside}
    if all(s.gold is not None for s in samples):
        gold = np.array([s.gold for s in samples])
        values["gold"] = float(gold.mean())
        if len(samples) > 1:
            values["gold_std"] = float(gold.std(ddof=1))
    return values


def best_of_n(groups: Sequence[Sequence[Sample]]) -> list[Sample]:
    """Of each prompt's samples the one with the highest proxy; the first where they tie."""
    return [max(group, key=lambda sample: sample.proxy) for group in groups]


def best_of_n_kl(n: int) -> float:
    """log n - (n-1)/n nats: an upper bound on KL(best-of-n || policy), exact without ties (Beirami et al. 2024)."""
    return math.log(n) - (n - 1) / n
