"""What a process reward model is worth when it only chooses: best-of-n and a step beam. A stage; imports all below.

Best-of-n draws whole responses and keeps the one that the model likes best (Cobbe et al. 2021; Lightman et al. 2023);
the beam keeps the best beginnings after every step (``sampling.step_beam``). Neither trains anything.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from rlhf_jax import storage
from rlhf_jax.data import batches
from rlhf_jax.data import tokenizer as tokenizers
from rlhf_jax.errors import InputError, check_range
from rlhf_jax.evaluation import best_of_n as estimators
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.parallel import sharding
from rlhf_jax.rewards import verifiers
from rlhf_jax.sampling.generate import SamplingConfig, generate
from rlhf_jax.sampling.prompts import pad_prompts
from rlhf_jax.sampling.step_beam import Place, Score, step_beam
from rlhf_jax.stages import inputs, rewards
from rlhf_jax.stages.handoffs import (
    Model,
    check_context,
    check_same_family,
    check_scores,
    load_model,
    load_start,
)
from rlhf_jax.stages.prompts import encode_held_out_prompts
from rlhf_jax.stages.run_directory import Purpose, Run, open_run
from rlhf_jax.training import interrupt
from rlhf_jax.training.interrupt import StopRequest
from rlhf_jax.types import DemonstrationBatch

SUMMARY = "summary.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One search.

    num_prompts: held-out prompts with answers. width, expansions: of the beam; best-of-n draws as many responses to a
    prompt as the beam draws steps in a round, ``width * expansions``. step_length: tokens of one step at most; what
    goes beyond is cut there and judged as it is. max_steps: steps of a response at most. scoring: how the scores of
    steps become one.
    """

    seed: int = 0
    data: inputs.DataConfig = dataclasses.field(default_factory=inputs.DataConfig)
    num_prompts: int = 256
    width: int = 4
    expansions: int = 4
    step_length: int = 12
    max_steps: int = 8
    batch_size: int = 256
    temperature: float = 1.0
    scoring: rewards.Scoring = dataclasses.field(default_factory=rewards.Scoring)

    def __post_init__(self) -> None:
        counts = ("num_prompts", "width", "expansions", "step_length", "max_steps", "batch_size")
        check_range(self, *counts, at_least=1)
        if self.scoring.weights:
            raise InputError(
                f"config.scoring.weights is {self.scoring.weights}, and a search asks one process reward model; leave "
                "it out"
            )


def run(
    config: Config,
    workdir: str | os.PathLike,
    *,
    policy_from: str,
    reward_from: str,
    mesh: jax.sharding.Mesh | None = None,
    stop: StopRequest,
) -> dict[str, Any]:
    """Draws, judges, and leaves ``summary.json``.

    Args:
      config: see ``Config``.
      workdir: the run's directory.
      policy_from: the run of the policy that is sampled.
      reward_from: the run of a process reward model.
      mesh: see ``parallel.mesh``; None puts all devices on its data axis.
      stop: looked at between batches.

    Returns:
      "best_of_n" -> n -> the share of prompts answered right when the model chooses among n (unbiased, from all
      subsets), for n = 1, 2, 4, ...; "any_right" -> n -> the share where one of n is right; "step_beam" -> the share
      that the beam answers right; "tokens" -> how many were drawn for a prompt, by best-of-n with all and by the beam.

    Raises:
      InputError: prompts without answers, or a reward model that is none of steps or does not fit the policy.
      Interrupted: stopped on request; nothing half-done is kept.
    """
    where = {"policy_from": policy_from, "reward_from": reward_from}
    run_ = open_run(workdir, "search", config, inputs=where, parallelism="jit", mesh=mesh, stop=stop)
    meshes.check_rows(run_.mesh, config.batch_size, "config.batch_size")
    policy, judge = load_start(policy_from, run_), load_model(reward_from, run_)
    check_same_family(policy, judge)
    check_scores(judge, steps=True)
    for model in (policy, judge):
        check_context(model, config.data.prompt_length + config.data.response_length)
    room = policy.config.max_length - config.data.prompt_length
    if config.step_length > room:
        raise InputError(
            f"config.step_length is {config.step_length}, and beside a prompt the context of {policy_from} has room "
            f"for {room} tokens; lower it"
        )
    prompts = _prompts(config, run_, policy)
    score = make_score(config, run_, judge, [row.prompt_ids for row in prompts.rows])
    right = _right(policy, prompts)

    count = config.width * config.expansions
    draw_whole = make_draw(
        config,
        run_,
        policy,
        width=config.data.prompt_length,
        max_new_tokens=config.data.response_length,
    )
    numbers = [prompt for prompt in range(len(prompts)) for _ in range(count)]
    drawn = draw_whole([prompts.rows[prompt].prompt_ids for prompt in numbers], 0)
    places = [(prompt, said) for prompt, (said, _) in zip(numbers, drawn, strict=True)]
    scores, found = (judged(places).reshape(-1, count) for judged in (score, right))
    ns = [2**k for k in range(count.bit_length())]
    chosen, spent = _beam(config, run_, policy, judge, prompts, score)
    summary = {
        "best_of_n": {n: float(estimators.expected_best(scores, found, n).mean()) for n in ns},
        "any_right": {n: float(estimators.expected_best(found, found, n).mean()) for n in ns},
        "step_beam": float(right(chosen).mean()),
        "tokens": {
            "best_of_n": sum(len(said) for _, said in places) / len(prompts),
            "step_beam": spent / len(prompts),
        },
    }
    storage.replace(run_.workdir / SUMMARY, json.dumps(summary, indent=1))
    return summary


def _prompts(config: Config, run_: Run, policy: Model) -> batches.Encoded:
    encoded = encode_held_out_prompts(run_, config.data, policy, config.num_prompts)
    missing = next((row.row.source for row in encoded.rows if not row.row.answer), None)
    if missing is not None:
        raise InputError(f"{missing} has no answer to hold a response against; give prompts with answers")
    return encoded


def _right(policy: Model, prompts: batches.Encoded) -> Callable[[Sequence[Place]], np.ndarray]:
    """``right(places) -> [N]`` float32: 1 where the final number is the prompt's answer."""

    def right(places: Sequence[Place]) -> np.ndarray:
        texts = [
            tokenizers.decode_rows(policy.tokenizer, np.array([said]), np.ones((1, len(said)), bool))[0]
            for _, said in places
        ]
        return verifiers.gsm8k_reward(texts, [prompts.rows[prompt].row.answer for prompt, _ in places])

    return right


def _beam(
    config: Config, run_: Run, policy: Model, judge: Model, prompts: batches.Encoded, score: Score
) -> tuple[list[Place], int]:
    """What the beam chose for every prompt, and how many tokens it drew."""
    limit, spent = config.data.response_length, 0
    # What a step is added to, and the step, have to fit into the policy's context.
    width = min(config.data.prompt_length + limit, policy.config.max_length - config.step_length)
    how = {"width": width, "max_new_tokens": config.step_length, "marks": step_marks(judge)}
    draw = make_draw(config, run_, policy, **how)

    def extend(beginnings: Sequence[Place], number: int) -> list[tuple[tuple[int, ...], bool]]:
        nonlocal spent
        texts = [(*prompts.rows[prompt].prompt_ids, *said) for prompt, said in beginnings]
        fits = [len(text) <= width for text in texts]
        drawn = iter(draw([text for text, here in zip(texts, fits, strict=True) if here], 1 + number))
        found = []
        for (_, said), here in zip(beginnings, fits, strict=True):
            more, ended = next(drawn) if here else ((), True)
            spent += len(more)
            # The judge reads ``response_length`` tokens: what is that long ends there.
            found.append((more[: limit - len(said)], ended or len(said) + len(more) >= limit))
        return found

    sizes = {"width": config.width, "expansions": config.expansions, "max_steps": config.max_steps}
    best = step_beam(len(prompts), extend, score, **sizes)
    return [(prompt, kept.response) for prompt, kept in enumerate(best)], spent


def step_marks(judge: Model) -> np.ndarray:
    """Which ids end a step, [vocabulary of the model] bool."""
    marks = tokenizers.tokens_with(judge.tokenizer, judge.facts["step_mark"])
    return np.pad(marks, (0, judge.config.vocab_size - len(marks)))


def make_draw(
    config: Config,
    run_: Run,
    policy: Model,
    *,
    width: int,
    max_new_tokens: int,
    marks: np.ndarray | None = None,
) -> Callable[[Sequence[Sequence[int]], int], list[tuple[tuple[int, ...], bool]]]:
    """``draw(ids of N texts, number of the draw) -> N times (ids that follow, whether EOS is the last)``.

    width: the longest text. marks: ids after which it goes no further, beside EOS.
    """
    sampling = SamplingConfig(max_new_tokens=max_new_tokens, temperature=config.temperature)
    eos_id, pad_id = tokenizers.eos_id(policy.tokenizer), tokenizers.pad_id(policy.tokenizer)
    # Of stop strings, the table of one that is any of the marks: from the start to the match, which is never left.
    table = None if marks is None else np.stack([marks, np.ones_like(marks)]).astype(np.int16)
    key = run_.key(config.seed, Purpose.ROLLOUT)
    compiled = sharding.within(
        run_.mesh,
        jax.jit(
            lambda params, tokens, mask, key: generate(
                policy.config,
                params,
                tokens,
                mask,
                key,
                sampling=sampling,
                eos_id=eos_id,
                pad_id=pad_id,
                stop_table=table,
            )
        ),
    )
    params = {"decoder": policy.params["decoder"]}

    def draw(texts: Sequence[Sequence[int]], number: int) -> list[tuple[tuple[int, ...], bool]]:
        found = []
        for part, (batch, real) in enumerate(_chunks(texts, config.batch_size, run_.stop)):
            arrays = meshes.put_rows(run_.mesh, pad_prompts(batch, width=width, pad_id=pad_id))
            of_part = jax.random.fold_in(jax.random.fold_in(key, number), part)
            rollout = jax.device_get(compiled(params, *arrays, of_part))
            for row in range(real):
                mask = rollout.response_mask[row]
                said = rollout.tokens[row, -len(mask) :][mask].tolist()
                found.append((tuple(said), said[-1] == eos_id))
        return found

    return draw


def make_score(config: Config, run_: Run, judge: Model, prompts: Sequence[Sequence[int]]) -> Score:
    """``score(places) -> [N]`` float32: what the process reward model makes of the steps so far."""
    reward = sharding.within(run_.mesh, rewards.process_reward(judge, config.scoring).of_rows)
    pad_id = tokenizers.pad_id(judge.tokenizer)
    widths = config.data.prompt_length, config.data.response_length

    def lay_out(place: Place) -> DemonstrationBatch:
        prompt, prompt_mask = batches.pad_left(prompts[place[0]], widths[0], pad_id)
        said, mask = batches.pad_right(place[1], widths[1], pad_id)
        tokens, token_mask = np.concatenate([prompt, said]), np.concatenate([prompt_mask, mask])
        return DemonstrationBatch(tokens=tokens, token_mask=token_mask, response_mask=mask)

    def score(places: Sequence[Place]) -> np.ndarray:
        found = []
        for batch, real in _chunks(places, config.batch_size, run_.stop):
            rows = jax.tree.map(lambda *leaves: np.stack(leaves), *map(lay_out, batch))
            found.append(np.asarray(reward(meshes.put_rows(run_.mesh, rows), [None] * len(batch)))[:real])
        return np.concatenate(found)

    return score


def _chunks(items: Sequence[Any], size: int, stop: StopRequest) -> Iterator[tuple[list[Any], int]]:
    """(``size`` items, how many of them are real): the last chunk is filled up with its first item."""
    for start in range(0, len(items), size):
        interrupt.check(stop, "a search keeps nothing half-done")
        part = list(items[start : start + size])
        yield part + part[:1] * (size - len(part)), len(part)
