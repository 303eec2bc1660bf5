"""What every loss promises whatever its formula: transformations, constants, masks, rows, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from rlhf_jax.masking import masked_sum

DEVICES = 8


def value_and_gradients(case):
    """A function of the case's arrays: outputs, and gradients of a fixed uneven sum of them."""

    def evaluate(*arrays):
        def total(*differentiated):
            inputs = list(arrays)
            for i, x in zip(case.differentiable, differentiated, strict=True):
                inputs[i] = x
            outputs = case.function(*inputs)
            return sum(jnp.sum(jnp.cos(leaf)) for leaf in jax.tree.leaves(outputs)), outputs

        if not case.differentiable:
            return case.function(*arrays), ()
        arguments = tuple(range(len(case.differentiable)))
        gradients, outputs = jax.grad(total, arguments, has_aux=True)(
            *(arrays[i] for i in case.differentiable)
        )
        return outputs, gradients

    return evaluate


def assert_close(actual, expected):
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def shard(case):
    """Arrays with a leading axis of one row a device, and the in_axes that map it."""
    arrays = [
        a if i in case.shared else a.reshape(DEVICES, -1, *a.shape[1:]) for i, a in enumerate(case.arrays)
    ]
    return arrays, tuple(None if i in case.shared else 0 for i in range(len(arrays)))


def join(case, mapped):
    """Rows of all devices in order; gradients of shared arguments are summed over devices."""
    outputs, gradients = mapped
    outputs = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), outputs)
    gradients = [
        leaf.sum(0) if i in case.shared else leaf.reshape(-1, *leaf.shape[2:])
        for i, leaf in zip(case.differentiable, gradients, strict=True)
    ]
    return outputs, tuple(gradients)


@pytest.fixture(scope="module")
def eager():
    """Values and gradients without any transformation but `grad`, computed once a case."""
    known = {}

    def of(case):
        if case.name not in known:
            known[case.name] = value_and_gradients(case)(*case.arrays)
        return known[case.name]

    return of


def test_jit(case, eager):
    assert_close(jax.jit(value_and_gradients(case))(*case.arrays), eager(case))


def test_vmap(case, eager):
    arrays, axes = shard(case)
    assert_close(join(case, jax.vmap(value_and_gradients(case), in_axes=axes)(*arrays)), eager(case))


def test_pmap(case, eager):
    arrays, axes = shard(case)
    assert_close(join(case, jax.pmap(value_and_gradients(case), in_axes=axes)(*arrays)), eager(case))


def test_shard_map(case, eager):
    """Rows over eight devices; the gradient of a replicated argument comes out summed and replicated."""
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = tuple(P() if i in case.shared else P("data") for i in range(len(case.arrays)))
    out_specs = P("data"), tuple(specs[i] for i in case.differentiable)
    mapped = jax.shard_map(value_and_gradients(case), mesh=mesh, in_specs=specs, out_specs=out_specs)
    assert_close(jax.jit(mapped)(*case.arrays), eager(case))


def test_checkpoint_within_scan(case, eager):
    """Rematerialised, row by row, in a scan: outputs stack to the same rows, gradients of shared arguments add."""
    rowwise = [i for i in range(len(case.arrays)) if i not in case.shared]

    def evaluate(*arrays):
        def total(*differentiated):
            inputs = list(arrays)
            for i, x in zip(case.differentiable, differentiated, strict=True):
                inputs[i] = x

            def one(carry, rows):
                call = list(inputs)
                for i, row in zip(rowwise, rows, strict=True):
                    call[i] = row[None]
                outputs = jax.checkpoint(case.function)(*call)
                return carry + sum(jnp.sum(jnp.cos(leaf)) for leaf in jax.tree.leaves(outputs)), outputs

            return jax.lax.scan(one, 0.0, tuple(inputs[i] for i in rowwise))

        if not case.differentiable:
            return total()[1], ()
        arguments = tuple(range(len(case.differentiable)))
        gradients, outputs = jax.grad(total, arguments, has_aux=True)(
            *(arrays[i] for i in case.differentiable)
        )
        return outputs, gradients

    outputs, gradients = jax.jit(evaluate)(*map(jnp.asarray, case.arrays))
    outputs = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), outputs)
    assert_close((outputs, gradients), eager(case))


def test_slopes_are_those_of_the_value(case):
    """Numerical differences in float64, forward and reverse mode (the chunked head has reverse mode only)."""
    if not case.differentiable:
        pytest.skip("nothing is differentiated")
    with jax.enable_x64(True):
        wide = [a.astype(np.float64) if a.dtype == np.float32 else a for a in case.arrays]

        def function(*differentiated):
            inputs = list(wide)
            for i, x in zip(case.differentiable, differentiated, strict=True):
                inputs[i] = x
            return case.function(*inputs)

        modes = ["rev"] if case.name == "chunked_token_log_probs" else ["fwd", "rev"]
        points = tuple(wide[i] for i in case.differentiable)
        if "clipped" not in case.name or case.name == "sequence_clipped_surrogate_loss":
            check_grads(function, points, order=1, modes=modes, atol=1e-6, rtol=1e-6, eps=1e-6)
        else:
            check_grads(function, points, order=1, modes=modes, atol=1e-6, rtol=1e-6, eps=1e-7)


def test_constants_get_no_gradient(case):
    if not case.constant:
        pytest.skip("nothing is held constant")
    arguments = case.constant
    gradients = jax.grad(
        lambda *arrays: sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(case.function(*arrays))),
        arguments,
    )(*map(jnp.asarray, case.arrays))
    for i, gradient in zip(arguments, gradients, strict=True):
        np.testing.assert_array_equal(gradient, np.zeros_like(case.arrays[i]), err_msg=f"argument {i}")


def test_rows_do_not_influence_each_other(case):
    before = jax.tree.leaves(case.function(*case.arrays))
    changed = [
        a if i in case.shared or a.dtype != np.float32 else np.concatenate([a[:1], a[1:2] * -3 - 1, a[2:]])
        for i, a in enumerate(case.arrays)
    ]
    after = jax.tree.leaves(case.function(*changed))
    others = np.arange(len(case.arrays[0])) != 1
    assert any(not np.array_equal(a[1], b[1]) for a, b in zip(after, before, strict=True))
    for ours, theirs in zip(after, before, strict=True):
        np.testing.assert_allclose(ours[others], theirs[others], rtol=1e-6, atol=1e-7)


def test_nan_under_the_mask_reaches_nothing(case):
    """Poison whatever is masked out, in every float argument: value and gradient stay bit for bit."""
    mask = case.arrays[case.mask] if case.mask is not None else None
    rows = len(case.arrays[0])
    by_row = mask is None and jax.tree.leaves(case.function(*case.arrays))[0].ndim == 1
    if mask is None and case.name.endswith("_advantages"):
        pytest.skip("a group has no mask")
    if mask is None:
        mask = np.arange(rows) % 3 != 0 if by_row else (np.arange(rows * 5) % 3 != 0).reshape(rows, 5)

    def poison(a, i):
        if i in case.shared or a.dtype != np.float32 or a.shape[: mask.ndim] != mask.shape:
            return a
        return np.where(mask.reshape(mask.shape + (1,) * (a.ndim - mask.ndim)), a, np.float32(np.nan))

    poisoned = [poison(a, i) for i, a in enumerate(case.arrays)]
    assert any(np.isnan(a).any() for a in poisoned if a.dtype == np.float32)

    def total(arrays):
        def of(*differentiated):
            inputs = list(arrays)
            for i, x in zip(case.differentiable, differentiated, strict=True):
                inputs[i] = x
            outputs = jax.tree.leaves(case.function(*inputs))
            return sum(masked_sum(leaf, mask) if leaf.shape == mask.shape else leaf.sum() for leaf in outputs)

        arguments = tuple(range(len(case.differentiable)))
        if not arguments:
            return of(), ()
        return jax.value_and_grad(of, arguments)(*(jnp.asarray(arrays[i]) for i in case.differentiable))

    for ours, theirs in zip(
        jax.tree.leaves(total(poisoned)), jax.tree.leaves(total(clean(case, poisoned))), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def clean(case, poisoned):
    """The same arrays with a harmless number where the poison is."""
    return [np.where(np.isnan(a), np.float32(-0.5), a) if a.dtype == np.float32 else a for a in poisoned]


def test_an_empty_mask_gives_zero(case):
    if case.mask is None:
        pytest.skip("no mask")
    arrays = list(case.arrays)
    arrays[case.mask] = np.zeros_like(arrays[case.mask])
    for leaf in jax.tree.leaves(case.function(*arrays)):
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))
    for i in case.differentiable:
        gradient = jax.grad(lambda x, i=i: case.function(*arrays[:i], x, *arrays[i + 1 :]).sum())(arrays[i])
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


def test_masked_equals_subset(case):
    """A masked tail is as if it had been cut off, in value and gradient."""
    if case.mask is None:
        pytest.skip("no mask")
    width = case.arrays[case.mask].shape[1]
    cut = width - 2
    whole = [np.asarray(a) for a in case.arrays]
    whole[case.mask] = whole[case.mask] & (np.arange(width) < cut)[None]
    part = [a[:, :cut] if a.ndim == 2 else a for a in whole]

    def leaves(arrays):
        values, gradients = value_and_gradients(case)(*map(jnp.asarray, arrays))
        return [leaf[:, :cut] if leaf.ndim == 2 else leaf for leaf in jax.tree.leaves((values, gradients))]

    for ours, theirs in zip(leaves(whole), leaves(part), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)


def floats(case):
    return [
        i
        for i, a in enumerate(case.arrays)
        if a.dtype == np.float32 and case.name != "process_reward_loss" or i == 0
    ]


def test_integers_are_refused(case):
    """Every float argument, as integers, and the message says which."""
    names = argument_names(case)
    for i in floats(case):
        arrays = list(case.arrays)
        arrays[i] = np.ones(arrays[i].shape, np.int32)
        with pytest.raises(TypeError, match=rf"{names[i]} must be floating, got int32"):
            jax.eval_shape(case.function, *arrays)


def test_wrong_rank_is_refused(case):
    names = argument_names(case)
    for i in floats(case):
        arrays = list(case.arrays)
        arrays[i] = np.ones((2, 3, 4, 5), np.float32)
        with pytest.raises(ValueError, match=rf"{names[i]} must have .*got \[2, 3, 4, 5\]"):
            jax.eval_shape(case.function, *arrays)


def test_disagreeing_shapes_are_refused(case):
    if len(case.arrays) == 1:
        pytest.skip("one argument agrees with itself")
    names = argument_names(case)
    for i in range(1, len(case.arrays)):
        if i in case.shared:
            continue
        arrays = list(case.arrays)
        arrays[i] = arrays[i][:-1]
        with pytest.raises(ValueError, match=r"must have .*got"):
            jax.eval_shape(case.function, *arrays)
        with pytest.raises(ValueError, match="|".join(names)):
            jax.eval_shape(case.function, *arrays)


def test_a_mask_of_numbers_is_refused(case):
    if case.mask is None:
        pytest.skip("no mask")
    name = argument_names(case)[case.mask]
    arrays = list(case.arrays)
    arrays[case.mask] = arrays[case.mask].astype(np.float32)
    with pytest.raises(TypeError, match=f"{name} must be boolean"):
        jax.eval_shape(case.function, *arrays)


HYPER = {
    "beta": [0.0, -0.1, float("nan")],
    "label_smoothing": [0.5, -0.1],
    "gamma": [-0.1, 1.1],
    "lam": [-0.1, 1.1],
    "temperature": [0.0, -1.0],
    "max_weight": [0.0],
    "clip": [0.0],
    "clip_low": [-0.1, 1.1],
    "clip_high": [-0.1],
    "weight": [0.0],
    "chunk_size": [0],
    "centering": [-1.0],
    "desirable_weight": [-1.0],
    "undesirable_weight": [-1.0],
}


def test_every_hyper_parameter_has_a_range_or_is_free(cases):
    free = {"margin"}  # any number
    assert {name for case in cases.values() for name in case.hyper} == set(HYPER) | free


@pytest.mark.parametrize("kind", [float, np.float32, jnp.float32], ids=["python", "numpy", "jax"])
def test_hyper_parameters_out_of_range_are_refused(case, kind):
    """While tracing, whatever type the number comes in."""
    given = [(name, value) for name in case.hyper for value in HYPER.get(name, ())]
    if not given:
        pytest.skip("no hyper-parameter with a range")
    for name, value in given:
        call = functools.partial(case.function, **{name: kind(value)})
        with pytest.raises(ValueError, match=rf"^{name} must be"):
            jax.eval_shape(call, *case.arrays)


def test_traced_hyper_parameters_are_taken(case):
    """An adaptive beta or an annealed temperature is a traced scalar: same value, no range check."""
    traced = {k: v for k, v in case.hyper.items() if isinstance(v, float)}
    if not traced:
        pytest.skip("no number to trace")
    ours = jax.jit(lambda arrays, hyper: case.function(*arrays, **hyper))(case.arrays, traced)
    assert_close(ours, case.function(*case.arrays))


def argument_names(case):
    code = case.function.func.__code__
    return code.co_varnames[: code.co_argcount]
