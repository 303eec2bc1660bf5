"""Direct preference optimisation: from SFT and pairs, without reward model or sampling. A stage; imports all below.

Loss: -log sigmoid(beta ((log pi - log pi_ref)(y_w) - (log pi - log pi_ref)(y_l))) (Rafailov et al. 2023,
equation 7), with log-probabilities summed over the response. The reference is the SFT policy, frozen.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data import batches
from rlhf_jax.errors import check_range
from rlhf_jax.losses import dpo_loss, implicit_rewards, sequence_log_probs
from rlhf_jax.metrics import count, mean_of
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.stages import inputs
from rlhf_jax.stages.run_directory import (
    Run,
    leave_handoff,
    load_model,
    open_run,
)
from rlhf_jax.stages.supervised import encode_split, train
from rlhf_jax.training.forward import concatenate_pairs, response_log_probs
from rlhf_jax.training.interrupt import StopRequest
from rlhf_jax.training.loop import Schedule
from rlhf_jax.training.optimizer import OptimizerConfig
from rlhf_jax.types import PreferenceBatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One DPO run.

    beta: strength of the leash to the reference, per nat. label_smoothing: probability that a label is flipped (cDPO).
    """

    seed: int = 0
    data: inputs.DataConfig = dataclasses.field(default_factory=inputs.DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    schedule: Schedule = dataclasses.field(default_factory=lambda: Schedule(num_steps=300))
    batch_size: int = 64
    num_microbatches: int = 1
    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_range(self, "batch_size", "num_microbatches", at_least=1)
        check_range(self, "beta", above=0)
        check_range(self, "label_smoothing", at_least=0, below=0.5)


def pair_log_probs(model: ModelConfig, params: Any, reference: Any, batch: PreferenceBatch):
    """Summed log-probs of policy chosen, policy rejected, reference chosen, reference rejected: [B] nats each."""
    both = concatenate_pairs(batch.chosen, batch.rejected)
    sums = [
        sequence_log_probs(response_log_probs(model, weights, both)[0], both.response_mask)
        for weights in (params, reference)
    ]
    return tuple(half for side in sums for half in jnp.split(side, 2))


def make_objective(model: ModelConfig, *, beta: float, label_smoothing: float = 0.0):
    """(policy params, {"reference": params}, PreferenceBatch) -> the mean DPO loss over pairs, and metrics."""

    def objective(params: Any, frozen: Any, batch: PreferenceBatch):
        chosen, rejected, ref_chosen, ref_rejected = pair_log_probs(model, params, frozen["reference"], batch)
        losses = dpo_loss(
            chosen, rejected, ref_chosen, ref_rejected, beta=beta, label_smoothing=label_smoothing
        )
        reward_chosen = implicit_rewards(chosen, ref_chosen, beta=beta)
        reward_rejected = implicit_rewards(rejected, ref_rejected, beta=beta)
        metrics = {
            "accuracy": mean_of(reward_chosen > reward_rejected),
            "margin": mean_of(reward_chosen - reward_rejected),
            "reward_chosen": mean_of(reward_chosen),
            "reward_rejected": mean_of(reward_rejected),
            "tokens": count(batch.chosen.token_mask) + count(batch.rejected.token_mask),
        }
        return {"dpo": mean_of(losses)}, metrics

    return objective


def make_evaluator(model: ModelConfig, encoded: Any, batch_size: int, beta: float, reference: Any, run: Run):
    """``evaluate(params)`` -> accuracy and mean margin of implicit rewards over held-out pairs."""

    @jax.jit
    def margins_of(params, reference, batch):
        chosen, rejected, ref_chosen, ref_rejected = pair_log_probs(model, params, reference, batch)
        return implicit_rewards(chosen, ref_chosen, beta=beta) - implicit_rewards(
            rejected, ref_rejected, beta=beta
        )

    def evaluate(params) -> Mapping[str, float]:
        margins = np.concatenate(
            [
                np.asarray(margins_of(params, reference, meshes.put_rows(run.mesh, batch)))[rows]
                for batch, rows in batches.eval_batches(encoded, batch_size)
            ]
        )
        # A tie is half right: before the first update every margin is 0.
        return {
            "eval/accuracy": float(np.mean((1 + np.sign(margins)) / 2)),
            "eval/margin": float(margins.mean()),
        }

    return evaluate


def run(
    config: Config,
    workdir: str | os.PathLike,
    *,
    init_from: str,
    parallelism: meshes.Parallelism = "jit",
    stop: StopRequest,
) -> None:
    """Runs the stage to its hand-off; returns at once if it is there.

    Raises:
      InputError: anything the user gave that cannot be used, before any training.
      Interrupted: stopped on request, after saving.
    """
    run_ = open_run(
        workdir, "dpo", config, inputs={"init_from": init_from}, parallelism=parallelism, stop=stop
    )
    if run_.finished:
        return
    model = load_model(init_from, run_)
    split = inputs.load_preferences(config.data)
    train_rows, held_out = encode_split(run_, config.data, model, split, batches.encode_preferences)

    params = {"decoder": model.params["decoder"]}
    # The train step donates its params; the reference must keep buffers of its own.
    frozen = {"reference": jax.tree.map(jnp.copy, params)}
    evaluate = make_evaluator(
        model.config, held_out, config.batch_size, config.beta, frozen["reference"], run_
    )
    params = train(
        run_,
        config,
        objective=make_objective(model.config, beta=config.beta, label_smoothing=config.label_smoothing),
        params=params,
        frozen=frozen,
        iterator=batches.preference_batches(
            train_rows, batch_size=config.batch_size, seed=run_.data_seed(config.seed)
        ),
        evaluate=evaluate,
        shown=("loss", "accuracy", "margin"),
    )
    leave_handoff(run_, config, model, params, made_from=[init_from], facts=dict(evaluate(params)))
