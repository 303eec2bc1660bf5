"""Supervised fine-tuning: the response's likelihood, prompt masked, EOS learned. A stage; imports all below.

Loss: -sum_t log pi(y_t | x, y_<t) over response tokens, divided once by their number in the global batch.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Mapping
from typing import Any

import jax

from rlhf_jax import masking
from rlhf_jax.data import batches
from rlhf_jax.errors import InputError, check_range
from rlhf_jax.metrics import Accumulator, count
from rlhf_jax.models import decoder
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.parallel import sharding
from rlhf_jax.stages import adapters, inputs
from rlhf_jax.stages.handoffs import Model, leave_handoff, load_model, place
from rlhf_jax.stages.run_directory import Purpose, Run, open_run
from rlhf_jax.stages.supervised import encode_split, train
from rlhf_jax.training.forward import response_log_probs
from rlhf_jax.training.interrupt import StopRequest
from rlhf_jax.training.loop import Schedule
from rlhf_jax.training.optimizer import OptimizerConfig
from rlhf_jax.types import DemonstrationBatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSource:
    """The model to start from: a Hugging Face directory (or a finished run), or fresh weights of a given shape.

    path: the directory; empty: fresh weights over the vocabulary of what is embedded. width, num_layers, num_heads,
    num_kv_heads, mlp_width: the fresh model's shape, read when ``path`` is empty.
    """

    path: str = ""
    width: int = 64
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    mlp_width: int = 176

    def __post_init__(self) -> None:
        check_range(self, "width", "num_layers", "num_heads", "num_kv_heads", "mlp_width", at_least=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One SFT run; see the fields' own classes.

    batches: how rows become batches. pack: several short demonstrations to a row of prompt_length + response_length
    columns, none of which sees another; ``batch_size`` counts such rows. The loss is that of the same demonstrations
    unpacked. lora: whether an adapter on ``model`` is trained, not all of it.
    """

    seed: int = 0
    model: ModelSource = dataclasses.field(default_factory=ModelSource)
    data: inputs.DataConfig = dataclasses.field(default_factory=inputs.DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    schedule: Schedule = dataclasses.field(default_factory=lambda: Schedule(num_steps=300))
    batch_size: int = 64
    num_microbatches: int = 1
    batches: inputs.BatchConfig = dataclasses.field(default_factory=inputs.BatchConfig)
    pack: bool = False
    lora: adapters.LoraOptions = dataclasses.field(default_factory=adapters.LoraOptions)

    def __post_init__(self) -> None:
        check_range(self, "batch_size", "num_microbatches", at_least=1)
        if self.lora.rank and not self.model.path:
            raise InputError(
                f"lora.rank is {self.lora.rank} and model.path is empty: an adapter on fresh weights learns no "
                "language; give a model.path, or rank 0"
            )
        if self.pack and self.batches.num_buckets > 1:
            raise InputError(
                f"pack is True with batches.num_buckets={self.batches.num_buckets}; packed rows are of one width, so "
                "give one of the two"
            )


def make_objective(model: ModelConfig):
    """(params, frozen, DemonstrationBatch) -> the token-mean negative log-likelihood, and metrics."""

    def objective(params: Any, frozen: Any, batch: DemonstrationBatch):
        del frozen
        log_probs, entropy = response_log_probs(model, params, batch)
        nll = masking.token_mean(-log_probs, batch.response_mask)
        metrics = {
            "nll": nll,
            "entropy": masking.token_mean(entropy, batch.response_mask),
            "tokens": count(batch.token_mask),
        }
        return {"likelihood": nll}, metrics

    return objective


def make_evaluator(model: ModelConfig, encoded: Any, batch_size: int, run: Run):
    """``evaluate(params) -> {"eval/nll"}`` over held-out demonstrations, every one counted once."""
    objective = make_objective(model)

    metrics_of = sharding.within(run.mesh, jax.jit(lambda params, batch: objective(params, {}, batch)[1]))

    def evaluate(params) -> Mapping[str, float]:
        total = Accumulator()
        for batch, rows in batches.eval_batches(encoded, batch_size):
            # Rows that only fill up the last batch carry no response token.
            batch = dataclasses.replace(batch, response_mask=batch.response_mask & rows[:, None])
            total.add({"eval/nll": metrics_of(params, meshes.put_rows(run.mesh, batch))["nll"]})
        return total.values()

    return evaluate


def init_model(source: ModelSource, config: Config, run: Run, key: jax.Array) -> Model:
    """The model that SFT starts from."""
    if source.path:
        return load_model(source.path, run)
    if config.data.path:
        raise InputError(
            f"--config.data.path={config.data.path} needs a model that can read it; "
            "give --config.model.path=<directory>"
        )
    tokenizer = inputs.embedded_tokenizer(config.data)
    shape = ModelConfig(
        vocab_size=len(tokenizer),
        width=source.width,
        num_layers=source.num_layers,
        num_heads=source.num_heads,
        num_kv_heads=source.num_kv_heads,
        head_dim=source.width // source.num_heads,
        mlp_width=source.mlp_width,
        max_length=config.data.prompt_length + config.data.response_length,
    )
    init = functools.partial(decoder.init_params, shape)
    # Straight into place: no device ever holds the whole.
    params = jax.jit(init, out_shardings=place(run.mesh, shape, jax.eval_shape(init, key)))(key)
    return Model(config=shape, params=params, tokenizer=tokenizer, origin="fresh weights", facts={})


def run(
    config: Config,
    workdir: str | os.PathLike,
    *,
    parallelism: meshes.Parallelism = "jit",
    mesh: jax.sharding.Mesh | None = None,
    stop: StopRequest,
) -> None:
    """Runs the stage to its hand-off; returns at once if it is there.

    Raises:
      InputError: anything the user gave that cannot be used, before any training.
      Interrupted: stopped on request, after saving.
    """
    run_ = open_run(workdir, "sft", config, inputs={}, parallelism=parallelism, mesh=mesh, stop=stop)
    if run_.finished:
        return
    model = init_model(config.model, config, run_, run_.key(config.seed, Purpose.INIT))
    split = inputs.load_demonstrations(config.data)
    train_rows, held_out = encode_split(run_, config.data, model, split, batches.encode_demonstrations)

    evaluate = make_evaluator(model.config, held_out, config.batch_size, run_)
    trained = train(
        run_,
        config,
        model=model.config,
        objective=make_objective(model.config),
        params=model.params,
        frozen={},
        iterator=inputs.demonstration_batches(
            config.batches,
            train_rows,
            batch_size=config.batch_size,
            seed=run_.data_seed(config.seed),
            pack=config.pack,
        ),
        evaluate=evaluate,
        shown=("nll", "grad_norm"),
    )
    facts = {"eval_perplexity": math.exp(evaluate(trained.params)["eval/nll"])}
    leave_handoff(run_, config, model, trained, made_from=[config.model.path or "fresh weights"], facts=facts)
