"""Many prompts through few rows of a cache: a row that has ended takes the next prompt; imports models and sampling.

``generate`` goes on until its longest response has ended, and rows that ended before wait. Where lengths have a long
tail that is most of the work. Here a cache of a few slots serves a queue of prompts: each step draws one token a slot,
and a slot whose response has ended reads the next prompt while the others keep what they have. Slots are thus not
equally far, so that each has its own column. What is drawn for a prompt is what ``generate`` draws for it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.errors import InputError
from rlhf_jax.models.cache import Cache, decode_step, decoding_weights, prefill
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.decoder import Params, vocabulary_logits
from rlhf_jax.sampling.generate import (
    Drawn,
    SamplingConfig,
    cache_dtype,
    check_fits,
    draw_next,
    fold_rows,
)
from rlhf_jax.types import Rollout


class _Responses(NamedTuple):
    """What was drawn for each of N prompts: [N, R] twice or three times, [N] twice; see ``types.Rollout``."""

    tokens: jax.Array
    log_probs: jax.Array
    policy_log_probs: jax.Array | None
    lengths: jax.Array
    ended: jax.Array


class _State(NamedTuple):
    """The loop's carry. owner: [B] int32, the prompt that a slot answers, N where it is idle. last, drawn, match: [B]
    int32, a slot's last token, which is not in the cache yet, how many it has, and the state of its stop strings.
    queue: [] int32, the prompt to be read next."""

    cache: Cache
    owner: jax.Array
    last: jax.Array
    drawn: jax.Array
    match: jax.Array
    queue: jax.Array
    responses: _Responses


def generate_refilled(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    token_mask: jax.Array,
    key: jax.Array,
    *,
    slots: int,
    sampling: SamplingConfig,
    eos_id: int,
    pad_id: int,
    policy_step: int | jax.Array = 0,
    row_ids: jax.Array | None = None,
    stop_table: jax.Array | None = None,
) -> Rollout:
    """``generate`` of N prompts by a cache of ``slots`` rows; pure, and jitted with the same arguments static.

    tokens, token_mask: [N, P]. slots: 1 or more; more than N are not used. Everything else, and the Rollout of N rows,
    in the order of the prompts: as in ``generate``, whose rows these are (their log-probs to rounding, as matrix
    products of other shapes round otherwise).

    A prompt that is read into a slot is read alone, at the cost of one row of a prefill. Rows are not to be divided
    over devices: give each device its own queue.

    Raises:
        InputError: P + max_new_tokens is beyond the model's ``max_length``, or there are no slots.
    """
    if slots < 1:
        raise InputError(f"slots is {slots}: give at least 1")
    tokens, token_mask = jnp.asarray(tokens), jnp.asarray(token_mask)
    prompts, width = tokens.shape
    new, slots = sampling.max_new_tokens, min(slots, prompts)
    check_fits(config, width, sampling)
    weights = decoding_weights(config, params)
    lengths = jnp.sum(token_mask, axis=1, dtype=jnp.int32)
    row_keys = fold_rows(key, jnp.arange(prompts) if row_ids is None else row_ids)
    columns = jnp.arange(width + new)[None]

    def draw(hidden: jax.Array, owner: jax.Array, steps: jax.Array, match: jax.Array) -> Drawn:
        logits = vocabulary_logits(hidden, weights["head"], softcap=config.logit_softcap)
        return draw_next(logits, row_keys[owner], steps, match, sampling, eos_id, stop_table)

    def read(first: jax.Array, count: int) -> tuple[jax.Array, Cache]:
        cut = [jax.lax.dynamic_slice_in_dim(x, first, count) for x in (tokens, token_mask)]
        return prefill(config, weights, *cut, width + new, cache_dtype(config, sampling))

    def decode(state: _State) -> _State:
        column = width + state.drawn - 1
        readable = jnp.pad(token_mask[state.owner], ((0, 0), (0, new)))
        readable |= (columns >= width) & (columns <= column[:, None])
        positions = lengths[state.owner] + state.drawn - 1
        hidden, cache = decode_step(config, weights, state.cache, state.last, positions, column, readable)
        found = draw(hidden, state.owner, state.drawn, state.match)
        return state._replace(
            cache=cache,
            owner=jnp.where(found.ends | (state.drawn + 1 == new), prompts, state.owner),
            last=found.tokens,
            drawn=jnp.minimum(state.drawn + 1, new - 1),  # of slots that go on, less than new
            match=found.match,
            responses=_record(state.responses, state.owner, state.drawn, found),
        )

    def fill(state: _State) -> _State:
        slot = jnp.argmax(state.owner == prompts)
        hidden, row = read(state.queue, 1)
        mine = state.queue[None]
        found = draw(hidden, mine, jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32))
        over = found.ends[0] | (new == 1)
        return _State(
            cache=jax.tree.map(
                lambda old, one: jax.lax.dynamic_update_slice_in_dim(old, one, slot, axis=0), state.cache, row
            ),
            owner=state.owner.at[slot].set(jnp.where(over, prompts, state.queue)),
            last=state.last.at[slot].set(found.tokens[0]),
            drawn=state.drawn.at[slot].set(1),
            match=state.match.at[slot].set(found.match[0]),
            queue=state.queue + 1,
            responses=_record(state.responses, mine, jnp.zeros(1, jnp.int32), found),
        )

    def refill(state: _State) -> _State:
        wanted = lambda state: jnp.any(state.owner == prompts) & (state.queue < prompts)  # noqa: E731
        return jax.lax.while_loop(wanted, fill, state)

    owner = jnp.arange(slots, dtype=jnp.int32)
    zeros = jnp.zeros(slots, jnp.int32)
    hidden, cache = read(jnp.int32(0), slots)
    found = draw(hidden, owner, zeros, zeros)
    start = _State(
        cache=cache,
        owner=jnp.where(found.ends | (new == 1), prompts, owner),
        last=found.tokens,
        drawn=zeros + 1,
        match=found.match,
        queue=jnp.int32(slots),
        responses=_record(_none_yet(prompts, sampling, pad_id, tokens.dtype), owner, zeros, found),
    )
    unfinished = lambda state: jnp.any(state.owner < prompts)  # noqa: E731
    end = jax.lax.while_loop(unfinished, lambda state: refill(decode(state)), refill(start)).responses
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


def _none_yet(prompts: int, sampling: SamplingConfig, pad_id: int, dtype: jnp.dtype) -> _Responses:
    zeros = jnp.zeros((prompts, sampling.max_new_tokens), jnp.float32)
    return _Responses(
        tokens=jnp.full(zeros.shape, pad_id, dtype),
        log_probs=zeros,
        policy_log_probs=zeros if sampling.truncates else None,
        lengths=jnp.zeros((prompts,), jnp.int32),
        ended=jnp.zeros((prompts,), bool),
    )


def _record(responses: _Responses, owner: jax.Array, steps: jax.Array, found: Drawn) -> _Responses:
    """The responses with one more token for each owner [b], at place ``steps`` [b]; idle owners are out of range."""

    def put(rows: jax.Array, values: jax.Array) -> jax.Array:
        return rows.at[owner, steps].set(values.astype(rows.dtype), mode="drop")

    policy = responses.policy_log_probs
    return _Responses(
        tokens=put(responses.tokens, found.tokens),
        log_probs=put(responses.log_probs, found.log_probs),
        policy_log_probs=None if policy is None else put(policy, found.policy_log_probs),
        lengths=responses.lengths.at[owner].set(steps + 1, mode="drop"),
        ended=responses.ended.at[owner].set(found.ends, mode="drop"),
    )
