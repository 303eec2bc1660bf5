"""From logits to loss and back, against the DPO authors' own code (recorded by make_dpo_authors.py)."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import losses

GOLDEN = json.loads((pathlib.Path(__file__).parent / "dpo_authors.json").read_text())
GIVEN = {name: np.array(value) for name, value in GOLDEN["inputs"].items() if name != "beta"}
BETA = GOLDEN["inputs"]["beta"]


def log_probs_of(logits):
    """Logits at t predict token t + 1; summed over the response."""
    tokens = losses.token_log_probs(logits[:, :-1], GIVEN["tokens"][:, 1:].astype(np.int32))
    return losses.sequence_log_probs(tokens, GIVEN["mask"][:, 1:])


def losses_of(logits):
    policy = log_probs_of(logits)
    ref = log_probs_of(jnp.asarray(GIVEN["reference"], jnp.float32))
    return losses.dpo_loss(*jnp.split(policy, 2), *jnp.split(ref, 2), beta=BETA)


def test_from_logits_to_loss():
    logits = jnp.asarray(GIVEN["logits"], jnp.float32)
    np.testing.assert_allclose(log_probs_of(logits), GOLDEN["log_probs"], rtol=1e-5)
    np.testing.assert_allclose(losses_of(logits), GOLDEN["losses"], rtol=1e-5)
    gradient = jax.grad(lambda z: losses_of(z).mean())(logits)
    np.testing.assert_allclose(gradient, np.array(GOLDEN["gradient"]), rtol=1e-4, atol=1e-6)


def test_implicit_rewards():
    logits, reference = (jnp.asarray(GIVEN[name], jnp.float32) for name in ("logits", "reference"))
    ours = losses.implicit_rewards(log_probs_of(logits), log_probs_of(reference), beta=BETA)
    np.testing.assert_allclose(jnp.split(ours, 2), GOLDEN["rewards"], rtol=1e-4, atol=1e-6)
