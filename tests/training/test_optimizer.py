"""Schedules by hand, AdamW with clipping against a float64 loop, and which parameters decay."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.models import decoder
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.training.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        # 14 updates at a highest rate of 2. Four of warm-up rise by 0.5 each; ten remain.
        ("constant", 4, {0: 0.0, 1: 0.5, 3: 1.5, 4: 2.0, 9: 2.0, 14: 2.0}),
        ("linear", 4, {0: 0.0, 2: 1.0, 4: 2.0, 5: 1.8, 9: 1.0, 14: 0.0}),
        ("cosine", 4, {0: 0.0, 4: 2.0, 9: 1.0, 14: 0.0, 6: 1 + math.cos(0.2 * math.pi)}),
        ("constant", 0, {0: 2.0, 14: 2.0}),
        ("linear", 0, {0: 2.0, 7: 1.0, 14: 0.0}),
        ("cosine", 0, {0: 2.0, 7: 1.0, 14: 0.0}),
        # A warm-up longer than the run is cut off by its end.
        ("cosine", 28, {0: 0.0, 7: 0.5, 14: 1.0}),
    ],
)
def test_learning_rates_by_hand(schedule, warmup, expected):
    config = OptimizerConfig(learning_rate=2.0, schedule=schedule, warmup_steps=warmup)
    found = learning_rate_schedule(config, num_updates=14)
    assert {step: float(found(step)) for step in expected} == pytest.approx(expected, abs=1e-6)


def adamw(params, gradients, config: OptimizerConfig, rates, decays):
    """AdamW (Loshchilov and Hutter 2019, algorithm 2) after global-norm clipping, in float64."""
    params = {name: value.astype(np.float64) for name, value in params.items()}
    first = {name: np.zeros_like(value) for name, value in params.items()}
    second = {name: np.zeros_like(value) for name, value in params.items()}
    for t, gradient in enumerate(gradients, start=1):
        norm = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in gradient.values()))
        scale = min(1.0, config.max_grad_norm / norm) if config.max_grad_norm else 1.0
        for name, g in gradient.items():
            g = scale * g.astype(np.float64)
            first[name] = config.b1 * first[name] + (1 - config.b1) * g
            second[name] = config.b2 * second[name] + (1 - config.b2) * g**2
            step = (first[name] / (1 - config.b1**t)) / (
                np.sqrt(second[name] / (1 - config.b2**t)) + config.epsilon
            )
            decay = config.weight_decay * params[name] if name in decays else 0.0
            params[name] = params[name] - rates[t - 1] * (step + decay)
    return params


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0, 1e3])
def test_updates_are_those_of_adamw(max_grad_norm):
    # Adam alone is blind to the gradient's scale: an epsilon as large as the gradients shows it.
    config = OptimizerConfig(
        learning_rate=0.1,
        schedule="linear",
        warmup_steps=1,
        weight_decay=0.3,
        epsilon=1.0,
        max_grad_norm=max_grad_norm,
    )
    rng = np.random.default_rng(0)
    shapes = {"kernel": (3, 2), "bias": (2,), "scalar": ()}
    draw = lambda: {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}  # noqa: E731
    params, gradients = draw(), [draw() for _ in range(4)]
    expected = adamw(params, gradients, config, rates=[0.0, 0.1, 0.1 * 2 / 3, 0.1 / 3], decays={"kernel"})
    optimizer = make_optimizer(config, num_updates=4)
    found = jax.tree.map(jnp.asarray, params)
    state = optimizer.init(found)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, found)
        found = jax.tree.map(jnp.add, found, updates)
    for name in shapes:
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-5, atol=1e-7)


def test_weight_decay_spares_norms_and_biases_of_a_real_model_and_shrinks_the_rest():
    shape = ModelConfig(
        vocab_size=5,
        width=4,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=2,
        mlp_width=3,
        max_length=8,
        tied_embeddings=False,
    )
    params = decoder.init_params(shape, jax.random.key(0))
    params["head"] = {"kernel": jnp.ones(4), "bias": jnp.ones(())}
    config = OptimizerConfig(learning_rate=0.5, schedule="constant", weight_decay=0.2)
    optimizer = make_optimizer(config, num_updates=1)
    updates, _ = jax.jit(lambda p: optimizer.update(jax.tree.map(jnp.zeros_like, p), optimizer.init(p), p))(
        params
    )
    spared = set()
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        name, value = path[-1].key, params
        for key in path:
            value = value[key.key]
        if np.any(np.asarray(update)):
            np.testing.assert_allclose(update, -0.5 * 0.2 * np.asarray(value), rtol=1e-6)
        else:
            spared.add((path[0].key, name))
    decoder_norms = {("decoder", name) for name in ("attention_norm", "mlp_norm", "final_norm")}
    assert spared == decoder_norms | {("head", "kernel"), ("head", "bias")}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("learning_rate", -1e-3, "learning_rate is -0.001; it must be at least 0"),
        ("learning_rate", math.nan, "learning_rate is nan"),
        ("learning_rate", math.inf, "learning_rate is inf"),
        ("warmup_steps", -1, "warmup_steps is -1"),
        ("b2", 1.0, "b2 is 1.0; it must be at least 0 and below 1"),
        ("epsilon", 0.0, "epsilon is 0.0; it must be above 0"),
    ],
)
def test_an_optimizer_that_cannot_be(field, value, message):
    with pytest.raises(InputError, match=message):
        OptimizerConfig(**{field: value})


def test_an_unknown_schedule_is_named():
    config = dataclasses.replace(OptimizerConfig(), schedule="triangle")
    with pytest.raises(InputError, match="'triangle'; use 'constant', 'linear' or 'cosine'"):
        learning_rate_schedule(config, 3)
