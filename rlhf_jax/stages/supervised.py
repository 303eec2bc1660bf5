"""What the stages that learn from fixed rows share: compile the step, fit, return the params. Imports training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import jax

from rlhf_jax.errors import InputError
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.stages.run_directory import Progress, Run
from rlhf_jax.training.loop import fit
from rlhf_jax.training.optimizer import make_optimizer
from rlhf_jax.training.step import Objective, init_train_state, make_train_step

# Purposes that a stage's key is folded with; every draw of a run comes from one of them and a step or row.
INIT_PURPOSE, TRAIN_PURPOSE, EVALUATION_PURPOSE = 0, 1, 2


def train(
    run: Run,
    config: Any,
    *,
    objective: Objective,
    params: Any,
    frozen: Any,
    iterator: grain.DatasetIterator,
    evaluate: Callable[[Any], Mapping[str, float]],
    shown: Sequence[str],
) -> Any:
    """Trains ``params`` on the batches of ``iterator`` and returns them.

    Args:
      run: the open run.
      config: the stage's config; ``seed``, ``optimizer``, ``schedule``, ``batch_size``, ``num_microbatches`` are read.
      objective: see ``training.step``.
      params: initial parameters, replicated over the run's mesh.
      frozen: parameters that the objective reads and nothing trains.
      iterator: endless batches of ``config.batch_size`` rows.
      evaluate: ``evaluate(params)`` -> the held-out numbers.
      shown: names of the metrics that the progress bar shows.
    """
    parts = config.num_microbatches
    if config.batch_size % parts:
        raise InputError(
            f"config.batch_size is {config.batch_size}, which does not divide into num_microbatches={parts}"
        )
    meshes.check_rows(run.mesh, config.batch_size // parts, "config.batch_size / num_microbatches")
    optimizer = make_optimizer(config.optimizer, config.schedule.num_steps)
    train_step = meshes.compile_step(
        lambda axis: make_train_step(objective, optimizer, num_microbatches=parts, axis_name=axis),
        run.mesh,
        run.parallelism,
    )
    key = jax.random.fold_in(jax.random.key(config.seed), TRAIN_PURPOSE)
    state = jax.device_put(init_train_state(params, optimizer, key), meshes.replicated(run.mesh))
    progress = Progress(run.stage, config.schedule.num_steps, shown, line_every=50)
    try:
        state = fit(
            state=state,
            step=lambda state, batch: train_step(state, frozen, batch),
            batches=iterator,
            schedule=config.schedule,
            workdir=run.workdir,
            progress=progress,
            stop=run.stop,
            evaluate=lambda state: evaluate(state.params),
            skipped_updates=lambda state: state.skipped,
        )
    finally:
        progress.close()
    return state.params
