"""Direct preference optimisation and its family: from SFT and pairs, without reward model or sampling. A stage.

Loss: -log sigmoid(beta ((log pi - log pi_ref)(y_w) - (log pi - log pi_ref)(y_l))) (Rafailov et al. 2023,
equation 7), or another of ``stages.preference_objectives``. The reference is the SFT policy, frozen. Imports all below.
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
from rlhf_jax.errors import InputError, check_range
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.parallel import hosts, sharding
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.stages import adapters, inputs
from rlhf_jax.stages.handoffs import leave_handoff, load_start
from rlhf_jax.stages.preference_objectives import (
    PreferenceLoss,
    make_pair_objective,
    make_unpair,
    make_unpaired_objective,
    pair_scores,
)
from rlhf_jax.stages.run_directory import Run, open_run
from rlhf_jax.stages.supervised import encode_split, train
from rlhf_jax.training.interrupt import StopRequest
from rlhf_jax.training.loop import Schedule
from rlhf_jax.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run on pairs.

    loss: which loss, and its numbers. batches: how rows become batches. lora: whether an adapter is trained; the
    reference is then the base itself.
    """

    seed: int = 0
    data: inputs.DataConfig = dataclasses.field(default_factory=inputs.DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    schedule: Schedule = dataclasses.field(default_factory=lambda: Schedule(num_steps=300))
    batch_size: int = 64
    num_microbatches: int = 1
    batches: inputs.BatchConfig = dataclasses.field(default_factory=inputs.BatchConfig)
    loss: PreferenceLoss = dataclasses.field(default_factory=PreferenceLoss)
    lora: adapters.LoraOptions = dataclasses.field(default_factory=adapters.LoraOptions)

    def __post_init__(self) -> None:
        check_range(self, "batch_size", "num_microbatches", at_least=1)
        if self.data.soft_labels:
            raise InputError(
                "data.soft_labels is True, which the losses of this stage do not read; leave it False, or use --config."
                "loss.label_smoothing"
            )
        if self.loss.kind == "kto" and self.batch_size < 2:
            raise InputError(
                "batch_size is 1: loss.kind=kto compares with responses to other prompts; give 2 or more"
            )


def make_evaluator(model: ModelConfig, encoded: Any, config: Config, reference: Any, run: Run):
    """``evaluate(params)`` -> accuracy and mean margin over held-out pairs, of what the loss would have differ."""

    def difference(params, reference, batch):
        chosen, rejected = pair_scores(model, params, reference, batch, config.loss)
        return chosen - rejected

    margins_of = sharding.within(run.mesh, jax.jit(difference))

    def evaluate(params) -> Mapping[str, float]:
        margins = np.concatenate(
            [
                hosts.fetch(margins_of(params, reference, meshes.put_rows(run.mesh, batch)))[rows]
                for batch, rows in batches.eval_batches(encoded, config.batch_size)
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
    mesh: jax.sharding.Mesh | None = None,
    stop: StopRequest,
) -> None:
    """Runs the stage to its hand-off; returns at once if it is there.

    Raises:
      InputError: anything the user gave that cannot be used, before any training.
      Interrupted: stopped on request, after saving.
    """
    run_ = open_run(
        workdir,
        "dpo",
        config,
        inputs={"init_from": init_from},
        parallelism=parallelism,
        mesh=mesh,
        stop=stop,
    )
    if run_.finished:
        return
    model = load_start(init_from, run_)
    split = inputs.load_preferences(config.data)
    train_rows, held_out = encode_split(run_, config.data, model, split, batches.encode_preferences)

    params = {"decoder": model.params["decoder"]}
    # The train step donates its params; the reference must keep buffers of its own.
    frozen = {"reference": params if config.lora.rank else jax.tree.map(jnp.copy, params)}
    evaluate = make_evaluator(model.config, held_out, config, frozen["reference"], run_)
    unpaired = config.loss.kind == "kto"
    make_objective = make_unpaired_objective if unpaired else make_pair_objective
    trained = train(
        run_,
        config,
        model=model.config,
        objective=make_objective(model.config, config.loss),
        prepare=make_unpair(model.config, config.loss) if unpaired else None,
        params=params,
        frozen=frozen,
        iterator=inputs.preference_batches(
            config.batches,
            train_rows,
            batch_size=config.batch_size,
            seed=run_.data_seed(config.seed),
        ),
        evaluate=evaluate,
        shown=("loss", "accuracy", "margin", "reward_chosen", "reward_rejected"),
    )
    facts = dict(evaluate(trained.params))
    leave_handoff(run_, config, model, trained, made_from=[init_from], facts=facts)
