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
    probable tokens, 0 all. top_p: keeps the most probable tokens up to that mass, 1 all. min_p: keeps tokens
    at least that many times as probable as the most probable one, 0 all. greedy: the most probable token
    instead of a draw; its log-prob is still that of the distribution above. min_new_tokens: EOS cannot come
    before that many tokens, so that the shortest response is ``min_new_tokens`` tokens and EOS; stop strings
    are looked for in what comes after as many. cache_dtype: of keys and values kept: ``compute`` (the
    model's compute dtype), ``float32`` or ``bfloat16``.

    Raises:
        InputError: a field is out of range; the message names it.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False
    min_new_tokens: int = 0
    min_p: float = 0.0
    cache_dtype: str = "compute"

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
        if not 0 <= self.min_p <= 1:
            raise InputError(f"sampling field min_p is {self.min_p}: give a number from 0 (off) to 1")
        if self.cache_dtype not in ("compute", "float32", "bfloat16"):
            raise InputError(
                f"sampling field cache_dtype is {self.cache_dtype!r}: give compute, float32 or bfloat16"
            )
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise InputError(
                f"sampling field min_new_tokens is {self.min_new_tokens}: give 0 to max_new_tokens "
                f"({self.max_new_tokens})"
            )

    @property
    def truncates(self) -> bool:
        """Whether some tokens cannot be drawn, so that behaviour and policy are two distributions."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0 or self.min_new_tokens > 0


class Drawn(NamedTuple):
    """One token a row, each [B]: tokens int32; log_probs under the behaviour distribution, policy_log_probs
    under softmax(logits / temperature), float32; match: state of the stop strings, int32; ends: bool."""

    tokens: jax.Array
    log_probs: jax.Array
    policy_log_probs: jax.Array
    match: jax.Array
    ends: jax.Array


class _State(NamedTuple):
    """The loop's carry: ``step`` tokens a row are drawn, and the last of them is not in the cache yet.

    ``policy_log_probs`` is None where it would equal ``log_probs``.
    """

    step: jax.Array
    cache: Cache
    tokens: jax.Array
    log_probs: jax.Array
    policy_log_probs: jax.Array | None
    match: jax.Array
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
    row_ids: jax.Array | None = None,
    stop_table: jax.Array | None = None,
) -> Rollout:
    """Samples one response a row. Pure; jit it with ``config`` and ``sampling`` static.

    tokens, token_mask: [B, P] prompts of at least one token, padded on the left. key: typed; the draw of row
    b at step t comes from fold_in(fold_in(key, row_ids[b]), t), so that it depends on neither neighbours nor
    padding. row_ids: [B] int32, distinct; None is 0 to B - 1. stop_table: of
    ``stop_strings.stop_table``; None where no string ends a response.

    A row ends with ``eos_id``, or with the token that completes a stop string, or after ``max_new_tokens``;
    EOS and all tokens of the stop string belong to its response, and both count as ``terminated``.
    ``pad_id`` (which may be ``eos_id``) fills what follows. The loop ends when every row has. The cache has
    exactly P + max_new_tokens columns.

    Returns a Rollout over [B, P + max_new_tokens].

    Raises:
        InputError: P + max_new_tokens is beyond the model's ``max_length``.
    """
    rows, prompt = tokens.shape
    new = sampling.max_new_tokens
    check_fits(config, prompt, sampling)
    weights = decoding_weights(config, params)
    prompt_lengths = jnp.sum(token_mask, axis=1, dtype=jnp.int32)
    prompt_readable = jnp.pad(token_mask, ((0, 0), (0, new)))
    columns = jnp.arange(prompt + new)
    row_keys = fold_rows(key, jnp.arange(rows) if row_ids is None else row_ids)

    def append(state: _State, hidden: jax.Array) -> _State:
        logits = vocabulary_logits(hidden, weights["head"], softcap=config.logit_softcap)
        steps = jnp.broadcast_to(state.step, (rows,))
        drawn = draw_next(logits, row_keys, steps, state.match, sampling, eos_id, stop_table)
        live = ~state.ended
        policy = state.policy_log_probs
        if policy is not None:
            policy = _write(policy, jnp.where(live, drawn.policy_log_probs, 0.0), state.step)
        return state._replace(
            step=state.step + 1,
            tokens=_write(state.tokens, jnp.where(live, drawn.tokens, pad_id), state.step),
            log_probs=_write(state.log_probs, jnp.where(live, drawn.log_probs, 0.0), state.step),
            policy_log_probs=policy,
            match=drawn.match,
            lengths=state.lengths + live,
            ended=state.ended | drawn.ends,
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

    hidden, cache = prefill(config, weights, tokens, token_mask, prompt + new, cache_dtype(config, sampling))
    zeros = jnp.zeros((rows, new), jnp.float32)
    start = _State(
        step=jnp.zeros((), jnp.int32),
        cache=cache,
        tokens=jnp.full((rows, new), pad_id, tokens.dtype),
        log_probs=zeros,
        policy_log_probs=zeros if sampling.truncates else None,
        match=jnp.zeros((rows,), jnp.int32),
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
        policy_log_probs=end.log_probs if end.policy_log_probs is None else end.policy_log_probs,
        terminated=end.ended,
        policy_step=jnp.asarray(policy_step, jnp.int32),
    )


def check_fits(config: ModelConfig, prompt: int, sampling: SamplingConfig) -> None:
    """Raises InputError where a prompt of ``prompt`` tokens leaves no room for the response window."""
    new = sampling.max_new_tokens
    if prompt + new > config.max_length:
        room = config.max_length - prompt
        remedy = f"give at most {room}" if room > 0 else "give shorter prompts"
        raise InputError(
            f"sampling field max_new_tokens is {new}: with prompts of {prompt} tokens that exceeds the "
            f"model's max_length {config.max_length}; {remedy}"
        )


def cache_dtype(config: ModelConfig, sampling: SamplingConfig) -> str:
    """What keys and values are kept in."""
    return config.compute_dtype if sampling.cache_dtype == "compute" else sampling.cache_dtype


def fold_rows(key: jax.Array, row_ids: jax.Array) -> jax.Array:
    """The key of each row, [B], from which its draws come and no other row's."""
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(row_ids)


def draw_next(
    logits: jax.Array,
    row_keys: jax.Array,
    steps: jax.Array,
    match: jax.Array,
    sampling: SamplingConfig,
    eos_id: int,
    stop_table: jax.Array | None,
) -> Drawn:
    """The next token of each row, from logits [B, V], keys [B], tokens drawn before [B] and the state of the
    stop strings before [B]."""
    allowed = logits
    if sampling.min_new_tokens:
        too_early = (steps < sampling.min_new_tokens)[:, None] & (jnp.arange(logits.shape[-1]) == eos_id)[
            None
        ]
        allowed = jnp.where(too_early, -jnp.inf, logits)
    kept = behaviour_logits(
        allowed,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
    )
    if sampling.greedy:
        tokens = jnp.argmax(kept, axis=-1).astype(jnp.int32)
        log_probs = _log_prob(kept, tokens)
    else:
        tokens, log_probs = draw(jax.vmap(jax.random.fold_in)(row_keys, steps), kept)
    policy = log_probs
    if sampling.truncates:
        policy = _log_prob(behaviour_logits(logits, temperature=sampling.temperature), tokens)
    ends = tokens == eos_id
    if stop_table is not None:
        searched = steps >= sampling.min_new_tokens
        match = jnp.where(searched, jnp.asarray(stop_table)[match, tokens].astype(jnp.int32), 0)
        ends |= match == stop_table.shape[0] - 1
    return Drawn(tokens, log_probs, policy, match, ends)


def _log_prob(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """[B, V] and [B] -> [B]."""
    picked = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
    return picked - jax.nn.logsumexp(logits, axis=-1)


def _write(columns: jax.Array, new: jax.Array, step: jax.Array) -> jax.Array:
    """[B, R] with column ``step`` replaced by [B]."""
    return jax.lax.dynamic_update_slice_in_dim(columns, new[:, None].astype(columns.dtype), step, axis=1)
