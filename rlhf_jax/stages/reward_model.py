"""A scalar reward model from preferences or rankings (Bradley-Terry), started from SFT. A stage; imports all below.

Loss: -log sigmoid(r(x, y_w) - r(x, y_l) - margin), of pairs by themselves, of all pairs of a ranking (Ouyang et al.
2022, equation 1), or the likelihood of the whole ranking: see `reward_objectives`. The head starts at N(0, 1/(d+1))
and is read at the last token. After training the mean reward of chosen training responses, or of those ranked first, is
stored as an offset, so that a score of 0 means "as good as those" (Huang et al. 2024).

An ensemble is trained as one model whose parameters have a leading axis: each member has a head of its own and sees its
own pairs in its own order (Coste et al. 2024).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import storage
from rlhf_jax.data import batches, rankings, readers, world
from rlhf_jax.errors import InputError, check_range
from rlhf_jax.evaluation import calibration
from rlhf_jax.metrics import written
from rlhf_jax.models import heads
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.parallel import hosts, sharding
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.rewards import ensembles, reward_model
from rlhf_jax.stages import adapters, inputs, reward_objectives
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

# The first so many training rows: the mean reward of their chosen responses becomes the offset.
NUM_REFERENCE_RESPONSES = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One reward-model run.

    kind: "pairs"; "all_pairs", every pair of a prompt's ranked responses in one row, averaged per prompt;
    "plackett_luce", the likelihood of the whole ranking. The latter two take rankings, of up to ``data.ranking_size``
    responses, and are judged by held-out pairs. members: reward models trained side by side from the one start, each on
    ``batch_size`` pairs or rankings a step of its own. Gradients are clipped together. lora: whether an adapter and the
    head are trained. margin, label_smoothing, centering: of "pairs", see ``losses.bradley_terry_loss``.
    length_penalty: what the squared correlation of rewards with lengths, among responses to one prompt, is multiplied
    by; see ``losses.length_penalty_loss``. Such a step has a second forward pass. batches: how rows become batches.
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
    kind: reward_objectives.Kind = "pairs"
    length_penalty: float = 0.0

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
        check_range(self, "centering", "length_penalty", at_least=0)
        for name in ("margin", "label_smoothing", "centering"):
            if self.kind != "pairs" and getattr(self, name):
                raise InputError(
                    f"config.{name} is {getattr(self, name)}, which is of pairs; give 0, or kind=pairs in the place of "
                    f"{self.kind}"
                )
        if self.kind == "plackett_luce" and self.data.soft_labels:
            raise InputError(
                "config.data.soft_labels is on, and kind=plackett_luce learns one order of the responses; turn it off, "
                "or give kind=all_pairs"
            )

    @property
    def loss(self) -> dict[str, Any]:
        """What `reward_objectives.make_objective` takes."""
        return {
            "kind": self.kind,
            "margin": self.margin,
            "label_smoothing": self.label_smoothing,
            "centering": self.centering,
            "length_penalty": self.length_penalty,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairScores:
    """Of encoded pairs in order: rewards of both sides, float32 [N], or [E, N] of an ensemble, and how many tokens the
    chosen response has more than the rejected one, [N]."""

    chosen: np.ndarray
    rejected: np.ndarray
    extra_tokens: np.ndarray

    def together(self) -> PairScores:
        """With the mean over members in the place of each: what is measured of an ensemble."""
        if self.chosen.ndim == 1:
            return self
        return dataclasses.replace(self, chosen=self.chosen.mean(axis=0), rejected=self.rejected.mean(axis=0))


def make_pair_scorer(model: ModelConfig, encoded: Any, batch_size: int, run: Run, *, is_ensemble: bool):
    """``score_pairs(params) -> PairScores`` over all encoded pairs."""
    score_rows = ensembles.score if is_ensemble else reward_model.score

    def score_both(params, batch):
        both = concatenate_pairs(batch.chosen, batch.rejected)
        return jnp.split(score_rows(model, params, both), 2, axis=-1)

    score = sharding.within(run.mesh, jax.jit(score_both))

    def score_pairs(params) -> PairScores:
        chosen, rejected, extra_tokens = [], [], []
        for batch, rows in batches.eval_batches(encoded, batch_size):
            first, second = hosts.fetch(score(params, meshes.put_rows(run.mesh, batch)))
            chosen.append(first[..., rows])
            rejected.append(second[..., rows])
            lengths = [side.response_mask.sum(axis=1) for side in (batch.chosen, batch.rejected)]
            extra_tokens.append((lengths[0] - lengths[1])[rows])
        return PairScores(
            chosen=np.concatenate(chosen, axis=-1),
            rejected=np.concatenate(rejected, axis=-1),
            extra_tokens=np.concatenate(extra_tokens),
        )

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
    is_ranked = config.kind != "pairs"
    split = inputs.load_rankings(config.data) if is_ranked else inputs.load_preferences(config.data)
    encode = batches.encode_preferences
    if is_ranked:
        encode = functools.partial(batches.encode_rankings, ranking_size=config.data.ranking_size)
    train_rows, held_out = encode_split(
        run_, config.data, model, split, encode, encode_held_out=batches.encode_preferences
    )

    key, is_ensemble = run_.key(config.seed, Purpose.INIT), config.members > 1
    decoder = model.params["decoder"]
    if is_ensemble:
        params = ensembles.init_ensemble(model.config, decoder, key, size=config.members)
    else:
        params = {"decoder": decoder, "head": heads.init_scalar_head(model.config, key)}
    params = meshes.put(params, sharding.parameter_sharding(run_.mesh, model.config, params))
    of = {"batch_size": config.batch_size, "run": run_, "is_ensemble": is_ensemble}
    score_held_out = make_pair_scorer(model.config, held_out, **of)

    def evaluate(params) -> Mapping[str, float]:
        return _measure(score_held_out(params).together())

    trained = train(
        run_,
        config,
        model=model.config,
        objective=reward_objectives.make_ensemble_objective(model.config, config.members, **config.loss)
        if is_ensemble
        else reward_objectives.make_objective(model.config, **config.loss),
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
        prepare=reward_objectives.make_length_moments(model.config, config.members)
        if config.length_penalty
        else None,
    )
    params = trained.params
    if is_ranked:
        reference = rankings.best_and_worst(train_rows, NUM_REFERENCE_RESPONSES)
    else:
        reference = dataclasses.replace(train_rows, rows=train_rows.rows[:NUM_REFERENCE_RESPONSES])
    offsets = make_pair_scorer(model.config, reference, **of)(params).chosen.mean(axis=-1)
    facts = {"ensemble_offsets": offsets.tolist()} if is_ensemble else {"reward_offset": float(offsets)}
    scores = score_held_out(params)
    if is_ensemble:
        facts |= _of_members(scores.chosen, scores.rejected, offsets)
    facts |= _measure(scores.together())
    facts |= _compare([encoded.row for encoded in held_out.rows], scores.together(), run_)
    leave_handoff(run_, config, model, trained, made_from=[init_from], facts=facts)


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


def _measure(scores: PairScores) -> dict[str, float]:
    """Agreement with the labels, and the correlation of rewards with lengths between the two sides of a pair."""
    return _agreement(scores.chosen, scores.rejected) | {
        "eval/length_correlation": length_correlation(scores)
    }


def length_correlation(scores: PairScores) -> float:
    """Of rewards [N] with lengths among the two responses to one prompt, in [-1, 1]; 0 where either never differs.

    What `losses.length_moments` of the pairs add up to: a pair's differences, about 0 and not about their mean, as
    which of the two is called the first says nothing.
    """
    margins, extra = (
        (scores.chosen - scores.rejected).astype(np.float64),
        scores.extra_tokens.astype(np.float64),
    )
    spread = np.sqrt(np.mean(margins**2) * np.mean(extra**2))
    return float(np.mean(margins * extra) / spread) if spread else 0.0


def gold_accuracy(rows, margins: np.ndarray) -> float:
    """How often reward margins [N] have the sign of gold's, on the pairs whose two sides differ in gold; a tie is half.

    What a labeller likes beside gold, as length, makes it lower than agreement with the labels allows.
    """
    better = np.sign([row.chosen_gold - row.rejected_gold for row in rows])
    return float(np.mean((1 + np.sign(margins) * better)[better != 0] / 2))


def _compare(rows, scores: PairScores, run_: Run) -> dict[str, float]:
    """What accuracy is to be held against: "the longer one wins", the Bayes ceiling and the gold reward where known."""
    margins = scores.chosen - scores.rejected
    facts = {"longer_wins": readers.longer_wins(rows)}
    if all(row.probability is not None for row in rows):
        facts["bayes_accuracy"] = world.bayes_accuracy(rows)
    if all(row.chosen_gold is not None and row.rejected_gold is not None for row in rows):
        facts["gold_accuracy"] = gold_accuracy(rows, margins)
    curve = calibration.reliability(margins)
    facts["calibration_error"] = calibration.expected_calibration_error(curve)
    if hosts.is_main():
        path = run_.workdir / "margins.json"
        with written(path):
            storage.replace(
                path, json.dumps({"margins": [round(float(m), 4) for m in margins], "reliability": curve})
            )
    return facts
