"""Masked arithmetic and the named reductions: by hand, against loops, over any split, under any poison."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import PartitionSpec as P

from rlhf_jax import masking

X = np.array([[1.0, 2.0, 30.0], [6.0, 40.0, 50.0], [7.0, 8.0, 9.0], [1.0, 1.0, 1.0]], np.float32)
MASK = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 0, 1]], bool)
REDUCTIONS = {
    "token_mean": (masking.token_mean, (1 + 2 + 6 + 1 + 1) / 5),
    "sequence_mean_of_token_means": (masking.sequence_mean_of_token_means, (1.5 + 6 + 1) / 3),
    "sequence_mean_of_token_sums": (masking.sequence_mean_of_token_sums, (3 + 6 + 2) / 3),
    "fixed_length_mean": (lambda x, mask: masking.fixed_length_mean(x, mask, length=4), 11 / (3 * 4)),
}
reductions = pytest.mark.parametrize("reduction, by_hand", REDUCTIONS.values(), ids=REDUCTIONS)


@reductions
def test_reduction_by_hand(reduction, by_hand):
    assert float(reduction(X, MASK).mean()) == pytest.approx(by_hand, rel=1e-6)


@reductions
def test_reduction_over_any_split_of_rows(reduction, by_hand):
    parts = [reduction(X[i : i + 1], MASK[i : i + 1]) for i in range(len(X))]
    total = parts[0] + parts[1] + parts[2] + parts[3]
    assert float(total.mean()) == pytest.approx(by_hand, rel=1e-6)


@reductions
def test_reduction_over_devices(reduction, by_hand):
    """Ragged shares of a batch, one row a device: the same mean as in one piece, under pmap and shard_map."""
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,))
    whole = jax.shard_map(
        lambda x, mask: reduction(x, mask).sum_over("data").mean(),
        mesh=mesh,
        in_specs=(P("data"), P("data")),
        out_specs=P(),
    )
    assert float(jax.jit(whole)(X, MASK)) == pytest.approx(by_hand, rel=1e-6)
    mapped = jax.pmap(lambda x, mask: reduction(x, mask).sum_over("data").mean(), axis_name="data")
    np.testing.assert_allclose(mapped(X[:, None], MASK[:, None]), [by_hand] * 4, rtol=1e-6)


@reductions
def test_reduction_of_nothing_is_zero(reduction, by_hand):
    value, gradient = jax.value_and_grad(lambda x: reduction(x, np.zeros_like(MASK)).mean())(X)
    assert float(value) == 0.0
    np.testing.assert_array_equal(gradient, np.zeros_like(X))


@reductions
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_poison_under_the_mask(reduction, by_hand, poison):
    value, gradient = jax.value_and_grad(lambda x: reduction(x, MASK).mean())(np.where(MASK, X, poison))
    assert float(value) == pytest.approx(by_hand, rel=1e-6)
    _, clean = jax.value_and_grad(lambda x: reduction(x, MASK).mean())(X)
    np.testing.assert_array_equal(gradient, clean)


@reductions
def test_reduction_gradient_is_its_weights(reduction, by_hand):
    """A reduction is linear: its gradient holds the weight of each token, so weights dot x is the mean itself."""
    gradient = jax.grad(lambda x: reduction(x, MASK).mean())(X)
    assert float(np.sum(gradient * X)) == pytest.approx(by_hand, rel=1e-6)
    np.testing.assert_array_equal(np.asarray(gradient)[~MASK], 0.0)


EVERY = {name: reduction for name, (reduction, _) in REDUCTIONS.items()} | {
    "masked_sum": lambda x, mask: masking.masked_sum(x, mask, axis=1),
    "masked_mean": masking.masked_mean,
    "masked_whiten": masking.masked_whiten,
    "masked_whiten, mean kept": lambda x, mask: masking.masked_whiten(x, mask, shift_mean=False),
}


@pytest.mark.parametrize("name", EVERY)
def test_under_every_transformation(name):
    """Eight blocks of two rows: each alone is what jit, vmap, pmap, shard_map and a rematerialised scan give it."""
    rng = np.random.default_rng(0)
    x, mask = rng.standard_normal((8, 2, 3)).astype(np.float32), rng.random((8, 2, 3)) < 0.6
    mask[0], mask[1, 0] = False, False

    def evaluate(x, mask):
        def total(x):
            values = jax.tree.leaves(EVERY[name](x, mask))
            return sum(jnp.sum(jnp.cos(value)) for value in values), values

        return jax.grad(total, has_aux=True)(x)

    eager = [evaluate(*block) for block in zip(x, mask, strict=True)]
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *eager)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    one_a_device = jax.shard_map(
        lambda x, mask: jax.tree.map(lambda leaf: leaf[None], evaluate(x[0], mask[0])),
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P("data"),
    )
    transformed = [
        jax.vmap(evaluate)(x, mask),
        jax.pmap(evaluate)(x, mask),
        jax.jit(one_a_device)(x, mask),
        jax.lax.scan(lambda c, block: (c, jax.checkpoint(evaluate)(*block)), None, (x, mask))[1],
        jax.tree.map(lambda *leaves: np.stack(leaves), *map(jax.jit(evaluate), x, mask)),
    ]
    for ours in transformed:
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_an_absent_row_counts_for_nothing():
    """Row 2 has no tokens: dropping it leaves every total and weight as it was."""
    kept = [0, 1, 3]
    for reduction, _ in REDUCTIONS.values():
        whole, part = reduction(X, MASK), reduction(X[kept], MASK[kept])
        np.testing.assert_allclose([whole.total, whole.weight], [part.total, part.weight], rtol=1e-6)


def test_means_of_means_would_differ():
    """Why totals travel and not means: two unequal halves, averaged after division, are 2 and not 1.75."""
    x, mask = np.array([[1.0, 2.0], [2.5, 9.0]], np.float32), np.array([[True, True], [True, False]])
    parts = [masking.token_mean(x[i : i + 1], mask[i : i + 1]) for i in range(2)]
    assert float((parts[0] + parts[1]).mean()) == pytest.approx(5.5 / 3)
    assert float(parts[0].mean() + parts[1].mean()) / 2 == 2.0


def test_weighted_sum_is_a_pytree():
    doubled = jax.tree.map(lambda leaf: leaf * 2, masking.WeightedSum(jnp.float32(3.0), jnp.float32(2.0)))
    assert float(doubled.total) == 6.0 and float(doubled.weight) == 4.0
    assert float(jax.jit(lambda s: (s + s).mean())(doubled)) == 1.5
    _, scanned = jax.lax.scan(lambda c, x: (c, masking.WeightedSum(x, x)), 0.0, jnp.ones(3))
    assert float(scanned.total.sum()) == 3.0


def test_whitening_by_hand():
    """N+'s [2, 3] gives +-1 with the population variance; TRL's n - 1 gives +-0.70711."""
    x, mask = np.array([[2.0, 3.0, 99.0]], np.float32), np.array([[True, True, False]])
    np.testing.assert_allclose(masking.masked_whiten(x, mask), [[-1.0, 1.0, 0.0]], rtol=1e-6)
    kept = masking.masked_whiten(x, mask, shift_mean=False)
    np.testing.assert_allclose(kept, [[1.5, 3.5, 0.0]], rtol=1e-6)
    trl = masking.masked_whiten(x, mask) * np.sqrt(1 / 2, dtype=np.float32)
    np.testing.assert_allclose(trl, [[-0.70711, 0.70711, 0.0]], atol=1e-5)


def test_whitening_is_that_of_the_global_batch():
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(
        lambda x, mask: masking.masked_whiten(x, mask, axis_name="data"),
        mesh=mesh,
        in_specs=(P("data"), P("data")),
        out_specs=P("data"),
    )
    np.testing.assert_allclose(
        jax.jit(sharded)(X, MASK), masking.masked_whiten(X, MASK), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("value", [0.1, -3.7, 1e4])
def test_whitening_without_spread(value):
    whitened = masking.masked_whiten(np.full((2, 3), value, np.float32), np.ones((2, 3), bool))
    np.testing.assert_allclose(whitened, np.zeros((2, 3)), atol=1e-2)
    empty = masking.masked_whiten(X, np.zeros_like(MASK), shift_mean=False)
    np.testing.assert_array_equal(empty, np.zeros_like(X))


MASKS = hnp.arrays(bool, (3, 4))
VALUES = hnp.arrays(np.float32, (3, 4), elements=st.floats(-1e3, 1e3, width=32))


@settings(max_examples=40, deadline=None)
@given(VALUES, MASKS)
def test_masks_of_every_shape(x, mask):
    """Sums, means, whitening and all four reductions against float64 loops over what the mask keeps."""
    rows = [x[i, mask[i]].astype(np.float64) for i in range(len(x))]
    present = [row for row in rows if len(row)]
    tokens = np.concatenate(rows)
    close = {"rtol": 1e-5, "atol": 1e-3}
    np.testing.assert_allclose(masking.masked_sum(x, mask, axis=1), [row.sum() for row in rows], **close)
    means = [row.mean() if len(row) else 0.0 for row in rows]
    np.testing.assert_allclose(masking.masked_mean(x, mask, axis=1), means, **close)
    sums = {
        "token_mean": (tokens.sum(), len(tokens)),
        "sequence_mean_of_token_means": (sum(row.mean() for row in present), len(present)),
        "sequence_mean_of_token_sums": (sum(row.sum() for row in present), len(present)),
        "fixed_length_mean": (tokens.sum(), 4 * len(present)),
    }
    for name, (total, weight) in sums.items():
        ours = REDUCTIONS[name][0](x, mask)
        np.testing.assert_allclose([ours.total, ours.weight], [total, weight], **close)
    whitened = np.asarray(masking.masked_whiten(x, mask))
    assert (whitened[~mask] == 0).all()
    if len(tokens) and tokens.std() > 1e-2 * (1 + abs(tokens).max()):
        np.testing.assert_allclose(whitened[mask].mean(), 0.0, atol=1e-3)
        np.testing.assert_allclose(whitened[mask].std(), 1.0, atol=1e-3)


def test_refusals():
    with pytest.raises(TypeError, match="mask must be boolean"):
        masking.masked_mean(X, MASK.astype(np.float32))
    with pytest.raises(TypeError, match="x must be floating, got int32"):
        masking.masked_sum(X.astype(np.int32), MASK)
    with pytest.raises(ValueError, match=r"mask must have the shape of x, \[4, 3\], got \[4, 2\]"):
        masking.masked_whiten(X, MASK[:, :2])
    with pytest.raises(ValueError, match="x must have rank 2"):
        masking.token_mean(X[0], MASK[0])
    with pytest.raises(ValueError, match="length must be a positive number of tokens, got 0"):
        masking.fixed_length_mean(X, MASK, length=0)


def test_half_precision_is_summed_in_float32():
    """4,097 ones: bfloat16 stops counting at 256."""
    ones = jnp.ones((1, 4097), jnp.bfloat16)
    assert float(masking.masked_sum(ones, jnp.ones((1, 4097), bool))) == 4097.0
