"""Prompts in, rollouts out: prefill, then one token a row until every row has ended; imports models and
types."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.errors import InputError
from rlhf_jax.models.cache import Cache, decode_step, decoding_weights, prefill
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.decoder import Params, vocabulary_logits
from rlhf_jax.sampling.logits import behaviour_logits, draw
from rlhf_jax.types import Rollout


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How responses are drawn.

    max_new_tokens: length of the response window R. temperature: divides the logits. top_k: keeps the k most
    probable tokens, 0 all. top_p: keeps the most probable tokens up to that mass, 1 all. greedy: the most
    probable token instead of a draw; its log-prob is still that of the distribution above. min_new_tokens:
    EOS cannot come before that many tokens, so that the shortest response is ``min_new_tokens`` tokens and
    EOS.

    Raises:
        InputError: a field is out of range; the message names it.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False
    min_new_tokens: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"sampling field max_new_tokens is {self.max_new_tokens}: give at least 1")
        if not 0 < self.temperature < float("inf"):
            raise InputError(
                f"sampling field temperature is {self.temperature}: give a number above 0, or set greedy"
            )
        if self.top_k < 0:
            raise InputError(f"sampling field top_k is {self.top_k}: give 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise InputError(
                f"sampling field top_p is {self.top_p}: give a number above 0 and at most 1 (off)"
            )
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise InputError(
                f"sampling field min_new_tokens is {self.min_new_tokens}: give 0 to max_new_tokens "
                f"({self.max_new_tokens})"
            )


class _State(NamedTuple):
    """The loop's carry: ``step`` tokens a row are drawn, and the last of them is not in the cache yet."""

    step: jax.Array
    cache: Cache
    tokens: jax.Array
    log_probs: jax.Array
    lengths: jax.Array
    ended: jax.Array


def generate(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    token_mask: jax.Array,
    key: jax.Array,
    *,
    sampling: SamplingConfig,
    eos_id: int,
    pad_id: int,
    policy_step: int | jax.Array = 0,
) -> Rollout:
    """Samples one response a row. Pure; jit it with ``config`` and ``sampling`` static.

    tokens, token_mask: [B, P] prompts of at least one token, padded on the left. key: typed; the draw of row
    b at step t comes from fold_in(fold_in(key, b), t), so that it depends on neither neighbours nor padding.
    A row ends with ``eos_id``, which belongs to its response, or after ``max_new_tokens``; ``pad_id`` (which
    may be ``eos_id``) fills what follows. The loop ends when every row has. The cache has exactly P +
    max_new_tokens columns.

    Returns a Rollout over [B, P + max_new_tokens] whose log-probs are those of the behaviour distribution.

    Raises:
        InputError: P + max_new_tokens is beyond the model's ``max_length``.
    """
    rows, prompt = tokens.shape
    new = sampling.max_new_tokens
    if prompt + new > config.max_length:
        raise InputError(
            f"sampling field max_new_tokens is {new}: with prompts of {prompt} tokens that exceeds the "
            f"model's max_length {config.max_length}; give at most {config.max_length - prompt}"
        )
    weights = decoding_weights(config, params)
    prompt_lengths = jnp.sum(token_mask, axis=1, dtype=jnp.int32)
    prompt_readable = jnp.pad(token_mask, ((0, 0), (0, new)))
    columns = jnp.arange(prompt + new)
    row_keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(rows))

    def append(state: _State, hidden: jax.Array) -> _State:
        logits = vocabulary_logits(hidden, weights["head"], softcap=config.logit_softcap)
        drawn, log_probs = next_tokens(logits, row_keys, state.step, sampling=sampling, eos_id=eos_id)
        live = ~state.ended
        return state._replace(
            step=state.step + 1,
            tokens=_write(state.tokens, jnp.where(live, drawn, pad_id), state.step),
            log_probs=_write(state.log_probs, jnp.where(live, log_probs, 0.0), state.step),
            lengths=state.lengths + live,
            ended=state.ended | (drawn == eos_id),
        )

    def advance(state: _State) -> _State:
        last = state.step - 1
        column = prompt + last
        hidden, cache = decode_step(
            config,
            weights,
            state.cache,
            jax.lax.dynamic_index_in_dim(state.tokens, last, axis=1, keepdims=False),
            prompt_lengths + last,
            column,
            prompt_readable | ((columns >= prompt) & (columns <= column))[None],
        )
        return append(state._replace(cache=cache), hidden)

    hidden, cache = prefill(config, weights, tokens, token_mask, prompt + new)
    start = _State(
        step=jnp.zeros((), jnp.int32),
        cache=cache,
        tokens=jnp.full((rows, new), pad_id, tokens.dtype),
        log_probs=jnp.zeros((rows, new), jnp.float32),
        lengths=jnp.zeros((rows,), jnp.int32),
        ended=jnp.zeros((rows,), bool),
    )
    unfinished = lambda state: (state.step < new) & ~jnp.all(state.ended)  # noqa: E731
    end = jax.lax.while_loop(unfinished, advance, append(start, hidden))
    response_mask = jnp.arange(new)[None] < end.lengths[:, None]
    return Rollout(
        tokens=jnp.concatenate([tokens, end.tokens], axis=1),
        token_mask=jnp.concatenate([token_mask, response_mask], axis=1),
        response_mask=response_mask,
        log_probs=end.log_probs,
        terminated=end.ended,
        policy_step=jnp.asarray(policy_step, jnp.int32),
    )


def next_tokens(
    logits: jax.Array, row_keys: jax.Array, step: jax.Array, *, sampling: SamplingConfig, eos_id: int
) -> tuple[jax.Array, jax.Array]:
    """Logits [B, V] -> the tokens of one step [B] int32 and their behaviour log-probs [B] float32."""
    if sampling.min_new_tokens:
        too_early = (jnp.arange(logits.shape[-1]) == eos_id)[None] & (step < sampling.min_new_tokens)
        logits = jnp.where(too_early, -jnp.inf, logits)
    kept = behaviour_logits(
        logits, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p
    )
    if sampling.greedy:
        chosen = jnp.argmax(kept, axis=-1).astype(jnp.int32)
        picked = jnp.take_along_axis(kept, chosen[:, None], axis=1)[:, 0]
        return chosen, picked - jax.nn.logsumexp(kept, axis=-1)
    return draw(jax.vmap(lambda key: jax.random.fold_in(key, step))(row_keys), kept)


def _write(columns: jax.Array, new: jax.Array, step: jax.Array) -> jax.Array:
    """[B, R] with column ``step`` replaced by [B]."""
    return jax.lax.dynamic_update_slice_in_dim(columns, new[:, None].astype(columns.dtype), step, axis=1)
