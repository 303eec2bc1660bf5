"""Conversations to ids, by the tokenizer's own chat template; imports tokenizer, rows and errors.

The template is rendered once with the answer and once without; where the latter is not how the former begins, nothing
says which tokens are the answer, and the template is refused. Both are tokenised together and divided at the boundary.
A template writes its own BOS and turn marks; EOS is the last id of every answer, whatever else it would write after it.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerFast

from rlhf_jax.data import tokenizer as tokenizers
from rlhf_jax.data.rows import Messages
from rlhf_jax.errors import InputError


def encode_conversation(
    tokenizer: PreTrainedTokenizerFast, messages: Messages, response: str, source: str
) -> tuple[list[int], list[int]]:
    """(prompt ids, response ids with one EOS, at the end) of an answer to ``messages``.

    Args:
      tokenizer: has a chat template.
      messages: the turns before the answer.
      response: the answer.
      source: where the row came from, for error messages.

    Raises:
      InputError: no template, one that refuses these turns, or one that does not keep what came before an answer.
    """
    turns = [{"role": role, "content": content} for role, content in messages]
    prompt = _render(tokenizer, turns, source, add_generation_prompt=True)
    whole = _render(tokenizer, [*turns, {"role": "assistant", "content": response}], source)
    if not whole.startswith(prompt):
        raise InputError(
            f"the tokenizer's chat template writes the turns of {source} otherwise once they are answered, so that "
            "nothing says where the answer begins: give a template that keeps them, or prompts as text."
        )
    encoding = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    boundary = next((i for i, (_, end) in enumerate(offsets) if end > len(prompt)), len(ids))
    eos, answer = tokenizers.eos_id(tokenizer), ids[boundary:]
    if eos in answer:
        return ids[:boundary], answer[: len(answer) - answer[::-1].index(eos)]
    return ids[:boundary], [*answer, eos]


def encode_turns(tokenizer: PreTrainedTokenizerFast, messages: Messages, source: str) -> list[int]:
    """The ids to sample an answer from; see `encode_conversation`."""
    turns = [{"role": role, "content": content} for role, content in messages]
    prompt = _render(tokenizer, turns, source, add_generation_prompt=True)
    return tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]


def _render(tokenizer: PreTrainedTokenizerFast, turns: list[dict[str, Any]], source: str, **how: bool) -> str:
    if not tokenizer.chat_template:
        raise InputError(
            f"{source} is a conversation and the tokenizer has no chat template: give one in its "
            "tokenizer_config.json, or prompts as text."
        )
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, **how)
    except Exception as error:  # a template is a program, and raises what it likes
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"the tokenizer's chat template refuses {source} ({reason}): mend the row, or give another template."
        ) from error
