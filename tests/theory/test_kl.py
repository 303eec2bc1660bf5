"""The KL estimators against the KL itself, summed over every sequence; float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import losses
from rlhf_jax.masking import masked_sum


@pytest.fixture(scope="module")
def policies(world):
    """A policy away from the reference, and both, in float64."""
    rng = np.random.default_rng(5)
    reference = world.reference.astype(np.float64)
    return reference + 0.6 * rng.standard_normal(reference.shape), reference


def enumerated_kl(world, logits, ref):
    log_p, log_q = world.log_probs(logits), world.log_probs(ref)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q))


def test_sequences_are_all_there_are(world, policies):
    with jax.enable_x64(True):
        for logits in policies:
            assert float(world.probabilities(jnp.asarray(logits)).sum()) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("estimator", [losses.kl_k1, losses.kl_k3])
def test_k1_and_k3_average_to_the_kl(world, policies, estimator):
    """Per token, summed over the response: the chain rule makes it the KL of sequences."""
    with jax.enable_x64(True):
        logits, ref = map(jnp.asarray, policies)
        tokens = estimator(world.token_log_probs(logits), world.token_log_probs(ref))
        mean = jnp.sum(world.probabilities(logits) * masked_sum(tokens, world.mask, axis=1))
        assert float(mean) == pytest.approx(float(enumerated_kl(world, logits, ref)), rel=1e-12)
        whole = estimator(world.log_probs(logits), world.log_probs(ref))
        mean = jnp.sum(world.probabilities(logits) * whole)
        assert float(mean) == pytest.approx(float(enumerated_kl(world, logits, ref)), rel=1e-12)


def test_k2_is_biased(world, policies):
    with jax.enable_x64(True):
        logits, ref = map(jnp.asarray, policies)
        mean = jnp.sum(
            world.probabilities(logits) * losses.kl_k2(world.log_probs(logits), world.log_probs(ref))
        )
        kl = float(enumerated_kl(world, logits, ref))
        assert abs(float(mean) - kl) > 0.02 * kl


def averaged_gradient(world, estimator, logits, ref):
    """What differentiating an estimator on samples of the present policy gives on average."""
    weights = jax.lax.stop_gradient(world.probabilities(logits))
    return jax.grad(lambda z: jnp.sum(weights * estimator(world.log_probs(z), world.log_probs(ref))))(logits)


def test_gradients_of_the_estimators(world, policies):
    """k2's is the reverse KL's; k1's is nothing; k3's is the forward KL's."""
    with jax.enable_x64(True):
        logits, ref = map(jnp.asarray, policies)
        reverse = jax.grad(lambda z: enumerated_kl(world, z, ref))(logits)
        forward = jax.grad(lambda z: enumerated_kl(world, ref, z))(logits)
        np.testing.assert_allclose(averaged_gradient(world, losses.kl_k2, logits, ref), reverse, atol=1e-12)
        np.testing.assert_allclose(averaged_gradient(world, losses.kl_k3, logits, ref), forward, atol=1e-12)
        np.testing.assert_allclose(averaged_gradient(world, losses.kl_k1, logits, ref), 0.0, atol=1e-12)
        assert float(jnp.abs(reverse - forward).max()) > 0.01


@pytest.mark.parametrize("exact, flip", [(losses.full_kl, False), (losses.full_forward_kl, True)])
def test_full_kl_by_the_chain_rule(world, policies, exact, flip):
    """Exact KL at each position, averaged over the sequences of the side that samples."""
    with jax.enable_x64(True):
        logits, ref = map(jnp.asarray, policies)
        positions = exact(logits[world.prefixes], ref[world.prefixes])
        sampler, other = (ref, logits) if flip else (logits, ref)
        mean = jnp.sum(world.probabilities(sampler) * masked_sum(positions, world.mask, axis=1))
        assert float(mean) == pytest.approx(float(enumerated_kl(world, sampler, other)), rel=1e-12)


def test_k3_has_less_variance_than_k1(world, policies):
    """At a policy near its reference, which is where training is."""
    with jax.enable_x64(True):
        ref = jnp.asarray(policies[1])
        logits = ref + 0.1 * (jnp.asarray(policies[0]) - ref)
        weights = world.probabilities(logits)
        variance = {}
        for name in ("kl_k1", "kl_k3"):
            sample = getattr(losses, name)(world.log_probs(logits), world.log_probs(ref))
            variance[name] = float(
                jnp.sum(weights * jnp.square(sample)) - jnp.square(jnp.sum(weights * sample))
            )
        assert variance["kl_k3"] < 0.05 * variance["kl_k1"]
