"""How far policies have moved towards a sentiment, and what their first model thinks of it. A stage; imports all below.

There is no gold reward: what a policy pays is its KL to the first model, and how strange that finds what it now says.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from rlhf_jax import storage
from rlhf_jax.data import batches
from rlhf_jax.errors import InputError, check_range
from rlhf_jax.evaluation import policies
from rlhf_jax.parallel import hosts, sharding
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.rewards.sentiment import sentiment_reward
from rlhf_jax.sampling.generate import SamplingConfig
from rlhf_jax.stages import inputs, prompts, rewards, rollouts
from rlhf_jax.stages.handoffs import check_same_family, load_start
from rlhf_jax.stages.run_directory import Purpose, open_run
from rlhf_jax.storage import Path
from rlhf_jax.training import interrupt
from rlhf_jax.training.forward import response_log_probs
from rlhf_jax.training.interrupt import StopRequest

SUMMARY, SAMPLES, PAIRS = "summary.json", "samples.json", "pairs.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One measurement: ``responses_per_prompt`` responses to each of ``num_prompts`` held-out prompts; ``num_shown`` of
    them are kept as text."""

    seed: int = 0
    data: inputs.DataConfig = dataclasses.field(default_factory=inputs.DataConfig)
    num_prompts: int = 32
    responses_per_prompt: int = 8
    batch_size: int = 64
    temperature: float = 1.0
    num_shown: int = 3

    def __post_init__(self) -> None:
        check_range(self, "num_prompts", "responses_per_prompt", "batch_size", at_least=1)
        check_range(self, "num_shown", at_least=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """Pairs for offline DPO: ``responses_per_prompt`` of the first model to each training prompt, an even number, the
    happiest with the least happy, the second with the last but one, and so on; equal ones make no pair."""

    seed: int = 0
    data: inputs.DataConfig = dataclasses.field(default_factory=inputs.DataConfig)
    responses_per_prompt: int = 16
    batch_size: int = 64
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_range(self, "responses_per_prompt", "batch_size", at_least=1)
        if self.responses_per_prompt % 2:
            raise InputError(
                f"config.responses_per_prompt is {self.responses_per_prompt}, which does not divide into pairs; give "
                "an even number"
            )


def write_pairs(
    config: PairsConfig,
    workdir: str | os.PathLike,
    *,
    first_from: str,
    mesh: jax.sharding.Mesh | None = None,
    stop: StopRequest,
) -> Path:
    """What the first model says, labelled by sentiment: ``pairs.jsonl``, whose path it returns; left alone if there.

    Rows have prompt, chosen and rejected, as texts. Arguments: see `run`.

    Raises:
      InputError: no two responses to any prompt differ in sentiment.
      Interrupted: stopped on request; nothing half-done is kept.
    """
    where = {"first_from": first_from}
    run_ = open_run(workdir, "steering_pairs", config, inputs=where, parallelism="jit", mesh=mesh, stop=stop)
    path = run_.workdir / PAIRS
    if path.exists():
        return path
    meshes.check_rows(run_.mesh, config.batch_size, "config.batch_size")
    first, count = load_start(first_from, run_), config.responses_per_prompt
    asked, _ = prompts.encode_prompts(run_, config.data, first, num_eval_prompts=1, responses_per_prompt=1)
    rollout = rollouts.make_rollout(
        run_,
        first,
        SamplingConfig(max_new_tokens=config.data.response_length, temperature=config.temperature),
    )
    params, key = {"decoder": first.params["decoder"]}, run_.key(config.seed, Purpose.ROLLOUT)
    texts: list[str] = []
    of_first = rollouts.answers(
        rollout, params, prompts.in_rounds(asked, count), key, batch_size=config.batch_size
    )
    for said, _, real in of_first:
        interrupt.check(stop, "pairs are kept once all are there")
        batch = policies.response_texts(first.tokenizer, hosts.fetch(said))
        texts += [text for text, is_real in zip(batch, real, strict=True) if is_real]
    rows = [
        {"prompt": encoded.row.prompt, "chosen": chosen, "rejected": rejected}
        for place, encoded in enumerate(asked.rows)
        for chosen, rejected in pairs_by_sentiment(texts[place :: len(asked)])
    ]
    if not rows:
        raise InputError(
            f"{first.origin} says nothing to any of {len(asked)} prompts that is happier than what else it says; give "
            "more responses_per_prompt, or other prompts"
        )
    storage.replace(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs_by_sentiment(texts: Sequence[str]) -> list[tuple[str, str]]:
    """(chosen, rejected) of responses to one prompt, the happiest with the least happy first; none of equal ones.

    Responses that say nothing are left out, as no file of preferences can hold them.
    """
    texts = [text for text in texts if text.strip()]
    scores = sentiment_reward(texts)
    order = np.argsort(-scores, kind="stable")
    half = len(texts) // 2
    sides = zip(order[:half], order[::-1][:half], strict=True)
    return [(texts[best], texts[worst]) for best, worst in sides if scores[best] > scores[worst]]


def run(
    config: Config,
    workdir: str | os.PathLike,
    *,
    first_from: str,
    policies_from: Mapping[str, str],
    mesh: jax.sharding.Mesh | None = None,
    stop: StopRequest,
) -> dict[str, dict[str, float]]:
    """Measures the first model ("first") and every named policy, all with the same prompts and noise.

    Args:
      config: see ``Config``.
      workdir: gets ``summary.json`` and ``samples.json``.
      first_from: the run, or Hugging Face directory, that the policies started from.
      policies_from: name -> run.
      mesh: see ``parallel.mesh``; None puts all devices on its data axis.
      stop: looked at between policies.

    Returns:
      name -> sentiment (mean, and its standard error), kl (nats a response), perplexity (of the first model a token of
      what the policy said), length (tokens), distinct_2.

    Raises:
      InputError: a policy of another architecture.
      Interrupted: stopped on request; nothing half-done is kept.
    """
    where = {"first_from": first_from, **policies_from}
    run_ = open_run(workdir, "steering", config, inputs=where, parallelism="jit", mesh=mesh, stop=stop)
    meshes.check_rows(run_.mesh, config.batch_size, "config.batch_size")
    first = load_start(first_from, run_)
    encoded = prompts.in_rounds(
        prompts.encode_held_out_prompts(run_, config.data, first, config.num_prompts),
        config.responses_per_prompt,
    )
    sampling = SamplingConfig(max_new_tokens=config.data.response_length, temperature=config.temperature)
    judge = policies.Judge(
        model=first.config,
        reference={"decoder": first.params["decoder"]},
        reward=rewards.sentiment_reward(first.tokenizer),
        gold=None,
        tokenizer=first.tokenizer,
    )
    sample = sharding.within(
        run_.mesh, policies.make_sampler(judge, sampling, run_.mesh, batch_size=config.batch_size)
    )
    nll = sharding.within(run_.mesh, make_nll(config, run_, first))
    key = run_.key(config.seed, Purpose.EVALUATION)
    summary, shown = {}, {}
    for name, path in {"first": first_from, **policies_from}.items():
        interrupt.check(stop, "a measurement keeps nothing half-done")
        model = load_start(path, run_)
        check_same_family(first, model, architecture=True)
        params = {"decoder": model.params["decoder"]}
        samples = sample(params, encoded, key)
        found, scores = policies.summarize(samples), [s.proxy for s in samples]
        summary[name] = {
            "sentiment": found["proxy"],
            "sentiment_error": standard_error(scores, rounds=config.responses_per_prompt),
            "kl": found["kl"],
            "perplexity": math.exp(nll(params, encoded, key)),
            "length": found["length"],
            "distinct_2": found["distinct_2"],
        }
        shown[name] = [{"prompt": s.prompt, "response": s.response, "sentiment": s.proxy} for s in samples]
        shown[name] = shown[name][: config.num_shown]
    storage.replace(run_.workdir / SAMPLES, json.dumps(shown, indent=1))
    storage.replace(run_.workdir / SUMMARY, json.dumps(summary, indent=1))
    return summary


def standard_error(scores: Sequence[float], *, rounds: int) -> float | None:
    """The standard error of the mean over prompts; None of one prompt, whose spread nobody has seen.

    Responses to one prompt are alike, so that prompts count and not responses.

    Args:
      scores: of ``rounds`` responses a prompt, as ``prompts.in_rounds`` has them.
      rounds: how many that are.
    """
    of_prompts = np.asarray(scores, np.float64).reshape(rounds, -1).mean(axis=0)
    if of_prompts.size < 2:
        return None
    return float(of_prompts.std(ddof=1) / math.sqrt(of_prompts.size))


def make_nll(config: Config, run_: Any, first: Any):
    """``nll(params, encoded prompts, key)``: what the first model pays a token, in nats, for what a policy says.

    It draws what ``policies.make_sampler`` draws for the same key: samples keep their texts and not their ids.
    """
    sampling = SamplingConfig(max_new_tokens=config.data.response_length, temperature=config.temperature)
    rollout = rollouts.make_rollout(run_, first, sampling)
    reference = {"decoder": first.params["decoder"]}
    log_probs = jax.jit(lambda params, rows: response_log_probs(first.config, params, rows)[0])

    def nll(params: Any, encoded: batches.Encoded, key: jax.Array) -> float:
        total, tokens = 0.0, 0
        for index, (batch, real) in enumerate(batches.eval_batches(encoded, config.batch_size)):
            said = rollout(params, batch, jax.random.fold_in(key, index), 0)
            mask = np.asarray(said.response_mask)[real]
            total -= float(np.asarray(log_probs(reference, said))[real].sum(dtype=np.float64))
            tokens += int(mask.sum())
        return total / tokens

    return nll
