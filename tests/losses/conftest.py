"""One table of every public loss: how to call it on eight rows, what it differentiates, what it holds constant."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import pytest

from rlhf_jax import losses

B, T, V, D, G = 8, 5, 6, 4, 4


@dataclasses.dataclass(frozen=True)
class Case:
    """``function(*arrays)`` with its hyper-parameters bound; every array has B rows unless listed in ``shared``.

    differentiable and constant list the positions of float arrays that do and do not get a gradient; ``mask`` is the
    position of the mask argument.
    """

    name: str
    function: Callable
    arrays: tuple[np.ndarray, ...]
    hyper: dict
    differentiable: tuple[int, ...] = ()
    constant: tuple[int, ...] = ()
    mask: int | None = None
    shared: tuple[int, ...] = ()


def ragged_mask(rng: np.random.Generator, width: int = T) -> np.ndarray:
    """Row 0 empty, row 1 full, row 2 with a hole, the rest cut at random lengths."""
    lengths = rng.integers(1, width + 1, size=B)
    mask = np.arange(width)[None] < lengths[:, None]
    mask[0], mask[1], mask[2] = False, True, True
    mask[2, 1] = False
    return mask


def _cases():
    rng = np.random.default_rng(20)

    def normal(*shape, scale=1.0):
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    def log_probs(*shape):
        return -np.abs(normal(*shape)) - np.float32(0.05)

    mask = ragged_mask(rng)
    targets = rng.integers(0, V, size=(B, T)).astype(np.int32)
    ranks = np.stack([rng.permutation(G) for _ in range(B)]).astype(np.int32)
    ranks[3] = [0, 1, 1, 2]
    candidates = ragged_mask(rng, G)
    four = normal(B), normal(B), normal(B), normal(B)

    def case(name, *arrays, differentiable=(0,), constant=(), mask=None, shared=(), **hyper):
        function = functools.partial(getattr(losses, name), **hyper)
        return Case(name, function, arrays, hyper, differentiable, constant, mask, shared)

    yield case("token_log_probs", normal(B, T, V), targets, temperature=0.7)
    yield case("token_entropy", normal(B, T, V), temperature=0.7)
    yield case(
        "chunked_token_log_probs", normal(B, T, D), normal(V, D), targets,
        differentiable=(0, 1), shared=(1,), chunk_size=2, temperature=0.7,
    )  # fmt: skip
    yield case("sequence_log_probs", log_probs(B, T), mask, mask=1)
    yield case("sequence_mean_log_probs", log_probs(B, T), mask, mask=1)
    yield case(
        "bradley_terry_loss", normal(B), normal(B),
        differentiable=(0, 1), margin=0.3, label_smoothing=0.1, centering=0.05,
    )  # fmt: skip
    yield case("pairwise_ranking_loss", normal(B, G), ranks, candidates, mask=2)
    yield case("plackett_luce_loss", normal(B, G), ranks, candidates, mask=2)
    lengths = np.abs(normal(B, G, scale=5.0)) + 1
    yield case("length_moments", normal(B, G), lengths, candidates, constant=(1,), mask=2)
    yield case(
        "length_penalty_loss", normal(B, G), lengths, candidates, np.abs(normal(B)), normal(B), np.abs(normal(B)),
        constant=(1, 3, 4, 5), mask=2,
    )  # fmt: skip
    yield case("implicit_rewards", normal(B), normal(B), constant=(1,), beta=0.3)
    direct = {"differentiable": (0, 1), "constant": (2, 3)}
    yield case("dpo_loss", *four, **direct, beta=0.3, label_smoothing=0.1)
    yield case("ipo_loss", *four, **direct, beta=0.3)
    yield case("robust_dpo_loss", *four, **direct, beta=0.3, label_smoothing=0.1)
    yield case("hinge_loss", *four, **direct, beta=0.3)
    yield case("simpo_loss", log_probs(B), log_probs(B), differentiable=(0, 1), beta=2.0, margin=0.5)
    yield case("orpo_loss", log_probs(B), log_probs(B), differentiable=(0, 1), weight=0.5)
    yield case(
        "kto_loss", normal(B), normal(B), rng.random(B) < 0.5, normal(B),
        constant=(1, 3), beta=0.5, desirable_weight=1.5, undesirable_weight=0.7,
    )  # fmt: skip
    for name in ("kl_k1", "kl_k2", "kl_k3"):
        yield case(name, log_probs(B, T), log_probs(B, T), constant=(1,))
    for name in ("full_kl", "full_forward_kl"):
        yield case(name, normal(B, T, V), normal(B, T, V), constant=(1,))
    yield case(
        "kl_penalized_rewards", normal(B), normal(B, T), mask,
        differentiable=(), constant=(0, 1), mask=2, beta=0.2,
    )  # fmt: skip
    yield case(
        "generalized_advantage_estimation", normal(B, T), normal(B, T), mask,
        differentiable=(), constant=(0, 1), mask=2, gamma=0.9, lam=0.8,
    )  # fmt: skip
    yield case("group_relative_advantages", normal(B, G), differentiable=(), constant=(0,))
    yield case("leave_one_out_advantages", normal(B, G), differentiable=(), constant=(0,))
    yield case("reinforce_loss", log_probs(B, T), normal(B, T), constant=(1,))
    sampled = log_probs(B, T)
    yield case(
        "clipped_surrogate_loss", sampled, sampled + normal(B, T, scale=0.3), normal(B, T),
        constant=(1, 2), clip_low=0.2, clip_high=0.28,
    )  # fmt: skip
    yield case(
        "sequence_clipped_surrogate_loss", sampled, sampled + normal(B, T, scale=0.3), normal(B), mask,
        constant=(1, 2), mask=3, clip_low=0.2, clip_high=0.28,
    )  # fmt: skip
    yield case(
        "advantage_weighted_loss",
        log_probs(B, T),
        normal(B, T),
        constant=(1,),
        temperature=0.7,
        max_weight=2.0,
    )
    yield case(
        "reward_weighted_loss", log_probs(B), normal(B), constant=(1,), temperature=0.7, max_weight=2.0
    )
    yield case(
        "distribution_matching_loss", log_probs(B), log_probs(B), normal(B), constant=(1, 2), max_weight=2.0
    )
    yield case("value_loss", normal(B, T), normal(B, T), constant=(1,))
    yield case("clipped_value_loss", normal(B, T), normal(B, T), normal(B, T), constant=(1, 2), clip=0.2)
    yield case(
        "process_reward_loss",
        normal(B, T),
        rng.random((B, T)).astype(np.float32),
        mask,
        constant=(1,),
        mask=2,
    )


CASES = {case.name: case for case in _cases()}


@pytest.fixture(params=list(CASES), scope="session")
def case(request) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="session")
def cases() -> dict[str, Case]:
    return CASES
