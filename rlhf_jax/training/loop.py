"""The loop around a step: metrics, progress, evaluation, checkpoints, guards. Imports metrics, checkpoints, hosts.

The loop knows nothing of algorithms. A stage hands it a ``step(state, batch) -> (state, metrics)``, an
iterator, and an optional ``evaluate``; what comes back is the final state. Everything the next step depends on
is in the checkpoint, so a killed run, started again, ends in the same state with the same ``metrics.jsonl``.
"""

from __future__ import annotations

import dataclasses
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import jax

from rlhf_jax.checkpoints import Checkpoints
from rlhf_jax.errors import InputError, check_range
from rlhf_jax.metrics import Accumulator, Metrics, MetricsWriter
from rlhf_jax.parallel import hosts
from rlhf_jax.storage import Path
from rlhf_jax.training.interrupt import Interrupted, StopRequest

# After so many updates in a row without a finite gradient a run is lost; carrying on would only burn time.
MAX_SKIPPED_UPDATES = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """When the loop does what, in steps.

    num_steps: in total. log_every: a row of metrics covers this many steps. save_every: steps between checkpoints.
    save_every_minutes: a checkpoint is also made once the newest is this old; 0: never. keep: so many of the newest
    checkpoints are kept. keep_every: those of steps that it divides are kept besides, for good; 0: none.
    eval_every: steps between evaluations (0: never during training); step 0 and the last step are always evaluated.
    """

    num_steps: int
    log_every: int = 1
    save_every: int = 50
    save_every_minutes: float = 0.0
    keep: int = 2
    keep_every: int = 0
    eval_every: int = 0

    def __post_init__(self) -> None:
        check_range(self, "num_steps", "log_every", "save_every", "keep", at_least=1)
        check_range(self, "save_every_minutes", "keep_every", "eval_every", at_least=0)


def fit(
    *,
    state: Any,
    step: Callable[[Any, Any], tuple[Any, Metrics]],
    batches: grain.DatasetIterator,
    schedule: Schedule,
    workdir: Path,
    progress: Callable[[int, Mapping[str, float]], None],
    stop: StopRequest,
    evaluate: Callable[[Any], Mapping[str, float]] | None = None,
    skipped_updates: Callable[[Any], jax.Array] | None = None,
    evaluated: Callable[[Any, Mapping[str, float]], tuple[Any, bool]] | None = None,
    sources_of: Callable[[int], Sequence[str]] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Any:
    """Runs ``step`` until ``schedule.num_steps``, resuming from the newest checkpoint of ``workdir`` if there is one.

    In a job of several processes all of them call it; the first one writes metrics, and all save and stop at the same
    step, whichever was asked to.

    Args:
      state: a pytree; the initial state, which also gives structure and sharding to a restored one.
      step: one training step; may run on host and device.
      batches: an endless Grain iterator.
      schedule: see ``Schedule``.
      workdir: holds ``checkpoints/``, ``metrics.jsonl`` and TensorBoard events.
      progress: called after every step with (finished steps, the values of this step).
      stop: looked at between steps; on request the loop saves and raises ``Interrupted``.
      evaluate: ``evaluate(state) -> values``, written under the names it returns.
      skipped_updates: reads the number of consecutive skipped updates from a state.
      evaluated: ``evaluated(state, what evaluate returned)`` -> (the state that goes on, whether training ends there,
        as if that step were the last); the evaluation at step 0 ends nothing.
      sources_of: ``sources_of(number of a batch, from 0)`` -> where its rows came from, for the message of a run that
        ends because of them.
      clock: seconds, for ``schedule.save_every_minutes``.

    Raises:
      Interrupted: stopped on request, after saving.
      InputError: ``MAX_SKIPPED_UPDATES`` updates in a row were not finite, no checkpoint is whole, or neither one
        nor a row of metrics can be written.
    """
    checkpoints = Checkpoints(workdir, keep=schedule.keep, keep_every=schedule.keep_every)
    done, pending, writer, ended, given_up = 0, Accumulator(), None, False, False
    try:
        restored = checkpoints.restore_newest(state, batches)
        if restored is not None:
            done, state, host = restored
            pending, ended = Accumulator.from_json(host["pending"]), host.get("ended", False)
        # What was read is trained, and given up by its first step; nobody else may hold it.
        resumed, restored = restored is not None, None
        if hosts.is_main():
            writer = MetricsWriter(workdir, start_step=done if resumed else -1)
        write = (lambda step, values: None) if writer is None else writer.write
        flush = (lambda: None) if writer is None else writer.flush
        if not resumed and evaluate is not None:
            found = dict(evaluate(state))
            write(0, found)
            if evaluated is not None:
                state, _ = evaluated(state, found)
        saved, saved_at = done if resumed else None, clock()
        asked, _ = _agree(stop, False)
        while done < schedule.num_steps and not ended and asked is None:
            state, metrics = step(state, next(batches))
            done += 1
            metrics = jax.device_get(dict(metrics))
            pending.add(metrics)
            now = Accumulator()
            now.add(metrics)
            progress(done, now.values())
            _check_guard(state, skipped_updates, done, checkpoints.directory, saved, sources_of)
            checkpoints.check()
            row, found = {}, {}
            if evaluate is not None and _evaluates(schedule, done):
                found = dict(evaluate(state))
                if evaluated is not None:
                    state, ended = evaluated(state, found)
            last = ended or done == schedule.num_steps
            if last or done % schedule.log_every == 0:
                row, pending = pending.values(), Accumulator()
            row |= found
            if row:
                write(done, row)
            asked, due = _agree(stop, 0 < 60 * schedule.save_every_minutes <= clock() - saved_at)
            # A state whose last update was not finite is not worth coming back to.
            sound = skipped_updates is None or not int(skipped_updates(state))
            if sound and (last or due or done % schedule.save_every == 0):
                flush()  # a run that goes on from here keeps the rows up to here
                checkpoints.save(done, state, batches, {"pending": pending.to_json(), "ended": ended})
                saved, saved_at = done, clock()
        if asked is not None and done < schedule.num_steps and not ended:
            if saved != done:
                flush()
                checkpoints.save(done, state, batches, {"pending": pending.to_json(), "ended": False})
            checkpoints.wait()
            raise Interrupted(
                f"{asked}: saved step {done} of {schedule.num_steps} in {checkpoints.directory}; "
                "run the same command again to go on from there"
            )
        return state
    except jax.errors.JaxRuntimeError:
        # Where another process is gone, waiting for a save that it takes part in would only delay the message.
        given_up = jax.process_count() > 1
        raise
    finally:
        try:
            if writer is not None:
                writer.close()
        finally:  # a save under way ends whole, whatever else the disk has refused
            if not given_up:
                checkpoints.close()


def _agree(stop: StopRequest, due: bool) -> tuple[str | None, bool]:
    """The signal that any process was asked to stop by, and whether a checkpoint is due on any."""
    asked = stop.requested
    number, due = hosts.largest(0 if asked is None else int(signal.Signals[asked]), int(due))
    return (signal.Signals(number).name if number else None), bool(due)


def _evaluates(schedule: Schedule, done: int) -> bool:
    return done == schedule.num_steps or (schedule.eval_every > 0 and done % schedule.eval_every == 0)


def _check_guard(state, skipped_updates, done, directory, saved, sources_of) -> None:
    if skipped_updates is None:
        return
    skipped = int(skipped_updates(state))
    if skipped >= MAX_SKIPPED_UPDATES:
        kept = "no checkpoint was saved yet" if saved is None else f"step {saved} is saved in {directory}"
        held = "" if sources_of is None else f", whose batch held {_shortened(sources_of(done - 1))}"
        raise InputError(
            f"loss or gradient was not finite in the last {skipped} updates, up to step {done}{held}; {kept}; "
            "lower --config.optimizer.learning_rate in another --workdir, or look at the data"
        )


def _shortened(sources: Sequence[str], most: int = 8) -> str:
    rest = len(sources) - most
    return ", ".join(sources[:most]) + (f" and {rest} more" if rest > 0 else "")
