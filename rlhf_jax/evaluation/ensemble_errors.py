"""Whether the members of an ensemble are wrong together, where what they imitate is known; imports errors and NumPy.

An ensemble sees only what its members disagree about. What they share, it believes.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from rlhf_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedErrors:
    """correlation: of two members' errors, the mean over pairs of members, over all responses. correlation_at_top: the
    same over those that the members' mean likes best. disagreement, disagreement_at_top: the members' standard
    deviation on a response, the mean over the same two sets, in the scores' unit."""

    correlation: float
    correlation_at_top: float
    disagreement: float
    disagreement_at_top: float


def shared_errors(members: np.ndarray, truth: np.ndarray, *, top: int) -> SharedErrors:
    """Errors of E members on N responses to each of P prompts.

    A member's error is what is left of its score, less its mean over the prompt's responses, after the best multiple of
    the truth, less its own mean: neither scale nor zero point is an error.

    Args:
      members: [E, P, N] float, E of 2 or more.
      truth: [P, N] float, what they were trained to say.
      top: responses a prompt, of the highest mean score, that count as the top.

    Raises:
      InputError: shapes that do not fit, or a ``top`` out of range.
    """
    members, truth = np.asarray(members, np.float64), np.asarray(truth, np.float64)
    if (
        members.ndim != 3
        or len(members) < 2
        or members.shape[1:] != truth.shape
        or not 2 <= top <= truth.shape[-1]
    ):
        raise InputError(
            f"members have shape {list(members.shape)}, the truth {list(truth.shape)}, and the top is {top}: give 2 or "
            "more members' scores of the same responses, and a top of 2 to all of them"
        )
    centred, of = members - members.mean(axis=2, keepdims=True), truth - truth.mean(axis=1, keepdims=True)
    slopes = np.sum(centred * of, axis=(1, 2)) / np.sum(of**2)
    errors = centred - slopes[:, None, None] * of
    best = np.argsort(-members.mean(axis=0), axis=1)[:, :top]
    at_top = np.take_along_axis(errors, np.broadcast_to(best, (len(members), *best.shape)), axis=2)
    spread = members.std(axis=0)
    return SharedErrors(
        correlation=_mean_correlation(errors),
        correlation_at_top=_mean_correlation(at_top),
        disagreement=float(spread.mean()),
        disagreement_at_top=float(np.take_along_axis(spread, best, axis=1).mean()),
    )


def _mean_correlation(errors: np.ndarray) -> float:
    matrix = np.corrcoef(errors.reshape(len(errors), -1))
    return float(matrix[~np.eye(len(matrix), dtype=bool)].mean())
