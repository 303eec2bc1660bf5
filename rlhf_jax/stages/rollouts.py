"""What the stages that sample share: rollouts, and scores of them. Imports all below."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data import batches, mixtures
from rlhf_jax.data import tokenizer as tokenizers
from rlhf_jax.errors import InputError
from rlhf_jax.evaluation.policies import RowReward
from rlhf_jax.metrics import Total, mean_of, merge
from rlhf_jax.parallel import hosts, sharding
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.rewards import judges, reward_model
from rlhf_jax.sampling.generate import SamplingConfig, generate
from rlhf_jax.sampling.refill import generate_refilled
from rlhf_jax.stages.handoffs import Model
from rlhf_jax.stages.run_directory import Run
from rlhf_jax.types import Rollout, ScoredRollout

# (policy params, batch of prompts, key, optimiser step, multiplier or None) -> (what was sampled and scored, each row's
# prompt, metrics).
Collect = Callable[..., tuple[ScoredRollout, np.ndarray, dict]]
# (scores of K rewards [K, B], multiplier or None) -> what is optimised [B] float32.
Combine = Callable[[jax.Array, jax.Array | None], jax.Array]


def make_collect(
    rollout: Callable[..., Rollout],
    reward: Callable[[Rollout, np.ndarray], Any],
    *,
    combine: Combine | None = None,
    step_scores: Callable[[Rollout, np.ndarray], tuple[jax.Array, jax.Array]] | None = None,
    group_size: int = 1,
    rounds: int = 1,
    missing_eos_score: float | None = None,
) -> Collect:
    """Samples ``group_size`` responses to each prompt and scores them, one group after another along the rows.

    Args:
      rollout: see ``make_rollout``.
      reward: ``reward(rollout, index of each row's prompt) -> [B]``: what is optimised; with ``combine``, [K, B]; of a
        judge that may fail, ``judges.Judged``: what it gave no verdict on loses its response tokens, so that nothing is
        learned from it.
      combine: what is optimised of several rewards, whose means are the metrics ``proxy_1``, ``proxy_2``, ....
      step_scores: of the arguments of ``reward``, what each step is worth and where steps end, for methods that give
        credit by steps.
      group_size: responses a prompt.
      rounds: with more than one, a batch holds that many times the prompts: groups whose rewards are all equal are
        sampled anew from further prompts until all groups have a spread or the prompts run out (DAPO's dynamic
        sampling, Yu et al. 2025, section 3.2). Groups without spread fill what is then still missing.
      missing_eos_score: what the method will put in place of the score of a response that never ended; the spread that
        counts is the one after that. Scores are handed on as they are.
    """

    def collect(params, prompts, key, step, multiplier=None):
        count_of_prompts = len(prompts["index"]) // rounds
        found: list[ScoredRollout] = []
        spread: list[np.ndarray] = []
        metrics: dict = {}
        for number in range(rounds):
            part = slice(number * count_of_prompts, (number + 1) * count_of_prompts)
            repeated = {name: np.repeat(x[part], group_size, axis=0) for name, x in prompts.items()}
            sampled = rollout(params, repeated, jax.random.fold_in(key, number), step)
            answer = reward(sampled, repeated["index"])
            steps, ends = (None, None) if step_scores is None else step_scores(sampled, repeated["index"])
            sampled, scores, measured = _scored(sampled, answer, combine, multiplier)
            metrics = merge(metrics, measured)
            found.append(ScoredRollout(rollout=sampled, scores=scores, step_scores=steps, step_mask=ends))
            if rounds == 1:
                return found[0], repeated["index"], metrics
            learned_from = reward_model.replace_unfinished(scores, sampled.terminated, missing_eos_score)
            groups, mask = hosts.fetch((learned_from, sampled.response_mask))
            groups, judged = groups.reshape(-1, group_size), mask.any(axis=1).reshape(-1, group_size)
            spread.append((groups != groups[:, :1]).any(axis=1) & judged.all(axis=1))
            if sum(kept.sum() for kept in spread) >= count_of_prompts:
                break
        whether = np.concatenate(spread)
        # Those with a spread first, in the order in which they were sampled.
        chosen = np.argsort(~whether, kind="stable")[:count_of_prompts]
        rows = (chosen[:, None] * group_size + np.arange(group_size)).reshape(-1)
        # policy_step is one number for all rows.
        scored = jax.tree.map(
            lambda *parts: jnp.concatenate(parts)[rows] if parts[0].ndim else parts[0], *found
        )
        metrics |= {"rounds": mean_of(float(len(found))), "groups_with_spread": mean_of(whether[chosen])}
        return scored, np.repeat(prompts["index"][chosen], group_size), metrics

    return collect


def _scored(
    sampled: Rollout, answer: Any, combine: Combine | None, multiplier: jax.Array | None
) -> tuple[Rollout, jax.Array, dict]:
    """(the rollout, less what has no verdict; what is optimised [B]; metrics) of what a reward answered."""
    if isinstance(answer, judges.Judged):
        counts = {f"no_verdict_{reason}": Total(jnp.float32(n)) for reason, n in answer.reasons.items()}
        metrics = {"no_verdict": mean_of(~answer.has_verdict)} | counts
        return _forget(sampled, answer.has_verdict), jnp.asarray(answer.scores), metrics
    if combine is None:
        return sampled, jnp.asarray(answer), {}
    # By index: an array that lies on several hosts cannot be iterated over.
    metrics = {f"proxy_{k + 1}": mean_of(answer[k]) for k in range(len(answer))}
    return sampled, combine(answer, multiplier), metrics


def _forget(rollout: Rollout, kept: np.ndarray) -> Rollout:
    """The rollout in which rows that are not ``kept``, [B] bool, have no response tokens."""
    mask = rollout.response_mask & kept[:, None]

    def off_mask(x: jax.Array | None) -> jax.Array | None:
        return None if x is None else jnp.where(mask, x, 0.0)

    return dataclasses.replace(
        rollout,
        response_mask=mask,
        log_probs=off_mask(rollout.log_probs),
        policy_log_probs=off_mask(rollout.policy_log_probs),
    )


def make_rollout(
    run: Run, model: Model, sampling: SamplingConfig, *, slots: int = 0
) -> Callable[..., Rollout]:
    """``rollout(params, prompts, key, step) -> Rollout``; ``prompts`` is a batch of ``batches.prompt_batches``.

    slots: rows of the cache, over all devices: one whose response has ended takes the next prompt, so that no row waits
    for the longest of the batch (``sampling.refill``; the same tokens). 0: as many as the batch has rows.

    Raises:
      InputError: slots that do not divide over the devices, or a mesh that splits parameters.
    """
    how = {
        "sampling": sampling,
        "eos_id": tokenizers.eos_id(model.tokenizer),
        "pad_id": tokenizers.pad_id(model.tokenizer),
    }

    @jax.jit
    def sample(params, tokens, token_mask, key, step):
        return generate(model.config, params, tokens, token_mask, key, policy_step=step, **how)

    within_mesh = _make_queues(run.mesh, model, slots, how) if slots else sharding.within(run.mesh, sample)

    def rollout(params, prompts, key, step):
        tokens, token_mask = meshes.put_rows(run.mesh, (prompts["tokens"], prompts["token_mask"]))
        return within_mesh(params, tokens, token_mask, key, step)

    return rollout


def _make_queues(
    mesh: jax.sharding.Mesh, model: Model, slots: int, how: dict[str, Any]
) -> Callable[..., Rollout]:
    """What ``sample`` of `make_rollout` is, with a queue of its own for each device: they need not end together."""
    split = {axis: size for axis, size in mesh.shape.items() if axis != "data" and size > 1}
    if split:
        names = ", ".join(f"{axis}:{size}" for axis, size in split.items())
        raise InputError(
            f"config.slots is {slots}, for which each device holds whole parameters, and the mesh splits them "
            f"({names}); give slots=0, or --mesh with all devices on data"
        )
    devices = mesh.shape["data"]
    if slots % devices:
        raise InputError(
            f"config.slots is {slots}, which does not divide over {devices} devices; give a multiple of that"
        )
    rows, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()

    def of_device(params, tokens, token_mask, row_ids, key, step):
        return generate_refilled(
            model.config,
            params,
            tokens,
            token_mask,
            key,
            slots=slots // devices,
            row_ids=row_ids,
            policy_step=step,
            **how,
        )

    arrays = {field.name: rows for field in dataclasses.fields(Rollout)} | {"policy_step": whole}
    # No rules for logical axes are in scope: within a device nothing is left to split.
    of_all = jax.shard_map(
        of_device,
        mesh=mesh,
        in_specs=(whole, rows, rows, rows, whole, whole),
        out_specs=Rollout(**arrays),
        check_vma=False,
    )

    @jax.jit
    def sample(params, tokens, token_mask, key, step):
        row_ids = jnp.arange(tokens.shape[0])
        return of_all(params, tokens, token_mask, row_ids, key, jnp.asarray(step, jnp.int32))

    return sample


def answers(
    rollout: Callable[..., Rollout], params: Any, encoded: batches.Encoded, key: jax.Array, *, batch_size: int
) -> Iterator[tuple[Rollout, list[Any], np.ndarray]]:
    """What a policy says to each of ``encoded``, in batches of one shape: the rollout, its data rows, which are real.

    rollout: see `make_rollout`. A row's noise depends on ``key`` and its place.
    """
    for number, (batch, real) in enumerate(batches.eval_batches(encoded, batch_size)):
        said = rollout(params, batch, jax.random.fold_in(key, number), 0)
        yield said, [encoded.rows[i].row for i in batch["index"]], real


def of_prompts(reward: RowReward, encoded: batches.Encoded) -> Callable[[Rollout, np.ndarray], Any]:
    """A reward of data rows as one of indices into ``encoded``, which is what a batch of prompts carries."""
    return lambda rollout, index: reward(
        rollout, [row.row for row in mixtures.fetch(encoded.rows, np.asarray(index))]
    )
