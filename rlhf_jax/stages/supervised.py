"""What the stages that learn from fixed rows share: encode the rows, compile the step, fit. Imports training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from rlhf_jax.data.pipeline import BatchIterator
from rlhf_jax.errors import InputError
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.parallel import sharding
from rlhf_jax.stages import adapters, data_reports, inputs
from rlhf_jax.stages.handoffs import Model, check_context
from rlhf_jax.stages.run_directory import Progress, Purpose, Run, write_data_report
from rlhf_jax.training.loop import fit
from rlhf_jax.training.optimizer import make_optimizer
from rlhf_jax.training.step import Objective, TrainState, init_train_state, make_train_step


def encode_split(
    run: Run,
    data: inputs.DataConfig,
    model: Model,
    split: inputs.Split,
    encode: Callable,
    *,
    encode_held_out: Callable | None = None,
) -> tuple[Any, Any]:
    """Training and held-out rows as ids, with a report of what was left out or cut kept in the run's directory.

    Args:
      run: the open run.
      data: gives widths and truncation.
      model: gives the tokenizer, and the context that rows must fit.
      split: the rows.
      encode: ``batches.encode_demonstrations`` or ``batches.encode_preferences``.
      encode_held_out: what the held-out rows are encoded by, where they are of another kind.

    Raises:
      InputError: a row that cannot be used, or widths beyond the model's context.
      Interrupted: stopped on request while a prepared set was scanned.
    """
    check_context(model, data.prompt_length + data.response_length)
    with data_reports.shown_scan(run) as progress:
        how = {"progress": progress, **data.widths}
        train, train_report = encode(split.train, model.tokenizer, **how)
        held_out, held_out_report = (encode_held_out or encode)(split.held_out, model.tokenizer, **how)
    write_data_report(run, split.left_out, train=train_report, held_out=held_out_report)
    return train, held_out


def train(
    run: Run,
    config: Any,
    *,
    model: ModelConfig,
    objective: Objective,
    params: Any,
    frozen: Any,
    iterator: BatchIterator,
    evaluate: Callable[[Any], Mapping[str, float]],
    shown: Sequence[str],
    prepare: Callable[[Any, Any, Any], Any] | None = None,
) -> adapters.Trained:
    """Trains ``params``, or with ``config.lora`` an adapter on them, on the batches of ``iterator``.

    Args:
      run: the open run.
      config: the stage's config; ``seed``, ``optimizer``, ``schedule``, ``batch_size``, ``num_microbatches``, ``lora``
        are read.
      model: its shape.
      objective: see ``training.step``.
      params: initial parameters, in their place on the run's mesh.
      frozen: parameters that the objective reads and nothing trains.
      iterator: endless batches of ``config.batch_size`` rows, this process's share of each; closed in the end,
        and its workers with it.
      evaluate: ``evaluate(params)`` -> the held-out numbers; what `data_reports.counts` says is written beside them.
      shown: names of the metrics that the progress bar shows.
      prepare: ``prepare(params, frozen, batch)`` -> the batch with what the whole of it decides and the update holds
        constant; before it is split into micro-batches.
    """
    parts = config.num_microbatches
    if config.batch_size % parts:
        raise InputError(
            f"config.batch_size is {config.batch_size}, which does not divide into num_microbatches={parts}"
        )
    meshes.check_rows(run.mesh, config.batch_size // parts, "config.batch_size / num_microbatches")
    settings, base = config.lora.settings, None
    if settings is not None:
        base = {"decoder": params["decoder"]}
        params = adapters.detach(model, params, settings, run.key(config.seed, Purpose.ADAPTER))
        params = jax.device_put(params, sharding.parameter_sharding(run.mesh, model, params))
        objective, frozen = adapters.adapted(objective, settings), {"base": base, "own": frozen}
        prepare = None if prepare is None else adapters.adapted(prepare, settings)
    optimizer = make_optimizer(config.optimizer, config.schedule.num_steps)
    state = init_train_state(params, optimizer, run.key(config.seed, Purpose.TRAIN))
    places = sharding.mirrored(run.mesh, state, params, jax.tree.map(lambda x: x.sharding, params))
    # Nobody else may hold the first state: a run that goes on would have its moments beside those that it reads.
    first = [meshes.put(state, places)]
    del state
    train_step = meshes.compile_step(
        lambda axis: make_train_step(objective, optimizer, num_microbatches=parts, axis_name=axis),
        run.mesh,
        run.parallelism,
        places,
    )
    prepared = None if prepare is None else sharding.within(run.mesh, jax.jit(prepare))

    def step(state: TrainState, batch: Any):
        if run.parallelism == "jit":
            batch = meshes.put_own_rows(run.mesh, batch)
        if prepared is not None:
            batch = prepared(state.params, frozen, meshes.put_rows(run.mesh, batch))
        return train_step(state, frozen, batch)

    counts = data_reports.counts(run)
    progress = Progress(run.stage, config.schedule.num_steps, shown, line_every=50)
    try:
        state = fit(
            state=first.pop(),
            step=step,
            batches=iterator,
            schedule=config.schedule,
            workdir=run.workdir,
            progress=progress,
            stop=run.stop,
            evaluate=lambda state: counts | evaluate(adapters.result(state.params, base, settings).params),
            skipped_updates=lambda state: state.skipped,
            sources_of=iterator.sources_of,
        )
    finally:
        progress.close()
        iterator.close()
    return adapters.result(state.params, base, settings)
