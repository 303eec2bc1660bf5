"""A scalar reward model from pairwise preferences (Bradley-Terry), started from SFT. A stage; imports all below.

Loss: -log sigmoid(r(x, y_w) - r(x, y_l) - margin) (Ouyang et al. 2022, equation 1). The head starts at N(0, 1/(d+1))
and is read at the last token. After training the mean reward of chosen training responses is stored as an offset, so
that a score of 0 means "as good as those" (Huang et al. 2024).

An ensemble is trained as one model whose parameters have a leading axis: each member has a head of its own and sees its
own pairs in its own order (Coste et al. 2024).
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import storage
from rlhf_jax.data import batches, readers, world
from rlhf_jax.errors import InputError, check_range
from rlhf_jax.evaluation import calibration
from rlhf_jax.losses import bradley_terry_loss
from rlhf_jax.metrics import count, mean_of, written
from rlhf_jax.models import heads
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.parallel import hosts, sharding
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.rewards import ensembles, reward_model
from rlhf_jax.stages import adapters, inputs
from rlhf_jax.stages.run_directory import (
    Purpose,
    Run,
    leave_handoff,
    load_model,
    open_run,
)
from rlhf_jax.stages.supervised import encode_split, train
from rlhf_jax.training.forward import concatenate_pairs
from rlhf_jax.training.interrupt import StopRequest
from rlhf_jax.training.loop import Schedule
from rlhf_jax.training.optimizer import OptimizerConfig
from rlhf_jax.types import PreferenceBatch

# The first so many training pairs: the mean reward of their chosen responses becomes the offset.
NUM_REFERENCE_RESPONSES = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One reward-model run.

    members: reward models trained side by side from the one start, each on ``batch_size`` pairs a step of its own.
    Gradients are clipped together. lora: whether an adapter and the head are trained.
    margin, label_smoothing, centering: see ``losses.bradley_terry_loss``. batches: how rows
    become batches.
    """

    seed: int = 0
    data: inputs.DataConfig = dataclasses.field(default_factory=inputs.DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    schedule: Schedule = dataclasses.field(default_factory=lambda: Schedule(num_steps=300))
    batch_size: int = 64
    num_microbatches: int = 1
    batches: inputs.BatchConfig = dataclasses.field(default_factory=inputs.BatchConfig)
    members: int = 1
    lora: adapters.LoraOptions = dataclasses.field(default_factory=adapters.LoraOptions)
    margin: float = 0.0
    label_smoothing: float = 0.0
    centering: float = 0.0

    def __post_init__(self) -> None:
        check_range(self, "batch_size", "num_microbatches", "members", at_least=1)
        if self.members > 1 and self.lora.rank:
            raise InputError(
                f"lora.rank is {self.lora.rank} and members is {self.members}: adapters are of one model; give rank 0, "
                "or members=1"
            )
        if self.members > 1 and self.optimizer.weight_decay:
            raise InputError(
                f"config.optimizer.weight_decay is {self.optimizer.weight_decay}, which would decay the norm scales of "
                "an ensemble too; give 0, or members=1"
            )
        check_range(self, "label_smoothing", at_least=0, below=0.5)
        check_range(self, "centering", at_least=0)


def make_objective(
    model: ModelConfig, *, margin: float = 0.0, label_smoothing: float = 0.0, centering: float = 0.0
):
    """(params, frozen, PreferenceBatch) -> the mean Bradley-Terry loss over pairs, and metrics."""

    def objective(params: Any, frozen: Any, batch: PreferenceBatch):
        del frozen
        both = concatenate_pairs(batch.chosen, batch.rejected)
        chosen, rejected = jnp.split(reward_model.score(model, params, both), 2)
        how = {"margin": margin, "label_smoothing": label_smoothing, "centering": centering}
        losses = bradley_terry_loss(chosen, rejected, **how)
        if batch.probability is not None:
            # The cross-entropy to a soft label is the mean over which of the two was preferred.
            other = bradley_terry_loss(rejected, chosen, **how)
            losses = batch.probability * losses + (1.0 - batch.probability) * other
        metrics = {
            "accuracy": mean_of(chosen > rejected),
            "margin": mean_of(chosen - rejected),
            "tokens": count(both.token_mask),
        }
        return {"bradley_terry": mean_of(losses)}, metrics

    return objective


def make_ensemble_objective(model: ModelConfig, members: int, **loss: float):
    """`make_objective` of every member on its own pairs: row i of a batch belongs to member i modulo ``members``.

    Any run of rows that ``members`` divides, as a device or a micro-batch has, holds as many pairs of each.
    """
    of_one = make_objective(model, **loss)

    def objective(params: Any, frozen: Any, batch: PreferenceBatch):
        apart = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, members, *x.shape[1:]), 0, 1), batch)
        terms, metrics = jax.vmap(lambda member, pairs: of_one(member, frozen, pairs))(params, apart)
        # Totals and weights add up: the mean over members, whose gradient is a multiple of each member's own.
        return jax.tree.map(jnp.sum, (terms, metrics))

    return objective


def make_pair_scorer(model: ModelConfig, encoded: Any, batch_size: int, run: Run, *, is_ensemble: bool):
    """``score_pairs(params) -> (chosen, rejected)``, NumPy float32 [N] over all encoded pairs in order, or [E, N]."""
    score_rows = ensembles.score if is_ensemble else reward_model.score

    def score_both(params, batch):
        both = concatenate_pairs(batch.chosen, batch.rejected)
        return jnp.split(score_rows(model, params, both), 2, axis=-1)

    score = sharding.within(run.mesh, jax.jit(score_both))

    def score_pairs(params) -> tuple[np.ndarray, np.ndarray]:
        chosen, rejected = [], []
        for batch, rows in batches.eval_batches(encoded, batch_size):
            first, second = hosts.fetch(score(params, meshes.put_rows(run.mesh, batch)))
            chosen.append(first[..., rows])
            rejected.append(second[..., rows])
        return np.concatenate(chosen, axis=-1), np.concatenate(rejected, axis=-1)

    return score_pairs


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
        "reward_model",
        config,
        inputs={"init_from": init_from},
        parallelism=parallelism,
        mesh=mesh,
        stop=stop,
    )
    if run_.finished:
        return
    model = load_model(init_from, run_)
    split = inputs.load_preferences(config.data)
    train_rows, held_out = encode_split(run_, config.data, model, split, batches.encode_preferences)

    key, is_ensemble = run_.key(config.seed, Purpose.INIT), config.members > 1
    decoder = model.params["decoder"]
    if is_ensemble:
        params = ensembles.init_ensemble(model.config, decoder, key, size=config.members)
    else:
        params = {"decoder": decoder, "head": heads.init_scalar_head(model.config, key)}
    params = meshes.put(params, sharding.parameter_sharding(run_.mesh, model.config, params))
    loss = {
        "margin": config.margin,
        "label_smoothing": config.label_smoothing,
        "centering": config.centering,
    }
    of = {"batch_size": config.batch_size, "run": run_, "is_ensemble": is_ensemble}
    score_held_out = make_pair_scorer(model.config, held_out, **of)

    def evaluate(params) -> Mapping[str, float]:
        return _agreement(*map(_together, score_held_out(params)))

    trained = train(
        run_,
        config,
        model=model.config,
        objective=make_ensemble_objective(model.config, config.members, **loss)
        if is_ensemble
        else make_objective(model.config, **loss),
        params=params,
        frozen={},
        iterator=inputs.preference_batches(
            config.batches,
            train_rows,
            batch_size=config.batch_size * config.members,
            seed=run_.data_seed(config.seed),
        ),
        evaluate=evaluate,
        shown=("loss", "accuracy", "margin"),
    )
    params = trained.params
    reference = dataclasses.replace(train_rows, rows=train_rows.rows[:NUM_REFERENCE_RESPONSES])
    reference_rewards, _ = make_pair_scorer(model.config, reference, **of)(params)
    offsets = reference_rewards.mean(axis=-1)
    facts = {"ensemble_offsets": offsets.tolist()} if is_ensemble else {"reward_offset": float(offsets)}
    sides = score_held_out(params)
    if is_ensemble:
        facts |= _of_members(*sides, offsets)
    chosen, rejected = map(_together, sides)
    facts |= _agreement(chosen, rejected)
    facts |= _compare([encoded.row for encoded in held_out.rows], chosen, rejected, run_)
    leave_handoff(run_, config, model, trained, made_from=[init_from], facts=facts)


def _together(scores: np.ndarray) -> np.ndarray:
    """[N] as it is, [E, N] as the mean over members: what is measured of an ensemble."""
    return scores.mean(axis=0) if scores.ndim == 2 else scores


def _of_members(chosen: np.ndarray, rejected: np.ndarray, offsets: np.ndarray) -> dict[str, Any]:
    """Each member's accuracy, and how far members are apart on a response, from scores [E, N]."""
    both = np.concatenate([chosen, rejected], axis=1) - offsets[:, None]
    return {
        "member_accuracy": [
            _agreement(*pair)["eval/accuracy"] for pair in zip(chosen, rejected, strict=True)
        ],
        "disagreement": float(both.std(axis=0).mean()),
    }


def _agreement(chosen: np.ndarray, rejected: np.ndarray) -> dict[str, float]:
    return {
        "eval/accuracy": float(np.mean((1 + np.sign(chosen - rejected)) / 2)),  # a tie is half right
        "eval/loss": float(np.mean(np.logaddexp(0.0, rejected - chosen))),
    }


def _compare(rows, chosen, rejected, run_: Run) -> dict[str, float]:
    """What accuracy is to be held against: the Bayes ceiling where it is known, and "the longer one wins"."""
    margins = chosen - rejected
    facts = {"longer_wins": readers.longer_wins(rows)}
    if all(row.probability is not None for row in rows):
        facts["bayes_accuracy"] = world.bayes_accuracy(rows)
    curve = calibration.reliability(margins)
    facts["calibration_error"] = calibration.expected_calibration_error(curve)
    if hosts.is_main():
        path = run_.workdir / "margins.json"
        with written(path):
            storage.replace(
                path, json.dumps({"margins": [round(float(m), 4) for m in margins], "reliability": curve})
            )
    return facts
