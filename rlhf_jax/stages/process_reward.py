"""A process reward model from solutions whose steps are judged, started from SFT. A stage; imports all below.

Loss: the cross-entropy of "this step is right" at the token that ends it, over judged steps (Lightman et al. 2023; Wang
et al. 2024, Math-Shepherd, equation 2). The head sees the prompt, the steps before, and the step itself.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from rlhf_jax import masking
from rlhf_jax.data import batches
from rlhf_jax.errors import InputError, check_range
from rlhf_jax.losses import process_reward_loss
from rlhf_jax.metrics import count
from rlhf_jax.models import heads
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.parallel import hosts, sharding
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.rewards import process_model
from rlhf_jax.stages import adapters, inputs
from rlhf_jax.stages.handoffs import leave_handoff, load_start
from rlhf_jax.stages.run_directory import Purpose, Run, open_run
from rlhf_jax.stages.supervised import encode_split, train
from rlhf_jax.training.interrupt import StopRequest
from rlhf_jax.training.loop import Schedule
from rlhf_jax.training.optimizer import OptimizerConfig
from rlhf_jax.types import StepsBatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One process-reward run; ``data.path`` is a file of solutions in labelled steps, ``data.format`` is not read.

    lora: whether an adapter and the head are trained. step_mark: what is written between steps. A token that has it
    ends a step, in training as in what a policy says.
    """

    seed: int = 0
    data: inputs.DataConfig = dataclasses.field(default_factory=inputs.DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    schedule: Schedule = dataclasses.field(default_factory=lambda: Schedule(num_steps=300))
    batch_size: int = 64
    num_microbatches: int = 1
    lora: adapters.LoraOptions = dataclasses.field(default_factory=adapters.LoraOptions)
    step_mark: str = "\n"

    def __post_init__(self) -> None:
        check_range(self, "batch_size", "num_microbatches", at_least=1)
        if not self.step_mark:
            raise InputError(
                "config.step_mark is empty, which divides nothing; give what stands between steps"
            )


def make_objective(model: ModelConfig):
    """(params, frozen, StepsBatch) -> the mean cross-entropy over judged steps, and metrics."""

    def objective(params: Any, frozen: Any, batch: StepsBatch):
        del frozen
        logits = process_model.column_logits(model, params, batch.responses)
        losses = process_reward_loss(logits, batch.step_labels, batch.step_mask)
        right = (logits > 0) == (batch.step_labels > 0.5)
        metrics = {
            "accuracy": masking.token_mean(right.astype(losses.dtype), batch.step_mask),
            "tokens": count(batch.responses.token_mask),
        }
        return {"steps": masking.token_mean(losses, batch.step_mask)}, metrics

    return objective


def make_step_scorer(model: ModelConfig, encoded: Any, batch_size: int, run: Run):
    """``score(params) -> (logits, labels)``, [N] float32 NumPy each, of every judged step of the encoded rows."""
    logits_of = sharding.within(
        run.mesh, jax.jit(lambda params, rows: process_model.column_logits(model, params, rows))
    )

    def score(params) -> tuple[np.ndarray, np.ndarray]:
        logits, labels = [], []
        for batch, rows in batches.eval_batches(encoded, batch_size):
            found = hosts.fetch(logits_of(params, meshes.put_rows(run.mesh, batch.responses)))
            judged = batch.step_mask & rows[:, None]
            logits.append(found[judged])
            labels.append(batch.step_labels[judged])
        return np.concatenate(logits), np.concatenate(labels)

    return score


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
    where = {"init_from": init_from}
    run_ = open_run(
        workdir, "process_reward", config, inputs=where, parallelism=parallelism, mesh=mesh, stop=stop
    )
    if run_.finished:
        return
    model = load_start(init_from, run_)

    def encode(rows, tokenizer, **widths):
        return batches.encode_process_steps(rows, tokenizer, step_mark=config.step_mark, **widths)

    split = inputs.load_process_steps(config.data)
    train_rows, held_out = encode_split(run_, config.data, model, split, encode)
    if not any(row.judged for row in held_out.rows):
        raise InputError(
            "no step of the held-out solutions is judged, so that nothing can be measured; raise "
            "--config.data.held_out_fraction, or --config.data.response_length if steps were cut off"
        )
    head = heads.init_scalar_head(model.config, run_.key(config.seed, Purpose.INIT))
    params = {"decoder": model.params["decoder"], "head": head}
    score_held_out = make_step_scorer(model.config, held_out, config.batch_size, run_)

    def evaluate(params) -> Mapping[str, float]:
        return measure(*score_held_out(params))

    trained = train(
        run_,
        config,
        model=model.config,
        objective=make_objective(model.config),
        params=meshes.put(params, sharding.parameter_sharding(run_.mesh, model.config, params)),
        frozen={},
        iterator=batches.steps_batches(
            train_rows, batch_size=config.batch_size, seed=run_.data_seed(config.seed), share=run_.share
        ),
        evaluate=evaluate,
        shown=("loss", "accuracy"),
    )
    facts = {"step_mark": config.step_mark, **evaluate(trained.params)}
    leave_handoff(run_, config, model, trained, made_from=[init_from], facts=facts)


def measure(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Of judged steps [N]: cross-entropy, accuracy, that of the best constant answer, and what it finds of wrong steps.

    A step counts as right where its label is above one half. "eval/wrong_found": the share of wrong steps that are
    called wrong; left out where none is wrong.
    """
    logits, right = logits.astype(np.float64), labels > 0.5
    values = {
        "eval/loss": float(np.mean(np.logaddexp(0.0, logits) - labels * logits)),
        "eval/accuracy": float(np.mean((logits > 0) == right)),
        "eval/constant_accuracy": float(max(right.mean(), 1 - right.mean())),
    }
    if not right.all():
        values["eval/wrong_found"] = float(np.mean(logits[~right] <= 0))
    return values
