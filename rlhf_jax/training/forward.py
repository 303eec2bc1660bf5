"""From a model and a batch to the arrays that losses take. Imports models, losses and types.

Everything is per response token, [B, R]: the hidden state at column S-R-1+t predicts response column t (see ``types``),
so the vocabulary head is applied to R columns and never to a prompt.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.losses import chunked_token_log_probs
from rlhf_jax.models import decoder, heads
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.types import DemonstrationBatch, PolicyBatch, Rollout

Sequences = DemonstrationBatch | PolicyBatch | Rollout

# Positions whose [V] logits are alive at once in the vocabulary head; of large batches, which many devices share, a
# sixteenth.
CHUNK_SIZE = 256


def response_hidden_states(config: ModelConfig, params: Any, batch: Sequences) -> jax.Array:
    """Hidden states [B, R, D] that predict the response tokens."""
    segment_ids = batch.segment_ids if isinstance(batch, DemonstrationBatch) else None
    hidden = decoder.hidden_states(config, params, batch.tokens, batch.token_mask, segment_ids=segment_ids)
    width, response = batch.tokens.shape[1], batch.response_mask.shape[1]
    return hidden[:, width - response - 1 : width - 1]


def response_log_probs(
    config: ModelConfig, params: Any, batch: Sequences, *, temperature: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities and entropies of the response tokens, both [B, R] float32 nats, 0 off-mask.

    ``temperature`` divides the logits; use the one that sampled, or KL is not 0 where policies agree.
    """
    hidden = response_hidden_states(config, params, batch)
    targets = batch.tokens[:, -batch.response_mask.shape[1] :]
    # A chunk larger than the batch would only compute padding.
    chunk_size = min(max(CHUNK_SIZE, targets.size // 16), targets.size)
    log_probs, entropy = chunked_token_log_probs(
        hidden,
        decoder.unembedding(config, params),
        targets,
        chunk_size=chunk_size,
        temperature=temperature,
        softcap=config.logit_softcap,
    )
    return jnp.where(batch.response_mask, log_probs, 0.0), jnp.where(batch.response_mask, entropy, 0.0)


def response_values(config: ModelConfig, params: Any, batch: Sequences) -> jax.Array:
    """Values [B, R] float32, 0 off-mask: V_t is read where token t is about to be chosen."""
    values = heads.scalar_head(params["head"], response_hidden_states(config, params, batch))
    return jnp.where(batch.response_mask, values, 0.0)


def concatenate_pairs(chosen: DemonstrationBatch, rejected: DemonstrationBatch) -> DemonstrationBatch:
    """Both sides of [B] pairs as one batch of 2B rows, chosen first: one forward pass instead of two."""
    return jax.tree.map(lambda c, r: jnp.concatenate([c, r]), chosen, rejected)
