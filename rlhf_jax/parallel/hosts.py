"""Several processes that are one job: how they find each other, agree, and hand each other rows. Imports errors only.

Every function here is called by all processes, in the same order; in a job of one process it costs nothing. Arrays of
a mesh over several processes lie in parts: what host code reads of one goes through ``fetch``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from rlhf_jax.errors import InputError

# A process that is silent for so long is taken for dead, and ends the job.
HEARTBEAT_SECONDS = 30
# A message is padded to a multiple of this many bytes, so that few programs are compiled.
_MESSAGE_BYTES = 4096


def join() -> None:
    """Finds the other processes of the job; before anything else of JAX is used.

    Where: as ``JAX_COORDINATOR_ADDRESS`` (host:port of the first process), ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID``
    say, or else as the cluster does that JAX finds itself on (Cloud TPU, SLURM, Open MPI, Kubernetes).

    Raises:
      InputError: nothing says where, or the others do not come.
    """
    given = {name: os.environ[name] for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID") if name in os.environ}
    wrong = [f"{name}={value!r}" for name, value in given.items() if not value.isdecimal()]
    if wrong:
        raise InputError(f"--distributed: {', '.join(wrong)}; give whole numbers")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            num_processes=_number(given, "JAX_NUM_PROCESSES"),
            process_id=_number(given, "JAX_PROCESS_ID"),
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"--distributed finds no other processes ({reason}); set JAX_COORDINATOR_ADDRESS=<host of the first>:"
            "<free port>, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or leave it out on one machine"
        ) from error


def _number(given: dict[str, str], name: str) -> int | None:
    return int(given[name]) if name in given else None


def is_main() -> bool:
    """Whether this is the process that writes what is written once."""
    return jax.process_index() == 0


def largest(*numbers: int) -> tuple[int, ...]:
    """Of each number the largest that any process gave: what one asks for, all do."""
    if jax.process_count() == 1:
        return numbers
    of_all = multihost_utils.process_allgather(np.array(numbers, np.int32))
    return tuple(int(number) for number in np.max(of_all, axis=0))


def decided_by_main(decide: Callable[[], Any]) -> Any:
    """What ``decide()`` returns on the first process, on every process; others do not call it, and wait.

    Args:
      decide: returns what JSON can hold.

    Raises:
      InputError: on every process, where ``decide`` raises one on the first.
    """
    if jax.process_count() == 1:
        return decide()
    message = {}
    if is_main():
        try:
            message = {"value": decide()}
        except InputError as error:
            message = {"problem": str(error)}
    message = json.loads(_from_main(json.dumps(message).encode()))
    if "problem" in message:
        raise InputError(message["problem"])
    return message["value"]


def _from_main(content: bytes) -> bytes:
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    padded = np.zeros(-(-size // _MESSAGE_BYTES) * _MESSAGE_BYTES, np.uint8)
    if is_main():
        padded[:size] = np.frombuffer(content, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded))[:size].tobytes()


def fetch(tree: Any) -> Any:
    """The arrays of a tree as NumPy arrays, whole, on every process; those that lie in parts are gathered."""

    def whole(x: Any) -> Any:
        in_parts = isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)
        return multihost_utils.process_allgather(x, tiled=True) if in_parts else jax.device_get(x)

    return jax.tree.map(whole, tree)


def gather_rows(tree: Any) -> Any:
    """NumPy arrays [B / processes, ...] of each process as [B, ...] on all, those of the first process first."""
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), tree)


def judge_rows(judge: Callable[[Sequence[int]], np.ndarray], count: int) -> np.ndarray:
    """``judge`` over ``count`` rows, each process judging some of them; the judgements [count] on all.

    Args:
      judge: ``judge(numbers of rows)`` -> one number each, float32.
      count: how many rows there are.
    """
    if jax.process_count() == 1:
        return judge(range(count))
    share = -(-count // jax.process_count())
    start = min(jax.process_index() * share, count)
    own = range(start, min(start + share, count))
    judged = np.zeros(share, np.float32)
    judged[: len(own)] = judge(own) if own else 0.0
    return gather_rows(judged)[:count]
