"""Sampler, trainer and decoder agree on a model that caps its logits."""

import jax
import numpy as np

from rlhf_jax.losses import token_entropy, token_log_probs
from rlhf_jax.models import decoder
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.sampling.generate import SamplingConfig, generate
from rlhf_jax.training.forward import response_log_probs

CONFIG = ModelConfig(
    vocab_size=19,
    width=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_width=24,
    max_length=16,
    logit_softcap=2.0,
)


def test_capped_logits_everywhere():
    params = decoder.init_params(CONFIG, jax.random.key(0))
    # Sharp enough for the cap to bite.
    params["decoder"]["embedding"] = 40.0 * params["decoder"]["embedding"]
    prompts = np.random.default_rng(0).integers(0, 19, (4, 5)).astype(np.int32)
    rollout = generate(
        CONFIG,
        params,
        prompts,
        np.ones((4, 5), bool),
        jax.random.key(1),
        sampling=SamplingConfig(max_new_tokens=8, temperature=0.7),
        eos_id=-1,
        pad_id=0,
    )
    log_probs, entropy = response_log_probs(CONFIG, params, rollout, temperature=0.7)
    np.testing.assert_allclose(rollout.log_probs, log_probs, atol=1e-5)
    logits = decoder.logits(CONFIG, params, rollout.tokens, rollout.token_mask)[:, 4:-1]
    assert 1.9 < float(np.abs(logits).max()) <= 2.0, "the cap is reached"
    targets = rollout.tokens[:, 5:]
    np.testing.assert_allclose(token_log_probs(logits, targets, temperature=0.7), log_probs, atol=1e-5)
    np.testing.assert_allclose(token_entropy(logits, temperature=0.7), entropy, atol=1e-5)
